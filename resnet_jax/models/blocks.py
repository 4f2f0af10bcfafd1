"""Residual blocks: a residual function F(x), a shortcut around it, and their sum.

The order inside a block is what separates the versions of the paper:

* post-activation (He et al. 2015): conv - norm - ReLU ... conv - norm, add, ReLU;
* pre-activation (He et al. 2016, "Identity mappings"): norm - ReLU - conv ..., add. Nothing
  stands on the path of the sum, so a shortcut runs through the whole network.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.errors import ModelError
from resnet_jax.models.layers import (
    Conv,
    Initializer,
    ModuleDef,
    average_pool_2x2,
    dot_general,
)
from resnet_jax.models.norms import BatchNorm, conv_norm
from resnet_jax.ops.convolution import Precision

ShortcutOption = Literal["A", "B", "C", "D", "none"]
SHORTCUT_OPTIONS: tuple[str, ...] = get_args(ShortcutOption)


class Shortcut(nn.Module):
    """The path around a block, with the options of He et al. 2015, section 3.3 and Table 3.

    * A: no parameters: a strided identity, new channels filled with zeros;
    * B: a 1x1 projection where the shape changes, the identity elsewhere;
    * C: a projection in every block;
    * D: as B, with a 2x2 average pool before the projection, so that a stride drops no pixel
      (ResNet-D, He et al. 2018, Figure 2c).

    Args:
      features: Channels of the block's output.
      option: A, B, C or D.
      stride: Stride of the block.
      halves: The block ends the resolution of its input: by its stride, or by dilating what
        comes after it.
      conv_cls: Makes a convolution.
      norm_cls: Makes the projection's norm; None: no norm (pre-activation blocks).

    Returns:
      Called on [N, H, W, C] with `train`: [N, ceil(H / stride), ceil(W / stride), features].

    Raises:
      ModelError: Option A with fewer channels than x has.

    Example:
      >>> x = jnp.ones((1, 8, 8, 16))
      >>> shortcut = Shortcut(features=32, option="A", stride=2)
      >>> shortcut.apply({}, x, train=False)[0, 0, 0, [7, 8, 23, 24]].tolist()
      [0.0, 1.0, 1.0, 0.0]
    """

    features: int
    option: ShortcutOption = "B"
    stride: int = 1
    halves: bool = False
    conv_cls: ModuleDef = Conv
    norm_cls: ModuleDef | None = BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.option == "A":
            return self._padded_identity(x)
        same_shape = x.shape[-1] == self.features and not self.halves
        if same_shape and self.option != "C":
            return x
        stride = self.stride
        if self.option == "D" and self.halves:
            x, stride = average_pool_2x2(x, stride), 1
        conv = self.conv_cls(self.features, 1, stride=stride, name="conv1")
        return (
            conv(x)
            if self.norm_cls is None
            else conv_norm(conv, self.norm_cls(name="norm1"), x, train)
        )

    def _padded_identity(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H / stride, W / stride, features], C in the middle of the zeros.

        The paper does not say where the zeros go, and any place is the same network up to the
        order of its channels. Half on each side is what published CIFAR weights expect.
        """
        extra = self.features - x.shape[-1]
        if extra < 0:
            raise ModelError(
                f"shortcut = 'A' cannot go from {x.shape[-1]} channels to {self.features}: it adds "
                "channels of zeros and drops none; choose stage_widths that do not shrink (the "
                "stem's channels included), or shortcut = 'B'"
            )
        if self.stride > 1:
            # lax.slice: x[:, ::stride] has another formula for a symbolic size (jax.export).
            x = lax.slice(x, (0, 0, 0, 0), x.shape, (1, self.stride, self.stride, 1))
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all channels' means (Hu et al. 2018).

    Args:
      ratio: Share of the channels that the bottleneck keeps, rounded to a multiple of 8.
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
    dtype: jnp.dtype = jnp.float32
    precision: Precision = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        reduced = max(8, int(channels * self.ratio + 4) // 8 * 8)
        gate = x.mean((1, 2), dtype=jnp.float32)  # [N, C]
        dense = functools.partial(
            nn.Dense, dtype=self.dtype, precision=self.precision, dot_general=dot_general
        )
        gate = nn.relu(dense(reduced, name="reduce")(gate))
        gate = nn.sigmoid(dense(channels, name="expand")(gate))
        return x * gate[:, None, None, :].astype(x.dtype)


class EfficientChannelAttention(nn.Module):
    """Scales each channel by a gate computed from the means of its neighbors (Wang et al. 2020).

    The gate convolves the means along the channels. Its kernel grows with their number C as in
    the paper: the odd number from log2(C) / 2 + 1/2 up, and at least 3.

    Returns:
      Called on [N, H, W, C]: the same shape.

    Example:
      >>> x = jnp.ones((1, 4, 4, 256))
      >>> variables = EfficientChannelAttention().init(jax.random.key(0), x)
      >>> variables["params"]["conv"]["kernel"].shape
      (5, 1, 1)
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


class StochasticDepth(nn.Module):
    """Drops the residual of some images while training (Huang et al. 2016).

    What is kept is divided by the probability of keeping it, so evaluation changes nothing.

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
        # One draw an image: the mask is [N, 1, 1, 1].
        drop = nn.Dropout(self.rate, broadcast_dims=(1, 2, 3), deterministic=not train)
        return drop(x)


class ResidualBlock(nn.Module):
    """Fields and the sum that all blocks share; a subclass adds the residual function.

    A block of your own defines `__call__(x, train)`, builds its layers with `conv_cls` and
    `norm_cls`, and ends in `add_shortcut`. Class attributes say what it is: `expansion` (output
    channels per `width`), `bottleneck` (takes cardinality and base_width) and `preactivation`.

    Args:
      width: Channels inside the block; its output has `width * expansion`.
      stride: Step of the output grid on the input grid.
      dilation: Dilation of the incoming map.
      next_dilation: Dilation of the outgoing map; twice `dilation` where a dilated network
        keeps a resolution that it would otherwise halve.
      shortcut: A, B, C, D, or "none": a plain network, without the sum.
      stride_in_1x1: Bottlenecks only: stride on the first 1x1 (v1, the paper) instead of the
        3x3 (v1.5).
      cardinality: Bottlenecks only: groups of the 3x3 convolution (ResNeXt).
      base_width: Bottlenecks only: channels of a group, in 64ths of `width`.
      se_ratio: Reduction of squeeze-and-excitation; 0: none.
      eca: Efficient channel attention.
      stochastic_depth_rate: Probability that this block's residual is dropped.
      zero_init_residual: Start as the identity: the last norm's scale (pre-activation: the last
        kernel) is 0 (Goyal et al. 2017, section 5.1).
      first_in_network: Pre-activation: the first block's identity takes the activated input
        (He et al. 2016, section 5).
      conv_cls: Makes a convolution.
      norm_cls: Makes a norm.
      dtype: Type of squeeze-and-excitation. Convolutions and norms have their own:
        `conv_cls=functools.partial(Conv, dtype=...)`, `norm_cls=functools.partial(...)`.
      precision: Of squeeze-and-excitation's products; convolutions have their own likewise.

    Example:
      >>> class OneConvBlock(ResidualBlock):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         y = self.conv_cls(self.width, 3, stride=self.stride, name="conv1")(x)
      ...         y = self.norm_cls(scale_init=self.last_scale_init, name="norm1")(y, train)
      ...         return nn.relu(self.add_shortcut(y, x, train))
      >>> x = jnp.zeros((1, 8, 8, 16))
      >>> block = OneConvBlock(width=32, stride=2)
      >>> block.init_with_output(jax.random.key(0), x, train=False)[0].shape
      (1, 4, 4, 32)
    """

    width: int
    stride: int = 1
    dilation: int = 1
    next_dilation: int = 1
    shortcut: ShortcutOption = "B"
    stride_in_1x1: bool = False
    cardinality: int = 1
    base_width: int = 64
    se_ratio: float = 0.0
    eca: bool = False
    stochastic_depth_rate: float = 0.0
    zero_init_residual: bool = False
    first_in_network: bool = False
    conv_cls: ModuleDef = Conv
    norm_cls: ModuleDef = BatchNorm
    dtype: jnp.dtype = jnp.float32
    precision: Precision = None

    expansion: ClassVar[int] = 1
    bottleneck: ClassVar[bool] = False
    preactivation: ClassVar[bool] = False

    @property
    def features(self) -> int:
        """Channels of the block's output."""
        return self.width * self.expansion

    @property
    def halves(self) -> bool:
        """True where the block ends the resolution of its input (conv3_1, conv4_1, conv5_1)."""
        return self.stride > 1 or self.next_dilation > self.dilation

    def make_shortcut(self) -> Shortcut:
        """The path around this block; its parameters are under "projection"."""
        return Shortcut(
            features=self.features,
            option=self.shortcut,
            stride=self.stride,
            halves=self.halves,
            conv_cls=self.conv_cls,
            norm_cls=None if self.preactivation else self.norm_cls,
            name="projection",
        )

    def add_shortcut(self, residual: jax.Array, x: jax.Array, train: bool) -> jax.Array:
        """F(x) + x, the paper's equations (1) and (2); F(x) alone in a plain network."""
        if self.se_ratio:
            gate = SqueezeExcite(
                self.se_ratio, dtype=self.dtype, precision=self.precision, name="squeeze_excite"
            )
            residual = gate(residual)
        if self.eca:
            residual = EfficientChannelAttention(name="eca")(residual)
        if self.shortcut == "none":
            return residual
        if self.stochastic_depth_rate:
            drop = StochasticDepth(self.stochastic_depth_rate, name="stochastic_depth")
            residual = drop(residual, train)
        return residual + self.make_shortcut()(x, train)

    @property
    def last_scale_init(self) -> Initializer:
        """Initialiser for the scale of the norm that ends a post-activation residual."""
        return nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones

    @property
    def last_conv_options(self) -> dict[str, Initializer]:
        """Arguments for the convolution that ends a pre-activation residual."""
        return {"kernel_init": nn.initializers.zeros} if self.zero_init_residual else {}


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (He et al. 2015, Figure 5 left): ResNet-18, 34 and the CIFAR nets.

    Args:
      width: Output channels; the other fields are those of `ResidualBlock`.

    Returns:
      Called on [N, H, W, C] with `train`: [N, ceil(H / stride), ceil(W / stride), width].

    Example:
      >>> x = jnp.zeros((1, 56, 56, 64))
      >>> block = BasicBlock(width=128, stride=2)
      >>> block.init_with_output(jax.random.key(0), x, train=False)[0].shape
      (1, 28, 28, 128)
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.conv_cls(self.width, 3, stride=self.stride, dilation=self.dilation, name="conv1")(
            x
        )
        y = nn.relu(self.norm_cls(name="norm1")(y, train))
        y = self.conv_cls(self.width, 3, dilation=self.next_dilation, name="conv2")(y)
        y = self.norm_cls(scale_init=self.last_scale_init, name="norm2")(y, train)
        return nn.relu(self.add_shortcut(y, x, train))


class BottleneckBlock(ResidualBlock):
    """1x1 to fewer channels, 3x3, 1x1 to four times as many (He et al. 2015, Figure 5 right).

    Args:
      width: Channels of the 3x3 for 64 `base_width` and cardinality 1; the other fields are
        those of `ResidualBlock`.

    Returns:
      Called on [N, H, W, C] with `train`: [N, ceil(H / stride), ceil(W / stride), 4 width].

    Example:
      >>> x = jnp.zeros((1, 56, 56, 256))
      >>> block = BottleneckBlock(width=128, stride=2)
      >>> block.init_with_output(jax.random.key(0), x, train=False)[0].shape
      (1, 28, 28, 512)
    """

    expansion: ClassVar[int] = 4
    bottleneck: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv1, conv2, conv3 = bottleneck_convolutions(self)
        y = self.conv_cls(name="conv1", **conv1)(x)  # [N, H, W, inner]
        y = nn.relu(self.norm_cls(name="norm1")(y, train))
        y = self.conv_cls(name="conv2", **conv2)(y)  # [N, H / stride, W / stride, inner]
        y = nn.relu(self.norm_cls(name="norm2")(y, train))
        conv = self.conv_cls(name="conv3", **conv3)
        norm = self.norm_cls(scale_init=self.last_scale_init, name="norm3")
        y = conv_norm(conv, norm, y, train)  # [N, H / stride, W / stride, 4 width]
        return nn.relu(self.add_shortcut(y, x, train))


class PreActBasicBlock(ResidualBlock):
    """`BasicBlock` with norm and ReLU before each convolution (He et al. 2016, Figure 4e).

    Args:
      width: Output channels; the other fields are those of `ResidualBlock`.

    Returns:
      Called on [N, H, W, C] with `train`: [N, ceil(H / stride), ceil(W / stride), width].

    Example:
      >>> x = jnp.zeros((1, 32, 32, 16))
      >>> block = PreActBasicBlock(width=160)
      >>> block.init_with_output(jax.random.key(0), x, train=False)[0].shape
      (1, 32, 32, 160)
    """

    preactivation: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        activated = nn.relu(self.norm_cls(name="norm1")(x, train))
        y = self.conv_cls(self.width, 3, stride=self.stride, dilation=self.dilation, name="conv1")(
            activated
        )
        y = nn.relu(self.norm_cls(name="norm2")(y, train))
        y = self.conv_cls(
            self.width, 3, dilation=self.next_dilation, name="conv2", **self.last_conv_options
        )(y)
        return self.add_shortcut(y, shortcut_input(self, x, activated), train)


class PreActBottleneckBlock(ResidualBlock):
    """`BottleneckBlock` with norm and ReLU before each convolution (He et al. 2016, Figure 4e).

    Args:
      width: As for `BottleneckBlock`; the other fields are those of `ResidualBlock`.

    Returns:
      Called on [N, H, W, C] with `train`: [N, ceil(H / stride), ceil(W / stride), 4 width].

    Example:
      >>> x = jnp.zeros((1, 56, 56, 256))
      >>> block = PreActBottleneckBlock(width=128, stride=2)
      >>> block.init_with_output(jax.random.key(0), x, train=False)[0].shape
      (1, 28, 28, 512)
    """

    expansion: ClassVar[int] = 4
    bottleneck: ClassVar[bool] = True
    preactivation: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv1, conv2, conv3 = bottleneck_convolutions(self)
        activated = nn.relu(self.norm_cls(name="norm1")(x, train))
        y = self.conv_cls(name="conv1", **conv1)(activated)  # [N, H, W, inner]
        y = nn.relu(self.norm_cls(name="norm2")(y, train))
        y = self.conv_cls(name="conv2", **conv2)(y)  # [N, H / stride, W / stride, inner]
        y = nn.relu(self.norm_cls(name="norm3")(y, train))
        y = self.conv_cls(name="conv3", **conv3, **self.last_conv_options)(y)
        return self.add_shortcut(y, shortcut_input(self, x, activated), train)


def bottleneck_convolutions(block: ResidualBlock) -> tuple[dict, dict, dict]:
    """The three convolutions of a bottleneck, as arguments for `Conv`.

    Width and cardinality follow ResNeXt (Xie et al. 2017, Table 1) and Wide ResNet: the 3x3 has
    `cardinality` groups of `width * base_width / 64` channels.
    """
    inner = block.width * block.base_width // 64 * block.cardinality
    # On a stride in the first 1x1 the 3x3 already works on the coarser (or more dilated) grid.
    on_1x1 = block.stride_in_1x1
    conv1 = {"features": inner, "kernel_size": 1, "stride": block.stride if on_1x1 else 1}
    conv2 = {
        "features": inner,
        "kernel_size": 3,
        "stride": 1 if on_1x1 else block.stride,
        "dilation": block.next_dilation if on_1x1 else block.dilation,
        "groups": block.cardinality,
    }
    conv3 = {"features": block.features, "kernel_size": 1}
    return conv1, conv2, conv3


def shortcut_input(block: ResidualBlock, x: jax.Array, activated: jax.Array) -> jax.Array:
    """What a pre-activation block's shortcut starts from (He et al. 2016, section 5).

    The identity carries the untouched signal. Projections, and the first block of the network,
    take it after the block's first norm and ReLU.
    """
    projects = x.shape[-1] != block.features or block.halves or block.shortcut == "C"
    identity = block.shortcut == "A" or not projects
    return x if identity and not block.first_in_network else activated
