"""The layers every block is made of: convolution, normalisation and pooling, all NHWC.

Padding is explicit and symmetric, (kernel - 1) / 2 on every side. "SAME" would pad a strided
convolution on one side only and make weights from other frameworks inexact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.errors import ModelError
from resnet_jax.models.convolution import Geometry, convolve

Dtype = Any
Initializer = Callable[..., jax.Array]
ModuleDef = Callable[..., Any]
NormKind = Literal["batch", "group"]

# He et al. 2015a ("Delving deep into rectifiers") keep the variance of a ReLU network constant
# with N(0, 2 / fan). Counting the fan of the output keeps that of the gradients.
he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def standardize_kernel(kernel: jax.Array, epsilon: float = 1e-8) -> jax.Array:
    """Gives each output channel's filter mean 0 and variance 1 (Qiao et al. 2019, section 3).

    Args:
      kernel: Filters [kernel, kernel, in / groups, out], float32.
      epsilon: Added to the variance; BiT's released networks were trained with 1e-8.

    Returns:
      Filters of the same shape.

    Example:
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 16))
      >>> bool(jnp.abs(standardize_kernel(kernel).mean((0, 1, 2))).max() < 1e-6)
      True
    """
    mean = kernel.mean((0, 1, 2), keepdims=True)
    variance = kernel.var((0, 1, 2), keepdims=True)
    return (kernel - mean) * lax.rsqrt(variance + epsilon)


class Conv(nn.Module):
    """A square convolution without bias (a norm follows it, which has one).

    Args:
      features: Output channels.
      kernel_size: Side of the filter in pixels, odd.
      stride: Step of the output grid in input pixels.
      dilation: Distance of the filter's taps in input pixels.
      groups: Independent groups of channels (cardinality in ResNeXt).
      standardize: Weight standardisation, for networks with GroupNorm.
      kernel_init: Initialiser of the filters.
      dtype: Precision of the computation; filters are stored in float32.

    Returns:
      Called on [N, H, W, C]: [N, ceil(H / stride), ceil(W / stride), features] in `dtype`.

    Example:
      >>> conv = Conv(features=64, kernel_size=7, stride=2)
      >>> images = jnp.zeros((1, 224, 224, 3))
      >>> conv.init_with_output(jax.random.key(0), images)[0].shape
      (1, 112, 112, 64)
    """

    features: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    standardize: bool = False
    kernel_init: Initializer = he_fan_out
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        if self.standardize:
            kernel = standardize_kernel(kernel)
        geometry = Geometry(self.stride, self.dilation, self.groups)
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), geometry)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015), as PyTorch counts it.

    Differs from `flax.linen.BatchNorm` in two points: the running variance is the unbiased one
    (n / (n - 1)), so that statistics equal those of a network trained in PyTorch, and the sums
    are taken of the deviations from the first image's mean, which is exact for any shift and
    keeps the one-pass variance accurate when the mean is large beside the spread.

    Args:
      momentum: Share of the old running statistics kept each step (PyTorch's 0.1 is 0.9 here).
      epsilon: Added to the variance.
      axis_name: The mapped axis whose devices share their statistics; None: each its own. Not
        needed under `jax.jit` with a sharded batch, where the sums are over all of it anyway.
      group_size: Number of neighbouring devices on that axis that share; None: all of them.
        Under `jax.shard_map` groups need `check_vma=False`.
      scale_init: Initialiser of the scale (gamma).
      dtype: Precision of the output; scale, bias and all statistics are float32.

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
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1:]
        scale = self.param("scale", self.scale_init, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)

        mean, variance = running_mean.value, running_var.value
        if train:
            mean, variance, count = self._batch_statistics(x)
            if not self.is_initializing():
                unbiased = variance * (count / max(count - 1, 1))
                running_mean.value = self._blend(running_mean.value, mean)
                running_var.value = self._blend(running_var.value, unbiased)
        multiplier = scale * lax.rsqrt(variance + self.epsilon)
        return ((x.astype(jnp.float32) - mean) * multiplier + bias).astype(self.dtype)

    def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """Mean and biased variance [C] over the batch, all sharing devices together."""
        x = x.astype(jnp.float32)
        shift = lax.stop_gradient(x[0].mean((0, 1)))
        deviation = x - shift
        offset, mean_of_squares = deviation.mean((0, 1, 2)), jnp.square(deviation).mean((0, 1, 2))
        # Rounding can leave a constant channel with a variance just below zero.
        variance = jnp.maximum(mean_of_squares - jnp.square(offset), 0.0)
        mean = offset + shift
        count = math.prod(x.shape[:3])
        if self.axis_name is not None and not self.is_initializing():
            groups = self._device_groups()
            average = functools.partial(
                lax.pmean, axis_name=self.axis_name, axis_index_groups=groups
            )
            own_mean, mean = mean, average(mean)
            # The variance within devices, and that of their means.
            variance = average(variance + jnp.square(own_mean - mean))
            count *= lax.psum(1, self.axis_name) if groups is None else len(groups[0])
        return mean, variance, count

    def _device_groups(self) -> list[list[int]] | None:
        if self.group_size is None:
            return None
        devices = lax.psum(1, self.axis_name)
        if self.group_size < 1 or devices % self.group_size:
            raise ModelError(
                f"bn_group_size = {self.group_size} does not divide the {devices} devices of "
                f"axis {self.axis_name!r}; choose one of their divisors"
            )
        firsts = range(0, devices, self.group_size)
        return [list(range(first, first + self.group_size)) for first in firsts]

    def _blend(self, running: jax.Array, batch: jax.Array) -> jax.Array:
        return self.momentum * running + (1 - self.momentum) * batch


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) over 32 groups: no batch statistics, any batch size.

    A layer whose channels 32 does not divide gets their greatest common divisor as the number
    of groups (16 for the 16 channels of the CIFAR stem).

    Args:
      epsilon: Added to the variance.
      scale_init: Initialiser of the scale (gamma).
      dtype: Precision of the output; scale, bias and statistics are float32.

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


NORM_KINDS: tuple[str, ...] = get_args(NormKind)


def max_pool(x: jax.Array, zero_padding: bool = False) -> jax.Array:
    """The stem's 3x3 max pool with stride 2 (He et al. 2015, Table 1).

    Args:
      x: [N, H, W, C].
      zero_padding: Count the border as 0 instead of leaving it out; BiT does, and it matters
        there because no ReLU comes before the pool.

    Returns:
      [N, ceil(H / 2), ceil(W / 2), C].

    Example:
      >>> max_pool(jnp.zeros((1, 112, 112, 64))).shape
      (1, 56, 56, 64)
    """
    if zero_padding:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return nn.max_pool(x, (3, 3), (2, 2), "VALID")
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def average_pool_2x2(x: jax.Array, stride: int, dilation: int) -> jax.Array:
    """The 2x2 average in ResNet-D's shortcut (He et al. 2018, Figure 2c).

    Windows that reach past the lower or right edge average the pixels they have.

    Args:
      x: [N, H, W, C].
      stride: 2, or 1 where a dilated network keeps its resolution.
      dilation: Distance of the four pixels on the input grid.

    Returns:
      [N, ceil(H / stride), ceil(W / stride), C].

    Example:
      >>> average_pool_2x2(jnp.arange(9.0).reshape(1, 3, 3, 1), 2, 1)[0, :, :, 0].tolist()
      [[2.0, 3.5], [6.5, 8.0]]
    """

    def window_sum(values: jax.Array) -> jax.Array:
        # ceil(H / stride) windows, the last of which starts at a multiple of the stride.
        beyond = [(-(-side // stride) - 1) * stride + dilation + 1 - side for side in x.shape[1:3]]
        padding = [(0, 0), *((0, max(extra, 0)) for extra in beyond), (0, 0)]
        return lax.reduce_window(
            values,
            jnp.zeros((), values.dtype),
            lax.add,
            window_dimensions=(1, 2, 2, 1),
            window_strides=(1, stride, stride, 1),
            padding=padding,
            window_dilation=(1, dilation, dilation, 1),
        )

    pixels = window_sum(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
    return window_sum(x) / pixels
