"""The plots of a report, as figures of matplotlib in the light colors of a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from resnet_jax.report.drawing import WIDTH, new_figure
from resnet_jax.report.palette import LIGHT, LIGHT_CURVES, SHADE
from resnet_jax.report.runs import Record, Run
from resnet_jax.terminal import shortened
from resnet_jax.training.rate_range import RateCurve

Curve = Callable[[Sequence[Record]], tuple[list[int], list[float]]]  # steps and values

_MAX_POINTS = 500  # of a curve: a large page has as many pixels
_FEW_POINTS = 30  # each of them has a marker
_NAMED_CLASSES = 40  # more names are illegible
_MAX_DOTS = 200  # of classes; more are averaged


def learning_curves(runs: Sequence[Run]) -> Figure:
    """Top-1 error of several runs over steps (the paper's Figures 4 and 6), and learning rates."""
    figure = new_figure(height=4.2)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_runs(axes, runs, _errors, training_errors)
    for run, color in zip(runs, _colors(len(runs))):
        steps = [record["step"] for record in run.training]
        rates = [record["learning_rate"] for record in run.training]
        below.plot(steps, rates, color=color, **_marker(steps, 3))
    axes.set(ylabel="top-1 error, %", ylim=(0, min(100, 1.15 * _largest_late(runs, _error))))
    if any(run.rate_drops() for run in runs):
        below.margins(y=0.15)
        _log_scale(below)
    else:
        below.set_ylim(bottom=0)
    below.set_xlabel("step")
    below.set_ylabel("learning rate", fontsize=8)
    _step_axis(below, runs)
    _grid(axes, below)
    _legends_of_runs(figure, axes, runs)
    return figure


def loss_curves(runs: Sequence[Run]) -> Figure:
    """The loss of several runs over steps, as `learning_curves` draws the error."""
    figure = new_figure(height=4.2)
    axes = figure.subplots()
    _draw_runs(axes, runs, _losses, training_losses)
    top = 1.1 * _largest_late(runs, lambda record: float(record["loss"]))
    axes.set(xlabel="step", ylabel="loss", ylim=(0, top))
    _step_axis(axes, runs)
    _grid(axes)
    _legends_of_runs(figure, axes, runs)
    return figure


_TRAINING: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.8}
_HELD_OUT: dict[str, Any] = {"linewidth": 2.2}
_EMA: dict[str, Any] = {"linewidth": 1.6, "linestyle": "--"}


def _draw_runs(axes: Axes, runs: Sequence[Run], held_out: Curve, training: Curve) -> None:
    """Draws training (thin), held-out (bold) and EMA (dashed) curves, and drops of the rate."""
    for run, color in zip(runs, _colors(len(runs))):
        for (steps, values), style, size in (
            (training(run.training), _TRAINING, 3.0),
            (held_out(run.evaluations), _HELD_OUT, 5.0),
            (held_out(run.ema_evaluations), _EMA, 4.0),
        ):
            axes.plot(steps, values, color=color, **style, **_marker(steps, size))
        for step in run.rate_drops():
            axes.axvline(step, color="0.55", linewidth=0.9, linestyle=":", zorder=0)


def _marker(points: Sequence[int], size: float) -> dict[str, Any]:
    """The style of markers, which curves of few points have."""
    return {"marker": "o", "markersize": size} if len(points) <= _FEW_POINTS else {}


def _step_axis(axes: Axes, runs: Sequence[Run]) -> None:
    """Steps from 0 to the end of the longest run."""
    last = max(record["step"] for run in runs for record in run.records)
    axes.set_xlim(0, 1.03 * last)  # a marker at the end is whole
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _log_scale(axes: Axes) -> None:
    """A logarithmic axis y with plain numbers, which are not drawn as formulas."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legends_of_runs(figure: Figure, axes: Axes, runs: Sequence[Run]) -> None:
    """What the styles mean above the axes and, of several runs, the names below the figure."""
    shown = {
        "training": (_TRAINING, any(run.training for run in runs)),
        "held out": (_HELD_OUT, any(run.evaluations for run in runs)),
        "held out, EMA": (_EMA, any(run.ema_evaluations for run in runs)),
    }
    ink = LIGHT_CURVES[0] if len(runs) == 1 else LIGHT["ink"]
    styles = {
        name: Line2D([], [], color=ink, **style) for name, (style, there) in shown.items() if there
    }
    _outside_legend(figure, styles, "outside upper center", columns=len(styles))
    if len(runs) < 2:
        return
    lines = [Line2D([], [], color=color) for color in _colors(len(runs))]
    titles = [shortened(run.title, 60) for run in runs]
    columns = max(1, min(3, len(runs), 60 // (max(map(len, titles)) + 6)))
    _outside_legend(figure, dict(zip(titles, lines)), "outside lower center", columns)


def _outside_legend(
    figure: Figure,
    lines: Mapping[str, Line2D],
    place: str,
    columns: int,
) -> None:
    style: dict[str, Any] = {"loc": place, "ncols": columns, "fontsize": 8, "frameon": False}
    legend = figure.legend([*lines.values()], [*lines], **style)
    _show_as_they_are(legend.get_texts())


def multi_label_curves(runs: Sequence[Run]) -> Figure:
    """Mean AP and macro F1 on held-out images over steps, of the EMA where a run has one."""
    figure = new_figure(height=3.4)
    axes = figure.subplots()
    for run, color in zip(runs, _colors(len(runs))):
        records = [r for r in run.ranked if "map" in r and "f1" in r]
        steps = [record["step"] for record in records]
        for name, style in (("map", "-"), ("f1", "--")):
            values = [100 * record[name] for record in records]
            axes.plot(steps, values, style, color=color, **_marker(steps, 4))
    axes.set(xlabel="step", ylabel="%", ylim=(0, 100))
    _step_axis(axes, runs)
    _grid(axes)
    ink = LIGHT_CURVES[0] if len(runs) == 1 else LIGHT["ink"]
    styles: dict[str, Any] = {"mean average precision": "-", "F1": "--"}
    lines = {name: Line2D([], [], color=ink, linestyle=style) for name, style in styles.items()}
    _outside_legend(figure, lines, "outside upper center", columns=2)
    if len(runs) > 1:
        lines = {run.title: Line2D([], [], color=c) for run, c in zip(runs, _colors(len(runs)))}
        _outside_legend(figure, lines, "outside lower center", columns=1)
    return figure


def rate_curve(curve: RateCurve, title: str) -> Figure:
    """The loss over the learning rate of a range test, with the suggested rates."""
    figure = Figure(figsize=(7.2, 4.2), dpi=110, layout="constrained")
    axes, colors = figure.subplots(), LIGHT_CURVES
    axes.plot(curve.rates, curve.losses, color=colors[0], alpha=0.4, lw=0.8, label="each batch")
    axes.plot(curve.rates, curve.smoothed, color=colors[0], linewidth=2.2, label="smoothed")
    if np.isfinite(curve.steepest):
        for rate, name, style, color in (
            (curve.steepest, "steepest descent: {:.2g} (suggested)", "-", colors[1]),
            (curve.lowest, "lowest loss before the first rise: {:.2g}", ":", colors[2]),
            (curve.lowest / 10, "a tenth of that: {:.2g}", "--", colors[2]),
        ):
            axes.axvline(rate, color=color, linestyle=style, label=name.format(rate))
    if len(curve.losses):
        # A diverged loss would compress the rest of the curve to a line.
        low, first = curve.losses.min(), curve.losses[: 1 + len(curve.losses) // 4].max()
        axes.set_ylim(low - 0.1 * (first - low), min(curve.losses.max(), 2 * first - low))
    axes.set_xscale("log")
    factor = f" (times {curve.scale:g} for the batch)" if curve.scale != 1 else ""
    axes.set(xlabel=f"optimizer.learning_rate{factor}", ylabel="training loss")
    axes.set_title(title, fontsize="medium", parse_math=False)
    _grid(axes)
    _legend(axes)
    return figure


def response_curves(deviations_by_run: Mapping[str, Mapping[str, float]]) -> Figure:
    """Standard deviations of layer responses by run title and layer (the paper's Figure 7)."""
    figure = new_figure(height=4.2)
    above, below = figure.subplots(2, 1)
    for (title, deviations), color in zip(
        deviations_by_run.items(), _colors(len(deviations_by_run))
    ):
        values = list(deviations.values())
        layers = range(1, len(values) + 1)
        line = {"color": color, "linewidth": 1.1, **_marker(layers, 3)}
        above.plot(layers, values, label=title, **line)
        below.plot(layers, sorted(values, reverse=True), **line)
    above.set(xlabel="layer, in network order", ylabel="std")
    below.set(xlabel="layer, by decreasing response", ylabel="std")
    every = [x for deviations in deviations_by_run.values() for x in deviations.values()]
    for axes in (above, below):
        axes.set_ylim(0, 1.05 * max(filter(np.isfinite, every), default=1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _grid(above, below)
    if len(deviations_by_run) > 1:
        _legend(above)
    return figure


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """A confusion matrix [classes, classes], true classes in rows, each row normalized."""
    classes = len(names)
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # Without names it may be as small as a screen is.
    side = min(max(WIDTH, 1.5 + 0.2 * classes), 8.2) if classes <= _NAMED_CLASSES else WIDTH
    figure = new_figure(side, side)
    axes = figure.subplots()
    # Transparent where there is nothing. The root shows rare errors.
    shade = np.broadcast_to(to_rgb(SHADE), (classes, classes, 3))
    axes.imshow(np.dstack([shade, np.sqrt(fractions)]), interpolation="none")
    axes.set(xlabel="predicted class", ylabel="true class")
    if classes <= _NAMED_CLASSES:
        labels = _name_ticks(axes, names, side)
        size = _name_size(classes, side)
        axes.set_yticks(range(classes), labels, fontsize=size, parse_math=False)
    if classes <= 20:
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": LIGHT["strong"]}
        size = _name_size(classes, side) - 1
        for row, column in np.argwhere(counts):
            axes.text(column, row, f"{counts[row, column]}", fontsize=size, **style)
    return figure


def class_sizes(
    names: Sequence[str], counts: np.ndarray, accuracies: Sequence[float | None] = ()
) -> Figure:
    """Training images of each class, by decreasing size, and accuracies where they are known."""
    order = np.argsort(-counts, kind="stable")
    percent = np.array([np.nan if each is None else 100 * each for each in accuracies])
    sizes = counts[order]
    percent = percent[order] if len(percent) else percent
    if len(names) <= _NAMED_CLASSES:
        return _named_sizes([names[index] for index in order], sizes, percent)
    return _many_sizes(sizes, percent)


def _named_sizes(names: Sequence[str], sizes: np.ndarray, percent: np.ndarray) -> Figure:
    """A bar for each class, beside its name."""
    panels = 2 if len(percent) else 1
    figure = new_figure(height=0.9 + 0.2 * len(names))
    all_axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    places = np.arange(len(names))
    all_axes[0].barh(places, sizes, height=0.7, color=LIGHT_CURVES[0])
    all_axes[0].set_xlabel("training images")
    all_axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    if _is_uneven(sizes):
        all_axes[0].set_xscale("log")
        all_axes[0].set_xlim(left=0.5)
        all_axes[0].xaxis.set_major_formatter("{x:g}")
        all_axes[0].xaxis.set_minor_formatter(NullFormatter())
    if panels == 2:
        all_axes[1].barh(places, percent, height=0.7, color=LIGHT_CURVES[1])
        all_axes[1].set(xlabel="accuracy, %", xlim=(0, 100))
    labels = [shortened(name, 20) for name in names]
    all_axes[0].set_yticks(places, labels, fontsize=8, parse_math=False)
    all_axes[0].set_ylim(len(names) - 0.4, -0.6)
    for axes in all_axes:
        axes.grid(alpha=0.25, axis="x")
        axes.tick_params(axis="y", length=0)
    return figure


def _many_sizes(sizes: np.ndarray, percent: np.ndarray) -> Figure:
    """Curves over the classes, whose names would be illegible."""
    panels = 2 if len(percent) else 1
    figure = new_figure(height=1.2 + 1.6 * panels)
    all_axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    ranks = np.arange(1, len(sizes) + 1)
    shown = np.unique(np.linspace(0, len(sizes) - 1, _MAX_POINTS).round().astype(int))
    low = 0.5 if _is_uneven(sizes) else 0
    all_axes[0].fill_between(ranks[shown], sizes[shown], low, alpha=0.25, color=LIGHT_CURVES[0])
    all_axes[0].plot(ranks[shown], sizes[shown], color=LIGHT_CURVES[0])
    all_axes[0].set_ylabel("training images")
    all_axes[0].set_ylim(bottom=low)
    if low:
        all_axes[0].set_ylim(top=1.5 * sizes.max())
        _log_scale(all_axes[0])
    if panels == 2:
        group = -(-len(sizes) // _MAX_DOTS)  # classes in a dot
        starts = np.arange(0, len(sizes), group)
        there = ~np.isnan(percent)
        known = np.add.reduceat(there, starts)
        sums = np.add.reduceat(np.where(there, percent, 0), starts)
        middles = np.add.reduceat(ranks, starts) / np.diff([*starts, len(sizes)])
        means = sums[known > 0] / known[known > 0]
        all_axes[1].plot(middles[known > 0], means, ".", color=LIGHT_CURVES[1])
        of = f"\nmean of {group} classes" if group > 1 else ""
        all_axes[1].set(ylabel=f"accuracy, %{of}", ylim=(0, 105))
    for axes in all_axes:
        axes.grid(alpha=0.25, axis="y")
    all_axes[-1].set(xlabel="classes, by decreasing size", xlim=(0, len(sizes) + 1))
    return figure


def _is_uneven(sizes: np.ndarray) -> bool:
    """Whether classes differ so much that small ones need a logarithmic axis."""
    return bool(sizes.max() > 10 * max(1, sizes.min()))


def _name_ticks(axes: Axes, names: Sequence[str], width: float) -> list[str]:
    """Names below axes of a width in inches: upright if they fit, and cut where they do not."""
    size, room = _name_size(len(names), width), 0.85 * width / len(names)
    letter = 0.6 * size / 72  # mean width in inches
    upright = max(map(len, names)) * letter < 0.8 * room
    # A turned name may take a third of the figure.
    labels = [shortened(name, int(0.33 * width / letter)) for name in names]
    # In a page a turned name ends at the axes, whatever its font.
    style: dict[str, Any] = {}
    if not upright:
        style = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
    axes.set_xticks(range(len(names)), labels, fontsize=size, parse_math=False, **style)
    return labels


def _name_size(classes: int, width: float) -> float:
    """The font size in points of names beside each other in a width in inches."""
    return float(np.clip(0.6 * 72 * 0.85 * width / classes, 6.5, 9.0))


def training_errors(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    """(steps, top-1 errors in %) of training records, averaged as `_means` does."""
    return _means(records, _error)


def training_losses(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    """(steps, losses) of training records, averaged as `_means` does."""
    return _means(records, lambda record: float(record["loss"]))


def _means(
    records: Sequence[Record], value: Callable[[Record], float]
) -> tuple[list[int], list[float]]:
    """Steps, and values that are means over the steps of records.

    A record that covers few steps, as one cut short by an evaluation does, is averaged with the
    next one, or with the one before it at the end; and so are those of a long run.
    """
    points: list[tuple[int, int, float]] = []  # last step, steps covered, sum of their values
    ends = [record["step"] for record in records]
    spans = [end - start for start, end in zip([0, *ends], ends)]
    least = max([max(spans) / 2, ends[-1] / _MAX_POINTS]) if spans else 0
    count, total = 0, 0.0
    for record, span in zip(records, spans):
        count, total = count + span, total + span * value(record)
        if count >= least:
            points.append((record["step"], count, total))
            count, total = 0, 0.0
    if count:
        _, last_count, last_total = points.pop()
        points.append((ends[-1], last_count + count, last_total + total))
    return [step for step, _, _ in points], [total / count for _, count, total in points]


def _losses(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    return [r["step"] for r in records], [r["loss"] for r in records]


def _errors(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    return [r["step"] for r in records], [*map(_error, records)]


def _error(record: Record) -> float:
    return 100 * (1 - float(record["top1"]))


def _largest_late(runs: Sequence[Run], value: Callable[[Record], float]) -> float:
    """The largest value of the records of runs, each without its first tenth."""
    found = []
    for run in runs:
        last = max(record["step"] for record in run.records)
        found += [value(record) for record in run.records if record["step"] >= 0.1 * last]
    return max(found) or 1.0


def _colors(count: int) -> list[str]:
    return [LIGHT_CURVES[index % len(LIGHT_CURVES)] for index in range(count)]


def _grid(*all_axes: Axes) -> None:
    for axes in all_axes:
        axes.grid(alpha=0.25)


def _legend(axes: Axes) -> None:
    """A legend of at most six lines; names are shown as they are, not as formulas."""
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.legend(handles, labels, fontsize="small", ncols=-(-len(labels) // 6))
    _show_as_they_are(legend.get_texts())


def _show_as_they_are(texts: Sequence[Text]) -> None:
    for text in texts:
        text.set_parse_math(False)
