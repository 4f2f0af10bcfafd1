"""Output files that the user names: written whole or not at all, and never over a device.

What is at the path decides what happens:

nothing                          a new file, which gets its name when it is complete
a regular file                   is replaced in the same way, but only with --force
a link to a file, a dangling link    the link is replaced, and its target stays as it is
a FIFO, a character device, a link to one, /dev/stdout    is written into, with or without --force,
                                 if the format is a stream, else refused; it is never replaced
a block device, a socket, a folder    is refused
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from resnet_jax import files
from resnet_jax.errors import ConfigError, ResNetJaxError


@contextlib.contextmanager
def open_output(
    output: str | os.PathLike[str], force: bool, flag: str = "--output", stream: bool = False
) -> Iterator[BinaryIO]:
    """A file that appears when all of it is written, and not at all if that fails.

    Args:
      output: Its path.
      force: Replace an existing file or link.
      flag: The flag that names it, for messages.
      stream: The format can be written without seeking, and so into a FIFO or a device.

    Raises:
      ConfigError: Something is at the path, or the file cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with open_output(f"{folder}/a.txt", force=False) as file:
      ...         _ = file.write(b"whole")
      ...     os.listdir(folder)
      ['a.txt']
    """
    path = files.expand_user(output)
    with output_errors(path, f"{flag}={output}"):
        is_file = check_output(path, force, f"{flag}={output}", stream)
        with files.new_file(path) if is_file else _open_stream(path) as file:
            yield file


def check_output(path: Path, force: bool, flag: str, stream: bool = False) -> bool:
    """Checks that a path can be written; False means that it is opened instead of replaced.

    `flag` is the flag with its value; the other arguments are those of `open_output`.
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
    kind: str
    is_writable: bool  # as a stream


_SPECIAL = {
    stat.S_IFIFO: _Special("a FIFO", True),
    stat.S_IFCHR: _Special("a device", True),
    stat.S_IFBLK: _Special("a block device", False),
    stat.S_IFSOCK: _Special("a socket", False),
}


def special_file(path: Path) -> _Special | None:
    """What a path leads to that must not be replaced; None for a file, a link to one, or nothing.

    Raises:
      OSError: The system does not say.
    """
    kind = 0
    with contextlib.suppress(FileNotFoundError):
        kind = stat.S_IFMT(path.stat().st_mode)
    # /dev/stdout and its like. Replacing one would take it from every process of the machine.
    if path.is_symlink() and re.match(r"/dev$|/proc/", os.path.realpath(path.parent)):
        return _SPECIAL.get(kind, _Special("a link of the system", True))
    return _SPECIAL.get(kind)


@contextlib.contextmanager
def _open_stream(path: Path) -> Iterator[BinaryIO]:
    # Appends, because standard output may lead to a file that the shell has started.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY)
    with open(descriptor, "wb") as file:
        yield file


@contextlib.contextmanager
def output_errors(
    path: Path, flag: str, kind: type[ResNetJaxError] = ConfigError
) -> Iterator[None]:
    """Turns an OSError about an output into an error that names its flag.

    An OSError that names a file elsewhere stays as it is.
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
