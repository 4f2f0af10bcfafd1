"""Checksums of the files of a checkpoint: what was written is what is read.

Orbax restores a flipped bit without a word. SHA-256 because Python has it, because it lets no
damage through that anyone will ever see, and because `sha256sum -c SHA256SUMS` can check a
checkpoint without this package; it runs in the background, beside steps that take longer.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from resnet_jax.training.workdir import sync, write_whole

NAME = "SHA256SUMS"


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
    """
    try:
        sealed = (folder / NAME).read_text(encoding="utf-8", errors="replace")
        found = _checksums(folder)
    except FileNotFoundError as error:
        return f"{os.path.relpath(error.filename, folder)} is missing"
    except OSError as error:
        name = os.path.relpath(error.filename, folder) if error.filename else "a file"
        return f"{name} cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    if _text(found) == sealed:
        return None
    # A manifest that is damaged itself names a file that is not, or none.
    expected = {line[66:]: line[:64] for line in sealed.splitlines()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong to it"
        if found[name] != expected[name]:
            return f"{name} does not match its checksum"
    return f"{NAME} has changed"


def _checksums(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256, of every file but the manifest.

    Links and devices are none of ours, and some of them never end: a ValueError names the first.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        kind = path.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise ValueError(f"{name} is not a plain file")
        if stat.S_ISREG(kind) and name != NAME:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _text(checksums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in checksums.items())
