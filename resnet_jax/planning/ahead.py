"""The training step, compiled ahead of time for devices that are not here."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config.model import make_model
from resnet_jax.config.schema import Config
from resnet_jax.data.memory import label_type
from resnet_jax.data.sources.opening import Source
from resnet_jax.distributed import data_parallel
from resnet_jax.errors import ConfigError, one_line
from resnet_jax.models.summary import training_flops
from resnet_jax.planning import gpu, tpu
from resnet_jax.planning.program import traffic
from resnet_jax.planning.topology import Topology
from resnet_jax.training.class_balance import class_weights
from resnet_jax.training.inputs import channels_of
from resnet_jax.training.optimizer import RunLength, make_optimizer
from resnet_jax.training.state import state_shapes
from resnet_jax.training.step import make_train_step
from resnet_jax.training.step_program import make_steps


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled step of one device.

    Args:
      fits: Whether it fits into the device's memory.
      needed: Bytes of memory for state, batch, temporaries and the program; 0: not known.
      limit: Bytes of memory that programs may use; 0: not known.
      flops: Floating-point operations of a step, as the model counts them.
      traffic: Bytes that a step moves between the chip and its memory.
      reduced: Bytes that the all-reduces of a step sum.
      reductions: All-reduces of a step.
      kernels: Kernels that a step launches; 0 on a TPU.
      seconds: Time that compiling took.
    """

    fits: bool
    needed: int = 0
    limit: int = 0
    flops: float = 0.0
    traffic: int = 0
    reduced: int = 0
    reductions: int = 0
    kernels: int = 0
    seconds: float = 0.0


def step_compiler(topology: Topology, source: Source) -> Callable[[Config], Program]:
    """Makes what compiles training steps for a topology.

    Args:
      topology: TPUs or GPUs.
      source: The size of the data set.

    Returns:
      compile_step(config) -> Program.

    Raises:
      ConfigError: What compiles for them is not installed, is in use, or does not know them.
    """
    on_gpu = topology.accelerator.platform == "gpu"
    devices = gpu.gpu_devices(topology) if on_gpu else tpu.tpu_devices(topology)
    options = gpu.COMPILER_OPTIONS if on_gpu else None
    limit = gpu.memory_pool(topology) if on_gpu else topology.accelerator.memory

    print(f"compiling for {topology.name}: minutes for a large network", file=sys.stderr)

    def compile_step(config: Config) -> Program:
        start = time.monotonic()
        lowered = lower_step(config, devices, source)
        try:
            compiled = _with_deep_stack(lambda: lowered.compile(options))
        except jax.errors.JaxRuntimeError as error:
            # A GPU's compiler does not refuse a large program; there it is a kernel that fails.
            if on_gpu or "RESOURCE_EXHAUSTED" not in str(error):
                raise ConfigError(
                    f"--topology={topology.name}: the compiler fails on this training step: "
                    f"{one_line(error)[:500]}"
                ) from error
            needed, available = tpu.memory_shortage(str(error))
            return Program(False, needed, available, seconds=time.monotonic() - start)
        program = _program(compiled, config, limit)
        flops = step_flops(config, source, len(devices))
        return dataclasses.replace(program, flops=flops, seconds=time.monotonic() - start)

    return compile_step


def _with_deep_stack(function: Callable[[], Any]) -> Any:
    """Calls a function with 512 MiB of stack instead of the usual 8.

    The compiler for v6e recurses along the chain of operations, and crashes without it.
    """
    before = threading.stack_size(512 * 2**20)  # only what is used becomes memory
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()
    finally:
        threading.stack_size(before)


def lower_step(config: Config, devices: Sequence[Any], source: Source) -> jax.stages.Lowered:
    """Lowers the step that training takes.

    Args:
      config: The configuration of the run.
      devices: What to compile for.
      source: The size of the data set.

    Returns:
      The step of train.batch_size images on all devices; with train.steps_per_call, of one step
      of a call, with the data set on the devices.
    """
    platform = devices[0].platform
    model = make_model(config, source.num_classes)
    length = RunLength.of(config, len(source))
    optimizer = make_optimizer(config, length)
    channels, side = channels_of(config, source), config.data.image_size
    state = state_shapes(model, optimizer, config, channels)
    # Which weights makes no difference to the program, as long as they differ.
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
        several: Any = data_parallel.parallel_step(make_steps(step, platform), devices, whole=1)
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


def _program(compiled: Any, config: Config, limit: int) -> Program:
    try:
        memory, text = compiled.memory_analysis(), compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"jax {jax.__version__} cannot read the compiled program; install the libtpu that "
            f"belongs to it, by pip install 'jax[tpu]=={jax.__version__}' ({one_line(error)})"
        ) from error
    moved = traffic(text, config.train.accumulate)
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Program(
        fits=needed <= limit,
        needed=needed,
        limit=limit,
        traffic=moved.memory,
        reduced=moved.reduced,
        reductions=moved.reductions,
        kernels=moved.operations,
    )
