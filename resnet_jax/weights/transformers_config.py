"""config.json and preprocessor_config.json as Hugging Face transformers writes them.

A value that changes the outputs and has no counterpart here is refused, by name and value.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.errors import WeightsError
from resnet_jax.limits import MAX_CLASSES, MAX_SIDE
from resnet_jax.models.stem import ImageNetStem
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

_NAMES: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
_NEAREST = {
    "basic": ("resnet18", 1),
    "bottleneck": ("resnet50", 4),
}  # expansion
# Pillow's filters, by their numbers.
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_PROCESSORS = ("ConvNext", "ViT", "DeiT", "CLIP", "Bit")  # how their names start
_SIDES = ("height", "width")
_SQUASHED_FROM = 384  # pixels


def transformers_description(config: dict[str, Any]) -> Description:
    """Reads a config.json; the preprocessing is the default one."""
    if config["model_type"] != "resnet":
        raise WeightsError(f"model_type = {str(config['model_type'])[:100]!r}: must be 'resnet'")
    if config.get("hidden_act", "relu") != "relu":
        refuse("hidden_act", config["hidden_act"])
    if as_bool("downsample_in_first_stage", config.get("downsample_in_first_stage", False)):
        refuse("downsample_in_first_stage", True)
    layer = config.get("layer_type", "bottleneck")
    nearest, expansion = one_of("layer_type", layer, _NEAREST)
    depths = as_stage_sizes("depths", config.get("depths", [3, 4, 6, 3]))
    sizes = config.get("hidden_sizes", [256, 512, 1024, 2048])
    widths = as_counts("hidden_sizes", sizes, expansion * MAX_SIDE)
    if len(widths) != len(depths) or any(width % expansion for width in widths):
        raise WeightsError(
            f"hidden_sizes = {str(list(widths))[:200]}: must be as many as depths, and multiples "
            f"of {expansion} for layer_type = {layer!r}"
        )
    labels = config.get("id2label")
    classes = len(labels) if labels else config.get("num_labels", 2)  # transformers leaves out two
    if not any(
        "Classification" in each for each in config.get("architectures") or ["Classification"]
    ):
        classes = 0  # ResNetModel and ResNetBackbone have no head
    in_1x1 = as_bool("downsample_in_bottleneck", config.get("downsample_in_bottleneck", False))
    fields: dict[str, Any] = {
        "num_classes": as_count("id2label" if labels else "num_labels", classes, 0, MAX_CLASSES),
        "stage_sizes": depths,
        "stage_widths": tuple(width // expansion for width in widths),
        "stride_in_1x1": in_1x1 and layer == "bottleneck",
    }
    stem = as_count("embedding_size", config.get("embedding_size", 64), 1, MAX_SIDE)
    if stem != ImageNetStem.features:
        fields["stem_cls"] = functools.partial(ImageNetStem, features=stem)
    return Description(
        _NAMES.get((layer, depths), nearest),
        fields,
        Preprocessing(),
        class_names_of(labels, classes, "id2label"),
        threshold_of(config),
    )


def processor_preprocessing(config: dict[str, Any]) -> Preprocessing:
    """Reads a preprocessor_config.json; {} stands for transformers' defaults."""
    default = Preprocessing(interpolation="bicubic")
    side, fraction, mode = _processed_size(config, default)
    number = as_count("resample", config.get("resample", 3), 0, len(_FILTERS) - 1)
    factor = 1.0
    if as_bool("do_rescale", config.get("do_rescale", True)):
        factor = as_number("rescale_factor", config.get("rescale_factor", 1 / 255))
    if not 0 < factor < math.inf:
        raise WeightsError(f"rescale_factor = {factor}: must be a positive number")
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if as_bool("do_normalize", config.get("do_normalize", True)):
        mean = as_numbers("image_mean", config.get("image_mean", default.mean))
        std = as_numbers("image_std", config.get("image_std", default.std))
    if factor != 1 / 255:  # mean and standard deviation are in units of the factor
        mean = tuple(each / (255 * factor) for each in mean)
        std = tuple(each / (255 * factor) for each in std)
    preprocessing = Preprocessing(side, fraction, _FILTERS[number], mean, std, mode)
    check_preprocessing(preprocessing, len(mean))
    return preprocessing


def _processed_size(config: dict[str, Any], default: Preprocessing) -> tuple[int, float, str]:
    """(side of the crop, its fraction of the resized image, crop mode).

    ConvNextImageProcessor, which ResNets use, crops a fraction below 384 pixels and squashes from
    there on. Others name the size of the crop, if they crop.
    """
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "ConvNext"
    size = config.get("size", default.image_size)
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    if not kind.startswith(_PROCESSORS):
        refuse("image_processor_type", kind)
    if not as_bool("do_resize", config.get("do_resize", True)):
        refuse("do_resize", False)
    squashed = set(size) == set(_SIDES)
    if not squashed and set(size) != {"shortest_edge"}:
        refuse("size", size)
    resized = _side("size", size if squashed else dict.fromkeys(_SIDES, size["shortest_edge"]))
    crops = as_bool("do_center_crop", config.get("do_center_crop") or False)
    if kind.startswith("ConvNext"):
        if crops or squashed:
            refuse("do_center_crop" if crops else "size", crops or size)
        if resized >= _SQUASHED_FROM:
            return resized, 1.0, "squash"
        return (
            resized,
            as_number("crop_pct", config.get("crop_pct") or default.crop_fraction),
            "center",
        )
    if not crops and not squashed:
        refuse("do_center_crop", False)
    crop = config.get("crop_size", resized) if crops else resized
    side = _side("crop_size", crop if isinstance(crop, dict) else dict.fromkeys(_SIDES, crop))
    return side, side / resized, "squash" if squashed else "center"


def _side(field: str, size: dict[str, Any]) -> int:
    if size["height"] != size["width"]:
        raise WeightsError(f"{field} = {str(size)[:200]}: images are square here")
    return as_count(field, size["height"], 1, MAX_PIXELS)
