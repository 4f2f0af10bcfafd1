"""Stems: the layers between the image and the first residual stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax

from resnet_jax.models.layers import Conv, ModuleDef
from resnet_jax.models.norms import BatchNorm, norm_relu, norm_relu_pool
from resnet_jax.ops.pooling import max_pool


class ImageNetStem(nn.Module):
    """7x7 convolution with stride 2, then a 3x3 max pool with stride 2 (He et al. 2015, Table 1).

    Args:
      features: Output channels.
      activate: Norm and ReLU between convolution and pool. Pre-activation networks leave them
        to the first block.
      zero_pool_padding: Pad the max pool with zeros, as BiT does.
      conv_cls: Makes a convolution: `conv_cls(features, kernel_size, stride=..., name=...)`.
      norm_cls: Makes a norm: `norm_cls(name=...)`, called with `(x, train)`.

    Returns:
      Called on images [N, H, W, 3] with `train`: [N, H/4, W/4, features].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.zeros((1, 224, 224, 3))
      >>> ImageNetStem().init_with_output(jax.random.key(0), images, train=False)[0].shape
      (1, 56, 56, 64)
    """

    features: int = 64
    activate: bool = True
    zero_pool_padding: bool = False
    conv_cls: ModuleDef = Conv
    norm_cls: ModuleDef = BatchNorm

    stride: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.conv_cls(self.features, 7, stride=2, name="conv1")(x)  # [N, H/2, W/2, 64]
        if not self.activate:
            return max_pool(x, self.zero_pool_padding)  # [N, H/4, W/4, 64]
        norm = self.norm_cls(name="norm1")
        if self.zero_pool_padding:  # zeros are not the pool's least value before the norm
            return max_pool(norm_relu(norm, x, train), zero_padding=True)
        return norm_relu_pool(norm, x, train)  # [N, H/4, W/4, 64]


class DeepStem(nn.Module):
    """Three 3x3 convolutions in place of the 7x7: ResNet-C, D and T (He et al. 2018, Figure 2b).

    Args:
      widths: Output channels of the three convolutions.
      conv_pool: A strided 3x3 convolution in place of the max pool, as in ResNet-RS.
      activate: Norm and ReLU after the last convolution; see `ImageNetStem`.
      conv_cls: See `ImageNetStem`.
      norm_cls: See `ImageNetStem`.

    Returns:
      Called on images [N, H, W, 3] with `train`: [N, H/4, W/4, widths[2]].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.zeros((1, 224, 224, 3))
      >>> DeepStem().init_with_output(jax.random.key(0), images, train=False)[0].shape
      (1, 56, 56, 64)
    """

    widths: Sequence[int] = (32, 32, 64)
    conv_pool: bool = False
    activate: bool = True
    conv_cls: ModuleDef = Conv
    norm_cls: ModuleDef = BatchNorm

    stride: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        first, second, last = self.widths
        x = self.conv_cls(first, 3, stride=2, name="conv1")(x)  # [N, H/2, W/2, 32]
        x = norm_relu(self.norm_cls(name="norm1"), x, train)
        x = self.conv_cls(second, 3, name="conv2")(x)
        x = norm_relu(self.norm_cls(name="norm2"), x, train)
        x = self.conv_cls(last, 3, name="conv3")(x)  # [N, H/2, W/2, 64]
        if not self.conv_pool:  # [N, H/4, W/4, 64]
            if not self.activate:
                return max_pool(x)
            return norm_relu_pool(self.norm_cls(name="norm3"), x, train)
        if self.activate:
            x = norm_relu(self.norm_cls(name="norm3"), x, train)
        x = self.conv_cls(last, 3, stride=2, name="pool_conv")(x)  # [N, H/4, W/4, 64]
        return norm_relu(self.norm_cls(name="pool_norm"), x, train)


class CifarStem(nn.Module):
    """One 3x3 convolution that keeps the 32x32 resolution (He et al. 2015, section 4.2).

    Args:
      features: Output channels.
      activate: Norm and ReLU after the convolution; see `ImageNetStem`.
      conv_cls: See `ImageNetStem`.
      norm_cls: See `ImageNetStem`.

    Returns:
      Called on images [N, H, W, 3] with `train`: [N, H, W, features].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.zeros((1, 32, 32, 3))
      >>> CifarStem().init_with_output(jax.random.key(0), images, train=False)[0].shape
      (1, 32, 32, 16)
    """

    features: int = 16
    activate: bool = True
    conv_cls: ModuleDef = Conv
    norm_cls: ModuleDef = BatchNorm

    stride: ClassVar[int] = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.conv_cls(self.features, 3, name="conv1")(x)  # [N, H, W, 16]
        if self.activate:
            x = norm_relu(self.norm_cls(name="norm1"), x, train)
        return x
