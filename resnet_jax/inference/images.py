"""Images to predict: found in folders and on standard input, read in threads, turned upright.

Training and evaluation take images as they are stored, because that is how published accuracies
were measured. Here a photo is to be the way up that its camera noted (EXIF orientation).
"""

from __future__ import annotations

import collections
import concurrent.futures
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image

from resnet_jax.data.decode import decode, image_pixels, not_whole, open_image
from resnet_jax.data.folders import IMAGE_SUFFIXES as DATA_SET_SUFFIXES
from resnet_jax.errors import DataError, library_errors

# What is an image in a folder; a file that is named itself may be called anything.
IMAGE_SUFFIXES = (*DATA_SET_SUFFIXES, ".avif", ".gif", ".pbm", ".pgm", ".ppm", ".tif", ".tiff")
STDIN = "-"
# Images that a thread takes at a time: waking it costs as much as decoding a small one.
_AT_A_TIME = 4
# How stored pixels [H, W, C] become upright ones, by the value of the orientation tag.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}

T = TypeVar("T")


class ImageFile(NamedTuple):
    """An image that is to be read.

    Args:
      name: Its path as the user gave it; "-": it came from standard input.
      label: The folder it lies in, below the one that the user gave; "": right in that one.
      data: The encoded image, where it has been read already.
    """

    name: str
    label: str = ""
    data: bytes | None = None


def list_images(inputs: Sequence[str | os.PathLike[str]]) -> list[ImageFile]:
    """The images that a command line names.

    Standard input is either one encoded image or, if it is text, a list of files and folders, one
    a line. Folders are searched with all folders below them, sorted by name, without hidden files.

    Args:
      inputs: Files, folders, or "-" for standard input.

    Returns:
      In the order of the inputs.

    Raises:
      DataError: An input is missing, a folder has no images, or standard input is empty.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     os.makedirs(f"{folder}/cats")
      ...     _ = Path(folder, "cats", "1.JPG").write_bytes(b"")
      ...     _ = Path(folder, "notes.txt").write_bytes(b"")
      ...     [image.label for image in list_images([folder])]
      ['cats']
    """
    names = [os.fspath(each) for each in inputs]
    if names.count(STDIN) > 1:
        raise DataError("-: standard input can be read once; name it once")
    for name in names:
        if name != STDIN and not os.path.exists(name):
            raise DataError(f"{name}: there is no such file or folder")
    found: list[ImageFile] = []
    for name in names:
        found += _from_stdin(sys.stdin.buffer.read()) if name == STDIN else _expand(name)
    return found


def _from_stdin(data: bytes) -> list[ImageFile]:
    if not data.strip():
        raise DataError("-: standard input is empty; it takes an image, or paths one a line")
    # No path has a zero byte, and few images have none: only those need a look.
    if b"\0" in data or _is_image(data):
        return [ImageFile(STDIN, data=data)]
    lines = [line.removesuffix("\r") for line in os.fsdecode(data).split("\n")]
    # A file that is missing here is skipped like a broken one: the list may be long.
    return [image for line in lines if line for image in _expand(line)]


def _is_image(data: bytes) -> bool:
    try:
        with open_image(io.BytesIO(data)):
            return True
    except DataError:
        return False


def _expand(name: str) -> list[ImageFile]:
    if not os.path.isdir(name):
        return [ImageFile(name)]
    found = [ImageFile(path, label) for path, label in _walk(name, "", frozenset())]
    if not found:
        raise DataError(f"{name}: the folder has no images ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _walk(folder: str, label: str, above: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Paths and the names of their folders, depth first; links are followed, circles are not."""
    above |= {os.path.realpath(folder)}
    try:
        entries = sorted(each for each in os.listdir(folder) if not each.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from error
    for entry in entries:
        path = os.path.join(folder, entry)
        if os.path.isdir(path):
            if os.path.realpath(path) not in above:
                yield from _walk(path, entry, above)
        elif entry.lower().endswith(IMAGE_SUFFIXES):
            yield path, label


def read_pixels(image: Any, channels: int) -> np.ndarray:
    """An image as pixels, upright.

    Args:
      image: A path, an `ImageFile`, an image of Pillow's, or uint8 pixels [H, W, C] or [H, W].
      channels: 3 (RGB) or 1 (grey); whatever the image has is converted as `data.decode` does.

    Returns:
      uint8 pixels [H, W, channels].

    Raises:
      DataError: It cannot be read, is damaged, is no image, or has too many pixels. (Of arrays and
        Pillow's images the pixels are not counted: who has them has the memory.)

    Example:
      >>> read_pixels(Image.new("LA", (8, 4)), channels=3).shape
      (4, 8, 3)
    """
    if isinstance(image, np.ndarray):
        # By way of Pillow, so that an array is converted as the same image in a file.
        grey = image.ndim == 3 and image.shape[2] == 1
        return image_pixels(Image.fromarray(image[:, :, 0] if grey else image), channels)
    name = getattr(image, "filename", "") or "an image in memory"
    try:
        if isinstance(image, Image.Image):
            return _upright(image, channels)
        file = image if isinstance(image, ImageFile) else ImageFile(os.fspath(image))
        name = file.name
        data = Path(name).read_bytes() if file.data is None else file.data
        return _decode_upright(data, channels)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _decode_upright(data: bytes, channels: int) -> np.ndarray:
    if data[:2] == b"\xff\xd8":  # a JPEG, of which Pillow reads the tag only
        pixels = decode(data, channels)
        return _turned(pixels, _orientation(lambda: open_image(io.BytesIO(data))))
    with open_image(io.BytesIO(data)) as image:
        return _upright(image, channels)


def _upright(image: Image.Image, channels: int) -> np.ndarray:
    pixels = image_pixels(image, channels)
    # The tag comes second: loading a TIFF, Pillow turns it by itself and takes its tag away.
    return _turned(pixels, _orientation(lambda: image))


def _orientation(opened: Callable[[], Image.Image]) -> int:
    try:
        with library_errors(not_whole):
            return int(opened().getexif().get(ExifTags.Base.Orientation, 1))
    except DataError:  # damaged tags are no reason to refuse whole pixels
        return 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    turn = _TURNS.get(orientation)
    return pixels if turn is None else turn(pixels)


def in_threads(
    read: Callable[[T], np.ndarray], items: Iterable[T], ahead: int
) -> Iterator[np.ndarray | DataError]:
    """Reads items with a thread a core, beside whatever the caller does.

    Args:
      read: Makes an array of an item.
      items: As many as there are.
      ahead: About how many results may wait, so that memory is bounded.

    Returns:
      In the order of the items; the error in place of an item that cannot be read.

    Example:
      >>> [int(each) for each in in_threads(np.square, range(5), ahead=2)]
      [0, 1, 4, 9, 16]
    """

    def read_part(part: list[T]) -> list[np.ndarray | DataError]:
        return [_or_error(read, item) for item in part]

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
        pool.shutdown(wait=False, cancel_futures=True)


def _or_error(read: Callable[[T], np.ndarray], item: T) -> np.ndarray | DataError:
    try:
        return read(item)
    except DataError as error:
        return error
