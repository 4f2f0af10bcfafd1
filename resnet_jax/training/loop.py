"""The training loop: a configuration in, a trained network in a workdir out.

sources -> model -> workdir -> devices -> state (new, loaded, or restored) -> steps
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax

from resnet_jax.compile_cache import use_compile_cache
from resnet_jax.config.model import make_model
from resnet_jax.config.schema import Config
from resnet_jax.config.validation import check, check_types, profile_steps
from resnet_jax.data.pipeline import (
    Batch,
    Corrupt,
    InMemoryDataset,
    evaluation_batches,
    memory_choices,
    prefetch,
    streamed_evaluation_batches,
)
from resnet_jax.data.sources.opening import Source
from resnet_jax.data.sources.splits import overlap
from resnet_jax.distributed import data_parallel
from resnet_jax.distributed.accelerators import find_accelerator
from resnet_jax.distributed.device_memory import explain_out_of_memory
from resnet_jax.distributed.process_group import ProcessGroup, process_group
from resnet_jax.distributed.signals import Signals
from resnet_jax.errors import ConfigError, DataError, DivergedError, StoppedError
from resnet_jax.evaluation.metrics import evaluate, make_evaluation_step
from resnet_jax.evaluation.multi_label import check_scores_memory
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.summary import training_flops
from resnet_jax.terminal import log
from resnet_jax.training.batches import load_images, training_batches
from resnet_jax.training.class_balance import (
    class_weights,
    count_at_hand,
    count_classes,
    describe,
    training_order,
)
from resnet_jax.training.init_from import Start, initial_variables, look_at_weights
from resnet_jax.training.metrics import MetricAccumulator, Trace
from resnet_jax.training.optimizer import RunLength, describe_cut_warmup, make_optimizer
from resnet_jax.training.setup import (
    channels_of,
    check_batches,
    check_calls,
    check_memory,
    facts,
    fingerprints,
    open_sources,
)
from resnet_jax.training.state import TrainState, create_state, state_shapes
from resnet_jax.training.step import make_steps, make_train_step
from resnet_jax.workdirs.checkpoint import Checkpoints
from resnet_jax.workdirs.description import write_description
from resnet_jax.workdirs.environment import computes_on, write_environment
from resnet_jax.workdirs.evaluations import EMA, RAW, Evaluations
from resnet_jax.workdirs.metric_writers import MetricWriters
from resnet_jax.workdirs.records import EVALUATION, Record
from resnet_jax.workdirs.remote_copy import RemoteCopy
from resnet_jax.workdirs.workdir import changed_evaluation_data, has_states, locked, open_workdir

# Top-1 by which a moving average below its weights is more than noise.
_FAR_BELOW = 0.1


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
      DivergedError: The loss, or what would come of it, is no longer a number.
      StoppedError: A signal asked to stop; everything is saved.
      PeerError: Another process of the run is lost.

    Example:
      >>> import tempfile
      >>> from resnet_jax.config.schema import Data, Model, Train
      >>> config = Config(train=Train(steps=2, batch_size=16))  # digits, ResNet-20
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     train(config, folder).steps
      2
    """
    with process_group() as group:
        folder = Path(workdir).expanduser()
        check_types(config)
        asked = config
        start = look_at_weights(config, folder) if group.is_first else Start(config)
        start = Start.from_json(group.broadcast_object(start.to_json()))
        check(start.config)
        sources = open_sources(start.config)
        start = start.with_head(sources["train"].class_names)
        config = start.config
        for line in start.taken if group.is_first else ():
            log(line)
        model = make_model(config, sources["train"].num_classes)
        check_batches(config)
        check_calls(config, sources["train"])
        check_memory(config, model, channels_of(config, sources["train"]), group.count)
        if config.data.multi_label:
            what = f"data.eval_split = {config.data.eval_split!r}"
            remedy = "evaluate on a part of it, such as 'test[:10%]'"
            check_scores_memory(len(sources["eval"]), model.num_classes, what, remedy)
        group.check_equal(facts(asked, sources))
        # On GPUs the processes share the timing of kernels while they compile, so one that found
        # its program in the cache would leave the others waiting for its part.
        together_on_gpus = group.count > 1 and jax.default_backend() == "gpu"
        use_compile_cache("" if together_on_gpus else config.log.compile_cache)
        initial, bucket = None, None
        with Signals() as signals, contextlib.ExitStack() as stack:
            if group.is_first:  # the only one that touches the workdir
                bucket = _open_bucket(config, folder, fingerprints(sources))
                if not has_states(folder):  # a run that goes on needs no first weights
                    channels = channels_of(config, sources["train"])
                    initial = initial_variables(config, model, channels)
                folder = open_workdir(folder, config, fingerprints(sources))
                stack.enter_context(locked(folder))
            remedy = "free the memory that other processes hold, or take a smaller network"
            with explain_out_of_memory("the state of the run", remedy):
                run = _Run(config, folder, model, sources, initial, signals, group, stack)
            if bucket and run.checkpoints:
                for line in bucket.fetched:
                    run.writers.log(line)
                run.checkpoints.after_save = bucket.pusher(run.writers.log)
                if run.checkpoints.latest is not None:  # what the last start could not copy
                    run.checkpoints.after_save()
            return run.finish()


def _open_bucket(config: Config, workdir: Path, data: dict[str, str]) -> RemoteCopy | None:
    """The copy of the run, after what the workdir lacks has been brought here.

    Before damaged states are set aside: the copy may have them whole.
    """
    if not config.checkpoint.copy_to:
        return None
    bucket = RemoteCopy(config, workdir)
    if bucket.steps() or has_states(workdir):
        with locked(open_workdir(workdir, config, data)):  # which may hold another run
            bucket.fetch()
    return bucket


class _Run:
    """One start of a run: what its steps share."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        model: ResNet,
        sources: dict[str, Source],
        initial: dict[str, Any] | None,
        signals: Signals,
        group: ProcessGroup,
        stack: contextlib.ExitStack,
    ) -> None:
        self.config = config
        self.workdir = workdir
        self.model = model
        self.signals = signals
        self.length = RunLength.of(config, len(sources["train"]))
        self.group = group
        self.hosts: dict[str, Any] = {"host": group.index, "hosts": group.count}
        optimizer = make_optimizer(config, self.length)
        self.channels = channels = channels_of(config, sources["train"])
        shapes = state_shapes(model, optimizer, config, channels)
        self.checkpoints: Checkpoints | None = None
        self.evaluations = Evaluations.of(config)
        carried, evaluated = None, list[Record]()
        state, lines = None, list[str]()
        if group.is_first:
            keep, keep_best = config.checkpoint.keep, config.checkpoint.keep_best
            self.checkpoints = Checkpoints(workdir, keep, keep_best, self.evaluations)
            lines = self.checkpoints.set_damaged_aside()
            newest = self.checkpoints.latest
            if newest is not None:
                carried = self.checkpoints.records()
                state = self.checkpoints.restore(shapes)
                self.evaluations.read(workdir / "metrics.jsonl", newest)
                evaluated = self.evaluations.records(newest)
                lines += changed_evaluation_data(workdir, fingerprints(sources))
            else:
                state = create_state(model, optimizer, config, channels, initial)
        self.carried, evaluated = group.broadcast_object([carried, evaluated])
        for record in evaluated:  # the other processes read no file
            self.evaluations.add(record)
        self.state: TrainState = data_parallel.replicate(group.broadcast_arrays(state, shapes))
        self.writers = MetricWriters(
            config,
            workdir if group.is_first else None,
            int(self.state.step),
            self.length.steps,
            self.length.steps_per_epoch,
        )
        stack.callback(self.writers.close)  # also where the rest of this fails
        for line in lines:
            self.writers.log(line)
        self.corrupt = Corrupt(config.data.max_corrupt, self.writers.log)
        self.train_data = load_images(config, sources["train"], True, self.corrupt)
        self.eval_data = load_images(config, sources["eval"], False, self.corrupt)
        names, log = sources["train"].class_names, self.writers.log
        self.order = training_order(config, self.train_data, log)
        counts = count_classes(config, self.train_data, self.order, len(names), log)
        weights = class_weights(config.loss, counts, model.num_classes)
        if group.is_first:
            by_split = {"train": counts, "eval": count_at_hand(self.eval_data, len(names))}
            write_description(workdir, config, names, fingerprints(sources), by_split)
            write_environment(workdir)
        step: Callable[..., Any] = make_train_step(
            model, optimizer, config, self.length, class_weights=weights
        )
        self.on_devices: tuple[Batch, ...] = ()  # arguments of the step beside state and batch
        if config.train.steps_per_call > 1 and isinstance(self.train_data, InMemoryDataset):
            data = {"images": self.train_data.images, "labels": self.train_data.labels}
            with explain_out_of_memory("the data set", "take train.steps_per_call = 1"):
                self.on_devices = (data_parallel.replicate(data),)
            step = make_steps(step)
        if group.count > 1:
            step = data_parallel.with_stop_flag(step)
            self.stop_flags = data_parallel.stop_flags()
        self.step = data_parallel.parallel_step(step, whole=len(self.on_devices))
        self.evaluation_step = data_parallel.parallel_sums(
            make_evaluation_step(model, config.augment, config.evaluate.flip)
        )
        self._say_start(sources)
        for line in describe(config, names, counts, weights):
            log(line)

    def finish(self) -> Result:
        """Takes the steps that are left and closes everything, whatever happens."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._saved())
            stack.enter_context(explain_out_of_memory(*self._memory_of_a_step()))
            metrics = self._train()
        step, best = int(self.state.step), self.evaluations.best
        if self.checkpoints is not None and best is not None and best < step >= self.length.steps:
            self.writers.log(
                f"the best state is that of step {best} ({self.evaluations.metric} = "
                f"{self.evaluations.best_value:.4g}); evaluate and predict take it"
            )
        return Result(step, metrics, self.workdir)

    @contextlib.contextmanager
    def _saved(self) -> Iterator[None]:
        """Waits for the last state at the end; also under another error, and then both are told."""
        if self.checkpoints is None:
            yield
            return
        try:
            yield
        except StoppedError:
            self.checkpoints.close()  # its error counts: not all is saved then
            raise
        except BaseException:
            try:
                self.checkpoints.close()
            except ConfigError as error:
                self.writers.log(str(error))
            raise
        self.checkpoints.close()

    def _train(self) -> dict[str, float]:
        config, done = self.config, int(self.state.step)
        recorder = MetricAccumulator(
            config,
            self.length.steps_per_epoch,
            self.writers,
            done,
            self._divergence,
            self.carried,
            self._peak_share(),
        )
        trace = Trace(config, self.workdir, self.writers.log)
        metrics = self._metrics_at_start(done)
        if done >= self.length.steps or self._stops_early(done):
            return metrics or self._measure(done, self.evaluations.weights, write=False)
        # Generators closed in time leave neither threads nor processes behind.
        lengths = [*self._call_lengths(done)]
        made = self._batches(done, lengths)
        batches = prefetch(map(data_parallel.shard_batch, made), config.data.prefetch)
        try:
            for steps, batch in zip(lengths, batches, strict=True):
                trace.before(done)
                if self.group.count > 1:
                    batch = batch, self.stop_flags[self.signals.received]
                arguments = (self.state, *self.on_devices, batch)
                self.state, step_metrics = self.step(*arguments)
                done += steps
                trace.after(done, step_metrics)
                recorder.add(done, step_metrics)
                self.writers.advance(done)
                if self.checkpoints is not None:
                    self.checkpoints.check()
                evaluates = self._evaluates_at(done)
                if evaluates:
                    recorder.flush()
                # Several processes stop where the metrics, read late, tell all of them to.
                stop = recorder.stop if self.group.count > 1 else self.signals.received
                if evaluates or stop or self._saves_at(done):
                    self._save(recorder, evaluates)
                if stop:
                    raise self._stopped(done)
                if evaluates:
                    metrics = self._evaluate(done)
                    if self._stops_early(done):
                        break
                    recorder.restart()
        finally:
            batches.close()
            made.close()
            trace.close()
            recorder.close()
        return metrics

    def _memory_of_a_step(self) -> tuple[str, str]:
        """What a device holds for a training step, and what makes it less."""
        train, model = self.config.train, self.config.model
        remedies = ["a smaller train.batch_size", f"train.accumulate = {2 * train.accumulate}"]
        remedies += [] if model.remat else ["model.remat = true"]
        what = f"a training step of train.batch_size = {train.batch_size}"
        if self.on_devices:
            what += (
                f" with the data set on the devices (train.steps_per_call = {train.steps_per_call})"
            )
            remedies.append("train.steps_per_call = 1")
        return what, f"take {' or '.join(remedies)}"

    def _peak_share(self) -> float:
        """Share of the devices' peak that one image a second takes; 0 where no peak is known."""
        accelerator = find_accelerator(jax.devices()[0].device_kind)
        if accelerator is None:
            return 0.0
        side = self.config.data.image_size
        flops = training_flops(self.model, (1, side, side, self.channels))
        if self.config.optimizer.backbone_rate == 0:
            flops /= 3  # a frozen backbone has a forward pass only
        return flops / (accelerator.flops * jax.device_count())

    def _call_lengths(self, done: int) -> Iterator[int]:
        """Steps of each call: train.steps_per_call, or 1 up to where the loop has to look."""
        most, stop = self.config.train.steps_per_call, self.length.steps
        while done < stop:
            inside = range(done + 1, done + most)
            whole = done + most <= stop and not any(map(self._stops_at, inside))
            steps = most if whole else 1
            yield steps
            done += steps

    def _batches(self, start: int, lengths: list[int]) -> Generator[Batch, None, None]:
        config, data, order = self.config, self.train_data, self.order
        if self.on_devices:
            size = config.train.batch_size
            options = {"mirror": config.augment.flip_alternates, **self.hosts}
            starts = itertools.accumulate(lengths[:-1], initial=start)
            return (
                memory_choices(order, size, first, steps, **options)
                for first, steps in zip(starts, lengths, strict=True)
            )
        stop = self.length.steps
        return training_batches(config, data, order, start, stop, self.corrupt, **self.hosts)

    def _metrics_at_start(self, done: int) -> dict[str, float]:
        """Evaluates the restored state where the last start saved it and did not come to that.

        And weights that the run starts from with their head: a mistake about their classes or
        images shows before training hides it.
        """
        if not done and self.config.checkpoint.init_from and not self.config.checkpoint.reset_head:
            self.writers.log("evaluating the weights that the run starts from")
            self._measure(done, [RAW], write=True)
        if done and self._evaluates_at(done) and self.evaluations.missing(done):
            self.writers.log(f"the state of step {done} was saved but not evaluated; evaluating")
            return self._evaluate(done)
        if done >= self.length.steps:
            self.writers.log(f"already trained for {done} steps; evaluating")
        return {}

    def _evaluate(self, done: int) -> dict[str, float]:
        """Writes the records of an evaluation that are missing, once the state is saved."""
        try:
            metrics = self._measure(done, self.evaluations.missing(done), write=True)
        except (ConfigError, DataError):
            self.writers.log(
                f"the evaluation after step {done} failed; the same command goes on with it from "
                "the state that was saved before"
            )
            raise
        if self.checkpoints is not None:
            self.checkpoints.evaluated()
        return metrics

    def _measure(self, done: int, wanted: list[str], write: bool) -> dict[str, float]:
        """Measures the state, its average, or both; returns the metrics of the last."""
        metrics: dict[str, float] = {}
        for weights in wanted:
            variables = self.state.ema if weights else self.state.variables
            start = time.monotonic()
            size = self.config.evaluate.batch_size or self.config.train.batch_size
            what = f"an evaluation batch of {size} images"
            with explain_out_of_memory(what, "take a smaller evaluate.batch_size"):
                batches = self._unless_stopped(done, self._evaluation_batches())
                threshold = self.config.evaluate.threshold
                metrics = evaluate(self.evaluation_step, variables, batches, threshold)
            seconds = time.monotonic() - start
            images = metrics.pop("images")
            if not math.isfinite(metrics["loss"]):  # and no record: JSON has no NaN
                raise DivergedError(
                    self._divergence("evaluated loss", done, discard=write and done > 0)
                )
            record: Record = {"step": done, "split": self.config.data.eval_split}
            record |= {"kind": EVALUATION, **metrics}
            record["images_per_second"] = images / seconds
            record["images"] = int(images)
            if weights:
                record["weights"] = weights
            if write:
                self.writers.record(record)
                self.evaluations.add(record)
        self._say_if_average_lags(done)
        return metrics

    def _say_if_average_lags(self, done: int) -> None:
        train = self.config.train
        raw, average = (self.evaluations.metrics(done, each) for each in (RAW, EMA))
        if not raw or not average:
            return
        if average.get("top1", 1.0) >= raw.get("top1", 0.0) - _FAR_BELOW:
            return
        span = train.ema_every / (1 - train.ema_decay)
        self.writers.log(
            f"the moving average is far below the weights: train.ema_decay = {train.ema_decay} and "
            f"train.ema_every = {train.ema_every} average over {span:,.0f} steps, and {done:,} are "
            "done; a smaller train.ema_decay follows the weights sooner"
        )

    def _evaluation_batches(self) -> Generator[Batch, None, None]:
        config, data = self.config, self.eval_data
        size = config.evaluate.batch_size or config.train.batch_size
        if isinstance(data, InMemoryDataset):
            return evaluation_batches(data, size, **self.hosts)
        return streamed_evaluation_batches(data, config.data, size, self.corrupt, **self.hosts)

    def _unless_stopped(
        self, done: int, batches: Generator[Batch, None, None]
    ) -> Generator[Batch, None, None]:
        """Evaluation batches, until a signal comes: the state is saved and can be evaluated later.

        Several processes go on to the end, because none of them knows where the others are.
        """
        with contextlib.closing(batches):
            for batch in batches:
                if self.signals.received and self.group.count == 1:
                    raise self._stopped(done)
                yield batch

    def _stopped(self, done: int) -> StoppedError:
        return StoppedError(
            f"stopped by a signal after step {done}; all is saved, the same command goes on"
        )

    def _stops_early(self, done: int) -> bool:
        """Whether the evaluated metric has not improved for as long as the configuration says."""
        train, found = self.config.train, self.evaluations
        if not train.early_stopping:
            return False
        stops = found.since_improved(train.min_improvement) >= train.early_stopping
        if not self.group.broadcast_object(stops):
            return False
        if done < self.length.steps:
            more = f" by more than {train.min_improvement:g}" if train.min_improvement else ""
            self.writers.log(
                f"{found.metric} has not improved{more} in {train.early_stopping} evaluations "
                f"(train.early_stopping); the run ends after step {done} of {self.length.steps}. "
                f"Its best state is that of step {found.best}: {found.metric} = "
                f"{found.best_value:.4g}"
            )
        return True

    def _save(self, recorder: MetricAccumulator, to_evaluate: bool) -> None:
        carried = recorder.carried()  # where a step diverged it says so, and nothing is saved
        if self.checkpoints is not None:
            self.checkpoints.save(self.state, carried, to_evaluate)

    def _evaluates_at(self, done: int) -> bool:
        interval = self.config.evaluate.every_epochs * self.length.steps_per_epoch
        # The first step at or past each multiple: no drift where it is a fraction.
        return done == self.length.steps or done // interval > (done - 1) // interval

    def _saves_at(self, done: int) -> bool:
        every = self.config.checkpoint.every_steps
        return every > 0 and done % every == 0

    def _stops_at(self, done: int) -> bool:
        """Whether the loop logs, evaluates, saves or traces between two steps."""
        config = self.config
        traced = profile_steps(config.log.profile) if config.log.profile else None
        logs = done % config.log.every_steps == 0
        return logs or self._evaluates_at(done) or self._saves_at(done) or done in (traced or ())

    def _divergence(self, what: str, done: int, skipped: int = 0, discard: bool = False) -> str:
        try:
            if discard and self.checkpoints is not None:
                self.checkpoints.discard(done)
            saved = self.checkpoints.latest if self.checkpoints is not None else None
            where = f"the last good state is at step {saved}" if saved else "no state was saved"
        except ConfigError as error:  # the newest one could not be written: both are told
            where = str(error)
        count = f", one of {skipped} skipped steps" if skipped > 1 else ""
        return (
            f"the {what} is not a number at step {done}{count}; {where}. A lower "
            "optimizer.learning_rate, a longer schedule.warmup_epochs or optimizer.clip_norm help"
        )

    def _say_start(self, sources: dict[str, Source]) -> None:
        config, side = self.config, self.config.data.image_size
        parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        self.writers.log(
            f"{config.model.name} ({parameters:,} parameters, {config.model.dtype}) on "
            f"{config.data.name}, "
            f"{len(self.train_data):,} images of {side}x{side}x{self.channels}, "
            f"{self.model.num_classes} classes; {self.length.steps} steps of "
            f"{config.train.batch_size} on {computes_on(jax.devices())}; workdir {self.workdir}"
        )
        if line := describe_cut_warmup(config, self.length):
            self.writers.log(line)
        data = config.data
        if overlap(data.train_split, data.eval_split):
            self.writers.log(
                f"evaluated on images that are trained on: data.train_split = "
                f"{data.train_split!r}, data.eval_split = {data.eval_split!r}"
            )
        for source in sources.values():
            if source.left_out:
                self.writers.log(f"in {source.split}: {source.left_out}")
        if int(self.state.step):
            self.writers.log(f"going on after step {int(self.state.step)}")
