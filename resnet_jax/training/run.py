"""A run: everything that its steps share, opened from a configuration and a workdir."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from resnet_jax.config.schema import Config
from resnet_jax.config.validation import profile_steps
from resnet_jax.data.pipeline import CorruptImages, Dataset, IndexSampler, Shard, open_dataset
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.data.sources.splits import overlap
from resnet_jax.distributed import data_parallel
from resnet_jax.distributed.device_memory import explain_out_of_memory
from resnet_jax.distributed.process_group import ProcessGroup
from resnet_jax.distributed.signals import Signals
from resnet_jax.errors import ConfigError, StoppedError
from resnet_jax.evaluation.metrics import make_evaluation_step
from resnet_jax.models.resnet import ResNet
from resnet_jax.training import class_balance
from resnet_jax.training.init_from import initial_variables
from resnet_jax.training.inputs import Inputs
from resnet_jax.training.metrics import MetricAccumulator, peak_share
from resnet_jax.training.optimizer import RunLength, describe_cut_warmup, make_optimizer
from resnet_jax.training.state import TrainState, create_state, state_shapes
from resnet_jax.training.state_evaluator import StateEvaluator
from resnet_jax.training.step import make_train_step
from resnet_jax.training.step_program import StepProgram
from resnet_jax.workdirs.checkpoint import Checkpoints
from resnet_jax.workdirs.description import write_description
from resnet_jax.workdirs.environment import computes_on, write_environment
from resnet_jax.workdirs.evaluations import Evaluations
from resnet_jax.workdirs.metric_writers import MetricWriters
from resnet_jax.workdirs.records import Record
from resnet_jax.workdirs.remote_copy import RemoteCopy
from resnet_jax.workdirs.workdir import changed_evaluation_data, has_states, locked, open_workdir


@dataclasses.dataclass
class Run:
    """One start of a run: its state, and what its steps share."""

    config: Config
    workdir: Path
    length: RunLength
    group: ProcessGroup
    signals: Signals
    state: TrainState
    program: StepProgram
    evaluator: StateEvaluator
    accumulator: MetricAccumulator
    writers: MetricWriters
    checkpoints: Checkpoints | None  # of the first process, the only one that writes

    @property
    def done(self) -> int:
        """Completed steps; waits for the devices."""
        return int(self.state.step)

    def save(self, to_evaluate: bool) -> None:
        """Saves the state and the sums of the next record; raises where a step has diverged."""
        partial = self.accumulator.partial_metrics()
        if self.checkpoints is not None:
            self.checkpoints.save(self.state, partial, to_evaluate)

    def saves_at(self, done: int) -> bool:
        """Whether checkpoint.every_steps asks for the state after `done` steps."""
        every = self.config.checkpoint.every_steps
        return every > 0 and done % every == 0

    def pauses_at(self, done: int) -> bool:
        """Whether the loop logs, evaluates, saves or traces between two steps."""
        log = self.config.log
        traced = (log.profile and profile_steps(log.profile)) or ()
        logs = done % log.every_steps == 0
        return logs or self.evaluator.due(done) or self.saves_at(done) or done in traced

    def must_stop(self) -> bool:
        """Whether a signal asked to stop.

        Several processes stop together, where the metrics say that one has to; those are read late.
        """
        return self.accumulator.stop if self.group.count > 1 else self.signals.received

    @contextlib.contextmanager
    def closing_checkpoints(self) -> Iterator[None]:
        """Waits for the last state at the end; where that fails under an error, reports both."""
        if self.checkpoints is None:
            yield
            return
        try:
            yield
        except StoppedError:
            self.checkpoints.close()  # its error counts: not everything is saved
            raise
        except BaseException:
            try:
                self.checkpoints.close()
            except ConfigError as error:
                self.writers.log(str(error))
            raise
        self.checkpoints.close()


@contextlib.contextmanager
def open_run(inputs: Inputs, workdir: Path, group: ProcessGroup, signals: Signals) -> Iterator[Run]:
    """Opens a workdir, and builds the run that it holds or is about to hold."""
    with contextlib.ExitStack() as stack:
        remote_copy, initial = None, None
        if group.is_first:
            remote_copy = _fetch_remote_copy(inputs, workdir)
            if not has_states(workdir):  # a run that resumes needs no initial weights
                initial = initial_variables(inputs.config, inputs.model, inputs.channels)
            workdir = open_workdir(workdir, inputs.config, inputs.fingerprints)
            stack.enter_context(locked(workdir))
        run = _build_run(inputs, workdir, group, signals, initial, stack)
        if remote_copy and run.checkpoints:
            for line in remote_copy.fetched:
                run.writers.log(line)
            run.checkpoints.after_save = remote_copy.pusher(run.writers.log)
            if run.checkpoints.latest is not None:  # copies what the last start could not
                run.checkpoints.after_save()
        yield run


def _fetch_remote_copy(inputs: Inputs, workdir: Path) -> RemoteCopy | None:
    """The copy of the run, after fetching what the workdir lacks.

    Before damaged states are set aside: the copy may have them whole.
    """
    config = inputs.config
    if not config.checkpoint.copy_to:
        return None
    remote_copy = RemoteCopy(config, workdir)
    if remote_copy.steps() or has_states(workdir):
        # The workdir may hold another run.
        with locked(open_workdir(workdir, config, inputs.fingerprints)):
            remote_copy.fetch()
    return remote_copy


def _build_run(
    inputs: Inputs,
    workdir: Path,
    group: ProcessGroup,
    signals: Signals,
    initial: dict[str, Any] | None,
    stack: contextlib.ExitStack,
) -> Run:
    config, model, length = inputs.config, inputs.model, inputs.length
    optimizer = make_optimizer(config, length)
    saved = _open_state(inputs, optimizer, workdir, initial, group)

    written = workdir if group.is_first else None
    writers = MetricWriters(
        *(config, written, saved.done, length.steps, length.steps_per_epoch),
        num_classes=len(inputs.class_names),
    )
    stack.callback(writers.close)  # also where the rest of this fails
    for line in saved.lines:
        writers.log(line)

    data = _open_data(inputs, writers.log)
    if group.is_first:
        names, counts = inputs.class_names, data.class_counts
        write_description(workdir, config, names, inputs.fingerprints, counts)
        write_environment(workdir)

    step = make_train_step(model, optimizer, config, length, class_weights=data.class_weights)
    eval_step = make_evaluation_step(model, Preprocessing.from_config(config), config.evaluate.flip)
    run = Run(
        config=config,
        workdir=workdir,
        length=length,
        group=group,
        signals=signals,
        state=saved.state,
        program=StepProgram(
            step,
            config,
            data.train,
            data.sampler,
            Shard(group.index, group.count),
            wants_to_stop=lambda: signals.received,
        ),
        evaluator=StateEvaluator(
            config=config,
            length=length,
            step=data_parallel.parallel_sums(eval_step),
            data=data.eval,
            held_out=inputs.held_out,
            group=group,
            signals=signals,
            history=saved.history,
            writers=writers,
            checkpoints=saved.checkpoints,
        ),
        accumulator=MetricAccumulator(
            config,
            length,
            writers,
            saved.done,
            saved.checkpoints,
            saved.partial_metrics,
            peak_share(config, model, inputs.channels),
        ),
        writers=writers,
        checkpoints=saved.checkpoints,
    )
    for line in _describe(inputs, saved, data, workdir):
        writers.log(line)
    return run


class _Saved(NamedTuple):
    """The state that a start begins with, and what goes with it."""

    state: TrainState
    done: int
    partial_metrics: dict[str, Any] | None  # sums of the next record
    history: Evaluations
    checkpoints: Checkpoints | None  # of the first process
    lines: list[str]  # for the log


def _open_state(
    inputs: Inputs,
    optimizer: optax.GradientTransformation,
    workdir: Path,
    initial: dict[str, Any] | None,
    group: ProcessGroup,
) -> _Saved:
    """Restores the newest undamaged state, or creates that of a new run, in all processes.

    Only the first process reads the workdir.
    """
    config, model, channels = inputs.config, inputs.model, inputs.channels
    shapes = state_shapes(model, optimizer, config, channels)
    history = Evaluations.of(config)
    checkpoints, state, partial = None, None, None
    evaluated, lines = list[Record](), list[str]()
    remedy = "free the memory that other processes hold, or take a smaller network"
    with explain_out_of_memory("the state of the run", remedy):
        if group.is_first:
            keep, keep_best = config.checkpoint.keep, config.checkpoint.keep_best
            checkpoints = Checkpoints(workdir, keep, keep_best, history)
            lines = checkpoints.set_damaged_aside()
            newest = checkpoints.latest
            if newest is None:
                state = create_state(model, optimizer, config, channels, initial)
            else:
                partial = checkpoints.records()
                state = checkpoints.restore(shapes)
                history.read(workdir / "metrics.jsonl", newest)
                evaluated = history.records(newest)
                lines += changed_evaluation_data(workdir, inputs.fingerprints)
        partial, evaluated = group.broadcast_object([partial, evaluated])
        for record in () if group.is_first else evaluated:
            history.add(record)
        state = data_parallel.replicate(group.broadcast_arrays(state, shapes))
        return _Saved(state, int(state.step), partial, history, checkpoints, lines)


class _RunData(NamedTuple):
    """The open datasets of a run, and what follows from the sizes of their classes."""

    train: Dataset
    eval: Dataset
    sampler: IndexSampler
    class_counts: dict[str, np.ndarray]  # of "train" and "eval"
    class_weights: np.ndarray | None


def _open_data(inputs: Inputs, log: Callable[[str], None]) -> _RunData:
    config, classes = inputs.config, len(inputs.class_names)
    corrupt = CorruptImages(config.data.max_corrupt, log)
    train = open_dataset(inputs.sources["train"], config.data, True, corrupt)
    held_out = open_dataset(inputs.sources["eval"], config.data, False, corrupt)
    sampler = class_balance.training_sampler(config, train, log)
    counts = {
        "train": class_balance.count_classes(config, train, sampler, classes, log),
        "eval": class_balance.known_class_counts(held_out, classes),
    }
    outputs = inputs.model.num_classes
    weights = class_balance.class_weights(config.loss, counts["train"], outputs)
    return _RunData(train, held_out, sampler, counts, weights)


def _describe(inputs: Inputs, saved: _Saved, data: _RunData, workdir: Path) -> Iterator[str]:
    """The first lines of a run."""
    config, length = inputs.config, inputs.length
    parameters = sum(x.size for x in jax.tree.leaves(saved.state.params))
    side = config.data.image_size
    yield (
        f"{config.model.name} ({parameters:,} parameters, {config.model.dtype}) on "
        f"{config.data.name}, {len(data.train):,} images of {side}x{side}x{inputs.channels}, "
        f"{inputs.model.num_classes} classes; {length.steps} steps of "
        f"{config.train.batch_size} on {computes_on(jax.devices())}; workdir {workdir}"
    )
    if not saved.done and _is_slow_on_cpu(config, inputs.model):  # a run that resumes keeps it
        yield (
            f"model.dtype = {config.model.dtype} is slower than float32 on a CPU: "
            "--config.model.dtype=float32"
        )
    if line := describe_cut_warmup(config, length):
        yield line
    splits = config.data.train_split, config.data.eval_split
    if overlap(*splits):
        yield (
            f"evaluation images are also training images: data.train_split = {splits[0]!r}, "
            f"data.eval_split = {splits[1]!r}"
        )
    for source in inputs.sources.values():
        if source.left_out:
            yield f"in {source.split}: {source.left_out}"
    if saved.done:
        yield f"resuming after step {saved.done}"
    names, counts = inputs.class_names, data.class_counts["train"]
    yield from class_balance.describe(config, names, counts, data.class_weights)


def _is_slow_on_cpu(config: Config, model: ResNet) -> bool:
    """Whether the devices are CPUs, which have fast 1x1 convolutions in float32 only."""
    half = config.model.dtype != "float32"
    return half and model.block_cls.bottleneck and jax.default_backend() == "cpu"
