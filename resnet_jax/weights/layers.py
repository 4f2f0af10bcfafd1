"""The layers that a naming scheme finds in a state dict, under their paths here, with shapes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from resnet_jax.errors import WeightsError
from resnet_jax.models.blocks import (
    BottleneckBlock,
    PreActBottleneckBlock,
    ResidualBlock,
    ShortcutOption,
)
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stem import DeepStem, ImageNetStem
from resnet_jax.weights.mismatch import other_family
from resnet_jax.weights.naming import ModulePath, Scheme, schemes_for
from resnet_jax.weights.tensors import listed

_LEAF = r"(?P<module>.+)\.(?P<leaf>weight|bias|running_mean|running_var)"
_NUMBER = r"\d{1,6}"
SHOWN = 4  # names in a message


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers that one naming scheme finds among tensors, by their paths here."""

    model: ResNet  # with the block, stem and shortcut of the scheme
    # (path, leaf) -> shape in PyTorch's layout: (("stem", "conv1"), "weight") -> (64, 3, 7, 7).
    shapes: Mapping[tuple[ModulePath, str], tuple[int, ...]]
    unknown: tuple[str, ...]  # names inside blocks that are not layers of ours

    def has(self, *path: str) -> bool:
        """Whether there is a layer at a path."""
        return (path, "weight") in self.shapes

    def kernel_shape(self, *path: str) -> tuple[int, ...]:
        """Shape of a convolution's kernel: [out, in / groups, H, W]."""
        if not self.has(*path):
            raise WeightsError(f"no ResNet's weights: {'/'.join(path)} is missing")
        shape = self.shapes[path, "weight"]
        if len(shape) != 4 or not math.prod(shape):
            raise WeightsError(f"no ResNet's weights: {'/'.join(path)} has shape {shape}")
        return shape


def read_layers(tensors: Mapping[str, Any]) -> Layers:
    """Reads the layers by the naming scheme that recognizes most names."""
    found = [
        _read_by(scheme, model, tensors) for model in _kinds() for scheme in schemes_for(model)
    ]
    best = max(found, key=lambda layers: len(layers.shapes))
    if family := other_family(tensors):
        raise WeightsError(f"no ResNet of this package's weights, but {family}")
    if not best.has("stage1", "block1", "conv1") or not best.has("stem", "conv1"):
        if not tensors:
            raise WeightsError("the file has no tensors")
        names = listed(tensors, SHOWN)
        raise WeightsError(f"no ResNet's weights, which have names such as {names}")
    if best.unknown:
        raise WeightsError(
            "no ResNet of this package, where blocks have no layers such as "
            f"{listed(best.unknown, SHOWN)}"
        )
    return best


@functools.cache
def _kinds() -> tuple[ResNet, ...]:
    """One network for every set of names; a v2 network's do not depend on its shortcut."""
    kinds: list[tuple[type[ResidualBlock], ShortcutOption]]
    kinds = [(BottleneckBlock, "B"), (BottleneckBlock, "D"), (PreActBottleneckBlock, "B")]
    return tuple(
        ResNet((1,), block_cls=block, stem_cls=stem, stage_widths=(64,), shortcut=shortcut)
        for block, shortcut in kinds
        for stem in (ImageNetStem, DeepStem)
    )


def _read_by(scheme: Scheme, model: ResNet, tensors: Mapping[str, Any]) -> Layers:
    inside = {theirs: tuple(ours.split("/")) for ours, theirs in scheme.layers.items()}
    outside = {theirs: tuple(ours.split("/")) for ours, theirs in scheme.top.items()}
    stage = f"(?P<stage>{_NUMBER})"
    block = scheme.block.replace(".", r"\.").format(
        stage=stage, stage_from_0=stage, next_stage=stage, block=f"(?P<block>{_NUMBER})"
    )
    pattern = re.compile(rf"{block}\.(?P<layer>.+)")
    first = scheme.block.format(stage=1, stage_from_0=0, next_stage=2, block=0)
    match = pattern.match(f"{first}.any")
    first_stage = int(match["stage"]) if match else 1
    shapes: dict[tuple[ModulePath, str], tuple[int, ...]] = {}
    unknown = []
    for name, tensor in tensors.items():
        parts = re.fullmatch(_LEAF, name)
        match = pattern.fullmatch(parts["module"] if parts else name)
        shape = tuple(getattr(tensor, "shape", ()))
        if match and parts and match["layer"] in inside:
            place = (
                f"stage{int(match['stage']) - first_stage + 1}",
                f"block{int(match['block']) + 1}",
            )
            shapes[(*place, *inside[match["layer"]]), parts["leaf"]] = shape
        elif match:
            unknown.append(name)
        elif parts and parts["module"] in outside:
            shapes[outside[parts["module"]], parts["leaf"]] = shape
    return Layers(model, shapes, tuple(unknown))
