"""Weights of other frameworks, translated to the names and layouts of torchvision or timm.

Some frameworks' networks have the same weights as one of ours but compute something else (another
padding, a missing norm, a stride elsewhere). They are refused, or the result names the fields of
`ResNet` that make ours compute the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from resnet_jax.errors import WeightsError
from resnet_jax.weights import keras_names
from resnet_jax.weights.tensors import shape_of
from resnet_jax.weights.translated import LEAVES, Tensors, Translated, renamed, to_torch


def translate(tensors: Tensors) -> Translated:
    """Renames the tensors of other frameworks as torchvision (or timm) names them.

    Names of nested dictionaries are joined by "/". Tensors of no other framework keep their names.

    Raises:
      WeightsError: The weights' network computes something that no ResNet here does.

    Example:
      >>> import numpy as np
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
    return Translated(renamed(tensors, rename), "transformers", assumed=(assumed,))


# Google's Big Transfer.
_BIT = re.compile(
    r"block(?P<stage>\d+)/unit(?P<block>\d+)/(?P<layer>[abc])/(?P<projection>proj/)?"
    r"(?P<kind>standardized_conv2d|group_norm)/(?P<leaf>\w+)"
)


def _from_bit(tensors: Tensors) -> Translated:
    """The .npz files of Big Transfer."""

    def rename(name: str) -> str:
        name = re.sub(r"_\d+/", "/", name.removeprefix("resnet/"))
        if match := _BIT.fullmatch(name):
            number = "abc".index(match["layer"]) + 1
            layer = f"norm{number}" if match["kind"] == "group_norm" else f"conv{number}"
            layer = "downsample.conv" if match["projection"] else layer
            block = f"stages.{int(match['stage']) - 1}.blocks.{int(match['block']) - 1}"
            return f"{block}.{layer}.{LEAVES.get(match['leaf'], match['leaf'])}"
        module, _, leaf = name.rpartition("/")
        top = {
            "root_block/standardized_conv2d": "stem.conv",
            "group_norm": "norm",
            "head/conv2d": "head.fc",
        }
        return f"{top[module]}.{LEAVES.get(leaf, leaf)}" if module in top else name

    return Translated(
        renamed(tensors, rename),
        "Big Transfer",
        fields={"weight_standardization": True},
        preprocessing={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    )


# Wide ResNets for CIFAR.
_WIDE = re.compile(r"block(\d+)\.layer\.(\d+)\.(bn\d|conv\d|convShortcut)\.(\w+)")


def _from_wide_resnet(tensors: Tensors) -> Translated:
    """WideResNet-pytorch by xternalz, and its descendants."""
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

    return Translated(renamed(tensors, rename), "WideResNet-pytorch")


def _check_cifar(tensors: Tensors) -> Translated:
    """CIFAR repositories' names, unless a pre-activation network computes something else."""
    for name in tensors:
        block = name.removesuffix(".shortcut.0.weight")
        lone = block != name and f"{block}.shortcut.1.weight" not in tensors
        if not lone or not {f"{block}.bn1.weight", f"{block}.conv1.weight"} <= tensors.keys():
            continue
        norm, conv = (shape_of(tensors[f"{block}.{x}.weight"]) for x in ("bn1", "conv1"))
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


# Flax.
_JAX_RESNET = re.compile(
    r"(?:params|batch_stats)/(?P<block>\w+?)_(?P<number>\d+)"
    r"(?P<skip>/ResNet(?P<d>D?)SkipConnection_0)?(?:/ConvBlock_(?P<layer>\d))?"
    r"(?:/(?P<kind>Conv|BatchNorm)_0)?/(?P<leaf>\w+)"
)


def _refuse_flax_example(tensors: Tensors) -> Translated:
    raise WeightsError(
        'Flax\'s ImageNet example, which pads with "SAME": below its stride-2 convolutions and max '
        "pool on one side only, where networks here (and PyTorch's) pad on both sides; the same "
        "weights compute something else"
    )


def _from_jax_resnet(tensors: Tensors) -> Translated:
    """n2cholas/jax-resnet, whose blocks are counted through all stages."""
    matches = {name: match for name in tensors if (match := _JAX_RESNET.fullmatch(name))}
    if any("SplAtConv2d" in name for name in tensors):
        raise WeightsError("a ResNeSt of jax-resnet, whose blocks this package does not have")
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
        leaf = LEAVES.get(match["leaf"], "") if match else ""
        renamed[f"{target}.{leaf}" if target else name] = to_torch(value) if target else value
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
                shape_of(tensors[name])[-1]
                for name in units[number]
                if matches[name]["layer"] == "0"
                and not matches[name]["skip"]
                and matches[name]["leaf"] == "kernel"
                and shape_of(tensors[name])
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


# A name that only one framework has -> the function that reads its weights.
_FRAMEWORKS: dict[str, Callable[[Tensors], Translated]] = {
    r"(resnet\.)?embedder\.embedder\.convolution\.weight": _from_transformers,
    r"(resnet/)?root_block/standardized_conv2d(_\d+)?/kernel": _from_bit,
    r"block1\.layer\.0\.conv1\.weight": _from_wide_resnet,
    r"layer\d+\.\d+\.shortcut\.0\.weight": _check_cifar,
    r"(.*/)?conv1_conv/(.*/)?kernel(:0)?": keras_names.from_named_layers,
    r"(.*/)?conv2d/vars/0": keras_names.from_numbered_layers,
    r"params/conv_init/kernel": _refuse_flax_example,
    r"params/(layers_0|ResNetD?Stem_0)/ConvBlock_0/Conv_0/kernel": _from_jax_resnet,
}
