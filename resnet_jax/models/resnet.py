"""ResNet: a stem, stages of residual blocks, and a linear head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.errors import ModelError
from resnet_jax.models.blocks import BottleneckBlock, ResidualBlock, ShortcutOption
from resnet_jax.models.checks import check_fields
from resnet_jax.models.layers import (
    Conv,
    Dtype,
    Initializer,
    ModuleDef,
    ShortHelp,
    dropout,
    he_fan_out,
    normal_001,
)
from resnet_jax.models.norms import BatchNorm, GroupNorm, NormKind, OwnNorm, norm_relu
from resnet_jax.models.stem import ImageNetStem
from resnet_jax.ops.convolution import Precision
from resnet_jax.ops.sharding import dot_general


class FeatureInfo(NamedTuple):
    """Channels and stride of a map that `ResNet.features` returns."""

    channels: int
    stride: int  # image pixels per pixel of the map


class Stage(nn.Module):
    """Blocks of one width at one resolution; the first of them may halve it (conv2_x ... conv5_x).

    Args:
      block_cls: Makes a block: `block_cls(stride=..., ..., name=...)`.
      stochastic_depth_rates: The drop rate of each block; their number is that of the blocks.
      stride: Stride of the first block.
      dilation: Dilation of the incoming map.
      next_dilation: Dilation of the outgoing map.
      first_in_network: The first block comes right after the stem.

    Returns:
      Called on [N, H, W, C] with `train`: [N, ceil(H / stride), ceil(W / stride), features].

    Example:
      >>> block_cls = functools.partial(BottleneckBlock, width=64)
      >>> stage = Stage(block_cls, stochastic_depth_rates=(0.0, 0.0, 0.0))
      >>> x = jnp.zeros((1, 56, 56, 64))
      >>> stage.init_with_output(jax.random.key(0), x, train=False)[0].shape
      (1, 56, 56, 256)
    """

    block_cls: ModuleDef
    stochastic_depth_rates: Sequence[float]
    stride: int = 1
    dilation: int = 1
    next_dilation: int = 1
    first_in_network: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for index, rate in enumerate(self.stochastic_depth_rates):
            first = index == 0
            block = self.block_cls(
                stride=self.stride if first else 1,
                dilation=self.dilation if first else self.next_dilation,
                next_dilation=self.next_dilation,
                stochastic_depth_rate=rate,
                first_in_network=self.first_in_network and first,
                name=f"block{index + 1}",
            )
            x = block(x, train)
        return x


class ResNet(nn.Module, metaclass=ShortHelp):
    """A residual network; the members of the family differ only in these fields.

    Images are NHWC, with any number of channels and of any size from `output_stride` pixels a side
    up. `train` chooses between batch statistics (True, with `mutable=["batch_stats"]` if the
    network has any) and running statistics (False): a backbone applied with `train=False` has
    frozen BatchNorm. Training with stochastic depth or dropout also needs
    `rngs={"dropout": key}`. `init` needs neither that key nor the mapped axis of `axis_name`.
    These and the other methods of every Flax module are described by `help(flax.linen.Module)`.

    Args:
      stage_sizes: Blocks in each stage. Default: those of ResNet-50.
      block_cls: One of the block classes, or a subclass of `ResidualBlock`.
      stem_cls: One of the stem classes, or a `functools.partial` of it. A stem of your own takes
        `activate`, `conv_cls` and `norm_cls`, and has its stride as class attribute `stride`.
      stage_widths: Width of each stage's blocks, before the block's expansion.
      num_classes: Classes of the head. 0: no head, `__call__` returns the pooled features.
      dtype: Type of the computation. Parameters, statistics and logits stay float32.
      precision: How float32 numbers are multiplied: "default", "high" or "highest" as in
        `jax.lax.Precision`. None: as `jax.default_matmul_precision` says. By default a TPU rounds
        them to bfloat16 and recent GPUs to TF32; "highest" is float32 everywhere. Applies to
        convolutions and squeeze-and-excitation; the head is always "highest".
      shortcut: Option A, B, C (He et al. 2015, Table 3), D (ResNet-D), or "none" (plain net).
      stride_in_1x1: Stride of a bottleneck on its first 1x1 (v1, as in the paper) instead of
        its 3x3 (v1.5, as everywhere since: 0.5 points better, 5% more work).
      cardinality: Groups of a bottleneck's 3x3 convolution.
      base_width: Channels of a bottleneck's group in 64ths of the stage's width.
      se_ratio: Reduction of squeeze-and-excitation (1/16 in SE-ResNet). 0: none.
      eca: Efficient channel attention in every block (ECA-Net), in place of se_ratio.
      norm: "batch", "group", or a norm of your own: a Flax module's class, or a `functools.partial`
        of it, such as `functools.partial(nn.LayerNorm, epsilon=1e-6)`. Every norm of the network
        is made by calling it with those of `dtype` and `scale_init` that are fields of it and that
        the partial leaves open. It is called with x, and with `train=train` or
        `use_running_average=not train` if its `__call__` takes one of them. Running statistics
        are kept in "batch_stats".
      weight_standardization: Standardize every kernel; does not go with norm="batch".
      bn_momentum: Weight of the old running statistics in each step, for norm="batch".
      bn_epsilon: Added to the variance, for norm="batch" and "group".
      axis_name: The mapped axis over which devices share batch statistics. None: each has its own.
      bn_group_size: Number of neighboring devices that share statistics. None: all.
      zero_init_residual: Every residual function starts as 0, and so every block without a
        projection as the identity (pre-activation: all but the first).
      kernel_init: Initializer of the convolutions.
      head_init: Initializer of the head's kernel, N(0, 0.01) as in Goyal et al. 2017.
      stochastic_depth_rate: Drop rate of the last block; it grows linearly from the first.
      dropout_rate: Drop rate of the pooled features.
      output_stride: Image pixels per pixel of the last map. Smaller than the network's own:
        later stages dilate instead of striding, with the same weights. Every position of the
        finer maps then sees the same pixels as before, except with shortcut D: its 2x2 average
        takes neighboring pixels, and zeros beyond the lower and right edges, as timm's networks
        do, so that weights give the same numbers in both. None: the network's own.
      remat: Recompute each block in the backward pass instead of storing its activations.

    Returns:
      Called on images [N, H, W, C]: float32 logits [N, num_classes]; with num_classes=0 float32
      pooled features [N, channels].

    Raises:
      ModelError: A field's value is not allowed, or the image is too small.

    Example:
      >>> model = ResNet(stage_sizes=(1, 1), stage_widths=(16, 32), num_classes=10)
      >>> images = jnp.zeros((1, 64, 64, 3))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> model.apply(variables, images, train=False).shape
      (1, 10)
    """

    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    block_cls: type[ResidualBlock] = BottleneckBlock
    stem_cls: ModuleDef = ImageNetStem
    stage_widths: Sequence[int] = (64, 128, 256, 512)
    num_classes: int = 1000
    dtype: Dtype = jnp.float32
    precision: Precision = None
    shortcut: ShortcutOption = "B"
    stride_in_1x1: bool = False
    cardinality: int = 1
    base_width: int = 64
    se_ratio: float = 0.0
    eca: bool = False
    norm: NormKind | ModuleDef = "batch"
    weight_standardization: bool = False
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    axis_name: str | None = None
    bn_group_size: int | None = None
    zero_init_residual: bool = False
    kernel_init: Initializer = he_fan_out
    head_init: Initializer = normal_001
    stochastic_depth_rate: float = 0.0
    dropout_rate: float = 0.0
    output_stride: int | None = None
    remat: bool = False

    def __post_init__(self) -> None:
        # Lists would make the module unhashable, and so no static argument of jax.jit.
        object.__setattr__(self, "stage_sizes", tuple(self.stage_sizes))
        object.__setattr__(self, "stage_widths", tuple(self.stage_widths))
        check_fields(self)
        super().__post_init__()

    # Methods below that build or check are nn.nowrap: they are no layers for tabulate to list.
    def setup(self) -> None:
        norm_cls = self._norm_cls()
        conv_cls = functools.partial(
            Conv,
            standardize=self.weight_standardization,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            precision=self.precision,
        )
        self.stem_module = self.stem_cls(
            activate=not self.block_cls.preactivation,
            conv_cls=conv_cls,
            norm_cls=norm_cls,
            name="stem",
        )
        self.stages = self._make_stages(conv_cls, norm_cls)
        if self.block_cls.preactivation:
            self.final_norm = norm_cls()
        self.dropout = nn.Dropout(self.dropout_rate)
        if self.num_classes:
            # float32 whatever `dtype` and `precision` are: the loss is sensitive, the work small.
            self.head = nn.Dense(
                self.num_classes,
                kernel_init=self.head_init,
                precision=lax.Precision.HIGHEST,
                dot_general=dot_general,
            )

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        # Networks without running statistics have none to update.
        updates = train and bool(self.variables.get("batch_stats"))
        if updates and not self.is_mutable_collection("batch_stats"):
            raise ModelError(
                'train=True updates the running statistics: apply with mutable=["batch_stats"]'
            )
        *_, x = self.features(images, train=train).values()  # [N, H/32, W/32, C]
        if self.block_cls.preactivation:
            x = norm_relu(self.final_norm, x, train)
        x = x.mean((1, 2), dtype=jnp.float32)  # [N, C]
        x = dropout(self.dropout, x, train)
        return self.head(x) if self.num_classes else x

    def features(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """The map after the stem and after every stage, for detection, segmentation and the like.

        Args:
          images: [N, H, W, C].
          train: As for the call.

        Returns:
          {"stem", ..., "stage4"} -> [N, ceil(H / stride), ceil(W / stride), channels] in `dtype`;
          `feature_info` gives channels, strides and order beforehand: `jax.jit` sorts the keys of
          what it returns, so that "stem" comes last. Pre-activation networks return the raw sums,
          before the final norm and ReLU.

        Example:
          >>> model = ResNet(stage_sizes=(1, 1), stage_widths=(16, 32), num_classes=0)
          >>> images = jnp.zeros((1, 64, 64, 3))
          >>> variables = model.init(jax.random.key(0), images, train=False)
          >>> maps = model.apply(variables, images, train=False, method="features")
          >>> maps["stage2"].shape
          (1, 8, 8, 128)
        """
        self._check_images(images)
        maps = {"stem": self.stem_module(jnp.asarray(images, self.dtype), train)}
        x = maps["stem"]  # [N, H/4, W/4, 64]; with a CIFAR stem [N, H, W, 16]
        for number, stage in enumerate(self.stages, start=1):
            x = stage(x, train)  # stages 2, 3 and 4 each halve H and W and double the channels
            maps[f"stage{number}"] = x
        return maps

    @nn.nowrap
    def feature_info(self) -> dict[str, FeatureInfo]:
        """Channels and stride of every map of `features`, without running anything.

        Returns:
          {"stem", "stage1", ...} -> (channels, stride in image pixels).

        Example:
          >>> ResNet(stage_sizes=(3, 4, 6, 3)).feature_info()["stage4"]
          FeatureInfo(channels=2048, stride=32)
        """
        side = self._last_stride()
        images = jax.ShapeDtypeStruct((1, side, side, 3), self.dtype)
        init = functools.partial(self.clone(parent=None).init_with_output, method="features")
        maps, _ = jax.eval_shape(functools.partial(init, train=False), jax.random.key(0), images)
        names = ["stem", *(f"stage{number + 1}" for number in range(len(self.stage_sizes)))]
        return {
            name: FeatureInfo(maps[name].shape[-1], side // maps[name].shape[1]) for name in names
        }

    @nn.nowrap
    def _norm_cls(self) -> ModuleDef:
        if self.norm == "group":
            return functools.partial(GroupNorm, epsilon=self.bn_epsilon, dtype=self.dtype)
        if self.norm != "batch":
            return functools.partial(OwnNorm, self.norm, dtype=self.dtype)
        return functools.partial(
            BatchNorm,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            axis_name=self.axis_name,
            group_size=self.bn_group_size,
            dtype=self.dtype,
        )

    @nn.nowrap
    def _make_stages(self, conv_cls: ModuleDef, norm_cls: ModuleDef) -> list[Stage]:
        block_cls: Callable[..., nn.Module] = self.block_cls
        if self.remat:
            block_cls = nn.remat(self.block_cls, static_argnums=(2,))  # `train`
        # Huang et al. 2016, equation 4: block l of L is dropped with probability l / L * rate.
        total = sum(self.stage_sizes)
        rates = [self.stochastic_depth_rate * (block + 1) / total for block in range(total)]
        stages = []
        for index, (size, width) in enumerate(zip(self.stage_sizes, self.stage_widths)):
            stride, dilation, next_dilation = self._grid()[index]
            block = functools.partial(
                block_cls,
                width=width,
                shortcut=self.shortcut,
                stride_in_1x1=self.stride_in_1x1,
                cardinality=self.cardinality,
                base_width=self.base_width,
                se_ratio=self.se_ratio,
                eca=self.eca,
                zero_init_residual=self.zero_init_residual,
                conv_cls=conv_cls,
                norm_cls=norm_cls,
                dtype=self.dtype,
                precision=self.precision,
            )
            stage = Stage(
                block,
                stochastic_depth_rates=tuple(rates[:size]),
                stride=stride,
                dilation=dilation,
                next_dilation=next_dilation,
                first_in_network=index == 0,
                name=f"stage{index + 1}",
            )
            stages.append(stage)
            rates = rates[size:]
        return stages

    @property
    def stem_type(self) -> Any:
        """The class behind `stem_cls`."""
        stem_cls = self.stem_cls
        while isinstance(stem_cls, functools.partial):
            stem_cls = stem_cls.func
        return stem_cls

    @nn.nowrap
    def strides(self) -> list[int]:
        """Stride of each stage's map without dilation, in image pixels per pixel."""
        return [self.stem_type.stride * 2**index for index in range(len(self.stage_sizes))]

    @nn.nowrap
    def _last_stride(self) -> int:
        return self.output_stride or self.strides()[-1]

    @nn.nowrap
    def _grid(self) -> list[tuple[int, int, int]]:
        """(stride, dilation, next_dilation) of each stage.

        Every stage but the first halves the resolution. Once `output_stride` is reached, a
        stage doubles the dilation of all that follows instead: its filters then see the same
        pixels as before, at every position of the finer grid.
        """
        reached, dilation = self.strides()[0], 1
        grid = [(1, dilation, dilation)]
        for _ in self.stage_sizes[1:]:
            if reached < self._last_stride():
                reached *= 2
                grid.append((2, dilation, dilation))
            else:
                grid.append((1, dilation, dilation * 2))
                dilation *= 2
        return grid

    @nn.nowrap
    def _check_images(self, images: jax.Array) -> None:
        if images.ndim != 4:
            raise ModelError(f"images have shape {images.shape}; expected [N, H, W, C]")
        if images.shape[1] <= 4 < images.shape[3]:
            raise ModelError(
                f"images of shape {images.shape} look like [N, C, H, W]; transpose them to "
                "[N, H, W, C]: images.transpose(0, 2, 3, 1)"
            )
        kernel = self.variables.get("params", {}).get("stem", {}).get("conv1", {}).get("kernel")
        if kernel is not None and kernel.shape[2] != images.shape[3]:
            raise ModelError(
                f"images have {images.shape[3]} channels, the network's weights take "
                f"{kernel.shape[2]}"
            )
        least = self._last_stride()
        # One comparison a side: jax.export's symbolic sides cannot be compared with each other.
        if any(side < least for side in images.shape[1:3]):
            raise ModelError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels are too small: this "
                f"network needs at least {least}x{least} (its stride); enlarge them, or take a "
                "network with a CIFAR stem"
            )
