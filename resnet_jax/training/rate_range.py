"""A learning-rate range test (Smith 2017, arXiv:1506.01186, section 3.3).

A new network is trained for a few steps while the learning rate rises exponentially. The loss stays
where the rate is too low, falls where it is useful, and rises where it is too high.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from resnet_jax.compile_cache import use_compile_cache
from resnet_jax.config.model import make_model
from resnet_jax.config.schema import Config, Schedule
from resnet_jax.data.pipeline import CorruptImages, open_dataset
from resnet_jax.distributed import data_parallel
from resnet_jax.distributed.device_memory import explain_out_of_memory
from resnet_jax.errors import ConfigError
from resnet_jax.training.class_balance import class_weights, count_classes, training_sampler
from resnet_jax.training.init_from import initial_variables
from resnet_jax.training.inputs import channels_of, check_batches, check_memory, resolve
from resnet_jax.training.optimizer import RunLength, make_optimizer, peak_learning_rate
from resnet_jax.training.state import TrainState, create_state
from resnet_jax.training.step import make_train_step
from resnet_jax.training.step_program import StepProgram
from resnet_jax.workdirs.environment import computes_on

_MIN_STEPS, _MAX_STEPS = 20, 100_000
_MAX_RATE = 1e6
# Losses are averaged over this part of a test: a quarter of a decade where the rate rises by six.
_WINDOW = 1 / 25
# The test ends where the smoothed loss is this many times its minimum.
_DIVERGED = 4.0
# A fall is clear from this fraction of the first loss; a rise, from this fraction of the fall.
_CLEAR_FALL, _CLEAR_RISE = 0.05, 0.5


@dataclasses.dataclass(frozen=True)
class RateCurve:
    """The losses of a range test, and the rates that follow from them.

    All rates are values of optimizer.learning_rate; the optimizer uses `scale` times as much.

    Args:
      rates: The rate of each step, [N], rising.
      losses: The training loss of each step's batch, [N].
      smoothed: Debiased exponential moving average of the losses, [N].
      steepest: The rate at which the loss falls most steeply before its first clear rise; NaN if it
        never clearly falls.
      lowest: The rate of the lowest smoothed loss before the first clear rise; NaN if the loss
        never clearly falls.
      scale: train.batch_size / optimizer.base_batch, or 1 without a base_batch.
      end: Why the test ended before its highest rate; "" if it did not.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    steepest: float
    lowest: float
    scale: float = 1.0
    end: str = ""

    @classmethod
    def of(
        cls,
        rates: Sequence[float] | np.ndarray,
        losses: Sequence[float],
        window: int,
        scale: float = 1.0,
        end: str = "",
    ) -> RateCurve:
        """Analyzes the losses of a test, averaged over a window of steps.

        Example:
          >>> rates = np.geomspace(1e-4, 10, 51)  # ten steps for each factor of 10
          >>> losses = [2.0] * 21 + [1.9, 1.7, 1.2, 0.9, 0.8] + [0.7] * 5 + [3.0] * 20
          >>> curve = RateCurve.of(rates, losses, window=1)
          >>> f"{curve.steepest:.2g} {curve.lowest:.2g}"
          '0.02 0.04'
        """
        average = _Average(window)
        smoothed = np.array([average.add(loss) for loss in losses])
        steepest, lowest = _find_falls(np.array(losses), smoothed, window)
        return cls(
            np.array(rates),
            np.array(losses),
            smoothed,
            float("nan") if steepest is None else float(rates[steepest]),
            float("nan") if lowest is None else float(rates[lowest]),
            scale,
            end,
        )

    def to_csv(self) -> str:
        """The curve as CSV, one line a step after a header."""
        names = "step,optimizer.learning_rate,loss,smoothed_loss"
        rows = enumerate(zip(self.rates, self.losses, self.smoothed), start=1)
        lines = [f"{k},{rate:.6g},{loss:.6g},{mean:.6g}" for k, (rate, loss, mean) in rows]
        return "\n".join([names, *lines, ""])


def _find_falls(
    losses: np.ndarray, smoothed: np.ndarray, window: int
) -> tuple[int | None, int | None]:
    """(step of the steepest fall, step of the lowest loss) before the first clear rise.

    After a rise the loss may fall once more: large weights make the steps of a normalized network
    small. That says nothing about the rate of a new network.
    """
    if len(losses) < window:
        return None, None
    first = losses[:window].mean()
    least = np.minimum.accumulate(smoothed)
    fallen = first - least
    falls = fallen > _CLEAR_FALL * first
    rises = falls & (smoothed - least > _CLEAR_RISE * fallen)
    end = int(rises.argmax()) if rises.any() else len(losses)
    if end < 2 * window or not falls[:end].any():
        return None, None
    # The means before and after a step are of equally many steps, so they do not lag.
    means = np.convolve(losses[:end], np.full(window, 1 / window), mode="valid")
    drops = means[:-window] - means[window:]
    return int(drops.argmax()) + window, int(smoothed[:end].argmin())


class _Average:
    """A debiased exponential moving average over about `window` numbers."""

    def __init__(self, window: int) -> None:
        self._decay = 1 - 1 / window
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """Adds a number; returns the average."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight


def find_rate(
    config: Config,
    low: float = 1e-5,
    high: float = 10.0,
    steps: int = 200,
    *,
    log: Callable[[str], Any] = print,
    bar: bool = False,
) -> RateCurve:
    """Trains a new network for some steps while the learning rate rises, and returns the losses.

    Data, augmentation, network, initial weights, loss and optimizer are those of the run; schedule,
    moving average and workdir are not used. Nothing is written. The same configuration gives the
    same curve.

    Args:
      config: The configuration of the run.
      low: optimizer.learning_rate at the first step.
      high: optimizer.learning_rate at the last step.
      steps: Number of steps.
      log: Called with lines about the test.
      bar: Show a progress bar if standard error is a terminal.

    Returns:
      The losses up to the last step, or up to where the training diverged.

    Raises:
      ConfigError: The configuration or the range cannot be used.
      DataError: The dataset cannot be used.

    Example:
      >>> from resnet_jax.config.schema import Data, Model, Train
      >>> model, data = Model(name="resnet20"), Data(image_size=8)
      >>> config = Config(model, data, train=Train(batch_size=8))
      >>> curve = find_rate(config, low=1e-4, high=1e-2, steps=20, log=lambda line: None)
      >>> curve.losses.shape
      (20,)
    """
    _check_range(low, high, steps)
    config, sources = resolve(config, log)
    source, channels = sources["train"], channels_of(config, sources["train"])
    scale = peak_learning_rate(_with_rate(config, 1.0))
    config = _without_schedule(config, steps)
    model = make_model(config, source.num_classes)
    check_batches(config)
    check_memory(config, model, channels)
    use_compile_cache(config.log.compile_cache)
    length = RunLength.of(config, len(source))
    schedule = optax.schedules.exponential_decay(scale * low, steps - 1, high / low)
    optimizer = make_optimizer(config, length, schedule)
    initial = initial_variables(config, model, channels)
    corrupt = CorruptImages(config.data.max_corrupt, log)
    data = open_dataset(source, config.data, True, corrupt)
    sampler = training_sampler(config, data, log)
    counts = count_classes(config, data, sampler, source.num_classes, log)
    weights = class_weights(config.loss, counts, model.num_classes)
    log(
        f"{config.model.name} on {config.data.name}: {steps} steps of {config.train.batch_size} "
        f"images on {computes_on(jax.devices())}, optimizer.learning_rate from {low:g} to {high:g}"
    )
    step = make_train_step(model, optimizer, config, length, class_weights=weights)
    program = StepProgram(step, config, data, sampler)
    window = max(round(_WINDOW * steps), 1)
    with explain_out_of_memory(*program.memory_advice()):
        state = data_parallel.replicate(create_state(model, optimizer, config, channels, initial))
        with (
            contextlib.closing(program.batches(0, steps)) as batches,
            _progress(steps, bar) as shown,
        ):
            losses, end = _train(config, state, program, shown(batches), window)
    rates = np.geomspace(low, high, steps)[: len(losses)]
    return RateCurve.of(rates, losses, window, scale, end)


def _train(
    config: Config,
    state: TrainState,
    program: StepProgram,
    batches: Iterator[tuple[int, Any]],
    window: int,
) -> tuple[list[float], str]:
    """(loss of each step that was taken, why the training ended early or "")."""
    losses: list[float] = []
    average, least, skipped = _Average(window), float("inf"), 0
    for _, batch in batches:
        state, metrics = program(state, batch)
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            return losses, "the loss is not a number"
        if metrics["skipped"]:
            skipped += 1
            # With float16, steps are skipped until the loss scale fits.
            if state.loss_scale is None or skipped > config.train.max_skipped:
                return losses, "the update is not finite"
            continue
        skipped = 0
        losses.append(loss)
        smoothed = average.add(loss)
        least = min(least, smoothed)
        if smoothed > _DIVERGED * least:
            return losses, f"the smoothed loss is more than {_DIVERGED:g} times its minimum"
    return losses, ""


@contextlib.contextmanager
def _progress(steps: int, bar: bool) -> Iterator[Callable[[Any], Any]]:
    from tqdm import tqdm

    # disable=None: only on a terminal.
    disable = None if bar else True
    with tqdm(total=steps, unit="step", disable=disable, leave=False, file=sys.stderr) as shown:

        def counted(batches: Any) -> Iterator[Any]:
            for batch in batches:
                yield batch
                shown.update()

        yield counted


def _check_range(low: float, high: float, steps: int) -> None:
    if not 0 < low < high <= _MAX_RATE:  # false for NaN
        raise ConfigError(
            f"low = {low:g} and high = {high:g}: must rise and lie above 0 and up to "
            f"{_MAX_RATE:,.0f}"
        )
    if not _MIN_STEPS <= steps <= _MAX_STEPS:
        raise ConfigError(f"steps = {steps}: a range test takes {_MIN_STEPS} to {_MAX_STEPS:,}")


def _with_rate(config: Config, rate: float) -> Config:
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    return dataclasses.replace(config, optimizer=optimizer)


def _without_schedule(config: Config, steps: int) -> Config:
    """The configuration of a short run whose learning rate only the test changes."""
    return dataclasses.replace(
        config,
        schedule=Schedule(name="constant"),
        train=dataclasses.replace(config.train, steps=steps, steps_per_call=1, ema_decay=0.0),
    )
