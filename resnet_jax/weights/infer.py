"""Which network a file of weights holds, told from the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from resnet_jax.errors import WeightsError
from resnet_jax.models.architectures import TABLE
from resnet_jax.models.blocks import (
    BasicBlock,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResidualBlock,
    ShortcutOption,
)
from resnet_jax.models.registry import create_model, list_models, model_info
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stem import CifarStem, DeepStem, ImageNetStem
from resnet_jax.weights.contents import short
from resnet_jax.weights.foreign import translate
from resnet_jax.weights.naming import Scheme, schemes_for


class Inferred(NamedTuple):
    """A network that weights fit.

    Args:
      name: Of the registered network that is nearest.
      fields: Of `ResNet`, which differ from those registered: `create_model(name, **fields)`.
        num_classes is among them (0 without a head).
      channels: Of its images.
      image_size: Side in pixels for which such networks are made.
      assumed: What the weights do not show, one sentence each: "a bottleneck's stride is on its
        3x3 (v1.5)".
      preprocessing: Fields of `Preprocessing`, where the framework that the weights come from has
        its own: mean and std.
    """

    name: str
    fields: dict[str, Any]
    channels: int
    image_size: int
    assumed: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = {}


def infer_model(tensors: Mapping[str, Any]) -> Inferred:
    """Tells a network from its weights.

    Args:
      tensors: One network's (`find_network`), with any names that `from_torch` reads.

    Returns:
      The network.

    Raises:
      WeightsError: They are of no ResNet; the message says what was found.

    Example:
      >>> import jax, jax.numpy as jnp, resnet_jax as rj
      >>> model = rj.ResNet8Cifar(num_classes=7)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> inferred = infer_model(rj.to_torch(model, variables))
      >>> inferred.name, inferred.fields, inferred.channels, inferred.image_size
      ('resnet8_cifar', {'num_classes': 7}, 3, 32)
    """
    translated = translate(tensors)
    layers = _read_layers(translated.tensors)
    seen = _see(layers)
    _check_kernels(layers, seen)

    def differing(model: ResNet) -> dict[str, Any]:
        """The fields in which the weights' network differs from a registered one."""
        parts = seen.differing(_look(model))
        fields = {
            field: value for part in parts for field, value in seen.fields(part, model).items()
        }
        if seen.norm == "batch" and model.weight_standardization:
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
    channels = layers.shape("stem", "conv1")[1]
    assumed = (*_assumed(model, size, translated.fields), *translated.assumed)
    return Inferred(name, fields, channels, size, assumed, translated.preprocessing)


# Reading names. A layer's key is its place here, as ("stage1", "block1", "conv1") or ("stem",
# "conv1"); stages and blocks count from 1.
Key = tuple[str, ...]
_LEAF = r"(?P<module>.+)\.(?P<leaf>weight|bias|running_mean|running_var)"
_NUMBER = r"\d{1,6}"


@dataclasses.dataclass(frozen=True)
class _Layers:
    """The layers that one naming scheme finds among tensors.

    Args:
      scheme: That naming scheme.
      model: A network that has it; its block, stem and shortcut are those of the weights.
      shapes: (key, leaf) -> shape in PyTorch's layout, such as [out, in / groups, H, W].
      unknown: Names inside blocks that are no layers of ours.
    """

    scheme: Scheme
    model: ResNet
    shapes: Mapping[tuple[Key, str], tuple[int, ...]]
    unknown: tuple[str, ...]

    def has(self, *key: str) -> bool:
        return (key, "weight") in self.shapes

    def shape(self, *key: str) -> tuple[int, ...]:
        """Of a convolution's kernel: [out, in / groups, H, W]."""
        if not self.has(*key):
            raise WeightsError(f"no ResNet's weights: {'/'.join(key)} is missing")
        shape = self.shapes[key, "weight"]
        if len(shape) != 4 or not math.prod(shape):
            raise WeightsError(f"no ResNet's weights: {'/'.join(key)} has shape {shape}")
        return shape


def _read_layers(tensors: Mapping[str, Any]) -> _Layers:
    """The layers by the naming scheme that knows most of the names."""
    found = [
        _read_by(scheme, model, tensors) for model in _kinds() for scheme in schemes_for(model)
    ]
    best = max(found, key=lambda layers: len(layers.shapes))
    if family := other_family(tensors):
        raise WeightsError(f"no ResNet of this package's weights, but {family}")
    if not best.has("stage1", "block1", "conv1") or not best.has("stem", "conv1"):
        names = f"which have names such as {_some(tensors)}" if tensors else "but nothing"
        raise WeightsError(f"no ResNet's weights, {names}")
    if best.unknown:
        raise WeightsError(
            f"no ResNet of this package, where blocks have no layers such as {_some(best.unknown)}"
        )
    return best


@functools.cache
def _kinds() -> tuple[ResNet, ...]:
    """One network for every set of names; those of v2 are the same whatever the shortcut."""
    kinds: list[tuple[type[ResidualBlock], ShortcutOption]]
    kinds = [(BottleneckBlock, "B"), (BottleneckBlock, "D"), (PreActBottleneckBlock, "B")]
    return tuple(
        ResNet((1,), block_cls=block, stem_cls=stem, stage_widths=(64,), shortcut=shortcut)
        for block, shortcut in kinds
        for stem in (ImageNetStem, DeepStem)
    )


def _read_by(scheme: Scheme, model: ResNet, tensors: Mapping[str, Any]) -> _Layers:
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
    shapes: dict[tuple[Key, str], tuple[int, ...]] = {}
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
    return _Layers(scheme, model, shapes, tuple(unknown))


# What weights show, of a registered network and of a file.
@dataclasses.dataclass(frozen=True)
class _Seen:
    """What a network's weights show of it, one attribute for what may differ.

    Args:
      stage_sizes: Blocks in each stage.
      stage_widths: As `ResNet` has them.
      block_cls: The class of its blocks.
      stem: (class, widths of its convolutions, whether one takes the max pool's place).
      shortcut: "A" for A and "none", whose weights are the same.
      grouping: (cardinality, base_width).
      reduced: Channels that squeeze-and-excitation keeps in the last stage; 0: there is none.
      eca: Efficient channel attention in its blocks.
      norm: "batch" or "group".
    """

    stage_sizes: tuple[int, ...]
    stage_widths: tuple[int, ...]
    block_cls: type[ResidualBlock]
    stem: tuple[Any, tuple[int, ...], bool]
    shortcut: str
    grouping: tuple[int, int]
    reduced: int
    eca: bool
    norm: str

    def differing(self, other: _Seen) -> list[str]:
        """The attributes in which another network differs."""
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def fields(self, part: str, nearest: ResNet) -> dict[str, Any]:
        """The fields of `ResNet` behind an attribute, in which a registered network differs."""
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
        """The stem, with what weights do not show as in a registered one of its class."""
        stem, widths, conv_pool = self.stem
        keywords = _stem_keywords(nearest) if _stem_class(nearest) is stem else {}
        if stem is DeepStem:
            return functools.partial(stem, **{**keywords, "widths": widths, "conv_pool": conv_pool})
        return functools.partial(stem, **{**keywords, "features": widths[0]})


@functools.cache
def _look(model: ResNet) -> _Seen:
    """What the weights of a network would show."""
    stem: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(model.stem_type)
    }
    stem |= _stem_keywords(model.stem_cls)
    features = model.stage_widths[-1] * model.block_cls.expansion
    return _Seen(
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
        reduced=_reduced(features, model.se_ratio),
        eca=getattr(model, "eca", False),
        norm=model.norm,
    )


def _stem_keywords(stem_cls: Any) -> dict[str, Any]:
    return dict(stem_cls.keywords) if isinstance(stem_cls, functools.partial) else {}


def _stem_class(stem_cls: Any) -> Any:
    return stem_cls.func if isinstance(stem_cls, functools.partial) else stem_cls


def _reduced(features: int, ratio: float) -> int:
    """Channels that `SqueezeExcite` keeps."""
    return max(8, int(features * ratio + 4) // 8 * 8) if ratio else 0


def _see(layers: _Layers) -> _Seen:
    """What a file's layers show."""
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
    features = [layers.shape(stage, "block1", final)[0] for stage in stages]
    widths = tuple(each // block_cls.expansion for each in features)
    grouping = _grouping(layers, widths) if bottleneck else (1, 64)
    gate = (stages[-1], last[sizes[-1]], "squeeze_excite", "reduce")
    stats = any(leaf == "running_var" for _, leaf in layers.shapes)
    return _Seen(
        stage_sizes=sizes,
        stage_widths=widths,
        block_cls=block_cls,
        stem=_stem(layers),
        shortcut=_shortcut(layers, sizes, features),
        grouping=grouping,
        reduced=layers.shape(*gate)[0] if layers.has(*gate) else 0,
        eca=layers.has("stage1", "block1", "eca", "conv"),
        norm="batch" if stats else "group",
    )


def _stage_sizes(layers: _Layers) -> tuple[int, ...]:
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
                f"no whole ResNet: {what} are {_some(sorted(numbers))}, where they should count "
                "from 1 without a gap"
            )
    return tuple(len(blocks[stage]) for stage in sorted(blocks))


def _grouping(layers: _Layers, widths: tuple[int, ...]) -> tuple[int, int]:
    """(cardinality, base_width), from the shape of the first 3x3 convolution."""
    inner, group, *_ = layers.shape("stage1", "block1", "conv2")
    return inner // group, -(-64 * group // max(widths[0], 1))


def _check_kernels(layers: _Layers, seen: _Seen) -> None:
    """Refuses blocks with other kernels than their width, cardinality and base_width make."""
    cardinality, base_width = seen.grouping
    for number, width in enumerate(seen.stage_widths, start=1):
        features = width * seen.block_cls.expansion
        expected = {"conv1": (width, 3), "conv2": (width, 3), "projection/conv1": (features, 1)}
        if seen.block_cls.bottleneck:
            inner = width * base_width // 64 * cardinality
            expected |= {"conv1": (inner, 1), "conv2": (inner, 3), "conv3": (features, 1)}
        for layer, (out, side) in expected.items():
            key = (f"stage{number}", "block1", *layer.split("/"))
            if not layers.has(*key) and layer == "projection/conv1":
                continue
            shape = layers.shape(*key)
            groups = cardinality if layer == "conv2" else 1
            inputs = out // groups if layer == "conv2" else shape[1]
            if shape != (out, inputs, side, side):
                raise WeightsError(
                    f"no ResNet of this package: {'/'.join(key)} has shape {shape}, where the "
                    f"network's other layers make it {(out, inputs, side, side)}"
                )


def _stem(layers: _Layers) -> tuple[Any, tuple[int, ...], bool]:
    features, _, side, _ = layers.shape("stem", "conv1")
    if layers.model.stem_type is DeepStem:
        widths = tuple(layers.shape("stem", f"conv{number}")[0] for number in (1, 2, 3))
        return DeepStem, widths, layers.has("stem", "pool_conv")
    if side not in (3, 7):
        raise WeightsError(
            f"no ResNet of this package: its first convolution is {side}x{side}, not 7x7 or 3x3"
        )
    return (ImageNetStem if side == 7 else CifarStem), (features,), False


def _shortcut(layers: _Layers, sizes: tuple[int, ...], features: list[int]) -> str:
    """The option of the shortcuts, from which blocks have a projection."""
    everywhere = {
        (f"stage{stage}", f"block{block}")
        for stage, size in enumerate(sizes, start=1)
        for block in range(1, size + 1)
    }
    found = {place for place in everywhere if layers.has(*place, "projection", "conv1")}
    stem = "conv3" if layers.has("stem", "conv3") else "conv1"
    incoming = layers.shape("stem", stem)[0]
    # The first stage keeps the resolution, so that only its channels may change.
    changing = {(f"stage{stage}", "block1") for stage in range(2, len(sizes) + 1)}
    changing |= {("stage1", "block1")} if incoming != features[0] else set()
    if found == changing:
        deep_v2 = layers.model.block_cls.preactivation and stem == "conv3"
        # timm's names of v2 networks are the same with and without the average pool, which goes
        # with the deep stem there.
        return "D" if deep_v2 else layers.model.shortcut
    if not found:
        return "A"
    if found == everywhere:
        return "C"
    places = sorted("/".join(place) for place in found)
    raise WeightsError(
        f"no ResNet of this package: it has projections in {_some(places)}, where every block or "
        f"those that change the shape should: {_some(sorted('/'.join(p) for p in changing))}"
    )


def _classes(layers: _Layers) -> int:
    """Outputs of the head; 0 where there is none."""
    shape = layers.shapes.get((("head",), "weight"))
    return int(shape[0]) if shape else 0


def _assumed(model: ResNet, size: int, known: Mapping[str, Any]) -> tuple[str, ...]:
    """What the weights of a network do not show, without the fields that are known anyway."""
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
    return (*facts, f"images have {size}x{size} pixels")


# Names that give other families away, the most telling first.
_FAMILIES = {
    r"(.*\.)?attnpool\..*|head\.(pos_embed|(q|k|v|qkv)\..*)": "a CLIP's",
    r"(.*\.)?(cls_token|class_token|pos_embed(ding)?)": "a vision transformer's",
    r".*\.(attn|self_attention)\.(qkv|in_proj)[._].*": "a vision transformer's",
    r".*\.(conv_dw|dwconv|layer_scale)(\..*)?": "those of a network of depthwise convolutions",
    r"features\.\d+\.\d+\..*": "those of a MobileNet, EfficientNet or ConvNeXt",
    r"features\.\d+\.(weight|bias)": "a VGG's or AlexNet's",
    r"(.*\.)?denseblock\d.*": "a DenseNet's",
    r"(.*\.)?Mixed_\d.*": "an Inception's",
    r"(trunk_output\.block\d|s\d\.b\d+)\..*": "a RegNet's",
    r"stage\d\.\d+\.branches\..*": "an HRNet's",
    r"layer\d+\.\d+\.convs\.\d+\..*": "a Res2Net's",
    r"layer\d+\.\d+\.conv2\.(conv|fc1|bn0|bn1)\..*": "a ResNeSt's",
    r"layer\d+\.\d+\.conv\d\.(paths|attn)\..*": "an SKNet's",
    r"layer\d+\.\d+\.se_module\..*": "a legacy SENet's",
    r"stages\.\d+\.(conv_down|conv_exp|conv_transition\w*)\..*": "a CSPNet's",
}


def other_family(tensors: Mapping[str, Any]) -> str:
    """What weights are that are no ResNet's, with the name that tells it; "": names do not tell."""
    for pattern, family in _FAMILIES.items():
        names = (name for name in tensors if re.fullmatch(pattern, name))
        if example := next(names, None):
            return f"{family} ({short(example)})"
    return ""


def _some(values: Iterable[Any], most: int = 4) -> str:
    shown = [short(str(value)) for value in itertools.islice(values, most + 1)]
    return ", ".join(shown if len(shown) <= most else [*shown[:-1], "..."])
