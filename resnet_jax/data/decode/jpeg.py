"""JPEG: the header, and decoding a part of an image with libjpeg-turbo (simplejpeg)."""

from __future__ import annotations

import dataclasses
import logging
import struct

import numpy as np

from resnet_jax.errors import DataError, import_failure

try:  # faster than Pillow; the same pixels in evaluation, in training within a few levels
    import simplejpeg
except ImportError as error:
    simplejpeg = None
    if not isinstance(error, ModuleNotFoundError) or error.name != "simplejpeg":
        logging.getLogger(__name__).warning(
            "%s; Pillow decodes JPEGs instead, which takes longer", import_failure(error)
        )

# A marker's byte after 0xFF and its length; bits, height, width and components.
_MARKER = struct.Struct(">xBH")
_SIZES = struct.Struct(">BHHB")


@dataclasses.dataclass(frozen=True)
class JpegHeader:
    """What the header of a gray or color JPEG of 8 bits says.

    Args:
      height: In pixels.
      width: In pixels.
      height_offset: Where in the data the two bytes of the height are.
      one_scan: The whole image is in one pass from top to bottom.
      samples: Of all components, for each pixel: 3, or 1.5 where color has half the resolution.
        Not read if `one_scan`.
    """

    height: int
    width: int
    height_offset: int
    one_scan: bool
    samples: float = 3.0


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Reads the header of a JPEG; None for everything that is left to Pillow.

    Example:
      >>> read_jpeg_header(b"GIF89a") is None
      True
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, found, sequential, components = 2, None, False, 0
    while at + 10 < len(data) and data[at] == 0xFF:
        marker, length = _MARKER.unpack_from(data, at)
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            bits, height, width, components = _SIZES.unpack_from(data, at + 4)
            if bits != 8 or not height or not width or components not in (1, 3):
                return None
            found = JpegHeader(height, width, at + 5, one_scan=False)
            sequential = marker != 0xC2
        elif marker == 0xDA:
            if found is not None and sequential and data[at + 4] == components:
                return dataclasses.replace(found, one_scan=True)
            return found and dataclasses.replace(found, samples=_samples_per_pixel(data, found))
        elif not (0xC4 <= marker <= 0xFE) or 0xD0 <= marker <= 0xD9 or length < 2:
            return None
        at += 2 + length
    return None


def _samples_per_pixel(data: bytes, header: JpegHeader) -> float:
    count, at = data[header.height_offset + 4], header.height_offset + 5
    # Each component has three bytes: its name, its two sampling factors, its table.
    factors = [(max(each >> 4, 1), max(each & 15, 1)) for each in data[at : at + 3 * count][1::3]]
    most = max(horizontal for horizontal, _ in factors) * max(vertical for _, vertical in factors)
    return sum(horizontal * vertical for horizontal, vertical in factors) / most


def decode_jpeg(
    data: bytes, header: JpegHeader, channels: int, rows: int, shrink: int, *, exact: bool
) -> np.ndarray | None:
    """Decodes the upper `rows` of a JPEG at 1 / shrink of its size; needs simplejpeg.

    The decoder stops where the header says that the image ends, so a smaller height written into
    the header saves the work for all rows below. To find the end of the file it skips those rows
    and warns of them (and of nothing else, if the end is there).

    With `exact`, the pixels are those of Pillow; without, they are faster and within a few levels.

    Returns:
      uint8 [rows / shrink, W / shrink, channels]; None for what only Pillow can decode or explain.

    Raises:
      DataError: The JPEG is damaged or cut short.
    """
    cut = header.one_scan and rows < header.height
    if cut:
        at = header.height_offset
        data = b"".join((data[:at], rows.to_bytes(2, "big"), data[at + 2 :]))
    height, width = -(-(rows if cut else header.height) // shrink), -(-header.width // shrink)
    pixels = np.empty((height, width, channels), np.uint8)
    try:
        simplejpeg.decode_jpeg(
            data,
            colorspace="RGB" if channels == 3 else "GRAY",
            fastdct=not exact,
            fastupsample=not exact,
            min_height=height if shrink > 1 else 0,
            min_width=width if shrink > 1 else 0,
            buffer=pixels,
        )
    except ValueError as error:
        if cut and "extraneous bytes before marker 0xd9" in str(error):
            return pixels
        if "premature end" in str(error).lower() or "Huffman" in str(error):
            raise DataError(f"the JPEG is damaged or cut short ({error})") from error
        return None
    return pixels
