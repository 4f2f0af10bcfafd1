"""The configuration of a run: typed fields, their checks, and the flags that set them."""

from resnet_jax.config.schema import (
    Augment,
    Checkpoint,
    Config,
    Data,
    Evaluate,
    Log,
    Loss,
    Model,
    Optimizer,
    Schedule,
    Train,
)
from resnet_jax.config.serialization import from_json, to_flat, to_json
from resnet_jax.config.validation import check

__all__ = [
    "Augment",
    "Checkpoint",
    "Config",
    "Data",
    "Evaluate",
    "Log",
    "Loss",
    "Model",
    "Optimizer",
    "Schedule",
    "Train",
    "check",
    "from_json",
    "to_flat",
    "to_json",
]
