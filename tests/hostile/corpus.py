"""The cases: each makes something hostile in a folder and names the commands that will read it."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple


class Places(NamedTuple):
    """Where a case works.

    Args:
      here: Empty folder for the case; the command runs in it.
      victim: Folder of somebody else, in which nothing may change.
      run: A whole workdir, to be copied.
      image: A whole image.
    """

    here: pathlib.Path
    victim: pathlib.Path
    run: pathlib.Path
    image: pathlib.Path

    def copy_of_run(self) -> pathlib.Path:
        """A workdir of the case's own."""
        return pathlib.Path(shutil.copytree(self.run, self.here / "run", symlinks=True))


class Case(NamedTuple):
    """One hostile thing.

    Args:
      make: Makes it.
      commands: Command lines that read it; {here}, {victim}, {image} and {run} (the case's copy)
        are put in.
      codes: Exit codes that are right; whatever the code, nothing else may happen.
      slow: It is not part of the default run.
    """

    name: str
    make: Callable[[Places], object]
    commands: tuple[str, ...]
    codes: tuple[int, ...]
    slow: bool


CASES: list[Case] = []


def case(
    *commands: str, codes: tuple[int, ...] = (2,), slow: bool = False
) -> Callable[[Callable], Callable]:
    """Adds the function that makes a case, under its name."""

    def add(make: Callable[[Places], object]) -> Callable[[Places], object]:
        CASES.append(Case(make.__name__, make, commands, codes, slow))
        return make

    return add
