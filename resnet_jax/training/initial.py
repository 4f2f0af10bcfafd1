"""Where a run's parameters come from: chance, a weight file, a workdir, or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.errors import ConfigError, WeightsError
from resnet_jax.models.resnet import ResNet
from resnet_jax.training.config import Config
from resnet_jax.weights.channels import with_channels
from resnet_jax.weights.files import WEIGHT_SUFFIXES, load_weights
from resnet_jax.weights.pretrained import load_pretrained


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
    reset_head = config.checkpoint.reset_head
    try:
        if (
            Path(name).expanduser().exists()
            or name.count("/") != 1
            or Path(name).suffix in WEIGHT_SUFFIXES
        ):
            variables = load_weights(model, Path(name).expanduser(), reset_head=reset_head)
        else:
            _, variables, _ = load_pretrained(
                name, reset_head=reset_head, num_classes=model.num_classes
            )
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
