"""Normalisation: batch and group norm, and batch norm in one operation with what stands beside it.

Training reads and writes every activation several times, and on an accelerator that memory
traffic, not arithmetic, takes the time. Two identities save passes; both are exact, and the
results are those of the plain order up to rounding:

* A max pool commutes with what increases, so `relu(norm(x))` need only be computed for the
  pixels that a pool after it keeps (`norm_relu_pool`).
* The mean and variance of a 1x1 convolution follow from the mean and the covariance of its
  *input*. Where it widens its input fourfold, as at the end of a bottleneck, the norm is known
  before the convolution is computed, and becomes part of its kernel (`conv_norm`).

docs/performance.md has the measurements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.errors import ModelError
from resnet_jax.models.layers import Conv, Dtype, Initializer, max_pool
from resnet_jax.ops.convolution import ConvOptions, Precision, convolve, once_per_shape
from resnet_jax.ops.sharding import BATCH, WHOLE, over_batch

NormKind = Literal["batch", "group"]
NORM_KINDS: tuple[str, ...] = get_args(NormKind)

# Mean and variance [C], float32.
Moments = tuple[jax.Array, jax.Array]


class Sharing(NamedTuple):
    """Which devices have their moments in common.

    Args:
      axis_name: Their mapped axis; None: each device has its own.
      group_size: Number of neighbours on it that share; None: all of them.
    """

    axis_name: str | None = None
    group_size: int | None = None

    def __call__(self, mean: jax.Array, variance: jax.Array) -> Moments:
        """From the moments of one device to those of all that share them."""
        if self.axis_name is None:
            return mean, variance
        average = functools.partial(
            lax.pmean, axis_name=self.axis_name, axis_index_groups=self._groups(self.axis_name)
        )
        shared = average(mean)
        # The variance within devices, and that of their means.
        return shared, average(variance + jnp.square(mean - shared))

    def devices(self) -> int:
        """How many share."""
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


ALONE = Sharing()


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015), as PyTorch counts it.

    Differs from `flax.linen.BatchNorm` in two points: the running variance is the unbiased one
    (n / (n - 1)), so that statistics equal those of a network trained in PyTorch, and the
    squares are summed of deviations from an estimate of the mean, which is exact for any estimate
    and keeps the one-pass variance accurate when the mean is large beside the spread. The
    estimate is the first image's mean; on a TPU the running mean, because there the sums are
    part of the pass that makes `x`, and the first image's mean would take another one.

    Args:
      momentum: Share of the old running statistics kept each step (PyTorch's 0.1 is 0.9 here).
      epsilon: Added to the variance.
      axis_name: The mapped axis whose devices share their statistics; None: each its own. Not
        needed under `jax.jit` with a sharded batch, where the sums are over all of it anyway.
      group_size: Number of neighbouring devices on that axis that share; None: all of them.
        Under `jax.shard_map` groups need `check_vma=False`.
      scale_init: Initialiser of the scale (gamma).
      dtype: Type of the output; scale, bias and all statistics are float32.

    Returns:
      Called on [N, H, W, C] with `train`: the same shape in `dtype`.

    Raises:
      ModelError: The axis cannot be divided into groups of `group_size` devices.

    Example:
      >>> norm = BatchNorm()
      >>> x = jax.random.normal(jax.random.key(0), (8, 4, 4, 16))
      >>> variables = norm.init(jax.random.key(1), x, train=False)
      >>> y, updates = norm.apply(variables, x, train=True, mutable=["batch_stats"])
      >>> y.shape, sorted(updates["batch_stats"])
      ((8, 4, 4, 16), ['mean', 'var'])
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    group_size: int | None = None
    scale_init: Initializer = nn.initializers.ones
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        kernel: jax.Array | None = None,
        pool: Callable[[jax.Array], jax.Array] | None = None,
        precision: Precision = None,
    ) -> jax.Array:
        """Normalises x; with `kernel` [C, K] the product x @ kernel in its place, multiplied with
        `precision`; with `pool`, which must commute with increasing functions, pool(x) by the
        statistics of x."""
        features = x.shape[-1:] if kernel is None else kernel.shape[-1:]
        scale = self.param("scale", self.scale_init, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)

        mean, variance = running_mean.value, running_var.value
        # A norm with a negative scale decreases: it is an increasing one of -x.
        sign = jnp.ones((), jnp.float32)
        if pool is not None:
            sign = jnp.where(scale < 0, -sign, sign)
        if pool is not None:
            x, mean, scale = x * sign.astype(x.dtype), mean * sign, scale * sign
        if not train:
            x = x if kernel is None else pointwise_product(x, kernel, precision)
            y = normalize(pool(x) if pool else x, mean, variance, scale, bias, self.epsilon)
            return y.astype(self.dtype)

        alone = self.axis_name is None or self.is_initializing()
        sharing = ALONE if alone else Sharing(self.axis_name, self.group_size)
        if kernel is None:
            mean, variance = sharing(*batch_moments(x, mean))
            y = normalize(pool(x) if pool else x, mean, variance, scale, bias, self.epsilon)
        else:
            y, mean, variance = widening_norm(
                *(x, kernel, mean, scale, bias), self.epsilon, sharing, precision
            )
        if not self.is_initializing():
            count = math.prod(x.shape[:3]) * sharing.devices()
            running_mean.value = self._blend(running_mean.value, mean * sign)
            unbiased = variance * (count / max(count - 1, 1))
            running_var.value = self._blend(running_var.value, unbiased)
        return y.astype(self.dtype)

    def _blend(self, running: jax.Array, batch: jax.Array) -> jax.Array:
        return self.momentum * running + (1 - self.momentum) * batch


@functools.partial(once_per_shape, static_argnames="epsilon")
def normalize(
    x: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
) -> jax.Array:
    """[..., C] in units of its standard deviation, times scale plus bias, in float32."""
    return _affine(x.astype(jnp.float32), mean, scale * lax.rsqrt(variance + epsilon), bias)


# What JAX derives for a norm keeps two arrays of deviations as large as x for the backward pass. On
# a TPU, XLA computes them where they are read, but on a CPU it writes them to memory. The rules of
# `_affine` and `_moments` are the same derivatives, made so that x, which is there anyway, is all
# that is kept.
@jax.custom_jvp
def _affine(x: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array) -> jax.Array:
    """(x - mean) * factor + bias."""
    return x * factor + (bias - mean * factor)


@_affine.defjvp
def _affine_tangent(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    x, mean, factor, _ = primals
    dx, dmean, dfactor, dbias = tangents
    tangent = dx * factor + (x - mean) * dfactor + (dbias - dmean * factor)
    return _affine(*primals), tangent


@once_per_shape
@over_batch(WHOLE, WHOLE)
def batch_moments(x: jax.Array, running_mean: jax.Array) -> Moments:
    """Mean and biased variance [C] of x [N, H, W, C] in one pass.

    Args:
      x: Activations of one device.
      running_mean: [C], an estimate of the mean.

    Returns:
      float32.

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
        # Chooses nothing of x, but differs between devices as the other shift does.
        tpu=lambda x, mean: jnp.where(False, x[0, 0, 0], mean),
        default=lambda x, mean: x[0].mean((0, 1)),
    )
    return _moments(x, shift)


@jax.custom_jvp
def _moments(x: jax.Array, shift: jax.Array) -> Moments:
    """Mean and variance, the latter from deviations x - shift; any shift gives the same."""
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
    # A number that is known only when the program runs: XLA keeps the result of a division by it,
    # where products of channels, as with a constant's inverse, are computed anew for every pixel.
    count = math.prod(x.shape[:3]) + 0 * variance
    dmean = dx.sum((0, 1, 2)) / count
    return (mean, variance), (dmean, 2 * (x * dx).sum((0, 1, 2)) / count - 2 * mean * dmean)


@functools.partial(once_per_shape, static_argnames=("epsilon", "sharing", "precision"))
@over_batch(BATCH, WHOLE, WHOLE)
def widening_norm(
    x: jax.Array,
    kernel: jax.Array,
    running_mean: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    sharing: Sharing,
    precision: Precision,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`product_norm`, on a TPU from the moments of its input; the arguments are the same."""

    def chosen(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, epsilon=epsilon, sharing=sharing, precision=precision)

    return lax.platform_dependent(
        *(x, kernel, running_mean, scale, bias),
        tpu=chosen(product_norm_by_input),
        default=chosen(product_norm),
    )


def product_norm(
    x: jax.Array,
    kernel: jax.Array,
    running_mean: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    sharing: Sharing = ALONE,
    precision: Precision = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch norm of x @ kernel, in the order of the words.

    Args:
      x: [N, H, W, C].
      kernel: [C, K], float32.
      running_mean: [K], an estimate of the product's mean.
      scale: [K].
      bias: [K].
      epsilon: Added to the variance.
      sharing: Which devices have their moments in common.
      precision: Of the products of x.

    Returns:
      The normalised product [N, H, W, K] in float32, and its mean and variance [K].
    """
    y = pointwise_product(x, kernel, precision)
    mean, variance = sharing(*batch_moments(y, running_mean))
    return normalize(y, mean, variance, scale, bias, epsilon), mean, variance


def product_norm_by_input(
    x: jax.Array,
    kernel: jax.Array,
    running_mean: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    sharing: Sharing = ALONE,
    precision: Precision = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`product_norm` whose moments come from those of x, so that they are known before it.

    With mean m and covariance V of x, x @ kernel has mean m @ kernel and variance
    diag(kernel^T V kernel). The norm is then a factor and a constant of each output channel: the
    factor goes into the kernel, the constant is added where the product is made, and neither the
    forward nor the backward pass needs the product before the norm.

    Args:
      x: [N, H, W, C]; V has C x C numbers, so C should be less than K.
      kernel: [C, K], float32.
      running_mean: Not needed here.
      scale: [K].
      bias: [K].
      epsilon: Added to the variance.
      sharing: Which devices have their moments in common.
      precision: Of the products of x.

    Returns:
      As `product_norm`.

    Example:
      >>> keys = jax.random.split(jax.random.key(0))
      >>> x, kernel = jax.random.normal(keys[0], (2, 4, 4, 3)), jax.random.normal(keys[1], (3, 8))
      >>> arguments = x, kernel, jnp.zeros(8), jnp.ones(8), jnp.zeros(8), 1e-5
      >>> difference = product_norm_by_input(*arguments)[0] - product_norm(*arguments)[0]
      >>> bool(jnp.abs(difference).max() < 1e-5)
      True
    """
    del running_mean
    # Small matrices, but every output depends on them.
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    input_mean = x.mean((0, 1, 2), dtype=jnp.float32)
    covariance = mean_outer_product(x, precision) - jnp.outer(input_mean, input_mean)
    variance = (product(covariance, kernel) * kernel).sum(0)
    mean, variance = sharing(product(input_mean, kernel), jnp.maximum(variance, 0.0))
    factor = scale * lax.rsqrt(variance + epsilon)
    y = pointwise_product(x, kernel * factor, precision)
    return y.astype(jnp.float32) + (bias - mean * factor), mean, variance


def pointwise_product(x: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
    """The product of x [N, H, W, C] and kernel [C, K], in the type of x: a 1x1 convolution."""
    return convolve(x, kernel.astype(x.dtype)[None, None], ConvOptions(precision=precision))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def mean_outer_product(x: jax.Array, precision: Precision = None) -> jax.Array:
    """The mean of v v^T over all pixels v of x: [N, H, W, C] -> [C, C], float32.

    Example:
      >>> mean_outer_product(jnp.array([1.0, 2.0]).reshape(1, 1, 1, 2)).tolist()
      [[1.0, 2.0], [2.0, 4.0]]
    """
    return _mean_outer_product(x, x, precision)


# The rule that JAX would derive makes two products of x; by symmetry one is enough.
@mean_outer_product.defjvp
def _tangent(
    precision: Precision, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (x_tangent,) = primals, tangents
    half = _mean_outer_product(x, x_tangent, precision)
    return mean_outer_product(x, precision), half + half.T


def _mean_outer_product(x: jax.Array, y: jax.Array, precision: Precision) -> jax.Array:
    pixels = (((0, 1, 2), (0, 1, 2)), ((), ()))
    total = lax.dot_general(x, y, pixels, precision, preferred_element_type=jnp.float32)
    return total / math.prod(x.shape[:3])


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) over 32 groups: no batch statistics, any batch size.

    A layer whose channels 32 does not divide gets their greatest common divisor as the number
    of groups (16 for the 16 channels of the CIFAR stem).

    Args:
      epsilon: Added to the variance.
      scale_init: Initialiser of the scale (gamma).
      dtype: Type of the output; scale, bias and statistics are float32.

    Returns:
      Called on [N, H, W, C] with `train` (which changes nothing): the same shape in `dtype`.

    Example:
      >>> norm = GroupNorm()
      >>> x = jax.random.normal(jax.random.key(0), (1, 4, 4, 64))
      >>> norm.init_with_output(jax.random.key(1), x, train=True)[0].shape
      (1, 4, 4, 64)
    """

    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.ones
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        del train
        channels = x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        groups = math.gcd(32, channels)
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, channels // groups)
        mean = grouped.mean((1, 2, 4), keepdims=True)
        variance = grouped.var((1, 2, 4), keepdims=True)
        normalized = (grouped - mean) * lax.rsqrt(variance + self.epsilon)
        return (normalized.reshape(x.shape) * scale + bias).astype(self.dtype)


def conv_norm(conv: nn.Module, norm: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    """`norm(conv(x), train)`, as one operation where that saves passes over memory.

    Args:
      conv: A convolution that nothing but the norm follows.
      norm: A norm; other than `BatchNorm` it is applied after the convolution.
      x: [N, H, W, C].
      train: As for the norm.

    Returns:
      The normalised convolution.
    """
    if train and isinstance(norm, BatchNorm) and _widens(conv, x.shape[-1]):
        kernel = conv.filters(x.shape[-1])[0, 0]
        return norm(x.astype(conv.dtype), train, kernel=kernel, precision=conv.precision)
    return norm(conv(x), train)


def _widens(conv: nn.Module, channels: int) -> TypeGuard[Conv]:
    """Whether it is a product with so many outputs that its input's covariance is cheap."""
    return (
        isinstance(conv, Conv)
        and conv.kernel_size == conv.stride == conv.groups == 1
        and conv.features >= 2 * channels
    )


def norm_relu_pool(norm: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    """`max_pool(nn.relu(norm(x, train)))`, the end of a stem.

    Args:
      norm: A norm; other than `BatchNorm` it is applied before the pool.
      x: [N, H, W, C].
      train: As for the norm.

    Returns:
      [N, ceil(H / 2), ceil(W / 2), C].
    """
    if isinstance(norm, BatchNorm):
        return nn.relu(norm(x, train, pool=max_pool))
    return max_pool(nn.relu(norm(x, train)))
