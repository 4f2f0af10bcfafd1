"""Which way up an image is: the orientation that a camera notes beside the pixels (EXIF)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from resnet_jax.errors import DataError, library_errors

# Rows and columns of a part of an image.
Region = tuple[slice, slice]


class Turn(NamedTuple):
    """How stored pixels become upright ones: rows and columns are reversed, then swapped.

    Args:
      reverse_rows: The stored rows begin at the bottom.
      reverse_columns: The stored columns begin at the right.
      transpose: Stored rows are the upright image's columns.
    """

    reverse_rows: bool = False
    reverse_columns: bool = False
    transpose: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turns stored pixels [H, W, C]; the result is a view of them."""
        rows, columns = (slice(None, None, -1 if each else 1) for each in self[:2])
        pixels = pixels[rows, columns]
        return pixels.swapaxes(0, 1) if self.transpose else pixels

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the upright image of a stored one, and the reverse."""
        return (width, height) if self.transpose else (height, width)

    def stored(self, region: Region, height: int, width: int) -> Region:
        """Where a region of the upright image lies in the stored one of that height and width."""
        rows, columns = region[::-1] if self.transpose else region
        if self.reverse_rows:
            rows = slice(height - rows.stop, height - rows.start)
        if self.reverse_columns:
            columns = slice(width - columns.stop, width - columns.start)
        return rows, columns


AS_STORED = Turn()
# By the value of the tag.
_TURNS = {
    2: Turn(reverse_columns=True),
    3: Turn(reverse_rows=True, reverse_columns=True),
    4: Turn(reverse_rows=True),
    5: Turn(transpose=True),
    6: Turn(reverse_rows=True, transpose=True),
    7: Turn(reverse_rows=True, reverse_columns=True, transpose=True),
    8: Turn(reverse_columns=True, transpose=True),
}


def turn_of(image: Image.Image) -> Turn:
    """How an image is to be turned.

    Args:
      image: Opened by Pillow, and loaded: the tag of a PNG may come after its pixels, and a TIFF is
        turned by Pillow while it is loaded, which takes the tag away.

    Returns:
      What its tag says; nothing is turned where there is none, or it cannot be read.
    """
    try:
        with library_errors(lambda error: DataError(str(error))):
            return turn_by_tag(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DataError:  # damaged tags are no reason to refuse whole pixels
        return AS_STORED


def turn_by_tag(value: object) -> Turn:
    """How an image with that value of the tag is to be turned.

    Example:
      >>> turn_by_tag(6).size(height=24, width=32)
      (32, 24)
    """
    return _TURNS.get(value, AS_STORED) if isinstance(value, int) else AS_STORED
