"""Encoded images to uint8 crops, on the host.

Evaluation decodes in full and resizes with Pillow, as torchvision does. Training crops are made
for speed: a JPEG is decoded at a smaller scale where the crop allows it and only down to the
crop's last row, and OpenCV resizes it (figures in docs/decoding.md). Every call works on its own
data and leaves the interpreter lock while it decodes and resizes, so threads run side by side.

Orientation tags (EXIF) are applied where `data.upright` says so. By default they are not: the
published accuracies are of images as stored.

Images may come from strangers. Only regular files of limited size are read, what a header claims is
checked before memory is taken for it and counted in a budget that all threads share (budget.py),
and only decoders that are asked for look at the bytes. Whatever is wrong is a DataError.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image, Jpeg2KImagePlugin, UnidentifiedImageError

from resnet_jax.config.schema import Data
from resnet_jax.data.decode import arrays, budget, tiff
from resnet_jax.data.decode.jpeg import Frame, jpeg_frame
from resnet_jax.data.decode.orientation import AS_STORED, Region, Turn, turn_by_tag, turn_of
from resnet_jax.errors import DataError, import_failure, importing, library_errors
from resnet_jax.files import open_regular, read_bytes

try:  # faster than Pillow; the same pixels in evaluation, in training within a few levels
    import simplejpeg
except ImportError as error:
    simplejpeg = None
    if not isinstance(error, ModuleNotFoundError) or error.name != "simplejpeg":
        logging.getLogger(__name__).warning(
            "%s; Pillow decodes JPEGs instead, which takes longer", import_failure(error)
        )

# Most pixels of an image, as stored and as resized before a crop: as many as the largest sensors
# have. budget.py allows fewer where the format cannot be decoded at a smaller scale.
MAX_PIXELS = 200_000_000
# Of files from here on, the header is judged before the rest is read.
_LARGE_FILE = 2**24
# What Pillow may try. It knows 40 formats, runs Ghostscript for one of them, and looks at the bytes
# instead of the name, so each of them would be open to any file.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Photos of iPhones, which pillow-heif reads where it is installed: brands in a file's first bytes.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_BRANDS = 64
# Numbers of channels that images are converted to; any other must be what they have.
_CONVERTED = (1, 3)
_GREY = {"1", "L", "LA", "La", "I", "F"}  # of Pillow's modes, and "I;16" with its byte orders

_PILLOW_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# Scales 1 / n at which JPEG and JPEG 2000 are decoded.
_SHRINKS = (1, 2, 4, 8)
_OPENCV_CHANNELS = 64  # at a time; OpenCV 5 takes 128
_OPENCV_FILTERS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def _limit_pillow() -> None:
    """Makes Pillow's own limit ours: of frames and tiles inside an image only Pillow knows.

    It refuses twice the number below and warns from there on. That, and what else it warns of while
    it reads a file (corrupt EXIF data, odd palettes), says nothing to our users: pixels that are
    damaged are an error. A filter for one call would need a lock: threads share the filters.
    """
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


_limit_pillow()


def read_encoded(path: str | os.PathLike[str]) -> bytes:
    """Reads the file of an image.

    Args:
      path: A regular file of at most `budget.FILE_BYTES`.

    Returns:
      The encoded image.

    Raises:
      OSError: It is missing, unreadable, no regular file, or too large.
      DataError: It is large, and its first bytes are those of no image that is decoded here.
    """
    if os.path.getsize(path) > _LARGE_FILE:
        with open_regular(path, budget.FILE_BYTES) as file:
            read_header(file)
    return read_bytes(path, budget.FILE_BYTES)


def open_image(file: BinaryIO) -> Image.Image:
    """Reads the header of an image with Pillow.

    Args:
      file: The encoded image.

    Returns:
      The image, not decoded yet.

    Raises:
      DataError: It has more than MAX_PIXELS, is damaged, or of none of FORMATS.

    Example:
      >>> file = io.BytesIO()
      >>> Image.new("L", (8, 4)).save(file, "PNG")
      >>> open_image(file).size
      (8, 4)
    """
    image = _identified(file)
    if image is None:
        raise not_whole(UnidentifiedImageError())
    return image


def _identified(file: BinaryIO) -> Image.Image | None:
    """`open_image`; None of what Pillow does not know."""
    file.seek(0)
    start = file.read(_BRANDS)
    file.seek(0)
    image: Image.Image
    if _is_heic(start):
        image = _open_heic(file)
    else:
        with library_errors(not_whole):
            try:
                image = Image.open(file, formats=FORMATS)
            except UnidentifiedImageError:
                return None
    check_size(image.height, image.width)
    return image


def _is_heic(start: bytes) -> bool:
    """Whether a file that begins so names itself HEIC, the photos of iPhones, among its brands."""
    if start[4:8] != b"ftyp":
        return False
    brands = start[8 : min(int.from_bytes(start[:4], "big"), _BRANDS)]
    return any(brands[at : at + 4] in _HEIC for at in range(0, len(brands), 4))


def _open_heic(file: BinaryIO) -> Image.Image:
    """`open_image`, by pillow-heif. It turns the image by itself, and takes its tag away."""
    with importing("an image in HEIC format", DataError):
        from pillow_heif import HeifImageFile
    with library_errors(not_whole):
        return HeifImageFile(file)


class Header(NamedTuple):
    """What the header of an image says.

    Args:
      height: In pixels.
      width: In pixels.
      channels: 1 (grey), 3 (color), or as many as an array or a TIFF of several channels has.
    """

    height: int
    width: int
    channels: int


def read_header(file: BinaryIO) -> Header:
    """Reads the header of an image, which takes no memory for its pixels.

    Args:
      file: The encoded image.

    Returns:
      Its size and channels.

    Raises:
      DataError: As `open_image`.

    Example:
      >>> file = io.BytesIO()
      >>> Image.new("L", (8, 4)).save(file, "PNG")
      >>> read_header(file)
      Header(height=4, width=8, channels=1)
    """
    file.seek(0)
    start = file.read(30)
    file.seek(0)
    if start.startswith(arrays.NPY_MAGIC):
        return _checked(Header(*arrays.read_npy(file).shape))
    size = budget.webp_size(start)
    if size is not None:  # Pillow would take the memory
        return _checked(Header(*size, 3))
    image = _identified(file)
    if image is None and start[:4] in tiff.MAGICS:
        file.seek(0)
        return _checked(Header(*tiff.read_tiff(file).shape))
    if image is None:
        raise not_whole(UnidentifiedImageError())
    with image:
        grey = image.mode in _GREY or image.mode.startswith("I;")
        channels = tiff.channels_of(getattr(image, "tag_v2", {})) or (1 if grey else 3)
        return Header(image.height, image.width, channels)


def _checked(header: Header) -> Header:
    check_size(header.height, header.width)
    return header


def check_size(height: int, width: int) -> None:
    """Refuses an image that would take too much memory.

    Args:
      height: In pixels.
      width: In pixels.

    Raises:
      DataError: They are more than MAX_PIXELS.

    Example:
      >>> check_size(65535, 65535)
      Traceback (most recent call last):
      resnet_jax.errors.DataError: 65535 x 65535: more than 200,000,000 pixels are not decoded
    """
    if height * width > MAX_PIXELS:
        raise DataError(f"{width} x {height}: more than {MAX_PIXELS:,} pixels are not decoded")


def decode(data: bytes, channels: int) -> np.ndarray:
    """Decodes an image of any of FORMATS or a .npy array; of an animation, the first frame.

    Palettes are looked up, transparency is dropped, CMYK becomes RGB. Values of more than 8 bits
    become 0..255 as `arrays.to_uint8` says. Colour becomes grey by Rec. 601 luma. A JPEG or JPEG
    2000 that would take more than the whole budget of memory is decoded at 1/2, 1/4 or 1/8 of its
    size.

    With any other number of channels than 1 and 3, the image must have as many, and nothing is
    converted or dropped: 4 keeps the transparency of an RGBA image.

    Args:
      data: The encoded image.
      channels: 3 (RGB), 1 (grey), or as many as the image has.

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


def no_bytes(height: int, width: int) -> int:
    """What a block takes that only looks at the pixels."""
    return 0


@contextlib.contextmanager
def decoded(
    data: bytes,
    channels: int,
    beside: budget.Beside = no_bytes,
    *,
    upright: bool = False,
) -> Iterator[np.ndarray]:
    """Decodes as `decode`, and counts the image's memory in the budget until the block ends.

    Args:
      data: The encoded image.
      channels: As for `decode`.
      beside: Bytes that the block takes beside pixels of that height and width.
      upright: Turn the image as its orientation tag says; the pixels are then a view.

    Yields:
      uint8 pixels [H, W, channels].

    Raises:
      DataError: The data is damaged, cut short, too large, or no image.
    """
    if upright:
        beside = _either_way(beside)
    frame = _small_frame(data) if channels in _CONVERTED else None
    if frame is not None and simplejpeg is not None:
        amount, shrink = budget.fitting(
            frame.height,
            frame.width,
            lambda shrink: budget.jpeg_bytes(frame, channels, shrink, beside),
            _SHRINKS,
        )
        with budget.BUDGET.take(amount):
            pixels = _decode_jpeg(data, frame, channels, frame.height, shrink, exact=True)
            if pixels is not None:
                yield _turn_of_jpeg(data, upright).apply(pixels)
                return
    with _decoded_otherwise(data, channels, beside, upright) as pixels:
        yield pixels


def _either_way(beside: budget.Beside) -> budget.Beside:
    """The most that a block takes beside an image or the same one on its side."""
    return lambda height, width: max(beside(height, width), beside(width, height))


def _turn_of_jpeg(data: bytes, upright: bool) -> Turn:
    """How a JPEG is to be turned, whose pixels another decoder than Pillow has."""
    # Most have no such tag, in EXIF or XMP, and need not be opened.
    if not upright or not (b"Exif\0\0" in data or b"tiff:Orientation" in data):
        return AS_STORED
    try:
        return turn_of(open_image(io.BytesIO(data)))
    except DataError:  # damage that the other decoder takes no offence at
        return AS_STORED


@contextlib.contextmanager
def _decoded_otherwise(
    data: bytes,
    channels: int,
    beside: budget.Beside,
    upright: bool,
) -> Iterator[np.ndarray]:
    """`decoded`, of all but the JPEGs that simplejpeg decodes."""
    stored = _stored_array(data, channels)
    if stored is None:
        with _decoded_by_pillow(data, channels, beside, upright) as pixels:
            yield pixels
        return
    height, width, found = stored.shape
    check_size(height, width)
    if found != channels and {found, channels} != set(_CONVERTED):
        raise arrays.channels_fault(found, channels)
    need = stored.decoding_bytes(len(data)) + channels * height * width + beside(height, width)
    amount, _ = budget.fitting(height, width, lambda shrink: need, (1,))
    with budget.BUDGET.take(amount):
        turn = AS_STORED
        if upright and isinstance(stored, tiff.Tiff):
            turn = turn_by_tag(stored.orientation)
        yield turn.apply(arrays.with_channels(stored.pixels(data), channels))


def _stored_array(data: bytes, channels: int) -> arrays.Npy | tiff.Tiff | None:
    """The header of a NumPy array, or of a TIFF of more channels than Pillow reads; else None."""
    if data.startswith(arrays.NPY_MAGIC):
        return arrays.read_npy(io.BytesIO(data))
    if data[:4] not in tiff.MAGICS:
        return None
    image = _identified(io.BytesIO(data))
    if image is not None and channels in (len(image.getbands()), *_CONVERTED):
        return None
    return tiff.read_tiff(io.BytesIO(data))


@contextlib.contextmanager
def _decoded_by_pillow(
    data: bytes,
    channels: int,
    beside: budget.Beside,
    upright: bool,
) -> Iterator[np.ndarray]:
    with contextlib.ExitStack() as taken:
        early = budget.bytes_to_open(data, channels, beside)
        if early is not None:
            amount, size = early
            check_size(*size)
            budget.fitting(*size, lambda _: amount, (1,))
            taken.enter_context(budget.BUDGET.take(amount))
        image = open_image(io.BytesIO(data))
        shrink = 1
        if early is None:
            amount, shrink = budget.fitting(
                image.height,
                image.width,
                functools.partial(budget.pillow_bytes, image, data, channels, beside=beside),
                _SHRINKS if image.format in ("JPEG", "JPEG2000") else (1,),
            )
            taken.enter_context(budget.BUDGET.take(amount))
        pixels = _load(image, channels, shrink)
        if upright:
            pixels = turn_of(image).apply(pixels)
        del image  # its memory is counted until here
        yield pixels


def eval_crop(data: bytes, config: Data, channels: int) -> np.ndarray:
    """Decodes an image, resizes it and cuts out the centre, as torchvision does.

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
      >>> file = io.BytesIO()
      >>> Image.new("RGB", (500, 375)).save(file, "JPEG")
      >>> config = Data(eval_resize=256, eval_size=224)
      >>> eval_crop(file.getvalue(), config, channels=3).shape
      (224, 224, 3)
    """
    beside = crop_bytes(config, channels)
    with decoded(data, channels, beside, upright=config.upright) as pixels:
        return crop_pixels(pixels, config)


def crop_pixels(pixels: np.ndarray, config: Data) -> np.ndarray:
    """The geometry of `eval_crop`, for an image that is decoded already.

    Args:
      pixels: uint8 [H, W, channels].
      config: As for `eval_crop`.

    Returns:
      uint8 pixels [S, S, channels].

    Raises:
      DataError: Resized, it would be too large: a strip thousands of times as long as wide.

    Example:
      >>> crop_pixels(np.zeros((30, 40, 1), np.uint8), Data(eval_size=24)).shape
      (24, 24, 1)
    """
    resized, size = _eval_sides(config)
    if config.eval_crop == "squash" and pixels.shape[:2] != (resized, resized):
        pixels = resize(pixels, resized, resized, config.interpolation)
    return _centre_crop(pixels, resized, size, config.interpolation)


def _eval_sides(config: Data) -> tuple[int, int]:
    size = config.eval_size or config.image_size
    return config.eval_resize or size, size


def crop_bytes(config: Data, channels: int = 3) -> budget.Beside:
    """What `crop_pixels` takes beside an image.

    Args:
      config: As for `eval_crop`.
      channels: Of the image.

    Returns:
      Bytes, as a function of the image's height and width in pixels.

    Example:
      >>> crop_bytes(Data(eval_resize=256))(256, 1000)
      0
    """
    resized, _ = _eval_sides(config)
    if config.eval_crop == "squash":
        return lambda height, width: resize_bytes(height, resized, resized, channels)
    return _centre_bytes(resized, channels)


def _centre_bytes(shorter: int, channels: int) -> budget.Beside:
    def beside(height: int, width: int) -> int:
        if min(height, width) == shorter:
            return 0
        size = _resized(height, width, shorter)
        check_size(*size)
        return resize_bytes(height, *size, channels)

    return beside


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
        random scale (He et al. 2015, section 3.4), or the centre. With `upright` the image is
        turned before that as its EXIF orientation says.
      channels: As for `decode`.
      rng: Draws the crop.
      out: Where to write the pixels, contiguous; None: into new memory.

    Returns:
      uint8 pixels [S, S, channels], antialiased where the crop is larger than S.

    Raises:
      DataError: The data is cut short, too large or no image, or the rows of the crop are
        damaged.

    Example:
      >>> file = io.BytesIO()
      >>> Image.new("RGB", (500, 375)).save(file, "JPEG")
      >>> config = Data(image_size=224, crop="random_resized")
      >>> train_crop(file.getvalue(), config, channels=3, rng=np.random.default_rng(0)).shape
      (224, 224, 3)
    """
    size = config.image_size
    if config.crop == "center":
        beside = _centre_bytes(size, channels)
        with decoded(data, channels, beside, upright=config.upright) as pixels:
            pixels = _centre_crop(pixels, size, size, config.interpolation)
            return _resize(pixels, size, config.interpolation, out)
    draw = {"random_resized": _random_region, "scale_jitter": _jittered_region}[config.crop]

    # Blurred, or as Pillow has it; and of a turned image the crop once more, for OpenCV.
    each = 4 + channels + (channels if config.upright else 0)

    def whole(height: int, width: int) -> int:
        return each * height * width

    frame = _small_frame(data) if channels in _CONVERTED else None
    if frame is None:
        with _decoded_otherwise(data, channels, whole, config.upright) as pixels:
            region = draw(pixels.shape[0], pixels.shape[1], config, rng)
            pixels = np.ascontiguousarray(pixels[region]) if config.upright else pixels[region]
            return _resize(pixels, size, config.interpolation, out)
    turn = _turn_of_jpeg(data, config.upright)
    region = draw(*turn.size(frame.height, frame.width), config, rng)
    region = turn.stored(region, frame.height, frame.width)
    amount, shrink = budget.fitting(
        frame.height,
        frame.width,
        lambda shrink: budget.jpeg_bytes(frame, channels, shrink, whole),
        _SHRINKS[_SHRINKS.index(_shrink_of(region, size)) :],
    )
    with budget.BUDGET.take(amount):
        pixels = _decode_region(data, frame, channels, region, size, shrink)
        if turn != AS_STORED:
            pixels = np.ascontiguousarray(turn.apply(pixels))
        return _resize(pixels, size, config.interpolation, out)


def _small_frame(data: bytes) -> Frame | None:
    """`jpeg_frame`, whose sizes and scans are checked."""
    frame = jpeg_frame(data)
    if frame is not None:
        check_size(frame.height, frame.width)
        if not frame.one_scan:
            budget.check_scans(data, frame.height * frame.width)
    return frame


def _random_region(height: int, width: int, config: Data, rng: np.random.Generator) -> Region:
    """Draws area and ratio up to 10 times, then takes the largest centre of an allowed ratio."""
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
    h, w = _resized(height, width, shorter)
    top = int(rng.integers(h - config.image_size + 1))
    left = int(rng.integers(w - config.image_size + 1))
    # Resizing this region is resizing the image and cutting the region out, but for the rounding
    # of its edges to whole pixels of the image.
    return (
        _unscaled(top, config.image_size, scale, height),
        _unscaled(left, config.image_size, scale, width),
    )


def _unscaled(start: int, size: int, scale: float, length: int) -> slice:
    """Where a stretch of a scaled side of an image lies in the image; at least one pixel."""
    first = min(round(start / scale), length - 1)
    return slice(first, max(first + 1, min(round((start + size) / scale), length)))


def _resized(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Height and width once the shorter side has that length; torchvision cuts the fraction."""
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def _centre_crop(pixels: np.ndarray, shorter: int, size: int, interpolation: str) -> np.ndarray:
    height, width = pixels.shape[:2]
    if min(height, width) != shorter:
        if pixels.shape[2] not in _CONVERTED:
            return _by_threes(pixels, lambda part: _centre_crop(part, shorter, size, interpolation))
        height, width = _resized(height, width, shorter)
        check_size(height, width)
        image = _resized_image(pixels, height, width, interpolation)
        if height * width > budget.BAND_PIXELS:  # of a strip, only the crop becomes an array
            left, top = _centred(width, size), _centred(height, size)
            return _array(image.crop((left, top, left + size, top + size)))
        pixels = _array(image)
    top, left = _centred(height, size), _centred(width, size)
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def _centred(length: int, size: int) -> int:
    return round((length - size) / 2)  # of a half, to the even number, in torchvision too


def resize(pixels: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Resizes an image with Pillow's antialiased filters.

    Args:
      pixels: uint8 [H, W, C].
      height: New one in pixels.
      width: New one in pixels.
      interpolation: "bilinear" or "bicubic".

    Returns:
      uint8 [height, width, C].

    Example:
      >>> resize(np.zeros((375, 500, 3), np.uint8), 224, 299, "bilinear").shape
      (224, 299, 3)
    """
    if pixels.shape[2] not in _CONVERTED:
        return _by_threes(pixels, lambda part: resize(part, height, width, interpolation))
    return _array(_resized_image(pixels, height, width, interpolation))


def resize_bytes(stored_height: int, height: int, width: int, channels: int = 3) -> int:
    """What `resize` takes beside its image: rows resized across, twice, and the result."""
    others = 2 * channels * height * width if channels not in _CONVERTED else 0
    return 7 * stored_height * width + 10 * height * width + others


def _by_threes(pixels: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Changes three channels at a time, or one: of 2 and 4 Pillow takes the last for opacity."""
    channels = pixels.shape[2]
    whole = channels - channels % 3
    starts = [*range(0, whole, 3), *range(whole, channels)]
    parts = [pixels[:, :, a:b] for a, b in zip(starts, [*starts[1:], channels])]
    return np.concatenate([change(np.ascontiguousarray(part)) for part in parts], 2)


def _resized_image(pixels: np.ndarray, height: int, width: int, interpolation: str) -> Image.Image:
    kind = _PILLOW_FILTERS[interpolation]
    if pixels.shape[0] * pixels.shape[1] > budget.BAND_PIXELS:
        # Pillow resizes across first, each row by itself, so that bands of rows give the same.
        rows = max(1, budget.BAND_PIXELS // pixels.shape[1])
        across = np.empty((pixels.shape[0], width, pixels.shape[2]), np.uint8)
        for top in range(0, pixels.shape[0], rows):
            band = pixels[top : top + rows]
            across[top : top + rows] = _array(_image(band).resize((width, band.shape[0]), kind))
        pixels = across
    return _image(pixels).resize((width, height), kind)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _resize(
    pixels: np.ndarray, size: int, interpolation: str, out: np.ndarray | None = None
) -> np.ndarray:
    """Resizes to a square with OpenCV, whose filters do not widen when they shrink an image.

    A triangle r pixels wide is needed to shrink by r; it has the variance r^2 / 6. OpenCV's
    filter has 1 / 6 of it, so a blur before it gives the rest. The result is within about one
    level (of 255, mean) of Pillow's, in a third of its time.
    """
    out = np.empty((size, size, pixels.shape[2]), np.uint8) if out is None else out
    if pixels.shape[:2] == (size, size):
        out[:] = pixels
        return out
    if pixels.shape[2] > _OPENCV_CHANNELS:
        for first in range(0, pixels.shape[2], _OPENCV_CHANNELS):
            part = slice(first, first + _OPENCV_CHANNELS)
            out[:, :, part] = _resize(np.ascontiguousarray(pixels[:, :, part]), size, interpolation)
        return out
    variances = [((length / size) ** 2 - 1) / 6 for length in pixels.shape[:2]]  # pixels^2
    if max(variances) >= 0.01:  # less would not show
        (height, down), (width, across) = map(_gaussian, variances)
        pixels = cv2.GaussianBlur(pixels, (width, height), across, sigmaY=down)
    cv2.resize(pixels, (size, size), dst=out, interpolation=_OPENCV_FILTERS[interpolation])
    return out


def _gaussian(variance: float) -> tuple[int, float]:
    """Size and deviation that make OpenCV's sampled Gaussian have a variance."""
    if variance > 0.5:
        deviation = math.sqrt(variance)
        return 2 * math.ceil(2 * deviation) + 1, deviation
    # Three values [a, 1 - 2a, a] have the variance 2a; a / (1 - 2a) = exp(-1 / (2 deviation^2)).
    beside = max(variance, 1e-6) / 2
    return 3, math.sqrt(-0.5 / math.log(beside / (1 - 2 * beside)))


def _shrink_of(region: Region, size: int) -> int:
    """The largest scale at which no side of a region gets shorter than `size`."""
    shortest = min(side.stop - side.start for side in region)
    # 16: the few pixels of a tiny image could be had at a scale between those powers as well.
    return next((each for each in (8, 4, 2) if shortest // each >= max(size, 16)), 1)


def _decode_region(
    data: bytes,
    frame: Frame,
    channels: int,
    region: Region,
    size: int,
    shrink: int = 0,
) -> np.ndarray:
    """Decodes a region, shrunk by a power of 2 as long as no side gets shorter than `size`."""
    rows, columns = region
    shrink = shrink or _shrink_of(region, size)
    pixels = None
    if simplejpeg is not None:
        # One row more than the region has, from which its last row's colour is interpolated.
        last = min(frame.height, rows.stop + shrink)
        pixels = _decode_jpeg(data, frame, channels, last, shrink, exact=False)
    if pixels is None:
        pixels = _load(open_image(io.BytesIO(data)), channels, shrink)
    return pixels[
        round(rows.start / shrink) : round(rows.stop / shrink),
        round(columns.start / shrink) : round(columns.stop / shrink),
    ]


def _decode_jpeg(
    data: bytes, frame: Frame, channels: int, rows: int, shrink: int, *, exact: bool
) -> np.ndarray | None:
    """Decodes the upper `rows` of a JPEG; None if Pillow shall judge it.

    The decoder stops where the header says that the image ends, so writing a smaller height into
    the header saves the work for all rows below. It skips those to find the end of the file, and
    warns of them (and of nothing else, if the end is there).
    """
    cut = frame.one_scan and rows < frame.height
    if cut:
        at = frame.height_at
        data = b"".join((data[:at], rows.to_bytes(2, "big"), data[at + 2 :]))
    height, width = -(-(rows if cut else frame.height) // shrink), -(-frame.width // shrink)
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


def _load(image: Image.Image, channels: int, shrink: int) -> np.ndarray:
    """The pixels of an image that was opened, at 1 / shrink of its size."""
    with library_errors(not_whole):
        if image.format == "JPEG":  # of grey images, decode no colour
            mode = {1: "L", 3: "RGB"}.get(channels)
            image.draft(mode, (image.width // shrink, image.height // shrink))
        elif isinstance(image, Jpeg2KImagePlugin.Jpeg2KImageFile):
            image.reduce = shrink.bit_length() - 1
    return image_pixels(image, channels)


def image_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """The pixels of an image that Pillow opened, converted as `decode` says.

    Args:
      image: Of any mode.
      channels: 3 (RGB), 1 (grey), or as many as the image has.

    Returns:
      uint8 pixels [H, W, channels].

    Raises:
      DataError: It is damaged, or of other channels.

    Example:
      >>> image_pixels(Image.new("I;16", (8, 4), 0x1234), channels=1)[0, 0].tolist()
      [18]
    """
    with library_errors(not_whole):
        image.load()
    depth = _depth(image)
    width, height = image.size
    if height * width <= budget.BAND_PIXELS:
        return _converted(image, channels, depth)
    pixels = np.empty((height, width, channels), np.uint8)
    rows = max(1, budget.BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        with library_errors(not_whole):
            band = image.crop((0, top, width, bottom))
        pixels[top:bottom] = _converted(band, channels, depth)
    return pixels


def _depth(image: Image.Image) -> int:
    """Bits of a value that Pillow gives more room than it has; 0: as many as the mode says."""
    if image.format == "PPM":  # 16 bits in 32
        return 16
    return tiff.bits_of(getattr(image, "tag_v2", {})) if image.mode == "I;16" else 0


def _converted(image: Image.Image, channels: int, depth: int) -> np.ndarray:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if values.dtype.kind != "f" and depth:
            values = values.astype(np.uint16) << (16 - depth)
        image = _image(arrays.to_uint8(values[:, :, None]))
    with library_errors(not_whole):
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        if channels in _CONVERTED or image.mode == "P":
            image = image.convert("RGB" if channels != 1 else "L")
    if channels not in (*_CONVERTED, len(image.getbands())):
        raise arrays.channels_fault(len(image.getbands()), channels)
    return _array(image)


def not_whole(error: Exception) -> DataError:
    """The error for data that Pillow cannot read.

    Args:
      error: What it raised.

    Returns:
      One that says why, in one line.
    """
    if isinstance(error, Image.DecompressionBombError):
        return DataError(f"more than {MAX_PIXELS:,} pixels are not decoded")
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # its text is an address in memory
        reason = "of no known format"
    return DataError(f"not a whole image ({reason})")
