"""The folder of a run: whose it is, and files that are whole or not there.

WORKDIR/config.json           the resolved configuration
WORKDIR/classes.json          the name of each label
WORKDIR/data.json             fingerprints of the data set
WORKDIR/checkpoints/STEP/     everything that goes on from that step (checkpoint.py)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_jax.errors import ConfigError
from resnet_jax.training.config import Config, differences, to_json


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tells in one line that a file could not be written.

    Args:
      path: Of what is written inside.

    Raises:
      ConfigError: The disk is full, read-only, gone...

    Example:
      >>> with writing(Path("config.json")):  # doctest: +ELLIPSIS
      ...     raise OSError(28, "No space left on device")
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: config.json cannot be written (No space left on device); ...
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}); mend that, and the same "
            "command goes on"
        ) from error


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, would outlive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Writes a file such that a reader, and a crash at any moment, finds the old or the new one.

    Args:
      path: The file.
      text: All that it is to hold.

    Raises:
      ConfigError: It cannot be written; the old one is still there.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_whole(Path(folder, "classes.json"), "[]")
      ...     print(*os.listdir(folder))
      classes.json
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        sync(path.parent)


class Appender:
    """A file that grows by whole records; what `write` was given has left this process.

    Args:
      path: The file.

    Raises:
      ConfigError: It cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = Appender(Path(folder, "log"))
      ...     file.write(b"one")
      ...     file.close()
      ...     print(Path(folder, "log").read_text())
      one
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            # A buffer would keep what could not be written, and fail once more on closing.
            self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Adds a record.

        Raises:
          ConfigError: The disk is full, or someone removed the file: it would take what it is given
            without a word, and nobody would ever read it.
        """
        with writing(self._path):
            if not os.fstat(self._file.fileno()).st_nlink:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            while data:  # a disk that is nearly full takes a part first, and then fails
                data = data[self._file.write(data) :]

    def close(self) -> None:
        """Closes the file."""
        with writing(self._path):
            self._file.close()


def open_workdir(workdir: str | os.PathLike[str], config: Config, data: Mapping[str, str]) -> Path:
    """Makes a workdir, or checks that the one that is there belongs to the same run.

    Args:
      workdir: Folder of the run.
      config: Its resolved configuration.
      data: Fingerprints of the data set, by what they are used for.

    Returns:
      The folder.

    Raises:
      ConfigError: It cannot be written, or holds a run with another configuration or on other
        data; nothing in it has been touched then.
    """
    workdir = Path(workdir).expanduser()
    if has_states(workdir):
        if not (workdir / "config.json").exists():
            raise ConfigError(f"--workdir={workdir} holds checkpoints without a config.json")
        if not config.checkpoint.allow_change:
            _check_same(workdir, config, data)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / ".writable").touch()
        (workdir / ".writable").unlink()
    except OSError as error:
        taken = next((x for x in (workdir, *workdir.parents) if x.is_file()), None)
        reason = f"{taken} is a file" if taken else error.strerror
        raise ConfigError(
            f"--workdir={workdir} cannot be written ({reason}); take another folder"
        ) from error
    return workdir


def _check_same(workdir: Path, config: Config, data: Mapping[str, str]) -> None:
    go_on = "take another workdir, or go on with it by --config.checkpoint.allow_change=true"
    changed = differences(config, read_json(workdir / "config.json"))
    if changed:
        raise ConfigError(
            f"--workdir={workdir} holds a run with another configuration "
            f"({'; '.join(changed)}); {go_on}"
        )
    if not (workdir / "data.json").exists():
        return
    before = read_json(workdir / "data.json")
    changed = [
        f"{use}: {before.get(use)} -> {data[use]}" for use in data if before.get(use) != data[use]
    ]
    if changed:
        raise ConfigError(
            f"--workdir={workdir}: the data set data.name = {config.data.name!r} has changed since "
            f"(fingerprints: {'; '.join(changed)}); put the old one back, {go_on}"
        )


def has_states(workdir: Path) -> bool:
    """Whether a run was ever saved here; what failed before that binds nobody.

    Args:
      workdir: Folder of the run.

    Returns:
      True where a run goes on instead of starting.

    Raises:
      ConfigError: Its "checkpoints" cannot be read.
    """
    return bool(saved_steps(workdir))


def saved_steps(workdir: Path) -> list[int]:
    """The states of a run.

    Args:
      workdir: Folder of the run.

    Returns:
      Completed steps of each, ascending. A folder of any other name, such as "007", is none.

    Raises:
      ConfigError: The folder is there and cannot be read. That is not to look like a new run, whose
        records would take the place of the old ones.

    Example:
      >>> saved_steps(Path("nowhere"))
      []
    """
    try:
        names = os.listdir(workdir / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(
            f"{workdir / 'checkpoints'} cannot be read ({error.strerror or error}); mend that, and "
            "the same command goes on"
        ) from error
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps a second process from training in the same workdir.

    Args:
      workdir: Folder of the run.

    Raises:
      ConfigError: Another process trains here.
    """
    with contextlib.ExitStack() as stack:
        with writing(workdir / ".lock"):
            file = stack.enter_context((workdir / ".lock").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however
        except BlockingIOError as error:
            raise ConfigError(
                f"--workdir={workdir}: another process is training there; wait, or take another"
            ) from error
        except OSError:  # some network file systems have no locks
            pass
        yield


def write_config(
    workdir: Path, config: Config, classes: Sequence[str], data: Mapping[str, str]
) -> None:
    """Writes config.json and what describes the data; called once the run can start.

    Args:
      workdir: Folder of the run.
      config: Its resolved configuration.
      classes: The name of each output of the network, in the order of the labels.
      data: Fingerprints, as `open_workdir` checks them.
    """
    write_whole(workdir / "classes.json", json.dumps(list(classes), indent=2) + "\n")
    write_whole(workdir / "data.json", json.dumps(dict(data), indent=2) + "\n")
    write_whole(workdir / "config.json", to_json(config))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a workdir.

    Args:
      path: The file.

    Returns:
      Its object.

    Raises:
      ConfigError: It cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it") from error
