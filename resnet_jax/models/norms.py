"""Normalization layers, and batch norm fused with the convolution or pool beside it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.errors import ModelError
from resnet_jax.models.layers import Conv, Dtype, Initializer, ModuleDef
from resnet_jax.ops.activation import add_bias, relu
from resnet_jax.ops.batch_norm import (
    ALONE,
    Moments,
    SyncGroup,
    batch_moments,
    increasing,
    increasing_moments,
    normalize,
)
from resnet_jax.ops.convolution import ConvOptions
from resnet_jax.ops.pooling import max_pool
from resnet_jax.ops.product_norm import ProductNorm, product_norm, product_norm_sum

NormKind = Literal["batch", "group"]
NORM_KINDS: tuple[str, ...] = get_args(NormKind)


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe & Szegedy 2015, Algorithm 1) with the statistics of PyTorch.

    The running variance is the unbiased one (n / (n - 1)), where `flax.linen.BatchNorm` keeps the
    biased one, so that statistics equal those of a network trained in PyTorch. The variance stays
    accurate when the mean is large beside the spread.

    Args:
      momentum: Weight of the old running statistics in each step (PyTorch's 0.1 is 0.9 here).
      epsilon: Added to the variance.
      axis_name: The mapped axis whose devices share their statistics. None: each has its own. Not
        needed under `jax.jit` with a sharded batch, where the sums run over all of it anyway.
      group_size: Number of neighboring devices on that axis that share statistics. None: all.
        Under `jax.shard_map`, groups need `check_vma=False`.
      scale_init: Initializer of the scale (gamma).
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

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train and self._is_folded():
            return self._add_bias(x)
        scale, bias, mean, variance = self._variables(x.shape[-1])
        if train:
            mean, variance = self._measure(x, mean)
        return normalize(x, mean, variance, scale, bias, self.epsilon).astype(self.dtype)

    def relu(self, x: jax.Array) -> jax.Array:
        """`relu(self(x, train=True))`, of which the backward pass keeps only x."""
        scale, bias, mean, _ = self._variables(x.shape[-1])
        moments = self._measure(x, mean)
        return normalize(x, *moments, scale, bias, self.epsilon, relu=True).astype(self.dtype)

    def relu_max_pool(self, x: jax.Array) -> jax.Array:
        """`max_pool(self.relu(x))`, normalizing only the pixels that the pool keeps."""
        scale, bias, running_mean, _ = self._variables(x.shape[-1])
        flipped, scale, sign = increasing(x, scale)
        moments = increasing_moments(x, running_mean, sign)
        mean, variance = self._group().average(*moments)
        y = normalize(max_pool(flipped), mean, variance, scale, bias, self.epsilon, relu=True)
        self._update(mean * sign, variance, x)
        return y.astype(self.dtype)

    def after_pointwise(self, conv: Conv, x: jax.Array) -> jax.Array:
        """`self(conv(x), train=True)` of a 1x1 convolution, as one operation."""
        options = ConvOptions(stride=conv.stride, precision=conv.precision)
        arrays, group = self._arrays(conv, x), self._group()
        y, mean, variance = product_norm(
            *arrays, epsilon=self.epsilon, group=group, options=options
        )
        self._update(mean, variance, y)
        return y.astype(self.dtype)

    def sum_after_pointwise(self, conv: Conv, x: jax.Array, other: ConvNorm) -> jax.Array:
        """The sum of this `after_pointwise` and another one, as one operation."""
        y, mean, variance, other_mean, other_variance = product_norm_sum(
            *self._arrays(conv, x),
            *other.norm._arrays(other.conv, other.x),
            epsilon=self.epsilon,
            group=self._group(),
            options=ConvOptions(stride=other.conv.stride, precision=conv.precision),
        )
        self._update(mean, variance, y)
        other.norm._update(other_mean, other_variance, y)
        return y

    @nn.nowrap
    def _arrays(self, conv: Conv, x: jax.Array) -> ProductNorm:
        """What the norm of a 1x1 convolution of x is computed from."""
        scale, bias, mean, _ = self._variables(conv.features)
        return ProductNorm(x.astype(conv.dtype), conv.filters(x.shape[-1])[0, 0], mean, scale, bias)

    @nn.nowrap
    def _is_folded(self) -> bool:
        """Whether `fold_batch_norm` has left the norm a bias, and no scale and statistics."""
        return self.has_variable("params", "bias") and not self.has_variable("params", "scale")

    @nn.nowrap
    def _add_bias(self, x: jax.Array) -> jax.Array:
        """The folded norm: x + bias in the type of both, or x * factor + bias in float32."""
        if self.has_variable("params", "factor"):
            x = x * self.get_variable("params", "factor")
        return add_bias(x, self.get_variable("params", "bias")).astype(self.dtype)

    @nn.compact
    def _variables(self, channels: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Scale, bias, running mean and running variance, each [channels] in float32."""
        if self._is_folded():
            raise ModelError("train=True: a network with folded norms is for inference only")
        if not (
            self.has_variable("batch_stats", "mean") or self.is_mutable_collection("batch_stats")
        ):
            raise ModelError(
                "the variables have no batch_stats, which this network's norms need: apply with "
                '{"params": ..., "batch_stats": ...}'
            )
        shape = (channels,)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        return scale, bias, mean.value, variance.value

    @nn.nowrap
    def _group(self) -> SyncGroup:
        # `init` runs outside of the mapped axis.
        return ALONE if self.is_initializing() else SyncGroup(self.axis_name, self.group_size)

    @nn.nowrap
    def _measure(self, x: jax.Array, running_mean: jax.Array) -> Moments:
        """The moments of the batch x, toward which the running statistics move."""
        mean, variance = self._group().average(*batch_moments(x, running_mean))
        self._update(mean, variance, x)
        return mean, variance

    @nn.nowrap
    def _update(self, mean: jax.Array, variance: jax.Array, x: jax.Array) -> None:
        """Moves the running statistics toward those of the batch x."""
        if self.is_initializing():
            return
        count = math.prod(x.shape[:3]) * self._group().device_count()
        self._blend("mean", mean)
        self._blend("var", variance * (count / max(count - 1, 1)))

    @nn.nowrap
    def _blend(self, name: str, batch: jax.Array) -> None:
        running: jax.Array = self.get_variable("batch_stats", name)
        blended = self.momentum * running + (1 - self.momentum) * batch
        self.put_variable("batch_stats", name, blended)


class GroupNorm(nn.Module):
    """Group normalization (Wu & He 2018) over 32 groups: no batch statistics, any batch size.

    Where 32 does not divide the number of channels, the number of groups is their greatest common
    divisor (16 for the 16 channels of the CIFAR stem).

    Args:
      epsilon: Added to the variance.
      scale_init: Initializer of the scale (gamma).
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


class OwnNorm(nn.Module):
    """A norm of another package or of a user, called as those of this file are.

    Its variables are at the path of this module: the norm adds no level to their names.
    """

    make: ModuleDef
    scale_init: Initializer = nn.initializers.ones
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        # Ones are what a norm starts with by itself, or what the user has replaced.
        starts_at_ones = self.scale_init is nn.initializers.ones
        fields = {"dtype": self.dtype} | ({} if starts_at_ones else {"scale_init": self.scale_init})
        takes = _parameters(self.make)
        if not starts_at_ones and not _accepts(takes, "scale_init"):
            raise ModelError(
                f"zero_init_residual: norm = {self.make!r} has no field `scale_init`, by which a "
                "residual starts at zero; add it, or take zero_init_residual=False"
            )
        if "dtype" in getattr(self.make, "keywords", {}):
            del fields["dtype"]
        norm = self.make(**{name: x for name, x in fields.items() if _accepts(takes, name)})
        if not isinstance(norm, nn.Module):
            raise ModelError(f"norm = {self.make!r} makes a {type(norm).__name__}, no Flax module")
        self.norm = norm
        nn.share_scope(self, self.norm)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        takes = _parameters(type(self.norm).__call__)
        if "train" in takes:
            return jnp.asarray(self.norm(x, train=train))
        if "use_running_average" in takes:  # as flax.linen.BatchNorm calls it
            return jnp.asarray(self.norm(x, use_running_average=not train))
        return jnp.asarray(self.norm(x))


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _accepts(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    kinds = {each.kind for each in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def is_norm(norm: Any) -> bool:
    """Whether `norm` is a value of the field `ResNet.norm`: a name, or what makes a module."""
    made = norm in NORM_KINDS if isinstance(norm, str) else callable(norm)
    return made and not isinstance(norm, nn.Module)


class ConvNorm(NamedTuple):
    """A convolution, the norm after it and their input, not yet computed."""

    conv: Any
    norm: Any
    x: jax.Array


def conv_norm(conv: nn.Module, norm: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    """`norm(conv(x), train)`, as one operation where that saves passes over memory."""
    if train and _widens(ConvNorm(conv, norm, x)):
        return norm.after_pointwise(conv, x)
    return norm(conv(x), train)


def conv_norm_sum(first: ConvNorm, second: jax.Array | ConvNorm, train: bool) -> jax.Array:
    """The sum of a `conv_norm` and another (or an array), as one operation where that is faster."""
    if not isinstance(second, ConvNorm):
        return conv_norm(*first, train) + second
    if train and _widens(first) and _widens(second) and _are_summed_alike(first, second):
        return first.norm.sum_after_pointwise(first.conv, first.x, second)
    return conv_norm(*first, train) + conv_norm(*second, train)


def _widens(layers: ConvNorm) -> bool:
    """Whether a 1x1 convolution has so many outputs that its input's moments are cheap."""
    conv = layers.conv
    return (
        isinstance(layers.norm, BatchNorm)
        and isinstance(conv, Conv)
        and conv.kernel_size == conv.groups == 1
        and conv.features >= 2 * layers.x.shape[-1]
    )


def _are_summed_alike(first: ConvNorm, second: ConvNorm) -> bool:
    """Whether the sum of two layers can be one product."""
    conv1, conv2, norm1, norm2 = first.conv, second.conv, first.norm, second.norm
    types = conv1.dtype == conv2.dtype == norm1.dtype == norm2.dtype
    fields = ("epsilon", "axis_name", "group_size")
    norms = all(getattr(norm1, field) == getattr(norm2, field) for field in fields)
    return types and norms and conv1.precision == conv2.precision and conv1.stride == 1


# Without training, the compiler makes one pass of these by itself, and folded norms are biases.
def norm_relu(norm: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    """`relu(norm(x, train))`, as one operation where that saves passes over memory."""
    return norm.relu(x) if train and isinstance(norm, BatchNorm) else relu(norm(x, train))


def norm_relu_pool(norm: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    """`max_pool(relu(norm(x, train)))`, the end of a stem, likewise."""
    if train and isinstance(norm, BatchNorm):
        return norm.relu_max_pool(x)
    return max_pool(relu(norm(x, train)))
