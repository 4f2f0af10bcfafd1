"""Images to predict: listed from folders or standard input, or in memory; read by threads.

Photos are rotated by their EXIF orientation, unless the caller says otherwise. Training and
evaluation use images as they are stored, because published accuracies were measured that way;
`data.upright` changes that.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import io
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from resnet_jax.config.schema import Data
from resnet_jax.data.decode import (
    crop_bytes,
    crop_pixels,
    decoded,
    image_pixels,
    read_encoded,
    read_header,
)
from resnet_jax.data.decode.arrays import check_type, to_uint8, with_channels
from resnet_jax.data.decode.budget import ExtraBytes, no_bytes
from resnet_jax.data.decode.orientation import orientation_of
from resnet_jax.data.image_files import IMAGE_SUFFIXES
from resnet_jax.errors import DataError, library_errors
from resnet_jax.limits import MAX_IMAGE_BYTES

STDIN = "-"
_MAX_VISITS = 100  # of one folder, through links
# Images that a thread reads at a time, because waking it costs as much as decoding a small one.
_AT_A_TIME = 4
_NAMELESS = "an image in memory"

T = TypeVar("T")


class ImageFile(NamedTuple):
    """An image to read."""

    name: str  # its path as the user gave it; "-" for standard input
    label: str = ""  # its folder, below the one that the user gave
    data: bytes | None = None  # the encoded image, if it has been read already


def list_images(inputs: Sequence[str | os.PathLike[str]]) -> list[ImageFile]:
    """The images that a command line names: files, folders, or "-" for standard input.

    Standard input is either one encoded image or, if it is text, a list of files and folders, one
    per line. Folders are searched recursively, sorted by name, without hidden files. A path that is
    named twice, or that a named folder contains, is listed once, where it comes first.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     os.makedirs(f"{folder}/cats")
      ...     _ = pathlib.Path(folder, "cats", "1.JPG").write_bytes(b"")
      ...     _ = pathlib.Path(folder, "notes.txt").write_bytes(b"")
      ...     [image.label for image in list_images([folder])]
      ['cats']
    """
    names = [os.fspath(each) for each in inputs]
    if names.count(STDIN) > 1:
        raise DataError("-: standard input can be read once; name it once")
    for name in names:
        if name != STDIN and not os.path.exists(name):
            raise DataError(f"{name}: there is no such file or folder")
    found: dict[object, ImageFile] = {}
    for name in names:
        files = (
            _from_stdin(sys.stdin.buffer.read(MAX_IMAGE_BYTES + 1))
            if name == STDIN
            else _expand(name)
        )
        for file in files:
            found.setdefault(STDIN if file.data is not None else Path(file.name).absolute(), file)
    return [*found.values()]


def _from_stdin(data: bytes) -> list[ImageFile]:
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"-: standard input has more than the limit of {MAX_IMAGE_BYTES:,} bytes")
    if not data.strip():
        raise DataError("-: standard input is empty; it takes an image, or paths one a line")
    # Paths have no zero bytes; the few images without one are recognized by their header.
    if b"\0" in data or _is_image(data):
        return [ImageFile(STDIN, data=data)]
    lines = [line.removesuffix("\r") for line in os.fsdecode(data).split("\n")]
    # A missing file is skipped like a broken one, because the list may be long.
    return [image for line in lines if line for image in _expand(line)]


def _is_image(data: bytes) -> bool:
    try:
        return bool(read_header(io.BytesIO(data)))
    except DataError:
        return False


def _expand(name: str) -> list[ImageFile]:
    if not os.path.isdir(name):
        return [ImageFile(name)]
    found = [ImageFile(path, label) for path, label in _walk(name)]
    if not found:
        raise DataError(f"{name}: the folder has no images ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _walk(folder: str) -> Iterator[tuple[str, str]]:
    """Paths and the names of their folders, depth first; follows links but no cycles."""
    todo = [(folder, "", frozenset[tuple[int, int]]())]  # a stack
    visits: collections.Counter[tuple[int, int]] = collections.Counter()
    while todo:
        path, label, above = todo.pop()
        if not os.path.isdir(path):
            yield path, label
            continue
        try:
            found = os.stat(path)
            names = sorted(each for each in os.listdir(path) if not each.startswith("."))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        place = found.st_dev, found.st_ino
        if place in above:
            continue
        visits[place] += 1
        if visits[place] > _MAX_VISITS:  # links to links double with each folder
            raise DataError(f"{path}: reached through links in more than {_MAX_VISITS} ways")
        inside = [os.path.join(path, each) for each in names]
        label = "" if path == folder else os.path.basename(path)
        todo += [
            (each, label, above | {place})
            for each in reversed(inside)
            if each.lower().endswith(IMAGE_SUFFIXES) or os.path.isdir(each)
        ]


def read_pixels(image: Any, channels: int, *, upright: bool = True) -> np.ndarray:
    """Reads an image.

    Args:
      image: A path, an `ImageFile`, an encoded image as bytes or an open binary file, a Pillow
        image, or an array [H, W, C] or [H, W] of NumPy, JAX and the like. Arrays are scaled to
        0..255 like those of a .npy file (`data.decode.arrays.to_uint8`).
      channels: 3 (RGB) or 1 (grayscale), to which images are converted as in `data.decode`; or the
        number that the image has.
      upright: Rotate it by its EXIF orientation.

    Returns:
      uint8 pixels [H, W, channels].

    Raises:
      DataError: It cannot be read, is damaged, is not an image, or has too many pixels. Arrays and
        Pillow images, which are in memory already, may have any number of pixels.

    Example:
      >>> read_pixels(Image.new("LA", (8, 4)), channels=3).shape
      (4, 8, 3)
    """
    with opened_pixels(image, channels, upright=upright) as pixels:
        return pixels


def read_crop(image: Any, channels: int, config: Data) -> np.ndarray:
    """Reads the crop of an image that a network sees: uint8 [S, S, channels].

    `config` is that of `data.decode.eval_crop`; the rest is as for `read_pixels`.
    """
    beside = crop_bytes(config, channels)
    with opened_pixels(image, channels, beside, upright=config.upright) as pixels:
        return crop_pixels(pixels, config)


@contextlib.contextmanager
def opened_pixels(
    image: Any, channels: int, beside: ExtraBytes = no_bytes, *, upright: bool = True
) -> Iterator[np.ndarray]:
    """`read_pixels`, with a file's memory accounted for until the block ends.

    `beside` returns the bytes that the block needs beside pixels of a height and width. A DataError
    from the block gets the image's name.
    """
    image = from_memory(image)
    if isinstance(image, np.ndarray):
        yield _of_array(image, channels)
        return
    name = name_of(image)
    try:
        if isinstance(image, Image.Image):
            # The tag comes second: loading a TIFF, Pillow turns it and takes its tag away.
            pixels = image_pixels(image, channels)
            yield orientation_of(image).apply(pixels) if upright else pixels
            return
        file = image if isinstance(image, ImageFile) else ImageFile(os.fspath(image))
        data = read_encoded(name) if file.data is None else file.data
        with decoded(data, channels, beside, upright=upright) as pixels:
            yield pixels
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def from_memory(image: Any) -> Any:
    """Converts bytes and open binary files to an `ImageFile`, and arrays to NumPy's.

    Example:
      >>> from_memory(io.BytesIO(b"GIF89a"))
      ImageFile(name='an image in memory', label='', data=b'GIF89a')
    """
    if isinstance(image, ImageFile | Image.Image | np.ndarray | str | os.PathLike):
        return image
    if isinstance(image, bytes | bytearray | memoryview):
        return ImageFile(_NAMELESS, data=bytes(image))
    if hasattr(image, "read"):
        return ImageFile(name_of(image), data=_content(image))
    return np.asarray(image) if hasattr(image, "__array__") else image


def _content(file: Any) -> bytes:
    name = name_of(file)
    with library_errors(lambda error: DataError(f"{name}: cannot be read ({error})")):
        if file.seekable():  # a file that was just written is at its end
            file.seek(0)
        data = file.read(MAX_IMAGE_BYTES + 1)
    if not isinstance(data, bytes):
        raise DataError(
            f'{name}: the open file gives text; open it as a binary one, with mode "rb"'
        )
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"{name}: has more than the limit of {MAX_IMAGE_BYTES:,} bytes")
    return data


def name_of(image: Any) -> str:
    """An image's name in messages: its path, where it has one."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    name = getattr(image, "filename", "") or getattr(image, "name", "")
    return name if isinstance(name, str) and name else _NAMELESS


def _of_array(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Converts pixels [H, W, C] or [H, W] as the same image in a file would be."""
    if pixels.ndim not in (2, 3) or not pixels.size:
        raise DataError(f"an array of shape {pixels.shape}: an image is [H, W, C] or [H, W]")
    check_type(pixels.dtype)
    pixels = to_uint8(pixels if pixels.ndim == 3 else pixels[:, :, None])
    if pixels.shape[2] == channels:
        return pixels
    if channels in (1, 3) and pixels.shape[2] in (2, 4):  # the last channel is opacity
        return image_pixels(Image.fromarray(pixels), channels)
    try:
        return with_channels(pixels, channels)
    except DataError as error:
        raise DataError(f"an array of shape {pixels.shape}: {error}") from error


def in_threads(
    read: Callable[[T], np.ndarray], items: Iterable[T], ahead: int
) -> Iterator[np.ndarray | DataError]:
    """Reads items with one thread per core, while the caller works on earlier results.

    Yields results in the order of the items, a DataError for an item that cannot be read. About
    `ahead` results may wait. If the caller stops early, only images being decoded are finished.

    Example:
      >>> [int(each) for each in in_threads(np.square, range(5), ahead=2)]
      [0, 1, 4, 9, 16]
    """

    stopped = threading.Event()

    def read_part(part: list[T]) -> list[np.ndarray | DataError]:
        return [_or_error(read, item) for item in part if not stopped.is_set()]

    waiting: collections.deque[concurrent.futures.Future[list[np.ndarray | DataError]]]
    waiting = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="read")
    left = iter(items)
    try:
        while part := list(itertools.islice(left, _AT_A_TIME)):
            waiting.append(pool.submit(read_part, part))
            if len(waiting) * _AT_A_TIME > ahead:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _or_error(read: Callable[[T], np.ndarray], item: T) -> np.ndarray | DataError:
    try:
        return read(item)
    except DataError as error:
        return DataError(str(error))  # the original's traceback would keep the decoded image alive
