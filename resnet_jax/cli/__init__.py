"""The command line: `python -m resnet_jax COMMAND`."""

from resnet_jax.cli.parser import main

__all__ = ["main"]
