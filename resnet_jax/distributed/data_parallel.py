"""Devices and hosts: the one file that says pmap.

A step is written for one device; here it runs on all of them. State goes in and comes out without
an axis for devices, so a checkpoint fits any number of them. Batches have one: [D, N / D, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from resnet_jax.errors import ConfigError
from resnet_jax.ops.sharding import AXIS


def parallel_step(
    step: Callable[..., Any],
    devices: Sequence[jax.Device] | None = None,
    whole: int = 0,
) -> Callable[..., Any]:
    """Runs a step(state, batch) -> (state, metrics) on all devices, each with its share.

    The state is donated: its memory becomes the new state's. Whatever the step returns must be
    equal on all devices (by `lax.pmean`), because only the first device's is seen.

    Args:
      step: A pure function that may use collectives over the axis "batch".
      devices: Which; None: all.
      whole: Arguments between state and batch that every device gets whole, by `place`.

    Returns:
      The compiled step; batches have a leading axis of local devices.

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
        in_axes=(None,) * (1 + whole) + (0,),
        out_axes=None,
        donate_argnums=(0,),
        devices=devices,
    )
    return _awaited(call)


def parallel_sums(
    step: Callable[..., Any],
    devices: Sequence[jax.Device] | None = None,
    outputs: bool = False,
) -> Callable[..., Any]:
    """Runs a step(variables, batch) -> sums on all devices; nothing is donated.

    Args:
      step: A pure function that sums over the axis "batch" by `lax.psum`.
      devices: Which; None: all.
      outputs: The step returns (sums, outputs), whose outputs have an axis of images.

    Returns:
      The compiled step; batches and outputs have a leading axis of local devices.

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
    """On the CPUs of several processes, one call at a time.

    The collectives of two calls would share a few threads, and wait for each other for ever.
    """
    if jax.process_count() == 1 or jax.local_devices()[0].platform != "cpu":
        return call
    return lambda *arguments: jax.block_until_ready(call(*arguments))


def with_stop_flag(step: Callable[..., Any]) -> Callable[..., Any]:
    """Lets every process know, at the same step, whether one of them wants to stop.

    The flag travels with the metrics' means, so it costs no round of its own.

    Args:
      step: step(state, ..., batch) -> (state, metrics) of one device.

    Returns:
      The same, with batch = (batch, flag) and "stop" among the metrics: above 0 where the flag of
      any device is.

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
    """This host's flags, on its devices for good: (go on, stop)."""
    ones = np.ones(jax.local_device_count(), np.float32)
    return shard_batch(0 * ones), shard_batch(ones)


def parallel_outputs(
    function: Callable[..., Any], devices: Sequence[jax.Device] | None = None
) -> Callable[..., Any]:
    """Runs a function(variables, batch) -> outputs on all devices, each image by itself.

    Args:
      function: Pure; its outputs have an axis of images.
      devices: Which; None: all.

    Returns:
      The compiled function; batches and outputs have a leading axis of local devices.

    Example:
      >>> double = parallel_outputs(lambda factor, batch: factor * batch)
      >>> double(np.float32(2), shard(np.ones(8, np.float32))).reshape(-1).tolist()
      [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    return jax.pmap(function, axis_name=AXIS, in_axes=(None, 0), devices=devices)


def shard(batch: Any, devices: int | None = None) -> Any:
    """Splits a host's batch over its devices.

    Args:
      batch: Arrays [N, ...], N a multiple of the number of devices.
      devices: How many; None: all of this host.

    Returns:
      Arrays [D, N / D, ...].

    Example:
      >>> shard({"labels": np.arange(8)})["labels"].shape[0] == jax.local_device_count()
      True
    """
    devices = devices or jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch)


def replicate(state: Any) -> Any:
    """Puts a state on this host's devices, as the step gives it back: one program fits all steps.

    Args:
      state: NumPy arrays.

    Returns:
      Arrays of their own, which the step may take over.

    Example:
      >>> replicate({"step": np.int32(0)})["step"].is_fully_replicated
      True
    """
    return jax.device_put(state, jax.NamedSharding(_mesh(), jax.P()))


def _mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))


def shard_batch(batch: Any) -> Any:
    """Splits a host's batch over its devices and starts to send it to them.

    Called ahead of the step, so that the transfer runs beside the step before.

    Args:
      batch: Arrays [N, ...], N a multiple of the number of local devices.

    Returns:
      Arrays [D, N / D, ...] as the compiled step expects them.

    Example:
      >>> shard_batch(np.zeros((8, 2))).ndim
      3
    """
    split = shard(batch)
    return jax.device_put(split, jax.NamedSharding(_mesh(), jax.P(AXIS)))


def check_divisible(
    sizes: Mapping[str, int], parts: int = 1, why: str = "", devices: int = 0
) -> None:
    """Checks that global batches can be split over all devices.

    Args:
      sizes: Field names to global batch sizes.
      parts: Number that each device's share must be a multiple of.
      why: What that number comes from.
      devices: How many; 0: JAX's own.

    Raises:
      ConfigError: Names the field, its value, and the nearest sizes that do.

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
