"""The orientation of a photo: how its stored pixels become upright ones (EXIF)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from resnet_jax.errors import DataError, library_errors

# Rows and columns of a part of an image.
Region = tuple[slice, slice]


class Orientation(NamedTuple):
    """How stored pixels become upright ones: rows and columns are reversed, then swapped."""

    reverse_rows: bool = False
    reverse_columns: bool = False
    transpose: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turns stored pixels [H, W, C]; the result is a view of them."""
        rows, columns = (slice(None, None, -1 if each else 1) for each in self[:2])
        pixels = pixels[rows, columns]
        return pixels.swapaxes(0, 1) if self.transpose else pixels

    def upright_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the upright image of a stored one."""
        return (width, height) if self.transpose else (height, width)

    def stored_region(self, region: Region, height: int, width: int) -> Region:
        """Where a region of the upright image lies in the stored one of that height and width."""
        rows, columns = region[::-1] if self.transpose else region
        if self.reverse_rows:
            rows = slice(height - rows.stop, height - rows.start)
        if self.reverse_columns:
            columns = slice(width - columns.stop, width - columns.start)
        return rows, columns


AS_STORED = Orientation()
# By the value of the EXIF tag.
_ORIENTATIONS = {
    2: Orientation(reverse_columns=True),
    3: Orientation(reverse_rows=True, reverse_columns=True),
    4: Orientation(reverse_rows=True),
    5: Orientation(transpose=True),
    6: Orientation(reverse_rows=True, transpose=True),
    7: Orientation(reverse_rows=True, reverse_columns=True, transpose=True),
    8: Orientation(reverse_columns=True, transpose=True),
}


def orientation_of(image: Image.Image) -> Orientation:
    """The orientation that an image's tag gives; AS_STORED without a tag that can be read.

    Except for a JPEG, the image must be loaded: the tag of a PNG may come after its pixels, and
    Pillow turns a TIFF and removes the tag while it loads the pixels.
    """
    try:
        with library_errors(lambda error: DataError(str(error))):
            return orientation_from_tag(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DataError:  # damaged tags are no reason to refuse whole pixels
        return AS_STORED


def orientation_from_tag(value: object) -> Orientation:
    """The orientation for a value of the tag; AS_STORED for values that EXIF does not define.

    Example:
      >>> orientation_from_tag(6).upright_size(height=24, width=32)
      (32, 24)
    """
    return _ORIENTATIONS.get(value, AS_STORED) if isinstance(value, int) else AS_STORED
