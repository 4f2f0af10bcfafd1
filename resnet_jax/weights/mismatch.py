"""Weights that do not fit a model: what differs, what the cause most likely is, what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.contents import Contents
from resnet_jax.weights.naming import Scheme
from resnet_jax.weights.tensors import flax_shape, listed, short, summarized, torch_shape


class Mismatch(NamedTuple):
    """Differences between a model's tensors and a file's, by the names in the file.

    Falsy where there are none; as text it lists them.
    """

    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name -> (in the file, the model's)

    @classmethod
    def between(
        cls,
        expected: Mapping[str, tuple[int, ...]],
        arrays: Mapping[str, Any],
        unexpected: Sequence[str],
    ) -> Mismatch:
        """Compares a model's shapes (Flax layout) with a file's arrays (PyTorch layout)."""
        shapes = {
            name: (tuple(array.shape), torch_shape(expected[name]))
            for name, array in arrays.items()
            if flax_shape(tuple(array.shape), len(expected[name])) != expected[name]
        }
        return cls(sorted(expected.keys() - arrays.keys()), sorted(unexpected), shapes)

    def __bool__(self) -> bool:
        return any(self)

    @property
    def names(self) -> list[str]:
        """All names that differ."""
        return [*self.missing, *self.unexpected, *self.shapes]

    def __str__(self) -> str:
        shapes = [f"{short(n)} {found} for {ours}" for n, (found, ours) in self.shapes.items()]
        lists = {
            "missing": summarized(self.missing),
            "unexpected": summarized(self.unexpected),
            "of the wrong shape": ", ".join(shapes[:3]) + (", ..." if len(shapes) > 3 else ""),
        }
        counts = map(len, self)
        return "; ".join(
            f"{count} {what}: {text}"
            for count, (what, text) in zip(counts, lists.items(), strict=True)
            if count
        )


def hint_for(
    mismatch: Mismatch,
    model: ResNet,
    scheme: Scheme,
    contents: Contents,
    tensors: Mapping[str, Any],
) -> str:
    """The most likely cause, and the argument that helps; "" where nothing stands out."""
    found, ours = scheme.stage_sizes(tensors), tuple(model.stage_sizes)
    head = f"{scheme.head}."
    weight, bias = f"{head}weight", f"{head}bias"
    if weight in mismatch.missing and len(contents.dense) > 1:
        return (
            f": there are several linear layers ({listed(contents.dense)}) and none is the head; "
            "for the backbone alone pass reset_head=True, or use a model with num_classes=0"
        )
    if weight in mismatch.missing and contents.dense:
        return (
            f": its head may be {short(contents.dense[0])}, which is not a linear layer with a "
            f"bias from the last stage's features; to use it, rename it {head[:-1]}; to leave it "
            "out, pass reset_head=True"
        )
    if all(name.startswith(head) for name in mismatch.names):
        if weight in mismatch.missing and bias in mismatch.missing:
            return (
                ": they have no head; pass reset_head=True to start with a new one, or use a "
                "model with num_classes=0"
            )
        shape, _ = mismatch.shapes.get(weight, ((), ()))
        classes = ""
        if shape[:1] not in ((), (model.num_classes,)):
            classes = f": its head has {shape[0]:,} classes, the model's {model.num_classes:,}"
        return f"{classes}; pass reset_head=True to start with a new head"
    if found and found != ours:
        return f": its stages have {_sizes(found)} blocks, the model's {_sizes(ours)}"
    if not mismatch.missing and not mismatch.shapes:
        return ": it has more than the model; pass strict=False to leave that out"
    return ""


def _sizes(stage_sizes: tuple[int, ...]) -> str:
    return str(stage_sizes) if len(stage_sizes) <= 8 else f"({len(stage_sizes)} stages)"


# Names that only other families of networks have, the most specific first.
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
    """The family that weights belong to and the name that reveals it; "" for a ResNet's."""
    for pattern, family in _FAMILIES.items():
        names = (name for name in tensors if re.fullmatch(pattern, name))
        if example := next(names, None):
            return f"{family} ({short(example)})"
    return ""
