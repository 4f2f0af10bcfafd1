"""A copy of a run that survives the machine, in a bucket or any other place that fsspec opens.

Buckets cannot rename files or append to them, so a run cannot live there; its states and records
are copied instead. As on disk, the checksums of a state are written last and removed first: a state
that has them is complete, however a copy ended.

The copy is for the day when the workdir is damaged. So it is read before it is written, a state is
checked after it was fetched, and states and records that the workdir lacks are not removed. Files
that no push has written are neither removed nor overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from resnet_jax import files
from resnet_jax.config.schema import Config
from resnet_jax.config.serialization import differences, to_json
from resnet_jax.errors import (
    RETRY,
    ConfigError,
    importing,
    library_errors,
    one_line,
    reason_of,
    write_errors,
)
from resnet_jax.workdirs import checksums
from resnet_jax.workdirs.checkpoint import UNFINISHED, Checkpoints
from resnet_jax.workdirs.records import is_training, parse_record
from resnet_jax.workdirs.remote_files import (
    FILES,
    JSON,
    METRICS,
    SEAL,
    STATES,
    TEMPORARY,
    RemoteError,
    RemoteFiles,
    complete_steps,
    local_names,
    remove_empty,
    step_of,
    steps_of,
)
from resnet_jax.workdirs.saved_state import damage
from resnet_jax.workdirs.workdir import saved_steps

_CONFIG = "config.json"
_SECTIONS = ("model", "data", "augment", "optimizer", "schedule", "train")  # of config.json
_MAX_JSON_BYTES, _MAX_METRICS_BYTES = 64 * files.MIB, 256 * files.MIB


class RemoteCopy:
    """The copy of a workdir at the address checkpoint.copy_to.

    Args:
      config: The configuration of the run.
      workdir: Folder of the run.

    Attributes:
      fetched: What `fetch` did, as lines for the log.

    Raises:
      ConfigError: The address cannot be used, or holds another run or something else.

    Example:
      >>> import tempfile
      >>> from resnet_jax.config import Checkpoint
      >>> config = Config(checkpoint=Checkpoint(copy_to="memory://runs/a"))
      >>> RemoteCopy(config, Path(tempfile.gettempdir(), "a")).steps()
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
        self._files = RemoteFiles(system)
        self._root = root.rstrip("/")
        self._folder: Path | None = None  # of a copy on a local file system
        if isinstance(system, LocalFileSystem):
            system.auto_mkdir = True
            self._folder = Path(root)
            if Path(os.path.realpath(root)).is_relative_to(os.path.realpath(workdir)):
                raise ConfigError(
                    f"{self._name}: is the workdir itself or inside it; use another address"
                )
        with self._read_errors():
            self._check_ours(self._names())
        self._check_writable()

    def steps(self) -> list[int]:
        """Steps of the complete states in the copy, ascending."""
        with self._read_errors():
            return complete_steps(self._names())

    def fetch(self) -> None:
        """Copies intact states that the workdir lacks into it, and missing records.

        Raises:
          ConfigError: The copy cannot be read, the workdir cannot be written, or neither has an
            intact state.
        """
        checkpoints = Checkpoints(self.workdir)
        damaged = checkpoints.damaged()
        intact = sorted({*saved_steps(self.workdir)} - damaged.keys())
        with self._read_errors():
            names = self._names()
        fetched, unusable = list[int](), dict[int, str]()
        folder = self.workdir / STATES
        with self._new_folder(folder / UNFINISHED) as stage:
            for step in reversed(complete_steps(names)):
                if step not in intact:
                    if problem := self._fetch_state(step, names, stage / str(step)):
                        unusable[step] = problem
                    else:
                        fetched.append(step)
            if not intact and not fetched and (damaged or unusable):
                raise self._none_intact(damaged, unusable)
            self.fetched = [
                f"{self._name}: the state at step {step} of the copy is damaged and not used: "
                f"{problem}"
                for step, problem in unusable.items()
            ]
            here, there = max(intact, default=-1), max(fetched, default=-1)
            self.fetched += self._fetch_files(names, here, there)
            for step in fetched:  # the newest first, in case of a crash
                if step in damaged:
                    self.fetched.append(checkpoints.set_aside(step, damaged[step]))
                with write_errors(self.workdir):
                    os.rename(stage / str(step), folder / str(step))
                self.fetched.append(f"the state at step {step} is from {self._name}")

    @contextlib.contextmanager
    def _new_folder(self, parent: Path) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            with write_errors(parent):
                files.make_folder(parent.parent)
                files.make_folder(parent)
                folder = stack.enter_context(files.new_folder(parent))
            yield folder

    def push(self, discarded: int | None = None) -> None:
        """Copies new states and records, and then removes states that newer ones have replaced.

        Args:
          discarded: Step of a state to remove although it is the newest in the copy.

        Raises:
          ConfigError: The copy could not be written; states that were intact still are.
        """
        try:
            names = self._names()
            self._check_ours(names)  # another run may have started to copy there
            there = complete_steps(names)
            local = saved_steps(self.workdir)
            new = [step for step in local if step not in there or self._replaces(step, names)]
            for step in new:
                self._remove(step, names)  # an incomplete or damaged copy
                for path in self._files_of(step):
                    if path.name != checksums.NAME:
                        self._files.put_file(str(path), self._at(self._relative(path)))
            # Before the checksums: records after a state are dropped when it is restored, but a
            # state without its records would leave a gap.
            self._push_files(names, max(local, default=0))
            for step in new:
                self._write(self._seal(step), self._sealed(step))
            for step in steps_of(names) - {*local}:
                if step < max(local, default=0) or step not in there or step == discarded:
                    self._remove(step, names)
        except (RemoteError, OSError) as error:  # of the copy; of the workdir
            raise ConfigError(f"{self._name}: cannot be written ({reason_of(error)})") from error

    def pusher(self, log: Callable[[str], None]) -> Callable[..., None]:
        """`push` for `Checkpoints.after_save`: a failure is logged, and the run continues."""

        def push(discarded: int | None = None) -> None:
            try:
                self.push(discarded)
            except ConfigError as error:
                log(f"{error}; the next save or start tries again")

        return push

    # Which run the copy belongs to.

    def _check_ours(self, names: dict[str, int]) -> None:
        """Refuses an address that holds another run, because pushes remove older states."""
        states, stored = complete_steps(names), self._stored_config(names)
        allow = "or set --config.checkpoint.allow_change=true to use it anyway"
        allowed = self._config.checkpoint.allow_change
        if isinstance(stored, dict):
            changed = differences(self._config, stored) if states else []
            if changed and not allowed:
                raise ConfigError(
                    f"{self._name}: holds a run with another configuration ({'; '.join(changed)}); "
                    f"use another address, {allow}"
                )
            return
        found = sorted(name for name in names if not TEMPORARY.fullmatch(name))
        others = [name for name in found if name not in FILES and step_of(name) is None]
        if found and (others or not steps_of(names)):
            raise ConfigError(
                f"{self._name}: holds files that are not a run of resnet_jax, such as "
                f"{(others or found)[0]!a}; use another address"
            )
        if states and not allowed and not any(self._is_same(x, names) for x in states):
            raise ConfigError(
                f"{self._name}: its config.json {stored}, so it is unknown whether its states "
                f"belong to this run; restore it, use another address, {allow}"
            )

    def _stored_config(self, names: dict[str, int]) -> dict[str, Any] | str:
        """The content of the config.json in the copy, or why it is not one of a run."""
        if _CONFIG not in names:
            return "is missing"
        if names[_CONFIG] > _MAX_JSON_BYTES:
            return f"has {names[_CONFIG]:,} bytes"
        data = self._read(_CONFIG, names, _MAX_JSON_BYTES)
        try:
            stored = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            return f"cannot be read ({one_line(error)[:200]})"
        parts = [stored.get(x) for x in _SECTIONS] if isinstance(stored, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            return "is not one that a run writes"
        # A push that was interrupted leaves the checksums of the previous one.
        if differences(self._config, stored) and not self._is_sealed(_CONFIG, data, names):
            return "does not match its checksum"
        return dict(stored)

    def _is_sealed(self, name: str, data: bytes, names: dict[str, int]) -> bool:
        """Whether a file in the copy matches its checksum; older versions wrote none."""
        if SEAL not in names:
            return True
        sums = checksums.parse(self._read(SEAL, names, checksums.MAX_BYTES))
        return sums.get(name, "") in ("", hashlib.sha256(data).hexdigest())

    def _check_writable(self) -> None:
        """Fails at the start instead of after the first save."""
        try:
            if self._folder:
                self._folder.mkdir(parents=True, exist_ok=True)
                with files.new_folder(self._folder):
                    return
            trial = self._at(f".resnet_jax.{secrets.token_hex(8)}.partial")
            self._files.pipe_file(trial, b"")
            self._files.rm_file(trial)
        except (RemoteError, OSError) as error:
            raise ConfigError(
                f"{self._name}: cannot be written ({reason_of(error)}); use another address"
            ) from error

    # Files of the copy.

    def _names(self) -> dict[str, int]:
        """Size in bytes of each file of the copy, by its name relative to the run."""
        if self._folder:
            return local_names(self._folder)
        self._files.invalidate_cache()
        found = self._files.find(self._root, detail=True)
        return {
            path.removeprefix(f"{self._root}/"): info.get("size") or 0
            for path, info in found.items()
            # Some tools create an empty object for a folder.
            if info.get("size") or not (path.endswith("/") or path.strip("/") == self._root)
        }

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _seal(self, step: int) -> str:
        return f"{STATES}/{step}/{checksums.NAME}"

    def _read(self, name: str, names: dict[str, int], limit: int) -> bytes:
        if names[name] > limit:
            raise OSError(f"{name} has {names[name]:,} bytes, more than the limit of {limit:,}")
        return bytes(self._files.cat_file(self._at(name)))

    @contextlib.contextmanager
    def _read_errors(self) -> Any:
        try:
            yield
        except (RemoteError, OSError) as error:  # of the copy; of the workdir
            raise ConfigError(f"{self._name}: cannot be read ({reason_of(error)})") from error

    # Files of the workdir.

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.workdir).as_posix()

    def _files_of(self, step: int) -> list[Path]:
        folder = self.workdir / STATES / str(step)
        return [path for path in sorted(folder.rglob("*")) if path.is_file()]

    def _sealed(self, step: int) -> bytes:
        return files.read_bytes(self.workdir / self._seal(step), checksums.MAX_BYTES)

    def _is_same(self, step: int, names: dict[str, int]) -> bool:
        seal = self._seal(step)
        try:
            here = self._sealed(step)
        except OSError:
            return False
        return len(here) == names[seal] and self._read(seal, names, checksums.MAX_BYTES) == here

    def _replaces(self, step: int, names: dict[str, int]) -> bool:
        """Whether the state in the workdir is intact and differs from that in the copy."""
        folder = self.workdir / STATES / str(step)
        return not self._is_same(step, names) and checksums.damage(folder) is None

    # Fetching.

    def _fetch_state(self, step: int, names: dict[str, int], folder: Path) -> str | None:
        """Copies a state into a new folder; returns its damage, if any."""
        start, seal = f"{STATES}/{step}/", self._seal(step)
        if names[seal] > checksums.MAX_BYTES:
            return f"{checksums.NAME} has {names[seal]:,} bytes, which no run writes"
        with self._read_errors():
            sealed = self._read(seal, names, checksums.MAX_BYTES)
        expected = checksums.parse(sealed).keys() | {checksums.NAME}
        found = {name.removeprefix(start) for name in names if name.startswith(start)}
        for name in sorted(expected ^ found):
            what = "is missing" if name in expected else "does not belong to it"
            return f"{ascii(name)[1:-1]} {what}"
        for name in sorted(found):
            if step_of(start + name) != step:  # it could lead out of the workdir
                return f"{ascii(name)[1:-1]} is not a file of a state"
        for name in sorted(found):
            with write_errors(folder):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with self._read_errors():
                self._files.get_file(self._at(start + name), str(folder / name))
        with self._read_errors():
            return damage(folder, step)

    def _fetch_files(self, names: dict[str, int], here: int, there: int) -> list[str]:
        """Copies files besides the states that are missing or newer; returns lines for the log.

        `here` and `there` are the newest intact states in the workdir and in the copy.
        """
        for name in (*JSON, SEAL):
            if there > here or not os.path.lexists(self.workdir / name):
                with self._read_errors():
                    data = self._read_intact(name, names)
                if data is None and name == _CONFIG and there >= 0:
                    data = to_json(self._config).encode()
                if data is not None:  # otherwise the start writes it again
                    with write_errors(self.workdir / name):
                        files.atomic_write(self.workdir / name, data)
        return self._fetch_records(names, max(here, there, 0))

    def _read_intact(self, name: str, names: dict[str, int]) -> bytes | None:
        if name not in names or names[name] > _MAX_JSON_BYTES:
            return None
        data = self._read(name, names, _MAX_JSON_BYTES)
        try:
            if name in JSON:
                json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError):
            return None
        return data if self._is_sealed(name, data, names) else None

    def _fetch_records(self, names: dict[str, int], newest: int) -> list[str]:
        """Adds records up to step `newest` that only the copy has; returns lines for the log."""
        path = self.workdir / METRICS
        if METRICS not in names or not newest:
            return []
        with self._read_errors():
            there = self._read(METRICS, names, _MAX_METRICS_BYTES)
        try:
            here = files.read_bytes(path, _MAX_METRICS_BYTES)
        except FileNotFoundError:
            here = b""
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); {RETRY}") from error
        merged, added = _merged(here, there, newest)
        if added:
            with write_errors(path):
                files.atomic_write(path, merged)
        return [f"{added} records of metrics.jsonl are from {self._name}"] if added else []

    def _none_intact(self, here: dict[int, str], there: dict[int, str]) -> ConfigError:
        def words(damaged: dict[int, str]) -> str:
            found = [f"step {step}: {problem}" for step, problem in damaged.items()]
            return "; ".join(found) or "there is none"

        return ConfigError(
            f"no state of the run is intact, neither in {self.workdir / STATES} ({words(here)}) "
            f"nor in {self._name} ({words(there)}); restore one from elsewhere, or use another "
            "workdir and another address"
        )

    # Pushing.

    def _push_files(self, names: dict[str, int], newest: int) -> None:
        for name in FILES:
            limit = _MAX_METRICS_BYTES if name == METRICS else _MAX_JSON_BYTES
            with contextlib.suppress(FileNotFoundError):
                data = files.read_bytes(self.workdir / name, limit)
                if name == METRICS and len(data) < names.get(name, 0):  # the workdir has lost some
                    there = self._read(name, names, _MAX_METRICS_BYTES)
                    data, _ = _merged(data, there, newest)
                self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        if self._folder:  # fsspec would leave half a file if it is killed
            files.atomic_write(self._folder / name, data)
        else:
            self._files.pipe_file(self._at(name), data)

    def _remove(self, step: int, names: Collection[str]) -> None:
        """Removes a state: the checksums first, so that the rest never looks complete."""
        ours = {name for name in names if step_of(name) == step}
        seal = self._seal(step)
        for name in [*({seal} & ours), *sorted(ours - {seal})]:
            self._files.rm_file(self._at(name))
        if self._folder:
            remove_empty(self._folder / STATES / str(step))


def _merged(here: bytes, there: bytes, newest: int) -> tuple[bytes, int]:
    """The records of both up to a step, in order, and how many the workdir lacked.

    Other lines of the workdir come last; the run sets them aside when it resumes.
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
    """Identifies a record and sorts records; None if the line is not a record."""
    record = parse_record(line)
    if record is None:
        return None
    weights = str(record.get("weights", ""))
    return record["step"], not is_training(record), record["split"], weights
