"""The folder of a run: whose it is, and files that are whole or not there.

WORKDIR/config.json           the resolved configuration
WORKDIR/classes.json          the name of each label
WORKDIR/data.json             fingerprints of the data set, and images of each class
WORKDIR/SHA256SUMS            checksums of these three
WORKDIR/.signature            that this user's trainer wrote config.json (ownership.py)
WORKDIR/checkpoints/STEP/     everything that goes on from that step (checkpoint.py)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax import files
from resnet_jax.config.schema import Config
from resnet_jax.config.serialization import differences, from_json, to_json, with_absolute_paths
from resnet_jax.config.validation import check
from resnet_jax.errors import ConfigError
from resnet_jax.files import MIB
from resnet_jax.limits import MAX_COUNT
from resnet_jax.workdirs import ownership

SEAL = "SHA256SUMS"
_LARGEST = 64 * MIB  # bytes of a description
_COUNTS = "class_counts"  # in data.json
# Of ImageNet-21k's classes, the names take 1 MB.
_LARGEST_NAMES, _LONGEST_NAME = 16 * MIB, 10_000
# Folders in a workdir that runs and reports write into.
_FOLDERS = (
    *("checkpoints", "tensorboard", "report", "wandb"),
    *("profile", "profile/plugins", "profile/plugins/profile"),
)


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
    with writing(path):
        files.atomic_write(path, text)


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
            # No buffer: it would keep what could not be written, and fail once more on closing.
            self._file = open(files.open_to_append(path), "ab", buffering=0)  # noqa: SIM115

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
    for name in _FOLDERS:
        if (workdir / name).is_symlink():
            raise ConfigError(
                f"--workdir={workdir}: its {name} is a symbolic link, which is not followed; move "
                "the folder here, or make the whole workdir a link"
            )
    if any("\ud800" <= each <= "\udfff" for each in str(workdir.absolute())):
        raise ConfigError(f"--workdir={workdir}: its name is not UTF-8, as Orbax needs it")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with files.new_folder(workdir):  # says at once whether it can be written
            pass
    except OSError as error:
        taken = next((x for x in (workdir, *workdir.parents) if x.is_file()), None)
        reason = f"{taken} is a file" if taken else error.strerror
        raise ConfigError(
            f"--workdir={workdir} cannot be written ({reason}); take another folder"
        ) from error
    return workdir


def _check_same(workdir: Path, config: Config, data: Mapping[str, str]) -> None:
    go_on = "take another workdir, or go on with it by --config.checkpoint.allow_change=true"
    stored = read_json(workdir / "config.json")
    changed = differences(config, stored)
    has_fingerprints = (workdir / "data.json").exists()
    # Without fingerprints only the path of a folder tells whether it is the same.
    if not changed and not has_fingerprints:
        before = stored["data"].get("name", config.data.name)
        if before != config.data.name:
            changed = [f"data.name: {before!r} -> {config.data.name!r}"]
    if changed:
        read_description(workdir, "config.json")  # damaged, rather than another's
        raise ConfigError(
            f"--workdir={workdir} holds a run with another configuration "
            f"({'; '.join(changed)}); {go_on}"
        )
    if not has_fingerprints:
        return
    # The images to evaluate change no weights, and some may have to be mended.
    changed = [each for each in _changed_data(workdir, data) if not each.startswith("eval:")]
    if changed:
        read_description(workdir, "data.json")
        raise ConfigError(
            f"--workdir={workdir}: the data set data.name = {config.data.name!r} has changed since "
            f"(fingerprints: {'; '.join(changed)}); put the old one back, {go_on}"
        )


def _changed_data(workdir: Path, data: Mapping[str, str]) -> list[str]:
    noted = read_json(workdir / "data.json")
    return [f"{use}: {noted.get(use)} -> {x}" for use, x in data.items() if noted.get(use) != x]


def changed_evaluation_data(workdir: Path, data: Mapping[str, str]) -> list[str]:
    """Tells that a run goes on with other images to evaluate.

    Args:
      workdir: Folder of the run, as its last start left it.
      data: Fingerprints of the data set, as `open_workdir` checks them.

    Returns:
      A line that says so; none where they are the same, or where nobody knows.
    """
    changed: list[str] = []
    with contextlib.suppress(ConfigError):  # no data.json, or a damaged one, which is written anew
        changed = [each for each in _changed_data(workdir, data) if each.startswith("eval:")]
    return [
        f"the images of data.eval_split have changed since the last start ({each}): its metrics "
        "may not be comparable with those before"
        for each in changed
    ]


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
            file = stack.enter_context(open(files.open_to_append(workdir / ".lock"), "ab"))
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
    workdir: Path,
    config: Config,
    classes: Sequence[str],
    data: Mapping[str, str],
    class_counts: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes config.json and what describes the data; called once the run can start.

    Args:
      workdir: Folder of the run.
      config: Its resolved configuration.
      classes: The name of each output of the network, in the order of the labels.
      data: Fingerprints, as `open_workdir` checks them.
      class_counts: Images of each class, by what they are used for as in `data`; [0] where they
        were not counted.
    """
    counted = {use: x.tolist() for use, x in (class_counts or {}).items() if x.size}
    description = {**data, **({_COUNTS: counted} if counted else {})}
    contents = {
        "classes.json": json.dumps(list(classes), indent=2) + "\n",
        "data.json": json.dumps(description) + "\n",
        "config.json": to_json(with_absolute_paths(config)),
    }
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
    contents[SEAL] = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    for name, text in contents.items():
        # On a disk that has filled up meanwhile a run goes on as long as nothing has changed.
        if not _holds(workdir / name, text.encode()):
            write_whole(workdir / name, text)
    with writing(workdir / ownership.SIGNATURE):
        ownership.sign(workdir, contents["config.json"].encode())


def _holds(path: Path, content: bytes) -> bool:
    try:
        return not path.is_symlink() and files.read_bytes(path, len(content)) == content
    except OSError:
        return False


def read_description(workdir: Path, name: str) -> bytes:
    """Reads a file that describes a run, and compares it with its checksum.

    Args:
      workdir: Folder of the run.
      name: "config.json", "classes.json" or "data.json".

    Returns:
      Its content; not compared where the workdir has no SHA256SUMS.

    Raises:
      ConfigError: It cannot be read, or is not as it was written.
    """
    path = workdir / name
    try:
        content = files.read_bytes(path, _LARGEST)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); restore it") from error
    try:
        seal = files.read_bytes(workdir / SEAL, _LARGEST).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return content
    except OSError as error:
        raise ConfigError(f"{workdir / SEAL} cannot be read ({error.strerror})") from error
    if f"{hashlib.sha256(content).hexdigest()}  {name}" not in seal.split("\n"):
        raise ConfigError(
            f"{path} does not match its checksum in {SEAL}; restore it, or delete {SEAL} to use it "
            "as it is"
        )
    return content


def read_config(workdir: Path) -> Config:
    """Reads and checks the configuration of a run.

    Args:
      workdir: Folder of the run.

    Returns:
      Its configuration.

    Raises:
      ConfigError: It is missing, damaged, or not one that a run can have.
    """
    content = read_description(workdir, "config.json")
    try:
        config = from_json(content.decode("utf-8"))
        check(config)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{workdir / 'config.json'}: {error}") from error
    return config


def read_class_names(workdir: Path) -> tuple[str, ...]:
    """Reads the name of each output of a run's network.

    Args:
      workdir: Folder of the run.

    Returns:
      The names, in the order of the labels.

    Raises:
      ConfigError: They are missing or damaged.
    """
    try:
        content = read_description(workdir, "classes.json")
        if len(content) > _LARGEST_NAMES:
            raise ValueError(f"{len(content):,} bytes, of which {_LARGEST_NAMES:,} are the most")
        names = json.loads(content.decode("utf-8"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("no list of names")
        if (longest := max(map(len, names), default=0)) > _LONGEST_NAME:
            raise ValueError(f"a name has {longest:,} characters")
    except (ValueError, RecursionError) as error:
        path = workdir / "classes.json"
        raise ConfigError(f"{path} cannot be read ({error}); restore it") from error
    return tuple(names)


def read_class_counts(workdir: Path) -> dict[str, np.ndarray]:
    """Reads how many images each class has, as far as the run counted them.

    Args:
      workdir: Folder of the run.

    Returns:
      int64 [classes] in the order of `read_class_names`, by "train" and "eval"; {} where the run
      noted none.

    Raises:
      ConfigError: What is there is damaged.
    """
    path = workdir / "data.json"
    if not path.exists():
        return {}
    content = read_description(workdir, path.name)
    try:
        stored = json.loads(content.decode("utf-8"))
        found = stored.get(_COUNTS, {}) if isinstance(stored, dict) else None
        if not isinstance(found, dict) or not all(map(_are_counts, found.values())):
            raise ValueError(f"{_COUNTS} is not what a run writes")
        if found and {len(x) for x in found.values()} != {len(read_class_names(workdir))}:
            raise ValueError(f"{_COUNTS} are those of other classes than classes.json has")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it") from error
    return {use: np.array(x, np.int64) for use, x in found.items()}


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(x) is int and 0 <= x <= MAX_COUNT for x in values)


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
        found = files.read_json(path, _LARGEST)
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read ({reason}); restore it") from error
