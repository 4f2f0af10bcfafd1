"""The states of a run on disk: written by Orbax, sealed by checksums, named when complete.

    checkpoints/STEP/default/         the state, as Orbax writes it
    checkpoints/STEP/progress.json    its step, and what the next training record has so far
    checkpoints/STEP/SHA256SUMS       of both, written last
    checkpoints/STEP.damaged/         a state that was not as it was written, or of another step
    checkpoints/.unfinished/          what is being written or removed

A state is made in .unfinished and gets its name in one rename, so that a STEP is complete or not
there; an older one goes only after that. Orbax's manager would remove it before our checksums
exist, and ranks a NaN as the best. This is the only file that imports orbax.

A state is saved before it is evaluated, so that a failed evaluation does not lose it. Its metrics
are the evaluation records of its step in metrics.jsonl (evaluations.py). The versions before this
one wrote them to progress.json, where they are still found.

A state is damaged if its checksums say so, or if it holds another step than its name says. Any
other error while it is read (no permission, no memory, no device) says nothing about the state.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from resnet_jax import files, upstream
from resnet_jax.errors import ConfigError, library_errors, one_line
from resnet_jax.files import sync
from resnet_jax.terminal import visible
from resnet_jax.workdirs import checksums
from resnet_jax.workdirs.evaluations import Evaluations
from resnet_jax.workdirs.workdir import (
    has_states,
    read_json,
    saved_steps,
    write_whole,
    writing,
)

# A pytree with a field "step", such as `TrainState`.
State = Any

upstream.silence_orbax()

_STATE = "default"  # where Orbax's own CheckpointManager looks for it
_DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOENT),
    *(errno.EACCES, errno.ESTALE),
)


class Checkpoints:
    """The states of a run: the newest ones, and the best ones.

    Args:
      workdir: Folder of the run; "checkpoints" in it is made when the first state is saved.
      keep: Newest states kept. One that is being evaluated does not count: if it turns out to have
        diverged, the run goes on from those before it.
      keep_best: Best states kept beside them.
      evaluations: Of the run; None: what its files say.
      read_only: Only look: another process may be writing here.

    Raises:
      ConfigError: "checkpoints", or what is being written in it, is a link, which is not followed.

    Attributes:
      after_save: Called in the background when a state or its evaluation is on disk and older
        states are gone; with the step of a state that was discarded.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        keep: int = 1,
        keep_best: int = 1,
        evaluations: Evaluations | None = None,
        read_only: bool = False,
    ) -> None:
        self.workdir = Path(workdir).expanduser()
        self._folder = self.workdir / "checkpoints"
        self._unfinished = self._folder / ".unfinished"
        self._keep, self._keep_best = keep, keep_best
        self._known = evaluations
        self._in_evaluation: int | None = None  # step of the state that is being evaluated
        self._whole: set[int] = set()  # steps whose checksums were right in this process
        self.after_save: Callable[..., None] = lambda discarded=None: None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._check_own(self._folder)
        if not read_only:
            shutil.rmtree(self._unfinished, ignore_errors=True)  # of a process that was killed
            self._check_own(self._unfinished)

    @property
    def latest(self) -> int | None:
        """Completed steps of the newest state, once it is on disk; None: there is none."""
        self.wait()
        return max(self._steps(), default=None)

    @property
    def best(self) -> int | None:
        """Completed steps of the best state; None: none was evaluated."""
        self.wait()
        return next(iter(self._best(1)), None)

    def save(self, state: State, records: dict[str, Any], to_evaluate: bool = False) -> None:
        """Writes a state in the background.

        Args:
          state: May be donated to the next step once this returns: it is copied to the host.
          records: What `MetricAccumulator.carried` gives.
          to_evaluate: It is going to be evaluated: `evaluated` or `discard` follows.

        Raises:
          ConfigError: The state before this one could not be written.
        """
        self.wait()  # beside this copy, writing holds the one that is read back
        step = int(state.step)
        if to_evaluate:
            self._in_evaluation = step
        if step not in self._steps():
            progress = {"step": step, "records": records}
            self._pending.append(self._writer.submit(self._write, step, _copy(state), progress))

    def evaluated(self) -> None:
        """Says that the newest state has been evaluated: its records are written."""
        self._in_evaluation = None
        self._pending.append(self._writer.submit(self._after_evaluation))

    def discard(self, step: int) -> None:
        """Removes a state whose evaluation shows that the run has diverged.

        Raises:
          ConfigError: It could not be written in the first place, or cannot be removed.
        """
        self.wait()
        self._in_evaluation = None
        with writing(self._folder / str(step)):
            self._remove(step)
        self.after_save(discarded=step)

    def check(self) -> None:
        """Tells, without waiting, whether a state could not be written.

        Raises:
          ConfigError: So it is.
        """
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          ConfigError: A state could not be written.
        """
        pending, self._pending = self._pending, []
        for each in pending:
            each.result()

    def close(self) -> None:
        """`wait`, and no more states."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def damaged(self) -> dict[int, str]:
        """What is wrong with the states that are not as they were written, by step.

        Raises:
          ConfigError: One cannot be read, so nobody knows.
        """
        problems = {step: self._damage(step) for step in self._steps()}
        return {step: problem for step, problem in problems.items() if problem}

    def set_damaged_aside(self) -> list[str]:
        """Renames the states that are not as they were written, so that the others are used.

        Returns:
          A line for each.

        Raises:
          ConfigError: Not one is whole; none was renamed, or the next start would be a new run.
            Or one cannot be read, or renamed.
        """
        damaged = self.damaged()
        if damaged and len(damaged) == len(self._steps()):
            raise self._none_is_whole(damaged)
        return [self.set_aside(step, problem) for step, problem in damaged.items()]

    def set_aside(self, step: int, problem: str) -> str:
        """Renames a damaged state.

        Args:
          step: Which.
          problem: What is wrong with it.

        Returns:
          A line that says so.

        Raises:
          ConfigError: It cannot be renamed.
        """
        aside = self._folder / f"{step}.damaged"
        for number in itertools.count(1):
            if not os.path.lexists(aside):
                break
            aside = self._folder / f"{step}.damaged.{number}"
        found = f"the state at step {step} is damaged: {problem}; it"
        try:
            os.rename(self._folder / str(step), aside)
        except OSError as error:
            raise ConfigError(
                f"--workdir={self.workdir}: {found} cannot be renamed to {aside} "
                f"({error.strerror or error}); move it away, and the same command goes on"
            ) from error
        return f"{found} is now {aside}"

    def restore(self, like: State, step: int | None = None) -> State:
        """Reads a state.

        Args:
          like: A state of the same model and optimizer.
          step: Which; None: the newest.

        Returns:
          Its NumPy arrays.

        Raises:
          ConfigError: It is damaged, cannot be read, or is of another model or optimizer.
        """
        step = self._or_latest(step)
        self._check(step)
        found = self._read(step)
        if problem := _difference(like, found):
            raise ConfigError(
                f"{self._name(step)} is of another model or optimizer ({problem}); take another "
                "workdir"
            )
        arrays = _by_name(found)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: np.asarray(arrays[_leaf_name(path)], leaf.dtype), like
        )

    def records(self, step: int | None = None) -> dict[str, Any]:
        """What `save` was given of the records.

        Args:
          step: Which state's; None: the newest one's.

        Returns:
          What `MetricAccumulator` takes.
        """
        step = self._or_latest(step)
        self._check(step)
        found = self._progress(step).get("records")
        if not isinstance(found, dict):
            raise ConfigError(f"{self._folder}/{step}/progress.json has no records; restore it")
        return found

    def read_whole(self, best: bool) -> dict[str, Any]:
        """The first state that is whole; what is damaged stays where it is.

        Args:
          best: Begin with the best instead of the newest.

        Returns:
          The state as a dictionary of NumPy arrays.

        Raises:
          ConfigError: None is whole, or one cannot be read.
        """
        damaged: dict[int, str] = {}
        rank = self._ranked if best else self._newest
        while steps := [step for step in rank() if step not in damaged]:
            step = steps[0]
            try:
                self._check(step)
                return self._read(step)
            except ConfigError as error:
                # A run that trains here removes a state once there is a newer one: look again.
                if not os.path.lexists(self._folder / str(step)):
                    continue
                if not isinstance(error, _DamagedError):
                    raise
                damaged[step] = error.problem
                logging.getLogger(__name__).warning(
                    "%s: the state at step %d is damaged: %s; taking another",
                    *(visible(self.workdir), step, visible(error.problem)),
                )
        raise self._none_is_whole(damaged)

    # What is on the disk.

    def _steps(self) -> list[int]:
        return saved_steps(self.workdir)

    def _newest(self) -> list[int]:
        return self._steps()[::-1]

    def _ranked(self) -> list[int]:
        """The best first; those without an evaluation last, the newest of them first."""
        ranks = {step: (self._score(step), step) for step in self._steps()}
        return sorted(ranks, key=ranks.__getitem__, reverse=True)

    def _best(self, most: int) -> list[int]:
        """The best ones of those that were evaluated."""
        return [step for step in self._ranked()[:most] if self._score(step) > -math.inf]

    def _score(self, step: int) -> float:
        if self._known is None:
            self._known = Evaluations.of_workdir(self.workdir)
        stored = None
        if self._known.missing(step):
            with contextlib.suppress(ConfigError):  # damaged, which its checksums will tell
                stored = self._progress(step).get("metrics")
        return self._known.score(step, stored)

    def _progress(self, step: int) -> dict[str, Any]:
        path = self._folder / str(step) / "progress.json"
        try:
            return _read_progress(path.parent)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({one_line(error)}); restore it") from error

    def _or_latest(self, step: int | None) -> int:
        step = self.latest if step is None else step
        if step is None:
            raise ConfigError(f"{self.workdir} has no checkpoint yet")
        return step

    def _check_own(self, folder: Path) -> None:
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                files.check_own_folder(folder)
        except OSError as error:
            raise ConfigError(
                f"--workdir={self.workdir}: {folder} is {error.strerror}; put a folder there"
            ) from error

    def _name(self, step: int) -> str:
        return f"--workdir={self.workdir}: its state at step {step}"

    def _damage(self, step: int) -> str | None:
        try:
            problem = damage(self._folder / str(step), step)
        except OSError as error:
            raise ConfigError(
                f"{self._name(step)} cannot be read ({error.filename}: {error.strerror}); mend "
                "that, and the same command goes on"
            ) from error
        if problem is None:
            self._whole.add(step)
        return problem

    def _check(self, step: int) -> None:
        if step not in self._whole and (problem := self._damage(step)):
            raise _DamagedError(self._name(step), problem)

    def _none_is_whole(self, damaged: dict[int, str]) -> ConfigError:
        folder = self._folder
        if not damaged:
            return ConfigError(f"{self.workdir} has no checkpoint yet")
        found = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
        return ConfigError(
            f"no state in {folder} is whole ({found}); put a copy of one back, or move that folder "
            "away to begin anew"
        )

    # Orbax.

    def _read(self, step: int) -> dict[str, Any]:
        found = _read_arrays(self._folder / str(step), self._name(step))
        if (held := _step_in(found)) != step:  # the sums are right: a stranger made them
            raise _DamagedError(self._name(step), _holds(held, step))
        return found

    def _write(self, step: int, tree: Any, progress: dict[str, Any]) -> None:
        """In the background: makes a state, gives it its name, and removes what is too many."""
        unfinished, final = self._unfinished / str(step), self._folder / str(step)
        try:
            files.make_folder(self._folder)  # but not the workdir, if someone removed it
            files.make_folder(self._unfinished)
            unfinished.mkdir()
            _write_arrays((unfinished / _STATE).absolute(), tree)
            write_whole(unfinished / "progress.json", json.dumps(progress))
            checksums.seal(unfinished)
            with contextlib.suppress(FileNotFoundError):
                sync(self.workdir / "metrics.jsonl")  # the records of its steps, before the state
            os.rename(unfinished, final)
            sync(self._folder)
        except Exception as error:
            _hush_orphans()
            shutil.rmtree(unfinished, ignore_errors=True)
            before = max(self._steps(), default=None)
            last = f"the last good one is at step {before}" if before else "there is none before it"
            raise ConfigError(
                f"--workdir={self.workdir}: the state at step {step} could not be written "
                f"({_reason(error)}); {last}. Mend that, and the same command goes on"
            ) from error
        self._whole.add(step)
        self._remove_old()
        self.after_save()

    def _after_evaluation(self) -> None:
        """In the background: removes what the newest state has outdone."""
        metrics = self.workdir / "metrics.jsonl"
        with writing(metrics), contextlib.suppress(FileNotFoundError):
            sync(metrics)  # the records that say so, before anything goes
        self._remove_old()
        self.after_save()

    def _remove_old(self) -> None:
        others = [step for step in self._steps() if step != self._in_evaluation]
        best = self._best(self._keep_best)
        for step in others[: -self._keep]:
            if step not in best:
                # What cannot go now is tried again later, and what is not as a run wrote it stays.
                with contextlib.suppress(OSError):
                    if step in self._whole or not checksums.damage(self._folder / str(step)):
                        self._remove(step)

    def _remove(self, step: int) -> None:
        """Half a state must not look like one."""
        files.make_folder(self._unfinished)
        os.rename(self._folder / str(step), self._unfinished / f"{step}.old")
        shutil.rmtree(self._unfinished / f"{step}.old")


class _DamagedError(ConfigError):
    """What is wrong with one state, where that is asked for."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} is damaged: {problem}; put a copy of it back")
        self.problem = problem


def damage(folder: Path, step: int) -> str | None:
    """What is wrong with a state.

    Args:
      folder: Of the state.
      step: Completed steps that it should hold.

    Returns:
      In words; None: it is as it was written.

    Raises:
      OSError, ConfigError: It cannot be read, so nobody knows.
    """
    if problem := checksums.damage(folder):
        return problem
    try:
        progress = _read_progress(folder)
    except (FileNotFoundError, ValueError) as error:
        return f"progress.json is not as a run writes it ({one_line(error)})"
    if "step" in progress:
        held = progress["step"] if type(progress["step"]) is int else None
    else:  # a version before this one wrote it
        held = _step_in(_read_arrays(folder, f"the state in {folder}"))
    return None if held == step else _holds(held, step)


def _holds(held: int | None, step: int) -> str:
    is_step = held is not None and 0 <= held < 2**31
    return f"it holds {f'step {held}' if is_step else 'no step'}, not {step}"


def _step_in(state: dict[str, Any]) -> int | None:
    step = np.asarray(state.get("step"))
    return int(step) if step.shape == () and step.dtype.kind in "iu" else None


def _read_progress(folder: Path) -> dict[str, Any]:
    found = files.read_json(folder / "progress.json")
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _read_arrays(folder: Path, name: str) -> dict[str, Any]:
    """A state whose checksums are right, as dictionaries and lists of NumPy arrays.

    Raises:
      ConfigError: It cannot be read. What Orbax raises has no common class.
    """

    def explain(error: Exception) -> ConfigError:
        return ConfigError(
            f"{name} cannot be read ({_reason(error)}) though its checksums are right; mend that, "
            "and the same command goes on"
        )

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter says nothing
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise ConfigError(
            f"{name} cannot be read: JAX finds no device with JAX_PLATFORMS={platforms!r} "
            f"({one_line(error)[:200]})"
        ) from error
    try:
        with library_errors(explain), _orbax() as checkpointer:
            path = (folder / _STATE).absolute()
            found = checkpointer.restore(path, args=ocp.args.StandardRestore())
            if isinstance(found, dict):
                return jax.tree.map(np.asarray, found)
    except MemoryError as error:
        raise explain(error) from error
    raise ConfigError(f"{name} is none that a run writes")


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a state; as Orbax reads it, or as `State`."""
    return {_leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _leaf_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _difference(like: State, found: dict[str, Any]) -> str:
    """The first array that one of both lacks, or that has another shape; "" where there is none."""
    wanted, stored = _by_name(like), _by_name(found)
    for name in sorted(wanted.keys() | stored.keys()):
        if name not in stored:
            return f"it has no {name}"
        if name not in wanted:
            return f"its {ascii(name)[1:-1]} has no place here"
        if wanted[name].shape != stored[name].shape:
            return f"its {name} is {stored[name].shape}, not {wanted[name].shape}"
    return ""


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Reads and writes for this process alone, however many others there are."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        yield checkpointer


def _write_arrays(path: Path, tree: Any) -> None:
    """Writes a state and reads it back, so that no state is sealed that lacks an array.

    Orbax writes NumPy arrays only where `jax.process_index()` is 0, and elsewhere reports success.
    What is read back may come from the system's cache; the checksums are for the disk.
    """
    with _orbax() as checkpointer:
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


@functools.cache  # once is enough
def _hush_orphans() -> None:
    """Where one file of a state fails Orbax closes its event loop, with hundreds still to come.

    Python would print a traceback for each of them, from threads that are not ours.
    """
    tell = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    sys.unraisablehook = hook


def _copy(state: State) -> State:
    """On the host, in memory of its own: a CPU's arrays would be views of what is donated.

    What comes from an accelerator is a copy already; NumPy does not own that, so it cannot tell.
    The loop waits here, and a second copy takes longer than a step of a fast chip.
    """
    found = jax.device_get(state)
    return jax.tree.map(np.copy, found) if jax.default_backend() == "cpu" else found


def _reason(error: Exception) -> str:
    """Why a state was not read or written; the error itself where it is none of the disk's."""
    first_line = f"{error}".partition("\n")[0][:200]
    named = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return _disk_words(error) or named


def _disk_words(error: Exception) -> str:
    """The disk's own words, out of whatever a library made of them; "" where there are none."""
    text = f"{error}"
    words = [os.strerror(code) for code in _DISK_ERRORS if os.strerror(code) in text]
    return words[0] if words else text.partition("\n")[0] if isinstance(error, OSError) else ""


class Stored(NamedTuple):
    """A network's name, its variables, and the completed steps of the state they are from."""

    name: str
    variables: dict[str, Any]
    step: int


def load_variables(
    workdir: str | os.PathLike[str], *, best: bool = True, ema: bool = True
) -> Stored:
    """The variables of a trained network.

    Args:
      workdir: Folder of the run.
      best: Those of the best state by the run's checkpoint.best_metric; otherwise, or without an
        evaluation, the newest.
      ema: Their moving average, where the run has one.

    Returns:
      The model's name, {"params", "batch_stats"} of NumPy arrays, and the state's steps.

    Raises:
      ConfigError: The folder holds no run, none with a checkpoint, or only damaged ones, or what it
        holds is not what a run writes.
    """
    workdir = Path(workdir).expanduser()
    if not (workdir / "config.json").exists():
        raise ConfigError(f"{workdir} is not a workdir: it has no config.json")
    config = read_json(workdir / "config.json")
    if not has_states(workdir):
        raise ConfigError(f"{workdir} has no checkpoint yet")
    state = Checkpoints(workdir, read_only=True).read_whole(best)
    try:
        found = state["ema"] if ema and state.get("ema") else state
        variables = {name: found[name] for name in ("params", "batch_stats") if found.get(name)}
        variables = jax.tree.map(np.asarray, variables)
        return Stored(str(config["model"]["name"]), variables, int(state["step"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{workdir} holds no state as a run writes it ({reason})") from error
