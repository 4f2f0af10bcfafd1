"""The states of a run on disk: when they are saved, restored and removed.

    checkpoints/STEP/             a state (saved_state.py)
    checkpoints/STEP.damaged/     a state that has changed since it was written
    checkpoints/.unfinished/      states that are being written or removed

A state is written in .unfinished and renamed when it is complete, so a folder STEP is complete or
absent. Older states are removed only after that. Orbax's manager would remove them before our
checksums exist, and ranks NaN as best.

A state is saved before it is evaluated, so that a failed evaluation does not lose it. Its metrics
are the evaluation records of its step in metrics.jsonl (evaluations.py). Older versions wrote them
to progress.json, where they are still read.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from resnet_jax import files
from resnet_jax.errors import RETRY, ConfigError, one_line, write_errors
from resnet_jax.files import expand_user
from resnet_jax.terminal import visible
from resnet_jax.workdirs import checksums, saved_state
from resnet_jax.workdirs.description import read_json
from resnet_jax.workdirs.evaluations import Evaluations
from resnet_jax.workdirs.saved_state import State
from resnet_jax.workdirs.workdir import has_states, saved_steps

UNFINISHED = ".unfinished"


class Checkpoints:
    """The newest and the best states of a run.

    Args:
      workdir: Folder of the run.
      keep: Number of newest states to keep. A state in evaluation does not count: if it turns out
        to have diverged, the run resumes from an earlier one.
      keep_best: Number of best states to keep in addition.
      evaluations: Evaluations of the run; None: read from its files.
      read_only: Change nothing, because another process may be writing.

    Raises:
      ConfigError: "checkpoints" or ".unfinished" is a link.

    Attributes:
      after_save: Called in the background when a state or its evaluation is on disk and older
        states are removed, and with `discarded=step` when a state was discarded.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        keep: int = 1,
        keep_best: int = 1,
        evaluations: Evaluations | None = None,
        read_only: bool = False,
    ) -> None:
        self.workdir = expand_user(workdir)
        self._folder = self.workdir / "checkpoints"
        self._unfinished = self._folder / UNFINISHED
        self._keep, self._keep_best = keep, keep_best
        self._evaluations = evaluations
        self._in_evaluation: int | None = None  # step of the state that is being evaluated
        self._verified: set[int] = set()  # steps whose checksums were right in this process
        self.after_save: Callable[..., None] = lambda discarded=None: None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._refuse_link(self._folder)
        if not read_only:
            shutil.rmtree(self._unfinished, ignore_errors=True)  # of a process that was killed
            self._refuse_link(self._unfinished)

    @property
    def latest(self) -> int | None:
        """Completed steps of the newest state on disk."""
        self.wait()
        return max(self._steps(), default=None)

    @property
    def best(self) -> int | None:
        """Completed steps of the best evaluated state."""
        self.wait()
        return next(iter(self._best(1)), None)

    # Saving.

    def save(self, state: State, records: dict[str, Any], to_evaluate: bool = False) -> None:
        """Saves a state in the background.

        Args:
          state: Copied to the host before this returns, so the next step may donate it.
          records: The sums of the next training record so far, as JSON.
          to_evaluate: Whether a call of `evaluated` or `discard` follows.

        Raises:
          ConfigError: The previous state could not be written.
        """
        self.wait()  # at most one copy of a state in memory besides the one that is read back
        step = int(state.step)
        if to_evaluate:
            self._in_evaluation = step
        if step not in self._steps():
            copy = saved_state.copy_to_host(state)
            self._pending.append(self._writer.submit(self._write, step, copy, records))

    def _write(self, step: int, state: State, records: dict[str, Any]) -> None:
        """Writes a state, names it, and removes older ones; runs in the background."""
        try:
            files.make_folder(self._folder)  # but not the workdir, if someone has removed it
            files.make_folder(self._unfinished)
            with files.new_folder(self._unfinished) as folder:
                saved_state.write_state(folder, state, records)
                with contextlib.suppress(FileNotFoundError):
                    files.sync(self.workdir / "metrics.jsonl")  # the records before the state
                os.rename(folder, self._folder / str(step))
            files.sync(self._folder)
        except Exception as error:
            saved_state.silence_closed_loops()
            last = max(self._steps(), default=None)
            good = f"the last good one is at step {last}" if last else "there is none before it"
            raise ConfigError(
                f"--workdir={self.workdir}: the state at step {step} could not be written "
                f"({saved_state.disk_reason(error)}); {good}; {RETRY}"
            ) from error
        self._verified.add(step)
        self._remove_old()
        self.after_save()

    def evaluated(self) -> None:
        """Reports that the newest state has been evaluated and its records are written."""
        self._in_evaluation = None
        self._pending.append(self._writer.submit(self._after_evaluation))

    def _after_evaluation(self) -> None:
        metrics = self.workdir / "metrics.jsonl"
        with write_errors(metrics), contextlib.suppress(FileNotFoundError):
            files.sync(metrics)  # the evaluation must be on disk before it removes states
        self._remove_old()
        self.after_save()

    def discard(self, step: int) -> None:
        """Removes a state whose evaluation shows that the run has diverged.

        Raises:
          ConfigError: The state could not be written or cannot be removed.
        """
        self.wait()
        self._in_evaluation = None
        with write_errors(self._folder / str(step)):
            self._remove(step)
        self.after_save(discarded=step)

    def check(self) -> None:
        """Raises ConfigError if a state could not be written; does not wait."""
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
        """Waits as `wait` does and ends the background thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _remove_old(self) -> None:
        others = [step for step in self._steps() if step != self._in_evaluation]
        best = self._best(self._keep_best)
        for step in others[: -self._keep]:
            if step not in best:
                # If it cannot be removed now, a later save tries again. A damaged state stays.
                with contextlib.suppress(OSError):
                    if step in self._verified or not checksums.damage(self._folder / str(step)):
                        self._remove(step)

    def _remove(self, step: int) -> None:
        """Removes a state by way of another name, because half of it must not look complete."""
        files.make_folder(self._unfinished)
        os.rename(self._folder / str(step), self._unfinished / f"{step}.old")
        shutil.rmtree(self._unfinished / f"{step}.old")

    # Restoring.

    def restore(self, like: State, step: int | None = None) -> State:
        """Reads a state.

        Args:
          like: A state, or the shapes of one, of the same model and optimizer.
          step: Completed steps; None: the newest state.

        Returns:
          A state of NumPy arrays.

        Raises:
          ConfigError: The state is damaged, cannot be read, or has another structure.
        """
        step = self._or_latest(step)
        self._verify(step)
        found = self._read(step)
        try:
            return saved_state.like(like, found)
        except ValueError as error:
            raise ConfigError(
                f"{self._name(step)} is of another model or optimizer ({error}); use another "
                "workdir"
            ) from error

    def records(self, step: int | None = None) -> dict[str, Any]:
        """The `records` that were saved with a state; by default the newest."""
        step = self._or_latest(step)
        self._verify(step)
        found = self._progress(step).get("records")
        if not isinstance(found, dict):
            raise ConfigError(
                f"{self._folder}/{step}/progress.json has no records; restore it from a copy"
            )
        return found

    def read_whole(self, best: bool) -> dict[str, Any]:
        """Reads the best or the newest undamaged state, as a dictionary of NumPy arrays.

        Raises:
          ConfigError: All states are damaged, or one cannot be read.
        """
        damaged: dict[int, str] = {}
        rank = self._ranked if best else self._newest
        while steps := [step for step in rank() if step not in damaged]:
            step = steps[0]
            try:
                self._verify(step)
                return self._read(step)
            except ConfigError as error:
                # A run that trains here may have removed the state after saving a newer one.
                if not os.path.lexists(self._folder / str(step)):
                    continue
                if not isinstance(error, _DamagedError):
                    raise
                damaged[step] = error.problem
                logging.getLogger(__name__).warning(
                    "%s: the state at step %d is damaged: %s; using another",
                    *(visible(self.workdir), step, visible(error.problem)),
                )
        raise self._none_intact(damaged)

    def _read(self, step: int) -> dict[str, Any]:
        found = saved_state.read_arrays(self._folder / str(step), self._name(step))
        held = saved_state.step_of(found)
        if held != step:  # the checksums are right, so someone made them for it
            raise _DamagedError(self._name(step), saved_state.wrong_step(held, step))
        return found

    def _progress(self, step: int) -> dict[str, Any]:
        path = self._folder / str(step) / "progress.json"
        try:
            return saved_state.read_progress(path.parent)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} cannot be read ({one_line(error)}); restore it from a copy"
            ) from error

    def _or_latest(self, step: int | None) -> int:
        step = self.latest if step is None else step
        if step is None:
            raise ConfigError(f"{self.workdir} has no checkpoint yet")
        return step

    # Damage.

    def damaged(self) -> dict[int, str]:
        """The damaged states: step -> what is wrong.

        Raises:
          ConfigError: A state cannot be read, so its condition is unknown.
        """
        problems = {step: self._damage(step) for step in self._steps()}
        return {step: problem for step, problem in problems.items() if problem}

    def set_damaged_aside(self) -> list[str]:
        """Renames damaged states, so that the run resumes from another; returns lines for the log.

        Raises:
          ConfigError: All states are damaged; none is renamed, or the next start would be a new
            run. Or a state cannot be read or renamed.
        """
        damaged = self.damaged()
        if damaged and len(damaged) == len(self._steps()):
            raise self._none_intact(damaged)
        return [self.set_aside(step, problem) for step, problem in damaged.items()]

    def set_aside(self, step: int, problem: str) -> str:
        """Renames a damaged state to STEP.damaged; returns a line for the log."""
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
                f"({error.strerror or error}); move it away and run the same command again"
            ) from error
        return f"{found} is now {aside}"

    def _damage(self, step: int) -> str | None:
        try:
            problem = saved_state.damage(self._folder / str(step), step)
        except OSError as error:
            raise ConfigError(
                f"{self._name(step)} cannot be read ({error.filename}: {error.strerror}); {RETRY}"
            ) from error
        if problem is None:
            self._verified.add(step)
        return problem

    def _verify(self, step: int) -> None:
        if step not in self._verified and (problem := self._damage(step)):
            raise _DamagedError(self._name(step), problem)

    def _none_intact(self, damaged: dict[int, str]) -> ConfigError:
        if not damaged:
            return ConfigError(f"{self.workdir} has no checkpoint yet")
        found = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
        return ConfigError(
            f"no state in {self._folder} is intact ({found}); restore one from a copy, or move "
            "that folder away to start a new run"
        )

    def _refuse_link(self, folder: Path) -> None:
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                files.check_folder(folder)
        except OSError as error:
            raise ConfigError(
                f"--workdir={self.workdir}: {folder} is {error.strerror}; replace it with a folder"
            ) from error

    def _name(self, step: int) -> str:
        return f"--workdir={self.workdir}: its state at step {step}"

    # Order.

    def _steps(self) -> list[int]:
        return saved_steps(self.workdir)

    def _newest(self) -> list[int]:
        return self._steps()[::-1]

    def _ranked(self) -> list[int]:
        """All steps from best to worst; at the end those without an evaluation, newest first."""
        ranks = {step: (self._score(step), step) for step in self._steps()}
        return sorted(ranks, key=ranks.__getitem__, reverse=True)

    def _best(self, count: int) -> list[int]:
        """The best evaluated states, at most `count`."""
        return [step for step in self._ranked()[:count] if self._score(step) > -math.inf]

    def _score(self, step: int) -> float:
        if self._evaluations is None:
            self._evaluations = Evaluations.of_workdir(self.workdir)
        stored = None
        if self._evaluations.missing(step):
            with contextlib.suppress(ConfigError):  # damaged, which its checksums report
                stored = self._progress(step).get("metrics")
        return self._evaluations.score(step, stored)


class _DamagedError(ConfigError):
    """One state is damaged."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} is damaged: {problem}; restore it from a copy")
        self.problem = problem


class StoredNetwork(NamedTuple):
    """A trained network: its name, its variables, and the completed steps of its state."""

    name: str
    variables: dict[str, Any]
    step: int


def load_variables(
    workdir: str | os.PathLike[str], *, best: bool = True, ema: bool = True
) -> StoredNetwork:
    """Reads the variables of a trained network.

    Args:
      workdir: Folder of the run.
      best: Read the best state by the run's checkpoint.best_metric, or the newest if none was
        evaluated; otherwise always the newest.
      ema: Read the moving average, if the run has one.

    Returns:
      The model's name, {"params", "batch_stats"} of NumPy arrays, and the step.

    Raises:
      ConfigError: The folder is not a workdir, has no undamaged checkpoint, or has one that a run
        does not write.
    """
    workdir = expand_user(workdir)
    if not workdir.exists():
        raise ConfigError(f"{workdir}: there is no such folder")
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
        return StoredNetwork(str(config["model"]["name"]), variables, int(state["step"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{workdir} has a state that no run writes ({reason})") from error
