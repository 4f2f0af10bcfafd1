"""Crops of encoded images: the center for evaluation, a drawn region for training.

Evaluation decodes in full and resizes with Pillow, as torchvision does. Training crops are made
for speed: a JPEG is decoded at a smaller scale if the crop allows it and only down to the crop's
last row, and OpenCV resizes it (docs/decoding.md has figures).

Orientation tags (EXIF) are applied if `data.upright` says so. By default they are not: published
accuracies were measured on images as stored.
"""

from __future__ import annotations

import math

import numpy as np

from resnet_jax.config.schema import Data
from resnet_jax.data.decode import budget
from resnet_jax.data.decode.orientation import AS_STORED, Region
from resnet_jax.data.decode.pixels import (
    SHRINKS,
    decode_jpeg_region,
    decoded,
    decoded_by_pillow,
    jpeg_header,
    jpeg_orientation,
)
from resnet_jax.data.decode.reading import check_size
from resnet_jax.data.decode.resize import (
    GRAY_OR_COLOR,
    by_channel_groups,
    resize,
    resize_bytes,
    resize_to_square,
    resized_image,
    to_array,
)


def eval_crop(data: bytes, config: Data, channels: int) -> np.ndarray:
    """Decodes an image, resizes it and cuts out the center, as torchvision does.

    Args:
      data: The encoded image.
      config: The shorter side is resized to `eval_resize` pixels (0: the side of the crop), or
        with `eval_crop` "squash" both sides are. The side of the crop S is `eval_size` (0:
        `image_size`); the filter the antialiased `interpolation`. An image that has its size
        already is not resampled. With `upright` it is first turned as its EXIF orientation says.
      channels: As for `decode`.

    Returns:
      uint8 pixels [S, S, channels].

    Raises:
      DataError: The data is damaged, cut short, too large, or no image.

    Example:
      >>> import io
      >>> from PIL import Image
      >>> file = io.BytesIO()
      >>> Image.new("RGB", (500, 375)).save(file, "JPEG")
      >>> config = Data(eval_resize=256, eval_size=224)
      >>> eval_crop(file.getvalue(), config, channels=3).shape
      (224, 224, 3)
    """
    extra_bytes = crop_bytes(config, channels)
    with decoded(data, channels, extra_bytes, upright=config.upright) as pixels:
        return crop_pixels(pixels, config)


def crop_pixels(pixels: np.ndarray, config: Data) -> np.ndarray:
    """The geometry of `eval_crop`, for an image that is decoded already.

    Args:
      pixels: uint8 [H, W, channels].
      config: As for `eval_crop`.

    Returns:
      uint8 pixels [S, S, channels].

    Raises:
      DataError: Resized, the image would be too large: a strip thousands of times as long as wide.

    Example:
      >>> crop_pixels(np.zeros((30, 40, 1), np.uint8), Data(eval_size=24)).shape
      (24, 24, 1)
    """
    resized, size = _eval_sides(config)
    if config.eval_crop == "squash" and pixels.shape[:2] != (resized, resized):
        pixels = resize(pixels, resized, resized, config.interpolation)
    return _center_crop(pixels, resized, size, config.interpolation)


def _eval_sides(config: Data) -> tuple[int, int]:
    size = config.eval_size or config.image_size
    return config.eval_resize or size, size


def crop_bytes(config: Data, channels: int = 3) -> budget.ExtraBytes:
    """Bytes that `crop_pixels` takes besides an image, by the image's height and width.

    Example:
      >>> crop_bytes(Data(eval_resize=256))(256, 1000)
      0
    """
    resized, _ = _eval_sides(config)
    if config.eval_crop == "squash":
        return lambda height, width: resize_bytes(height, resized, resized, channels)
    return _center_crop_bytes(resized, channels)


def _center_crop_bytes(shorter: int, channels: int) -> budget.ExtraBytes:
    def extra_bytes(height: int, width: int) -> int:
        if min(height, width) == shorter:
            return 0
        size = _resized_sides(height, width, shorter)
        check_size(*size)
        return resize_bytes(height, *size, channels)

    return extra_bytes


def _center_crop(pixels: np.ndarray, shorter: int, size: int, interpolation: str) -> np.ndarray:
    height, width = pixels.shape[:2]
    if min(height, width) != shorter:
        if pixels.shape[2] not in GRAY_OR_COLOR:
            return by_channel_groups(
                pixels, lambda part: _center_crop(part, shorter, size, interpolation)
            )
        height, width = _resized_sides(height, width, shorter)
        check_size(height, width)
        image = resized_image(pixels, height, width, interpolation)
        if height * width > budget.BAND_PIXELS:  # of a strip, only the crop becomes an array
            left, top = _centered(width, size), _centered(height, size)
            return to_array(image.crop((left, top, left + size, top + size)))
        pixels = to_array(image)
    top, left = _centered(height, size), _centered(width, size)
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def _centered(length: int, size: int) -> int:
    return round((length - size) / 2)  # a half becomes the even number, in torchvision too


def _resized_sides(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Height and width once the shorter side has that length; torchvision cuts the fraction."""
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def train_crop(
    data: bytes,
    config: Data,
    channels: int,
    rng: np.random.Generator,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decodes the part of an image that a training crop shows, and resizes it.

    Args:
      data: The encoded image.
      config: The side of the crop S is `image_size` pixels; `crop` says how it is drawn: of
        random area and ratio (Szegedy et al. 2015, section 6, drawn as torchvision does), from a
        random scale (He et al. 2015, section 3.4), or the center. With `upright` the image is
        turned before that as its EXIF orientation says.
      channels: As for `decode`.
      rng: Draws the crop.
      out: Contiguous array to write the pixels to. Default: a new one.

    Returns:
      uint8 pixels [S, S, channels], antialiased where the crop is larger than S.

    Raises:
      DataError: The data is cut short, too large or no image, or the rows of the crop are
        damaged.

    Example:
      >>> import io
      >>> from PIL import Image
      >>> file = io.BytesIO()
      >>> Image.new("RGB", (500, 375)).save(file, "JPEG")
      >>> config = Data(image_size=224, crop="random_resized")
      >>> train_crop(file.getvalue(), config, channels=3, rng=np.random.default_rng(0)).shape
      (224, 224, 3)
    """
    size = config.image_size
    if config.crop == "center":
        extra_bytes = _center_crop_bytes(size, channels)
        with decoded(data, channels, extra_bytes, upright=config.upright) as pixels:
            pixels = _center_crop(pixels, size, size, config.interpolation)
            return resize_to_square(pixels, size, config.interpolation, out)
    draw = {"random_resized": _random_region, "scale_jitter": _jittered_region}[config.crop]

    # The image blurred, or in Pillow's memory; and a turned image's crop once more, for OpenCV.
    per_pixel = 4 + channels + (channels if config.upright else 0)

    def extra_bytes_of_all(height: int, width: int) -> int:
        return per_pixel * height * width

    header = jpeg_header(data, channels)
    if header is None:
        with decoded_by_pillow(data, channels, extra_bytes_of_all, config.upright) as pixels:
            region = draw(pixels.shape[0], pixels.shape[1], config, rng)
            pixels = np.ascontiguousarray(pixels[region]) if config.upright else pixels[region]
            return resize_to_square(pixels, size, config.interpolation, out)
    orientation = jpeg_orientation(data, config.upright)
    region = draw(*orientation.upright_size(header.height, header.width), config, rng)
    region = orientation.stored_region(region, header.height, header.width)
    amount, shrink = budget.fit(
        header.height,
        header.width,
        lambda shrink: budget.jpeg_bytes(header, channels, shrink, extra_bytes_of_all),
        SHRINKS[SHRINKS.index(_largest_shrink(region, size)) :],
    )
    with budget.BUDGET.reserve(amount):
        pixels = decode_jpeg_region(data, header, channels, region, shrink)
        if orientation != AS_STORED:
            pixels = np.ascontiguousarray(orientation.apply(pixels))
        return resize_to_square(pixels, size, config.interpolation, out)


def _largest_shrink(region: Region, size: int) -> int:
    """The largest power of 2 to shrink by for which no side of a region falls below `size`."""
    shortest = min(side.stop - side.start for side in region)
    # Below 16 pixels, rounding the edges to whole shrunk pixels would show.
    return next((each for each in (8, 4, 2) if shortest // each >= max(size, 16)), 1)


def _random_region(height: int, width: int, config: Data, rng: np.random.Generator) -> Region:
    """Draws area and ratio up to 10 times, then takes the largest center of an allowed ratio."""
    least, most = config.crop_area
    lowest, highest = config.crop_ratio
    for _ in range(10):
        area = height * width * rng.uniform(least, most)
        ratio = math.exp(rng.uniform(math.log(lowest), math.log(highest)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(height - h + 1))
            left = int(rng.integers(width - w + 1))
            return slice(top, top + h), slice(left, left + w)
    w = min(width, max(1, round(height * highest)))
    h = min(height, max(1, round(width / lowest)))
    top, left = (height - h) // 2, (width - w) // 2
    return slice(top, top + h), slice(left, left + w)


def _jittered_region(height: int, width: int, config: Data, rng: np.random.Generator) -> Region:
    """The region that a random crop shows once the shorter side has its random length."""
    lowest, highest = config.jitter_sides
    shorter = int(rng.integers(lowest, highest + 1))
    scale = shorter / min(height, width)
    h, w = _resized_sides(height, width, shorter)
    top = int(rng.integers(h - config.image_size + 1))
    left = int(rng.integers(w - config.image_size + 1))
    # Resizing this region is resizing the image and cutting the region out, but for the rounding
    # of its edges to whole pixels of the image.
    return (
        _unscaled(top, config.image_size, scale, height),
        _unscaled(left, config.image_size, scale, width),
    )


def _unscaled(start: int, size: int, scale: float, length: int) -> slice:
    """The part of an image's side that a part of the scaled side shows; at least one pixel."""
    first = min(round(start / scale), length - 1)
    return slice(first, max(first + 1, min(round((start + size) / scale), length)))
