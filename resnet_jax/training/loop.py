"""The training loop: a configuration in, a trained network in a workdir out.

open_inputs (data and network, checked) -> open_run (state, step program, datasets) -> train_loop
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import jax

from resnet_jax.compile_cache import use_compile_cache
from resnet_jax.config.schema import Config
from resnet_jax.distributed.device_memory import explain_out_of_memory
from resnet_jax.distributed.process_group import process_group
from resnet_jax.distributed.signals import Signals
from resnet_jax.files import expand_user
from resnet_jax.terminal import log
from resnet_jax.training.inputs import open_inputs
from resnet_jax.training.run import Run, open_run
from resnet_jax.training.state_evaluator import stopped
from resnet_jax.training.trace import Trace


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
    """Trains a network, or resumes its training from the newest state in the workdir.

    Args:
      config: The configuration of the run.
      workdir: The folder of the run; created if it does not exist.

    Returns:
      The number of steps and the last evaluation.

    Raises:
      ConfigError: The configuration, or the workdir, cannot be used; nothing was written.
      DataError: The dataset cannot be used.
      DivergedError: The loss, or the update that follows from it, is no longer a number.
      StoppedError: A signal asked to stop; everything is saved.
      PeerError: Another process of the run is lost.

    Example:
      >>> import tempfile
      >>> from resnet_jax.config.schema import Data, Model, Train
      >>> model, data = Model(name="resnet20"), Data(name="digits", image_size=8)
      >>> config = Config(model, data, train=Train(steps=2, batch_size=16))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     train(config, folder).steps
      2
    """
    folder = expand_user(workdir)
    with process_group() as group:
        inputs = open_inputs(config, folder, group, log)
        # On GPUs the processes share the timing of kernels while they compile, so one that found
        # its program in the cache would leave the others waiting for its part.
        uncached = group.count > 1 and jax.default_backend() == "gpu"
        use_compile_cache("" if uncached else inputs.config.log.compile_cache)
        with Signals() as signals, open_run(inputs, folder, group, signals) as run:
            with run.closing_checkpoints(), explain_out_of_memory(*run.program.memory_advice()):
                metrics = train_loop(run)
            run.evaluator.log_best(run.done)
            return Result(run.done, metrics, run.workdir)


def train_loop(run: Run) -> dict[str, float]:
    """Takes the steps that are left; returns the last evaluation."""
    done, steps = run.done, run.length.steps
    evaluator, accumulator = run.evaluator, run.accumulator
    with contextlib.ExitStack() as stack:
        stack.callback(accumulator.close)
        metrics = evaluator.at_start(run.state, done)
        if done >= steps or evaluator.stops_early(done):
            return metrics or _evaluate_again(run)

        trace = Trace(run.config, run.workdir, run.writers.log)
        stack.callback(trace.close)
        batches = run.program.batches(done, steps, run.pauses_at)
        stack.callback(batches.close)
        compiled = set[int]()  # numbers of steps for which there is a program
        for count, batch in batches:
            trace.before(done)
            name = "the training step" if count == 1 else f"a loop of {count} training steps"
            new = count not in compiled
            with run.writers.compiling(name) if new else contextlib.nullcontext():
                run.state, step_metrics = run.program(run.state, batch)
            compiled.add(count)
            done += count
            trace.after(done, step_metrics)

            accumulator.add(done, step_metrics)
            run.writers.advance(done)
            if run.checkpoints is not None:
                run.checkpoints.check()

            evaluates = evaluator.due(done)
            if evaluates:
                accumulator.flush()
            stop = run.must_stop()
            if evaluates or stop or run.saves_at(done):
                run.save(to_evaluate=evaluates)
            if stop:
                raise stopped(done)
            if evaluates:
                metrics = evaluator.evaluate(run.state, done)
                if evaluator.stops_early(done):
                    break
                accumulator.restart_clock()
    return metrics


def _evaluate_again(run: Run) -> dict[str, float]:
    """The metrics of a run that was complete before this start."""
    if run.done >= run.length.steps:
        run.writers.log(f"already trained for {run.done} steps; evaluating")
    return run.evaluator.measure(run.state, run.done, run.evaluator.history.weights, write=False)
