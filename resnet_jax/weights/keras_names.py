"""Keras's ResNet50, 101 and 152: names of their layers to torchvision's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from resnet_jax.errors import WeightsError
from resnet_jax.weights.tensors import shape_of
from resnet_jax.weights.translated import LEAVES, Tensors, Translated, to_torch

_KERAS = re.compile(
    r"(?:.*/)?(?P<layer>conv\d_(?:block\d+_\d_)?(?:conv|bn)|predictions|probs|fc1000)"
    r"/(?:.*/)?(?P<leaf>kernel|bias|gamma|beta|moving_mean|moving_variance)(?::0)?"
)
_KERAS_3 = re.compile(
    r"(?P<path>.*/)?(?P<kind>conv2d|batch_normalization|dense)(?:_(?P<number>\d{1,6}))?"
    r"/vars/(?P<index>\d)"
)
_KERAS_V2 = "Keras's ResNetV2, which strides in the last block of a stage instead of the first"
# What keras.applications.resnet.preprocess_input subtracts, blue first, of numbers up to 255.
_KERAS_MEAN = (103.939, 116.779, 123.68)


def from_named_layers(tensors: Tensors) -> Translated:
    """Files with the names of the layers."""
    if any("_preact_bn/" in name or "post_bn/" in name for name in tensors):
        raise WeightsError(_KERAS_V2)
    layers: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        if match := _KERAS.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["leaf"]] = value
    return _keras(layers)


def from_numbered_layers(tensors: Tensors) -> Translated:
    """Keras 3's files, which number the layers instead of naming them.

    A block's layers come in the order of their depth: two convolutions, then the projection and
    the last convolution.
    """
    found: dict[tuple[str, int], dict[int, Any]] = {}
    for name, value in tensors.items():
        if match := _KERAS_3.fullmatch(name):
            key = match["kind"], int(match["number"] or 0)
            found.setdefault(key, {})[int(match["index"])] = value
    convs = [found[key] for key in sorted(found) if key[0] == "conv2d"]
    norms = [found[key] for key in sorted(found) if key[0] == "batch_normalization"]
    if any(1 not in conv for conv in convs):
        raise WeightsError(_KERAS_V2 if 0 < len(norms) < len(convs) else _not_keras())
    layers: dict[str, dict[str, Any]] = {}
    names = _keras_order([shape_of(conv.get(0)) for conv in convs])
    if len(norms) != len(convs):
        raise WeightsError(_not_keras())
    for name, conv, norm in zip(names, convs, norms, strict=True):
        layers[f"{name}_conv"] = {"kernel": conv[0], "bias": conv[1]}
        leaves = ("gamma", "beta", "moving_mean", "moving_variance")
        layers[f"{name}_bn"] = {leaf: norm[i] for i, leaf in enumerate(leaves) if i in norm}
    dense = [found[key] for key in sorted(found) if key[0] == "dense"]
    if len(dense) == 1:
        layers["predictions"] = dict(zip(("kernel", "bias"), dense[0].values(), strict=False))
    return _keras(layers)


def _keras_order(shapes: list[tuple[int, ...]]) -> list[str]:
    """Keras's names of the convolutions of a ResNet with these kernels [H, W, in, out]."""
    sides = "".join(str(shape[0]) if len(shape) == 4 else "?" for shape in shapes)
    if not re.fullmatch("7(1311?)+", sides):
        raise WeightsError(_not_keras())
    names, stage, block, start = ["conv1"], 1, 0, 1
    # A block with a projection ends in two 1x1 convolutions to the same number of channels, one of
    # them from the block's input; the next block starts with a 1x1 to fewer channels.
    while start < len(shapes):
        after = shapes[start + 2 : start + 4]
        projects = len(after) == 2 and after[0][3] == after[1][3]
        stage, block = (stage + 1, 1) if projects else (stage, block + 1)
        order = (1, 2, 0, 3) if projects else (1, 2, 3)
        names += [f"conv{stage}_block{block}_{number}" for number in order]
        start += len(order)
    if len(names) != len(shapes):
        raise WeightsError(_not_keras())
    return names


def _not_keras() -> str:
    return (
        "a Keras network that is not ResNet50, 101 or 152 of keras.applications; its layers have "
        "numbers and no names"
    )


def _keras(layers: Mapping[str, Mapping[str, Any]]) -> Translated:
    tensors: dict[str, Any] = {}
    for layer, leaves in layers.items():
        target = _keras_layer(layer)
        biases = layers.get(layer.removesuffix("_bn") + "_conv", {}) if "_bn" in layer else {}
        for leaf, value in leaves.items():
            if layer.endswith("_conv") and leaf == "bias":
                continue  # goes into the norm's mean
            if leaf == "moving_mean" and "bias" in biases:
                value = _difference(layer, value, biases["bias"])
            tensors[f"{target}.{LEAVES[leaf]}"] = to_torch(value)
    kernel = tensors.get("conv1.weight")
    if len(shape_of(kernel)) == 4:
        tensors["conv1.weight"] = np.asarray(kernel)[:, ::-1]
    return Translated(
        tensors,
        "Keras",
        fields={"stride_in_1x1": True, "bn_epsilon": 1.001e-5},
        preprocessing={
            "mean": tuple(value / 255 for value in reversed(_KERAS_MEAN)),
            "std": (1 / 255,) * 3,
        },
        assumed=("the weights were for blue-green-red images, as Keras prepares them",),
    )


def _difference(layer: str, mean: Any, bias: Any) -> np.ndarray:
    """The running mean of a norm after a convolution whose bias is dropped."""
    arrays = np.asarray(mean), np.asarray(bias)
    if arrays[0].shape != arrays[1].shape or any(x.dtype.kind != "f" for x in arrays):
        raise WeightsError(f"{layer}'s moving_mean and its convolution's bias do not fit")
    return arrays[0].astype(np.float32) - arrays[1].astype(np.float32)


def _keras_layer(layer: str) -> str:
    """conv2_block1_0_bn -> layer1.0.downsample.1."""
    match = re.fullmatch(r"conv(\d)_block(\d+)_(\d)_(conv|bn)", layer)
    if not match:
        return {"conv1_conv": "conv1", "conv1_bn": "bn1"}.get(layer, "fc")
    stage, block, number, kind = match.groups()
    inside = f"{kind}{number}"
    if number == "0":
        inside = "downsample.0" if kind == "conv" else "downsample.1"
    return f"layer{int(stage) - 1}.{int(block) - 1}.{inside}"
