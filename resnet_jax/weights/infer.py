"""Infers which network a file of weights holds, from the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from resnet_jax.errors import WeightsError
from resnet_jax.models.architectures import TABLE
from resnet_jax.models.attention import reduced_channels
from resnet_jax.models.blocks import (
    BasicBlock,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResidualBlock,
)
from resnet_jax.models.registry import create_model, list_models, model_info
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stem import CifarStem, DeepStem, ImageNetStem
from resnet_jax.weights.foreign import translate
from resnet_jax.weights.layers import SHOWN, Layers, read_layers
from resnet_jax.weights.tensors import listed


class Inferred(NamedTuple):
    """A network that weights fit: `create_model(name, **fields)`."""

    name: str  # of the nearest registered network
    fields: dict[str, Any]  # of `ResNet`; num_classes is among them (0 without a head)
    channels: int  # of its images
    image_size: int  # side in pixels that such networks are made for
    assumed: tuple[str, ...] = ()  # "a bottleneck's stride is on its 3x3 (v1.5)"
    preprocessing: Mapping[str, Any] = {}  # fields that come with the weights' framework


def infer_model(tensors: Mapping[str, Any]) -> Inferred:
    """Infers a network from its tensors, as `find_network` returns them.

    Raises:
      WeightsError: They are not a ResNet's; the message says what was found.

    Example:
      >>> import jax, jax.numpy as jnp, resnet_jax as rj
      >>> model = rj.ResNet8Cifar(num_classes=7)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> inferred = infer_model(rj.to_torch(model, variables))
      >>> inferred.name, inferred.fields, inferred.channels, inferred.image_size
      ('resnet8_cifar', {'num_classes': 7}, 3, 32)
    """
    translated = translate(tensors)
    layers = read_layers(translated.tensors)
    traits = _traits_of_layers(layers)
    _check_kernels(layers, traits)

    def differing(model: ResNet) -> dict[str, Any]:
        parts = traits.differing(_traits_of_model(model))
        fields = {
            field: value for part in parts for field, value in traits.fields(part, model).items()
        }
        if traits.norm == "batch" and model.weight_standardization:
            fields["weight_standardization"] = False
        known = translated.fields.items()
        return fields | {field: value for field, value in known if getattr(model, field) != value}

    # Of networks with the same weights one of the family is likelier than one that a user has
    # registered, and a residual one than a plain one.
    names = sorted(
        (name for name in list_models() if model_info(name).model_cls is ResNet),
        key=lambda name: (name not in TABLE, create_model(name).shortcut == "none"),
    )
    name = min(names, key=lambda name: len(differing(create_model(name))))
    registered = create_model(name)
    fields = {**differing(registered), "num_classes": _classes(layers)}
    model = create_model(name, **fields)
    size = model_info(name).image_size
    if model.stem_type.stride != registered.stem_type.stride:
        size = 32 if model.stem_type is CifarStem else 224
    channels = layers.kernel_shape("stem", "conv1")[1]
    assumed = (*_assumed(model, translated.fields), *translated.assumed)
    return Inferred(name, fields, channels, size, assumed, translated.preprocessing)


@dataclasses.dataclass(frozen=True)
class _Traits:
    """What weights reveal of a network: one attribute for everything that may differ."""

    stage_sizes: tuple[int, ...]
    stage_widths: tuple[int, ...]
    block_cls: type[ResidualBlock]
    stem: tuple[Any, tuple[int, ...], bool]  # (class, widths, whether one replaces the max pool)
    shortcut: str  # "A" also stands for "none", whose weights are the same
    grouping: tuple[int, int]  # (cardinality, base_width)
    reduced: int  # channels inside the last stage's squeeze-and-excitation; 0 without it
    eca: bool
    norm: Any  # "batch" or "group"; a registered network may have another

    def differing(self, other: _Traits) -> list[str]:
        """Names of the attributes in which another network differs."""
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def fields(self, part: str, nearest: ResNet) -> dict[str, Any]:
        """The fields of `ResNet` that an attribute stands for."""
        if part == "stem":
            return {"stem_cls": self._stem_cls(nearest.stem_cls)}
        if part == "grouping":
            return {"cardinality": self.grouping[0], "base_width": self.grouping[1]}
        if part == "reduced":
            return {"se_ratio": self.reduced / self._features()}
        return {part: getattr(self, part)}

    def _features(self) -> int:
        return self.stage_widths[-1] * self.block_cls.expansion

    def _stem_cls(self, nearest: Any) -> Any:
        """The stem; what weights do not show is as in the nearest registered network."""
        stem, widths, conv_pool = self.stem
        keywords = _stem_keywords(nearest) if _stem_class(nearest) is stem else {}
        if stem is DeepStem:
            return functools.partial(stem, **{**keywords, "widths": widths, "conv_pool": conv_pool})
        return functools.partial(stem, **{**keywords, "features": widths[0]})


@functools.cache
def _traits_of_model(model: ResNet) -> _Traits:
    """What the weights of a model would reveal."""
    stem: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(model.stem_type)
    }
    stem |= _stem_keywords(model.stem_cls)
    features = model.stage_widths[-1] * model.block_cls.expansion
    return _Traits(
        stage_sizes=tuple(model.stage_sizes),
        stage_widths=tuple(model.stage_widths),
        block_cls=model.block_cls,
        stem=(
            model.stem_type,
            tuple(stem["widths"]) if "widths" in stem else (stem.get("features", 0),),
            bool(stem.get("conv_pool")),
        ),
        shortcut="A" if model.shortcut == "none" else model.shortcut,
        grouping=(model.cardinality, model.base_width),
        reduced=reduced_channels(features, model.se_ratio) if model.se_ratio else 0,
        eca=getattr(model, "eca", False),
        norm=model.norm,
    )


def _stem_keywords(stem_cls: Any) -> dict[str, Any]:
    return dict(stem_cls.keywords) if isinstance(stem_cls, functools.partial) else {}


def _stem_class(stem_cls: Any) -> Any:
    return stem_cls.func if isinstance(stem_cls, functools.partial) else stem_cls


def _traits_of_layers(layers: Layers) -> _Traits:
    """What a file's layers reveal."""
    sizes = _stage_sizes(layers)
    last = {size: f"block{size}" for size in sizes}
    bottleneck = layers.has("stage1", "block1", "conv3")
    preactivation = layers.model.block_cls.preactivation
    blocks = {
        (False, False): BasicBlock,
        (False, True): BottleneckBlock,
        (True, False): PreActBasicBlock,
        (True, True): PreActBottleneckBlock,
    }
    block_cls = blocks[preactivation, bottleneck]
    stages = [f"stage{number}" for number in range(1, len(sizes) + 1)]
    final = "conv3" if bottleneck else "conv2"
    features = [layers.kernel_shape(stage, "block1", final)[0] for stage in stages]
    widths = tuple(each // block_cls.expansion for each in features)
    grouping = _grouping(layers, widths) if bottleneck else (1, 64)
    gate = (stages[-1], last[sizes[-1]], "squeeze_excite", "reduce")
    stats = any(leaf == "running_var" for _, leaf in layers.shapes)
    return _Traits(
        stage_sizes=sizes,
        stage_widths=widths,
        block_cls=block_cls,
        stem=_stem(layers),
        shortcut=_shortcut(layers, sizes, features),
        grouping=grouping,
        reduced=layers.kernel_shape(*gate)[0] if layers.has(*gate) else 0,
        eca=layers.has("stage1", "block1", "eca", "conv"),
        norm="batch" if stats else "group",
    )


def _stage_sizes(layers: Layers) -> tuple[int, ...]:
    blocks: dict[int, set[int]] = {}
    for key, _ in layers.shapes:
        if key[0].startswith("stage"):
            stage = int(key[0].removeprefix("stage"))
            blocks.setdefault(stage, set()).add(int(key[1].removeprefix("block")))
    for numbers, what in [
        (blocks, "stages"),
        *((found, f"the blocks of stage {stage}") for stage, found in sorted(blocks.items())),
    ]:
        if max(numbers) != len(numbers) or min(numbers) != 1:
            raise WeightsError(
                f"no whole ResNet: {what} are {listed(sorted(numbers), SHOWN)}, where they should "
                "count from 1 without a gap"
            )
    return tuple(len(blocks[stage]) for stage in sorted(blocks))


def _grouping(layers: Layers, widths: tuple[int, ...]) -> tuple[int, int]:
    """(cardinality, base_width), by the shape of the first 3x3 convolution."""
    inner, group, *_ = layers.kernel_shape("stage1", "block1", "conv2")
    return inner // group, -(-64 * group // max(widths[0], 1))


def _check_kernels(layers: Layers, traits: _Traits) -> None:
    """Refuses blocks whose kernels do not follow from width, cardinality and base_width."""
    cardinality, base_width = traits.grouping
    for number, width in enumerate(traits.stage_widths, start=1):
        features = width * traits.block_cls.expansion
        expected = {"conv1": (width, 3), "conv2": (width, 3), "projection/conv1": (features, 1)}
        if traits.block_cls.bottleneck:
            inner = width * base_width // 64 * cardinality
            expected |= {"conv1": (inner, 1), "conv2": (inner, 3), "conv3": (features, 1)}
        for layer, (out, side) in expected.items():
            key = (f"stage{number}", "block1", *layer.split("/"))
            if not layers.has(*key) and layer == "projection/conv1":
                continue
            shape = layers.kernel_shape(*key)
            groups = cardinality if layer == "conv2" else 1
            inputs = out // groups if layer == "conv2" else shape[1]
            if shape != (out, inputs, side, side):
                raise WeightsError(
                    f"no ResNet of this package: {'/'.join(key)} has shape {shape}, where the "
                    f"network's other layers make it {(out, inputs, side, side)}"
                )


def _stem(layers: Layers) -> tuple[Any, tuple[int, ...], bool]:
    features, _, side, _ = layers.kernel_shape("stem", "conv1")
    if layers.model.stem_type is DeepStem:
        widths = tuple(layers.kernel_shape("stem", f"conv{number}")[0] for number in (1, 2, 3))
        return DeepStem, widths, layers.has("stem", "pool_conv")
    if side not in (3, 7):
        raise WeightsError(
            f"no ResNet of this package: its first convolution is {side}x{side}, not 7x7 or 3x3"
        )
    return (ImageNetStem if side == 7 else CifarStem), (features,), False


def _shortcut(layers: Layers, sizes: tuple[int, ...], features: list[int]) -> str:
    """The shortcut option, by which blocks have a projection."""
    everywhere = {
        (f"stage{stage}", f"block{block}")
        for stage, size in enumerate(sizes, start=1)
        for block in range(1, size + 1)
    }
    found = {place for place in everywhere if layers.has(*place, "projection", "conv1")}
    stem = "conv3" if layers.has("stem", "conv3") else "conv1"
    incoming = layers.kernel_shape("stem", stem)[0]
    # The first stage keeps the resolution; only its channels may change.
    changing = {(f"stage{stage}", "block1") for stage in range(2, len(sizes) + 1)}
    changing |= {("stage1", "block1")} if incoming != features[0] else set()
    if found == changing:
        deep_v2 = layers.model.block_cls.preactivation and stem == "conv3"
        # timm's v2 names do not show the average pool, which comes with the deep stem.
        return "D" if deep_v2 else layers.model.shortcut
    if not found:
        return "A"
    if found == everywhere:
        return "C"
    actual, usual = (
        listed(sorted("/".join(place) for place in places), SHOWN) for places in (found, changing)
    )
    raise WeightsError(
        f"no ResNet of this package: it has projections in {actual}, where every block or those "
        f"that change the shape should: {usual}"
    )


def _classes(layers: Layers) -> int:
    """Number of the head's outputs; 0 without a head."""
    shape = layers.shapes.get((("head",), "weight"))
    return int(shape[0]) if shape else 0


def _assumed(model: ResNet, known: Mapping[str, Any]) -> list[str]:
    """What the weights of a model do not show, except the fields in `known`."""
    facts = []
    if model.block_cls.bottleneck and len(model.stage_sizes) > 1 and "stride_in_1x1" not in known:
        place = "first 1x1 (v1)" if model.stride_in_1x1 else "3x3 (v1.5)"
        facts.append(f"a bottleneck's stride is on its {place}")
    if model.shortcut == "A":
        facts.append(
            "shortcuts are identities filled with zeros (option A); a plain network has the same "
            "weights"
        )
    if model.shortcut == "none":
        facts.append("blocks have no shortcuts (plain network); option A has the same weights")
    if model.shortcut == "D" and model.block_cls.preactivation:
        facts.append("projections come after an average pool (option D)")
    if model.norm == "group" and "weight_standardization" not in known:
        kernels = "standardized" if model.weight_standardization else "not standardized"
        facts.append(f"kernels are {kernels}")
    if "bn_epsilon" not in known:
        facts.append(f"the norms' epsilon is {model.bn_epsilon:g}")
    return facts
