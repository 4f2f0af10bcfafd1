"""What a config.json says of a network, as timm and Hugging Face transformers write it.

What would give other outputs than theirs and is not known here is refused, by name and value.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.errors import ModelError, WeightsError
from resnet_jax.files import MIB, read_json
from resnet_jax.limits import MAX_CHANNELS, MAX_CLASSES, MAX_SIDE
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stem import DeepStem, ImageNetStem

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
MULTI_LABEL = "multi_label_classification"  # a "problem_type" of transformers'
# Of ImageNet-21k's classes, the names take 1 MB.
_MOST_CONFIG = 16 * MIB
_MOST_STAGES, _MOST_BLOCKS = 16, 1000  # ResNet-1202 has 600 blocks
_CROP_MODES = ("center", "squash")
# Networks of timm's with one of our names and another function.
_OTHER_NETWORKS = {
    name: (
        "passes the stem's output around its first block before the first norm and ReLU, where "
        f"the paper (He et al. 2016, section 5) and {name} here pass it after them"
    )
    for name in ("resnetv2_18", "resnetv2_34")
}


class Description(NamedTuple):
    """A network in a folder.

    Args:
      name: As registered.
      fields: Of `ResNet`, which differ from the registered ones.
      preprocessing: How its images are prepared.
      labels: Names of the classes; () where the files do not say.
      threshold: Probability from which a multi-label network predicts a class; None of any other.
    """

    name: str
    fields: dict[str, Any]
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    threshold: float | None


def read_description(folder: Path, *, use_test_size: bool = False) -> Description:
    """Reads the configuration files of a folder.

    Args:
      folder: With config.json and, of transformers, preprocessor_config.json.
      use_test_size: Prepare images of the size for which timm states the accuracy.

    Returns:
      What they say.

    Raises:
      WeightsError: They cannot be read, or are of another network.
    """
    path = folder / CONFIG
    config = _read(path)
    if isinstance(config, dict) and "architecture" not in config and "model_type" in config:
        described = _checked(path, "transformers", lambda: _transformers_network(config))
        path = folder / PREPROCESSOR
        processor = _read(path) if path.exists() else {}
        return described._replace(
            preprocessing=_checked(path, "transformers", lambda: _of_processor(processor))
        )
    return _checked(path, "timm", lambda: _timm_network(config, use_test_size))


def _read(path: Path) -> Any:
    try:
        return read_json(path, _MOST_CONFIG)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error})") from error


def _checked(path: Path, library: str, parse: Callable[[], Any]) -> Any:
    """What `parse` makes of a file; any value of another type than it expects is an error.

    A ModelError is of a file that is in order, and of a network that is not known here.
    """
    try:
        return parse()
    except ModelError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        what = error if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}"
        raise WeightsError(
            f"{path} is not a configuration as {library} writes it ({what})"
        ) from error


# timm


def _timm_network(config: dict[str, Any], use_test_size: bool) -> Description:
    name = config["architecture"]
    if name in _OTHER_NETWORKS:
        raise ModelError(f"timm's {name} {_OTHER_NETWORKS[name]}")
    # Facts of the weights stand in "pretrained_cfg", or beside all else.
    facts = {**config, **(config.get("pretrained_cfg") or {})}
    arguments = {
        # timm passes these on from there.
        "num_classes": config.get("num_classes", facts.get("num_classes", 1000)),
        "global_pool": facts.get("global_pool"),
        **(config.get("model_args") or {}),
    }
    if facts.get("label_offset"):
        _refuse("label_offset", facts["label_offset"])
    fields = timm_fields(create_model(name), arguments)
    return Description(
        name,
        fields,
        _timm_preprocessing(facts, arguments.get("in_chans"), use_test_size),
        _labels(facts.get("label_names") or facts.get("labels"), fields["num_classes"]),
        _threshold(config),
    )


def _timm_preprocessing(
    facts: dict[str, Any], in_chans: int | None, use_test_size: bool
) -> Preprocessing:
    """Where it does not say, timm assumes bicubic, and the rest as `Preprocessing` does."""
    default = Preprocessing(interpolation="bicubic")

    def fact(name: str, otherwise: Any) -> Any:
        test = facts.get(f"test_{name}") if use_test_size else None
        known = facts.get(name) if test is None else test
        return otherwise if known is None else known

    channels, height, width = fact("input_size", [3, default.image_size, default.image_size])
    channels = channels if in_chans is None else in_chans
    _count("input_size", channels, 1, MAX_CHANNELS)
    _count("input_size", height, 1, 4096)
    _count("input_size", width, 1, 4096)
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
        crop_fraction=_number("crop_pct", fact("crop_pct", default.crop_fraction)),
        interpolation=str(fact("interpolation", default.interpolation)),
        mean=_numbers("mean", fact("mean", default.mean)),
        std=_numbers("std", fact("std", default.std)),
        crop_mode=mode,
    )
    _check_preprocessing(preprocessing, channels)
    if len(preprocessing.mean) in (1, channels):
        return preprocessing
    # Those of color beside other channels: timm takes their mean for each.
    mean, std = (sum(part) / len(part) for part in (preprocessing.mean, preprocessing.std))
    return dataclasses.replace(preprocessing, mean=(mean,), std=(std,))


# Arguments of timm's networks that change no output, or that the weights tell.
_WITHOUT_EFFECT = (
    *("in_chans", "drop_block_rate", "device"),
    *("pretrained", "pretrained_strict", "checkpoint_path", "cache_dir"),
    *("scriptable", "exportable", "no_jit"),
)
# Those with values that change nothing; any other value is one of another network.
_ONLY: dict[str, tuple[object, ...]] = {
    "global_pool": ("avg", "fast", "fastavg"),
    "block_reduce_first": (1,),
    "down_kernel_size": (1,),
    "act_layer": ("relu",),
    "aa_layer": ("",),
    "features_only": (False,),
    "pruned": (False,),
}
# Those of all of timm's ResNets, and those of the ones without pre-activation.
_OF_ALL: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "num_classes": lambda name, value: {"num_classes": _count(name, value, 0, MAX_CLASSES)},
    "output_stride": lambda name, value: {"output_stride": _count(name, value, 1, MAX_SIDE)},
    "drop_rate": lambda name, value: {"dropout_rate": _number(name, value)},
    "drop_path_rate": lambda name, value: {"stochastic_depth_rate": _number(name, value)},
    "zero_init_last": lambda name, value: {"zero_init_residual": _truth(name, value)},
    "layers": lambda name, value: {"stage_sizes": _blocks(name, value)},
}
_OF_V1: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "channels": lambda name, value: {"stage_widths": _counts(name, value, MAX_SIDE)},
    "cardinality": lambda name, value: {"cardinality": _count(name, value, 1, MAX_SIDE)},
    "base_width": lambda name, value: {"base_width": _count(name, value, 1, MAX_SIDE)},
    "avg_down": lambda name, value: {"shortcut": "D" if _truth(name, value) else "B"},
    "norm_layer": lambda name, value: {"norm": _one_of(name, value, _NORMS)},
    "block_args": lambda name, value: _block_fields(name, value),
}
_STEM = ("stem_type", "stem_width", "replace_stem_pool")
_STEM_TYPES = {"": "", "deep": "deep", "deep_tiered": "deep_tiered"}
_NORMS: dict[str, str] = {"batchnorm": "batch", "batchnorm2d": "batch", "groupnorm": "group"}
_ATTENTION = {"": 0.0, "se": 1 / 16}


def timm_fields(named: ResNet, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that arguments of timm's constructor stand for.

    Args:
      named: The registered network.
      arguments: As in "model_args": what differs from timm's network of that name.

    Returns:
      Fields of `ResNet`.

    Raises:
      WeightsError: An argument makes a network that is not known here.

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
            _refuse(f"model_args.{name}", value)
    return fields


def _stem_fields(named: ResNet, given: Mapping[str, Any]) -> dict[str, Any]:
    """The stem, of which the arguments may name a part; the rest is that of the named network."""
    stem_cls: Any = getattr(named.stem_cls, "func", named.stem_cls)
    own = getattr(named.stem_cls, "keywords", {})
    first, width, _ = own.get("widths", DeepStem.widths) if stem_cls is DeepStem else (64, 64, 64)
    deep = "deep" if first == width else "deep_tiered"
    before = deep if stem_cls is DeepStem else "", width, own.get("conv_pool", False)
    kind, width, conv_pool = (given.get(name, each) for name, each in zip(_STEM, before))
    if (kind, width, conv_pool) == before:
        return {}
    kind = _one_of("model_args.stem_type", kind, _STEM_TYPES)
    width = _count("model_args.stem_width", width, 4, MAX_SIDE)
    conv_pool = _truth("model_args.replace_stem_pool", conv_pool)
    if not kind:  # a 7x7 convolution of 64 channels, whatever the width says
        if conv_pool:
            _refuse("model_args.replace_stem_pool", conv_pool)
        return {"stem_cls": ImageNetStem}
    widths = (3 * (width // 4) if kind == "deep_tiered" else width, width, 2 * width)
    return {"stem_cls": functools.partial(DeepStem, widths=widths, conv_pool=conv_pool)}


def _block_fields(name: str, value: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for argument, inner in value.items():
        if argument == "attn_layer":
            fields["se_ratio"] = _one_of(f"{name}.{argument}", inner or "", _ATTENTION)
        elif inner is not None:
            _refuse(f"{name}.{argument}", inner)
    return fields


# transformers

_NAMES: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
_NEAREST = {"basic": ("resnet18", 1), "bottleneck": ("resnet50", 4)}  # and the block's expansion
# Pillow's numbers of its filters.
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_PROCESSORS = ("ConvNext", "ViT", "DeiT", "CLIP", "Bit")  # the beginnings of their names
_SIDES = ("height", "width")
_SQUASHED_FROM = 384  # pixels


def _transformers_network(config: dict[str, Any]) -> Description:
    if config["model_type"] != "resnet":
        raise WeightsError(f"model_type = {str(config['model_type'])[:100]!r}: must be 'resnet'")
    if config.get("hidden_act", "relu") != "relu":
        _refuse("hidden_act", config["hidden_act"])
    if _truth("downsample_in_first_stage", config.get("downsample_in_first_stage", False)):
        _refuse("downsample_in_first_stage", True)
    layer = config.get("layer_type", "bottleneck")
    nearest, expansion = _one_of("layer_type", layer, _NEAREST)
    depths = _blocks("depths", config.get("depths", [3, 4, 6, 3]))
    sizes = config.get("hidden_sizes", [256, 512, 1024, 2048])
    widths = _counts("hidden_sizes", sizes, expansion * MAX_SIDE)
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
    in_1x1 = _truth("downsample_in_bottleneck", config.get("downsample_in_bottleneck", False))
    fields: dict[str, Any] = {
        "num_classes": _count("id2label", classes, 0, MAX_CLASSES),
        "stage_sizes": depths,
        "stage_widths": tuple(width // expansion for width in widths),
        "stride_in_1x1": in_1x1 and layer == "bottleneck",
    }
    stem = _count("embedding_size", config.get("embedding_size", 64), 1, MAX_SIDE)
    if stem != ImageNetStem.features:
        fields["stem_cls"] = functools.partial(ImageNetStem, features=stem)
    return Description(
        _NAMES.get((layer, depths), nearest),
        fields,
        Preprocessing(),
        _labels(labels, classes),
        _threshold(config),
    )


def _of_processor(config: dict[str, Any]) -> Preprocessing:
    """What an image processor does, of those that transformers has for networks like these."""
    default = Preprocessing(interpolation="bicubic")
    side, fraction, mode = _processed_size(config, default)
    number = _count("resample", config.get("resample", 3), 0, len(_FILTERS) - 1)
    factor = 1.0
    if _truth("do_rescale", config.get("do_rescale", True)):
        factor = _number("rescale_factor", config.get("rescale_factor", 1 / 255))
    if not 0 < factor < math.inf:
        raise WeightsError(f"rescale_factor = {factor}: must be a positive number")
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if _truth("do_normalize", config.get("do_normalize", True)):
        mean = _numbers("image_mean", config.get("image_mean", default.mean))
        std = _numbers("image_std", config.get("image_std", default.std))
    if factor != 1 / 255:  # mean and deviation are in units of that factor
        mean = tuple(each / (255 * factor) for each in mean)
        std = tuple(each / (255 * factor) for each in std)
    preprocessing = Preprocessing(side, fraction, _FILTERS[number], mean, std, mode)
    _check_preprocessing(preprocessing, len(mean))
    return preprocessing


def _processed_size(config: dict[str, Any], default: Preprocessing) -> tuple[int, float, str]:
    """Side of the crop, its share of the resized image, and how that is resized.

    ConvNextImageProcessor, which ResNets have, takes the share below 384 pixels and squashes from
    there on. Others are told the size of a crop, if there is one.
    """
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "ConvNext"
    size = config.get("size", default.image_size)
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    if not kind.startswith(_PROCESSORS):
        _refuse("image_processor_type", kind)
    if not _truth("do_resize", config.get("do_resize", True)):
        _refuse("do_resize", False)
    squashed = set(size) == set(_SIDES)
    if not squashed and set(size) != {"shortest_edge"}:
        _refuse("size", size)
    resized = _side("size", size if squashed else dict.fromkeys(_SIDES, size["shortest_edge"]))
    crops = _truth("do_center_crop", config.get("do_center_crop") or False)
    if kind.startswith("ConvNext"):
        if crops or squashed:
            _refuse("do_center_crop" if crops else "size", crops or size)
        if resized >= _SQUASHED_FROM:
            return resized, 1.0, "squash"
        return (
            resized,
            _number("crop_pct", config.get("crop_pct") or default.crop_fraction),
            "center",
        )
    if not crops and not squashed:
        _refuse("do_center_crop", False)
    crop = config.get("crop_size", resized) if crops else resized
    side = _side("crop_size", crop if isinstance(crop, dict) else dict.fromkeys(_SIDES, crop))
    return side, side / resized, "squash" if squashed else "center"


def _side(field: str, size: dict[str, Any]) -> int:
    if size["height"] != size["width"]:
        raise WeightsError(f"{field} = {str(size)[:200]}: images are square here")
    return _count(field, size["height"], 1, 4096)


# Both


def _labels(names: Any, classes: int) -> tuple[str, ...]:
    """The classes' names; () where there are none, or those of other classes."""
    if isinstance(names, dict):  # by number, perhaps with gaps
        numbers = {int(each) if each.isdecimal() else -1: name for each, name in names.items()}
        if not all(0 <= number < classes for number in numbers):
            return ()
        names = [numbers.get(number, str(number)) for number in range(classes if numbers else 0)]
    names = names or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsError("label_names: must be a list of names, or names by number")
    return tuple(names) if len(names) == classes else ()


def _threshold(config: dict[str, Any]) -> float | None:
    """Of a multi-label network; None for any other."""
    if config.get("problem_type") != MULTI_LABEL:
        return None
    threshold = _number("threshold", config.get("threshold", 0.5))
    if not 0 < threshold < 1:
        raise WeightsError(f"threshold = {threshold}: must be in (0, 1)")
    return threshold


def _refuse(field: str, value: Any) -> NoReturn:
    raise ModelError(f"{f'{field} = {value!r}'[:200]} has no counterpart here")


def _one_of(field: str, value: Any, known: Mapping[str, Any]) -> Any:
    """What a word in the file means."""
    if not isinstance(value, str) or value not in known:
        _refuse(field, value)
    return known[value]


def _truth(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise WeightsError(f"{field} = {str(value)[:100]}: must be true or false")
    return value


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise WeightsError(f"{field} = {str(value)[:100]}: must be a number")
    return float(value)


def _numbers(field: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        raise WeightsError(f"{field} = {str(values)[:100]}: must be a list of numbers")
    return tuple(_number(field, value) for value in values)


def _count(field: str, value: Any, least: int, most: int) -> int:
    """A whole number in the file, once it is one and in range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise WeightsError(f"{field} = {str(value)[:100]}: must be a whole number")
    if not least <= value <= most:
        raise WeightsError(f"{field} = {value}: must be from {least:,} to {most:,}")
    return value


def _counts(field: str, values: Any, most: int) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or not 0 < len(values) <= _MOST_STAGES:
        raise WeightsError(f"{field} = {str(values)[:100]}: must be a number for each stage")
    return tuple(_count(field, value, 1, most) for value in values)


def _blocks(field: str, values: Any) -> tuple[int, ...]:
    """Blocks of each stage: as many as can be traced in seconds."""
    found = _counts(field, values, _MOST_BLOCKS)
    if sum(found) > _MOST_BLOCKS:
        raise WeightsError(f"{field} = {list(found)}: at most {_MOST_BLOCKS:,} blocks in all")
    return found


def _check_preprocessing(preprocessing: Preprocessing, channels: int) -> None:
    """Refuses numbers that no image can be prepared by."""
    size, crop = preprocessing.image_size, preprocessing.crop_fraction
    mean, std = preprocessing.mean, preprocessing.std
    if not 0 < crop <= 1:
        raise WeightsError(f"crop_pct = {crop}: must be a share in (0, 1]")
    if size / crop > MAX_SIDE:
        raise WeightsError(
            f"crop_pct = {crop}: images would be resized to {size / crop:,.0f} pixels, where "
            f"{MAX_SIDE:,} are the most"
        )
    # timm may write three for networks of other channels.
    if len(mean) not in (1, 3, channels) or not all(map(math.isfinite, mean)):
        more = "" if channels in (1, 3) else f", or {channels:,}"
        raise WeightsError(f"mean = {str(mean)[:200]}: must be 1 or 3 numbers{more}")
    if len(std) != len(mean) or not all(1e-6 <= each < math.inf for each in std):
        raise WeightsError(
            f"std = {std}: must be as many positive numbers as mean has, 1e-6 or more"
        )
