"""The memory that decoding may take: a budget, and estimates from an image's header.

A file of a few bytes can claim more pixels than any memory holds. So before an image is decoded,
its header gives an upper bound of the bytes that takes. All threads of a process share one budget:
an image waits until there is room, and one that needs more than the whole budget is refused. The
bytes per pixel were measured (docs/decoding.md).
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import struct
import threading
from collections.abc import Callable, Sequence

from PIL import Image

from resnet_jax.data.decode.jpeg import JpegHeader
from resnet_jax.errors import DataError
from resnet_jax.files import MIB

# After an image that took more, freed memory is returned to the system.
_LARGE_IMAGE_BYTES = 64 * MIB
# What Pillow converts or resizes at a time; larger images are processed in bands of rows.
BAND_PIXELS = 2**20
# Memory for a band, and for a pointer and the padding of each row in Pillow.
_BAND_BYTES, _ROW_BYTES = 16 * BAND_PIXELS, 32
# OpenJPEG's structures for each tile and for each of its components.
_TILE_BYTES, _COMPONENT_BYTES = 8192, 2048
_SIZ = struct.Struct(">HHIIIIIIIIH")  # length, profile, 4 sides of the image, of a tile, components
# The most text that Pillow unpacks of a PNG, and zlib's highest compression ratio.
_TEXT_BYTES, _ZLIB_RATIO = 64 * MIB, 1032
# The most scans of a progressive JPEG, times its pixels. Encoders write about 10 scans.
_SCANNED_PIXELS = 2_000_000_000

# Bytes needed besides a decoded image's pixels, by its height and width.
ExtraBytes = Callable[[int, int], int]


def no_bytes(height: int, width: int) -> int:
    """For a block of code that only reads the pixels."""
    return 0


class Budget:
    """Bytes that all threads of a process may use at a time; first come, first served.

    Example:
      >>> budget = Budget(100)
      >>> with budget.reserve(60):
      ...     budget.free
      40
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: collections.deque[object] = collections.deque()

    def reserve(self, amount: int) -> contextlib.AbstractContextManager[None]:
        """Waits until `amount` bytes (at most `total`) are free, and reserves them for the block.

        A block must not reserve more inside itself: two such blocks could deadlock.
        """
        return _Reservation(self, amount)

    def _acquire(self, amount: int) -> None:
        with self._lock:
            if amount > self.free or self._waiting:
                turn = object()
                self._waiting.append(turn)
                try:
                    while self._waiting[0] is not turn or amount > self.free:
                        self._changed.wait()
                finally:
                    self._waiting.remove(turn)
                    self._changed.notify_all()
            self.free -= amount

    def _release(self, amount: int) -> None:
        if amount > _LARGE_IMAGE_BYTES:
            _trim_heap()
        with self._lock:
            self.free += amount
            if self._waiting:
                self._changed.notify_all()


class _Reservation:  # a class, because a generator is slower and every image makes one
    __slots__ = ("_amount", "_budget")

    def __init__(self, budget: Budget, amount: int) -> None:
        self._budget = budget
        self._amount = amount

    def __enter__(self) -> None:
        self._budget._acquire(self._amount)

    def __exit__(self, *exception: object) -> None:
        self._budget._release(self._amount)


def _trim_heap() -> None:
    """Returns freed memory to the system; glibc keeps what each thread has freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


BUDGET = Budget(512 * MIB)


def fit(
    height: int, width: int, need: Callable[[int], int], shrinks: Sequence[int]
) -> tuple[int, int]:
    """The bytes and the first n of `shrinks` for which an image at 1 / n fits the budget.

    Args:
      height: In pixels, as stored.
      width: In pixels, as stored.
      need: Bytes that decoding at 1 / n of the size takes, by n.
      shrinks: Possible n, the best first.

    Raises:
      DataError: The image does not fit.

    Example:
      >>> fit(60_000, 60_000, lambda shrink: 3 * (60_000 // shrink) ** 2, shrinks=(1, 2, 4, 8))
      (168750000, 8)
    """
    for shrink in shrinks:
        amount = need(shrink)
        if amount <= BUDGET.total:
            return amount, shrink
    raise DataError(
        f"{width} x {height}: to decode and resize these {height * width:,} pixels takes "
        f"{amount // MIB:,} MiB, more than the limit of {BUDGET.total // MIB:,} MiB"
    )


def jpeg_bytes(header: JpegHeader, channels: int, shrink: int, extra_bytes: ExtraBytes) -> int:
    """The most bytes that decoding a JPEG at 1 / shrink of its size to `channels` takes."""
    height, width = -(-header.height // shrink), -(-header.width // shrink)
    coefficients = 0
    if not header.one_scan:  # of the whole image, 2 bytes each, in blocks of 8 to 32 pixels
        blocks = (header.height + 31) // 32 * ((header.width + 31) // 32)
        coefficients = round(2 * header.samples * 1024 * blocks)
    pixels = channels * height * width
    return coefficients + pixels + extra_bytes(height, width) + _band_bytes(height, width)


def pillow_bytes(
    image: Image.Image, data: bytes, channels: int, shrink: int, extra_bytes: ExtraBytes
) -> int:
    """The most bytes that decoding an image with Pillow takes; the image is not loaded yet.

    Only JPEG and JPEG 2000 are decoded at 1 / shrink of their size.
    """
    height, width = -(-image.height // shrink), -(-image.width // shrink)
    stored = _stored_bytes(image.mode)
    loading, fixed = _DECODER_BYTES.get(image.format or "", _plain)(image, data, shrink)
    pixels = height * width
    later = max(channels * pixels + extra_bytes(height, width), (stored + channels) * pixels)
    if image.mode == "F":  # a band as float64, three times
        fixed += 24 * min(pixels, BAND_PIXELS)
    return max(stored * pixels + loading, later) + fixed + _band_bytes(height, width)


def _band_bytes(height: int, width: int) -> int:
    return min(16 * height * width, _BAND_BYTES) + _ROW_BYTES * height


def _stored_bytes(mode: str) -> int:
    """Bytes for a pixel in Pillow's memory."""
    if mode in ("1", "L", "P"):
        return 1
    return 2 if mode.startswith("I;16") else 4


# For each format: bytes that its decoder takes besides Pillow's pixels, and those bytes that do not
# depend on the scale.
_DecoderBytes = Callable[[Image.Image, bytes, int], tuple[int, int]]


def _plain(image: Image.Image, data: bytes, shrink: int) -> tuple[int, int]:
    return 0, 0


def _gif(image: Image.Image, data: bytes, shrink: int) -> tuple[int, int]:
    return image.height * image.width, 0  # the frame, before it is drawn over the canvas


def _bmp_or_ppm(image: Image.Image, data: bytes, shrink: int) -> tuple[int, int]:
    """Pillow decodes some kinds in Python: the raw bytes twice, of up to 32 bits a pixel."""
    return (0, 0) if _is_raw(image) else (8 * image.height * image.width, len(data))


def _is_raw(image: Image.Image) -> bool:
    """Whether Pillow copies rows as they are stored."""
    return [tile[0] for tile in getattr(image, "tile", ())[:1]] == ["raw"]


def _avif(image: Image.Image, data: bytes, shrink: int) -> tuple[int, int]:
    return 13 * image.height * image.width, 2 * len(data) + 16 * MIB


def _jpeg(image: Image.Image, data: bytes, shrink: int) -> tuple[int, int]:
    """All coefficients, as if there were several scans."""
    layers = getattr(image, "layers", 4)
    check_scans(data, image.height * image.width)
    blocks = (image.height + 31) // 32 * ((image.width + 31) // 32)
    return 0, 2 * layers * 1024 * blocks


def _jpeg2000(image: Image.Image, data: bytes, shrink: int) -> tuple[int, int]:
    """Reads the codestream's own header, which may differ from that of the file around it."""
    area, fixed, components = image.height * image.width, 0, len(image.getbands())
    at = data.find(b"\xff\x4f\xff\x51")
    while 0 <= at <= len(data) - 4 - _SIZ.size:
        _, _, right, bottom, left, top, tile_width, tile_height, _, _, parts = _SIZ.unpack_from(
            data, at + 4
        )
        area = max(area, (right - left) * (bottom - top))
        components = max(components, parts)
        tiles = 0
        if tile_width and tile_height:
            tiles = -(-right // tile_width) * -(-bottom // tile_height)
        fixed = max(fixed, tiles * (_TILE_BYTES + _COMPONENT_BYTES * parts))
        at = data.find(b"\xff\x4f\xff\x51", at + 4)
    # 32 bits of each component, and Pillow's copy of up to 16 bits, a tile at a time.
    return 6 * components * area // shrink**2, fixed + len(data)


def _tiff(image: Image.Image, data: bytes, shrink: int) -> tuple[int, int]:
    """A strip or tile, which may be larger than the image, and a copy turned by its tag."""
    tags = getattr(image, "tag_v2", {})
    pixels = image.height * image.width
    tile = _number(tags, 322) * _number(tags, 323)
    strip = min(_number(tags, 278) or image.height, image.height) * image.width
    depth = _number(tags, 258) * max(_number(tags, 277), 1) // 8 + 1
    inner = 16 if _number(tags, 259) in (6, 7, 50001) else 0  # JPEG, WebP
    part = 0 if _is_raw(image) else max(tile, strip) * (depth + inner)
    return part + (4 * pixels if _number(tags, 274) > 1 else 0), len(data)


def _number(tags: object, tag: int) -> int:
    """The largest value of a TIFF's tag; 0 without the tag."""
    value = tags.get(tag, 0) if hasattr(tags, "get") else 0
    values = value if isinstance(value, tuple) else (value,)
    return max((int(each) for each in values if isinstance(each, int)), default=0)


_DECODER_BYTES: dict[str, _DecoderBytes] = {
    "AVIF": _avif,
    "BMP": _bmp_or_ppm,
    "GIF": _gif,
    "HEIF": _avif,
    "JPEG": _jpeg,
    "MPO": _jpeg,
    "JPEG2000": _jpeg2000,
    "PPM": _bmp_or_ppm,
    "TIFF": _tiff,
}


def check_scans(data: bytes, pixels: int) -> None:
    """Raises DataError for a JPEG that takes minutes: thousands of scans of all its pixels."""
    scans = data.count(b"\xff\xda")
    if scans * (pixels + 100_000) > _SCANNED_PIXELS and scans > 10:
        raise DataError(f"{scans:,} scans of {pixels:,} pixels are not decoded")


def bytes_to_open(
    data: bytes, channels: int, extra_bytes: ExtraBytes
) -> tuple[int, tuple[int, int]] | None:
    """For images that Pillow allocates memory for when it opens them: bytes, and height and width.

    The bytes are those of the whole decoding. None for formats that are opened without memory.
    """
    size = webp_size(data)
    if size is not None:
        height, width = size
        pixels = height * width
        later = channels * pixels + extra_bytes(height, width)
        return max(18 * pixels, later) + 2 * len(data) + _band_bytes(height, width), size
    if data[:4] == b"\x89PNG" and len(data) > 24 and (b"zTXt" in data or b"iTXt" in data):
        width, height = struct.unpack_from(">II", data, 16)
        pixels = height * width
        if not pixels:  # no PNG that can be decoded
            return None
        text = min(_TEXT_BYTES, _ZLIB_RATIO * len(data))
        later = max(channels * pixels + extra_bytes(height, width), (4 + channels) * pixels)
        return text + later + _band_bytes(height, width), (height, width)
    return None


def webp_size(start: bytes) -> tuple[int, int] | None:
    """Height and width of a WebP, from its first 30 bytes; None for other data, or if one is 0."""
    if start[:4] != b"RIFF" or start[8:12] != b"WEBP" or len(start) < 30:
        return None
    kind = start[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(start[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(start[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return (height, width) if height and width else None
