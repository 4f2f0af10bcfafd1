"""PyTorch repositories' names of our layers: one table per naming scheme.

Our paths are ("stage2", "block3", "conv1"); theirs join a prefix for the block and a name inside
it, such as "layer2.2.conv1". Stages count from 1 everywhere, their blocks from 0, ours from 1.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from resnet_jax.errors import unknown_name
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stem import DeepStem

ModulePath = tuple[str, ...]

# Our leaf -> theirs; a norm's scale and a convolution's kernel are both "weight" there.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# torchvision's modules whose outputs are feature maps here.
_TORCHVISION_MAPS = {"maxpool": "stem", "avgpool": "pooled", "global_pool": "pooled"}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way of naming a ResNet's layers. Our paths are joined by "/" in its tables."""

    name: str  # for messages
    block: str  # prefix with {stage} (from 1), {stage_from_0}, {next_stage}, {block} (from 0)
    layers: Mapping[str, str]  # our path inside a block -> the name after the prefix
    top: Mapping[str, str]  # our path outside the stages -> the whole name
    dense_as_conv: frozenset[str] = frozenset()  # our dense layers that are 1x1 convolutions there

    @property
    def head(self) -> str:
        """Their name of the head."""
        return self.top["head"]

    def torch_name(self, path: ModulePath) -> str:
        """Their name of one of our leaves; our own path where they have no such layer.

        ("params", "stage1", "block1", "conv1", "kernel") -> "layer1.0.conv1.weight".
        """
        _, *modules, leaf = path
        ending = _LEAVES.get(leaf, leaf)
        stage = re.fullmatch(r"stage(\d+)/block(\d+)", "/".join(modules[:2]))
        if not stage:
            own = ".".join(modules)
            return ".".join(filter(None, [self.top.get("/".join(modules), own), ending]))
        number, block = int(stage[1]), int(stage[2])
        prefix = self.block.format(
            stage=number, stage_from_0=number - 1, next_stage=number + 1, block=block - 1
        )
        layer = self.layers.get("/".join(modules[2:]), ".".join(modules[2:]))
        return ".".join(filter(None, [prefix, layer, ending]))

    def stage_sizes(self, names: Iterable[str]) -> tuple[int, ...]:
        """Number of blocks in each stage of a state dict; () where no block has this prefix."""
        blocks: dict[int, set[int]] = {}
        stage, block = r"(?P<stage>\d{1,9})", r"(?P<block>\d{1,9})"
        prefix = self.block.replace(".", r"\.").format(
            stage=stage, stage_from_0=stage, next_stage=stage, block=block
        )
        for name in names:
            if match := re.match(prefix, name):
                blocks.setdefault(int(match["stage"]), set()).add(int(match["block"]))
        return tuple(len(blocks[stage]) for stage in sorted(blocks))

    def is_conv(self, path: ModulePath) -> bool:
        """Whether one of our dense kernels is a 1x1 convolution there."""
        modules = path[1:-1]
        layer = modules[2:] if modules[0].startswith("stage") else modules
        return "/".join(layer) in self.dense_as_conv


def schemes_for(model: ResNet) -> list[Scheme]:
    """The naming schemes that can hold a model's weights, starting with the one we write.

    Stem, shortcut and kind of block decide some of the names. Post-activation networks have the
    names of torchvision (and timm), the CIFAR repositories, the review and its variant with "_x"
    (these two without gates and deep stems), and torchvision's and CIFAR's with each other's head;
    pre-activation networks have timm's.

    Example:
      >>> import resnet_jax as rj
      >>> [scheme.name for scheme in schemes_for(rj.ResNet50())]
      ['torchvision', 'CIFAR', 'review', 'review with _x', 'CIFAR', 'CIFAR']
    """
    if model.block_cls.preactivation:
        return [_timm_v2(model)]
    torchvision = _torchvision(model)
    cifar = dataclasses.replace(
        torchvision,
        name="CIFAR",
        layers={**torchvision.layers, **_projection("shortcut", 0)},
        top={**torchvision.top, "head": "linear"},
    )
    mixed = [
        dataclasses.replace(torchvision, name="CIFAR", top=cifar.top),
        dataclasses.replace(cifar, top=torchvision.top),
    ]
    if model.se_ratio or model.eca or model.stem_type is DeepStem:
        return [torchvision, cifar, *mixed]
    review = _review()
    review_x = dataclasses.replace(
        review, name="review with _x", block="conv{next_stage}_x.{block}"
    )
    return [torchvision, cifar, review, review_x, *mixed]


def _torchvision(model: ResNet) -> Scheme:
    """Names of torchvision, and of timm for parts that torchvision does not have.

    timm keeps a deep stem in one Sequential, "conv1", whose last norm is "bn1" as usual, and puts
    an average pool (without parameters) before the projection of option D.
    """
    layers = {f"conv{k}": f"conv{k}" for k in (1, 2, 3)}
    layers |= {f"norm{k}": f"bn{k}" for k in (1, 2, 3)}
    layers |= _projection("downsample", 1 if model.shortcut == "D" else 0)
    layers |= {"squeeze_excite/reduce": "se.fc1", "squeeze_excite/expand": "se.fc2"}
    layers |= {"eca/conv": "se.conv"}
    if model.stem_type is DeepStem:
        stem = {"conv1": "conv1.0", "norm1": "conv1.1", "conv2": "conv1.3", "norm2": "conv1.4"}
        stem |= {"conv3": "conv1.6", "norm3": "bn1"}
        stem |= {"pool_conv": "maxpool.0", "pool_norm": "maxpool.1"}
    else:
        stem = {"conv1": "conv1", "norm1": "bn1"}
    return Scheme(
        name="torchvision",
        block="layer{stage}.{block}",
        layers=layers,
        top={"head": "fc", **{f"stem/{ours}": theirs for ours, theirs in stem.items()}},
        dense_as_conv=frozenset({"squeeze_excite/reduce", "squeeze_excite/expand"}),
    )


def _review() -> Scheme:
    """The review's names: conv, norm and ReLU in turn in a Sequential, "residual_function"."""
    layers = {f"conv{k}": f"residual_function.{3 * (k - 1)}" for k in (1, 2, 3)}
    layers |= {f"norm{k}": f"residual_function.{3 * (k - 1) + 1}" for k in (1, 2, 3)}
    layers |= _projection("shortcut", 0)
    return Scheme(
        name="review",
        block="conv{next_stage}.{block}",
        layers=layers,
        top={"head": "fc", "stem/conv1": "conv1.0", "stem/norm1": "conv1.1"},
    )


def _timm_v2(model: ResNet) -> Scheme:
    """Names that timm gives pre-activation networks; the head is a 1x1 convolution there."""
    layers = {f"conv{k}": f"conv{k}" for k in (1, 2, 3)}
    layers |= {f"norm{k}": f"norm{k}" for k in (1, 2, 3)}
    layers |= {"projection/conv1": "downsample.conv"}
    stem = {"stem/conv1": "stem.conv"}
    if model.stem_type is DeepStem:  # timm's resnetv2_50d
        each = [f"{kind}{k}" for k in (1, 2, 3) for kind in ("conv", "norm")]
        stem = {f"stem/{name}": f"stem.{name}" for name in each}
    return Scheme(
        name="timm v2",
        block="stages.{stage_from_0}.blocks.{block}",
        layers=layers,
        top={**stem, "final_norm": "norm", "head": "head.fc"},
        dense_as_conv=frozenset({"head"}),
    )


def _projection(module: str, first: int) -> dict[str, str]:
    return {
        "projection/conv1": f"{module}.{first}",
        "projection/norm1": f"{module}.{first + 1}",
    }


def unknown_layer(name: str, known: Sequence[str]) -> str:
    """The message for an unknown feature map, with our name where `name` is torchvision's.

    Example:
      >>> unknown_layer("layer3", ["stem", "stage1", "stage2", "stage3"])
      "unknown layer 'layer3'; did you mean 'stage3'?"
    """
    stage = re.fullmatch(r"layer(\d)", name)
    ours = f"stage{stage[1]}" if stage else _TORCHVISION_MAPS.get(name, "")
    if ours in known:
        return f"unknown layer {name!r}; did you mean {ours!r}?"
    return unknown_name("layer", name, known)
