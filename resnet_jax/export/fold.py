"""Batch norm folded into the convolutions, for networks that are no longer trained.

With running statistics, a batch norm multiplies each channel by a factor and adds a constant. Where
it follows a convolution, the factor goes into the kernel and the constant becomes the convolution's
bias. In a pre-activation network, the first norm of each block and the last one of the network
follow a sum instead, and keep factor and constant.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from resnet_jax.errors import ModelError
from resnet_jax.models.blocks import (
    BasicBlock,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
)
from resnet_jax.models.layers import Dtype, Initializer, ModuleDef
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stem import CifarStem, DeepStem, ImageNetStem
from resnet_jax.weights.naming import ModulePath

# Blocks and stems whose layers have the names that `_folded_into` expects.
_KNOWN_BLOCKS = (BasicBlock, BottleneckBlock, PreActBasicBlock, PreActBottleneckBlock)
_KNOWN_STEMS = (ImageNetStem, DeepStem, CifarStem)


class FoldedNorm(nn.Module):
    """A folded batch norm: x + bias, or x * scale + bias where no convolution took the scale.

    Its variables decide whether there is a scale. `scale_init` is not used.
    """

    scale_init: Initializer = nn.initializers.ones
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if train:
            raise ModelError("train=True: a network with folded norms is for inference only")
        x = x.astype(jnp.float32)
        if self.has_variable("params", "scale"):
            x = x * self.get_variable("params", "scale")
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return (x + bias).astype(self.dtype)


class FoldedResNet(ResNet):
    """A `ResNet` after `fold_batch_norm`, with the fields of the network it was made from."""

    def _norm_cls(self) -> ModuleDef:
        return functools.partial(FoldedNorm, dtype=self.dtype)


def fold_batch_norm(
    model: ResNet, variables: Mapping[str, Any]
) -> tuple[FoldedResNet, dict[str, Any]]:
    """Folds every batch norm into the convolution before it.

    Args:
      model: A ResNet with batch norm, and stems and blocks of this package.
      variables: Its {"params", "batch_stats"}.

    Returns:
      (model, {"params"}) of a network without batch norms that computes the same up to float32
      rounding, for `train=False` only.

    Raises:
      ModelError: Group norm, whose statistics are each image's own, or a block or stem of another
        kind.

    Example:
      >>> import resnet_jax as rj
      >>> model, images = rj.ResNet20(), jnp.ones((1, 32, 32, 3))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> folded, smaller = fold_batch_norm(model, variables)
      >>> logits = folded.apply(smaller, images, train=False)
      >>> bool(jnp.abs(logits - model.apply(variables, images, train=False)).max() < 1e-5)
      True
    """
    _check(model)
    leaves = traverse_util.flatten_dict(jax.tree.map(np.asarray, dict(variables)))
    params = {path[1:]: leaf for path, leaf in leaves.items() if path[0] == "params"}
    for collection, *norm, leaf in leaves:
        if (collection, leaf) != ("batch_stats", "mean"):
            continue
        path = tuple(norm)
        factor, constant = _factor_and_constant(leaves, path, model.bn_epsilon)
        del params[*path, "scale"]
        params[*path, "bias"] = constant.astype(np.float32)
        conv = _folded_into(path, model.block_cls.preactivation)
        if conv is None:
            params[*path, "scale"] = factor.astype(np.float32)
        else:
            kernel = params[*conv, "kernel"]
            params[*conv, "kernel"] = (kernel * factor).astype(np.float32)
    fields = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(ResNet)
        if field.init and field.name not in ("parent", "name")
    }
    return FoldedResNet(**fields), {"params": traverse_util.unflatten_dict(params)}


def _factor_and_constant(
    leaves: Mapping[ModulePath, np.ndarray], norm: ModulePath, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """The norm as x * factor + constant, in float64, so that the result is rounded once."""
    scale, bias = (leaves["params", *norm, name].astype(np.float64) for name in ("scale", "bias"))
    mean, variance = (
        leaves["batch_stats", *norm, name].astype(np.float64) for name in ("mean", "var")
    )
    factor = scale / np.sqrt(variance + epsilon)
    return factor, bias - mean * factor


def _folded_into(norm: ModulePath, preactivation: bool) -> ModulePath | None:
    """The convolution whose output the norm takes; None for a norm that follows a sum.

    norm1 follows conv1, and so on; in a pre-activation block norm2 does.
    """
    *parent, name = norm
    if name == "pool_norm":
        return (*parent, "pool_conv")
    number = int(name.removeprefix("norm")) if name.startswith("norm") else 0
    if preactivation and parent != ["stem"]:
        number -= 1
    return (*parent, f"conv{number}") if number > 0 else None


def _check(model: ResNet) -> None:
    if isinstance(model, FoldedResNet):
        raise ModelError("the network's batch norms are folded already")
    if model.norm != "batch":
        raise ModelError(
            f"norm = {model.norm!r} cannot be folded: its statistics are each image's own; "
            "only batch norm's are fixed"
        )
    if model.block_cls not in _KNOWN_BLOCKS or model.stem_type not in _KNOWN_STEMS:
        raise ModelError(
            f"{model.block_cls.__name__} on {model.stem_type.__name__} cannot be folded: which "
            "convolution a norm follows is only known for the blocks and stems of this package"
        )
