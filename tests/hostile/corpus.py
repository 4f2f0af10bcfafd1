"""The cases: each makes something hostile in a folder and names the commands that will read it."""

from __future__ import annotations

import os
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
      commands: Command lines that read it; {here}, {victim}, {image}, {run} (the case's copy)
        and {root} (of the checkout) are put in.
      codes: Exit codes that are right; whatever the code, nothing else may happen.
      slow: Runs with `pytest -m slow` only.
    """

    name: str
    make: Callable[[Places], object]
    commands: tuple[str, ...]
    codes: tuple[int, ...]
    slow: bool


CASES: list[Case] = []

# Special files where a plain one is expected: each would be read for ever, or fill the memory.
MAKERS = {
    "fifo": os.mkfifo,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "sparse": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**11),
}


def case(
    *commands: str, codes: tuple[int, ...] = (2,), slow: bool = False
) -> Callable[[Callable], Callable]:
    """Adds the function that makes a case, under its name."""

    def add(make: Callable[[Places], object]) -> Callable[[Places], object]:
        CASES.append(Case(make.__name__, make, commands, codes, slow))
        return make

    return add
