"""Configurations as flat fields and as JSON, and the comparison of two of them."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from resnet_jax.config.schema import DATA_PLACES, Config
from resnet_jax.errors import ConfigError
from resnet_jax.files import expand_user

# Fields that may change when a run resumes: speed of the input, where files are, what is kept.
_MAY_CHANGE = {
    "data.data_dir",
    "data.memory_gib",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.max_corrupt",
    "train.early_stopping",
    "train.min_improvement",
    "train.max_skipped",
    "evaluate.batch_size",
    "evaluate.also",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_best",
    "checkpoint.best_metric",
    "checkpoint.allow_change",
    "checkpoint.copy_to",
}


def to_flat(config: Config) -> dict[str, Any]:
    """The fields of a configuration by their dotted names.

    Example:
      >>> to_flat(Config())["train.batch_size"]
      128
    """
    return {
        f"{part.name}.{field.name}": getattr(getattr(config, part.name), field.name)
        for part in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, part.name))
    }


def json_fields(config: Config) -> dict[str, Any]:
    """`to_flat` with the values that JSON returns: lists for tuples."""
    return {name: json.loads(json.dumps(value)) for name, value in to_flat(config).items()}


def to_json(config: Config) -> str:
    """Writes a configuration as a JSON object of objects, one field on each line.

    Example:
      >>> json.loads(to_json(Config()))["data"]["name"]
      'digits'
    """
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Reads the configuration that `to_json` wrote, without checking its values.

    Args:
      text: Content of a config.json. Fields that an older version did not have keep their defaults.

    Returns:
      The configuration.

    Raises:
      ConfigError: The text is not JSON, or has fields that do not exist.

    Example:
      >>> text = to_json(Config())
      >>> from_json(text.replace('"seed": 0', '"seed": 3')).train.seed
      3
    """
    try:
        stored = json.loads(text)
        is_object = isinstance(stored, dict)
        if not is_object or not all(isinstance(part, dict) for part in stored.values()):
            raise ValueError("it does not consist of sections of fields")
        fields = {f"{name}.{k}": v for name, part in stored.items() for k, v in part.items()}
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"config.json is not a configuration that a run writes ({error}); "
            "restore it from a copy"
        ) from error
    config = Config()
    if unknown := sorted(fields.keys() - to_flat(config).keys()):
        raise ConfigError(f"config.json has fields that this version lacks: {', '.join(unknown)}")
    for name, value in fields.items():
        section, _, field = name.partition(".")
        value = tuple(value) if isinstance(value, list) else value
        setattr(getattr(config, section), field, value)
    return config


def differences(config: Config, stored: dict[str, Any]) -> list[str]:
    """Lists the fields in which a stored configuration differs, if they can change results.

    Args:
      config: The configuration now.
      stored: The parsed config.json of an earlier start; fields that a section lacks, because an
        older version wrote it, have their defaults.

    Returns:
      "field: stored -> now" for each field, in the order of the fields.

    Example:
      >>> stored = json.loads(to_json(Config()).replace('"seed": 0', '"seed": 3'))
      >>> differences(Config(), stored)
      ['train.seed: 3 -> 0']
    """
    found, defaults = [], json_fields(Config())
    for name, value in json_fields(config).items():
        section, _, field = name.partition(".")
        part = stored.get(section)
        before = part.get(field, defaults[name]) if isinstance(part, dict) else None
        may_change = section == "log" or name in _MAY_CHANGE or _is_same_path(name, before, value)
        if before != value and not may_change:
            found.append(f"{name}: {before!r} -> {value!r}")
    return found


def _is_same_path(field: str, before: Any, now: Any) -> bool:
    """Whether two values name one path differently, or data whose contents are compared elsewhere.

    A folder or list of images may have moved; its fingerprint shows whether it is the same.
    """
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    if field == "data.name":
        kind = before.partition(":")[0]
        return kind in DATA_PLACES and kind == now.partition(":")[0]
    return field == "checkpoint.init_from" and absolute_path(before) == absolute_path(now)


def absolute_path(path: str) -> str:
    """The absolute form of a path that exists; any other text, such as a Hub name, as it is."""
    try:
        found = expand_user(path)
    except ConfigError:  # ~ without a home
        return path
    return os.path.realpath(found) if path and found.exists() else path


def absolute_data_name(name: str) -> str:
    """A `data.name` with an absolute path, if it has a path.

    Example:
      >>> absolute_data_name("folder:..") != "folder:..", absolute_data_name("tfds:mnist")
      (True, 'tfds:mnist')
    """
    kind, _, path = name.partition(":")
    return f"{kind}:{absolute_path(path)}" if kind in DATA_PLACES else name


def with_absolute_paths(config: Config) -> Config:
    """A copy of a configuration whose paths are valid in any working directory.

    Example:
      >>> config = Config()
      >>> config.data.name = "folder:.."
      >>> with_absolute_paths(config).data.name != "folder:.."
      True
    """
    data, checkpoint = config.data, config.checkpoint
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data, name=absolute_data_name(data.name), data_dir=absolute_path(data.data_dir)
        ),
        checkpoint=dataclasses.replace(checkpoint, init_from=absolute_path(checkpoint.init_from)),
    )
