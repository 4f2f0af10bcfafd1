"""What a config.json says of a network, and checks of the values it may have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.errors import ModelError, WeightsError
from resnet_jax.limits import MAX_SIDE

MULTI_LABEL = "multi_label_classification"  # a "problem_type" of transformers
MAX_PIXELS = 4096  # of an image's side
_MAX_STAGES, _MAX_BLOCKS = 16, 1000  # ResNet-1202 has 600 blocks


class Description(NamedTuple):
    """A network in a folder."""

    name: str  # of the nearest registered network
    fields: dict[str, Any]  # of `ResNet`, which differ from it
    preprocessing: Preprocessing
    class_names: tuple[str, ...]  # () where the files do not say
    threshold: float | None  # of a multi-label network


def class_names_of(names: Any, classes: int, field: str = "label_names") -> tuple[str, ...]:
    """The classes' names; () where there are none, or those of another number of classes."""
    if isinstance(names, dict):  # by number, perhaps with gaps
        numbers = {int(each) if each.isdecimal() else -1: name for each, name in names.items()}
        if not all(0 <= number < classes for number in numbers):
            return ()
        names = [numbers.get(number, str(number)) for number in range(classes if numbers else 0)]
    names = names or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{field}: must be a list of names, or names by number")
    return tuple(names) if len(names) == classes else ()


def threshold_of(config: dict[str, Any]) -> float | None:
    """A multi-label network's threshold; None for any other network."""
    if config.get("problem_type") != MULTI_LABEL:
        return None
    threshold = as_number("threshold", config.get("threshold", 0.5))
    if not 0 < threshold < 1:
        raise WeightsError(f"threshold = {threshold}: must be in (0, 1)")
    return threshold


def refuse(field: str, value: Any) -> NoReturn:
    """Raises ModelError: the file is valid, but no ResNet here computes the same."""
    raise ModelError(f"{f'{field} = {value!r}'[:200]} has no counterpart here")


def one_of(field: str, value: Any, known: Mapping[str, Any]) -> Any:
    """The meaning of a word in the file."""
    if not isinstance(value, str) or value not in known:
        refuse(field, value)
    return known[value]


def as_bool(field: str, value: Any) -> bool:
    """A truth value."""
    if not isinstance(value, bool):
        raise WeightsError(f"{field} = {str(value)[:100]}: must be true or false")
    return value


def as_number(field: str, value: Any) -> float:
    """A number."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise WeightsError(f"{field} = {str(value)[:100]}: must be a number")
    return float(value)


def as_numbers(field: str, values: Any) -> tuple[float, ...]:
    """A list of numbers."""
    if not isinstance(values, list | tuple):
        raise WeightsError(f"{field} = {str(values)[:100]}: must be a list of numbers")
    return tuple(as_number(field, value) for value in values)


def as_count(field: str, value: Any, least: int, most: int) -> int:
    """A whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise WeightsError(f"{field} = {str(value)[:100]}: must be a whole number")
    if not least <= value <= most:
        raise WeightsError(f"{field} = {value}: must be from {least:,} to {most:,}")
    return value


def as_counts(field: str, values: Any, most: int) -> tuple[int, ...]:
    """A whole number per stage."""
    if not isinstance(values, Sequence) or not 0 < len(values) <= _MAX_STAGES:
        raise WeightsError(f"{field} = {str(values)[:100]}: must be a number for each stage")
    return tuple(as_count(field, value, 1, most) for value in values)


def as_stage_sizes(field: str, values: Any) -> tuple[int, ...]:
    """Number of blocks in each stage, few enough to trace in seconds."""
    found = as_counts(field, values, _MAX_BLOCKS)
    if sum(found) > _MAX_BLOCKS:
        raise WeightsError(f"{field} = {list(found)}: at most {_MAX_BLOCKS:,} blocks in all")
    return found


def check_preprocessing(preprocessing: Preprocessing, channels: int) -> None:
    """Raises WeightsError for values that no image can be prepared by."""
    size, crop = preprocessing.image_size, preprocessing.crop_fraction
    mean, std = preprocessing.mean, preprocessing.std
    if not 0 < crop <= 1:
        raise WeightsError(f"crop_pct = {crop}: must be a share in (0, 1]")
    if size / crop > MAX_SIDE:
        raise WeightsError(
            f"crop_pct = {crop}: images would be resized to {size / crop:,.0f} pixels, where "
            f"{MAX_SIDE:,} are the most"
        )
    # timm may write three whatever the number of channels.
    if len(mean) not in (1, 3, channels) or not all(map(math.isfinite, mean)):
        more = "" if channels in (1, 3) else f", or {channels:,}"
        raise WeightsError(f"mean = {str(mean)[:200]}: must be 1 or 3 numbers{more}")
    if len(std) != len(mean) or not all(1e-6 <= each < math.inf for each in std):
        raise WeightsError(
            f"std = {std}: must be as many positive numbers as mean has, 1e-6 or more"
        )
