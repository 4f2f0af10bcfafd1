"""Safe reading and atomic writing of files.

An untrusted folder may hold FIFOs, devices, sparse files and symbolic links where a regular file
is expected. Reads accept only regular files up to a given size. Writes create a new file and
rename it once it is complete: a symbolic link with its name is replaced, never followed.
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

from resnet_jax.errors import ConfigError

try:
    import fcntl
except ModuleNotFoundError:  # Windows, which supports models and their weights
    fcntl = None  # type: ignore[assignment]

MIB = 2**20
# Names of incomplete files and folders. Only these are ever removed as leftovers.
_PREFIX, _SUFFIX = ".resnet_jax.", ".partial"
_PARTIAL_NAME = re.compile(rf"{re.escape(_PREFIX)}[0-9a-f]{{16}}{re.escape(_SUFFIX)}")
_LEFTOVER_SECONDS = 60.0  # younger ones may not be locked yet
# Windows lacks these flags; its devices have names of their own.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)
_SAFE = _NO_WAIT | getattr(os, "O_NOFOLLOW", 0)


def expand_user(path: str | os.PathLike[str]) -> Path:
    """The path with ~ replaced by a home directory.

    Raises:
      ConfigError: There is no such home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # pathlib has no class of its own for it
        raise ConfigError(
            f"{os.fspath(path)}: there is no such home directory; set HOME, or use a full path"
        ) from error


def open_regular(path: str | os.PathLike[str], limit: int) -> BinaryIO:
    """Opens a regular file of at most `limit` bytes for reading; links are followed.

    Raises:
      OSError: The file is missing, not regular or larger; `strerror` says which.

    Example:
      >>> open_regular("/dev/null", limit=1)
      Traceback (most recent call last):
      OSError: [Errno 22] not a regular file: '/dev/null'
    """
    _check_regular(os.stat(path), path, limit)  # before opening, which has effects on some devices
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
    """Reads a regular file of at most `limit` bytes.

    Raises:
      OSError: As `open_regular`.
    """
    with open_regular(path, limit) as file:
        # Not `limit`: Python allocates as many bytes before it reads.
        return file.read(os.fstat(file.fileno()).st_size)


def read_json(path: str | os.PathLike[str], limit: int = 64 * MIB) -> Any:
    """Reads the value of a JSON file of at most `limit` bytes.

    Raises:
      OSError: As `open_regular`.
      ValueError: The file is not UTF-8 or not JSON, or it is nested too deeply.
    """
    try:
        return json.loads(read_bytes(path, limit).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def sync(path: str | os.PathLike[str]) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | _NO_WAIT)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(
    path: str | os.PathLike[str], *, mode: int = 0o666, replace: bool = True, durable: bool = True
) -> Iterator[BinaryIO]:
    """A file that gets its name when the block succeeds, and is removed otherwise.

    At any moment a reader, also after a crash, finds the old file or the complete new one.

    Args:
      path: Final name of the file.
      mode: Permissions, reduced by the umask.
      replace: Whether to replace a regular file or a link with that name.
      durable: Whether to flush the file to the disk before it gets its name. Without that, a power
        failure can leave an incomplete file: only for contents that are checked when read.

    Yields:
      The file, open for writing bytes.

    Raises:
      FileExistsError: `replace` is False and the name is taken.
      OSError: The file cannot be written, or something other than a file has the name.

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
    remove_leftovers(path.parent)
    partial = _partial_path(path.parent)
    rename = os.replace if replace else os.link  # a link fails where a name is taken
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, mode)
    try:
        with open(descriptor, "wb") as file:
            _lock(descriptor)
            yield file
            file.flush()
            if durable:
                os.fsync(descriptor)
            if fcntl is not None:
                rename(partial, path)  # while it is locked, so that nobody removes it as a leftover
        if fcntl is None:  # Windows renames no open file, and opens no folder
            rename(partial, path)
        elif durable:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], content: str | bytes, **options: Any) -> None:
    """Writes a file through `new_file`, with its options; text is encoded as UTF-8."""
    with new_file(path, **options) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_folder(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder for incomplete files, which is removed when the block ends.

    Whatever is complete is moved out of it by `os.rename`, within the file system of `parent`.

    Raises:
      OSError: The folder cannot be made.
    """
    remove_leftovers(parent)
    folder = _partial_path(parent)
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _SAFE)
    try:
        _lock(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # does not follow links
        os.close(descriptor)


def open_to_append(path: str | os.PathLike[str]) -> int:
    """Opens a file for appending, and creates it if it does not exist; returns its descriptor.

    Raises:
      OSError: The path is a link or not a regular file.

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
    """Creates a folder unless it exists.

    Raises:
      OSError: It cannot be created, or the path is a link or a file.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    check_folder(path)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raises OSError unless a path is a folder; a link to a folder is refused."""
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        reason = "a symbolic link, which is not followed"
        raise OSError(errno.ELOOP, reason, os.fspath(path))
    if not stat.S_ISDIR(mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes incomplete files and folders of killed processes.

    What another process still writes is locked and stays.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if _PARTIAL_NAME.fullmatch(name):
                with contextlib.suppress(OSError):
                    _remove_if_unlocked(Path(folder, name))


def _remove_if_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | _SAFE)
    try:
        found = os.fstat(descriptor)
        if time.time() - found.st_mtime < _LEFTOVER_SECONDS:
            return
        if fcntl is None:  # no locks: it may still be written
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path)
        elif stat.S_ISREG(found.st_mode):
            path.unlink()
    finally:
        os.close(descriptor)


def _partial_path(parent: str | os.PathLike[str]) -> Path:
    return Path(parent, f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")


def _lock(descriptor: int) -> None:
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
