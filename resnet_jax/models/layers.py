"""Convolution, stochastic depth and the initializers of a ResNet."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.ops.convolution import ConvOptions, Precision, convolve
from resnet_jax.ops.sharding import BATCH, over_batch

Dtype = Any
Initializer = Callable[..., jax.Array]
ModuleDef = Callable[..., Any]


class ShortHelp(abc.ABCMeta):
    """Metaclass of a module whose `help` shows what they add to `flax.linen.Module`.

    Flax's own methods take a thousand lines, and the fields are described by the docstring. The
    base is that of abstract classes, with which a user's subclass may be combined.
    """

    def __dir__(cls) -> list[str]:
        names = {name for base in cls.__mro__ for name in vars(base) if not name.startswith("__")}
        fields = getattr(cls, "__dataclass_fields__", ())
        return sorted(names.difference(dir(nn.Module), fields, ["scope"]) | {"__call__"})


# Functions of this module, because those that Flax makes cannot be pickled, nor a model with them.
def he_fan_out(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
    """N(0, 2 / fan of the output), which keeps the variance of a ReLU network's gradients.

    He et al. 2015a ("Delving deep into rectifiers"), equation 14.
    """
    return nn.initializers.variance_scaling(2.0, "fan_out", "normal")(key, shape, dtype)


def normal_001(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
    """N(0, 0.01^2), for the head (Goyal et al. 2017, section 5.1)."""
    return nn.initializers.normal(0.01)(key, shape, dtype)


STANDARDIZE_EPSILON = 1e-8  # with which BiT's released networks were trained


def standardize_kernel(kernel: jax.Array) -> jax.Array:
    """Gives each filter of [kernel, kernel, in / groups, out] mean 0 and variance 1.

    Qiao et al. 2019, section 3.
    """
    mean = kernel.mean((0, 1, 2), keepdims=True)
    variance = kernel.var((0, 1, 2), keepdims=True)
    return (kernel - mean) * lax.rsqrt(variance + STANDARDIZE_EPSILON)


class Conv(nn.Module):
    """A square convolution without bias (the norm after it has one).

    Padding is explicit and symmetric, (kernel - 1) / 2 on every side. "SAME" would pad a strided
    convolution on one side only and make weights from other frameworks inexact.

    Args:
      features: Output channels.
      kernel_size: Side of the filter in pixels, odd.
      stride: Step of the output grid in input pixels.
      dilation: Distance of the filter's taps in input pixels.
      groups: Independent groups of channels (cardinality in ResNeXt).
      standardize: Weight standardization, for networks with GroupNorm.
      kernel_init: Initializer of the filters.
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


class StochasticDepth(nn.Module):
    """Drops the residual of some images during training (Huang et al. 2016).

    The residuals that are kept are divided by the probability of keeping them, so evaluation
    changes nothing.

    Args:
      rate: Probability that an image's residual is dropped, in [0, 1).

    Returns:
      Called on [N, H, W, C] with `train`: the same shape. Training needs the rng "dropout".

    Example:
      >>> x = jnp.ones((4, 1, 1, 1))
      >>> StochasticDepth(rate=0.5).apply({}, x, train=False).ravel().tolist()
      [1.0, 1.0, 1.0, 1.0]
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        # One draw for each image: the mask is [N, 1, 1, 1].
        return dropout(nn.Dropout(self.rate, broadcast_dims=(1, 2, 3)), x, train)


def dropout(drop: nn.Dropout, x: jax.Array, train: bool) -> jax.Array:
    """Flax's dropout of x [N, ...], on a mesh with explicit axes too: its mask is not split."""
    if not train or not drop.rate:
        return x

    @over_batch(BATCH)
    def masked(x: jax.Array, key: jax.Array) -> jax.Array:
        return drop(x, deterministic=False, rng=key)

    return masked(x, drop.make_rng(drop.rng_collection))
