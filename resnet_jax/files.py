"""Files that may be anyone's: regular and small enough to read, written whole or not at all.

A folder from a stranger may hold FIFOs, devices, sparse files and symbolic links where a plain file
is expected. What is read here is a regular file of at most the given size. What is written is a new
file, renamed into place once it is complete: a link at that place is replaced, never followed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ModuleNotFoundError:  # Windows, which the models and their weights work on
    fcntl = None  # type: ignore[assignment]

MIB = 2**20
# Names of what is being written. Only these are ever removed as left over.
_PREFIX, _SUFFIX = ".resnet_jax.", ".partial"
_MADE_HERE = re.compile(rf"{re.escape(_PREFIX)}[0-9a-f]{{16}}{re.escape(_SUFFIX)}")
_LEFT_OVER_SECONDS = 60.0  # younger ones may not have been locked yet
# Flags that Windows does not have are 0 there: its devices have names of their own.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)
_SAFE = _NO_WAIT | getattr(os, "O_NOFOLLOW", 0)


def open_regular(path: str | os.PathLike[str], limit: int) -> BinaryIO:
    """Opens a regular file to read; links to one are followed.

    Args:
      path: The file.
      limit: The largest size in bytes.

    Returns:
      The open file.

    Raises:
      OSError: It is missing, no regular file, or larger. `strerror` says which.

    Example:
      >>> open_regular("/dev/null", limit=1)
      Traceback (most recent call last):
      OSError: [Errno 22] not a regular file: '/dev/null'
    """
    _check_regular(os.stat(path), path, limit)  # opening a device may do something already
    descriptor = os.open(path, os.O_RDONLY | _NO_WAIT)
    try:
        _check_regular(os.fstat(descriptor), path, limit)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(found: os.stat_result, path: str | os.PathLike[str], limit: int) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    if found.st_size > limit:
        reason = f"{found.st_size:,} bytes, more than the limit of {limit:,}"
        raise OSError(errno.EFBIG, reason, os.fspath(path))


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Reads a regular file.

    Args:
      path: The file.
      limit: The largest size in bytes.

    Returns:
      Its content, as long as it was when it was opened.

    Raises:
      OSError: As `open_regular`.
    """
    with open_regular(path, limit) as file:
        # Not of the limit: so many bytes are allocated before one is read.
        return file.read(os.fstat(file.fileno()).st_size)


def read_json(path: str | os.PathLike[str], limit: int = 64 * MIB) -> Any:
    """Reads a JSON file.

    Args:
      path: The file.
      limit: The largest size in bytes.

    Returns:
      The value that it holds, of any type.

    Raises:
      OSError: As `read_bytes`.
      ValueError: It is not UTF-8, no JSON, or nested too deeply.
    """
    try:
        return json.loads(read_bytes(path, limit).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def sync(path: str | os.PathLike[str]) -> None:
    """Waits until a file, or the names in a folder, would outlive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | _NO_WAIT)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that gets its name when the block ends well, and is gone otherwise.

    A reader, and a crash at any moment, finds the old file or the new one.

    Args:
      path: Its name. A regular file or a link there is replaced.

    Yields:
      The file, open to write bytes.

    Raises:
      OSError: It cannot be written, or something else than a file is there.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with new_file(f"{folder}/a") as file:
      ...         _ = file.write(b"whole")
      ...     os.listdir(folder)
      ['a']
    """
    path = Path(path)
    _check_replaceable(path)
    remove_left_over(path.parent)
    partial = _unused(path.parent)
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, 0o666)
    try:
        with open(descriptor, "wb") as file:
            _mark_as_used(descriptor)
            yield file
            file.flush()
            os.fsync(descriptor)
            if fcntl is not None:
                os.replace(partial, path)  # while it is locked: nobody takes it for left over
        if fcntl is None:  # Windows renames no open file, and opens no folder
            os.replace(partial, path)
        else:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to make something in, which is removed when the block ends.

    Args:
      parent: Folder that it is in, so that what is complete can be moved by `os.replace`.

    Yields:
      Its path.

    Raises:
      OSError: It cannot be made.
    """
    remove_left_over(parent)
    folder = _unused(parent)
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _SAFE)
    try:
        _mark_as_used(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # does not follow links
        os.close(descriptor)


def atomic_write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file such that a reader, and a crash at any moment, finds the old or the new one.

    Args:
      path: The file.
      content: All of it; text is encoded as UTF-8.

    Raises:
      OSError: It cannot be written; the old one is still there.
    """
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def open_to_append(path: str | os.PathLike[str]) -> int:
    """Opens a file to add to it; makes it where there is none.

    Args:
      path: The file.

    Returns:
      Its descriptor, for reading and writing.

    Raises:
      OSError: It is a link, or no regular file.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     os.symlink("/etc/passwd", f"{folder}/log")
      ...     open_to_append(f"{folder}/log")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      OSError: [Errno 40] a symbolic link, which is not followed: '...log'
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _SAFE, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            reason = "a symbolic link, which is not followed"
            raise OSError(errno.ELOOP, reason, os.fspath(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return descriptor


def make_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder inside one that is there, unless it exists; a link to one is refused.

    Raises:
      OSError: It cannot be made, or is a link or something else.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    check_own_folder(path)


def check_own_folder(path: str | os.PathLike[str]) -> None:
    """Raises OSError unless a path is a folder itself, and no link to one elsewhere."""
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        reason = "a symbolic link, which is not followed"
        raise OSError(errno.ELOOP, reason, os.fspath(path))
    if not stat.S_ISDIR(mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))


def remove_left_over(folder: str | os.PathLike[str]) -> None:
    """Removes what `new_file` and `new_folder` of a killed process left in a folder.

    What another process still writes is locked, and stays.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if _MADE_HERE.fullmatch(name):
                with contextlib.suppress(OSError):
                    _remove_if_unused(Path(folder, name))


def _remove_if_unused(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | _SAFE)
    try:
        found = os.fstat(descriptor)
        if time.time() - found.st_mtime < _LEFT_OVER_SECONDS:
            return
        if fcntl is None:  # nothing tells whether it is still written
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path)
        elif stat.S_ISREG(found.st_mode):
            path.unlink()
    finally:
        os.close(descriptor)


def _unused(parent: str | os.PathLike[str]) -> Path:
    return Path(parent, f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")


def _mark_as_used(descriptor: int) -> None:
    if fcntl is None:
        return
    with contextlib.suppress(OSError):  # some network file systems have no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _check_replaceable(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OSError(errno.EINVAL, "not a regular file, and is not replaced", str(path))
