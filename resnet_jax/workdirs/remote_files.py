"""The files of a run's copy: their names, and access to local folders and fsspec file systems."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from resnet_jax.errors import ResNetJaxError, library_errors, reason_of
from resnet_jax.workdirs import checksums
from resnet_jax.workdirs.signature import SIGNATURE

# What a run needs besides its states to resume as if nothing had happened.
METRICS = "metrics.jsonl"
JSON = ("config.json", "classes.json", "data.json", "environment.json")
SEAL = checksums.NAME  # in the workdir: of config.json, classes.json and data.json
FILES = (*JSON, SEAL, SIGNATURE, METRICS)
STATES = "checkpoints"
_PARTIAL = r"\.resnet_jax\.[0-9a-f]+\.partial"  # left by a start or push that was killed
TEMPORARY = re.compile(rf"\.writable|{_PARTIAL}")
_STATE_FILE = re.compile(  # visible ASCII without backslashes
    rf"{STATES}/(0|[1-9][0-9]{{0,17}})/"
    rf"({checksums.NAME}|progress\.json|default/[!-\[\]-~]+|{_PARTIAL})"
)


class RemoteError(ResNetJaxError):
    """An error of a remote file system; the vendors' libraries have no common class."""


class RemoteFiles:
    """A file system of fsspec whose methods raise `RemoteError` instead of any other error."""

    def __init__(self, system: Any) -> None:
        self._system = system

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._system, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with library_errors(lambda error: RemoteError(reason_of(error))):
                return method(*arguments, **options)

        return call


def complete_steps(names: Collection[str]) -> list[int]:
    """The steps with checksums, ascending."""
    return sorted(step for step in steps_of(names) if f"{STATES}/{step}/{checksums.NAME}" in names)


def steps_of(names: Collection[str]) -> set[int]:
    """The steps of which any file exists."""
    return {step for name in names if (step := step_of(name)) is not None}


def step_of(name: str) -> int | None:
    """The step of the state that a file belongs to; None if no push writes such a file."""
    found = _STATE_FILE.fullmatch(name)
    is_plain = all(part not in ("", ".", "..") and len(part) < 256 for part in name.split("/"))
    return int(found[1]) if found and is_plain else None


def local_names(folder: Path) -> dict[str, int]:
    """Sizes in bytes of the files of a run in a folder; other files are listed with size 0.

    Raises:
      OSError: The folder cannot be read, or a file of the run is a link or not regular, so that
        writing it would change something else.
    """
    found = {}
    for path in _entries(folder):
        mode = path.lstat().st_mode
        if path.name == STATES and stat.S_ISDIR(mode):
            for parent, _, _ in os.walk(path, onerror=_raise):
                for each in _entries(Path(parent)):
                    if not stat.S_ISDIR(each.lstat().st_mode):
                        found[each.relative_to(folder).as_posix()] = _size(each)
        elif path.name == STATES or path.name in FILES or TEMPORARY.fullmatch(path.name):
            found[path.name] = 0 if stat.S_ISDIR(mode) else _size(path)
        else:
            found[f"{path.name}/" if stat.S_ISDIR(mode) else path.name] = 0
    return found


def _entries(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except FileNotFoundError:
        return []


def _size(path: Path) -> int:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is a link or not a plain file; use another address")
    return found.st_size


def _raise(error: OSError) -> None:
    raise error


def remove_empty(folder: Path) -> None:
    """Removes the empty folders in a folder, and itself if it is empty."""
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(parent)
