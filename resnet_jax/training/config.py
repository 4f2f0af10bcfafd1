"""The former name of `resnet_jax.config`, for recipes that import it."""

from resnet_jax.config import *  # noqa: F403
