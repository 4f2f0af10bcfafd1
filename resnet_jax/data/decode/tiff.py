"""TIFF files of several channels, of which Pillow opens only a few kinds.

Pillow parses the tags, and its libtiff unpacks the strips or tiles: written with other tags, the
file is a TIFF of one channel whose columns are the bytes of all channels. So no compressed bytes
are read here, and no other package is needed. What remains is to view the bytes as numbers and to
undo the horizontal differences (predictor 2) that they may be stored as.
"""

from __future__ import annotations

import io
import struct
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from resnet_jax.data.decode.arrays import TYPES, scaling_bytes, to_uint8
from resnet_jax.errors import DataError, library_errors
from resnet_jax.limits import MAX_CHANNELS

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_FILL_ORDER, _STRIPS, _SAMPLES, _ROWS, _STRIP_SIZES, _PLANAR = 266, 273, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES = 317, 322, 323, 324, 325
_ORIENTATION, _EXTRA, _FORMAT = 274, 338, 339
# Codecs that work on bytes, whatever they mean: none, LZW, Deflate, PackBits, LZMA, Zstandard.
_BYTE_CODECS = (1, 5, 8, 32773, 32946, 34925, 50000)
_KINDS = {1: "u", 2: "i", 3: "f"}  # of the sample format
_TYPES = {
    (number, 8 * int(kind[1])): kind
    for number, letter in _KINDS.items()
    for kind in TYPES
    if kind[0] == letter
}
_UNLIMITED = 2**31 - 1


class Tiff(NamedTuple):
    """How the first image of a TIFF file is stored.

    Args:
      shape: [H, W, C].
      dtype: Of a sample, in the file's byte order.
      separate: Each channel is stored by itself (PlanarConfiguration 2).
      part: Rows and columns of a strip or tile, in pixels.
      tiled: The parts are tiles.
      differences: A sample is stored as its difference to the sample on its left.
      compression: One of _BYTE_CODECS.
      offsets: Of the strips or tiles, in bytes.
      sizes: Of the strips or tiles, in bytes.
      orientation: The tag's value; 1 is upright.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    separate: bool
    part: tuple[int, int]
    tiled: bool
    differences: bool
    compression: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    orientation: int = 1

    @property
    def _samples(self) -> int:
        """Samples of a pixel that are stored side by side."""
        return 1 if self.separate else self.shape[2]

    def decoding_bytes(self, size: int) -> int:
        """The most bytes that `pixels` takes, for a file of `size` bytes."""
        height, width, channels = self.shape
        pixel = self._samples * self.dtype.itemsize
        stored = height * width * channels * self.dtype.itemsize
        loaded = 2 * height * width * pixel + self.part[0] * self.part[1] * pixel
        copies = 2 * size + 64 * len(self.offsets)  # of the file and of its tags
        return copies + loaded + 2 * stored + height * width * channels + scaling_bytes(self.shape)

    def pixels(self, data: bytes) -> np.ndarray:
        """uint8 [H, W, C], of the whole file."""
        height, width, channels = self.shape
        planes = channels if self.separate else 1
        each = len(self.offsets) // planes
        values = np.empty(self.shape, self.dtype)
        for plane in range(planes):
            part = slice(plane * each, (plane + 1) * each)
            with library_errors(_damaged):
                file = io.BytesIO(self._as_one_channel(data, part))
                with Image.open(file, formats=("TIFF",)) as image:
                    rows = np.asarray(image)
            samples = rows.view(self.dtype).reshape(height, width, self._samples)
            values[:, :, plane : plane + self._samples] = self._undo_differences(samples)
        return to_uint8(values)

    def _undo_differences(self, samples: np.ndarray) -> np.ndarray:
        if not self.differences:
            return samples
        # Each tile starts from 0; a sum that overflows wraps around, as the difference did.
        width = self.part[1] if self.tiled else self.shape[1]
        parts = [
            samples[:, left : left + width].cumsum(1, dtype=self.dtype)
            for left in range(0, self.shape[1], width)
        ]
        return np.concatenate(parts, 1)

    def _as_one_channel(self, data: bytes, part: slice) -> bytes:
        """The file with tags of a one-channel image, whose columns are the bytes of a row."""
        pixel = self._samples * self.dtype.itemsize
        tags: dict[int, tuple[int, ...]] = {
            _SUBFILE: (0,),
            _WIDTH: (self.shape[1] * pixel,),
            _HEIGHT: (self.shape[0],),
            _BITS: (8,),
            _COMPRESSION: (self.compression,),
            _PHOTOMETRIC: (1,),
            _SAMPLES: (1,),
        }
        if self.tiled:
            tags |= {_TILE_WIDTH: (self.part[1] * pixel,), _TILE_HEIGHT: (self.part[0],)}
            tags |= {_TILES: self.offsets[part], _TILE_SIZES: self.sizes[part]}
        else:
            tags |= {_ROWS: (self.part[0],)}
            tags |= {_STRIPS: self.offsets[part], _STRIP_SIZES: self.sizes[part]}
        return _with_tags(data, tags)


def _with_tags(data: bytes, tags: dict[int, tuple[int, ...]]) -> bytes:
    """The TIFF file with a new directory appended, in its own byte order."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2] == 43
    kind, word = (16, "Q") if big else (4, "L")
    start = 16 if big else 8
    place = len(data) + len(data) % 2
    entries, values = b"", b""
    after = place + (8 + 20 * len(tags) + 8 if big else 2 + 12 * len(tags) + 4)
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}{word}", *numbers)
        if len(numbers) > 1:
            packed, values = struct.pack(order + word, after + len(values)), values + packed
        entries += struct.pack(f"{order}HH{word}", tag, kind, len(numbers)) + packed
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    first = struct.pack(order + word, place)
    end = bytes(len(first))
    padding = bytes(place - len(data))
    head = data[: start - len(first)] + first
    return b"".join((head, data[start:], padding, count, entries, end, values))


def read_tiff(file: BinaryIO) -> Tiff:
    """Reads the tags of a TIFF file's first image; raises DataError if it cannot be decoded."""
    tags = read_tags(file)
    height, width, channels = (_one(tags, each, 1) for each in (_HEIGHT, _WIDTH, _SAMPLES))
    if channels > MAX_CHANNELS:
        raise DataError(f"a TIFF of {channels:,} channels; at most {MAX_CHANNELS:,} are decoded")
    compression, predictor = _one(tags, _COMPRESSION, 1), _one(tags, _PREDICTOR, 1)
    stored = _one(tags, _FORMAT, 1), _one(tags, _BITS, 1)
    for what, known, allowed in (
        ("compression", compression, compression in _BYTE_CODECS),
        ("predictor", predictor, predictor == 1 or (predictor == 2 and stored[0] in (1, 2))),
        ("fill order", _one(tags, _FILL_ORDER, 1), _one(tags, _FILL_ORDER, 1) == 1),
        ("planar configuration", _one(tags, _PLANAR, 1), _one(tags, _PLANAR, 1) in (1, 2)),
        ("sample format and bits", f"{stored[0]}, {stored[1]}", stored in _TYPES),
    ):
        if not allowed:
            raise DataError(
                f"a TIFF of {channels} channels with {what} {known}, which is not decoded; store "
                "it as uint8 or uint16, uncompressed or with LZW, Deflate or Zstandard"
            )
    separate = _one(tags, _PLANAR, 1) == 2 and channels > 1
    tiled = _TILES in tags
    if tiled:
        part = _one(tags, _TILE_HEIGHT, 0), _one(tags, _TILE_WIDTH, 0)
    else:
        part = min(_one(tags, _ROWS, _UNLIMITED), height), width
    found = (_TILES, _TILE_SIZES) if tiled else (_STRIPS, _STRIP_SIZES)
    offsets, sizes = (_many(tags, each) for each in found)
    if min(height, width, channels, *part) < 1:
        raise DataError(f"not a valid TIFF ({width} x {height} pixels, {channels} channels)")
    parts = -(-height // part[0]) * -(-width // part[1]) * (channels if separate else 1)
    if len(offsets) != parts or len(sizes) != parts:
        raise DataError(f"not a valid TIFF ({len(offsets):,} of {parts:,} strips or tiles)")
    dtype = np.dtype(_TYPES[stored]).newbyteorder("<" if tags.prefix == b"II" else ">")
    shape = height, width, channels
    differences, orientation = predictor == 2, _one(tags, _ORIENTATION, 1)
    return Tiff(
        shape, dtype, separate, part, tiled, differences, compression, offsets, sizes, orientation
    )


def read_tags(file: BinaryIO) -> ImageFileDirectory_v2:
    """The tags of a TIFF file's first image."""
    head = file.read(8)
    if head[:4] == MAGICS[3]:  # Pillow would read it as an ordinary TIFF
        raise DataError("a big-endian BigTIFF, which is not decoded")
    with library_errors(_damaged):
        if head[:4] == MAGICS[2]:
            head += file.read(8)
        tags = ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
    return tags


def channels_of(tags: Any) -> int:
    """The number of channels, if some are neither gray, color nor transparency; else 0."""
    samples = _one(tags, _SAMPLES, 1)
    extra = _many(tags, _EXTRA)
    unspecified = extra.count(0) if extra else 0
    if _one(tags, _PHOTOMETRIC, 1) not in (0, 1, 2):
        return 0
    return samples if unspecified else 0


def bits_of(tags: Any) -> int:
    """Bits of a value, such as 12; 0 if there are 16 or the tags do not say."""
    bits = _one(tags, _BITS, 0)
    return bits if bits < 16 else 0


def _many(tags: Any, tag: int) -> tuple[int, ...]:
    with library_errors(_damaged):
        value = tags.get(tag, ())
    values = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(each, int) and each >= 0 for each in values):
        raise DataError(f"not a valid TIFF (tag {tag})")
    return values


def _one(tags: Any, tag: int, default: int) -> int:
    """The value of a tag, which must be the same for each channel."""
    values = set(_many(tags, tag))
    if len(values) > 1:
        raise DataError(f"a TIFF whose channels differ (tag {tag})")
    return values.pop() if values else default


def _damaged(error: Exception) -> DataError:
    if isinstance(error, Image.DecompressionBombError):
        return DataError("a TIFF of more bytes than are decoded")
    return DataError(f"not a valid TIFF ({str(error).strip() or type(error).__name__})")
