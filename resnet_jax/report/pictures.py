"""Pictures of images and filters, as the bytes of PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from resnet_jax.report.drawing import to_png

FILTERS_WIDTH = 475  # of a sheet of filters on a large page, in CSS pixels
_SIDE = 160  # pixels; larger images are reduced to it where many are shown


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
    return to_png(figure)


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
    return to_png(figure)


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
    return to_png(figure)


def _hide_frames(grid: np.ndarray) -> None:
    for axes in grid.flat:
        axes.axis("off")


def _displayable(image: np.ndarray) -> np.ndarray:
    """The first three channels of an image [H, W, C], or the first one where there are fewer."""
    return image[:, :, 0] if image.shape[2] < 3 else image[:, :, :3]
