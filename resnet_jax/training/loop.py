"""The training loop: a configuration in, a trained network in a workdir out.

sources -> model -> workdir -> devices -> state (new, loaded, or restored) -> steps
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.data.loader import (
    Batch,
    Corrupt,
    MemoryImages,
    Order,
    evaluation_batches,
    fits_memory,
    load_memory,
    memory_batches,
    prefetch,
    stream_batches,
    streamed_evaluation_batches,
)
from resnet_jax.data.sources import Source, open_source
from resnet_jax.errors import ConfigError, DataError, DivergedError, StoppedError
from resnet_jax.evaluation.metrics import evaluate, make_evaluation_step
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.training import parallel
from resnet_jax.training.checkpoint import (
    Checkpoints,
    locked,
    open_workdir,
    write_classes,
    write_config,
)
from resnet_jax.training.config import Config, check, profile_steps, registered_overrides
from resnet_jax.training.initial import initial_variables
from resnet_jax.training.optimizer import Length, make_optimizer
from resnet_jax.training.state import TrainState, create_state
from resnet_jax.training.step import make_train_step
from resnet_jax.training.telemetry import PEAK_FLOPS, Telemetry

# Steps handed to the devices before the oldest is waited for: one runs while the next is queued.
_IN_FLIGHT = 2
# A float16 loss may overflow now and then; this many steps in a row are a divergence.
_MOST_OVERFLOWS = 20


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Args:
      steps: Completed steps.
      metrics: The last evaluation: "loss" (nats), "top1" and "top5" (fractions).
      workdir: Folder of the run.
    """

    steps: int
    metrics: dict[str, float]
    workdir: Path


def train(config: Config, workdir: str | Path) -> Result:
    """Trains a network, or goes on training it where its workdir left off.

    Args:
      config: The configuration of the run.
      workdir: Its folder; made where it does not exist.

    Returns:
      The last evaluation.

    Raises:
      ConfigError: The configuration, or the workdir, cannot be used; nothing was touched.
      DataError: The data set cannot be used.
      DivergedError: The loss is no longer a number.
      StoppedError: A signal asked to stop; everything is saved.

    Example:
      >>> import tempfile
      >>> from resnet_jax.training.config import Data, Model, Train
      >>> config = Config(train=Train(steps=2, batch_size=16))  # digits, ResNet-20
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     train(config, folder).steps
      2
    """
    check(config)
    sources = open_sources(config)
    model = make_model(config, sources["train"].num_classes)
    _check_batches(config)
    initial = initial_variables(config, model, channels_of(config, sources["train"]))
    folder = open_workdir(workdir, config)
    _use_compile_cache(config)
    with _Signals() as signals, locked(folder):
        return _Run(config, folder, model, sources, initial, signals).finish()


def _check_batches(config: Config) -> None:
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    parts = config.train.accumulate * (2 if mixes else 1)
    why = "train.accumulate, and pairs to mix" if mixes else "train.accumulate"
    parallel.check_divisible({"train.batch_size": config.train.batch_size}, parts, why)
    group = config.model.bn_group_size
    if group and jax.device_count() % group:
        raise ConfigError(
            f"model.bn_group_size = {group}: must divide the {jax.device_count()} devices"
        )
    if config.evaluate.batch_size:
        parallel.check_divisible({"evaluate.batch_size": config.evaluate.batch_size})


def open_sources(config: Config) -> dict[str, Source]:
    """Opens the training and the evaluation split and checks them against each other.

    Args:
      config: The configuration of a run.

    Returns:
      {"train", "eval"}.

    Raises:
      DataError: A split is missing or empty, or has one class only.
    """
    data = config.data
    sources = {
        split: open_source(data.name, name, data.data_dir, train_split=data.train_split)
        for split, name in (("train", data.train_split), ("eval", data.eval_split))
    }
    for split, source in sources.items():
        if len(source) == 0:
            name = getattr(data, f"{split}_split")
            raise DataError(f"data.{split}_split = {name!r}: holds no image; take another split")
    if sources["eval"].class_names != sources["train"].class_names:
        raise DataError(
            f"data.eval_split = {data.eval_split!r}: has other classes than data.train_split = "
            f"{data.train_split!r}"
        )
    channels = channels_of(config, sources["train"])
    for name in ("mean", "std"):
        values = getattr(config.augment, name)
        if len(values) not in (1, channels):
            raise ConfigError(
                f"augment.{name} = {values}: the images have {channels} channel; give one number, "
                "or set data.channels = 3"
            )
    classes = sources["train"].num_classes
    if classes < 2:
        raise DataError(f"data.name = {data.name!r}: has {classes} class; two or more are needed")
    if config.model.num_classes and config.model.num_classes < classes:
        raise DataError(
            f"model.num_classes = {config.model.num_classes}: the data set has {classes} classes; "
            f"take {classes} or more, or 0 to follow the data set"
        )
    return sources


def channels_of(config: Config, source: Source) -> int:
    """Channels of the images that the network sees."""
    return config.data.channels or source.channels


def make_model(config: Config, classes: int) -> ResNet:
    """The network of a run.

    Args:
      config: Its configuration.
      classes: Of the data set, where the configuration leaves them open.

    Returns:
      The module.

    Raises:
      ConfigError: The images are too small for it.

    Example:
      >>> make_model(Config(), classes=10).num_classes
      10
    """
    fields = config.model
    shares = fields.bn_sync != "none"
    model = create_model(
        fields.name,
        num_classes=fields.num_classes or classes,
        dtype=jnp.dtype(fields.dtype),
        axis_name=parallel.AXIS if shares else None,
        bn_group_size=fields.bn_group_size or None,
        **registered_overrides(fields),
    )
    least = model.strides()[-1]
    for name in ("image_size", "eval_size"):
        side = getattr(config.data, name)
        if 0 < side < least:
            raise ConfigError(
                f"data.{name} = {side}: {fields.name} needs at least {least} pixels a side"
            )
    return model


class _Run:
    """One start of a run: what its steps share."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        model: ResNet,
        sources: dict[str, Source],
        initial: dict[str, Any] | None,
        signals: _Signals,
    ) -> None:
        self.config = config
        self.workdir = workdir
        self.model = model
        self.signals = signals
        self.length = Length.of(config, len(sources["train"]))
        self.hosts = {"host": jax.process_index(), "hosts": jax.process_count()}
        optimizer = make_optimizer(config, self.length)
        channels = channels_of(config, sources["train"])
        state = create_state(model, optimizer, config, channels, initial)
        self.checkpoints = Checkpoints(workdir, config.checkpoint.keep)
        resumed = self.checkpoints.latest is not None
        state = self.checkpoints.restore(state) if resumed else state
        self.state: TrainState = parallel.place(state)
        if jax.process_index() == 0:
            write_config(workdir, config)
            write_classes(workdir, sources["train"].class_names)
        self.telemetry = Telemetry(
            config,
            workdir if jax.process_index() == 0 else None,
            int(self.state.step),
            self.length.steps,
            self.length.steps_per_epoch,
        )
        self.corrupt = Corrupt(config.data.max_corrupt, self.telemetry.say)
        self.train_data = self._in_memory(sources["train"], training=True)
        self.eval_data = self._in_memory(sources["eval"], training=False)
        step = make_train_step(model, optimizer, config, self.length)
        self.step = parallel.data_parallel(step)
        self.evaluation_step = parallel.data_parallel_sums(
            make_evaluation_step(model, config.augment)
        )
        self._say_start(channels, resumed)

    def finish(self) -> Result:
        """Takes the steps that are left and closes everything, whatever happens."""
        try:
            metrics = self._train()
        finally:
            self.checkpoints.close()
            self.telemetry.close()
        return Result(int(self.state.step), metrics, self.workdir)

    def _train(self) -> dict[str, float]:
        config, done = self.config, int(self.state.step)
        recorder = _Recorder(self, done)
        trace = _Trace(config, self.workdir)
        metrics: dict[str, float] = {}
        if done >= self.length.steps:
            self.telemetry.say(f"already trained for {done} steps; evaluating")
            return self._evaluate(done, write=False)
        # A generator closed in time does not leave its thread behind.
        batches = prefetch(map(parallel.put, self._batches(done)), config.data.prefetch)
        try:
            for batch in batches:
                trace.before(done)
                recorder.look_at(self.step, self.state, batch)
                self.state, step_metrics = self.step(self.state, batch)
                done += 1
                trace.after(done, step_metrics)
                recorder.add(done, step_metrics)
                self.telemetry.advance(done)
                stop = self.signals.received and jax.process_count() == 1
                if self._evaluates_at(done):
                    recorder.flush()
                    metrics = self._evaluate(done, write=True)
                    self._save(metrics)
                    recorder.restart()
                elif stop or self._saves_at(done):
                    recorder.flush()
                    self._save(None)
                    recorder.restart()
                if stop and done < self.length.steps:
                    raise StoppedError(
                        f"stopped by a signal after step {done}; all is saved, "
                        "the same command goes on"
                    )
        finally:
            batches.close()
            trace.close()
        return metrics

    def _batches(self, start: int) -> Iterator[Batch]:
        config, stop = self.config, self.length.steps
        seed, size = config.train.seed, config.train.batch_size
        data = self.train_data
        order = Order(len(data), seed, config.data.repeats)
        if isinstance(data, MemoryImages):
            return memory_batches(data, order, size, start, stop, **self.hosts)
        return stream_batches(
            data, order, config.data, size, start, stop, self.corrupt, **self.hosts
        )

    def _in_memory(self, source: Source, training: bool) -> MemoryImages | Source:
        """The decoded data set where it fits, else the source itself."""
        data = self.config.data
        if not fits_memory(source, data, training):
            return source
        images = load_memory(source, data, training, self.corrupt)
        if len(images) == 0:
            raise DataError(f"data.name = {data.name!r}: none of its images can be decoded")
        return images

    def _evaluate(self, done: int, write: bool) -> dict[str, float]:
        """Measures the state, and its average where there is one; returns the better known one."""
        measured = {}
        for weights, variables in {"": self.state.variables, "ema": self.state.ema}.items():
            if not variables:
                continue
            start = time.monotonic()
            metrics = evaluate(self.evaluation_step, variables, self._evaluation_batches())
            seconds = time.monotonic() - start
            images = metrics.pop("images")
            if math.isnan(metrics["loss"]):  # and no record: JSON has no NaN
                raise DivergedError(self._divergence("evaluated loss", done))
            record: dict[str, Any] = {"step": done, "split": self.config.data.eval_split, **metrics}
            record["images_per_second"] = images / seconds
            record["images"] = int(images)
            if weights:
                record["weights"] = weights
            if write:
                self.telemetry.record(record)
            measured = metrics
        return measured

    def _evaluation_batches(self) -> Iterator[Batch]:
        config, data = self.config, self.eval_data
        size = config.evaluate.batch_size or config.train.batch_size
        if isinstance(data, MemoryImages):
            return evaluation_batches(data, size, **self.hosts)
        return streamed_evaluation_batches(data, config.data, size, self.corrupt, **self.hosts)

    def _save(self, metrics: dict[str, float] | None) -> None:
        self.checkpoints.save(self.state, metrics)

    def _evaluates_at(self, done: int) -> bool:
        interval = self.config.evaluate.every_epochs * self.length.steps_per_epoch
        # The first step at or past each multiple: no drift where it is a fraction.
        return done == self.length.steps or done // interval > (done - 1) // interval

    def _saves_at(self, done: int) -> bool:
        every = self.config.checkpoint.every_steps
        return every > 0 and done % every == 0

    def _divergence(self, what: str, done: int) -> str:
        saved = self.checkpoints.latest
        where = f"the last good state is at step {saved}" if saved else "no state was saved"
        return (
            f"the {what} is not a number at step {done}; {where}. A lower "
            "optimizer.learning_rate, a longer schedule.warmup_epochs or optimizer.clip_norm help"
        )

    def _say_start(self, channels: int, resumed: bool) -> None:
        config, side = self.config, self.config.data.image_size
        parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        self.telemetry.say(
            f"{config.model.name} ({parameters:,} parameters) on {config.data.name}, "
            f"{len(self.train_data):,} images of {side}x{side}x{channels}, "
            f"{self.model.num_classes} classes; {self.length.steps} steps of "
            f"{config.train.batch_size} on {devices}; workdir {self.workdir}"
        )
        if resumed:
            self.telemetry.say(f"going on after step {int(self.state.step)}")


class _Recorder:
    """Averages the metrics of steps into records; reads them late, so that no device waits."""

    def __init__(self, run: _Run, done: int) -> None:
        self._run = run
        self._pending: deque[tuple[int, Any]] = deque()
        self._values: list[dict[str, float]] = []
        self._overflows = 0
        self._done = done
        self._time = time.monotonic()
        self._flops: float | None = None
        self._peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)

    def look_at(self, step: Any, state: TrainState, batch: Any) -> None:
        """Counts the work of the step that the records are about, where its peak is known."""
        if self._peak and self._flops is None:
            self._flops = parallel.flops(step, state, batch)

    def add(self, done: int, metrics: Any) -> None:
        """Takes the metrics of a step that may still be running."""
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
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self._done = done
        if math.isfinite(values["loss"]):
            self._overflows = 0
            self._values.append(values)
            self._run.telemetry.watch(values)
        else:
            self._overflows += 1
            if self._run.state.loss_scale is None or self._overflows > _MOST_OVERFLOWS:
                raise DivergedError(self._run._divergence("training loss", done))
        if done % self._run.config.log.every_steps == 0 and self._values:
            self._write()

    def _write(self) -> None:
        now, steps = time.monotonic(), len(self._values)
        means = {name: sum(v[name] for v in self._values) / steps for name in self._values[0]}
        means["learning_rate"] = self._values[-1]["learning_rate"]
        rate = steps * self._run.config.train.batch_size / (now - self._time)
        record: dict[str, Any] = {"step": self._done, "split": "train", **means}
        record["epoch"] = self._done / self._run.length.steps_per_epoch
        record["images_per_second"] = rate
        if self._peak and self._flops:
            record["mfu"] = steps / (now - self._time) * self._flops / self._peak
        self._run.telemetry.record(record)
        self._values.clear()
        self._time = now


class _Trace:
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


class _Signals:
    """Notes SIGTERM and SIGINT, so that the loop can save and stop between two steps."""

    def __init__(self) -> None:
        self.received = False
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        # A second request ends the process; a held key, or one signal sent twice, is no second.
        if self.received and now - self._first > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.received:
            self.received, self._first = True, now
            os.write(2, b"stopping after this step; all will be saved\n")


def _use_compile_cache(config: Config) -> None:
    """Keeps compiled programs on disk, unless the caller already chose where."""
    if config.log.compile_cache and not jax.config.values["jax_compilation_cache_dir"]:
        folder = Path(config.log.compile_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
