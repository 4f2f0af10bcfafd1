"""Encoded images to uint8 arrays, within a budget of memory that all threads share (budget.py).

Every call works on its own data and releases the interpreter lock while it decodes, so threads run
in parallel.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile as _Jpeg2000
from PIL.JpegImagePlugin import JpegImageFile as _Jpeg  # also of several pictures (MPO)

from resnet_jax.data.decode import arrays, budget, jpeg, tiff
from resnet_jax.data.decode.jpeg import JpegHeader, decode_jpeg, read_jpeg_header
from resnet_jax.data.decode.orientation import (
    AS_STORED,
    Orientation,
    Region,
    orientation_from_tag,
    orientation_of,
)
from resnet_jax.data.decode.reading import check_size, identify, image_error, open_image
from resnet_jax.data.decode.resize import GRAY_OR_COLOR, to_array, to_image
from resnet_jax.errors import DataError, library_errors

# JPEG and JPEG 2000 are decoded at 1 / n of their size.
SHRINKS = (1, 2, 4, 8)


def decode(data: bytes, channels: int) -> np.ndarray:
    """Decodes an image of one of `reading.FORMATS`, or a .npy array; an animation's first frame.

    Palettes are looked up, transparency is dropped, CMYK becomes RGB, color becomes gray by Rec.
    601 luma. Values of more than 8 bits become 0..255 as `arrays.to_uint8` says. A JPEG or JPEG
    2000 that would take more than the whole memory budget is decoded at 1/2, 1/4 or 1/8 of its
    size. With any number of channels but 1 and 3, the image must have that number, and nothing is
    converted: 4 keeps the transparency of an RGBA image.

    Args:
      data: The encoded image.
      channels: 3 (RGB), 1 (gray), or as many as the image has.

    Returns:
      uint8 pixels [H, W, channels].

    Raises:
      DataError: The data is damaged, cut short, too large, no image, or of other channels.

    Example:
      >>> file = io.BytesIO()
      >>> Image.new("P", (8, 4)).save(file, "PNG")
      >>> decode(file.getvalue(), channels=3).shape
      (4, 8, 3)
    """
    with decoded(data, channels) as pixels:
        return pixels


@contextlib.contextmanager
def decoded(
    data: bytes,
    channels: int,
    extra_bytes: budget.ExtraBytes = budget.no_bytes,
    *,
    upright: bool = False,
) -> Iterator[np.ndarray]:
    """Decodes as `decode` does, and counts the image's memory in the budget until the block ends.

    The block itself takes `extra_bytes`. With `upright`, the image is turned as its orientation tag
    says, and the pixels are a view.
    """
    if upright:
        extra_bytes = _for_both_orientations(extra_bytes)
    header = jpeg_header(data, channels)
    if header is not None and jpeg.simplejpeg is not None:
        amount, shrink = budget.fit(
            header.height,
            header.width,
            lambda shrink: budget.jpeg_bytes(header, channels, shrink, extra_bytes),
            SHRINKS,
        )
        with budget.BUDGET.reserve(amount):
            pixels = decode_jpeg(data, header, channels, header.height, shrink, exact=True)
            if pixels is not None:
                yield jpeg_orientation(data, upright).apply(pixels)
                return
    with decoded_by_pillow(data, channels, extra_bytes, upright) as pixels:
        yield pixels


def _for_both_orientations(extra_bytes: budget.ExtraBytes) -> budget.ExtraBytes:
    return lambda height, width: max(extra_bytes(height, width), extra_bytes(width, height))


def jpeg_header(data: bytes, channels: int) -> JpegHeader | None:
    """The checked header of a JPEG that simplejpeg can decode to this many channels, else None."""
    header = read_jpeg_header(data) if channels in GRAY_OR_COLOR else None
    if header is not None:
        check_size(header.height, header.width)
        if not header.one_scan:
            budget.check_scans(data, header.height * header.width)
    return header


def jpeg_orientation(data: bytes, upright: bool) -> Orientation:
    """The orientation that a JPEG's tags give, for pixels that simplejpeg decodes."""
    # Most have no such tag, in EXIF or XMP, and need not be opened.
    if not upright or not (b"Exif\0\0" in data or b"tiff:Orientation" in data):
        return AS_STORED
    try:
        return orientation_of(open_image(io.BytesIO(data)))
    except DataError:  # damage that simplejpeg tolerates
        return AS_STORED


def decode_jpeg_region(
    data: bytes, header: JpegHeader, channels: int, region: Region, shrink: int
) -> np.ndarray:
    """Decodes a region of a JPEG at 1 / shrink of its size; uint8 [h, w, channels]."""
    rows, columns = region
    pixels = None
    if jpeg.simplejpeg is not None:
        # One row more than the region has, from which its last row's color is interpolated.
        last = min(header.height, rows.stop + shrink)
        pixels = decode_jpeg(data, header, channels, last, shrink, exact=False)
    if pixels is None:
        pixels = _load(open_image(io.BytesIO(data)), channels, shrink)
    return pixels[
        round(rows.start / shrink) : round(rows.stop / shrink),
        round(columns.start / shrink) : round(columns.stop / shrink),
    ]


@contextlib.contextmanager
def decoded_by_pillow(
    data: bytes, channels: int, extra_bytes: budget.ExtraBytes, upright: bool
) -> Iterator[np.ndarray]:
    """As `decoded`, without simplejpeg: by Pillow, or as an array."""
    stored = _stored_array(data, channels)
    if stored is not None:
        with _converted_array(stored, data, channels, extra_bytes, upright) as pixels:
            yield pixels
        return
    with contextlib.ExitStack() as reserved:
        early = budget.bytes_to_open(data, channels, extra_bytes)
        if early is not None:
            amount, size = early
            check_size(*size)
            budget.fit(*size, lambda _: amount, (1,))
            reserved.enter_context(budget.BUDGET.reserve(amount))
        image = open_image(io.BytesIO(data))
        shrink = 1
        if early is None:
            amount, shrink = budget.fit(
                image.height,
                image.width,
                functools.partial(
                    budget.pillow_bytes, image, data, channels, extra_bytes=extra_bytes
                ),
                SHRINKS if isinstance(image, (_Jpeg, _Jpeg2000)) else (1,),
            )
            reserved.enter_context(budget.BUDGET.reserve(amount))
        pixels = _load(image, channels, shrink)
        if upright:
            pixels = orientation_of(image).apply(pixels)
        del image  # its memory is counted until here
        yield pixels


def _stored_array(data: bytes, channels: int) -> arrays.Npy | tiff.Tiff | None:
    """The header of a NumPy array, or of a TIFF of more channels than Pillow reads; else None."""
    if data.startswith(arrays.NPY_MAGIC):
        return arrays.read_npy(io.BytesIO(data))
    if data[:4] not in tiff.MAGICS:
        return None
    image = identify(io.BytesIO(data))
    if image is not None and channels in (len(image.getbands()), *GRAY_OR_COLOR):
        return None
    return tiff.read_tiff(io.BytesIO(data))


@contextlib.contextmanager
def _converted_array(
    stored: arrays.Npy | tiff.Tiff,
    data: bytes,
    channels: int,
    extra_bytes: budget.ExtraBytes,
    upright: bool,
) -> Iterator[np.ndarray]:
    height, width, found = stored.shape
    check_size(height, width)
    if found != channels and {found, channels} != set(GRAY_OR_COLOR):
        raise arrays.channels_error(found, channels)
    need = stored.decoding_bytes(len(data)) + channels * height * width + extra_bytes(height, width)
    amount, _ = budget.fit(height, width, lambda _: need, (1,))
    with budget.BUDGET.reserve(amount):
        orientation = AS_STORED
        if upright and isinstance(stored, tiff.Tiff):
            orientation = orientation_from_tag(stored.orientation)
        yield orientation.apply(arrays.with_channels(stored.pixels(data), channels))


def _load(image: Image.Image, channels: int, shrink: int) -> np.ndarray:
    """The pixels of an image that Pillow opened, at 1 / shrink of its size."""
    with library_errors(image_error):
        if isinstance(image, _Jpeg):  # gray ones are decoded without their color
            mode = {1: "L", 3: "RGB"}.get(channels)
            image.draft(mode, (image.width // shrink, image.height // shrink))
        elif isinstance(image, _Jpeg2000):
            image.reduce = shrink.bit_length() - 1
    return image_pixels(image, channels)


def image_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """The pixels of an image that Pillow opened, converted as by `decode`: uint8 [H, W, channels].

    Raises:
      DataError: The image is damaged, or has other channels.

    Example:
      >>> image_pixels(Image.new("I;16", (8, 4), 0x1234), channels=1)[0, 0].tolist()
      [18]
    """
    with library_errors(image_error):
        image.load()
    bits = _bits(image)
    width, height = image.size
    if height * width <= budget.BAND_PIXELS:
        return _converted(image, channels, bits)
    pixels = np.empty((height, width, channels), np.uint8)
    rows = max(1, budget.BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        with library_errors(image_error):
            band = image.crop((0, top, width, bottom))
        pixels[top:bottom] = _converted(band, channels, bits)
    return pixels


def _bits(image: Image.Image) -> int:
    """Bits of a value, where Pillow's mode has more than the file; else 0."""
    if image.format == "PPM":  # 16 bits in 32
        return 16
    return tiff.bits_of(getattr(image, "tag_v2", {})) if image.mode == "I;16" else 0


def _converted(image: Image.Image, channels: int, bits: int) -> np.ndarray:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if values.dtype.kind != "f" and bits:
            values = values.astype(np.uint16) << (16 - bits)
        image = to_image(arrays.to_uint8(values[:, :, None]))
    with library_errors(image_error):
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        if channels in GRAY_OR_COLOR or image.mode == "P":
            image = image.convert("RGB" if channels != 1 else "L")
    if channels not in (*GRAY_OR_COLOR, len(image.getbands())):
        raise arrays.channels_error(len(image.getbands()), channels)
    return to_array(image)
