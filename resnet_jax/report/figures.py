"""Figures of a report, drawn by matplotlib and returned as the bytes of PNG files.

They are made without pyplot, which has global state and is not safe in threads.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_jax.report.runs import Record, Run
from resnet_jax.training.rate_range import RateCurve

# The palette of Okabe & Ito, distinguishable with any color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def learning_curves(runs: Sequence[Run]) -> bytes:
    """Top-1 error of several runs over steps (the paper's Figures 4 and 6), and learning rates."""
    figure = Figure(figsize=(7.2, 4.8), dpi=110, layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for run, color in zip(runs, _colors(len(runs))):
        axes.plot(*training_errors(run.training), linewidth=0.9, alpha=0.8, color=color)
        style = {"linewidth": 2.2, "marker": "o" if len(run.evaluations) == 1 else None}
        axes.plot(*_errors(run.evaluations), label=run.title, color=color, **style)
        if run.ema_evaluations:
            axes.plot(*_errors(run.ema_evaluations), linewidth=1.6, linestyle="--", color=color)
        for step in run.rate_drops():
            axes.axvline(step, color="0.75", linewidth=0.8, linestyle=":", zorder=0)
        rates = [record["learning_rate"] for record in run.training]
        below.plot([record["step"] for record in run.training], rates, color=color)
    axes.set_ylim(0, min(100, 1.15 * max(_largest_late_error(run) for run in runs)))
    axes.set_ylabel("top-1 error, %")
    has_ema = any(run.ema_evaluations for run in runs)
    title = "thin: training    bold: held out"
    title += "    dashed: held out, EMA of the parameters" if has_ema else ""
    axes.set_title(title, fontsize="small", color="0.3")
    _legend(axes)
    if any(run.rate_drops() for run in runs):
        below.set_yscale("log")
    below.set(xlabel="step", ylabel="learning\nrate")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    _grid(axes, below)
    return _png(figure)


def multi_label_curves(runs: Sequence[Run]) -> bytes:
    """Mean AP and macro F1 on held-out images over steps, of the EMA where a run has one."""
    figure = Figure(figsize=(7.2, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for run, color in zip(runs, _colors(len(runs))):
        records = [r for r in run.ema_evaluations or run.evaluations if "map" in r and "f1" in r]
        steps = [record["step"] for record in records]
        marker = "o" if len(records) == 1 else None
        for name, style, label in (("map", "-", run.title), ("f1", "--", None)):
            values = [100 * record[name] for record in records]
            axes.plot(steps, values, style, color=color, marker=marker, label=label)
    axes.set(xlabel="step", ylabel="%", ylim=(0, 100))
    axes.set_title("solid: mean average precision    dashed: F1", fontsize="small", color="0.3")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _grid(axes)
    _legend(axes)
    return _png(figure)


def rate_curve(curve: RateCurve, title: str) -> bytes:
    """The loss over the learning rate of a range test, with the suggested rates."""
    figure = Figure(figsize=(7.2, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.rates, curve.losses, color=COLORS[0], alpha=0.4, lw=0.8, label="each batch")
    axes.plot(curve.rates, curve.smoothed, color=COLORS[0], linewidth=2.2, label="smoothed")
    if np.isfinite(curve.steepest):
        for rate, name, style, color in (
            (curve.steepest, "steepest descent: {:.2g} (suggested)", "-", COLORS[1]),
            (curve.lowest, "lowest loss before the first rise: {:.2g}", ":", COLORS[2]),
            (curve.lowest / 10, "a tenth of that: {:.2g}", "--", COLORS[2]),
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
    return _png(figure)


def response_curves(deviations_by_run: Mapping[str, Mapping[str, float]]) -> bytes:
    """Standard deviations of layer responses by run title and layer (the paper's Figure 7)."""
    figure = Figure(figsize=(7.2, 4.8), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1)
    colors = _colors(len(deviations_by_run))
    for (title, deviations), color in zip(deviations_by_run.items(), colors):
        values = list(deviations.values())
        layers = range(1, len(values) + 1)
        line = {"color": color, "marker": ".", "linewidth": 1.1}
        above.plot(layers, values, label=title, **line)
        below.plot(layers, sorted(values, reverse=True), **line)
    above.set(xlabel="layer, in network order", ylabel="std")
    below.set(xlabel="layer, by decreasing response", ylabel="std")
    every = [x for deviations in deviations_by_run.values() for x in deviations.values()]
    for axes in (above, below):
        axes.set_ylim(0, 1.05 * max(filter(np.isfinite, every), default=1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _grid(above, below)
    _legend(above)
    return _png(figure)


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """A confusion matrix [classes, classes], true classes in rows, each row normalized."""
    classes = len(names)
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3.2 + 0.32 * classes, 9.0)
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if classes <= 40:
        labels = [_shortened(name) for name in names]
        axes.set_xticks(range(classes), labels, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(classes), labels, fontsize=8, parse_math=False)
    if classes <= 20:
        for row, column in np.argwhere(counts):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(
                *(column, row, f"{counts[row, column]}"),
                ha="center",
                va="center",
                fontsize=7,
                color=color,
            )
    return _png(figure)


def class_sizes(
    names: Sequence[str], counts: np.ndarray, accuracies: Sequence[float | None] = ()
) -> bytes:
    """Training images of each class, by decreasing size, and accuracies where they are known."""
    panels = 2 if len(accuracies) else 1
    figure = Figure(figsize=(7.2, 1.2 + 2.0 * panels), dpi=110, layout="constrained")
    all_axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    order = np.argsort(-counts, kind="stable")
    ranks = np.arange(len(names))
    # A filled area: thousands of bars are slow to draw and look the same.
    all_axes[0].fill_between(ranks, counts[order], step="mid", color=COLORS[0], linewidth=0)
    if counts.max() > 10 * max(1, counts.min()):
        all_axes[0].set_yscale("log")
        all_axes[0].set_ylim(bottom=0.5)
    all_axes[0].set_ylabel("training images")
    if panels == 2:
        percent = np.array([np.nan if each is None else 100 * each for each in accuracies])
        all_axes[1].plot(ranks, percent[order], ".", color=COLORS[1])
        all_axes[1].set(ylabel="accuracy, %", ylim=(0, 105))
    for axes in all_axes:
        axes.grid(alpha=0.25, axis="y")
    if len(names) <= 40:
        labels = [_shortened(names[index]) for index in order]
        all_axes[-1].set_xticks(ranks, labels, rotation=90, fontsize=8, parse_math=False)
    else:
        all_axes[-1].set_xlabel("classes, by decreasing size")
    return _png(figure)


def image_grid(images: Sequence[np.ndarray], titles: Sequence[str], columns: int) -> bytes:
    """Images, uint8 or float in [0, 1] [H, W, C], in rows of `columns`, each below its title."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.35 * columns, 1.75 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    _hide_frames(grid)
    for axes, image, title in zip(grid.flat, images, titles):
        small = max(image.shape[:2]) < 96  # show its pixels as squares
        style = {"interpolation": "nearest" if small else "antialiased"}
        white = 255 if image.dtype == np.uint8 else 1
        axes.imshow(_displayable(image), "gray", vmin=0, vmax=white, **style)
        axes.set_title(title, fontsize=7, parse_math=False)
    return _png(figure)


def filter_grid(kernel: np.ndarray) -> bytes:
    """A kernel [side, side, C, K] as K pictures on one scale, gray at 0; in color where C is 3."""
    side, _, channels, count = kernel.shape
    columns = min(count, 16)
    rows = -(-count // columns)
    if channels != 3:
        kernel = kernel.mean(2, keepdims=True)
    scaled = 0.5 + 0.5 * kernel / np.abs(kernel).max()
    sheet = np.ones((rows * (side + 1) - 1, columns * (side + 1) - 1, kernel.shape[2]))
    for index in range(count):
        row, column = divmod(index, columns)
        top, left = row * (side + 1), column * (side + 1)
        sheet[top : top + side, left : left + side] = scaled[..., index]
    width = 7.2
    figure = Figure(figsize=(width, width * sheet.shape[0] / sheet.shape[1]), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.imshow(sheet.squeeze(), "gray", vmin=0, vmax=1, interpolation="nearest")
    return _png(figure)


def saliency_grid(
    images: np.ndarray, cams: np.ndarray, attributions: np.ndarray, titles: Sequence[str]
) -> bytes:
    """Images uint8 [N, H, W, C], each beside its Grad-CAM and its integrated gradients.

    Shapes: cams [N, H, W] in [0, 1], attributions [N, H, W, C].
    """
    columns = 2 if len(images) > 1 else 1
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.7 * columns, 1.5 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, 3 * columns, squeeze=False)
    _hide_frames(grid)
    for index, (image, cam, attribution) in enumerate(zip(images, cams, attributions)):
        row, column = divmod(index, columns)
        first, second, third = grid[row, 3 * column : 3 * column + 3]
        for axes in (first, second):
            axes.imshow(_displayable(image), "gray", vmin=0, vmax=255)
        second.imshow(cam, "inferno", vmin=0, vmax=1, alpha=0.6)
        by_pixel = attribution.sum(-1)  # [H, W]
        limit = max(np.percentile(np.abs(by_pixel), 99.5), 1e-12)
        third.imshow(by_pixel, "PuOr_r", vmin=-limit, vmax=limit)
        first.set_title(titles[index], fontsize=7, parse_math=False)
        if row == 0:
            second.set_title("Grad-CAM", fontsize=7)
            third.set_title("integrated gradients", fontsize=7)
    return _png(figure)


def training_errors(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    """(steps, top-1 errors in %) of training records.

    A record that covers few steps, as one cut short by an evaluation does, is averaged with the
    next one, or with the one before it at the end.
    """
    points: list[tuple[int, int, float]] = []  # last step, steps covered, sum of their errors
    ends = [record["step"] for record in records]
    spans = [end - start for start, end in zip([0, *ends], ends)]
    count, total = 0, 0.0
    for record, span in zip(records, spans):
        count, total = count + span, total + span * (1 - record["top1"])
        if 2 * count >= max(spans):
            points.append((record["step"], count, total))
            count, total = 0, 0.0
    if count:
        _, last_count, last_total = points.pop()
        points.append((ends[-1], last_count + count, last_total + total))
    return [step for step, _, _ in points], [100 * total / count for _, count, total in points]


def _errors(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    return [r["step"] for r in records], [100 * (1 - r["top1"]) for r in records]


def _largest_late_error(run: Run) -> float:
    """The largest error in % after the first tenth of a run."""
    records = [*run.training, *run.evaluations]
    last = max(record["step"] for record in records)
    late = [record for record in records if record["step"] >= 0.1 * last]
    return max(100 * (1 - record["top1"]) for record in late) or 1.0


def _colors(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


def _grid(*all_axes: Axes) -> None:
    for axes in all_axes:
        axes.grid(alpha=0.25)


def _hide_frames(grid: np.ndarray) -> None:
    for axes in grid.flat:
        axes.axis("off")


def _legend(axes: Axes) -> None:
    """A legend of at most six lines; names are shown as they are, not as formulas."""
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.legend(handles, labels, fontsize="small", ncols=-(-len(labels) // 6))
    for text in legend.get_texts():
        text.set_parse_math(False)


def _shortened(name: str, longest: int = 18) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _displayable(image: np.ndarray) -> np.ndarray:
    """The first three channels of an image [H, W, C], or the first one where there are fewer."""
    return image[:, :, 0] if image.shape[2] < 3 else image[:, :, :3]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():  # characters that the font lacks become boxes
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        figure.savefig(file, format="png")
    return file.getvalue()
