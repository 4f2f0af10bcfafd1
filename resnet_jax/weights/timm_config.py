"""config.json as timm writes it.

A value that changes the outputs and has no counterpart here is refused, by name and value.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.errors import ModelError
from resnet_jax.limits import MAX_CHANNELS, MAX_CLASSES, MAX_SIDE
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stem import DeepStem, ImageNetStem
from resnet_jax.weights.description import (
    MAX_PIXELS,
    Description,
    as_bool,
    as_count,
    as_counts,
    as_number,
    as_numbers,
    as_stage_sizes,
    check_preprocessing,
    class_names_of,
    one_of,
    refuse,
    threshold_of,
)

_CROP_MODES = ("center", "squash")
# Networks of timm with one of our names that compute something else.
_OTHER_NETWORKS = {
    name: (
        "passes the stem's output around its first block before the first norm and ReLU, where "
        f"the paper (He et al. 2016, section 5) and {name} here pass it after them"
    )
    for name in ("resnetv2_18", "resnetv2_34")
}


def timm_description(config: dict[str, Any], use_test_size: bool) -> Description:
    """Reads a whole config.json."""
    name = config["architecture"]
    if name in _OTHER_NETWORKS:
        raise ModelError(f"timm's {name} {_OTHER_NETWORKS[name]}")
    # Facts of the weights are in "pretrained_cfg", or at the top level.
    facts = {**config, **(config.get("pretrained_cfg") or {})}
    arguments = {
        # timm reads these two from the facts too.
        "num_classes": config.get("num_classes", facts.get("num_classes", 1000)),
        "global_pool": facts.get("global_pool"),
        **(config.get("model_args") or {}),
    }
    if facts.get("label_offset"):
        refuse("label_offset", facts["label_offset"])
    fields = timm_fields(create_model(name), arguments)
    return Description(
        name,
        fields,
        _timm_preprocessing(facts, arguments.get("in_chans"), use_test_size),
        class_names_of(facts.get("label_names") or facts.get("labels"), fields["num_classes"]),
        threshold_of(config),
    )


def _timm_preprocessing(
    facts: dict[str, Any], in_chans: int | None, use_test_size: bool
) -> Preprocessing:
    """The preprocessing; timm's defaults are bicubic, and otherwise those of `Preprocessing`."""
    default = Preprocessing(interpolation="bicubic")

    def fact(name: str, otherwise: Any) -> Any:
        test = facts.get(f"test_{name}") if use_test_size else None
        known = facts.get(name) if test is None else test
        return otherwise if known is None else known

    channels, height, width = fact("input_size", [3, default.image_size, default.image_size])
    channels = channels if in_chans is None else in_chans
    as_count("input_size", channels, 1, MAX_CHANNELS)
    as_count("input_size", height, 1, MAX_PIXELS)
    as_count("input_size", width, 1, MAX_PIXELS)
    if height != width:
        raise ModelError(
            f"input_size = {[channels, height, width]}: images are square here, and those of this "
            "network are not; to use it on squares all the same, write one side twice"
        )
    mode = fact("crop_mode", "center")
    if mode not in _CROP_MODES:
        raise ModelError(
            f"crop_mode = {str(mode)[:100]!r}: images are prepared by {' or '.join(_CROP_MODES)} "
            "here; to use the network with one of these all the same, write it there"
        )
    preprocessing = Preprocessing(
        image_size=height,
        crop_fraction=as_number("crop_pct", fact("crop_pct", default.crop_fraction)),
        interpolation=str(fact("interpolation", default.interpolation)),
        mean=as_numbers("mean", fact("mean", default.mean)),
        std=as_numbers("std", fact("std", default.std)),
        crop_mode=mode,
    )
    check_preprocessing(preprocessing, channels)
    if len(preprocessing.mean) in (1, channels):
        return preprocessing
    # Three values for another number of channels: timm uses their mean for each channel.
    mean, std = (sum(part) / len(part) for part in (preprocessing.mean, preprocessing.std))
    return dataclasses.replace(preprocessing, mean=(mean,), std=(std,))


# Arguments of timm's networks that change no output, or that the weights show.
_WITHOUT_EFFECT = (
    *("in_chans", "drop_block_rate", "device"),
    *("pretrained", "pretrained_strict", "checkpoint_path", "cache_dir"),
    *("scriptable", "exportable", "no_jit"),
)
# Arguments and the values of them that change nothing.
_ONLY: dict[str, tuple[object, ...]] = {
    "global_pool": ("avg", "fast", "fastavg"),
    "block_reduce_first": (1,),
    "down_kernel_size": (1,),
    "act_layer": ("relu",),
    "aa_layer": ("",),
    "features_only": (False,),
    "pruned": (False,),
}
# Arguments of all of timm's ResNets, and of those without pre-activation.
_OF_ALL: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "num_classes": lambda name, value: {"num_classes": as_count(name, value, 0, MAX_CLASSES)},
    "output_stride": lambda name, value: {"output_stride": as_count(name, value, 1, MAX_SIDE)},
    "drop_rate": lambda name, value: {"dropout_rate": as_number(name, value)},
    "drop_path_rate": lambda name, value: {"stochastic_depth_rate": as_number(name, value)},
    "zero_init_last": lambda name, value: {"zero_init_residual": as_bool(name, value)},
    "layers": lambda name, value: {"stage_sizes": as_stage_sizes(name, value)},
}
_OF_V1: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "channels": lambda name, value: {"stage_widths": as_counts(name, value, MAX_SIDE)},
    "cardinality": lambda name, value: {"cardinality": as_count(name, value, 1, MAX_SIDE)},
    "base_width": lambda name, value: {"base_width": as_count(name, value, 1, MAX_SIDE)},
    "avg_down": lambda name, value: {"shortcut": "D" if as_bool(name, value) else "B"},
    "norm_layer": lambda name, value: {"norm": one_of(name, value, _NORMS)},
    "block_args": lambda name, value: _block_fields(name, value),
}
_STEM = ("stem_type", "stem_width", "replace_stem_pool")
_STEM_TYPES = {"": "", "deep": "deep", "deep_tiered": "deep_tiered"}
_NORMS: dict[str, str] = {"batchnorm": "batch", "batchnorm2d": "batch", "groupnorm": "group"}
_ATTENTION = {"": 0.0, "se": 1 / 16}


def timm_fields(named: ResNet, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ResNet` that arguments of timm's constructor stand for.

    Example:
      >>> named = create_model("resnet50")
      >>> timm_fields(named, {"avg_down": True, "drop_path_rate": 0.1, "aa_layer": None})
      {'shortcut': 'D', 'stochastic_depth_rate': 0.1}
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    known = _OF_ALL if named.block_cls.preactivation else {**_OF_ALL, **_OF_V1}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name in known:
            fields |= known[name](f"model_args.{name}", value)
        elif name in _STEM and not named.block_cls.preactivation:
            fields |= _stem_fields(named, given)
        elif name not in _WITHOUT_EFFECT and value not in _ONLY.get(name, ()):
            refuse(f"model_args.{name}", value)
    return fields


def _stem_fields(named: ResNet, given: Mapping[str, Any]) -> dict[str, Any]:
    """The stem. Arguments may give a part of it; the rest is the named network's."""
    stem_cls: Any = getattr(named.stem_cls, "func", named.stem_cls)
    own = getattr(named.stem_cls, "keywords", {})
    first, width, _ = own.get("widths", DeepStem.widths) if stem_cls is DeepStem else (64, 64, 64)
    deep = "deep" if first == width else "deep_tiered"
    before = deep if stem_cls is DeepStem else "", width, own.get("conv_pool", False)
    kind, width, conv_pool = (given.get(name, each) for name, each in zip(_STEM, before))
    if (kind, width, conv_pool) == before:
        return {}
    kind = one_of("model_args.stem_type", kind, _STEM_TYPES)
    width = as_count("model_args.stem_width", width, 4, MAX_SIDE)
    conv_pool = as_bool("model_args.replace_stem_pool", conv_pool)
    if not kind:  # a 7x7 convolution of 64 channels, whatever the width
        if conv_pool:
            refuse("model_args.replace_stem_pool", conv_pool)
        return {"stem_cls": ImageNetStem}
    widths = (3 * (width // 4) if kind == "deep_tiered" else width, width, 2 * width)
    return {"stem_cls": functools.partial(DeepStem, widths=widths, conv_pool=conv_pool)}


def _block_fields(name: str, value: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for argument, inner in value.items():
        if argument == "attn_layer":
            fields["se_ratio"] = one_of(f"{name}.{argument}", inner or "", _ATTENTION)
        elif inner is not None:
            refuse(f"{name}.{argument}", inner)
    return fields
