"""The configuration of a run: typed fields, their rules, and the flags that set them."""

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
    check,
    from_json,
    to_json,
)

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
    "to_json",
]
