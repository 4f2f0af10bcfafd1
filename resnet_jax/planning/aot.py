"""The training step, compiled ahead of time for devices that this machine does not have."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config.model import make_model
from resnet_jax.config.schema import Config
from resnet_jax.data.memory import label_type
from resnet_jax.data.sources import Source
from resnet_jax.distributed import data_parallel
from resnet_jax.errors import ConfigError, one_line
from resnet_jax.models.summary import training_flops
from resnet_jax.planning import gpu, tpu
from resnet_jax.planning.topology import Slice, Topology
from resnet_jax.planning.traffic import Traffic, count_traffic
from resnet_jax.terminal import log
from resnet_jax.training.class_balance import class_weights
from resnet_jax.training.inputs import channels_of
from resnet_jax.training.optimizer import RunLength, make_optimizer
from resnet_jax.training.state import state_shapes
from resnet_jax.training.step import make_train_step
from resnet_jax.training.step_program import make_steps


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiled training step of one device."""

    fits: bool  # into the memory of the device
    memory: int = 0  # bytes for state, batch, temporaries and the program; 0 if unknown
    memory_limit: int = 0  # bytes that programs may use; 0 if unknown
    flops: float = 0.0  # floating-point operations, by the count of the model
    traffic: Traffic = dataclasses.field(default_factory=Traffic)
    compile_seconds: float = 0.0


def step_compiler(topology: Topology, source: Source) -> Callable[[Config], CompiledStep]:
    """Returns a function that compiles the step of a configuration for a topology.

    Of the dataset `source` only its size is used. Raises ConfigError if the compiler for the
    topology is not installed, is in use, or does not know it.
    """
    options: dict[str, Any] | None
    if isinstance(topology, Slice):
        devices, options = tpu.tpu_devices(topology), None
        limit = topology.accelerator.memory
    else:
        devices, options = gpu.gpu_devices(topology), gpu.COMPILER_OPTIONS
        limit = gpu.memory_pool(topology)

    def compile_step(config: Config) -> CompiledStep:
        start = time.monotonic()
        images = config.train.batch_size // len(devices)
        step = f"the training step of {images:,} images a device for {topology.name}"
        try:
            with _progress(f"compiling {step}, which takes minutes for a large network"):
                lowered = lower_step(config, devices, source)
                compiled = _with_deep_stack(lambda: lowered.compile(options))
        except jax.errors.JaxRuntimeError as error:
            # The compiler for GPUs accepts programs of any size, so there this is another error.
            if not isinstance(topology, Slice) or "RESOURCE_EXHAUSTED" not in str(error):
                raise ConfigError(
                    f"--topology={topology.name}: the compiler fails on this training step: "
                    f"{one_line(error)[:500]}"
                ) from error
            needed, available = tpu.memory_shortage(str(error))
            seconds = time.monotonic() - start
            return CompiledStep(False, needed, available, compile_seconds=seconds)
        memory, traffic = _analyze(compiled, config)
        return CompiledStep(
            fits=memory <= limit,
            memory=memory,
            memory_limit=limit,
            flops=step_flops(config, source, len(devices)),
            traffic=traffic,
            compile_seconds=time.monotonic() - start,
        )

    return compile_step


_REPORT_SECONDS = 20.0  # between lines about a compilation that still runs


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Logs that the block begins, now and then that it still runs, and how long it took."""
    start, done = time.monotonic(), threading.Event()

    def seconds() -> str:
        return f"{time.monotonic() - start:.0f} s"

    def report() -> None:
        while not done.wait(_REPORT_SECONDS):
            log(f"still compiling after {seconds()}")

    log(what)
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    log(f"compiled in {seconds()}")


def _with_deep_stack(function: Callable[[], Any]) -> Any:
    """Calls a function with 512 MiB of stack instead of the usual 8.

    The compiler for v6e recurses along chains of operations and overflows the usual stack.
    """
    before = threading.stack_size(512 * 2**20)  # only touched pages use memory
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()
    finally:
        threading.stack_size(before)


def lower_step(config: Config, devices: Sequence[Any], source: Source) -> jax.stages.Lowered:
    """Lowers the trainer's own step of train.batch_size images for `devices`.

    With train.steps_per_call it is a call of one step, with the dataset on the devices.
    """
    platform = devices[0].platform
    model = make_model(config, source.num_classes)
    length = RunLength.of(config, len(source))
    optimizer = make_optimizer(config, length)
    channels, side = channels_of(config, source), config.data.image_size
    state = state_shapes(model, optimizer, config, channels)
    # The values of the weights make no difference to the program, as long as they differ.
    counts = np.arange(1, source.num_classes + 1)
    weights = class_weights(config.loss, counts, model.num_classes)
    step = make_train_step(model, optimizer, config, length, platform, weights)

    count, size = len(devices), config.train.batch_size // len(devices)
    shape = jax.ShapeDtypeStruct
    labels = label_type(source)
    mirrored = {"mirrored": jnp.bool_} if config.augment.flip_alternates else {}
    if config.train.steps_per_call > 1:
        images = shape((len(source), side, side, channels), jnp.uint8)
        data = {"images": images, "labels": shape((len(source), *source.label_shape), labels)}
        kinds = {"indices": jnp.int32, **mirrored}
        choices = {name: shape((count, size, 1), kind) for name, kind in kinds.items()}
        several: Any = data_parallel.parallel_step(
            make_steps(step, platform), devices, replicated=1
        )
        return several.lower(state, data, choices)
    batch = {
        "images": shape((count, size, side, side, channels), jnp.uint8),
        **{name: shape((count, size), kind) for name, kind in mirrored.items()},
        "labels": shape((count, size, *source.label_shape), labels),
    }
    single: Any = data_parallel.parallel_step(step, devices)
    return single.lower(state, batch)


def step_flops(config: Config, source: Source, devices: int) -> float:
    """Floating-point operations of a step on one of `devices` devices."""
    model = make_model(config, source.num_classes)
    size, side = config.train.batch_size // devices, config.data.image_size
    return size * training_flops(model, (1, side, side, channels_of(config, source)))


def _analyze(compiled: Any, config: Config) -> tuple[int, Traffic]:
    """Bytes of memory that a compiled step needs, and what it moves."""
    try:
        memory, text = compiled.memory_analysis(), compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"jax {jax.__version__} cannot read the compiled program; install the libtpu that "
            f"belongs to it, by pip install 'jax[tpu]=={jax.__version__}' ({one_line(error)})"
        ) from error
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return needed, count_traffic(text, config.train.accumulate)
