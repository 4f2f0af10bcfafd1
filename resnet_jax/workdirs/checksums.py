"""Checksums of the files of a checkpoint: what was written is what is read.

Orbax restores a flipped bit without a word. SHA-256 because Python has it, because it lets no
damage through that anyone will ever see, and because `sha256sum -c SHA256SUMS` can check a
checkpoint without this package; it runs in the background, beside steps that take longer.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
from pathlib import Path
from typing import cast

from resnet_jax import files
from resnet_jax.files import sync
from resnet_jax.workdirs.workdir import write_whole

NAME = "SHA256SUMS"
LIMIT = 64 * files.MIB  # bytes of a manifest


def seal(folder: Path) -> None:
    """Writes the manifest of a folder, after all else in it is safely on the disk.

    Args:
      folder: Of a state that is complete.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as name:
      ...     _ = Path(name, "file").write_text("text")
      ...     seal(Path(name))
      ...     print(damage(Path(name)))
      ...     _ = Path(name, "file").write_text("test")
      ...     print(damage(Path(name)))
      None
      file does not match its checksum
    """
    for path in folder.rglob("*"):
        sync(path)
    write_whole(folder / NAME, _text(_checksums(folder)))


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder.

    Args:
      folder: Of a state.

    Returns:
      The first file that is missing, unknown or changed, in words; None: all is as it was sealed.

    Raises:
      OSError: A file is there and cannot be read. Nobody knows then whether it is damaged.
    """
    try:
        found = _files(folder)
        if NAME not in found:
            return f"{NAME} is missing"
        sealed = _read(folder / NAME)
        expected = parse(sealed)
        for name in sorted(expected.keys() | found - {NAME}):  # cheap, so before any sum
            if name not in found:
                return f"{_shown(name)} is missing"
            if name not in expected:
                return f"{_shown(name)} does not belong to it"
        for name, digest in expected.items():
            if _digest(folder / name) != digest:
                return f"{_shown(name)} does not match its checksum"
    except FileNotFoundError as error:  # since it was listed
        return f"{_shown(os.path.relpath(error.filename, folder))} is missing"
    except _NotPlainError as error:
        return str(error)
    return None if _text(expected).encode() == sealed else f"{NAME} has changed"


def parse(manifest: bytes) -> dict[str, str]:
    """Reads a manifest, which may be damaged or a stranger's.

    Args:
      manifest: Its content.

    Returns:
      Relative path -> SHA-256. Both may be any text: they are for comparing.
    """
    lines = manifest.decode("utf-8", errors="replace").splitlines()
    return {line[66:]: line[:64] for line in lines}


class _NotPlainError(Exception):
    """A link, a device or the like: none of ours, and reading some of them never ends."""


def _files(folder: Path) -> set[str]:
    """Relative paths of the files, each of which is a plain one."""
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise _NotPlainError("it is a link or no folder, and is not read")
    found = set()
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for path in (Path(parent, name) for name in sorted([*folders, *names])):
            name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.add(name)
            elif not stat.S_ISDIR(mode):
                raise _NotPlainError(f"{_shown(name)} is not a plain file")
    return found


def _raise(error: OSError) -> None:
    raise error


def _read(path: Path) -> bytes:
    if path.stat().st_size > LIMIT:
        raise _NotPlainError(f"{NAME} has {path.stat().st_size:,} bytes, which no run writes")
    return files.read_bytes(path, LIMIT)


def _checksums(folder: Path) -> dict[str, str]:
    names = sorted(_files(folder) - {NAME}, key=lambda name: Path(name).parts)
    return {name: _digest(folder / name) for name in names}


def _digest(path: Path) -> str:
    try:
        with files.open_regular(path, limit=sys.maxsize) as file:
            return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
    except OSError as error:  # of a read, which names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _shown(name: str) -> str:
    """A stranger's name without what a terminal obeys."""
    return ascii(name)[1:-1]


def _text(checksums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in checksums.items())
