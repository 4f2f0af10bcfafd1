"""Checksums that seal the folder of a state: whatever changes afterwards is detected.

Orbax restores flipped bits silently. SHA-256 is in Python's library, detects any damage in
practice, and can be checked without this package by `sha256sum -c SHA256SUMS`. It runs in the
background, beside steps that take longer.
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

NAME = "SHA256SUMS"
MAX_BYTES = 64 * files.MIB  # of a manifest


def seal(folder: Path) -> None:
    """Writes the manifest of a folder, after all its files have been flushed to the disk.

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
        files.sync(path)
    files.atomic_write(folder / NAME, _format(_checksums(folder)))


def damage(folder: Path) -> str | None:
    """Describes the first file of a sealed folder that is missing, unknown or changed, if any.

    Raises:
      OSError: A file exists and cannot be read, so its condition is unknown.
    """
    try:
        found = _files(folder)
        if NAME not in found:
            return f"{NAME} is missing"
        sealed = _read_manifest(folder / NAME)
        expected = parse(sealed)
        for name in sorted(expected.keys() | found - {NAME}):  # cheap, so before any checksum
            if name not in found:
                return f"{_shown(name)} is missing"
            if name not in expected:
                return f"{_shown(name)} does not belong to it"
        for name, digest in expected.items():
            if _digest(folder / name) != digest:
                return f"{_shown(name)} does not match its checksum"
    except FileNotFoundError as error:  # removed since it was listed
        return f"{_shown(os.path.relpath(error.filename, folder))} is missing"
    except _NotRegularError as error:
        return str(error)
    return None if _format(expected).encode() == sealed else f"{NAME} has changed"


def parse(manifest: bytes) -> dict[str, str]:
    """Parses a manifest, damaged or not, into relative path -> SHA-256.

    Both can be any text, so they may only be compared.
    """
    lines = manifest.decode("utf-8", errors="replace").splitlines()
    return {line[66:]: line[:64] for line in lines}


class _NotRegularError(Exception):
    """A link, a device or the like, which a run does not write; reading some of them never ends."""


def _files(folder: Path) -> set[str]:
    """Relative paths of the files, all of which must be regular."""
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise _NotRegularError("it is a link or not a folder, and is not read")
    found = set()
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for path in (Path(parent, name) for name in sorted([*folders, *names])):
            name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.add(name)
            elif not stat.S_ISDIR(mode):
                raise _NotRegularError(f"{_shown(name)} is not a plain file")
    return found


def _raise(error: OSError) -> None:
    raise error


def _read_manifest(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise _NotRegularError(f"{NAME} has {path.stat().st_size:,} bytes, which no run writes")
    return files.read_bytes(path, MAX_BYTES)


def _checksums(folder: Path) -> dict[str, str]:
    names = sorted(_files(folder) - {NAME}, key=lambda name: Path(name).parts)
    return {name: _digest(folder / name) for name in names}


def _digest(path: Path) -> str:
    try:
        with files.open_regular(path, limit=sys.maxsize) as file:
            return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
    except OSError as error:  # a failed read names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _shown(name: str) -> str:
    """A name from a stranger without characters that a terminal interprets."""
    return ascii(name)[1:-1]


def _format(checksums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in checksums.items())
