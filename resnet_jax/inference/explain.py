"""Explains predictions by Grad-CAM and integrated gradients, and measures layer responses.

Grad-CAM (Selvaraju et al. 2017) weights the channels of a feature map by how much each raises the
logit of a class; integrated gradients (Sundararajan et al. 2017) attribute the logit to pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from resnet_jax.errors import ModelError
from resnet_jax.models.layers import Conv
from resnet_jax.models.norms import BatchNorm, GroupNorm, OwnNorm
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.convert import Variables
from resnet_jax.weights.naming import unknown_layer


def grad_cam(
    model: ResNet, variables: Variables, images: jax.Array, classes: jax.Array, layer: str = ""
) -> jax.Array:
    """Where the evidence for a class lies in an image (Selvaraju et al. 2017, equations 1 and 2).

    Args:
      model: The network.
      variables: {"params", "batch_stats"}.
      images: Normalized, [N, H, W, C].
      classes: The class to explain in each image, int32 [N].
      layer: "stem", "stage1", ... Default: the last stage, the coarsest and most informative map.

    Returns:
      float32 [N, H, W] in [0, 1]: the map's evidence, resized to the images; 0 everywhere without
      evidence for the class.

    Raises:
      ModelError: There is no such layer.

    Example:
      >>> import resnet_jax as rj
      >>> model, images = rj.ResNet20(), jnp.ones((2, 32, 32, 3))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> grad_cam(model, variables, images, jnp.array([3, 7])).shape
      (2, 32, 32)
    """
    model = model.clone(remat=False)  # remat would hide the layers' outputs
    names = ["stem", *(f"stage{number + 1}" for number in range(len(model.stage_sizes)))]
    layer = layer or names[-1]
    if layer not in names:
        raise ModelError(unknown_layer(layer, names))
    features, gradient = _map_and_gradient(model, layer, variables, images, classes)  # [N, h, w, K]
    weights = gradient.astype(jnp.float32).mean((1, 2), keepdims=True)  # [N, 1, 1, K]
    evidence = nn.relu((weights * features.astype(jnp.float32)).sum(-1))  # [N, h, w]
    evidence = jax.image.resize(evidence, images.shape[:3], "bilinear")
    most = evidence.max((1, 2), keepdims=True)
    return evidence / jnp.where(most > 0, most, 1)


# Compiled once per network, whatever its variables are.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _map_and_gradient(
    model: ResNet, layer: str, variables: Variables, images: jax.Array, classes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A layer's map and the gradient of the classes' logits with respect to it, [N, h, w, K]."""
    maps: Any = model.apply(variables, images, train=False, method="features")

    def score(added: jax.Array) -> jax.Array:
        with nn.intercept_methods(_add_to_output(layer, added)):
            return _logits(model, variables, images, classes).sum()

    # The gradient with respect to a summand of the map is the gradient with respect to the map.
    return maps[layer], jax.grad(score)(jnp.zeros_like(maps[layer]))


def _logits(
    model: ResNet, variables: Variables, images: jax.Array, classes: jax.Array
) -> jax.Array:
    """The logit of each image's class, [N]."""
    logits = jnp.asarray(model.apply(variables, images, train=False))
    return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]


def _add_to_output(layer: str, added: jax.Array) -> Callable[..., Any]:
    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        wanted = context.module.path == (layer,) and context.method_name == "__call__"
        return y + added if wanted else y

    return intercept


def integrated_gradients(
    model: ResNet,
    variables: Variables,
    images: jax.Array,
    classes: jax.Array,
    baseline: jax.Array | None = None,
    steps: int = 50,
) -> jax.Array:
    """How much each pixel adds to a class's logit (Sundararajan et al. 2017, equation 2).

    The sum over an image is the difference of the logits of image and baseline, up to the error of
    approximating the integral by `steps` gradients.

    Args:
      model: The network.
      variables: {"params", "batch_stats"}.
      images: Normalized, [N, H, W, C].
      classes: The class to explain in each image, int32 [N].
      baseline: An image without information, [H, W, C]. Default: 0, the mean color.
      steps: Points on the straight line from baseline to image.

    Returns:
      float32 [N, H, W, C], in units of the logit.

    Example:
      >>> import resnet_jax as rj
      >>> model, images = rj.ResNet20(), jnp.ones((2, 32, 32, 3))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> integrated_gradients(model, variables, images, jnp.array([3, 7]), steps=2).shape
      (2, 32, 32, 3)
    """
    images = jnp.asarray(images, jnp.float32)
    start = jnp.zeros_like(images) if baseline is None else jnp.broadcast_to(baseline, images.shape)
    total = jnp.zeros_like(images)
    for step in range(steps):  # at the middles of equal intervals
        points = start + (step + 0.5) / steps * (images - start)
        total += _pixel_gradient(model, variables, points, classes)
    return (images - start) * total / steps


@functools.partial(jax.jit, static_argnums=0)
def _pixel_gradient(
    model: ResNet, variables: Variables, images: jax.Array, classes: jax.Array
) -> jax.Array:
    return jax.grad(lambda images: _logits(model, variables, images, classes).sum())(images)


def responses(model: ResNet, variables: Variables, images: jax.Array) -> dict[str, float]:
    """Standard deviation of each layer's response (He et al. 2015, Figure 7).

    A response is the output of a convolution and its norm, before ReLU or addition; in
    pre-activation networks, where the norm comes first, the convolution's own output. Projections
    are left out.

    Args:
      model: The network.
      variables: {"params", "batch_stats"}.
      images: Normalized, [N, H, W, C].

    Returns:
      Layer -> standard deviation over images, positions and channels, in the network's order.

    Example:
      >>> import resnet_jax as rj
      >>> model, images = rj.ResNet20(), jnp.ones((2, 32, 32, 3))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> list(responses(model, variables, images))[:2]
      ['stage1/block1/conv1', 'stage1/block1/conv2']
    """
    model = model.clone(remat=False)
    flat = traverse_util.flatten_dict(jax.device_get(_deviations(model, variables, images)))
    found = {
        "/".join(path[:-1]).replace("norm", "conv"): float(np.asarray(value[0]))
        for path, value in flat.items()
        if len(path) == 4 and path[0].startswith("stage")  # (stage, block, layer, "__call__")
    }
    return {name: found[name] for name in sorted(found, key=_place)}


@functools.partial(jax.jit, static_argnums=0)
def _deviations(model: ResNet, variables: Variables, images: jax.Array) -> Any:
    """Standard deviations of the norms' outputs, or of the convolutions' in pre-activation nets."""
    wanted = Conv if model.block_cls.preactivation else (BatchNorm, GroupNorm, OwnNorm)
    captured: Any
    _, captured = model.apply(
        variables,
        images,
        train=False,
        mutable=["intermediates"],
        capture_intermediates=lambda module, method: (
            method == "__call__" and isinstance(module, wanted)
        ),
    )
    return jax.tree.map(lambda x: x.astype(jnp.float32).std(), captured["intermediates"])


def _place(layer: str) -> tuple[int, ...]:
    """ "stage2/block10/conv1" -> (2, 10, 1)."""
    return tuple(int("".join(filter(str.isdigit, part))) for part in layer.split("/"))
