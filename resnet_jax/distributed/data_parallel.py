"""Data parallelism: the one file that uses pmap.

A step is written for one device and runs on all of them. The state has no device axis, so a
checkpoint fits any number of devices. Batches have one: [D, N / D, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental.layout import Format, Layout

from resnet_jax.errors import ConfigError
from resnet_jax.ops.sharding import AXIS


def parallel_step(
    step: Callable[..., Any],
    devices: Sequence[jax.Device] | None = None,
    replicated: int = 0,
    options: dict[str, str] | None = None,
) -> Callable[..., Any]:
    """Compiles step(state, ..., batch) -> (state, metrics) for all devices.

    The state is donated: its memory is reused for the new state. The outputs must be equal on all
    devices (by `lax.pmean`), because only those of the first device are returned.

    Args:
      step: A pure function for one device, which may use collectives over the axis "batch".
      devices: Devices to use. Default: all.
      replicated: Number of arguments between state and batch that are replicated, not split.
      options: Options of the XLA compiler, in runs of one process only.

    Returns:
      The compiled step. Its batches have a leading axis of local devices.

    Example:
      >>> from jax import lax
      >>> def step(state, batch):
      ...     return state + 1, lax.pmean(batch.mean(), AXIS)
      >>> state, mean = parallel_step(step)(np.float32(0), shard(np.ones(8, np.float32)))
      >>> float(state), float(mean)
      (1.0, 1.0)
    """
    call = jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None,) * (1 + replicated) + (0,),
        out_axes=None,
        donate_argnums=(0,),
        devices=devices,
    )
    if options:
        # `pmap` takes no options. Inside `jit` it does not join the arrays of several processes.
        call = jax.jit(call, donate_argnums=0, compiler_options=options)
    return _awaited(call)


def parallel_sums(
    step: Callable[..., Any],
    devices: Sequence[jax.Device] | None = None,
    outputs: bool = False,
) -> Callable[..., Any]:
    """Compiles step(variables, batch) -> sums for all devices; nothing is donated.

    Args:
      step: A pure function for one device, which sums over the axis "batch" by `lax.psum`.
      devices: Devices to use. Default: all.
      outputs: Whether the step returns (sums, outputs), with outputs for each image.

    Returns:
      The compiled step. Its batches and outputs have a leading axis of local devices.

    Example:
      >>> from jax import lax
      >>> total = parallel_sums(lambda variables, batch: lax.psum(batch.sum(), AXIS))
      >>> float(total(np.float32(0), shard(np.ones(8, np.float32))))
      8.0
    """
    out_axes = (None, 0) if outputs else None
    call = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=out_axes, devices=devices)
    return _awaited(call)


def _awaited(call: Callable[..., Any]) -> Callable[..., Any]:
    """Waits for each call on the CPUs of several processes.

    The collectives of two calls would share a few threads and deadlock.
    """
    if jax.process_count() == 1 or jax.local_devices()[0].platform != "cpu":
        return call
    return lambda *arguments: jax.block_until_ready(call(*arguments))


def with_stop_flag(step: Callable[..., Any]) -> Callable[..., Any]:
    """Adds a stop flag to a step, so that all processes stop after the same step.

    The result takes (batch, flag) instead of batch and adds the metric "stop", the mean of all
    flags: above 0 if any process wants to stop. It is averaged together with the metrics, so it
    needs no communication of its own.

    Example:
      >>> step = lambda state, batch: (state, {"loss": lax.pmean(batch.mean(), AXIS)})
      >>> flags = stop_flags()
      >>> batch = shard(np.zeros(8, np.float32))
      >>> run = parallel_step(with_stop_flag(step))
      >>> [float(run(np.float32(0), (batch, flags[stop]))[1]["stop"]) for stop in (False, True)]
      [0.0, 1.0]
    """

    def flagged(*arguments: Any) -> Any:
        batch, flag = arguments[-1]
        state, metrics = step(*arguments[:-1], batch)
        return state, {**metrics, "stop": lax.pmean(flag[0], AXIS)}

    return flagged


def stop_flags() -> tuple[Any, Any]:
    """The flags (continue, stop) of this host, on its devices."""
    ones = np.ones(jax.local_device_count(), np.float32)
    return shard_batch(0 * ones), shard_batch(ones)


def parallel_outputs(
    function: Callable[..., Any], devices: Sequence[jax.Device] | None = None
) -> Callable[..., Any]:
    """Compiles function(variables, batch) -> outputs for all devices, without communication.

    Batches and outputs have a leading axis of local devices.

    Example:
      >>> double = parallel_outputs(lambda factor, batch: factor * batch)
      >>> double(np.float32(2), shard(np.ones(8, np.float32))).reshape(-1).tolist()
      [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    return jax.pmap(function, axis_name=AXIS, in_axes=(None, 0), devices=devices)


def compile_outputs(
    function: Callable[[Any, jax.Array], jax.Array], variables: Any, batch: jax.ShapeDtypeStruct
) -> Callable[[Any], jax.Array]:
    """`parallel_outputs` for variables that stay and batches of one shape, with nothing left to do.

    The variables lie on this host's devices as the program reads them: the compiler chooses the
    order of their axes. With the usual order, a GPU would transpose every kernel in every call.

    Args:
      function: (variables, batch of one device) -> outputs, without communication.
      variables: NumPy arrays.
      batch: Shape and type of this host's batch, [N, ...].

    Returns:
      The program, of a batch as `shard_batch` returns it, [D, N / D, ...].

    Example:
      >>> batch = np.arange(8, dtype=np.float32)
      >>> spec = jax.ShapeDtypeStruct(batch.shape, batch.dtype)
      >>> program = compile_outputs(lambda factor, x: factor * x, np.float32(2), spec)
      >>> program(shard_batch(batch)).reshape(-1)[:3].tolist()
      [0.0, 2.0, 4.0]
    """
    mesh, devices = _mesh(), jax.local_device_count()
    whole, split = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P(AXIS)))
    on_devices = jax.shard_map(
        lambda variables, part: jax.tree.map(lambda x: x[None], function(variables, part[0])),
        mesh=mesh,
        in_specs=(jax.P(), jax.P(AXIS)),
        out_specs=jax.P(AXIS),
        check_vma=False,
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), variables)
    shape = (devices, batch.shape[0] // devices, *batch.shape[1:])
    jitted = jax.jit(on_devices, in_shardings=(Format(Layout.AUTO, whole), split))
    program = jitted.lower(shapes, jax.ShapeDtypeStruct(shape, batch.dtype)).compile()
    placed = jax.device_put(variables, program.input_formats[0][0])
    return lambda part: program(placed, part)


def shard(batch: Any, devices: int | None = None) -> Any:
    """Reshapes a host's arrays [N, ...] to [D, N / D, ...], by default for all its devices D.

    Example:
      >>> shard({"labels": np.arange(8)})["labels"].shape[0] == jax.local_device_count()
      True
    """
    devices = devices or jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch)


def replicate(state: Any) -> Any:
    """Copies NumPy arrays to each of this host's devices, where a step may donate them.

    The sharding is that of the state that a step returns, so one program is compiled for all steps.

    Example:
      >>> replicate({"step": np.int32(0)})["step"].is_fully_replicated
      True
    """
    return jax.device_put(state, jax.NamedSharding(_mesh(), jax.P()))


def _mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))


def shard_batch(batch: Any) -> Any:
    """Splits a host's arrays [N, ...] over its devices: [D, N / D, ...].

    The transfer is asynchronous, so it overlaps with the previous step.

    Example:
      >>> shard_batch(np.zeros((8, 2))).ndim
      3
    """
    split = shard(batch)
    return jax.device_put(split, jax.NamedSharding(_mesh(), jax.P(AXIS)))


def check_divisible(
    sizes: Mapping[str, int], parts: int = 1, why: str = "", devices: int = 0
) -> None:
    """Checks that global batches can be split evenly over all devices.

    Args:
      sizes: Field name -> global batch size.
      parts: Number that the batch of each device must be a multiple of.
      why: The reason for `parts`, for the error message.
      devices: Number of devices; 0: all.

    Raises:
      ConfigError: Names the field, its value, and the nearest valid sizes.

    Example:
      >>> check_divisible({"train.batch_size": 64 * jax.device_count()})
    """
    devices = devices or jax.device_count()
    unit = devices * parts
    for field, size in sizes.items():
        if size % unit:
            lower, upper = size // unit * unit, (size // unit + 1) * unit
            nearest = f"{lower} or {upper}" if lower else str(upper)
            what = f"{devices} devices" + (f" x {parts} ({why})" if parts > 1 else "")
            raise ConfigError(f"{field} = {size}: must be a multiple of {what}, such as {nearest}")
