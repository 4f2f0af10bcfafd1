"""Batch normalization on arrays, and its fused forms.

Training reads and writes every activation several times, and on an accelerator that memory
traffic, not arithmetic, takes the time. Two identities save passes over memory; both are exact,
so results differ from the plain order only by rounding:

* A max pool commutes with an increasing function, so `relu(norm(x))` is needed only for the pixels
  that a pool after it keeps (`increasing`).
* The mean and variance of a 1x1 convolution follow from the mean and covariance of its *input*.
  Where the convolution widens its input fourfold, as at the end of a bottleneck, the norm is known
  before the convolution is computed, and becomes part of its kernel (`product_norm`).

docs/performance.md has the measurements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.errors import ModelError
from resnet_jax.ops.activation import add_bias
from resnet_jax.ops.convolution import ConvOptions, Precision, convolve, once_per_shape, subsample
from resnet_jax.ops.sharding import BATCH, WHOLE, over_batch

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
POINTWISE = ConvOptions()


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
@over_batch(WHOLE, WHOLE)
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
@over_batch(WHOLE, WHOLE)
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


@functools.partial(once_per_shape, static_argnames=("epsilon", "group", "options"))
@over_batch(BATCH, WHOLE, WHOLE)
def product_norm(
    x: jax.Array,
    kernel: jax.Array,
    running_mean: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    group: SyncGroup = ALONE,
    options: ConvOptions = POINTWISE,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch norm of a 1x1 convolution, for training, by the platform's faster formula.

    Takes x [N, H, W, C], kernel [C, K] in float32, and [K] of each channel. Returns the normalized
    product [N, H / stride, W / stride, K] in the type of x with its mean and variance [K].
    """

    def formula(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, epsilon=epsilon, group=group, options=options)

    from_input, from_output = formula(product_norm_from_input), formula(product_norm_from_output)
    return lax.platform_dependent(
        *(x, kernel, running_mean, scale, bias),
        cpu=from_output,
        # A TPU writes the pixels that the stride keeps to memory before it multiplies them.
        tpu=from_input if options.stride == 1 else from_output,
        default=from_input,
    )


def product_norm_from_output(
    x: jax.Array,
    kernel: jax.Array,
    running_mean: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    group: SyncGroup = ALONE,
    options: ConvOptions = POINTWISE,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`product_norm` in the plain order: the product, its moments, the norm."""
    y = pointwise_product(x, kernel, options)
    mean, variance = group.average(*batch_moments(y, running_mean))
    return normalize(y, mean, variance, scale, bias, epsilon).astype(x.dtype), mean, variance


def product_norm_from_input(
    x: jax.Array,
    kernel: jax.Array,
    running_mean: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    group: SyncGroup = ALONE,
    options: ConvOptions = POINTWISE,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`product_norm` with moments from those of x, so that they are known before the product.

    With mean m and covariance V of x, x @ kernel has mean m @ kernel and variance
    diag(kernel^T V kernel). The norm is then a factor and a constant of each output channel: the
    factor goes into the kernel, the constant is added where the product is made, and neither pass
    needs the product before the norm. V has C x C numbers, so C should be less than K.

    Example:
      >>> keys = jax.random.split(jax.random.key(0))
      >>> x, kernel = jax.random.normal(keys[0], (2, 4, 4, 3)), jax.random.normal(keys[1], (3, 8))
      >>> arguments = x, kernel, jnp.zeros(8), jnp.ones(8), jnp.zeros(8), 1e-5
      >>> y, plain = product_norm_from_input(*arguments)[0], product_norm_from_output(*arguments)[0]
      >>> bool(jnp.abs(y - plain).max() < 1e-5)
      True
    """
    del running_mean
    x = subsample(x, options.stride)
    # Small matrices, but every output depends on them.
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    input_mean = x.mean((0, 1, 2), dtype=jnp.float32)
    mean = product(input_mean, kernel)
    mean_of_squares = (product(mean_outer_product(x, options.precision), kernel) * kernel).sum(0)
    mean, variance = group.average(mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0.0))
    factor = scale * lax.rsqrt(variance + epsilon)
    y = pointwise_product(x, kernel * factor, options._replace(stride=1))
    return add_bias(y, bias - mean * factor), mean, variance


def pointwise_product(x: jax.Array, kernel: jax.Array, options: ConvOptions) -> jax.Array:
    """A 1x1 convolution of x [N, H, W, C] with kernel [C, K], in the type of x."""
    return convolve(x, kernel.astype(x.dtype)[None, None], options)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def mean_outer_product(x: jax.Array, precision: Precision = None) -> jax.Array:
    """The mean of v v^T over all pixels v of x: [N, H, W, C] -> [C, C], float32.

    Example:
      >>> mean_outer_product(jnp.array([1.0, 2.0]).reshape(1, 1, 1, 2)).tolist()
      [[1.0, 2.0], [2.0, 4.0]]
    """
    return _mean_outer_product(x, x, precision)


# JAX's own rule makes two products of x; by symmetry one is enough.
@mean_outer_product.defjvp
def _mean_outer_product_tangent(
    precision: Precision, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (x_tangent,) = primals, tangents
    half = _mean_outer_product(x, x_tangent, precision)
    return mean_outer_product(x, precision), half + half.T


def _mean_outer_product(x: jax.Array, y: jax.Array, precision: Precision) -> jax.Array:
    pixels = (((0, 1, 2), (0, 1, 2)), ((), ()))
    total = lax.dot_general(x, y, pixels, precision, preferred_element_type=jnp.float32)
    return total / math.prod(x.shape[:3])
