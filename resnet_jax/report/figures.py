"""Figures of a report, drawn by matplotlib and returned as the bytes of PNG files.

They are made without pyplot, which has global state and is not safe in threads. Most are drawn for
a light and for a dark page. They are narrow and their text is large, so that a phone of 360 pixels
shows them legibly, and they have the resolution of a large screen.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from resnet_jax.report.runs import Record, Run
from resnet_jax.training.rate_range import RateCurve


@dataclasses.dataclass(frozen=True)
class Theme:
    """The colors of a figure, which are those of the page around it (template.html)."""

    background: str
    ink: str
    colors: tuple[str, ...]  # of curves, distinguishable with any color vision
    shades: Colormap  # from 0 to 1


# The palette of Okabe & Ito; on a dark page its colors are lighter.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
LIGHT = Theme("#ffffff", "#1b1f24", COLORS, matplotlib.colormaps["Blues"])
DARK = Theme(
    "#14181d",
    "#d5dbe1",
    ("#4FA3DC", "#F0793A", "#2CBE92", "#DDA0C4", "#F0B43C", "#8CD0F5", "#FFFFFF", "#AAAAAA"),
    LinearSegmentedColormap.from_list("dark", ["#14181d", "#1f5f94", "#8CD0F5"]),
)
Curve = Callable[[Sequence[Record]], tuple[list[int], list[float]]]  # steps and values

_WIDTH = 4.6  # inches; 72 / _WIDTH times the pixels of a phone is a point
_SIDE = 160  # pixels; larger images are reduced to it where many are shown


def learning_curves(runs: Sequence[Run], theme: Theme = LIGHT) -> bytes:
    """Top-1 error of several runs over steps (the paper's Figures 4 and 6), and learning rates."""
    figure = Figure(figsize=(_WIDTH, 4.0), dpi=200, layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_runs(axes, runs, theme, _errors, training_errors)
    for run, color in zip(runs, _colors(len(runs), theme)):
        rates = [record["learning_rate"] for record in run.training]
        below.plot([record["step"] for record in run.training], rates, color=color)
    axes.set_ylabel("top-1 error, %")
    axes.set_ylim(0, min(100, 1.15 * _largest_late(runs, _error)))
    if any(run.rate_drops() for run in runs):
        below.set_yscale("log")
    below.set(xlabel="step", ylabel="learning\nrate")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _grid(axes, below)
    _legend_of_runs(figure, axes, runs, theme)
    return _png(figure, theme)


def loss_curves(runs: Sequence[Run], theme: Theme = LIGHT) -> bytes:
    """The loss of several runs over steps, as `learning_curves` draws the error."""
    figure = Figure(figsize=(_WIDTH, 4.0), dpi=200, layout="constrained")
    axes = figure.subplots()
    _draw_runs(axes, runs, theme, _losses, _losses)
    top = 1.1 * _largest_late(runs, lambda record: float(record["loss"]))
    axes.set(xlabel="step", ylabel="loss", ylim=(0, top))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _grid(axes)
    _legend_of_runs(figure, axes, runs, theme)
    return _png(figure, theme)


def _draw_runs(
    axes: Axes, runs: Sequence[Run], theme: Theme, held_out: Curve, training: Curve
) -> None:
    """Draws training (thin), held-out (bold) and EMA (dashed) curves, and drops of the rate."""
    for run, color in zip(runs, _colors(len(runs), theme)):
        axes.plot(*training(run.training), linewidth=0.9, alpha=0.8, color=color)
        marker = "o" if len(run.evaluations) == 1 else None
        axes.plot(*held_out(run.evaluations), linewidth=2.2, marker=marker, color=color)
        if run.ema_evaluations:
            marker = "s" if len(run.ema_evaluations) == 1 else None
            steps, values = held_out(run.ema_evaluations)
            axes.plot(steps, values, "--", linewidth=1.6, marker=marker, color=color)
        for step in run.rate_drops():
            axes.axvline(step, color="0.55", linewidth=0.9, linestyle=":", zorder=0)


def _legend_of_runs(figure: Figure, axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    """What the styles mean above the axes and, of several runs, the names below the figure."""
    title = "thin: training    bold: held out"
    title += "\ndashed: held out, EMA of the parameters" * any(run.ema_evaluations for run in runs)
    axes.set_title(title, fontsize=8)
    if len(runs) < 2:
        return
    lines = [axes.plot([], [], color=color)[0] for color in _colors(len(runs), theme)]
    longest = max(len(run.title) for run in runs)
    columns = max(1, min(3, len(runs), 60 // (longest + 6)))
    titles = [_shortened(run.title, 60) for run in runs]
    legend = figure.legend(
        lines, titles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def multi_label_curves(runs: Sequence[Run], theme: Theme = LIGHT) -> bytes:
    """Mean AP and macro F1 on held-out images over steps, of the EMA where a run has one."""
    figure = Figure(figsize=(_WIDTH, 3.2), dpi=200, layout="constrained")
    axes = figure.subplots()
    for run, color in zip(runs, _colors(len(runs), theme)):
        records = [r for r in run.ema_evaluations or run.evaluations if "map" in r and "f1" in r]
        steps = [record["step"] for record in records]
        marker = "o" if len(records) == 1 else None
        for name, style, label in (("map", "-", run.title), ("f1", "--", None)):
            values = [100 * record[name] for record in records]
            axes.plot(steps, values, style, color=color, marker=marker, label=label)
    axes.set(xlabel="step", ylabel="%", ylim=(0, 100))
    axes.set_title("solid: mean average precision    dashed: F1", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _grid(axes)
    _legend(axes)
    return _png(figure, theme)


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


def response_curves(
    deviations_by_run: Mapping[str, Mapping[str, float]], theme: Theme = LIGHT
) -> bytes:
    """Standard deviations of layer responses by run title and layer (the paper's Figure 7)."""
    figure = Figure(figsize=(_WIDTH, 4.2), dpi=200, layout="constrained")
    above, below = figure.subplots(2, 1)
    colors = _colors(len(deviations_by_run), theme)
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
    if len(deviations_by_run) > 1:
        _legend(above)
    return _png(figure, theme)


def confusion_matrix(counts: np.ndarray, names: Sequence[str], theme: Theme = LIGHT) -> bytes:
    """A confusion matrix [classes, classes], true classes in rows, each row normalized."""
    classes = len(names)
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(max(_WIDTH, 1.5 + 0.2 * classes), 9.0)
    figure = Figure(figsize=(side, side), dpi=200, layout="constrained")
    axes = figure.subplots()
    axes.imshow(fractions, theme.shades, vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if classes <= 40:
        labels = _name_ticks(axes, names, side)
        size = _name_size(classes, side)
        axes.set_yticks(range(classes), labels, fontsize=size, parse_math=False)
    if classes <= 20:
        middle = 0.5 if theme is LIGHT else 0.6
        for row, column in np.argwhere(counts):
            dark = (fractions[row, column] > middle) != (theme is LIGHT)
            axes.text(
                *(column, row, f"{counts[row, column]}"),
                ha="center",
                va="center",
                fontsize=_name_size(classes, side) - 1,
                color="black" if dark else "white",
            )
    return _png(figure, theme)


def class_sizes(
    names: Sequence[str],
    counts: np.ndarray,
    accuracies: Sequence[float | None] = (),
    theme: Theme = LIGHT,
) -> bytes:
    """Training images of each class, by decreasing size, and accuracies where they are known."""
    panels = 2 if len(accuracies) else 1
    width = max(_WIDTH, 1.0 + 0.18 * len(names)) if len(names) <= 40 else _WIDTH
    figure = Figure(figsize=(width, 1.2 + 1.6 * panels), dpi=200, layout="constrained")
    all_axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    order = np.argsort(-counts, kind="stable")
    ranks = np.arange(len(names))
    # A filled area: thousands of bars are slow to draw and look the same.
    all_axes[0].fill_between(ranks, counts[order], step="mid", color=theme.colors[0], linewidth=0)
    if counts.max() > 10 * max(1, counts.min()):
        all_axes[0].set_yscale("log")
        all_axes[0].set_ylim(bottom=0.5)
    all_axes[0].set_ylabel("training images")
    if panels == 2:
        percent = np.array([np.nan if each is None else 100 * each for each in accuracies])
        all_axes[1].plot(ranks, percent[order], ".", color=theme.colors[1])
        all_axes[1].set(ylabel="accuracy, %", ylim=(0, 105))
    for axes in all_axes:
        axes.grid(alpha=0.25, axis="y")
    if len(names) <= 40:
        _name_ticks(all_axes[-1], [names[index] for index in order], width)
    else:
        all_axes[-1].set_xlabel("classes, by decreasing size")
    return _png(figure, theme)


def _name_ticks(axes: Axes, names: Sequence[str], width: float) -> list[str]:
    """Names below axes of a width in inches: upright if they fit, and cut where they do not."""
    size, room = _name_size(len(names), width), 0.85 * width / len(names)
    letter = 0.6 * size / 72  # mean width in inches
    upright = max(map(len, names)) * letter < 0.8 * room
    # A turned name may take a third of the figure.
    labels = [_shortened(name, int(0.33 * width / letter)) for name in names]
    ticks = range(len(names))
    axes.set_xticks(ticks, labels, rotation=0 if upright else 90, fontsize=size, parse_math=False)
    return labels


def _name_size(classes: int, width: float) -> float:
    """The font size in points of names beside each other in a width in inches."""
    return float(np.clip(0.6 * 72 * 0.85 * width / classes, 6.5, 9.0))


def pixels_png(pixels: np.ndarray, side: int = _SIDE) -> bytes:
    """An image, uint8 [H, W, C], as a PNG file of at most `side` pixels a side."""
    image = Image.fromarray(_displayable(pixels))
    if max(image.size) > side:
        scale = side / max(image.size)
        width, height = (max(1, round(each * scale)) for each in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def saliency_pngs(image: np.ndarray, cam: np.ndarray, attribution: np.ndarray) -> list[bytes]:
    """An image uint8 [H, W, C], its Grad-CAM over it, and its integrated gradients.

    Shapes: cam [H, W] in [0, 1], attribution [H, W, C].
    """
    shown = _displayable(image)
    gray = shown if shown.ndim == 2 else shown.mean(-1)
    heat = matplotlib.colormaps["inferno"](cam)[..., :3]
    overlay = 0.4 * gray[..., None] / 255 + 0.6 * heat
    by_pixel = attribution.sum(-1)  # [H, W]
    limit = max(np.percentile(np.abs(by_pixel), 99.5), 1e-12)
    signed = matplotlib.colormaps["PuOr_r"](0.5 + 0.5 * by_pixel / limit)[..., :3]
    pictures = [image, *((255 * each).astype(np.uint8) for each in (overlay, signed))]
    return [pixels_png(each) for each in pictures]


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
        records = [*run.training, *run.evaluations, *run.ema_evaluations]
        last = max(record["step"] for record in records)
        found += [value(record) for record in records if record["step"] >= 0.1 * last]
    return max(found) or 1.0


def _colors(count: int, theme: Theme) -> list[str]:
    return [theme.colors[index % len(theme.colors)] for index in range(count)]


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


def _png(figure: Figure, theme: Theme = LIGHT) -> bytes:
    _paint(figure, theme)
    file = io.BytesIO()
    with warnings.catch_warnings():  # characters that the font lacks become boxes
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        figure.savefig(file, format="png")
    return file.getvalue()


def _paint(figure: Figure, theme: Theme) -> None:
    """Gives backgrounds, frames and text outside of the axes the colors of a theme."""
    figure.set_facecolor(theme.background)
    for axes in figure.axes:
        axes.set_facecolor(theme.background)
        axes.tick_params(colors=theme.ink, which="both")
        for label in (axes.title, axes.xaxis.label, axes.yaxis.label):
            label.set_color(theme.ink)
        for spine in axes.spines.values():
            spine.set_edgecolor(theme.ink)
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    for legend in filter(None, legends):
        legend.get_frame().set(facecolor=theme.background, edgecolor=theme.ink)
        for text in legend.get_texts():
            text.set_color(theme.ink)
