"""Residual blocks: a residual function F(x), a shortcut around it, and their sum.

The order inside a block is what separates the versions of the paper:

* post-activation (He et al. 2015): conv - norm - ReLU ... conv - norm, add, ReLU;
* pre-activation (He et al. 2016, "Identity mappings"): norm - ReLU - conv ..., add. Nothing
  stands on the path of the sum, so a shortcut runs through the whole network.

In shapes, N is the batch, H x W the incoming map and s the block's stride.
"""

from __future__ import annotations

import functools
from typing import ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.errors import ModelError
from resnet_jax.models.attention import EfficientChannelAttention, SqueezeExcite
from resnet_jax.models.layers import Conv, Dtype, Initializer, ModuleDef, StochasticDepth
from resnet_jax.models.norms import BatchNorm, ConvNorm, conv_norm, conv_norm_sum, norm_relu
from resnet_jax.ops.activation import relu
from resnet_jax.ops.convolution import Precision, subsample
from resnet_jax.ops.pooling import average_pool_2x2

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

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        path = self.layers(x)
        return conv_norm(*path, train) if isinstance(path, ConvNorm) else path

    @nn.compact
    def layers(self, x: jax.Array) -> jax.Array | ConvNorm:
        """The path's output, or the convolution and norm that make it."""
        if self.option == "A":
            return self._padded_identity(x)
        same_shape = x.shape[-1] == self.features and not self.halves
        if same_shape and self.option != "C":
            return x
        stride = self.stride
        if self.option == "D" and self.halves:
            x, stride = average_pool_2x2(x, stride), 1
        conv = self.conv_cls(self.features, 1, stride=stride, name="conv1")
        if self.norm_cls is None:
            return conv(x)
        return ConvNorm(conv, self.norm_cls(name="norm1"), x)  # [N, H/s, W/s, features]

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
        x = subsample(x, self.stride)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


class ResidualBlock(nn.Module):
    """Fields and the sum that all blocks share; a subclass adds the residual function.

    A block of your own defines `__call__(x, train)`, builds its layers with `conv_cls` and
    `norm_cls`, and ends in `add_shortcut`. Its convolutions take `dilation` up to its stride and
    `next_dilation` after it, or it does not suit `output_stride`. Class attributes say what it is:
    `expansion` (output channels per `width`), `bottleneck` (takes cardinality and base_width) and
    `preactivation`.

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
      ...         conv = self.conv_cls(self.width, 3, self.stride, self.dilation, name="conv1")
      ...         y = conv(x)
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
    dtype: Dtype = jnp.float32
    precision: Precision = None

    expansion: ClassVar[int] = 1
    bottleneck: ClassVar[bool] = False
    preactivation: ClassVar[bool] = False

    @property
    def features(self) -> int:
        """Channels of the block's output."""
        return self.width * self.expansion

    @property
    def inner_width(self) -> int:
        """Channels of a bottleneck's 3x3 convolution (Xie et al. 2017, Table 1)."""
        return self.width * self.base_width // 64 * self.cardinality

    @property
    def halves(self) -> bool:
        """True where the block ends the resolution of its input (conv3_1, conv4_1, conv5_1)."""
        return self.stride > 1 or self.next_dilation > self.dilation

    def add_shortcut(self, residual: jax.Array, x: jax.Array, train: bool) -> jax.Array:
        """F(x) + x, the paper's equations (1) and (2); F(x) alone in a plain network."""
        if self.se_ratio:
            gate = SqueezeExcite(self.se_ratio, self.dtype, self.precision, name="squeeze_excite")
            residual = gate(residual)
        if self.eca:
            residual = EfficientChannelAttention(name="eca")(residual)
        if self.shortcut == "none":
            return residual
        if self.stochastic_depth_rate:
            drop = StochasticDepth(self.stochastic_depth_rate, name="stochastic_depth")
            residual = drop(residual, train)
        return residual + self._shortcut()(x, train)

    def add_shortcut_to(self, layers: ConvNorm, x: jax.Array, train: bool) -> jax.Array:
        """`add_shortcut` to the output of a residual's last layers, as one operation if faster."""
        changes_residual = self.se_ratio or self.eca or self.stochastic_depth_rate
        if changes_residual or self.shortcut == "none":
            return self.add_shortcut(conv_norm(*layers, train), x, train)
        return conv_norm_sum(layers, self._shortcut().layers(x), train)

    @nn.nowrap
    def _shortcut(self) -> Shortcut:
        return Shortcut(
            self.features,
            option=self.shortcut,
            stride=self.stride,
            halves=self.halves,
            conv_cls=self.conv_cls,
            norm_cls=None if self.preactivation else self.norm_cls,
            name="projection",
        )

    def shortcut_input(self, x: jax.Array, activated: jax.Array) -> jax.Array:
        """Where a pre-activation block's shortcut starts (He et al. 2016, section 5).

        The identity carries the untouched signal. Projections, and the first block of the network,
        take it after the block's first norm and ReLU.
        """
        projects = x.shape[-1] != self.features or self.halves or self.shortcut == "C"
        identity = self.shortcut == "A" or not projects
        return x if identity and not self.first_in_network else activated

    @property
    def last_scale_init(self) -> Initializer:
        """Initializer for the scale of the norm that ends a post-activation residual."""
        return nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones

    @property
    def last_conv_cls(self) -> ModuleDef:
        """Makes the convolution that ends a pre-activation residual."""
        if not self.zero_init_residual:
            return self.conv_cls
        return functools.partial(self.conv_cls, kernel_init=nn.initializers.zeros)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (He et al. 2015, Figure 5 left): ResNet-18, 34 and the CIFAR nets.

    Called on [N, H, W, C] with `train`, it returns [N, H/s, W/s, width]. The fields are those of
    `ResidualBlock`.

    Example:
      >>> x = jnp.zeros((1, 56, 56, 64))
      >>> block = BasicBlock(width=128, stride=2)
      >>> block.init_with_output(jax.random.key(0), x, train=False)[0].shape
      (1, 28, 28, 128)
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm = self.conv_cls, self.norm_cls
        y = conv(self.width, 3, stride=self.stride, dilation=self.dilation, name="conv1")(x)
        y = norm_relu(norm(name="norm1"), y, train)  # [N, H/s, W/s, width]
        y = conv(self.width, 3, dilation=self.next_dilation, name="conv2")(y)
        y = norm(scale_init=self.last_scale_init, name="norm2")(y, train)
        return relu(self.add_shortcut(y, x, train))


class BottleneckBlock(ResidualBlock):
    """1x1 to fewer channels, 3x3, 1x1 to four times as many (He et al. 2015, Figure 5 right).

    Called on [N, H, W, C] with `train`, it returns [N, H/s, W/s, 4 width]. The fields are those of
    `ResidualBlock`.

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
        conv, norm, inner = self.conv_cls, self.norm_cls, self.inner_width
        # v1, the paper's, strides on the first 1x1; v1.5 on the 3x3.
        stride1, stride2 = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
        dilation = self.next_dilation if self.stride_in_1x1 else self.dilation
        y = conv(inner, 1, stride=stride1, name="conv1")(x)  # [N, H, W, inner]
        y = norm_relu(norm(name="norm1"), y, train)
        conv2 = conv(
            inner, 3, stride=stride2, dilation=dilation, groups=self.cardinality, name="conv2"
        )
        y = norm_relu(norm(name="norm2"), conv2(y), train)  # [N, H/s, W/s, inner]
        conv3 = conv(self.features, 1, name="conv3")
        norm3 = norm(scale_init=self.last_scale_init, name="norm3")
        residual = ConvNorm(conv3, norm3, y)  # [N, H/s, W/s, 4 width]
        return relu(self.add_shortcut_to(residual, x, train))


class PreActBasicBlock(ResidualBlock):
    """`BasicBlock` with norm and ReLU before each convolution (He et al. 2016, Figure 4e).

    Called on [N, H, W, C] with `train`, it returns [N, H/s, W/s, width]. The fields are those of
    `ResidualBlock`.

    Example:
      >>> x = jnp.zeros((1, 32, 32, 16))
      >>> block = PreActBasicBlock(width=160)
      >>> block.init_with_output(jax.random.key(0), x, train=False)[0].shape
      (1, 32, 32, 160)
    """

    preactivation: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm = self.conv_cls, self.norm_cls
        activated = norm_relu(norm(name="norm1"), x, train)  # [N, H, W, C]
        conv1 = conv(self.width, 3, stride=self.stride, dilation=self.dilation, name="conv1")
        y = norm_relu(norm(name="norm2"), conv1(activated), train)  # [N, H/s, W/s, width]
        y = self.last_conv_cls(self.width, 3, dilation=self.next_dilation, name="conv2")(y)
        return self.add_shortcut(y, self.shortcut_input(x, activated), train)


class PreActBottleneckBlock(ResidualBlock):
    """`BottleneckBlock` with norm and ReLU before each convolution (He et al. 2016, Figure 4e).

    Called on [N, H, W, C] with `train`, it returns [N, H/s, W/s, 4 width]. The fields are those of
    `ResidualBlock`.

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
        conv, norm, inner = self.conv_cls, self.norm_cls, self.inner_width
        stride1, stride2 = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
        dilation = self.next_dilation if self.stride_in_1x1 else self.dilation
        activated = norm_relu(norm(name="norm1"), x, train)  # [N, H, W, C]
        y = conv(inner, 1, stride=stride1, name="conv1")(activated)  # [N, H, W, inner]
        y = norm_relu(norm(name="norm2"), y, train)
        conv2 = conv(
            inner, 3, stride=stride2, dilation=dilation, groups=self.cardinality, name="conv2"
        )
        y = norm_relu(norm(name="norm3"), conv2(y), train)  # [N, H/s, W/s, inner]
        y = self.last_conv_cls(self.features, 1, name="conv3")(y)  # [N, H/s, W/s, 4 width]
        return self.add_shortcut(y, self.shortcut_input(x, activated), train)
