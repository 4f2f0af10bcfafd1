"""Evaluations of the state during training: when, of which weights, and what follows from them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

from resnet_jax.config.schema import Config
from resnet_jax.data.pipeline import Batch, Dataset, Shard
from resnet_jax.distributed.device_memory import explain_out_of_memory
from resnet_jax.distributed.process_group import ProcessGroup
from resnet_jax.distributed.signals import Signals
from resnet_jax.errors import ConfigError, DataError, StoppedError
from resnet_jax.evaluation.held_out import HeldOutSets
from resnet_jax.evaluation.metrics import evaluate
from resnet_jax.training.metrics import diverged
from resnet_jax.training.optimizer import RunLength
from resnet_jax.training.state import TrainState
from resnet_jax.workdirs.checkpoint import Checkpoints
from resnet_jax.workdirs.evaluations import EMA, RAW, Evaluations
from resnet_jax.workdirs.metric_writers import MetricWriters
from resnet_jax.workdirs.records import EVALUATION, Record

# A moving average is reported where its top-1 is lower than that of the weights by more than this.
_EMA_LAG = 0.1


@dataclasses.dataclass
class StateEvaluator:
    """Evaluates the state of a run, and its moving average, every evaluate.every_epochs.

    What was measured is in `history`, from which the best state and early stopping follow.
    """

    config: Config
    length: RunLength
    step: Callable[[Any, Any], Any]  # of `make_evaluation_step`, on all devices
    data: Dataset
    held_out: HeldOutSets  # of evaluate.also
    group: ProcessGroup
    signals: Signals
    history: Evaluations
    writers: MetricWriters
    checkpoints: Checkpoints | None  # of the first process
    compiled: bool = False  # whether an evaluation has run

    def due(self, done: int) -> bool:
        """Whether the state after `done` steps is evaluated."""
        interval = self.config.evaluate.every_epochs * self.length.steps_per_epoch
        # The first step at or past each multiple: no drift where it is a fraction.
        return done == self.length.steps or done // interval > (done - 1) // interval

    def at_start(self, state: TrainState, done: int) -> dict[str, float]:
        """Evaluates a restored state that was saved but not evaluated; returns its metrics or {}.

        Weights that the run starts from with their head are evaluated too: a mistake about their
        classes or images shows before training hides it.
        """
        checkpoint = self.config.checkpoint
        if not done and checkpoint.init_from and not checkpoint.reset_head:
            self.writers.log("evaluating the weights that the run starts from")
            self.measure(state, done, [RAW], write=True)
        missing = self.history.missing(done) or self._missing_held_out(done)
        if done and self.due(done) and missing:
            self.writers.log(f"the state of step {done} was saved but not evaluated; evaluating")
            return self.evaluate(state, done)
        return {}

    def evaluate(self, state: TrainState, done: int) -> dict[str, float]:
        """Evaluates a saved state, as far as that is missing; returns the last metrics."""
        try:
            metrics = self.measure(state, done, self.history.missing(done), write=True)
            self._measure_held_out(state, done)
        except (ConfigError, DataError):
            self.writers.log(
                f"the evaluation after step {done} failed; the same command repeats it with the "
                "state that is saved"
            )
            raise
        if self.checkpoints is not None:
            self.checkpoints.evaluated()
        return metrics

    def measure(
        self, state: TrainState, done: int, wanted: list[str], write: bool
    ) -> dict[str, float]:
        """Measures RAW weights, their EMA, or both; returns the metrics of the last."""
        metrics: dict[str, float] = {}
        for weights in wanted:
            start = time.monotonic()
            metrics = self._measure(state.ema if weights else state.variables, done)
            seconds, images = time.monotonic() - start, metrics.pop("images")
            if not math.isfinite(metrics["loss"]):  # and no record: JSON has no NaN
                bad_state = done if write else 0
                raise diverged("evaluated loss", done, self.checkpoints, discard=bad_state)
            if write:
                speed = {"images_per_second": images / seconds, "images": int(images)}
                self._record(done, self.config.data.eval_split, weights, {**metrics, **speed})
        self._warn_if_ema_lags(done)
        return metrics

    def _missing_held_out(self, done: int) -> list[tuple[str, list[str]]]:
        """The weights of a state, and the sets of evaluate.also that they were not evaluated on."""
        names, history = self.held_out.names, self.history
        missing = [(each, history.missing_splits(done, each, names)) for each in history.weights]
        return [(weights, splits) for weights, splits in missing if splits]

    def _measure_held_out(self, state: TrainState, done: int) -> None:
        for weights, splits in self._missing_held_out(done):
            variables = state.ema if weights else state.variables
            for split in splits:
                if self.signals.received and self.group.count == 1:
                    raise stopped(done)
                self._record(done, split, weights, self.held_out.evaluate(split, variables))

    def _record(self, done: int, split: str, weights: str, metrics: Mapping[str, float]) -> None:
        record: Record = {"step": done, "split": split, "kind": EVALUATION, **metrics}
        record |= {"weights": weights} if weights else {}
        self.writers.record(record)
        self.history.add(record)

    def _measure(self, variables: Any, done: int) -> dict[str, float]:
        size = self.config.evaluate.batch_size or self.config.train.batch_size
        shard = Shard(self.group.index, self.group.count)
        batches = self._until_stopped(done, self.data.eval_batches(size, shard))
        what = f"an evaluation batch of {size} images"
        with explain_out_of_memory(what, "take a smaller evaluate.batch_size"):
            return evaluate(self._step, variables, batches, self.config.evaluate.threshold)

    def _step(self, *arguments: Any) -> Any:
        """`step`, which is compiled by the first call."""
        if self.compiled:
            return self.step(*arguments)
        with self.writers.compiling("the evaluation"):
            sums = self.step(*arguments)
        self.compiled = True
        return sums

    def _until_stopped(
        self, done: int, batches: Generator[Batch, None, None]
    ) -> Generator[Batch, None, None]:
        """Raises at a signal: the state is saved and can be evaluated later.

        Several processes go on to the end, because none of them knows where the others are.
        """
        with contextlib.closing(batches):
            for batch in batches:
                if self.signals.received and self.group.count == 1:
                    raise stopped(done)
                yield batch

    def _warn_if_ema_lags(self, done: int) -> None:
        train = self.config.train
        raw, ema = (self.history.metrics(done, each) for each in (RAW, EMA))
        if not raw or not ema or ema.get("top1", 1.0) >= raw.get("top1", 0.0) - _EMA_LAG:
            return
        span = train.ema_every / (1 - train.ema_decay)
        self.writers.log(
            f"the moving average is far below the weights: train.ema_decay = {train.ema_decay} and "
            f"train.ema_every = {train.ema_every} average over {span:,.0f} steps, and {done:,} are "
            "done; a smaller train.ema_decay follows the weights sooner"
        )

    def stops_early(self, done: int) -> bool:
        """Whether the metric has not improved in the last train.early_stopping evaluations."""
        train, history = self.config.train, self.history
        if not train.early_stopping:
            return False
        stops = history.since_improved(train.min_improvement) >= train.early_stopping
        if not self.group.broadcast_object(stops):
            return False
        if done < self.length.steps:
            more = f" by more than {train.min_improvement:g}" if train.min_improvement else ""
            self.writers.log(
                f"{history.metric} has not improved{more} in {train.early_stopping} evaluations "
                f"(train.early_stopping); the run ends after step {done} of {self.length.steps}. "
                f"Its best state is that of step {history.best}: {history.metric} = "
                f"{history.best_value:.4g}"
            )
        return True

    def log_best(self, done: int) -> None:
        """Names the best state at the end of the run, where that is not the last one."""
        best = self.history.best
        if self.checkpoints is not None and best is not None and best < done >= self.length.steps:
            self.writers.log(
                f"the best state is that of step {best} ({self.history.metric} = "
                f"{self.history.best_value:.4g}); evaluate and predict take it"
            )


def stopped(done: int) -> StoppedError:
    """The error of a run that ends at a signal."""
    return StoppedError(
        f"stopped by a signal after step {done}; all is saved, and the same command resumes"
    )
