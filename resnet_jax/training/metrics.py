"""The metrics of steps that may still be running."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from resnet_jax.config.schema import Config
from resnet_jax.distributed.accelerators import find_accelerator
from resnet_jax.errors import ConfigError, DivergedError
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.summary import training_flops
from resnet_jax.training.optimizer import RunLength
from resnet_jax.workdirs.checkpoint import Checkpoints
from resnet_jax.workdirs.metric_writers import MetricWriters
from resnet_jax.workdirs.records import LARGEST_STEP, TRAINING, is_number

# Calls handed to the devices before the oldest is waited for: one runs while the next is queued.
_CALLS_IN_FLIGHT = 2


@dataclasses.dataclass
class _Sums:
    """Sums over the steps since the last record. A checkpoint carries them to the next start."""

    steps: int = 0
    totals: dict[str, float] = dataclasses.field(default_factory=dict)
    learning_rate: float = 0.0  # of the last step
    skipped: int = 0
    skipped_in_a_row: int = 0  # up to now
    skipped_in_all: int = 0  # since the run began

    @classmethod
    def of(cls, partial: dict[str, Any]) -> _Sums:
        """Reads what a checkpoint carries, which may have been written by anything."""
        if not _are_sums(partial):
            raise ConfigError(
                "progress.json of the checkpoint has no sums of metrics; restore it from a copy"
            )
        return cls(**partial)

    def add(self, values: dict[str, float]) -> None:
        """Adds the metrics of a step."""
        self.steps += 1
        # One by one, so that a restart in between changes no rounding.
        self.totals = {name: self.totals.get(name, 0.0) + x for name, x in values.items()}
        self.learning_rate = values["learning_rate"]
        self.skipped_in_a_row = 0

    def skip(self) -> None:
        """Counts a step whose metrics are not finite."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.skipped_in_all += 1

    def means(self) -> dict[str, float]:
        means = {name: total / self.steps for name, total in self.totals.items()}
        return {**means, "learning_rate": self.learning_rate}

    def after_record(self) -> _Sums:
        """Keeps only what counts over several records."""
        return _Sums(skipped_in_a_row=self.skipped_in_a_row, skipped_in_all=self.skipped_in_all)


def _are_sums(partial: dict[str, Any]) -> bool:
    counts = {**partial}
    totals, rate = counts.pop("totals", {}), counts.pop("learning_rate", 0.0)
    return (
        partial.keys() <= {field.name for field in dataclasses.fields(_Sums)}
        and isinstance(totals, dict)
        and all(map(is_number, [*totals.values(), rate]))
        and all(type(count) is int and 0 <= count <= LARGEST_STEP for count in counts.values())
    )


class _Clock:
    """Steps a second since a moment, from the times at which calls complete.

    Calls that wait for the compiler count only where there are no others.
    """

    def __init__(self, since: float) -> None:
        self.completed = since
        self._all = self._compiled = (0, 0.0)  # steps and seconds

    def add(self, steps: int, completed: float, compiles: bool) -> None:
        """Adds a call that completed at a time."""
        call = steps, completed - self.completed
        self._all = self._all[0] + call[0], self._all[1] + call[1]
        if compiles:
            self._compiled = self._compiled[0] + call[0], self._compiled[1] + call[1]
        self.completed = completed

    def steps_per_second(self) -> float:
        steps, seconds = self._all
        if steps > self._compiled[0]:
            steps, seconds = steps - self._compiled[0], seconds - self._compiled[1]
        return steps / seconds


class MetricAccumulator:
    """Averages the metrics of steps into records; reads them late, so that no device waits.

    A thread waits for each call and notes when it completes. Rates come from these times: the loop
    itself may learn of several calls at once, long after they ended.

    `partial` is what `partial_metrics` gave at the step where this start begins. `peak_share` is
    the share of the devices' peak FLOP/s that one image a second takes; 0 leaves "mfu" out.
    """

    def __init__(
        self,
        config: Config,
        length: RunLength,
        writers: MetricWriters,
        done: int,
        checkpoints: Checkpoints | None = None,
        partial: dict[str, Any] | None = None,
        peak_share: float = 0.0,
    ) -> None:
        self.stop = False  # whether a process of the run wants to stop
        self._config = config
        self._steps_per_epoch = length.steps_per_epoch
        self._writers = writers
        self._checkpoints = checkpoints
        self._peak_share = peak_share
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._pending: deque[tuple[int, Any, Future[float]]] = deque()
        self._sums = _Sums.of(partial or {})
        self._done = done
        self._clock = _Clock(time.monotonic())
        self._compiled: set[int] = set()  # numbers of steps for which there is a program

    def add(self, done: int, metrics: Any) -> None:
        """Takes the metrics of a call that may still be running: scalars, or [steps]."""
        self._pending.append((done, metrics, self._waiter.submit(_completion_time, metrics)))
        while len(self._pending) > _CALLS_IN_FLIGHT:
            self._read_call()

    def close(self) -> None:
        """Ends the thread."""
        self._waiter.shutdown(wait=False, cancel_futures=True)

    def flush(self) -> None:
        """Waits for all steps and writes what is left over as a record.

        Raises:
          DivergedError: More steps of the run were skipped than taken. A run too short to skip
            train.max_skipped in a row does not end as if it had trained.
        """
        self._read_all()
        if self._sums.skipped_in_all > self._done / 2:
            raise self._diverged()
        if self._sums.steps:
            self._write()

    def partial_metrics(self) -> dict[str, Any]:
        """Waits for all steps and returns the sums of the next record so far.

        A checkpoint carries them, so which records there are does not depend on when a run was
        saved or stopped.
        """
        self._read_all()
        return dataclasses.asdict(self._sums)

    def restart_clock(self) -> None:
        """Leaves out the time since the last call, such as that of an evaluation."""
        self._clock = _Clock(time.monotonic())

    def _read_all(self) -> None:
        while self._pending:
            self._read_call()

    def _read_call(self) -> None:
        done, metrics, completion = self._pending.popleft()
        completed = completion.result()
        arrays = {name: np.atleast_1d(x) for name, x in jax.device_get(metrics).items()}
        steps = len(arrays["loss"])
        self._clock.add(steps, completed, compiles=steps not in self._compiled)
        self._compiled.add(steps)
        self.stop |= bool(arrays.pop("stop", np.zeros(1))[0])
        for index in range(steps):
            values = {name: float(x[index]) for name, x in arrays.items()}
            self._add_step(done - steps + 1 + index, values)

    def _add_step(self, done: int, values: dict[str, float]) -> None:
        self._done = done
        if values.pop("skipped"):  # the other values are not finite
            self._sums.skip()
            if self._sums.skipped_in_a_row > self._config.train.max_skipped:
                raise self._diverged()
        else:
            self._sums.add(values)
            self._writers.watch(values)
        if done % self._config.log.every_steps == 0 and self._sums.steps:
            self._write()

    def _diverged(self) -> DivergedError:
        what = "training loss, or the update that follows from it,"
        return diverged(what, self._done, self._checkpoints, self._sums.skipped_in_all)

    def _write(self) -> None:
        images_per_second = self._clock.steps_per_second() * self._config.train.batch_size
        record: dict[str, Any] = {"step": self._done, "split": "train", "kind": TRAINING}
        record |= self._sums.means()
        record["epoch"] = self._done / self._steps_per_epoch
        record["images_per_second"] = images_per_second
        record["skipped"] = self._sums.skipped
        if self._peak_share:
            record["mfu"] = images_per_second * self._peak_share
        self._writers.record(record)
        self._sums = self._sums.after_record()
        self._clock = _Clock(self._clock.completed)


def _completion_time(metrics: Any) -> float:
    jax.block_until_ready(metrics)
    return time.monotonic()


def peak_share(config: Config, model: ResNet, channels: int) -> float:
    """Share of the devices' peak FLOP/s that one image a second takes; 0 where it is unknown."""
    accelerator = find_accelerator(jax.devices()[0].device_kind)
    if accelerator is None:
        return 0.0
    side = config.data.image_size
    flops = training_flops(model, (1, side, side, channels))
    if config.optimizer.backbone_rate == 0:
        flops /= 3  # a frozen backbone has a forward pass only
    return flops / (accelerator.flops * jax.device_count())


def diverged(
    what: str, done: int, checkpoints: Checkpoints | None, skipped: int = 0, discard: int = 0
) -> DivergedError:
    """The error of a run whose numbers are not finite, with the last state to resume from.

    `discard` is the step of a saved state that is bad itself.
    """
    try:
        if discard and checkpoints is not None:
            checkpoints.discard(discard)
        saved = checkpoints.latest if checkpoints is not None else None
        where = f"the last good state is at step {saved}" if saved else "no state was saved"
    except ConfigError as error:  # the newest state could not be written: report both
        where = str(error)
    count = f", one of {skipped} skipped steps" if skipped > 1 else ""
    return DivergedError(
        f"the {what} is not a number at step {done}{count}; {where}. A lower "
        "optimizer.learning_rate, a longer schedule.warmup_epochs or optimizer.clip_norm help"
    )
