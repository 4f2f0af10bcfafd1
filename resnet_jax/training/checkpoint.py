"""A run on disk: its configuration, and its states, written by Orbax.

    WORKDIR/config.json           the resolved configuration
    WORKDIR/classes.json          the name of each label
    WORKDIR/checkpoints/STEP/     everything that goes on from that step

This is the only file that imports orbax.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from resnet_jax.errors import ConfigError
from resnet_jax.training.config import Config, differences, to_json
from resnet_jax.training.state import TrainState

# Orbax and its helpers tell of every file on the "absl" logger.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The states of a run: the newest ones, and the best by top-1.

    Args:
      workdir: Folder of the run; "checkpoints" in it is made when the first state is saved.
      keep: Newest states kept.
      read_only: Only look: another process may be writing here.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], keep: int = 1, read_only: bool = False
    ) -> None:
        policy = AnyPreservationPolicy(
            [LatestN(keep), BestN(get_metric_fn=_top1, n=1, keep_checkpoints_without_metrics=False)]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=_top1,  # without it no metrics are stored for the policy
            enable_async_checkpointing=True,
            # A step that was cut off is no checkpoint and only takes room.
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self.workdir = Path(workdir)
        path = epath.Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(path, options=options)

    @property
    def latest(self) -> int | None:
        """Completed steps of the newest state; None: there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Completed steps of the state with the highest top-1; None: none was evaluated."""
        ranked = [(_top1(metrics), step) for step, metrics in self._evaluated()]
        return max(ranked)[1] if ranked else None

    def choose(self, best: bool) -> int | None:
        """The best state, or without an evaluation or where it is not asked for the newest."""
        return (self.best if best else None) or self.latest

    def _evaluated(self) -> Iterator[tuple[int, dict[str, float]]]:
        for step in self._manager.all_steps():
            metrics = self._manager.metrics(step)
            if metrics:
                yield step, metrics

    def save(self, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Writes a state in the background.

        Args:
          state: May be donated to the next step once this returns: it is copied to the host.
          metrics: Of its evaluation; None: it was not evaluated and cannot be the best.
        """
        step = int(state.step)
        if step == self.latest:
            return
        tree = jax.device_get(state)
        self._manager.save(step, args=ocp.args.StandardSave(tree), metrics=metrics)

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Reads a state.

        Args:
          like: A state of the same model and optimizer.
          step: Which; None: the newest.

        Returns:
          Its NumPy arrays.

        Raises:
          ConfigError: The workdir holds another model's or optimizer's state.
        """
        step = self.latest if step is None else step
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--workdir={self.workdir}: its state at step {step} is of another model or "
                "optimizer; take another workdir"
            ) from error
        return jax.tree.map(np.asarray, state)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _top1(metrics: dict[str, float]) -> float:
    """What the best state is best in; Orbax itself would rank NaN above every number."""
    top1 = metrics["top1"]
    return -1.0 if math.isnan(top1) else top1


def open_workdir(workdir: str | os.PathLike[str], config: Config) -> Path:
    """Makes a workdir, or checks that the one that is there belongs to the same run.

    Args:
      workdir: Folder of the run.
      config: Its resolved configuration.

    Returns:
      The folder.

    Raises:
      ConfigError: It cannot be written, or holds a run with another configuration; nothing in
        it has been touched then.
    """
    workdir = Path(workdir).expanduser()
    path = workdir / "config.json"
    if path.exists() and has_states(workdir):
        changed = differences(config, _read_json(path))
        if changed and not config.checkpoint.allow_change:
            raise ConfigError(
                f"--workdir={workdir} holds a run with another configuration "
                f"({'; '.join(changed)}); take another workdir, or go on with it by "
                "--config.checkpoint.allow_change=true"
            )
    elif has_states(workdir):
        raise ConfigError(f"--workdir={workdir} holds checkpoints without a config.json")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / ".writable").touch()
        (workdir / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror}") from error
    return workdir


def has_states(workdir: Path) -> bool:
    """Whether a run was ever saved here; what failed before that binds nobody.

    Args:
      workdir: Folder of the run.

    Returns:
      True where a run goes on instead of starting.
    """
    return any(path.name.isdecimal() for path in workdir.glob("checkpoints/*"))


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps a second process from training in the same workdir.

    Args:
      workdir: Folder of the run.

    Raises:
      ConfigError: Another process trains here.
    """
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however
        except BlockingIOError as error:
            raise ConfigError(
                f"--workdir={workdir}: another process is training there; wait, or take another"
            ) from error
        except OSError:  # some network file systems have no locks
            pass
        yield


def write_config(workdir: Path, config: Config) -> None:
    """Writes config.json; called once it is known that the run can start.

    Args:
      workdir: Folder of the run.
      config: Its resolved configuration.
    """
    partial = workdir / ".config.json.partial"
    partial.write_text(to_json(config))
    os.replace(partial, workdir / "config.json")


def write_classes(workdir: Path, names: Sequence[str]) -> None:
    """Writes classes.json: the name of each output of the network.

    Args:
      workdir: Folder of the run.
      names: In the order of the labels.
    """
    (workdir / "classes.json").write_text(json.dumps(list(names), indent=2) + "\n")


def load_variables(
    workdir: str | os.PathLike[str], *, best: bool = True, ema: bool = True
) -> tuple[str, dict[str, Any]]:
    """The variables of a trained network.

    Args:
      workdir: Folder of the run.
      best: Those with the highest top-1; otherwise, or without an evaluation, the newest.
      ema: Their moving average, where the run has one.

    Returns:
      The model's name, and {"params", "batch_stats"} of NumPy arrays.

    Raises:
      ConfigError: The folder holds no run, or none with a checkpoint.
    """
    workdir = Path(workdir).expanduser()
    if not (workdir / "config.json").exists():
        raise ConfigError(f"{workdir} is not a workdir: it has no config.json")
    config = _read_json(workdir / "config.json")
    if not has_states(workdir):
        raise ConfigError(f"{workdir} has no checkpoint yet")
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.choose(best)
    state = checkpoints._manager.restore(step, args=ocp.args.StandardRestore())
    checkpoints.close()
    found = state["ema"] if ema and state.get("ema") else state
    variables = {name: found[name] for name in ("params", "batch_stats") if found.get(name)}
    return config["model"]["name"], jax.tree.map(np.asarray, variables)


def chosen_step(workdir: str | os.PathLike[str], *, best: bool = True) -> int | None:
    """Completed steps of the state that `load_variables` takes.

    Args:
      workdir: Folder of the run, with a checkpoint.
      best: As there.

    Returns:
      The number.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.choose(best)
    checkpoints.close()
    return step


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it") from error
