"""A second place for a run, which outlives the machine: a bucket, or whatever fsspec opens.

A bucket has no renames and its files do not grow, so a run does not live there; its states and
records are copied there instead. As on disk, the checksums of a state come last and go first: a
state that has them is complete, however a copy ended.

The copy is there for the day on which the workdir is damaged. So it is read before it is written,
a state is checked after it was fetched, and no state or record goes that the workdir lacks. What no
push wrote is neither removed nor overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from resnet_jax import files
from resnet_jax.config.schema import Config
from resnet_jax.config.serialization import differences, to_json
from resnet_jax.errors import ConfigError, ResNetJaxError, importing, library_errors, one_line
from resnet_jax.workdirs import checksums
from resnet_jax.workdirs.checkpoint import Checkpoints, damage
from resnet_jax.workdirs.ownership import SIGNATURE
from resnet_jax.workdirs.records import is_training, parse_record
from resnet_jax.workdirs.workdir import saved_steps, writing

# What a run needs beside its states to go on as if nothing had happened.
_CONFIG, _METRICS = "config.json", "metrics.jsonl"
_JSON = (_CONFIG, "classes.json", "data.json", "environment.json")
_SEAL = checksums.NAME  # of config.json, classes.json and data.json, beside them
_FILES = (*_JSON, _SEAL, SIGNATURE, _METRICS)
_SECTIONS = ("model", "data", "augment", "optimizer", "schedule", "train")  # of any run's config
_STATES = "checkpoints"
_PARTIAL = r"\.resnet_jax\.[0-9a-f]+\.partial"  # of a start or a push that was killed
_TRIAL = re.compile(rf"\.writable|{_PARTIAL}")
_STATE_FILE = re.compile(  # visible ASCII without backslashes
    rf"{_STATES}/(0|[1-9][0-9]{{0,17}})/"
    rf"({checksums.NAME}|progress\.json|default/[!-\[\]-~]+|{_PARTIAL})"
)
_JSON_LIMIT, _METRICS_LIMIT = 64 * files.MIB, 256 * files.MIB  # bytes


class Bucket:
    """The copy of a workdir that checkpoint.copy_to names.

    Args:
      config: The configuration of the run.
      workdir: Its folder.

    Attributes:
      fetched: What `fetch` did, in lines for people.

    Raises:
      ConfigError: The address cannot be used, or another run, or something else, lies there.

    Example:
      >>> import tempfile
      >>> from resnet_jax.config.schema import Checkpoint
      >>> config = Config(checkpoint=Checkpoint(copy_to="memory://runs/a"))
      >>> Bucket(config, Path(tempfile.gettempdir(), "a")).steps()
      []
    """

    def __init__(self, config: Config, workdir: Path) -> None:
        self.workdir = workdir
        self.fetched: list[str] = []
        self._config = config
        address = config.checkpoint.copy_to
        self._name = f"checkpoint.copy_to = {address!r}"
        if re.match(r"\w+:(?!//)", address):
            raise ConfigError(f"{self._name}: write it with two slashes, as gs://BUCKET/RUN")
        if "\0" in address:
            raise ConfigError(f"{self._name}: no address has a NUL")
        with importing(self._name, ConfigError):
            from fsspec.core import url_to_fs
            from fsspec.implementations.local import LocalFileSystem

            with library_errors(lambda error: ConfigError(f"{self._name}: {one_line(error)}")):
                system, root = url_to_fs(address)  # gs:// imports gcsfs, s3:// s3fs, ...
        self._files = _Files(system)
        self._root = root.rstrip("/")
        self._folder: Path | None = None  # of a copy on a file system
        if isinstance(system, LocalFileSystem):
            system.auto_mkdir = True
            self._folder = Path(root)
            if Path(os.path.realpath(root)).is_relative_to(os.path.realpath(workdir)):
                raise ConfigError(
                    f"{self._name}: is the workdir itself, or in it; take another place"
                )
        with self._reading():
            self._check_ours(self._names())
        self._check_writable()

    def steps(self) -> list[int]:
        """The states that are complete there, ascending."""
        with self._reading():
            return _complete(self._names())

    def fetch(self) -> None:
        """Brings what is whole there and not here into the workdir; also records that are missing.

        Raises:
          ConfigError: It cannot be read, the workdir cannot be written, or no state is whole in
            either of them.
        """
        checkpoints = Checkpoints(self.workdir)
        damaged = checkpoints.damaged()
        whole = sorted({*saved_steps(self.workdir)} - damaged.keys())
        with self._reading():
            names = self._names()
        fetched, unusable = list[int](), dict[int, str]()
        made = self.workdir / _STATES / ".unfinished"
        for step in reversed(_complete(names)):
            if step not in whole:
                if problem := self._fetch_state(step, names, made / str(step)):
                    unusable[step] = problem
                else:
                    fetched.append(step)
        if not whole and not fetched and (damaged or unusable):
            raise self._none_is_whole(damaged, unusable)
        self.fetched = [
            f"{self._name}: the state at step {step} is damaged there: {problem}; it is not taken"
            for step, problem in unusable.items()
        ]
        self.fetched += self._fetch_files(names, max(whole, default=-1), max(fetched, default=-1))
        for step in fetched:  # after a crash in between the newest is there
            if step in damaged:
                self.fetched.append(checkpoints.set_aside(step, damaged[step]))
            with writing(self.workdir):
                os.rename(made / str(step), self.workdir / _STATES / str(step))
            self.fetched.append(f"the state at step {step} is from {self._name}")

    def push(self, discarded: int | None = None) -> None:
        """Copies what is not there yet, and then removes states that newer ones have replaced.

        Args:
          discarded: Step of a state that the run has removed although it is the newest there.

        Raises:
          ConfigError: It could not be done; what was whole there still is.
        """
        try:
            names = self._names()
            self._check_ours(names)  # another run may have begun to copy there meanwhile
            there = _complete(names)
            local = saved_steps(self.workdir)
            new = [step for step in local if step not in there or self._replaces(step, names)]
            for step in new:
                self._remove(step, names)  # half a state, or one that was damaged there
                for path in self._files_of(step):
                    if path.name != checksums.NAME:
                        self._files.put_file(str(path), self._at(self._relative(path)))
            # Before the checksums: records past a state are dropped when it is restored, but a
            # state past its records would leave a gap.
            self._push_files(names, max(local, default=0))
            for step in new:
                self._write(self._seal(step), self._sealed(step))
            for step in _steps(names) - {*local}:
                if step < max(local, default=0) or step not in there or step == discarded:
                    self._remove(step, names)
        except (_FilesError, OSError) as error:  # of the copy; of the workdir
            raise ConfigError(f"{self._name}: cannot be written ({_reason(error)})") from error

    def pusher(self, log: Callable[[str], None]) -> Callable[..., None]:
        """`push` for the background of a run, which goes on where that fails.

        Args:
          log: Takes a line for people.

        Returns:
          To be called after each save, evaluation and discarded state.
        """

        def push(discarded: int | None = None) -> None:
            try:
                self.push(discarded)
            except ConfigError as error:
                log(f"{error}; it is tried again with the next save or start")

        return push

    # Whose it is.

    def _check_ours(self, names: dict[str, int]) -> None:
        """States are removed there when newer ones come: not those of another run."""
        states, stored = _complete(names), self._stored_config(names)
        go_on = "or go on with it by --config.checkpoint.allow_change=true"
        allowed = self._config.checkpoint.allow_change
        if isinstance(stored, dict):
            changed = differences(self._config, stored) if states else []
            if changed and not allowed:
                raise ConfigError(
                    f"{self._name}: holds a run with another configuration ({'; '.join(changed)}); "
                    f"take another place, {go_on}"
                )
            return
        found = sorted(name for name in names if not _TRIAL.fullmatch(name))
        others = [name for name in found if name not in _FILES and _step_of(name) is None]
        if found and (others or not _steps(names)):
            raise ConfigError(
                f"{self._name}: holds files that are not a run of resnet_jax, such as "
                f"{(others or found)[0]!a}; take another place"
            )
        if states and not allowed and not any(self._is_same(x, names) for x in states):
            raise ConfigError(
                f"{self._name}: its config.json {stored}, so nobody knows whether its states are "
                f"of this run; put it back, take another place, {go_on}"
            )

    def _stored_config(self, names: dict[str, int]) -> dict[str, Any] | str:
        """What config.json there holds; if it is none of a run, why."""
        if _CONFIG not in names:
            return "is missing"
        if names[_CONFIG] > _JSON_LIMIT:
            return f"has {names[_CONFIG]:,} bytes"
        data = self._read(_CONFIG, names, _JSON_LIMIT)
        try:
            stored = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            return f"cannot be read ({one_line(error)[:200]})"
        parts = [stored.get(x) for x in _SECTIONS] if isinstance(stored, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            return "is none that a run writes"
        # A push that was cut off leaves the checksums of the one before.
        if differences(self._config, stored) and not self._is_sealed(_CONFIG, data, names):
            return "does not match its checksum"
        return dict(stored)

    def _is_sealed(self, name: str, data: bytes, names: dict[str, int]) -> bool:
        """Whether a file there has its checksum; runs of the version before have none."""
        if _SEAL not in names:
            return True
        sums = checksums.parse(self._read(_SEAL, names, checksums.LIMIT))
        return sums.get(name, "") in ("", hashlib.sha256(data).hexdigest())

    def _check_writable(self) -> None:
        """Better now than after the first save."""
        try:
            if self._folder:
                self._folder.mkdir(parents=True, exist_ok=True)
                with files.new_folder(self._folder):
                    return
            trial = self._at(f".resnet_jax.{secrets.token_hex(8)}.partial")
            self._files.pipe_file(trial, b"")
            self._files.rm_file(trial)
        except (_FilesError, OSError) as error:
            raise ConfigError(
                f"{self._name}: cannot be written ({_reason(error)}); take another place"
            ) from error

    # What is there.

    def _names(self) -> dict[str, int]:
        """Bytes of each file there, by its name relative to the run."""
        if self._folder:
            return _local_names(self._folder)
        self._files.invalidate_cache()
        found = self._files.find(self._root, detail=True)
        return {
            path.removeprefix(f"{self._root}/"): info.get("size") or 0
            for path, info in found.items()
            # Some tools make an empty object for a folder.
            if info.get("size") or not (path.endswith("/") or path.strip("/") == self._root)
        }

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _seal(self, step: int) -> str:
        return f"{_STATES}/{step}/{checksums.NAME}"

    def _read(self, name: str, names: dict[str, int], limit: int) -> bytes:
        if names[name] > limit:
            raise OSError(f"{name} has {names[name]:,} bytes, more than the limit of {limit:,}")
        return bytes(self._files.cat_file(self._at(name)))

    @contextlib.contextmanager
    def _reading(self) -> Any:
        try:
            yield
        except (_FilesError, OSError) as error:  # of the copy; of the workdir
            raise ConfigError(f"{self._name}: cannot be read ({_reason(error)})") from error

    # What is here.

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.workdir).as_posix()

    def _files_of(self, step: int) -> list[Path]:
        folder = self.workdir / _STATES / str(step)
        return [path for path in sorted(folder.rglob("*")) if path.is_file()]

    def _sealed(self, step: int) -> bytes:
        return files.read_bytes(self.workdir / self._seal(step), checksums.LIMIT)

    def _is_same(self, step: int, names: dict[str, int]) -> bool:
        seal = self._seal(step)
        try:
            here = self._sealed(step)
        except OSError:
            return False
        return len(here) == names[seal] and self._read(seal, names, checksums.LIMIT) == here

    def _replaces(self, step: int, names: dict[str, int]) -> bool:
        """Whether the state here is another one than there, and whole."""
        folder = self.workdir / _STATES / str(step)
        return not self._is_same(step, names) and checksums.damage(folder) is None

    # From there.

    def _fetch_state(self, step: int, names: dict[str, int], folder: Path) -> str | None:
        """Copies a state into a new folder; returns what is wrong with it."""
        start, seal = f"{_STATES}/{step}/", self._seal(step)
        if names[seal] > checksums.LIMIT:
            return f"{checksums.NAME} has {names[seal]:,} bytes, which no run writes"
        with self._reading():
            sealed = self._read(seal, names, checksums.LIMIT)
        expected = checksums.parse(sealed).keys() | {checksums.NAME}
        found = {name.removeprefix(start) for name in names if name.startswith(start)}
        for name in sorted(expected ^ found):
            what = "is missing" if name in expected else "does not belong to it"
            return f"{ascii(name)[1:-1]} {what}"
        for name in sorted(found):
            if _step_of(start + name) != step:  # it could lead out of the workdir
                return f"{ascii(name)[1:-1]} is no file of a state"
        with writing(folder):
            for each in (folder.parents[1], folder.parent, folder):
                files.make_folder(each)
        for name in sorted(found):
            with writing(folder):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with self._reading():
                self._files.get_file(self._at(start + name), str(folder / name))
        with self._reading():
            return damage(folder, step)

    def _fetch_files(self, names: dict[str, int], here: int, there: int) -> list[str]:
        """What lies beside the states, whose newest are given, where it is newer or missing."""
        for name in (*_JSON, _SEAL):
            if there > here or not os.path.lexists(self.workdir / name):
                with self._reading():
                    data = self._whole(name, names)
                if data is None and name == _CONFIG and there >= 0:
                    data = to_json(self._config).encode()
                if data is not None:  # if it is damaged there, the start writes it anew
                    with writing(self.workdir / name):
                        files.atomic_write(self.workdir / name, data)
        return self._fetch_records(names, max(here, there, 0))

    def _whole(self, name: str, names: dict[str, int]) -> bytes | None:
        if name not in names or names[name] > _JSON_LIMIT:
            return None
        data = self._read(name, names, _JSON_LIMIT)
        try:
            if name in _JSON:
                json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError):
            return None
        return data if self._is_sealed(name, data, names) else None

    def _fetch_records(self, names: dict[str, int], newest: int) -> list[str]:
        """The records up to a step that are there and not here."""
        path = self.workdir / _METRICS
        if _METRICS not in names or not newest:
            return []
        with self._reading():
            there = self._read(_METRICS, names, _METRICS_LIMIT)
        try:
            here = files.read_bytes(path, _METRICS_LIMIT)
        except FileNotFoundError:
            here = b""
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}); mend that, and the same command goes on"
            ) from error
        merged, added = _merged(here, there, newest)
        if added:
            with writing(path):
                files.atomic_write(path, merged)
        return [f"{added} records of metrics.jsonl are from {self._name}"] if added else []

    def _none_is_whole(self, here: dict[int, str], there: dict[int, str]) -> ConfigError:
        def words(damaged: dict[int, str]) -> str:
            found = [f"step {step}: {problem}" for step, problem in damaged.items()]
            return "; ".join(found) or "there is none"

        return ConfigError(
            f"no state of the run is whole, neither in {self.workdir / _STATES} ({words(here)}) "
            f"nor in {self._name} ({words(there)}); put a copy of one back, or take another "
            "workdir and another place"
        )

    # To there.

    def _push_files(self, names: dict[str, int], newest: int) -> None:
        for name in _FILES:
            limit = _METRICS_LIMIT if name == _METRICS else _JSON_LIMIT
            with contextlib.suppress(FileNotFoundError):
                data = files.read_bytes(self.workdir / name, limit)
                if name == _METRICS and len(data) < names.get(name, 0):  # some were lost here
                    there = self._read(name, names, _METRICS_LIMIT)
                    data, _ = _merged(data, there, newest)
                self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        if self._folder:  # where fsspec would leave half a file if it is killed
            files.atomic_write(self._folder / name, data)
        else:
            self._files.pipe_file(self._at(name), data)

    def _remove(self, step: int, names: Collection[str]) -> None:
        """What a push wrote of a state: the checksums first, so that no half looks whole."""
        ours = {name for name in names if _step_of(name) == step}
        seal = self._seal(step)
        for name in [*({seal} & ours), *sorted(ours - {seal})]:
            self._files.rm_file(self._at(name))
        if self._folder:
            _remove_empty(self._folder / _STATES / str(step))


def _complete(names: Collection[str]) -> list[int]:
    """The steps that have their checksums, ascending."""
    return sorted(step for step in _steps(names) if f"{_STATES}/{step}/{checksums.NAME}" in names)


def _steps(names: Collection[str]) -> set[int]:
    """The steps of which any file is there, by the names that `saved_steps` takes."""
    return {step for name in names if (step := _step_of(name)) is not None}


def _step_of(name: str) -> int | None:
    """The step whose state a file belongs to; None: it is none that a push writes."""
    found = _STATE_FILE.fullmatch(name)
    is_plain = all(part not in ("", ".", "..") and len(part) < 256 for part in name.split("/"))
    return int(found[1]) if found and is_plain else None


def _local_names(folder: Path) -> dict[str, int]:
    """Bytes of the files of a run in a folder; a folder of somebody else's is named and not read.

    Raises:
      OSError: The folder cannot be read, or what has the name of a file of the run is a link or no
        plain file. What is written there would go elsewhere.
    """
    found = {}
    for path in _entries(folder):
        mode = path.lstat().st_mode
        if path.name == _STATES and stat.S_ISDIR(mode):
            for parent, _, _ in os.walk(path, onerror=_raise):
                for each in _entries(Path(parent)):
                    if not stat.S_ISDIR(each.lstat().st_mode):
                        found[each.relative_to(folder).as_posix()] = _size(each)
        elif path.name == _STATES or path.name in _FILES or _TRIAL.fullmatch(path.name):
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
        raise OSError(f"{path} is a link or no plain file; take another place")
    return found.st_size


def _raise(error: OSError) -> None:
    raise error


def _remove_empty(folder: Path) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(parent)


def _merged(here: bytes, there: bytes, newest: int) -> tuple[bytes, int]:
    """The records of both up to a step, in their order, and how many were missing here.

    Lines here that are no records come last; who goes on with the run sets them aside.
    """
    lines = here.splitlines(keepends=True)
    known = {key: line for line in lines if (key := _key(line))}
    missing = {
        key: line
        for line in there.splitlines(keepends=True)
        if (key := _key(line)) and key[0] <= newest and key not in known
    }
    if not missing:
        return here, 0
    both = {**known, **missing}
    others = [line for line in lines if not _key(line) and line.endswith(b"\n")]
    return b"".join([*(both[key] for key in sorted(both)), *others]), len(missing)


def _key(line: bytes) -> tuple[int, bool, str, str] | None:
    """What tells a record from others, in a run's order of them; None: it is no record."""
    record = parse_record(line)
    if record is None:
        return None
    weights = str(record.get("weights", ""))
    return record["step"], not is_training(record), record["split"], weights


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
