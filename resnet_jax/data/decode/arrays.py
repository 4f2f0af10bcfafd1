"""Images as arrays of any number of channels: NumPy files, and the rules for values and channels.

Images reach the device with values from 0 to 255, whatever their files store. The type decides how
values are converted, so no image is scaled by its own brightness: uint8 stays; of uint16 the upper
8 bits are kept, as of a 16-bit PNG; floating-point values must lie between 0 and 1 and are
multiplied by 255; other integers must lie between 0 and 255. Values outside are refused.
"""

from __future__ import annotations

import io
import math
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from resnet_jax.data.decode import budget
from resnet_jax.errors import DataError, library_errors
from resnet_jax.limits import MAX_CHANNELS

NPY_MAGIC = b"\x93NUMPY"
_HEADER_BYTES = 10_000  # NumPy's own limit: Python parses the header as a literal
_LENGTH_BYTES = {1: 2, 2: 4}  # of the header's length field, by the format's version
TYPES = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")


class Npy(NamedTuple):
    """An image [H, W, C] in a .npy file: `fortran` if the first axis varies fastest.

    The values begin at byte `start`; their `dtype` is one of TYPES, of either byte order.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    fortran: bool
    start: int

    def decoding_bytes(self, size: int) -> int:
        """The most bytes that `pixels` takes: uint8 values, and a copy in C's order."""
        count = math.prod(self.shape)
        return 2 * count + (self.dtype != np.uint8) * scaling_bytes(self.shape)

    def pixels(self, data: bytes) -> np.ndarray:
        """uint8 [H, W, C], of the whole file; raises DataError if it is cut short."""
        count = math.prod(self.shape)
        if len(data) - self.start < count * self.dtype.itemsize:
            raise DataError(
                f"the array is cut short: its header says {count * self.dtype.itemsize:,} bytes, "
                f"and the file has {len(data) - self.start:,}"
            )
        values = np.frombuffer(data, self.dtype, count, self.start)
        if self.fortran:
            return np.ascontiguousarray(to_uint8(values.reshape(self.shape[::-1]).T))
        return to_uint8(values.reshape(self.shape))


def read_npy(file: BinaryIO) -> Npy:
    """Reads the header of a .npy file; unpickles nothing, and allocates nothing for the values.

    Raises:
      DataError: The header is damaged, or not that of an image [H, W, C] or [H, W].

    Example:
      >>> file = io.BytesIO()
      >>> np.save(file, np.zeros((4, 8, 5), np.uint16))
      >>> _ = file.seek(0)
      >>> read_npy(file).shape
      (4, 8, 5)
    """
    magic = file.read(8)
    version = magic[6] if len(magic) == 8 else 0
    if version not in _LENGTH_BYTES:
        raise DataError(f"a .npy file of version {version}; images have version 1 or 2")
    width = _LENGTH_BYTES[version]
    field = file.read(width)
    length = int.from_bytes(field, "little")
    if length > _HEADER_BYTES:
        raise DataError(f"not a valid .npy file (its header has {length:,} bytes)")
    header = io.BytesIO(field + file.read(length))
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version]
    with library_errors(lambda error: DataError("not a valid .npy file (its header is damaged)")):
        shape, fortran, dtype = read(header)
    return Npy(_image_shape(shape), _image_type(dtype), fortran, 8 + width + length)


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise DataError(f"an array of shape {shape}; an image is [H, W, C] or [H, W]")
    height, width, channels = shape if len(shape) == 3 else (*shape, 1)
    channels_first = len(shape) == 3 and width == channels > height
    if channels_first or channels > MAX_CHANNELS:
        raise DataError(
            f"an array of shape {shape}: channels come last, [H, W, C], and are at most "
            f"{MAX_CHANNELS:,}" + ("; this looks like [C, H, W]" if channels_first else "")
        )
    return height, width, channels


def _image_type(dtype: np.dtype) -> np.dtype:
    check_type(dtype)
    return dtype


def check_type(dtype: np.dtype) -> None:
    """Raises DataError for a type that no image has."""
    if dtype.kind + str(dtype.itemsize) not in TYPES or dtype.shape:
        raise DataError(
            f"an array of {dtype.name}; images are uint8, uint16, floating-point from 0 to 1, or "
            "other integers from 0 to 255"
        )


def scaling_bytes(shape: tuple[int, int, int]) -> int:
    """Bytes that `to_uint8` takes besides its result: three times a band of rows as float64."""
    return 24 * max(budget.BAND_PIXELS, shape[1] * shape[2])


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Converts an image [H, W, C] of one of `TYPES` to uint8, by the rules at the top of this file.

    Raises:
      DataError: A floating-point value is not within 0 and 1, or an integer not within 0 and 255.

    Example:
      >>> to_uint8(np.array([[[0.0, 0.5, 1.0]]])).tolist()
      [[[0, 128, 255]]]
      >>> to_uint8(np.array([[[0x1234]]], np.uint16)).tolist()
      [[[18]]]
      >>> to_uint8(np.array([[[300]]]))
      Traceback (most recent call last):
      resnet_jax.errors.DataError: int64 values from 300 to 300; they must be from 0 to 255, or \
stored as uint8 or uint16
    """
    if values.dtype == np.uint8:
        return values
    pixels = np.empty(values.shape, np.uint8)
    rows = max(1, budget.BAND_PIXELS // math.prod(values.shape[1:]))
    for top in range(0, len(values), rows):
        band = values[top : top + rows]
        pixels[top : top + rows] = _band_to_uint8(band)
    return pixels


def _band_to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        return _float_to_uint8(values)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return values >> 8
    if values.min() < 0 or values.max() > 255:
        raise DataError(
            f"{values.dtype.name} values from {values.min()} to {values.max()}; they must be from "
            "0 to 255, or stored as uint8 or uint16"
        )
    return values


def _float_to_uint8(values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        levels = np.rint(values.astype(np.float64) * 255)
        if not ((levels >= 0) & (levels <= 255)).all():  # NaN compares false
            found = f"from {values.min():g} to {values.max():g}"
            if np.isnan(values).any():
                found = "that are not numbers (NaN)"
            raise DataError(
                f"floating-point values {found}; they must be from 0 to 1, or stored as uint8"
            )
    return levels.astype(np.uint8)


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Converts an image, uint8 [H, W, C], to the channels that the network takes.

    Gray becomes color, and color gray by Rec. 601 luma. Other channels cannot be converted, because
    nothing says what they show.

    Raises:
      DataError: C cannot be converted.

    Example:
      >>> with_channels(np.zeros((4, 8, 1), np.uint8), 3).shape
      (4, 8, 3)
      >>> with_channels(np.zeros((4, 8, 5), np.uint8), 3)
      Traceback (most recent call last):
      resnet_jax.errors.DataError: has 5 channels, and 3 are needed
    """
    found = pixels.shape[2]
    if found == channels:
        return pixels
    if (found, channels) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    if (found, channels) == (3, 1):
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[:, :, None]
    raise channels_error(found, channels)


def channels_error(found: int, needed: int) -> DataError:
    """The error for an image whose channels are not the network's."""
    return DataError(f"has {found} channel{'s' * (found > 1)}, and {needed} are needed")
