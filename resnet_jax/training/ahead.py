"""The training step, compiled ahead of time for TPUs that are not here."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.data.sources import Source
from resnet_jax.errors import ConfigError, one_line
from resnet_jax.training import parallel
from resnet_jax.training.chips import Slice
from resnet_jax.training.config import Config
from resnet_jax.training.optimizer import Length, make_optimizer
from resnet_jax.training.program import traffic
from resnet_jax.training.setup import channels_of, make_model
from resnet_jax.training.state import state_shapes
from resnet_jax.training.step import make_steps, make_train_step

# libtpu asks the machine what TPU it has; here it is to hold its peace and the lock for itself.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
# "... required for HLO temporaries (20.00G) exceeds available HBM (15.75G)", or, of older
# compilers, "Used 20.00G of 15.75G hbm".
_SHORTAGE = re.compile(
    r"([\d.]+)([KMGT]?)\)? (?:exceeds available HBM|of) \(?([\d.]+)([KMGT]?)", re.IGNORECASE
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler tells of one device's step.

    Args:
      fits: Whether it can be loaded.
      needed: HBM in bytes: state, batch, temporaries and the program; 0: not known.
      limit: HBM in bytes that programs may use; 0: not known.
      flops: Of a step.
      hbm_traffic: Bytes to and from HBM in a step.
      reduced: Bytes that all-reduces sum in a step.
      reductions: All-reduces in a step.
      seconds: Time that compiling took.
    """

    fits: bool
    needed: int = 0
    limit: int = 0
    flops: float = 0.0
    hbm_traffic: int = 0
    reduced: int = 0
    reductions: int = 0
    seconds: float = 0.0


def tpu_compiler(part: Slice, source: Source) -> Callable[[Config], Program]:
    """What compiles training steps for a slice.

    Args:
      part: The slice.
      source: The size of the data set.

    Returns:
      compile_step(config) -> Program.

    Raises:
      ConfigError: libtpu is not installed, is in use, or knows no such slice.
    """
    devices = slice_devices(part)

    def compile_step(config: Config) -> Program:
        start = time.monotonic()
        lowered = lower_step(config, devices, source)
        try:
            compiled = _with_deep_stack(lowered.compile)
        except jax.errors.JaxRuntimeError as error:
            needed, limit = memory_shortage(str(error))
            return Program(False, needed, limit, seconds=time.monotonic() - start)
        return _program(compiled, config, part, time.monotonic() - start)

    return compile_step


def _with_deep_stack(function: Callable[[], Any]) -> Any:
    """Runs a function where it may call itself far deeper than on the usual 8 MiB of stack.

    The compiler for v6e does, along the chain of operations, and dies without a word.
    """
    before = threading.stack_size(512 * 2**20)  # only what is used becomes memory
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()
    finally:
        threading.stack_size(before)


def slice_devices(part: Slice) -> Sequence[Any]:
    """Devices of a slice to compile for.

    Args:
      part: The slice.

    Returns:
      As `jax.devices()` would give there.

    Raises:
      ConfigError: libtpu is not installed, is in use, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "libtpu is not installed, which compiles for TPUs (no TPU is needed): pip install "
            "'jax[tpu]', or this package's extra 'plan'"
        )
    from jax.experimental import topologies

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {"chip_config_name": part.chip.libtpu_config} if part.chip.libtpu_config else {}
    try:
        found = topologies.get_topology_desc(part.name, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(_topology_fault(part, str(error))) from error
    return found.devices


def _topology_fault(part: Slice, message: str) -> str:
    if "lockfile" in message or "already in use" in message:
        return (
            "libtpu is in use by another process, and serves one at a time; try again when that "
            "has ended. On a machine without a TPU, ALLOW_MULTIPLE_LIBTPU_LOAD=1 lets several plan"
        )
    return f"--topology={part.name}: libtpu has no such slice ({one_line(message)})"


def lower_step(config: Config, devices: Sequence[Any], source: Source) -> jax.stages.Lowered:
    """The very step that training takes, ready to be compiled.

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
    length = Length.of(config, len(source))
    optimizer = make_optimizer(config, length)
    channels, side = channels_of(config, source), config.data.image_size
    state = state_shapes(model, optimizer, config, channels)
    step = make_train_step(model, optimizer, config, length, platform)

    count, size = len(devices), config.train.batch_size // len(devices)
    shape = jax.ShapeDtypeStruct
    mirrored = {"mirrored": jnp.bool_} if config.augment.flip_alternates else {}
    if config.train.steps_per_call > 1:
        images = shape((len(source), side, side, channels), jnp.uint8)
        data = {"images": images, "labels": shape((len(source),), jnp.int32)}
        kinds = {"indices": jnp.int32, **mirrored}
        choices = {name: shape((count, size, 1), kind) for name, kind in kinds.items()}
        several: Any = parallel.data_parallel(make_steps(step, platform), devices, whole=1)
        return several.lower(state, data, choices)
    batch = {
        "images": shape((count, size, side, side, channels), jnp.uint8),
        **{name: shape((count, size), kind) for name, kind in mirrored.items()},
        "labels": shape((count, size), jnp.int32),
    }
    single: Any = parallel.data_parallel(step, devices)
    return single.lower(state, batch)


def _program(compiled: Any, config: Config, part: Slice, seconds: float) -> Program:
    parts = config.train.accumulate
    try:
        memory, moved = compiled.memory_analysis(), traffic(compiled.as_text(), parts)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"libtpu's program cannot be read by jax {jax.__version__}; take the libtpu that "
            f"belongs to it, by pip install 'jax[tpu]=={jax.__version__}' ({one_line(error)})"
        ) from error
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    limit = part.chip.hbm // part.chip.devices
    return Program(
        fits=needed <= limit,
        needed=needed,
        limit=limit,
        # The compiler counts a loop's work once. What is not in it, the update, is next to nothing.
        flops=compiled.cost_analysis()["flops"] * parts,
        hbm_traffic=moved.hbm,
        reduced=moved.reduced,
        reductions=moved.reductions,
        seconds=seconds,
    )


def memory_shortage(message: str) -> tuple[int, int]:
    """What the compiler says when a program does not fit.

    Args:
      message: Of its error.

    Returns:
      Bytes that are needed and that there are; 0 where it does not say.

    Raises:
      ConfigError: It says something else.

    Example:
      >>> memory_shortage("RESOURCE_EXHAUSTED: ... (20.00G) exceeds available HBM (15.75G)")
      (21474836480, 16911433728)
    """
    if "RESOURCE_EXHAUSTED" not in message:
        raise ConfigError(f"libtpu cannot compile the step: {one_line(message)[:500]}")
    found = _SHORTAGE.search(message)
    if not found:
        return 0, 0
    needed, unit, limit, other = found.groups()
    return round(float(needed) * _UNITS[unit]), round(float(limit) * _UNITS[other])
