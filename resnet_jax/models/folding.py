"""Batch norm folded into the convolutions, for networks that are no longer trained.

With running statistics, a batch norm multiplies each channel by a factor and adds a constant. Where
it follows a convolution, the factor goes into the kernel and only the constant, a bias, is left to
add. A GPU then adds bias and shortcut and applies ReLU inside the convolution, so that every
activation is written once and read once:

    relu(conv(x, kernel) + bias + shortcut)

Which norm follows which convolution is found by tracing the network, so that networks of users fold
as well. A norm that follows a sum, as in pre-activation networks, keeps its factor.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from resnet_jax.models.layers import STANDARDIZE_EPSILON, Conv
from resnet_jax.models.norms import BatchNorm
from resnet_jax.models.resnet import ResNet
from resnet_jax.ops.convolution import bias_type

_Path = tuple[str, ...]  # of a module, such as ("stage1", "block1", "conv1")


def fold_batch_norm(model: ResNet, variables: Mapping[str, Any]) -> tuple[ResNet, dict[str, Any]]:
    """Folds the batch norms of a network into its convolutions, for `train=False`.

    The result computes the same up to rounding in `model.dtype`, and faster. Folding works on
    arrays, and on the arguments of a function under `jax.jit`.

    Args:
      model: The network; its blocks and stem may be your own.
      variables: Its {"params", "batch_stats"}.

    Returns:
      (model, variables) to apply instead, by `__call__` or `features`. Kernels have the type in
      which the network computes. Weight standardization is folded too. Norms other than `BatchNorm`
      stay as they are; a network without any, or folded before, is returned unchanged.

    Example:
      >>> import resnet_jax as rj
      >>> model, images = rj.ResNet20(), jnp.ones((1, 32, 32, 3))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> folded, smaller = fold_batch_norm(model, variables)
      >>> sorted(smaller)
      ['params']
      >>> logits = folded.apply(smaller, images, train=False)
      >>> bool(jnp.abs(logits - model.apply(variables, images, train=False)).max() < 1e-5)
      True
    """
    standardizes = getattr(model, "weight_standardization", False)
    if not (variables.get("batch_stats") or standardizes):
        return model, dict(variables)
    layers = _find_layers(model)
    leaves = traverse_util.flatten_dict(dict(variables))
    kernels = {
        path: _exact(leaves["params", *path, "kernel"])
        for path in layers.convs
        if np.ndim(leaves.get(("params", *path, "kernel"))) == 4
    }
    if standardizes:
        plain = model.clone(weight_standardization=False)
        without = _find_layers(plain)
        if not any(conv.standardize for conv in without.convs.values()):
            for path in kernels:
                if layers.convs[path].standardize:
                    kernels[path] = _standardized(kernels[path])
            model, layers = plain, without
    for path, norm in layers.norms.items():
        if ("batch_stats", *path, "mean") not in leaves:
            continue
        scale, bias = (_exact(leaves.pop(("params", *path, name))) for name in ("scale", "bias"))
        mean, variance = (
            _exact(leaves.pop(("batch_stats", *path, name))) for name in ("mean", "var")
        )
        factor = scale * (variance + norm.epsilon) ** -0.5
        bias = bias - mean * factor
        conv = layers.before.get(path)
        if conv in kernels and _computes_alike(layers.convs[conv], norm):
            kernels[conv] = kernels[conv] * factor
            leaves["params", *path, "bias"] = bias.astype(bias_type(norm.dtype))
        else:
            leaves["params", *path, "factor"] = factor.astype(np.float32)
            leaves["params", *path, "bias"] = bias.astype(np.float32)
    for path, kernel in kernels.items():
        leaves["params", *path, "kernel"] = kernel.astype(layers.convs[path].dtype)
    return model, traverse_util.unflatten_dict(leaves)


def _exact(leaf: Any) -> Any:
    """An array in float64, so that the result is rounded once; a traced one as it is."""
    return leaf if isinstance(leaf, jax.core.Tracer) else np.asarray(leaf, np.float64)


def _standardized(kernel: Any) -> Any:
    """`standardize_kernel` of arrays that need not be JAX's."""
    mean = kernel.mean((0, 1, 2), keepdims=True)
    variance = kernel.var((0, 1, 2), keepdims=True)
    return (kernel - mean) * (variance + STANDARDIZE_EPSILON) ** -0.5


def _computes_alike(conv: Conv, norm: BatchNorm) -> bool:
    """Whether the sum of a convolution and a bias has the type that the norm returns."""
    return not conv.standardize and jnp.dtype(conv.dtype) == jnp.dtype(norm.dtype)


class _Layers(NamedTuple):
    """The convolutions and batch norms of a network."""

    convs: dict[_Path, Conv]
    norms: dict[_Path, BatchNorm]
    before: dict[_Path, _Path]  # norm -> the convolution that it follows, and nothing else does


_CONV, _NORM = "resnet_jax convolution ", "resnet_jax norm "


def _find_layers(model: ResNet) -> _Layers:
    """Traces a network and marks what its convolutions return and its norms take.

    Only exact instances of `Conv` and `BatchNorm` count, because a subclass may compute anything.
    """
    convs: dict[_Path, Conv] = {}
    norms: dict[_Path, BatchNorm] = {}
    calls: collections.Counter[tuple[_Path, str]] = collections.Counter()

    def mark(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        path, name = module.path, "/".join(module.path)
        if type(module) is Conv:
            calls[path, method] += 1
            convs[path] = module.clone(parent=None)
            y = call(*args, **kwargs)
            return checkpoint_name(y, _CONV + name) if method == "__call__" else y
        if type(module) is BatchNorm:
            calls[path, method] += 1
            norms[path] = module.clone(parent=None)
            if args and method == "__call__":
                args = (checkpoint_name(args[0], _NORM + name), *args[1:])
        return call(*args, **kwargs)

    side = model.output_stride or model.strides()[-1]
    images = jax.ShapeDtypeStruct((1, side, side, 3), model.dtype)
    init = functools.partial(model.clone(parent=None, remat=False).init_with_output, train=False)
    with nn.intercept_methods(mark):
        traced = jax.make_jaxpr(init)(jax.random.key(0), images)
    # A layer that is called twice, or whose kernel is read beside the call, has another reader.
    once = {path for path in convs if calls[path, "__call__"] == calls[path, "filters"] == 1}
    before = {
        norm: conv
        for norm, conv in _pairs(traced.jaxpr)
        if conv in once and calls[norm, "__call__"] == 1
    }
    return _Layers(convs, norms, before)


def _pairs(jaxpr: Any) -> Iterator[tuple[_Path, _Path]]:
    """(norm, convolution) where the norm, and nothing else, takes what the convolution returns.

    Both are layers of one block, because what a block returns is also read by `ResNet.features`.
    """
    readers = collections.Counter(
        variable
        for variables in (jaxpr.outvars, *(equation.invars for equation in jaxpr.eqns))
        for variable in variables
        if not isinstance(variable, core.Literal)
    )
    convs: dict[Any, str] = {}
    for equation in jaxpr.eqns:
        mark = str(equation.params.get("name", ""))
        if mark.startswith(_CONV):
            convs[equation.outvars[0]] = mark.removeprefix(_CONV)
        elif mark.startswith(_NORM) and readers[equation.invars[0]] == 1:
            conv, norm = convs.get(equation.invars[0], ""), mark.removeprefix(_NORM)
            if conv.rpartition("/")[0] == norm.rpartition("/")[0]:
                yield tuple(norm.split("/")), tuple(conv.split("/"))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                    yield from _pairs(getattr(inner, "jaxpr", inner))
