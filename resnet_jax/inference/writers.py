"""Results on disk and on the way there: whole files or none, progress, images that are skipped.

An output is a path that the user names. What is there decides what happens:

nothing                  a new file, which gets its name when it is complete
a regular file           is replaced in the same way, with --force only
a link to one, a dangling link    the link is replaced likewise; what it leads to stays as it is
a FIFO, a character device, a link to one, /dev/stdout    is written into, whatever --force says,
                         where the format is a stream, else refused; it is never replaced
a block device, a socket, a folder    is refused
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from resnet_jax import files
from resnet_jax.errors import ConfigError, DataError, ResNetJaxError
from resnet_jax.inference.images import ImageFile
from resnet_jax.terminal import visible


@contextlib.contextmanager
def new_file(
    output: str | os.PathLike[str], force: bool, flag: str = "--output", stream: bool = False
) -> Iterator[BinaryIO]:
    """A file that appears when all of it is written, and not at all if that fails.

    Args:
      output: Its path.
      force: Replace a file or link that is there.
      flag: That it was given by, for messages.
      stream: The format can be written without going back, and so into a FIFO or a device.

    Yields:
      The file, open to write bytes.

    Raises:
      ConfigError: Something is there, or the file cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with new_file(f"{folder}/a.txt", force=False) as file:
      ...         _ = file.write(b"whole")
      ...     os.listdir(folder)
      ['a.txt']
    """
    path = Path(output).expanduser()
    with explained(path, f"{flag}={output}"):
        is_file = check_output(path, force, f"{flag}={output}", stream)
        with files.new_file(path) if is_file else _opened(path) as file:
            yield file


def check_output(path: Path, force: bool, flag: str, stream: bool = False) -> bool:
    """Checks that a path can be written as this file's head says.

    Args:
      path: The path.
      force: Replace a file or link that is there.
      flag: The flag and its value, for messages.
      stream: The format can be written into a FIFO or a device.

    Returns:
      True for a new file; False for what is opened and written into.

    Raises:
      ConfigError: It cannot.
    """
    if path.is_dir():
        raise ConfigError(f"{flag}: is a folder; give a file in it")
    special = special_file(path)
    if special and not (stream and special.is_writable):
        raise ConfigError(f"{flag}: is {special.kind}, which is not replaced; give a file")
    if not special and os.path.lexists(path) and not force:
        raise ConfigError(f"{flag}: exists; give --force to replace it")
    return special is None


class _Special(NamedTuple):
    """What is no regular file: its kind, and whether a stream can be written into it."""

    kind: str
    is_writable: bool


def special_file(path: Path) -> _Special | None:
    """What a path leads to that must not be replaced; None for a file, a link to one, or nothing.

    Raises:
      OSError: It cannot be looked at.
    """
    kind = 0
    with contextlib.suppress(FileNotFoundError):
        kind = stat.S_IFMT(path.stat().st_mode)
    # /dev/stdout and the like. Replacing one would take it from every process of the machine.
    if path.is_symlink() and re.match(r"/dev$|/proc/", os.path.realpath(path.parent)):
        return _SPECIAL.get(kind, _Special("a link of the system", True))
    return _SPECIAL.get(kind)


_SPECIAL = {
    stat.S_IFIFO: _Special("a FIFO", True),
    stat.S_IFCHR: _Special("a device", True),
    stat.S_IFBLK: _Special("a block device", False),
    stat.S_IFSOCK: _Special("a socket", False),
}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    # Standard output may lead to a file that the shell has begun: it is added to.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY)
    with open(descriptor, "wb") as file:
        yield file


@contextlib.contextmanager
def explained(path: Path, flag: str, kind: type[ResNetJaxError] = ConfigError) -> Iterator[None]:
    """Turns what the system says of an output into a line for the user.

    Args:
      path: The output.
      flag: The flag and its value.
      kind: Class of the error.

    Raises:
      kind: It cannot be written. An OSError that names a file elsewhere stays as it is.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(error.filename).parent not in (
            path.parent,
            path.parent.parent,
        ):
            raise
        raise kind(f"{flag}: cannot be written ({error.strerror or error})") from error


class Progress:
    """Pairs images with results, shows how far that is, and names what is skipped.

    Args:
      files: The images.
      bar: Show a bar, if standard error is a terminal.

    Raises:
      DataError: At the end, if not one image could be read.

    Example:
      >>> progress = Progress([ImageFile("a.png"), ImageFile("b.png")], bar=False)
      >>> [file.name for file, _ in progress([DataError("a.png: cut short"), np.zeros(3)])]
      ['b.png']
      >>> progress.skipped
      1
    """

    def __init__(self, files: Sequence[ImageFile], bar: bool = True) -> None:
        self._files = files
        self._bar = bar
        self.skipped = 0

    def __call__(
        self, results: Iterable[np.ndarray | DataError]
    ) -> Iterator[tuple[ImageFile, np.ndarray]]:
        first = None
        hidden = None if self._bar else True  # None: where no terminal shows it
        with tqdm(total=len(self._files), unit=" images", disable=hidden) as bar:
            for file, result in zip(self._files, results):
                if isinstance(result, DataError):
                    first = first or result
                    self.skipped += 1
                    if len(self._files) > 1:
                        tqdm.write(visible(f"skipped: {result}"), file=sys.stderr)
                else:
                    yield file, result
                bar.update()
        if first is not None and self.skipped == len(self._files):
            raise DataError(f"no image could be read; {first}" if self.skipped > 1 else str(first))
