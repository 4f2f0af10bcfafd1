"""Initial weights of a run: random, or from a weight file, a workdir, or the Hub.

Weights come with facts: which network they belong to, how its images are prepared, what its outputs
mean. A recipe for fine-tuning leaves these fields of the configuration empty. They are filled in
from the weights before the configuration is checked:

fill_from_weights -> Start.config -> check, open_sources -> Start.with_head -> initial_variables
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.config.schema import Config
from resnet_jax.config.serialization import from_json, to_flat, to_json
from resnet_jax.errors import ConfigError, ModelError, WeightsError, one_line
from resnet_jax.files import expand_user
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.channels import with_channels
from resnet_jax.weights.class_names import imagenet_ids, imagenet_names
from resnet_jax.weights.convert import fit_variables
from resnet_jax.weights.files import WEIGHT_SUFFIXES, load_weights
from resnet_jax.weights.network import Network
from resnet_jax.weights.pretrained import load_pretrained
from resnet_jax.weights.source import open_network
from resnet_jax.workdirs.description import read_config
from resnet_jax.workdirs.workdir import has_states

# Fields that the weights may fill in, and the value by which a configuration leaves them open.
_OPEN_VALUES: dict[str, Any] = {
    "model.name": "",
    "data.image_size": 0,
    "data.interpolation": "",
    "data.eval_crop": "",
    "augment.mean": (),
    "augment.std": (),
    "checkpoint.reset_head": None,
}
# 0 leaves these open where one of the others is; elsewhere it means the data's own value, or the
# same as image_size.
_OPENED_WITH_OTHERS = ("data.channels", "data.eval_size", "data.eval_resize")
_HEADLESS = ("",)  # class names of weights without a head
# Flags of the commands that open a network, in messages, and what a run has instead.
_FLAGS = {
    "--model=": "model.name = ",
    "with --model": "in model.name",
    "--interpolation": "data.interpolation",
    "--prefix= or --no-ema": "--prefix=",
    "--prefix=": "rj.load_weights(..., prefix=...), and save it with rj.save_weights",
}
# Fields of `ResNet` that a configuration has too, and that change what weights mean.
_MODEL_FIELDS = ("model.shortcut", "model.stride_in_1x1")
# Fields of `ResNet` that do not change what the network computes for given weights.
_FREE_FIELDS = ("name", "parent", "num_classes", "dropout_rate", "precision", "zero_init_residual")


class Start(NamedTuple):
    """A configuration that is filled in from the weights it starts from, but for the head."""

    config: Config
    lines: tuple[str, ...] = ()  # for the log: what was filled in
    classes: tuple[str, ...] = ()  # names of the outputs of the weights; () if none are compared
    named: bool = False  # whether the names come with the weights, and are not assumed

    def with_head(self, data_classes: Sequence[str]) -> Start:
        """Decides checkpoint.reset_head by the classes of the data, where it is left open."""
        if self.config.checkpoint.reset_head is not None:
            return self
        keeps, reason = self._keeps_head(tuple(data_classes))
        checkpoint = dataclasses.replace(self.config.checkpoint, reset_head=not keeps)
        line = (
            f"the head of the weights is {'kept' if keeps else 'replaced by a new one'}: {reason}"
        )
        config = dataclasses.replace(self.config, checkpoint=checkpoint)
        return self._replace(
            config=config, lines=(*self.lines, line) if self.classes else self.lines
        )

    def _keeps_head(self, wanted: tuple[str, ...]) -> tuple[bool, str]:
        """Whether the head of the weights can be kept, and why."""
        found, width = self.classes, self.config.model.num_classes or len(wanted)
        if found == _HEADLESS:
            need = f"{width:,} classes are needed"
            return False, f"the weights have no head of one linear layer, and {need}"
        if len(found) != width:
            return False, f"it has {len(found):,} classes, and {width:,} are needed"
        known = [found]
        if found == imagenet_names():
            known += [imagenet_ids(), tuple(map(str, range(len(found))))]
        if any(names[: len(wanted)] == wanted for names in known):
            return True, "its classes are those of the data, by name"
        if not self.named and known == [found]:
            return (
                True,
                f"its {width:,} classes are matched to those of the data by order, not by name",
            )
        return False, "its classes have other names than those of the data, or another order"

    def to_json(self) -> str:
        """As text, to broadcast to other processes."""
        return json.dumps([to_json(self.config), *self[1:]])

    @classmethod
    def from_json(cls, text: str) -> Start:
        """Reads the text of `to_json`."""
        config, lines, classes, named = json.loads(text)
        return cls(from_json(config), tuple(lines), tuple(classes), named)


def fill_from_weights(config: Config, workdir: Path | None = None) -> Start:
    """Fills in the fields that a configuration leaves to checkpoint.init_from.

    Open are model.name, data.interpolation and data.eval_crop where they are "", data.image_size
    where it is 0, augment.mean and std where they are (), and checkpoint.reset_head where it is
    None. With any of these, 0 leaves data.channels, data.eval_size and data.eval_resize open, too.
    A run that resumes has the values in its workdir.

    Raises:
      ConfigError: The weights cannot be read, or belong to another network.

    Example:
      >>> fill_from_weights(Config()).config == Config()
      True
    """
    before = to_flat(config)
    fields = [name for name, value in before.items() if _is_open(name, value)]
    if not fields or not config.checkpoint.init_from:
        return Start(config)
    fields += [name for name in _OPENED_WITH_OTHERS if before[name] == 0]
    if workdir is not None and has_states(workdir):
        stored, defaults = to_flat(read_config(workdir)), to_flat(Config())
        fields += [name for name in _MODEL_FIELDS if before[name] == defaults[name]]
        return Start(_replaced(config, {name: stored[name] for name in fields}))
    network = _open(config)
    facts = _facts(network, config, fields)
    values = {name: facts[name] for name in facts if name in fields}
    values |= {name: facts[name] for name in _MODEL_FIELDS}
    shown = [f"{name} = {x!r}" for name, x in values.items() if x != before[name]]
    lines = [f"from {config.checkpoint.init_from}: {', '.join(shown)}"]
    # Some lines name a flag of the commands that open a network.
    assumed = [re.sub(r" \(--[^)]*\)", "", line) for line in network.assumed]
    lines += [f"assumed of it: {line}" for line in assumed]
    classes = network.class_names if network.model.num_classes else _HEADLESS
    return Start(_replaced(config, values), tuple(lines), classes, network.named)


def _is_open(name: str, value: Any) -> bool:
    if name not in _OPEN_VALUES:
        return False
    if isinstance(value, list):  # as JSON has it
        value = tuple(value)
    open_value = _OPEN_VALUES[name]
    return type(value) is type(open_value) and bool(value == open_value)  # False is not 0


def _replaced(config: Config, values: dict[str, Any]) -> Config:
    """A copy with other values of fields, given by their dotted names."""
    copy = from_json(to_json(config))
    for name, value in values.items():
        section, _, field = name.partition(".")
        setattr(getattr(copy, section), field, value)
    return copy


def _open(config: Config) -> Network:
    """Opens the network that checkpoint.init_from names."""
    source = config.checkpoint.init_from
    try:
        return open_network(
            expand_user(source) if _is_path(source) else source,
            model=config.model.name,
            interpolation=config.data.interpolation,
        )
    except (WeightsError, ModelError, ConfigError) as error:
        reason = str(error)
        for flag, here in _FLAGS.items():
            reason = reason.replace(flag, here)
        raise ConfigError(f"checkpoint.init_from = {source!r}: {one_line(reason)}") from error


def _facts(network: Network, config: Config, fields: Sequence[str]) -> dict[str, Any]:
    """The values that the weights give to fields, by dotted names."""
    before = network.preprocessing
    size, eval_size = before.image_size, 0
    if network.config is not None:  # a run may be evaluated at another size
        size, eval_size = network.config.data.image_size, network.config.data.eval_size
    if "data.image_size" not in fields:
        size, eval_size = config.data.image_size, 0
    evaluated = (eval_size if "data.eval_size" in fields else config.data.eval_size) or size
    resized = int(evaluated / before.crop_fraction + 1e-6)
    return {
        "model.name": network.name,
        **_model_facts(network, config),
        "data.channels": network.channels,
        "data.image_size": size,
        "data.eval_size": eval_size,
        "data.eval_resize": resized,
        "data.interpolation": before.interpolation,
        "data.eval_crop": before.crop_mode,
        "augment.mean": before.mean,
        "augment.std": before.std,
    }


def _model_facts(network: Network, config: Config) -> dict[str, Any]:
    """Fields of `config.model` by which a network differs from the registered one of its name."""
    own = to_flat(config if network.config is None else network.config)
    found = {name: own[name] for name in _MODEL_FIELDS}
    if network.config is not None:
        return found
    registered = create_model(network.name)
    for field in dataclasses.fields(registered):
        value = getattr(network.model, field.name)
        if field.name in _FREE_FIELDS or value == getattr(registered, field.name):
            continue
        if f"model.{field.name}" not in _MODEL_FIELDS:
            raise ConfigError(
                f"checkpoint.init_from = {config.checkpoint.init_from!r}: its network is a "
                f"{network.name} with another {field.name}, which a configuration cannot set; "
                "train it from Python, from the variables of rj.load_weights"
            )
        found[f"model.{field.name}"] = value
    return found


def _is_path(name: str) -> bool:
    """Whether it names a file or folder rather than a repository on the Hub."""
    path = expand_user(name)
    return path.exists() or name.count("/") != 1 or path.suffix in WEIGHT_SUFFIXES


def _is_hub_folder(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / "checkpoints").is_dir()


def initial_variables(config: Config, model: ResNet, channels: int) -> dict[str, Any] | None:
    """The variables that checkpoint.init_from names; None for random ones.

    Weights for gray or color images are converted to other channels where data.channels is set.

    Raises:
      ConfigError: They cannot be read or do not fit the network.

    Example:
      >>> import resnet_jax as rj
      >>> initial_variables(Config(), rj.ResNet20(), channels=3) is None
      True
    """
    name = config.checkpoint.init_from
    if not name:
        return None
    reset_head = bool(config.checkpoint.reset_head)
    path = expand_user(name) if _is_path(name) else None
    try:
        if path is not None and not _is_hub_folder(path):
            variables = load_weights(model, path, reset_head=reset_head)
        else:
            _, variables, _ = load_pretrained(
                path or name, reset_head=reset_head, num_classes=model.num_classes
            )
            variables = fit_variables(model, variables)
    except WeightsError as error:
        hint = str(error).replace("reset_head=True", "--config.checkpoint.reset_head=true")
        raise ConfigError(f"checkpoint.init_from = {name!r}: {hint}") from error
    found = np.shape(variables["params"]["stem"]["conv1"]["kernel"])[2]
    if found in (1, 3) and config.data.channels == channels:
        variables = with_channels(variables, channels)
    elif found != channels:
        advice = f"set data.channels = {found}"
        if channels not in (1, 3):  # such images cannot be converted
            advice = "choose other weights"
            if found == 3:
                advice = f"set data.channels = {channels} to repeat its filters for the others"
        raise ConfigError(
            f"checkpoint.init_from = {name!r}: its network takes {found} channels, the data has "
            f"{channels}; {advice}"
        )
    return variables
