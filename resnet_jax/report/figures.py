"""The figures of a report, drawn by matplotlib and returned as PNG files' bytes.

Figures are made without pyplot: no global state, no window, safe in any thread.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_jax.report.runs import Record, Run
from resnet_jax.training.rate_range import RateCurve

# Okabe & Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def learning_curves(runs: Sequence[Run]) -> bytes:
    """Error in % over steps, as in the paper's Figures 4 and 6, and the learning rate below.

    Args:
      runs: Overlaid: thin lines are training, bold ones held-out images, dashed ones the moving
        average's.

    Returns:
      A PNG file.
    """
    figure = Figure(figsize=(7.2, 4.8), dpi=110, layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    tops = []
    for run, colour in zip(runs, _colours(len(runs))):
        line = {"color": colour}
        axes.plot(*training_errors(run.training), linewidth=0.9, alpha=0.8, **line)
        marker = "o" if len(run.evaluations) == 1 else None
        axes.plot(*_errors(run.evaluations), linewidth=2.2, marker=marker, label=run.title, **line)
        if run.ema_evaluations:
            axes.plot(*_errors(run.ema_evaluations), linewidth=1.6, linestyle="--", **line)
        steps = [record["step"] for record in run.training]
        below.plot(steps, [record["learning_rate"] for record in run.training], **line)
        for step in run.drops():
            axes.axvline(step, color="0.75", linewidth=0.8, linestyle=":", zorder=0)
        tops.append(_settled(run))
    axes.set_ylim(0, min(100, 1.15 * max(tops)))
    axes.set_ylabel("top-1 error, %")
    axes.set_title("thin: training    bold: held out", fontsize="small", color="0.3")
    if any(run.ema_evaluations for run in runs):
        axes.set_title(
            "thin: training    bold: held out    dashed: moving average, held out",
            fontsize="small",
            color="0.3",
        )
    axes.grid(alpha=0.25)
    _legend(axes)
    if any(run.drops() for run in runs):
        below.set_yscale("log")
    below.set(xlabel="step", ylabel="learning\nrate")
    below.grid(alpha=0.25)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _png(figure)


def multi_label_curves(runs: Sequence[Run]) -> bytes:
    """Mean average precision and macro F1 of held-out images over steps, in %.

    Args:
      runs: Overlaid; of a moving average where a run has one.

    Returns:
      A PNG file.
    """
    figure = Figure(figsize=(7.2, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for run, colour in zip(runs, _colours(len(runs))):
        records = [r for r in run.ema_evaluations or run.evaluations if "map" in r and "f1" in r]
        steps = [record["step"] for record in records]
        marker = "o" if len(records) == 1 else None
        for name, style, label in (("map", "-", run.title), ("f1", "--", None)):
            values = [100 * record[name] for record in records]
            axes.plot(steps, values, style, color=colour, marker=marker, label=label)
    axes.set(xlabel="step", ylabel="%", ylim=(0, 100))
    axes.set_title("solid: mean average precision    dashed: F1", fontsize="small", color="0.3")
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return _png(figure)


def rate_curve(curve: RateCurve, title: str) -> bytes:
    """The loss over the learning rate of a range test, with the rates that follow from it.

    Args:
      curve: Of the test.
      title: What was trained.

    Returns:
      A PNG file.
    """
    figure = Figure(figsize=(7.2, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(
        *(curve.rates, curve.losses), color=COLOURS[0], alpha=0.4, linewidth=0.8, label="each batch"
    )
    axes.plot(curve.rates, curve.smoothed, color=COLOURS[0], linewidth=2.2, label="smoothed")
    if np.isfinite(curve.steepest):
        for rate, name, style, color in (
            (curve.steepest, "falls fastest: {:.2g} (suggested)", "-", COLOURS[1]),
            (curve.lowest, "least before the first rise: {:.2g}", ":", COLOURS[2]),
            (curve.lowest / 10, "a tenth of that: {:.2g}", "--", COLOURS[2]),
        ):
            axes.axvline(rate, color=color, linestyle=style, label=name.format(rate))
    if len(curve.losses):
        # What has diverged is far above everything else.
        low, first = curve.losses.min(), curve.losses[: 1 + len(curve.losses) // 4].max()
        axes.set_ylim(low - 0.1 * (first - low), min(curve.losses.max(), 2 * first - low))
    axes.set_xscale("log")
    factor = f" (times {curve.scale:g} for the batch)" if curve.scale != 1 else ""
    axes.set(xlabel=f"optimizer.learning_rate{factor}", ylabel="training loss")
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.grid(alpha=0.25)
    _legend(axes)
    return _png(figure)


def response_curves(by_run: Mapping[str, Mapping[str, float]]) -> bytes:
    """Standard deviations of layer responses, as in the paper's Figure 7.

    Args:
      by_run: A run's title to its layers' deviations, in the network's order.

    Returns:
      A PNG file: above by layer, below from the largest to the smallest.
    """
    figure = Figure(figsize=(7.2, 4.8), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1)
    for (title, found), colour in zip(by_run.items(), _colours(len(by_run))):
        values = list(found.values())
        layers = range(1, len(values) + 1)
        line = {"color": colour, "marker": ".", "linewidth": 1.1}
        above.plot(layers, values, label=title, **line)
        below.plot(layers, sorted(values, reverse=True), **line)
    above.set(xlabel="layer, in the network's order", ylabel="std")
    below.set(xlabel="layer, from the strongest response", ylabel="std")
    finite = [x for found in by_run.values() for x in found.values() if np.isfinite(x)]
    for axes in (above, below):
        axes.set_ylim(0, 1.05 * max(finite, default=1.0))
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(above)
    return _png(figure)


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """How often images of one class (row) are taken for another (column).

    Args:
      counts: [classes, classes].
      names: Of the classes.

    Returns:
      A PNG file; each row in shares of its class, with numbers up to 20 classes.
    """
    classes = len(names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3.2 + 0.32 * classes, 9.0)
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="prediction", ylabel="truth")
    if classes <= 40:
        labels = [_plain(name) for name in names]
        axes.set_xticks(range(classes), labels, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(classes), labels, fontsize=8, parse_math=False)
    if classes <= 20:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(
                *(column, row, f"{counts[row, column]}"),
                ha="center",
                va="center",
                fontsize=7,
                color=colour,
            )
    return _png(figure)


def class_sizes(
    names: Sequence[str], counts: np.ndarray, recognized: Sequence[float | None] = ()
) -> bytes:
    """Training images of each class, the largest first, and how many of it are recognized.

    Args:
      names: Of the classes.
      counts: Their training images, [classes].
      recognized: Shares of their held-out images, None where there are none; (): not known.

    Returns:
      A PNG file.
    """
    panels = 2 if len(recognized) else 1
    figure = Figure(figsize=(7.2, 1.2 + 2.0 * panels), dpi=110, layout="constrained")
    all_axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    order = np.argsort(-counts, kind="stable")
    # Thousands of bars would be slow to draw, and no more than a line to see.
    places = np.arange(len(names))
    all_axes[0].fill_between(places, counts[order], step="mid", color=COLOURS[0], linewidth=0)
    if counts.max() > 10 * max(1, counts.min()):
        all_axes[0].set_yscale("log")
        all_axes[0].set_ylim(bottom=0.5)
    all_axes[0].set_ylabel("training images")
    if panels == 2:
        shares = np.array([np.nan if each is None else 100 * each for each in recognized])
        all_axes[1].plot(places, shares[order], ".", color=COLOURS[1])
        all_axes[1].set(ylabel="recognized, %", ylim=(0, 105))
    for axes in all_axes:
        axes.grid(alpha=0.25, axis="y")
    if len(names) <= 40:
        labels = [_plain(names[index]) for index in order]
        all_axes[-1].set_xticks(places, labels, rotation=90, fontsize=8, parse_math=False)
    else:
        all_axes[-1].set_xlabel("class, the largest first")
    return _png(figure)


def picture_grid(pictures: Sequence[np.ndarray], titles: Sequence[str], columns: int) -> bytes:
    """Images beside each other, each under a line or two of text.

    Args:
      pictures: uint8 or float in [0, 1], [H, W, 1] or [H, W, 3].
      titles: One each.
      columns: Images in a row.

    Returns:
      A PNG file.
    """
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.35 * columns, 1.75 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, picture, title in zip(grid.flat, pictures, titles):
        small = max(picture.shape[:2]) < 96  # show the pixels that there are
        pixels = _shown(picture)
        top = 255 if picture.dtype == np.uint8 else 1
        axes.imshow(
            *(pixels, "gray"),
            vmin=0,
            vmax=top,
            interpolation="nearest" if small else "antialiased",
        )
        axes.set_title(title, fontsize=7, parse_math=False)
    return _png(figure)


def filter_grid(kernel: np.ndarray) -> bytes:
    """The first layer's filters as pictures.

    Args:
      kernel: [side, side, C, K]; C = 3 is shown in colour.

    Returns:
      A PNG file; grey is 0, and all filters share one scale.
    """
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
    height = width * sheet.shape[0] / sheet.shape[1]
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.imshow(sheet.squeeze(), "gray", vmin=0, vmax=1, interpolation="nearest")
    return _png(figure)


def explanation_grid(
    pictures: np.ndarray, evidence: np.ndarray, attributions: np.ndarray, titles: Sequence[str]
) -> bytes:
    """Images, and beside each its Grad-CAM and its integrated gradients.

    Args:
      pictures: uint8 [N, H, W, C].
      evidence: [N, H, W] in [0, 1], of Grad-CAM.
      attributions: [N, H, W, C], of integrated gradients.
      titles: One each.

    Returns:
      A PNG file.
    """
    columns = 2 if len(pictures) > 1 else 1
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(3.7 * columns, 1.5 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, 3 * columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for index, (picture, cam, shares) in enumerate(zip(pictures, evidence, attributions)):
        row, column = divmod(index, columns)
        first, second, third = grid[row, 3 * column : 3 * column + 3]
        pixels = _shown(picture)
        for axes in (first, second):
            axes.imshow(pixels, "gray", vmin=0, vmax=255)
        second.imshow(cam, "inferno", vmin=0, vmax=1, alpha=0.6)
        total = shares.sum(-1)  # [H, W]
        most = max(np.percentile(np.abs(total), 99.5), 1e-12)
        third.imshow(total, "PuOr_r", vmin=-most, vmax=most)
        first.set_title(titles[index], fontsize=7, parse_math=False)
        if row == 0:
            second.set_title("Grad-CAM", fontsize=7)
            third.set_title("integrated gradients", fontsize=7)
    return _png(figure)


def training_errors(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    """Errors of training over steps.

    An evaluation cuts a record short. What says little for itself counts with the next one, and
    at the end with the one before.

    Args:
      records: Of training, by step.

    Returns:
      (steps, errors in %), a point for each record or few.

    Example:
      >>> means = [{"step": 4, "top1": 0.5}, {"step": 5, "top1": 1.0}, {"step": 8, "top1": 0.5}]
      >>> training_errors(means)
      ([4, 8], [50.0, 37.5])
    """
    points: list[tuple[int, int, float]] = []  # step, how many it stands for, the sum of errors
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


def _settled(run: Run) -> float:
    """The largest error after the first tenth of a run, in %: where the axis may end."""
    records = [*run.training, *run.evaluations]
    last = max(record["step"] for record in records)
    late = [record for record in records if record["step"] >= 0.1 * last]
    return max(100 * (1 - record["top1"]) for record in late) or 1.0


def _colours(count: int) -> list[Any]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _legend(axes: Any) -> None:
    """With as many columns as keep it low; names are data, not formulas."""
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.legend(handles, labels, fontsize="small", ncols=-(-len(labels) // 6))
    for text in legend.get_texts():
        text.set_parse_math(False)


def _plain(name: str, longest: int = 18) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _shown(picture: np.ndarray) -> np.ndarray:
    """An image [H, W, C] as matplotlib shows it: the first three channels as colors, or one."""
    return picture[:, :, 0] if picture.shape[2] < 3 else picture[:, :, :3]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():  # names in scripts that the font lacks are boxes
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        figure.savefig(file, format="png")
    return file.getvalue()
