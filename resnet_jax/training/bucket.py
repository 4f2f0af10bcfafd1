"""A second place for a run, which outlives the machine: a bucket, or whatever fsspec opens.

A bucket has no renames and its files do not grow, so a run does not live there; its states and
records are copied there instead. As on disk, the checksums of a state come last and go first: a
state that has them is complete, however a copy ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from resnet_jax.errors import ConfigError, ResNetJaxError, importing, library_errors, one_line
from resnet_jax.training import manifest
from resnet_jax.training.config import Config, differences
from resnet_jax.training.workdir import saved_steps, write_whole, writing

# What a run needs beside its states to go on as if nothing had happened.
_FILES = ("config.json", "classes.json", "data.json", "environment.json", "metrics.jsonl")
_STATES = "checkpoints"


class Bucket:
    """The copy of a workdir that checkpoint.copy_to names.

    Args:
      config: The configuration of the run.
      workdir: Its folder.

    Raises:
      ConfigError: The address cannot be used, or another run lies there.

    Example:
      >>> import tempfile
      >>> from resnet_jax.training.config import Checkpoint
      >>> config = Config(checkpoint=Checkpoint(copy_to="memory://runs/a"))
      >>> Bucket(config, Path(tempfile.gettempdir(), "a")).steps()
      []
    """

    def __init__(self, config: Config, workdir: Path) -> None:
        self.workdir = workdir
        address = config.checkpoint.copy_to
        self._name = f"checkpoint.copy_to = {address!r}"
        if re.match(r"\w+:(?!//)", address):
            raise ConfigError(f"{self._name}: write it with two slashes, as gs://BUCKET/RUN")
        with importing(self._name, ConfigError):
            from fsspec.core import url_to_fs
            from fsspec.implementations.local import LocalFileSystem

            with library_errors(lambda error: ConfigError(f"{self._name}: {one_line(error)}")):
                system, root = url_to_fs(address)  # gs:// imports gcsfs, s3:// s3fs, ...
        self._files = _Files(system)
        if isinstance(system, LocalFileSystem):
            system.auto_mkdir = True
            if Path(root).resolve() == workdir.resolve():
                raise ConfigError(f"{self._name}: is the workdir itself; take another place")
        self._root = root.rstrip("/")
        with self._reading():
            names = self._names()
            self._check_same(config, names)
        self._check_writable()

    def steps(self) -> list[int]:
        """The states that are complete there, ascending."""
        with self._reading():
            return _complete(self._names())

    def fetch(self) -> None:
        """Brings what is there into the workdir, where that is the newer of both.

        Raises:
          ConfigError: It cannot be read, or the workdir cannot be written.
        """
        newest = max(saved_steps(self.workdir), default=-1)
        with self._reading():
            names = self._names()
            wanted = [step for step in _complete(names) if step > newest]
            if not wanted:
                return
            files = {name: self._files.cat_file(self._at(name)) for name in _FILES if name in names}
        with writing(self.workdir):
            made = self.workdir / _STATES / ".unfinished"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
        for name, data in files.items():
            write_whole(self.workdir / name, data.decode("utf-8", errors="replace"))
        for step in wanted:
            self._fetch_state(step, names, made / str(step))
        with writing(self.workdir):
            for step in reversed(wanted):  # after a crash in between the newest is there
                os.rename(made / str(step), self.workdir / _STATES / str(step))

    def push(self) -> None:
        """Copies what is not there yet, and then removes states that the workdir has no more.

        Raises:
          ConfigError: It could not be done; what was whole there still is.
        """
        try:
            names = self._names()
            there = _complete(names)
            local = saved_steps(self.workdir)
            new = [step for step in local if step not in there or not self._is_same(step)]
            for step in new:
                if step in there:  # what was damaged there, and was computed again
                    self._files.rm_file(self._at(self._seal(step)))
                for path in self._files_of(step):
                    if path.name != manifest.NAME:
                        self._files.put_file(str(path), self._at(self._relative(path)))
            # Before the checksums: records past a state are dropped when it is restored, but a
            # state past its records would leave a gap.
            for name in _FILES:
                with contextlib.suppress(FileNotFoundError):
                    self._files.pipe_file(self._at(name), (self.workdir / name).read_bytes())
            for step in new:
                seal = (self.workdir / self._seal(step)).read_bytes()
                self._files.pipe_file(self._at(self._seal(step)), seal)
            self._remove(names, keep=local)
        except (_FilesError, OSError) as error:  # of the copy; of the workdir
            raise ConfigError(f"{self._name}: cannot be written ({_reason(error)})") from error

    def pusher(self, say: Callable[[str], None]) -> Callable[[], None]:
        """`push` for the background of a run, which goes on where that fails.

        Args:
          say: Takes a line for people.

        Returns:
          To be called after each save.
        """

        def push() -> None:
            try:
                self.push()
            except ConfigError as error:
                say(f"{error}; it is tried again with the next save or start")

        return push

    def _check_same(self, config: Config, names: set[str]) -> None:
        """States are removed there when newer ones come: not those of another run."""
        if not _complete(names) or "config.json" not in names:
            return
        try:
            stored = json.loads(self._files.cat_file(self._at("config.json")))
        except ValueError:
            stored = {}
        changed = differences(config, stored if isinstance(stored, dict) else {})
        if changed and not config.checkpoint.allow_change:
            raise ConfigError(
                f"{self._name}: holds a run with another configuration ({'; '.join(changed)}); "
                "take another place, or go on with it by --config.checkpoint.allow_change=true"
            )

    def _check_writable(self) -> None:
        """Better now than after the first save."""
        try:
            self._files.pipe_file(self._at(".writable"), b"")
            self._files.rm_file(self._at(".writable"))
        except _FilesError as error:
            raise ConfigError(
                f"{self._name}: cannot be written ({error}); take another place"
            ) from error

    def _seal(self, step: int) -> str:
        return f"{_STATES}/{step}/{manifest.NAME}"

    def _is_same(self, step: int) -> bool:
        here = (self.workdir / self._seal(step)).read_bytes()
        return bool(self._files.cat_file(self._at(self._seal(step))) == here)

    @contextlib.contextmanager
    def _reading(self) -> Any:
        try:
            yield
        except (_FilesError, OSError) as error:  # of the copy; of the workdir
            raise ConfigError(f"{self._name}: cannot be read ({_reason(error)})") from error

    def _names(self) -> set[str]:
        """Of the files there, relative to the run."""
        self._files.invalidate_cache()
        names = {path[len(self._root) :].lstrip("/") for path in self._files.find(self._root)}
        return {name for name in names if ".." not in PurePosixPath(name).parts}

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.workdir).as_posix()

    def _files_of(self, step: int) -> list[Path]:
        folder = self.workdir / _STATES / str(step)
        return [path for path in sorted(folder.rglob("*")) if path.is_file()]

    def _fetch_state(self, step: int, names: set[str], folder: Path) -> None:
        start = f"{_STATES}/{step}/"
        for name in sorted(name for name in names if name.startswith(start)):
            target = folder / name.removeprefix(start)
            with self._reading():
                target.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(self._at(name), str(target))

    def _remove(self, names: set[str], keep: list[int]) -> None:
        """What is no state of the workdir: the checksums first, so that no half looks whole."""
        for step in _steps(names) - {*keep}:
            if (seal := self._seal(step)) in names:
                self._files.rm_file(self._at(seal))
            self._files.rm(self._at(f"{_STATES}/{step}"), recursive=True)


def _complete(names: set[str]) -> list[int]:
    """The steps that have their checksums, ascending."""
    return sorted(step for step in _steps(names) if f"{_STATES}/{step}/{manifest.NAME}" in names)


def _steps(names: set[str]) -> set[int]:
    """The steps of which any file is there, by the names that `saved_steps` takes."""
    found = (re.match(rf"{_STATES}/(0|[1-9][0-9]*)/", name) for name in names)
    return {int(each[1]) for each in found if each}


class _FilesError(ResNetJaxError):
    """An error of a file system; the libraries of the vendors have no common class."""


class _Files:
    """A file system of fsspec's; whatever its methods raise becomes `_FilesError`."""

    def __init__(self, system: Any) -> None:
        self._system = system

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._system, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with library_errors(lambda error: _FilesError(_reason(error))):
                return method(*arguments, **options)

        return call


def _reason(error: Exception) -> str:
    if isinstance(error, _FilesError):
        return str(error)
    return f"{type(error).__name__}: {one_line(error)[:200]}"
