"""Checks of a configuration: types, allowed values, combinations of fields, and the model."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, Union, get_args, get_origin, get_type_hints

from resnet_jax.config.schema import (
    BN_SYNC,
    CROPS,
    DATA_NAMES,
    DATA_PLACES,
    DATA_SPLIT,
    DECAYS,
    DTYPES,
    EVAL_CROPS,
    INTERPOLATIONS,
    LOSSES,
    MEASURES,
    MULTI_LABEL_MEASURES,
    OPTIMIZERS,
    PRECISIONS,
    SAMPLERS,
    SCHEDULES,
    SHORTCUTS,
    Config,
)
from resnet_jax.config.serialization import to_flat
from resnet_jax.errors import ConfigError, ModelError
from resnet_jax.limits import MAX_BATCH, MAX_CHANNELS, MAX_CLASSES, MAX_COUNT, MAX_SIDE

_MAX_WORKERS = 1024  # each is a thread, a process or a batch in memory
_MAX_UNROLLED = 100  # each is a part of the compiled program
_MAX_LETTERS = 4096  # of a path on Linux
_LETTERS = {"class_weights": 2**20}  # a number for each class of ImageNet-21k
_MAX_FLOAT32 = 3.4e38

# A test of a value, and the words for what it allows.
Rule = tuple[Callable[[Any], bool], str]
_POSITIVE: Rule = (lambda x: x > 0, "must be more than 0")
_NOT_NEGATIVE: Rule = (lambda x: x >= 0, "must be 0 or more")
_AT_LEAST_1: Rule = (lambda x: x >= 1, "must be 1 or more")
_FRACTION: Rule = (lambda x: 0 <= x <= 1, "must be in [0, 1]")
_RATE: Rule = (lambda x: 0 <= x < 1, "must be in [0, 1)")
_RANGE: Rule = (
    lambda x: len(x) == 2 and 0 < x[0] <= x[1],
    "must be two positive numbers, the smaller first",
)


def _from_to(least: int, most: int) -> Rule:
    return (lambda x: least <= x <= most, f"must be {least} or more, up to {most:,}")


def _one_of(allowed: tuple[str, ...]) -> Rule:
    return (lambda x: x in allowed, f"must be one of {', '.join(allowed)}")


_RULES: dict[str, Rule] = {
    "model.num_classes": _from_to(0, MAX_CLASSES),
    "model.dtype": _one_of(DTYPES),
    "model.precision": _one_of(PRECISIONS),
    "model.shortcut": (
        lambda x: x is None or x in SHORTCUTS,
        f"must be one of {', '.join(SHORTCUTS)}",
    ),
    "model.bn_momentum": _RATE,
    "model.bn_sync": _one_of(BN_SYNC),
    "model.bn_group_size": _NOT_NEGATIVE,
    "model.stochastic_depth_rate": _RATE,
    "model.dropout_rate": _RATE,
    "data.name": (
        lambda x: x == "digits" or (x.partition(":")[0] in ("tfds", *DATA_PLACES) and x.count(":")),
        f"must be {DATA_NAMES}",
    ),
    "data.label_separator": (lambda x: len(x) > 0, "must not be empty"),
    "data.sampler": _one_of(SAMPLERS),
    "data.channels": (
        lambda x: 0 <= x <= MAX_CHANNELS,
        f"must be 0 (as the dataset has), 1, 3, or as many as its images have, up to "
        f"{MAX_CHANNELS:,}",
    ),
    "data.image_size": _from_to(1, MAX_SIDE),
    "data.crop": _one_of(CROPS),
    "data.crop_area": (
        lambda x: _RANGE[0](x) and x[1] <= 1,
        "must be two fractions in (0, 1], the smaller first",
    ),
    "data.crop_ratio": _RANGE,
    "data.jitter_sides": (
        lambda x: _RANGE[0](x) and x[1] <= MAX_SIDE,
        f"must be two numbers of pixels up to {MAX_SIDE:,}, the smaller first",
    ),
    "data.interpolation": _one_of(INTERPOLATIONS),
    "data.eval_size": _from_to(0, MAX_SIDE),
    "data.eval_resize": _from_to(0, MAX_SIDE),
    "data.eval_crop": _one_of(EVAL_CROPS),
    "data.memory_gib": _NOT_NEGATIVE,
    "data.workers": _from_to(0, _MAX_WORKERS),
    "data.threads": _from_to(1, _MAX_WORKERS),
    "data.prefetch": _from_to(1, _MAX_WORKERS),
    "data.max_corrupt": _NOT_NEGATIVE,
    "data.repeats": _AT_LEAST_1,
    "augment.pad": _from_to(0, MAX_SIDE),
    "augment.rotate": (lambda x: 0 <= x <= 180, "must be in [0, 180] degrees"),
    "augment.rand_layers": _from_to(0, _MAX_UNROLLED),
    "augment.rand_magnitude": (lambda x: 0 <= x <= 10, "must be in [0, 10]"),
    "augment.rand_magnitude_std": _NOT_NEGATIVE,
    "augment.brightness": _FRACTION,
    "augment.contrast": _FRACTION,
    "augment.saturation": _FRACTION,
    "augment.hue": (lambda x: 0 <= x <= 0.5, "must be in [0, 0.5]"),
    "augment.pca": _NOT_NEGATIVE,
    "augment.erase": _FRACTION,
    "augment.cutout": _NOT_NEGATIVE,
    "augment.mixup": _NOT_NEGATIVE,
    "augment.cutmix": _NOT_NEGATIVE,
    "augment.mean": (
        lambda x: 1 <= len(x) <= MAX_CHANNELS,
        "must have one number, or one for each channel of the images",
    ),
    "augment.std": (
        lambda x: 1 <= len(x) <= MAX_CHANNELS and min(x) >= 1e-6,
        "must have one positive number, or one for each channel of the images, 1e-6 or more",
    ),
    "optimizer.name": _one_of(OPTIMIZERS),
    "optimizer.learning_rate": _NOT_NEGATIVE,
    "optimizer.base_batch": _NOT_NEGATIVE,
    "optimizer.momentum": _RATE,
    "optimizer.beta1": _RATE,
    "optimizer.beta2": _RATE,
    "optimizer.epsilon": _POSITIVE,
    "optimizer.trust_coefficient": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.decay": _one_of(DECAYS),
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "optimizer.backbone_rate": _FRACTION,
    "schedule.name": _one_of(SCHEDULES),
    "schedule.warmup_epochs": _NOT_NEGATIVE,
    "schedule.warmup_start": _FRACTION,
    "schedule.boundaries": (
        lambda x: (
            all(0 < each < 1 for each in x)
            and list(x) == sorted(set(x))
            and len(x) <= _MAX_UNROLLED
        ),
        f"must be at most {_MAX_UNROLLED} growing fractions of the run in (0, 1)",
    ),
    "schedule.factor": (lambda x: 0 < x < 1, "must be in (0, 1)"),
    "schedule.final": _FRACTION,
    "schedule.patience": _AT_LEAST_1,
    "loss.name": _one_of(LOSSES),
    "loss.label_smoothing": _RATE,
    "loss.bce_threshold": _RATE,
    "loss.focal_gamma": _NOT_NEGATIVE,
    "loss.class_weights": (
        lambda x: x in ("", "balanced") or _are_weights(parse_class_weights(x)),
        "must be balanced, or a number for each class such as 1,2.5,1: 0 or more, not all 0",
    ),
    "train.epochs": _POSITIVE,
    "train.steps": _NOT_NEGATIVE,
    "train.batch_size": _from_to(1, MAX_BATCH),
    "train.accumulate": _from_to(1, MAX_BATCH),
    "train.steps_per_call": _AT_LEAST_1,
    "train.seed": (lambda x: 0 <= x < 2**31, "must be in [0, 2^31)"),
    "train.ema_decay": _RATE,
    "train.ema_every": _AT_LEAST_1,
    "train.early_stopping": _NOT_NEGATIVE,
    "train.min_improvement": _NOT_NEGATIVE,
    "train.max_skipped": _NOT_NEGATIVE,
    "evaluate.every_epochs": _POSITIVE,
    "evaluate.batch_size": _from_to(0, MAX_BATCH),
    "evaluate.threshold": (lambda x: 0 < x < 1, "must be in (0, 1)"),
    "evaluate.also": (
        lambda x: all(map(DATA_SPLIT.fullmatch, x)) and len(set(x)) == len(x),
        "must be different data, each as DATA:SPLIT, such as digits:test",
    ),
    "checkpoint.every_steps": _NOT_NEGATIVE,
    "checkpoint.keep": _AT_LEAST_1,
    "checkpoint.keep_best": _AT_LEAST_1,
    "checkpoint.best_metric": _one_of(MEASURES),
    "log.every_steps": _AT_LEAST_1,
    "log.profile": (
        lambda x: not x or profile_steps(x) is not None,
        "must be FIRST:LAST, two growing step numbers",
    ),
}


def _are_weights(values: tuple[float, ...]) -> bool:
    return all(0 <= x <= _MAX_FLOAT32 for x in values) and any(values)


def check(config: Config) -> None:
    """Checks every field, without access to devices or data.

    Args:
      config: The configuration of a run.

    Raises:
      ConfigError: Reports all errors together: field, value and what is allowed.

    Example:
      >>> from resnet_jax.config import Train
      >>> check(Config(train=Train(batch_size=0)))
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: train.batch_size = 0: must be 1 or more, up to 16,777,216
    """
    # Values of the wrong type cannot be compared.
    problems = [*_type_problems(config)] or [*_value_problems(config)]
    if not any(problem.startswith("model.") for problem in problems):
        problems += _model_problems(config)
    if problems:
        raise ConfigError("; ".join(problems))


def check_types(config: Config) -> None:
    """Checks only that the value of each field has its type.

    Raises:
      ConfigError: Reports all fields whose values have not.

    Example:
      >>> from resnet_jax.config import Train
      >>> check_types(Config(train=Train(batch_size="64")))
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: train.batch_size = '64': must be of type int
    """
    if problems := [*_type_problems(config)]:
        raise ConfigError("; ".join(problems))


def parse_class_weights(text: str) -> tuple[float, ...]:
    """Parses `loss.class_weights`: "1,2.5" -> (1.0, 2.5); () for other text."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        return ()


def profile_steps(text: str) -> tuple[int, int] | None:
    """Parses `log.profile`: "10:15" -> (10, 15); None for other text."""
    first, _, last = text.partition(":")
    if len(text) > 40 or not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        return None
    return int(first), int(last)


def _type_problems(config: Config) -> Iterator[str]:
    """Fields whose values are not of their types, or too large for any use."""
    for part in dataclasses.fields(config):
        section = getattr(config, part.name)
        for name, hint in get_type_hints(type(section)).items():
            value = getattr(section, name)
            if not _has_type(value, hint):
                kind = getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint)
                finite = "finite " if hint is float else ""
                yield f"{part.name}.{name} = {_shown(value)}: must be of type {finite}{kind}"
            elif allowed := _size_problem(value, _LETTERS.get(name, _MAX_LETTERS)):
                yield f"{part.name}.{name} = {_shown(value)}: {allowed}"


def _size_problem(value: Any, letters: int = _MAX_LETTERS) -> str:
    """What a value of the right type must be if it is too large for any use; else ""."""
    if isinstance(value, tuple | list):
        return next(filter(None, map(_size_problem, value)), "")
    if isinstance(value, str):
        return (
            "" if _is_text(value, letters) else "must be text that is valid in a path, without NUL"
        )
    if isinstance(value, int) and abs(value) > MAX_COUNT:
        return f"must not be more than {MAX_COUNT:,}"
    if isinstance(value, float) and abs(value) > _MAX_FLOAT32:
        return f"must not be more than {_MAX_FLOAT32:g}"
    return ""


def _is_text(value: str, letters: int) -> bool:
    try:
        return "\0" not in os.fsdecode(os.fsencode(value)) and len(value) <= letters
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _shown(value: Any) -> str:
    """A value for a message, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Union:
        return any(_has_type(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        each = get_args(hint)[0]
        return isinstance(value, tuple | list) and all(_has_type(x, each) for x in value)
    if hint is float:  # an int is accepted, a bool is not
        return (
            isinstance(value, float | int)
            and not isinstance(value, bool)
            and -math.inf < value < math.inf  # isfinite fails for an int that no float can hold
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _value_problems(config: Config) -> Iterator[str]:
    values = to_flat(config)
    for name, (holds, allowed) in _RULES.items():
        if not holds(values[name]):
            yield f"{name} = {_shown(values[name])}: {allowed}"
    yield from _joint_problems(config)


def _model_problems(config: Config) -> Iterator[str]:
    # Flax is loaded here only: processes that decode images read the schema and need no networks.
    from resnet_jax.config.model import model_overrides
    from resnet_jax.models.registry import create_model

    try:
        create_model(config.model.name, **model_overrides(config.model))
    except ModelError as error:
        advice = "" if config.model.name else "; or set checkpoint.init_from to weights"
        yield f"model.name = {_shown(config.model.name)}: {error}{advice}"


def _joint_problems(config: Config) -> Iterator[str]:
    """Values that are not allowed together."""
    data, train = config.data, config.train
    if (config.model.bn_sync == "group") != (config.model.bn_group_size > 0):
        yield (
            f"model.bn_group_size = {config.model.bn_group_size}: must be set with "
            "model.bn_sync = 'group', and only then"
        )
    if data.eval_resize and data.eval_resize < (data.eval_size or data.image_size):
        yield f"data.eval_resize = {data.eval_resize}: must not be less than the evaluated side"
    if config.augment.pad > data.image_size:
        yield f"augment.pad = {config.augment.pad}: must not be more than data.image_size"
    if data.crop == "scale_jitter" and data.jitter_sides[0] < data.image_size:
        yield f"data.jitter_sides = {data.jitter_sides}: must not be less than data.image_size"
    metric = config.checkpoint.best_metric
    if metric in MULTI_LABEL_MEASURES and not data.multi_label:
        yield (
            f"checkpoint.best_metric = {metric!r}: needs data.multi_label; use top1, top5 or loss"
        )
    if len(config.augment.mean) != len(config.augment.std):
        yield f"augment.std = {config.augment.std}: must have as many numbers as augment.mean"
    if config.augment.flip and config.augment.flip_alternates:
        yield "augment.flip_alternates = True: must be False with augment.flip"
    if config.augment.trivial and config.augment.rand_layers:
        yield f"augment.rand_layers = {config.augment.rand_layers}: must be 0 with augment.trivial"
    if data.multi_label:
        yield from _multi_label_problems(config)
    if data.sampler == "balanced" and config.loss.class_weights == "balanced":
        yield (
            "loss.class_weights = 'balanced': must be empty with data.sampler = 'balanced', which "
            "already balances the classes"
        )
    if data.sampler == "balanced" and data.multi_label:
        yield (
            "data.sampler = 'balanced': must be 'shuffled' with data.multi_label, where an image "
            "can have several classes; use loss.class_weights = 'balanced'"
        )
    if not train.steps and config.schedule.warmup_epochs > train.epochs:
        yield (
            f"schedule.warmup_epochs = {config.schedule.warmup_epochs}: must not be more than "
            f"train.epochs = {train.epochs}"
        )


def _multi_label_problems(config: Config) -> Iterator[str]:
    loss = config.loss
    if loss.name == "softmax":
        yield (
            "loss.name = 'softmax': must be bce or focal with data.multi_label, because "
            "softmax predicts exactly one label"
        )
    if loss.bce_threshold and loss.label_smoothing:
        yield (
            f"loss.label_smoothing = {loss.label_smoothing}: must be 0 with loss.bce_threshold "
            "and data.multi_label, because the threshold undoes it"
        )
