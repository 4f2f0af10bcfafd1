"""Resizing uint8 images: exactly as Pillow does for evaluation, fast with OpenCV for training."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from resnet_jax.data.decode import budget

# Numbers of channels that images are converted to, and that Pillow and OpenCV resize directly.
GRAY_OR_COLOR = (1, 3)
_PILLOW_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_OPENCV_FILTERS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_OPENCV_CHANNELS = 64  # at a time; OpenCV 5 takes 128


def resize(pixels: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Resizes uint8 [H, W, C] to [height, width, C] with Pillow's antialiased filters.

    Example:
      >>> resize(np.zeros((375, 500, 3), np.uint8), 224, 299, "bilinear").shape
      (224, 299, 3)
    """
    if pixels.shape[2] not in GRAY_OR_COLOR:
        return by_channel_groups(pixels, lambda part: resize(part, height, width, interpolation))
    return to_array(resized_image(pixels, height, width, interpolation))


def resize_bytes(stored_height: int, height: int, width: int, channels: int = 3) -> int:
    """Bytes that `resize` takes besides its image: rows resized horizontally, and the result."""
    others = 2 * channels * height * width if channels not in GRAY_OR_COLOR else 0
    return 7 * stored_height * width + 10 * height * width + others


def by_channel_groups(pixels: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Changes 3 channels at a time, or 1: Pillow takes the last of 2 and of 4 for opacity."""
    channels = pixels.shape[2]
    in_threes = channels - channels % 3
    starts = [*range(0, in_threes, 3), *range(in_threes, channels)]
    parts = [pixels[:, :, a:b] for a, b in zip(starts, [*starts[1:], channels])]
    return np.concatenate([change(np.ascontiguousarray(part)) for part in parts], 2)


def resized_image(pixels: np.ndarray, height: int, width: int, interpolation: str) -> Image.Image:
    """As `resize`, of 1 or 3 channels; not yet an array, so that a strip can be cropped first."""
    kind = _PILLOW_FILTERS[interpolation]
    if pixels.shape[0] * pixels.shape[1] > budget.BAND_PIXELS:
        # Pillow resizes each row by itself first, so bands of rows give the same.
        rows = max(1, budget.BAND_PIXELS // pixels.shape[1])
        wide = np.empty((pixels.shape[0], width, pixels.shape[2]), np.uint8)
        for top in range(0, pixels.shape[0], rows):
            band = pixels[top : top + rows]
            wide[top : top + rows] = to_array(to_image(band).resize((width, band.shape[0]), kind))
        pixels = wide
    return to_image(pixels).resize((width, height), kind)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Pillow's image of uint8 [H, W, C]."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of Pillow's image."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def resize_to_square(
    pixels: np.ndarray, size: int, interpolation: str, out: np.ndarray | None = None
) -> np.ndarray:
    """Resizes uint8 [H, W, C] to [size, size, C] with OpenCV, antialiased by a blur.

    OpenCV's filters do not widen when they shrink an image. To shrink by r takes a triangle r
    pixels wide, of variance r^2 / 6; OpenCV's has 1 / 6, so a Gaussian before it adds the rest. The
    result is within about one level (of 255, mean) of Pillow's, in a third of its time.
    """
    out = np.empty((size, size, pixels.shape[2]), np.uint8) if out is None else out
    if pixels.shape[:2] == (size, size):
        out[:] = pixels
        return out
    if pixels.shape[2] > _OPENCV_CHANNELS:
        for first in range(0, pixels.shape[2], _OPENCV_CHANNELS):
            part = slice(first, first + _OPENCV_CHANNELS)
            group = np.ascontiguousarray(pixels[:, :, part])
            out[:, :, part] = resize_to_square(group, size, interpolation)
        return out
    variances = [((length / size) ** 2 - 1) / 6 for length in pixels.shape[:2]]  # pixels^2
    if max(variances) >= 0.01:  # less would not show
        (height, sigma_y), (width, sigma_x) = map(_gaussian, variances)
        pixels = cv2.GaussianBlur(pixels, (width, height), sigma_x, sigmaY=sigma_y)
    cv2.resize(pixels, (size, size), dst=out, interpolation=_OPENCV_FILTERS[interpolation])
    return out


def _gaussian(variance: float) -> tuple[int, float]:
    """Kernel size and sigma for which OpenCV's sampled Gaussian has this variance."""
    if variance > 0.5:
        sigma = math.sqrt(variance)
        return 2 * math.ceil(2 * sigma) + 1, sigma
    # Three values [a, 1 - 2a, a] have the variance 2a; a / (1 - 2a) = exp(-1 / (2 sigma^2)).
    side = max(variance, 1e-6) / 2
    return 3, math.sqrt(-0.5 / math.log(side / (1 - 2 * side)))
