"""What an encoded image is, by its header: size, channels, and whether it is decoded at all.

Images may come from strangers. Only regular files of limited size are read, only the decoders named
here see the bytes, and what a header claims is checked before memory is allocated for it.
"""

from __future__ import annotations

import os
import warnings
from typing import BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from resnet_jax.data.decode import arrays, budget, tiff
from resnet_jax.errors import DataError, importing, library_errors
from resnet_jax.files import open_regular, read_bytes
from resnet_jax.limits import MAX_IMAGE_BYTES

# Most pixels of an image, as stored and as resized before a crop: as many as the largest sensors
# have. budget.py allows fewer for formats that cannot be decoded at a smaller scale.
MAX_PIXELS = 200_000_000
# The header of a larger file is checked before the rest is read.
_LARGE_FILE = 2**24
# Formats that Pillow may try. It has 40 decoders, runs Ghostscript for one of them, and looks at
# the bytes instead of the name, so any file could reach any of them.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Photos of iPhones, which pillow-heif reads if it is installed: brands in a file's first bytes.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_BRAND_BYTES = 64
_WEBP_HEADER_BYTES = 30
_GRAY_MODES = {"1", "L", "LA", "La", "I", "F"}  # of Pillow, and "I;16" with its byte orders


def _limit_pillow() -> None:
    """Gives Pillow our limit, for frames and tiles inside an image that only Pillow sees.

    Pillow refuses images of twice the number below and warns from the number on. That warning, and
    others while a file is read (corrupt EXIF data, odd palettes), do not help users: damaged pixels
    are an error anyway. A filter around each call would need a lock, because threads share them.
    """
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


_limit_pillow()


def read_encoded(path: str | os.PathLike[str]) -> bytes:
    """Reads the file of an image.

    Raises:
      OSError: The file is missing, unreadable, not regular, or larger than MAX_IMAGE_BYTES.
      DataError: The file is large, and its header is not that of an image.
    """
    if os.path.getsize(path) > _LARGE_FILE:
        with open_regular(path, MAX_IMAGE_BYTES) as file:
            read_header(file)
    return read_bytes(path, MAX_IMAGE_BYTES)


def open_image(file: BinaryIO) -> Image.Image:
    """Opens an image with Pillow, without decoding it; raises DataError for all but FORMATS."""
    image = identify(file)
    if image is None:
        raise image_error(UnidentifiedImageError())
    return image


def identify(file: BinaryIO) -> Image.Image | None:
    """As `open_image`, but None for what Pillow does not know."""
    file.seek(0)
    start = file.read(_BRAND_BYTES)
    file.seek(0)
    image: Image.Image
    if _is_heic(start):
        image = _open_heic(file)
    else:
        with library_errors(image_error):
            try:
                image = Image.open(file, formats=FORMATS)
            except UnidentifiedImageError:
                return None
    check_size(image.height, image.width)
    return image


def _is_heic(start: bytes) -> bool:
    if start[4:8] != b"ftyp":
        return False
    brands = start[8 : min(int.from_bytes(start[:4], "big"), _BRAND_BYTES)]
    return any(brands[at : at + 4] in _HEIC for at in range(0, len(brands), 4))


def _open_heic(file: BinaryIO) -> Image.Image:
    """Opens a HEIC image, which pillow-heif turns upright, removing the orientation tag."""
    with importing("an image in HEIC format", DataError):
        from pillow_heif import HeifImageFile
    with library_errors(image_error):
        return HeifImageFile(file)


class Header(NamedTuple):
    """Size in pixels, and channels: 1 (gray), 3 (color), or those of an array or a TIFF."""

    height: int
    width: int
    channels: int


def read_header(file: BinaryIO) -> Header:
    """Reads the header of an image; allocates nothing for its pixels.

    Raises:
      DataError: The image has more than MAX_PIXELS, is damaged, or of an unknown format.

    Example:
      >>> import io
      >>> file = io.BytesIO()
      >>> Image.new("L", (8, 4)).save(file, "PNG")
      >>> read_header(file)
      Header(height=4, width=8, channels=1)
    """
    file.seek(0)
    start = file.read(_WEBP_HEADER_BYTES)
    file.seek(0)
    if start.startswith(arrays.NPY_MAGIC):
        return _checked(Header(*arrays.read_npy(file).shape))
    size = budget.webp_size(start)
    if size is not None:  # Pillow allocates the pixels when it opens a WebP
        return _checked(Header(*size, 3))
    image = identify(file)
    if image is None and start[:4] in tiff.MAGICS:
        file.seek(0)
        return _checked(Header(*tiff.read_tiff(file).shape))
    if image is None:
        raise image_error(UnidentifiedImageError())
    with image:
        gray = image.mode in _GRAY_MODES or image.mode.startswith("I;")
        channels = tiff.channels_of(getattr(image, "tag_v2", {})) or (1 if gray else 3)
        return Header(image.height, image.width, channels)


def _checked(header: Header) -> Header:
    check_size(header.height, header.width)
    return header


def check_size(height: int, width: int) -> None:
    """Raises DataError for more than MAX_PIXELS.

    Example:
      >>> check_size(65535, 65535)
      Traceback (most recent call last):
      resnet_jax.errors.DataError: 65535 x 65535: more than 200,000,000 pixels are not decoded
    """
    if height * width > MAX_PIXELS:
        raise DataError(f"{width} x {height}: more than {MAX_PIXELS:,} pixels are not decoded")


def image_error(error: Exception) -> DataError:
    """The one-line error for an image that Pillow cannot read, by what Pillow raised."""
    if isinstance(error, Image.DecompressionBombError):
        return DataError(f"more than {MAX_PIXELS:,} pixels are not decoded")
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # its text is an address in memory
        reason = "unknown format"
    return DataError(f"not a valid image ({reason})")
