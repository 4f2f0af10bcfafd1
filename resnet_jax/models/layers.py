"""The layers every block is made of: convolution and pooling, all NHWC.

Padding is explicit and symmetric, (kernel - 1) / 2 on every side. "SAME" would pad a strided
convolution on one side only and make weights from other frameworks inexact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnet_jax.ops.convolution import ConvOptions, Precision, convolve
from resnet_jax.ops.sharding import BATCH, over_batch

Dtype = Any
Initializer = Callable[..., jax.Array]
ModuleDef = Callable[..., Any]


# Functions of this module, because those that Flax makes cannot be pickled, nor a model with them.
def he_fan_out(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
    """N(0, 2 / fan of the output), which keeps the variance of a ReLU network's gradients.

    He et al. 2015a ("Delving deep into rectifiers"), equation 14.
    """
    return nn.initializers.variance_scaling(2.0, "fan_out", "normal")(key, shape, dtype)


def normal_001(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
    """N(0, 0.01^2), the head's in Goyal et al. 2017, section 5.1."""
    return nn.initializers.normal(0.01)(key, shape, dtype)


# For `nn.Dense`, whose kernel JAX cannot differentiate by where only the images' type has a mesh.
dot_general = over_batch(BATCH)(lax.dot_general)


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
      dtype: Type of the computation; filters are stored in float32.
      precision: Of the products where `dtype` is float32; see `ResNet`.

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
    precision: Precision = None

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.filters(x.shape[-1]).astype(self.dtype)
        options = ConvOptions(self.stride, self.dilation, self.groups, self.precision)
        return convolve(x.astype(self.dtype), kernel, options)

    @nn.compact
    def filters(self, channels: int) -> jax.Array:
        """The filters [kernel_size, kernel_size, channels / groups, features], float32."""
        shape = (self.kernel_size, self.kernel_size, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        return standardize_kernel(kernel) if self.standardize else kernel


@over_batch(BATCH)
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
        return _max_of_windows(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 0)
    return _max_of_windows(x, 1)


def _xla_max_pool(x: jax.Array, border: int) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), ((border, border), (border, border)))


_max_of_windows = jax.custom_jvp(_xla_max_pool, nondiff_argnums=(1,))


@_max_of_windows.defjvp
def _max_of_windows_tangent(
    border: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    edges = ((0, 0), (border, border), (border, border), (0, 0))

    def by_pairs(x: jax.Array) -> jax.Array:
        return max_pool_by_pairs(jnp.pad(x, edges, constant_values=-jnp.inf))

    # On a CPU, XLA's gradient of a window makes four arrays of indices, each as large as x.
    return lax.platform_dependent(
        primals,
        tangents,
        cpu=functools.partial(jax.jvp, by_pairs),
        default=functools.partial(jax.jvp, functools.partial(_xla_max_pool, border=border)),
    )


def max_pool_by_pairs(x: jax.Array) -> jax.Array:
    """The maximum of 3x3 windows with stride 2, taken of two neighbours at a time.

    Values, and gradients down to the choice between equal pixels (the first of a window, row by
    row), are those of `flax.linen.max_pool`.

    Args:
      x: [N, H + 2, W + 2, C], with a border of one pixel.

    Returns:
      [N, ceil(H / 2), ceil(W / 2), C].

    Example:
      >>> max_pool_by_pairs(jnp.arange(25.0).reshape(1, 5, 5, 1))[0, :, :, 0].tolist()
      [[12.0, 14.0], [22.0, 24.0]]
    """
    for axis in (2, 1):
        length = x.shape[axis] - 2
        neighbours = [
            lax.slice_in_dim(x, start, start + length, stride=2, axis=axis) for start in range(3)
        ]
        x = functools.reduce(_larger, neighbours)
    return x


# JAX's own rule would divide the gradient between equal numbers.
@jax.custom_jvp
def _larger(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.maximum(first, second)


@_larger.defjvp
def _larger_tangent(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _larger(*primals), jnp.where(primals[0] >= primals[1], *tangents)


@over_batch(BATCH)
def average_pool_2x2(x: jax.Array, stride: int) -> jax.Array:
    """The 2x2 average in ResNet-D's shortcut (He et al. 2018, Figure 2c).

    Where windows reach past the lower or right edge, those with stride 2 average the pixels they
    have, and those with stride 1 count zeros beyond the edge. That is how timm's published
    networks compute them.

    Args:
      x: [N, H, W, C].
      stride: 2, or 1 where a dilated network keeps its resolution.

    Returns:
      [N, ceil(H / stride), ceil(W / stride), C].

    Example:
      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> average_pool_2x2(x, 2)[0, :, :, 0].tolist()
      [[2.0, 3.5], [6.5, 8.0]]
      >>> average_pool_2x2(x, 1)[0, :, :, 0].tolist()
      [[2.0, 3.0, 1.75], [5.0, 6.0, 3.25], [3.25, 3.75, 2.0]]
    """

    def window_sum(values: jax.Array) -> jax.Array:
        # ceil(side / stride) windows for every side; the last may reach one pixel past the edge.
        edges = (0, 1)
        # A NumPy zero: where it is traced, under jit, JAX does not see that this is a sum, and has
        # no gradient for it.
        return lax.reduce_window(
            values,
            np.zeros((), values.dtype),
            lax.add,
            window_dimensions=(1, 2, 2, 1),
            window_strides=(1, stride, stride, 1),
            padding=((0, 0), edges, edges, (0, 0)),
        )

    if stride == 1:
        return window_sum(x) / 4
    pixels = window_sum(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
    return window_sum(x) / pixels
