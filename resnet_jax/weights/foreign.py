"""Weights of other frameworks: their names and layouts become those of torchvision or timm.

Where a framework's network has the same weights as one of ours but computes something else
(another padding, a missing norm, a stride elsewhere), it is refused, or the fields of `ResNet`
that make ours compute the same are part of the result.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from resnet_jax.errors import WeightsError
from resnet_jax.models.resnet import ResNet

Tensors = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Translated:
    """Weights with torchvision's or timm's names.

    Args:
      tensors: By name, in PyTorch's layouts.
      framework: Whose they were; "": they had these names already.
      fields: Of `ResNet`, which such a network needs and its weights do not show.
      preprocessing: Fields of `Preprocessing`, where the framework's networks have their own.
      assumed: What is taken for granted of the network, one sentence each.
    """

    tensors: dict[str, Any]
    framework: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    def check(self, model: ResNet) -> None:
        """Raises WeightsError where a model lacks a field that these weights need."""
        for field, value in self.fields.items():
            found = getattr(model, field)
            # Epsilons of 1e-5 and 1.001e-5 differ less than rounding does.
            same = isinstance(value, float) and math.isclose(found, value, rel_tol=0.01)
            if found != value and not same:
                raise WeightsError(
                    f"weights of {self.framework} need {field}={value!r}, and the model has "
                    f"{field}={found!r}; make it with that field"
                )


def translate(tensors: Tensors) -> Translated:
    """Renames the tensors of other frameworks as torchvision (or timm) names them.

    Args:
      tensors: By name, without prefixes; names of nested dictionaries are joined by "/".

    Returns:
      The same numbers in PyTorch's layouts; names that no other framework has stay.

    Raises:
      WeightsError: They are of a network whose function no ResNet here has.

    Example:
      >>> found = translate({"embedder.embedder.convolution.weight": np.zeros((64, 3, 7, 7))})
      >>> found.framework, list(found.tensors)
      ('transformers', ['conv1.weight'])
    """
    for name in tensors:
        for marker, read in _FRAMEWORKS.items():
            if re.fullmatch(marker, name):
                return read(tensors)
    return Translated(dict(tensors))


# Hugging Face transformers.
_HUGGING_FACE = {
    r"embedder\.embedder\.convolution": "conv1",
    r"embedder\.embedder\.normalization": "bn1",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution": "layer{0}.{1}.conv{2}",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization": "layer{0}.{1}.bn{2}",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution": "layer{0}.{1}.downsample.0",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization": "layer{0}.{1}.downsample.1",
}


def _from_transformers(tensors: Tensors) -> Translated:
    """Hugging Face transformers' ResNet, with or without its head."""

    def rename(name: str) -> str:
        module, _, leaf = name.removeprefix("resnet.").rpartition(".")
        if module in ("classifier.1", "fc"):
            return f"fc.{leaf}"
        for pattern, target in _HUGGING_FACE.items():
            if match := re.fullmatch(pattern, module):
                numbers = [int(number) for number in match.groups()]  # all from 0
                numbers = [n + 1 if index != 1 else n for index, n in enumerate(numbers)]
                return f"{target.format(*numbers)}.{leaf}"
        return name

    assumed = "transformers' downsample_in_first_stage and downsample_in_bottleneck are false"
    return Translated(_renamed(tensors, rename), "transformers", assumed=(assumed,))


# Google's Big Transfer.
_BIT = re.compile(
    r"block(?P<stage>\d+)/unit(?P<block>\d+)/(?P<layer>[abc])/(?P<projection>proj/)?"
    r"(?P<kind>standardized_conv2d|group_norm)/(?P<leaf>\w+)"
)
_LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "scale": "weight",
    "bias": "bias",
    "beta": "bias",
    "mean": "running_mean",
    "moving_mean": "running_mean",
    "var": "running_var",
    "moving_variance": "running_var",
}


def _from_bit(tensors: Tensors) -> Translated:
    """The .npz files of Big Transfer."""

    def rename(name: str) -> str:
        name = re.sub(r"_\d+/", "/", name.removeprefix("resnet/"))
        if match := _BIT.fullmatch(name):
            number = "abc".index(match["layer"]) + 1
            layer = f"norm{number}" if match["kind"] == "group_norm" else f"conv{number}"
            layer = "downsample.conv" if match["projection"] else layer
            block = f"stages.{int(match['stage']) - 1}.blocks.{int(match['block']) - 1}"
            return f"{block}.{layer}.{_LEAVES.get(match['leaf'], match['leaf'])}"
        module, _, leaf = name.rpartition("/")
        top = {
            "root_block/standardized_conv2d": "stem.conv",
            "group_norm": "norm",
            "head/conv2d": "head.fc",
        }
        return f"{top[module]}.{_LEAVES.get(leaf, leaf)}" if module in top else name

    return Translated(
        _renamed(tensors, rename),
        "Big Transfer",
        fields={"weight_standardization": True},
        preprocessing={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    )


# Wide ResNets for CIFAR.
_WIDE = re.compile(r"block(\d+)\.layer\.(\d+)\.(bn\d|conv\d|convShortcut)\.(\w+)")


def _from_wide_resnet(tensors: Tensors) -> Translated:
    """WideResNet-pytorch by xternalz, and what follows it."""
    if "block1.layer.0.convShortcut.weight" not in tensors:
        raise WeightsError(
            "a WideResNet of width 1, whose first block passes the stem's output on before its "
            "norm and ReLU, where networks here pass it on after them (He et al. 2016, section 5)"
        )

    def rename(name: str) -> str:
        if match := _WIDE.fullmatch(name):
            stage, block, layer, leaf = match.groups()
            layer = layer.replace("bn", "norm").replace("convShortcut", "downsample.conv")
            return f"stages.{int(stage) - 1}.blocks.{block}.{layer}.{leaf}"
        module, _, leaf = name.rpartition(".")
        top = {"conv1": "stem.conv", "bn1": "norm", "fc": "head.fc"}
        return f"{top[module]}.{leaf}" if module in top else name

    return Translated(_renamed(tensors, rename), "WideResNet-pytorch")


def _check_cifar(tensors: Tensors) -> Translated:
    """CIFAR repositories' names; refuses pre-activation networks that compute something else."""
    for name in tensors:
        block = name.removesuffix(".shortcut.0.weight")
        lone = block != name and f"{block}.shortcut.1.weight" not in tensors
        if not lone or not {f"{block}.bn1.weight", f"{block}.conv1.weight"} <= tensors.keys():
            continue
        norm, conv = (_shape(tensors[f"{block}.{x}.weight"]) for x in ("bn1", "conv1"))
        if len(conv) != 4 or norm != conv[1:2]:  # its norm comes after its convolution
            continue
        if "bn1.weight" in tensors:
            raise WeightsError(
                "a wide network with pre-activation whose blocks stride in their second "
                "convolution and project what comes before the norm, as in "
                "meliketoy/wide-resnet.pytorch; networks here stride in the first convolution and "
                "project after norm and ReLU, and compute something else from the same weights"
            )
        raise WeightsError(
            "a pre-activation network without a final norm and ReLU, as in "
            "kuangliu/pytorch-cifar; networks here have them (He et al. 2016)"
        )
    return Translated(dict(tensors))


# Keras.
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


def _from_keras(tensors: Tensors) -> Translated:
    """Keras's ResNet50, 101 and 152, by the names of their layers."""
    if any("_preact_bn/" in name or "post_bn/" in name for name in tensors):
        raise WeightsError(_KERAS_V2)
    layers: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        if match := _KERAS.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["leaf"]] = value
    return _keras(layers)


def _from_keras_3(tensors: Tensors) -> Translated:
    """The same networks in Keras 3's files, which number the layers instead of naming them.

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
    names = _keras_order([_shape(conv.get(0)) for conv in convs])
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
    # A block with a projection ends in two 1x1 convolutions to as many channels, one of them
    # from the block's input; the next block starts with a 1x1 to fewer.
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
                continue  # in its norm
            if leaf == "moving_mean" and "bias" in biases:
                value = _difference(layer, value, biases["bias"])
            tensors[f"{target}.{_LEAVES[leaf]}"] = _to_torch(value)
    kernel = tensors.get("conv1.weight")
    if len(_shape(kernel)) == 4:
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
    """The running mean of a norm after a convolution with that bias, once the bias is left out."""
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


# Flax.
_JAX_RESNET = re.compile(
    r"(?:params|batch_stats)/(?P<block>\w+?)_(?P<number>\d+)"
    r"(?P<skip>/ResNet(?P<d>D?)SkipConnection_0)?(?:/ConvBlock_(?P<layer>\d))?"
    r"(?:/(?P<kind>Conv|BatchNorm)_0)?/(?P<leaf>\w+)"
)


def _from_flax_example(tensors: Tensors) -> Translated:
    """Flax's example for ImageNet, whose "SAME" padding no network here has."""
    raise WeightsError(
        'Flax\'s ImageNet example, which pads with "SAME": below its stride-2 convolutions and max '
        "pool on one side only, where networks here (and PyTorch's) pad on both sides; the same "
        "weights compute something else"
    )


def _from_jax_resnet(tensors: Tensors) -> Translated:
    """n2cholas/jax-resnet, whose blocks are counted through all stages."""
    matches = {name: match for name in tensors if (match := _JAX_RESNET.fullmatch(name))}
    if any("SplAtConv2d" in name for name in tensors):
        raise WeightsError("a ResNeSt of jax-resnet, whose blocks are none of this package's")
    units: dict[int, list[str]] = {}  # blocks by their running number
    deep = any(m["layer"] == "2" and _is_stem(m) for m in matches.values())
    skip_d = any(match["d"] for match in matches.values())
    for name, match in matches.items():
        if match["layer"] and not _is_stem(match):
            units.setdefault(int(match["number"]), []).append(name)
    places = _jax_resnet_places(tensors, matches, units)
    renamed = {}
    for name, value in tensors.items():
        match = matches.get(name)
        target = _jax_resnet_layer(match, places, deep, skip_d) if match else ""
        leaf = _LEAVES.get(match["leaf"], "") if match else ""
        renamed[f"{target}.{leaf}" if target else name] = _to_torch(value) if target else value
    return Translated(renamed, "jax-resnet")


def _is_stem(match: re.Match[str]) -> bool:
    return match["block"].endswith("Stem") or (match["block"], match["number"]) == ("layers", "0")


def _jax_resnet_places(
    tensors: Tensors, matches: Mapping[str, re.Match[str]], units: Mapping[int, list[str]]
) -> dict[int, str]:
    """Running number -> "layer1.0"; a stage begins where the blocks' first width changes."""
    places, stage, block, last = {}, 0, 0, -1
    for number in sorted(units):
        width = next(
            (
                _shape(tensors[name])[-1]
                for name in units[number]
                if matches[name]["layer"] == "0"
                and not matches[name]["skip"]
                and matches[name]["leaf"] == "kernel"
                and _shape(tensors[name])
            ),
            last,
        )
        stage, block = (stage, block + 1) if width == last else (stage + 1, 0)
        places[number], last = f"layer{stage}.{block}", width
    return places


def _jax_resnet_layer(
    match: re.Match[str], places: Mapping[int, str], deep: bool, skip_d: bool
) -> str:
    """The name of a layer in torchvision's scheme; "": it has none."""
    conv = match["kind"] == "Conv"
    if not match["layer"]:
        return "" if match["kind"] else "fc"
    layer = int(match["layer"])
    if _is_stem(match):
        if deep:
            return (
                f"conv1.{3 * layer}"
                if conv
                else ("bn1" if layer == 2 else f"conv1.{3 * layer + 1}")
            )
        return "conv1" if conv else "bn1"
    place = places[int(match["number"])]
    if match["skip"]:
        first = 1 if skip_d else 0
        return f"{place}.downsample.{first if conv else first + 1}"
    return f"{place}.{'conv' if conv else 'bn'}{layer + 1}"


def _renamed(tensors: Tensors, rename: Callable[[str], str]) -> dict[str, Any]:
    """Tensors by their new names; those of JAX and TensorFlow, with "/" in theirs, transposed."""
    return {
        rename(name): _to_torch(value) if "/" in name else value for name, value in tensors.items()
    }


def _to_torch(value: Any) -> Any:
    """[H, W, in, out] -> [out, in, H, W]; [in, out] -> [out, in]; no numbers are moved."""
    ndim = len(_shape(value))
    if ndim not in (2, 4):
        return value
    axes = (3, 2, 0, 1) if ndim == 4 else (1, 0)
    return value.permute(axes) if hasattr(value, "permute") else np.transpose(value, axes)


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor or array; () of anything else."""
    return tuple(value.shape) if hasattr(value, "shape") else ()


# A name that gives a framework away -> what reads its weights.
_FRAMEWORKS: dict[str, Callable[[Tensors], Translated]] = {
    r"(resnet\.)?embedder\.embedder\.convolution\.weight": _from_transformers,
    r"(resnet/)?root_block/standardized_conv2d(_\d+)?/kernel": _from_bit,
    r"block1\.layer\.0\.conv1\.weight": _from_wide_resnet,
    r"layer\d+\.\d+\.shortcut\.0\.weight": _check_cifar,
    r"(.*/)?conv1_conv/(.*/)?kernel(:0)?": _from_keras,
    r"(.*/)?conv2d/vars/0": _from_keras_3,
    r"params/conv_init/kernel": _from_flax_example,
    r"params/(layers_0|ResNetD?Stem_0)/ConvBlock_0/Conv_0/kernel": _from_jax_resnet,
}
