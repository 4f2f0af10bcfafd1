"""Channel attention: gates that scale each channel of a residual."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.layers import Dtype
from resnet_jax.ops.convolution import Precision
from resnet_jax.ops.sharding import dot_general


def reduced_channels(channels: int, ratio: float) -> int:
    """Channels of the bottleneck in `SqueezeExcite`: a multiple of 8, at least 8."""
    return max(8, int(channels * ratio + 4) // 8 * 8)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all channels' means (Hu et al. 2018).

    Args:
      ratio: Fraction of the channels that the bottleneck keeps, rounded to a multiple of 8.
      dtype: Type of the computation.
      precision: Of the products where `dtype` is float32; see `ResNet`.

    Returns:
      Called on [N, H, W, C]: the same shape.

    Example:
      >>> x = jnp.ones((1, 4, 4, 64))
      >>> SqueezeExcite(ratio=0.25).init_with_output(jax.random.key(0), x)[0].shape
      (1, 4, 4, 64)
    """

    ratio: float
    dtype: Dtype = jnp.float32
    precision: Precision = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        reduced = reduced_channels(channels, self.ratio)
        gate = x.mean((1, 2), dtype=jnp.float32)  # [N, C]
        dense = functools.partial(
            nn.Dense, dtype=self.dtype, precision=self.precision, dot_general=dot_general
        )
        gate = nn.relu(dense(reduced, name="reduce")(gate))  # [N, reduced]
        gate = nn.sigmoid(dense(channels, name="expand")(gate))  # [N, C]
        return x * gate[:, None, None, :].astype(x.dtype)


class EfficientChannelAttention(nn.Module):
    """Scales each channel by a gate computed from the means of its neighbors (Wang et al. 2020).

    The gate convolves the means along the channels. Its kernel grows with their number C as in
    the paper: the odd number from log2(C) / 2 + 1/2 up, and at least 3.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = int((math.log2(x.shape[-1]) + 1) / 2)
        conv = ChannelConv(max(size if size % 2 else size + 1, 3), name="conv")
        gate = nn.sigmoid(conv(x.mean((1, 2), dtype=jnp.float32)))  # [N, C]
        return x * gate[:, None, None, :].astype(x.dtype)


class ChannelConv(nn.Module):
    """Convolves [N, C] along the channels with one filter of odd size, padded with zeros."""

    kernel_size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, reach, channels = (self.kernel_size, 1, 1), self.kernel_size // 2, x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        padded = jnp.pad(x, ((0, 0), (reach, reach)))
        taps = (padded[:, k : k + channels] * kernel[k, 0, 0] for k in range(self.kernel_size))
        return functools.reduce(jnp.add, taps)
