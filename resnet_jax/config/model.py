"""The network that a configuration describes."""

from __future__ import annotations

import jax.numpy as jnp

from resnet_jax.config.schema import Config, registered_overrides
from resnet_jax.errors import ConfigError
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.ops.sharding import AXIS


def make_model(config: Config, classes: int) -> ResNet:
    """The network of a run.

    Args:
      config: Its configuration.
      classes: Of the data set, where the configuration leaves them open.

    Returns:
      The module.

    Raises:
      ConfigError: The images are too small for it.

    Example:
      >>> make_model(Config(), classes=10).num_classes
      10
    """
    fields = config.model
    shares = fields.bn_sync != "none"
    model = create_model(
        fields.name,
        num_classes=fields.num_classes or classes,
        dtype=jnp.dtype(fields.dtype),
        axis_name=AXIS if shares else None,
        bn_group_size=fields.bn_group_size or None,
        **registered_overrides(fields),
    )
    least = model.strides()[-1]
    for name in ("image_size", "eval_size"):
        side = getattr(config.data, name)
        if 0 < side < least:
            raise ConfigError(
                f"data.{name} = {side}: {fields.name} needs at least {least} pixels a side"
            )
    return model
