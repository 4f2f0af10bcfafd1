"""Batch normalization on arrays, and its fused forms.

Training reads and writes every activation several times, and on an accelerator that memory
traffic, not arithmetic, takes the time. What saves passes over memory is exact, so results differ
from the plain order only by rounding:

* Norm and ReLU keep only their input for the backward pass (`normalize`).
* A max pool commutes with an increasing function, so `relu(norm(x))` is needed only for the pixels
  that a pool after it keeps (`increasing`).
* The norm of a 1x1 convolution may be known before the convolution (`product_norm.py`).

docs/notes has the measurements.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.errors import ModelError
from resnet_jax.ops.convolution import once_per_shape
from resnet_jax.ops.sharding import REPLICATED, over_batch

# Mean and variance [C], float32.
Moments = tuple[jax.Array, jax.Array]


class SyncGroup(NamedTuple):
    """The devices that share batch statistics: neighbors on a mapped axis.

    Args:
      axis_name: The axis. None: each device has its own statistics.
      group_size: Devices in a group. None: all of the axis.
    """

    axis_name: str | None = None
    group_size: int | None = None

    def average(self, mean: jax.Array, variance: jax.Array) -> Moments:
        """The moments of the group's images, from those of each device's."""
        if self.axis_name is None:
            return mean, variance
        average = functools.partial(
            lax.pmean, axis_name=self.axis_name, axis_index_groups=self._groups(self.axis_name)
        )
        shared = average(mean)
        # The variance within devices plus that of their means.
        return shared, average(variance + jnp.square(mean - shared))

    def device_count(self) -> int:
        """Devices in a group."""
        if self.axis_name is None:
            return 1
        return self.group_size or lax.psum(1, self.axis_name)

    def _groups(self, axis_name: str) -> list[list[int]] | None:
        if self.group_size is None:
            return None
        devices = lax.psum(1, axis_name)
        if self.group_size < 1 or devices % self.group_size:
            raise ModelError(
                f"bn_group_size = {self.group_size} does not divide the {devices} devices of "
                f"axis {axis_name!r}; choose one of their divisors"
            )
        firsts = range(0, devices, self.group_size)
        return [list(range(first, first + self.group_size)) for first in firsts]


ALONE = SyncGroup()


@functools.partial(once_per_shape, static_argnames=("epsilon", "relu"))
def normalize(
    x: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    relu: bool = False,
) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias in float32; x is [..., C], the rest [C].

    Ioffe & Szegedy 2015, Algorithm 1. With `relu`, negative results become 0.
    """
    return _affine(x.astype(jnp.float32), mean, scale * lax.rsqrt(variance + epsilon), bias, relu)


# For the backward pass, JAX's derivative of a norm keeps two arrays of deviations as large as x,
# and that of a ReLU keeps its argument. On a TPU, XLA computes the deviations where they are read,
# but on a CPU it writes them to memory, and on a GPU it writes the argument. The rules of `_affine`
# and `_moments` are the same derivatives, arranged to keep only x, which is stored anyway.
@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _affine(
    x: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array, relu: bool
) -> jax.Array:
    """(x - mean) * factor + bias, or with `relu` 0 where that is negative."""
    y = x * factor + (bias - mean * factor)
    return jnp.maximum(y, 0) if relu else y


@_affine.defjvp
def _affine_tangent(
    relu: bool, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    x, mean, factor, _ = primals
    dx, dmean, dfactor, dbias = tangents
    y = _affine(*primals, relu=False)
    dy = dx * factor + (x - mean) * dfactor + (dbias - dmean * factor)
    return (jnp.maximum(y, 0), jnp.where(y > 0, dy, 0)) if relu else (y, dy)


@once_per_shape
@over_batch(REPLICATED, REPLICATED)
def batch_moments(x: jax.Array, running_mean: jax.Array) -> Moments:
    """Mean and biased variance [C] of one device's x [N, H, W, C], in one pass.

    The squares are summed of deviations from an estimate of the mean. Any estimate gives the exact
    variance, and a near one keeps it accurate where the mean is large beside the spread. On a CPU
    the estimate is the first image's mean, which is near from the first step on. Elsewhere it is
    the running mean, because the first image's mean takes another pass over x: on a TPU that keeps
    the sums out of the pass that makes x, on a GPU it is one more kernel.

    Example:
      >>> x = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
      >>> mean, variance = batch_moments(x, jnp.zeros(1))
      >>> mean.item(), variance.item()
      (2.0, 1.0)
    """
    x = x.astype(jnp.float32)
    # Constants from the start: to differentiate the choice would take a tenth of the tracing.
    shift = lax.platform_dependent(
        *lax.stop_gradient((x, running_mean)),
        cpu=lambda x, mean: x[0].mean((0, 1)),
        # Selects nothing of x, but makes the shift differ between devices as the other one does.
        default=lambda x, mean: jnp.where(False, x[0, 0, 0], mean),
    )
    return _moments(x, shift)


@jax.custom_jvp
def _moments(x: jax.Array, shift: jax.Array) -> Moments:
    mean, mean_of_squares = x.mean((0, 1, 2)), jnp.square(x - shift).mean((0, 1, 2))
    # Rounding can leave a constant channel with a variance just below zero.
    return mean, jnp.maximum(mean_of_squares - jnp.square(mean - shift), 0.0)


@_moments.defjvp
def _moments_tangent(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[Moments, Moments]:
    x, _ = primals
    dx, _ = tangents
    mean, variance = _moments(*primals)
    # A number known only when the program runs: XLA keeps the result of a division by it, where it
    # would compute products of channels, as with a constant's inverse, anew for every pixel.
    count = math.prod(x.shape[:3]) + 0 * variance
    dmean = dx.sum((0, 1, 2)) / count
    return (mean, variance), (dmean, 2 * (x * dx).sum((0, 1, 2)) / count - 2 * mean * dmean)


def increasing(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x * sign, scale * sign, sign), where the norm of x with `scale` decreases in x for sign -1.

    A norm with a negative scale is an increasing norm of -x. With all scales positive,
    `normalize(max_pool(x), ...)` equals `max_pool(normalize(x, ...))`.
    """
    sign = jnp.ones((), jnp.float32)
    sign = jnp.where(scale < 0, -sign, sign)
    return x * sign.astype(x.dtype), scale * sign, sign


@once_per_shape
@over_batch(REPLICATED, REPLICATED)
def increasing_moments(x: jax.Array, running_mean: jax.Array, sign: jax.Array) -> Moments:
    """`batch_moments` of x * sign, where x is [N, H, W, C] and the rest [C]."""

    def of_product(x: jax.Array, running_mean: jax.Array, sign: jax.Array) -> Moments:
        return batch_moments(x * sign.astype(x.dtype), running_mean * sign)

    def of_x(x: jax.Array, running_mean: jax.Array, sign: jax.Array) -> Moments:
        mean, variance = batch_moments(x, running_mean)
        return mean * sign, variance

    # XLA for GPUs would compute running_mean * sign together with what follows from the sum of x,
    # and then needs a second pass over x for the squares.
    formulas = {"cuda": of_x, "rocm": of_x}
    return lax.platform_dependent(x, running_mean, sign, **formulas, default=of_product)
