"""The metrics of steps that may still be running, and traces of them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resnet_jax.errors import DivergedError
from resnet_jax.training import parallel
from resnet_jax.training.config import Config, profile_steps
from resnet_jax.training.telemetry import PEAK_FLOPS, Telemetry

# Steps handed to the devices before the oldest is waited for: one runs while the next is queued.
_IN_FLIGHT = 2
# A float16 loss may overflow now and then; this many steps in a row are a divergence.
_MOST_OVERFLOWS = 20


class Recorder:
    """Averages the metrics of steps into records; reads them late, so that no device waits.

    Args:
      config: The configuration of the run.
      steps_per_epoch: May be a fraction.
      telemetry: Where records go.
      done: Completed steps.
      divergence: Makes the message of a DivergedError: of what was not a number, and the step.
    """

    def __init__(
        self,
        config: Config,
        steps_per_epoch: float,
        telemetry: Telemetry,
        done: int,
        divergence: Callable[[str, int], str],
    ) -> None:
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._telemetry = telemetry
        self._divergence = divergence
        self._pending: deque[tuple[int, Any]] = deque()
        self._values: list[dict[str, float]] = []
        self._overflows = 0
        self._done = done
        self._time = time.monotonic()
        self._flops: float | None = None
        self._peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)

    def look_at(self, step: Any, *arguments: Any, several: bool = False) -> None:
        """Counts the work of the step that the records are about, where its peak is known.

        Args:
          step: The compiled step.
          arguments: What it takes.
          several: The last one is of several steps, [D, N, steps]; one is counted.
        """
        if self._peak and self._flops is None:
            if several:
                one = lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], 1), x.dtype)  # noqa: E731
                arguments = (*arguments[:-1], jax.tree.map(one, arguments[-1]))
            self._flops = parallel.flops(step, *arguments)

    def add(self, done: int, metrics: Any) -> None:
        """Takes the metrics of a call that may still be running: of a step, or [steps]."""
        self._pending.append((done, metrics))
        while len(self._pending) > _IN_FLIGHT:
            self._read_one()

    def flush(self) -> None:
        """Waits for all steps and writes what is left over as a record."""
        while self._pending:
            self._read_one()
        if self._values:
            self._write()

    def restart(self) -> None:
        """Starts the clock again after an evaluation or a checkpoint."""
        self._time = time.monotonic()

    def _read_one(self) -> None:
        done, metrics = self._pending.popleft()
        arrays = {name: np.atleast_1d(x) for name, x in jax.device_get(metrics).items()}
        steps = len(arrays["loss"])
        for index in range(steps):
            values = {name: float(x[index]) for name, x in arrays.items()}
            self._take(done - steps + 1 + index, values)

    def _take(self, done: int, values: dict[str, float]) -> None:
        self._done = done
        if math.isfinite(values["loss"]):
            self._overflows = 0
            self._values.append(values)
            self._telemetry.watch(values)
        else:
            self._overflows += 1
            if self._config.model.dtype != "float16" or self._overflows > _MOST_OVERFLOWS:
                raise DivergedError(self._divergence("training loss", done))
        if done % self._config.log.every_steps == 0 and self._values:
            self._write()

    def _write(self) -> None:
        now, steps = time.monotonic(), len(self._values)
        means = {name: sum(v[name] for v in self._values) / steps for name in self._values[0]}
        means["learning_rate"] = self._values[-1]["learning_rate"]
        rate = steps * self._config.train.batch_size / (now - self._time)
        record: dict[str, Any] = {"step": self._done, "split": "train", **means}
        record["epoch"] = self._done / self._steps_per_epoch
        record["images_per_second"] = rate
        if self._peak and self._flops:
            record["mfu"] = steps / (now - self._time) * self._flops / self._peak
        self._telemetry.record(record)
        self._values.clear()
        self._time = now


class Trace:
    """Writes a trace of the steps that log.profile names."""

    def __init__(self, config: Config, workdir: Path) -> None:
        self._steps = profile_steps(config.log.profile) if config.log.profile else None
        self._folder = str(workdir / "profile")
        self._running = False

    def before(self, done: int) -> None:
        """Starts the trace when the next step is its first."""
        if self._steps and done == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, done: int, metrics: Any) -> None:
        """Ends the trace after its last step."""
        if self._running and self._steps and done >= self._steps[1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
