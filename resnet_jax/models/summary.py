"""A table of a network's layers: output shapes, parameters and multiply-adds, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.attention import ChannelConv
from resnet_jax.models.layers import Conv
from resnet_jax.models.norms import BatchNorm, GroupNorm, OwnNorm
from resnet_jax.models.resnet import ResNet

# Listed even where they have no parameters.
_LAYERS = (Conv, ChannelConv, nn.Conv, nn.Dense, BatchNorm, GroupNorm)

# Simonyan & Zisserman 2015, Table 1, column D: 3x3 convolutions, M a 2x2 max pool.
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a network: its path, output shape, parameters and multiply-adds."""

    path: tuple[str, ...]
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """A network's layers with totals; its `str` is the table.

    Multiply-adds are those of convolutions and dense layers, for the whole batch, as the paper
    counts its "FLOPs" (Table 1).
    """

    layers: tuple[Layer, ...]
    input_shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Trainable parameters of all layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all layers for the whole batch."""
        return sum(layer.multiply_adds for layer in self.layers)

    def __str__(self) -> str:
        header = ("layer", "kind", "output", "parameters", "multiply-adds")
        rows = [_row("/".join(each.path), each) for each in self.layers]
        total = ("total", "", "", f"{self.parameters:,}", f"{self.multiply_adds:,}")
        lines = _align([header, *rows, total])
        rule = "-" * len(lines[0])
        each = self.multiply_adds / self.input_shape[0]
        notes = [f"input {list(self.input_shape)}: {each / 1e9:.2f} G multiply-adds an image"]
        if self.input_shape[1:3] == (224, 224):
            parameters, multiply_adds = vgg16_counts()
            notes += [
                f"VGG-16, which the ResNet paper compares with, has {parameters / 1e6:.0f} M "
                f"parameters and {multiply_adds / 1e9:.1f} G:",
                f"this network has {self.parameters / parameters:.0%} and "
                f"{each / multiply_adds:.0%} of them",
            ]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], "", *notes])


def summary(model: ResNet, shape: Sequence[int]) -> Summary:
    """Counts a model's parameters and multiply-adds layer by layer, without running it.

    Args:
      model: A ResNet.
      shape: Of the images: (N, H, W, C).

    Returns:
      The layers in the order in which they run, with totals; print it for a table.

    Raises:
      ModelError: The image is too small for the model.

    Example:
      >>> from resnet_jax.models.constructors import ResNet50
      >>> counts = summary(ResNet50(stride_in_1x1=True), (1, 224, 224, 3))
      >>> counts.parameters, counts.multiply_adds
      (25557032, 3857973248)
    """
    layers: list[Layer] = []

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        module = context.module
        # A layer is what has parameters of its own, beside those of the modules inside it.
        variables = module.variables.get("params", {})
        parameters = [leaf for leaf in variables.values() if not isinstance(leaf, Mapping)]
        is_layer = (parameters or isinstance(module, _LAYERS)) and not isinstance(module, OwnNorm)
        if context.method_name == "__call__" and is_layer:
            # Each output value is a sum over one filter: spatial taps times input channels.
            kernel = variables.get("kernel")
            sums = 0 if kernel is None else output.size * math.prod(kernel.shape[:-1])
            layers.append(
                Layer(
                    path=module.path,
                    kind=type(module).__name__,
                    output_shape=output.shape,
                    parameters=sum(leaf.size for leaf in parameters),
                    multiply_adds=sums,
                )
            )
        return output

    # Rematerialized blocks are traced out of order; they compute the same.
    model = model.clone(parent=None, remat=False)
    images = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda rng, x: model.init(rng, x, train=False), jax.random.key(0), images)
    return Summary(tuple(layers), tuple(shape))


def training_flops(model: ResNet, shape: Sequence[int]) -> float:
    """Floating-point operations of a training step on images of `shape`, (N, H, W, C).

    A training step makes 3 passes of 2 operations for each multiply-add that `summary` counts: the
    gradients of a product with respect to its input and to its kernel each cost what the product
    costs. Because the model is counted and not a compiled program, the number is the same for every
    platform, precision and way to split a batch. It leaves out what is no matrix product: norms,
    activations, augmentation, the optimizer, recomputed blocks.

    Example:
      >>> from resnet_jax.models.constructors import ResNet20
      >>> training_flops(ResNet20(), (128, 32, 32, 3)) / 1e9
      31.14319872
    """
    return 3.0 * 2.0 * summary(model, shape).multiply_adds


def vgg16_counts(image_size: int = 224, num_classes: int = 1000) -> tuple[int, int]:
    """(parameters, multiply-adds for one image) of VGG-16, which the paper compares ResNet with.

    `image_size` is a side in pixels, a multiple of 32.
    """
    parameters = multiply_adds = 0
    side, channels = image_size, 3
    for features in _VGG16:
        if isinstance(features, str):
            side //= 2
            continue
        kernel = 9 * channels * features
        parameters += kernel + features
        multiply_adds += kernel * side * side
        channels = features
    inputs = channels * side * side
    for outputs in (4096, 4096, num_classes):
        parameters += inputs * outputs + outputs
        multiply_adds += inputs * outputs
        inputs = outputs
    return parameters, multiply_adds


def _row(name: str, layer: Layer) -> tuple[str, ...]:
    shape = "x".join(map(str, layer.output_shape[1:]))
    multiply_adds = f"{layer.multiply_adds:,}" if layer.multiply_adds else ""
    return name, layer.kind, shape, f"{layer.parameters:,}", multiply_adds


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3])]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:])]
        # Numbers are one space apart where they are longest, so that 80 columns are enough.
        aligned.append(" ".join(["  ".join(left), *right]).rstrip())
    return aligned
