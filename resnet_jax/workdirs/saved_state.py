"""One saved state: its files, and how they are written, checked and read.

    STEP/default/         the arrays, as Orbax writes them
    STEP/progress.json    the step, and the sums of the next training record so far
    STEP/SHA256SUMS       checksums of both, written last

This is the only file that imports Orbax. A state is damaged if its checksums say so, or if it holds
another step than its name says. Any other error while it is read (no permission, no memory, no
device) says nothing about the state.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from resnet_jax import files, upstream
from resnet_jax.errors import RETRY, ConfigError, library_errors, one_line, reason_of
from resnet_jax.workdirs import checksums

# A pytree with a field "step", such as `TrainState`.
State = Any

upstream.silence_orbax()

_ARRAYS = "default"  # where Orbax's own CheckpointManager looks for them
_DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOENT),
    *(errno.EACCES, errno.ESTALE),
)


def write_state(folder: Path, state: State, records: dict[str, Any]) -> None:
    """Writes and seals a state, NumPy arrays in host memory, in an empty folder."""
    _write_arrays((folder / _ARRAYS).absolute(), state)
    progress = {"step": int(state.step), "records": records}
    files.atomic_write(folder / "progress.json", json.dumps(progress))
    checksums.seal(folder)


def read_progress(folder: Path) -> dict[str, Any]:
    """Reads progress.json; raises OSError or ValueError if it is not what a run writes."""
    found = files.read_json(folder / "progress.json")
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def read_arrays(folder: Path, name: str) -> dict[str, Any]:
    """Reads a state whose checksums are right, as dictionaries and lists of NumPy arrays.

    Args:
      folder: Folder of the state.
      name: The state in the words of an error message.

    Raises:
      ConfigError: The state cannot be read.
    """

    def explain(error: Exception) -> ConfigError:
        return ConfigError(
            f"{name} cannot be read ({disk_reason(error)}) though its checksums are right; {RETRY}"
        )

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter has no message
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise ConfigError(
            f"{name} cannot be read: JAX finds no device with JAX_PLATFORMS={platforms!r} "
            f"({one_line(error)[:200]})"
        ) from error
    try:
        with library_errors(explain), _checkpointer() as checkpointer:
            path = (folder / _ARRAYS).absolute()
            found = checkpointer.restore(path, args=ocp.args.StandardRestore())
            if isinstance(found, dict):
                return jax.tree.map(np.asarray, found)
    except MemoryError as error:
        raise explain(error) from error
    raise ConfigError(f"{name} is not one that a run writes")


def damage(folder: Path, step: int) -> str | None:
    """Describes the damage of a state that is stored under `step`; None if there is none.

    Raises:
      OSError, ConfigError: The state cannot be read, so its condition is unknown.
    """
    if problem := checksums.damage(folder):
        return problem
    try:
        progress = read_progress(folder)
    except (FileNotFoundError, ValueError) as error:
        return f"progress.json is not what a run writes ({one_line(error)})"
    if "step" in progress:
        held = progress["step"] if type(progress["step"]) is int else None
    else:  # an older version wrote it
        held = step_of(read_arrays(folder, f"the state in {folder}"))
    return None if held == step else wrong_step(held, step)


def wrong_step(held: int | None, step: int) -> str:
    """Describes the damage of a state that holds the step `held` instead of `step`."""
    is_step = held is not None and 0 <= held < 2**31
    return f"it holds {f'step {held}' if is_step else 'no step'}, not {step}"


def step_of(arrays: dict[str, Any]) -> int | None:
    """The completed steps that a state holds; None if it holds none."""
    step = np.asarray(arrays.get("step"))
    return int(step) if step.shape == () and step.dtype.kind in "iu" else None


def like(state: State, arrays: dict[str, Any]) -> State:
    """The arrays that were read, in the structure and with the types of a state.

    Raises:
      ValueError: They have other names or shapes; the message describes the first difference.
    """
    wanted, stored = _by_name(state), _by_name(arrays)
    for name in sorted(wanted.keys() | stored.keys()):
        if name not in stored:
            raise ValueError(f"it has no {name}")
        if name not in wanted:
            raise ValueError(f"its {ascii(name)[1:-1]} has no place here")
        if wanted[name].shape != stored[name].shape:
            raise ValueError(f"its {name} is {stored[name].shape}, not {wanted[name].shape}")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.asarray(stored[_leaf_name(path)], leaf.dtype), state
    )


def _by_name(tree: Any) -> dict[str, Any]:
    return {_leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _leaf_name(path: Any) -> str:
    """The same name for a leaf of `State` and for what Orbax reads for it."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """A checkpointer that reads and writes in this process alone, whatever the process count."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        yield checkpointer


def _write_arrays(path: Path, tree: Any) -> None:
    """Writes arrays and reads them back, so that no state is sealed that lacks one.

    Orbax writes NumPy arrays only if `jax.process_index()` is 0, and otherwise reports success.
    The arrays may be read back from the system's cache; the checksums protect those on the disk.
    """
    with _checkpointer() as checkpointer:
        checkpointer.save(path, args=ocp.args.StandardSave(tree))
        found = checkpointer.restore(path, args=ocp.args.StandardRestore(tree))
    written = jax.tree.leaves(jax.tree.map(_same_bits, tree, found))
    for (name, _), same in zip(jax.tree.leaves_with_path(tree), written, strict=True):
        if not same:
            raise OSError(f"{jax.tree_util.keystr(name)} is not on disk as it was saved")


def _same_bits(expected: np.ndarray, found: Any) -> bool:
    found = np.asarray(found)
    return (
        expected.shape == found.shape
        and expected.dtype == found.dtype
        and np.array_equal(expected.reshape(-1).view(np.uint8), found.reshape(-1).view(np.uint8))
    )


def copy_to_host(state: State) -> State:
    """A copy of a state in host memory of its own.

    On a CPU, `device_get` returns views of arrays that the next step may reuse. From an accelerator
    it returns copies, and a second copy would take longer than a step of a fast chip.
    """
    found = jax.device_get(state)
    return jax.tree.map(np.copy, found) if jax.default_backend() == "cpu" else found


def disk_reason(error: Exception) -> str:
    """The system's message about the disk, if a library's error contains one, else `reason_of`."""
    text = f"{error}"
    messages = [os.strerror(code) for code in _DISK_ERRORS if os.strerror(code) in text]
    if messages:
        return messages[0]
    return text.partition("\n")[0] if isinstance(error, OSError) else reason_of(error)


@functools.cache  # once is enough
def silence_closed_loops() -> None:
    """Suppresses tracebacks of Orbax's threads after a failed write.

    If one file of a state fails, Orbax closes its event loop while hundreds of writes are pending.
    Python would print a traceback for each of them, from threads that are not ours.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
