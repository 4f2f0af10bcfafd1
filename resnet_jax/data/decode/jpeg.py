"""A JPEG's header, as far as decoding a part of the image needs it."""

from __future__ import annotations

import dataclasses
import struct

# A marker's byte after 0xFF and its length; bits, height, width and components.
_MARKER = struct.Struct(">xBH")
_SIZES = struct.Struct(">BHHB")


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a JPEG's header says.

    Args:
      height: In pixels.
      width: In pixels.
      height_at: Where in the data the two bytes of the height are.
      one_scan: All of the image is in one pass from top to bottom.
      samples: For each pixel, of all components: 3, or 1.5 where colour has half the resolution.
        Not read where all is in one scan.
    """

    height: int
    width: int
    height_at: int
    one_scan: bool
    samples: float = 3.0


def jpeg_frame(data: bytes) -> Frame | None:
    """Reads the header of a JPEG.

    Args:
      data: The encoded image.

    Returns:
      What it says of a grey or colour JPEG of 8 bits; None for all else, which Pillow shall judge.

    Example:
      >>> jpeg_frame(b"GIF89a") is None
      True
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, found, in_rows, components = 2, None, False, 0
    while at + 10 < len(data) and data[at] == 0xFF:
        marker, length = _MARKER.unpack_from(data, at)
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            bits, height, width, components = _SIZES.unpack_from(data, at + 4)
            if bits != 8 or not height or not width or components not in (1, 3):
                return None
            found = Frame(height, width, at + 5, one_scan=False)
            in_rows = marker != 0xC2
        elif marker == 0xDA:
            if found is not None and in_rows and data[at + 4] == components:
                return dataclasses.replace(found, one_scan=True)
            return found and dataclasses.replace(found, samples=_samples(data, found))
        elif not (0xC4 <= marker <= 0xFE) or 0xD0 <= marker <= 0xD9 or length < 2:
            return None
        at += 2 + length
    return None


def _samples(data: bytes, frame: Frame) -> float:
    count, at = data[frame.height_at + 4], frame.height_at + 5
    # Of each component there are three bytes: name, factors across and down, table.
    factors = [(max(each >> 4, 1), max(each & 15, 1)) for each in data[at : at + 3 * count][1::3]]
    most = max(across for across, _ in factors) * max(down for _, down in factors)
    return sum(across * down for across, down in factors) / most
