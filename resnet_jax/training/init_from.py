"""Where a run's parameters come from: chance, a weight file, a workdir, or the Hub.

Weights come with facts: which network they are of, how its images are prepared, what its outputs
mean. A recipe for fine-tuning leaves these fields of the configuration empty, and they are taken
from the weights before the configuration is checked:

look_at_weights -> Start.config -> check, open_sources -> Start.with_head -> initial_variables
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
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.channels import with_channels
from resnet_jax.weights.convert import fit_variables
from resnet_jax.weights.files import WEIGHT_SUFFIXES, load_weights
from resnet_jax.weights.pretrained import load_pretrained
from resnet_jax.weights.source import Network, imagenet_ids, imagenet_names, open_network
from resnet_jax.workdirs.description import read_config
from resnet_jax.workdirs.workdir import has_states

# Fields that may be left to the weights, and the value that leaves them.
_LEFT: dict[str, Any] = {
    "model.name": "",
    "data.image_size": 0,
    "data.interpolation": "",
    "data.eval_crop": "",
    "augment.mean": (),
    "augment.std": (),
    "checkpoint.reset_head": None,
}
# Left too where one of those is; elsewhere 0 means the data's own, or the same as image_size.
_LEFT_WITH_THEM = ("data.channels", "data.eval_size", "data.eval_resize")
_HEADLESS = ("",)  # names of the classes of weights without a head
# Fields of `ResNet` that a configuration has too, and that change what weights mean.
_MODEL_FIELDS = ("shortcut", "stride_in_1x1")
# Those that differ without a change of what the network computes for given weights.
_FREE_FIELDS = ("name", "parent", "num_classes", "dropout_rate", "precision", "zero_init_residual")


class Start(NamedTuple):
    """What a run starts from.

    Args:
      config: The configuration, with what it left to the weights. The head is still to be decided.
      taken: What was taken from the weights, a line each for people.
      classes: Names of the outputs of the weights; () where there is nothing to decide.
      named: Somebody said that the outputs are called so.
    """

    config: Config
    taken: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    named: bool = False

    def with_head(self, data_classes: Sequence[str]) -> Start:
        """Decides checkpoint.reset_head, where the configuration leaves it to the weights.

        Args:
          data_classes: Of the data set.

        Returns:
          The same with reset_head in `config`, and a line about it.
        """
        if self.config.checkpoint.reset_head is not None:
            return self
        keeps, reason = self._judge_head(tuple(data_classes))
        checkpoint = dataclasses.replace(self.config.checkpoint, reset_head=not keeps)
        line = (
            f"the head of the weights is {'kept' if keeps else 'replaced by a new one'}: {reason}"
        )
        config = dataclasses.replace(self.config, checkpoint=checkpoint)
        return self._replace(
            config=config, taken=(*self.taken, line) if self.classes else self.taken
        )

    def _judge_head(self, wanted: tuple[str, ...]) -> tuple[bool, str]:
        """Whether the head of the weights can be kept, and why."""
        found, width = self.classes, self.config.model.num_classes or len(wanted)
        if found == _HEADLESS:
            return False, f"there is none of one linear layer, and {width:,} classes are needed"
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
        return False, "its classes are called otherwise than those of the data, or in another order"

    def to_json(self) -> str:
        """All of it as text, to be told to other processes."""
        return json.dumps([to_json(self.config), *self[1:]])

    @classmethod
    def from_json(cls, text: str) -> Start:
        """What `to_json` wrote."""
        config, taken, classes, named = json.loads(text)
        return cls(from_json(config), tuple(taken), tuple(classes), named)


def look_at_weights(config: Config, workdir: Path | None = None) -> Start:
    """Fills in what a configuration leaves to the weights that it starts from.

    It leaves model.name, data.interpolation and data.eval_crop by "", data.image_size by 0,
    augment.mean and std by (), and checkpoint.reset_head by None. With any of these, 0 in
    data.channels, data.eval_size and data.eval_resize leaves them too.

    Args:
      config: The configuration of a run.
      workdir: Of the run, which has the values where it is going on.

    Returns:
      The configuration to check, and what was taken. Where nothing is left open, or there are no
      weights, the same configuration.

    Raises:
      ConfigError: The weights cannot be read, or are those of another network.

    Example:
      >>> look_at_weights(Config()).config == Config()
      True
    """
    before = to_flat(config)
    left = [name for name, value in before.items() if _is_left(name, value)]
    if not left or not config.checkpoint.init_from:
        return Start(config)
    left += [name for name in _LEFT_WITH_THEM if before[name] == 0]
    if workdir is not None and has_states(workdir):
        stored = to_flat(read_config(workdir))
        return Start(_replaced(config, {name: stored[name] for name in left}))
    network = _open(config)
    facts = _facts(network, config, left)
    values = {name: facts[name] for name in facts if name in left}
    values |= {f"model.{name}": facts[f"model.{name}"] for name in _MODEL_FIELDS}
    shown = [f"{name} = {x!r}" for name, x in values.items() if x != before[name]]
    lines = [f"from {config.checkpoint.init_from}: {', '.join(shown)}"]
    # The flags that a line names are those of commands that open a network.
    assumed = [re.sub(r" \(--[^)]*\)", "", line) for line in network.assumed]
    lines += [f"assumed of it: {line}" for line in assumed]
    classes = network.class_names if network.model.num_classes else _HEADLESS
    return Start(_replaced(config, values), tuple(lines), classes, network.named)


def _is_left(name: str, value: Any) -> bool:
    if name not in _LEFT:
        return False
    if isinstance(value, list):  # as JSON has it
        value = tuple(value)
    return type(value) is type(_LEFT[name]) and bool(value == _LEFT[name])  # False is not 0


def _replaced(config: Config, values: dict[str, Any]) -> Config:
    """A copy with other values, by the fields' dotted names."""
    copy = from_json(to_json(config))
    for name, value in values.items():
        section, _, field = name.partition(".")
        setattr(getattr(copy, section), field, value)
    return copy


def _open(config: Config) -> Network:
    """Opens the network that checkpoint.init_from names."""
    source, name = config.checkpoint.init_from, config.model.name
    try:
        return open_network(Path(source).expanduser() if _is_path(source) else source, model=name)
    except (WeightsError, ModelError, ConfigError) as error:
        reason = str(error).replace("--model=", "model.name = ")
        raise ConfigError(f"checkpoint.init_from = {source!r}: {one_line(reason)}") from error


def _facts(network: Network, config: Config, left: Sequence[str]) -> dict[str, Any]:
    """What the weights say, by the fields' dotted names."""
    before = network.preprocessing
    size, eval_size = before.image_size, 0
    if network.config is not None:  # a run may be evaluated at another size
        size, eval_size = network.config.data.image_size, network.config.data.eval_size
    if "data.image_size" not in left:
        size, eval_size = config.data.image_size, 0
    evaluated = (eval_size if "data.eval_size" in left else config.data.eval_size) or size
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
    """How the network differs from the registered one of its name, as a configuration says it."""
    if network.config is not None:
        return {f"model.{name}": getattr(network.config.model, name) for name in _MODEL_FIELDS}
    registered = create_model(network.name)
    found = {f"model.{name}": getattr(config.model, name) for name in _MODEL_FIELDS}
    for field in dataclasses.fields(registered):
        value = getattr(network.model, field.name)
        if field.name in _FREE_FIELDS or value == getattr(registered, field.name):
            continue
        if field.name not in _MODEL_FIELDS:
            raise ConfigError(
                f"checkpoint.init_from = {config.checkpoint.init_from!r}: its network is a "
                f"{network.name} with another {field.name}, which a configuration cannot say; "
                "train it from Python, from the variables of rj.load_weights"
            )
        found[f"model.{field.name}"] = value
    return found


def _is_path(name: str) -> bool:
    """Whether it names a file or folder rather than a repository on the Hub."""
    path = Path(name)
    return path.expanduser().exists() or name.count("/") != 1 or path.suffix in WEIGHT_SUFFIXES


def _is_hub_folder(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / "checkpoints").is_dir()


def initial_variables(config: Config, model: ResNet, channels: int) -> dict[str, Any] | None:
    """The variables that checkpoint.init_from names.

    Those of a network for grey or color images also start one of other channels, if data.channels
    says how many.

    Args:
      config: The configuration of a run.
      model: Its network.
      channels: Of its images.

    Returns:
      {"params", "batch_stats"}; None where the run starts from random parameters.

    Raises:
      ConfigError: They cannot be read or do not fit, as the message of `load_weights` says.

    Example:
      >>> import resnet_jax as rj
      >>> initial_variables(Config(), rj.ResNet20(), channels=3) is None
      True
    """
    name = config.checkpoint.init_from
    if not name:
        return None
    reset_head = bool(config.checkpoint.reset_head)
    path = Path(name).expanduser() if _is_path(name) else None
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
