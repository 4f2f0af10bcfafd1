"""The network that a configuration describes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from resnet_jax.config.schema import Config, Model
from resnet_jax.errors import ConfigError
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.ops.sharding import AXIS


def make_model(config: Config, classes: int) -> ResNet:
    """Creates the network of a run.

    Args:
      config: The configuration; `model.num_classes` of 0 means `classes`.
      classes: Number of classes in the dataset.

    Raises:
      ConfigError: The images are too small for the network.

    Example:
      >>> make_model(Config(), classes=10).num_classes
      10
    """
    fields = config.model
    model = create_model(
        fields.name,
        num_classes=fields.num_classes or classes,
        dtype=jnp.dtype(fields.dtype),
        axis_name=None if fields.bn_sync == "none" else AXIS,
        bn_group_size=fields.bn_group_size or None,
        **model_overrides(fields),
    )
    smallest = model.strides()[-1]
    for name in ("image_size", "eval_size"):
        side = getattr(config.data, name)
        if 0 < side < smallest:
            raise ConfigError(
                f"data.{name} = {side}: {fields.name} needs at least {smallest} pixels a side"
            )
    return model


def model_overrides(model: Model) -> dict[str, Any]:
    """The fields that `resnet_jax.ResNet` has under the same names, if they are set."""
    overrides = dataclasses.asdict(model)
    for name in ("name", "num_classes", "dtype", "bn_sync", "bn_group_size"):
        del overrides[name]
    if overrides["shortcut"] is None:
        del overrides["shortcut"]
    if overrides["precision"] == "default":  # JAX's own, which may be set for the whole process
        del overrides["precision"]
    return overrides
