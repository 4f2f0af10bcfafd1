"""The folder of a run: opening it, locking it, and finding the states in it.

description.py names the files that describe the run; checkpoint.py writes WORKDIR/checkpoints.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from resnet_jax import files
from resnet_jax.config.schema import Config
from resnet_jax.config.serialization import differences
from resnet_jax.errors import RETRY, ConfigError, write_errors
from resnet_jax.files import expand_user
from resnet_jax.workdirs.description import read_description, read_json

# Folders in a workdir that runs and reports write into.
_FOLDERS = (
    *("checkpoints", "tensorboard", "report", "wandb"),
    *("profile", "profile/plugins", "profile/plugins/profile"),
)


def open_workdir(workdir: str | os.PathLike[str], config: Config, data: Mapping[str, str]) -> Path:
    """Creates a workdir, or checks that an existing one belongs to the same run.

    Args:
      workdir: Folder of the run.
      config: The resolved configuration.
      data: Fingerprints of the dataset by their use, "train" and "eval".

    Raises:
      ConfigError: The folder cannot be written, or holds a run with another configuration or other
        data. Nothing in it has changed.
    """
    workdir = expand_user(workdir)
    if has_states(workdir):
        if not (workdir / "config.json").exists():
            raise ConfigError(f"--workdir={workdir} has checkpoints but no config.json")
        if not config.checkpoint.allow_change:
            _check_same_run(workdir, config, data)
    for name in _FOLDERS:
        if (workdir / name).is_symlink():
            raise ConfigError(
                f"--workdir={workdir}: its {name} is a symbolic link, which is not followed; move "
                "the folder here, or make the whole workdir a link"
            )
    if any("\ud800" <= each <= "\udfff" for each in str(workdir.absolute())):
        raise ConfigError(f"--workdir={workdir}: its name is not UTF-8, which Orbax needs")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with files.new_folder(workdir):  # tests whether it can be written
            pass
    except OSError as error:
        file = next((x for x in (workdir, *workdir.parents) if x.is_file()), None)
        reason = f"{file} is a file" if file else error.strerror
        raise ConfigError(
            f"--workdir={workdir} cannot be written ({reason}); use another folder"
        ) from error
    return workdir


def _check_same_run(workdir: Path, config: Config, data: Mapping[str, str]) -> None:
    advice = "use another workdir, or set --config.checkpoint.allow_change=true to resume anyway"
    stored = read_json(workdir / "config.json")
    changed = differences(config, stored)
    has_fingerprints = (workdir / "data.json").exists()
    # Without fingerprints, only the path of a folder shows whether it is the same.
    if not changed and not has_fingerprints:
        before = stored["data"].get("name", config.data.name)
        if before != config.data.name:
            changed = [f"data.name: {before!r} -> {config.data.name!r}"]
    if changed:
        read_description(workdir, "config.json")  # reports a damaged file as damaged
        raise ConfigError(
            f"--workdir={workdir} holds a run with another configuration "
            f"({'; '.join(changed)}); {advice}"
        )
    if not has_fingerprints:
        return
    # Evaluation images do not change the weights, and broken ones may have been repaired.
    changed = [each for each in _changed_data(workdir, data) if not each.startswith("eval:")]
    if changed:
        read_description(workdir, "data.json")
        raise ConfigError(
            f"--workdir={workdir}: the dataset data.name = {config.data.name!r} has changed since "
            f"the last start (fingerprints: {'; '.join(changed)}); restore the old data, {advice}"
        )


def _changed_data(workdir: Path, data: Mapping[str, str]) -> list[str]:
    stored = read_json(workdir / "data.json")
    return [f"{use}: {stored.get(use)} -> {x}" for use, x in data.items() if stored.get(use) != x]


def changed_evaluation_data(workdir: Path, data: Mapping[str, str]) -> list[str]:
    """A line for the log if the evaluation images have changed since the last start, else [].

    Args:
      workdir: Folder of the run, as its last start left it.
      data: Fingerprints of the dataset, as for `open_workdir`.
    """
    changed: list[str] = []
    with contextlib.suppress(ConfigError):  # data.json is missing or damaged, and is rewritten
        changed = [each for each in _changed_data(workdir, data) if each.startswith("eval:")]
    return [
        f"the images of data.eval_split have changed since the last start ({each}): its metrics "
        "may not be comparable with earlier ones"
        for each in changed
    ]


def has_states(workdir: Path) -> bool:
    """Whether a workdir holds a saved state, so that a run resumes instead of starting."""
    return bool(saved_steps(workdir))


def saved_steps(workdir: Path) -> list[int]:
    """The completed steps of each saved state, ascending; other names, such as "007", are ignored.

    Raises:
      ConfigError: The folder "checkpoints" exists and cannot be read. It must not look like a new
        run, which would replace the records.

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
            f"{workdir / 'checkpoints'} cannot be read ({error.strerror or error}); {RETRY}"
        ) from error
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in a workdir during the block.

    Raises:
      ConfigError: Another process is training there.
    """
    with contextlib.ExitStack() as stack:
        with write_errors(workdir / ".lock"):
            file = stack.enter_context(open(files.open_to_append(workdir / ".lock"), "ab"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
        except BlockingIOError as error:
            raise ConfigError(
                f"--workdir={workdir}: another process is training there; wait for it, or use "
                "another workdir"
            ) from error
        except OSError:  # some network file systems have no locks
            pass
        yield
