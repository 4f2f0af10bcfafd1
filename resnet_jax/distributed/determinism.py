"""Bitwise reproducible results on a GPU."""

from __future__ import annotations

import os

from resnet_jax import upstream
from resnet_jax.errors import ConfigError

_FLAG = "--xla_gpu_deterministic_ops"


def use_deterministic_operations() -> None:
    """Makes XLA compile programs that compute the same bits in every execution on a GPU.

    Adds `--xla_gpu_deterministic_ops=true` to the environment variable XLA_FLAGS, which XLA reads
    when JAX starts its backend. Other platforms are not affected. docs/precision.md describes its
    scope and cost.

    Raises:
      ConfigError: JAX has already started its backend, or XLA_FLAGS disables the option.

    Example:
      >>> import jax
      >>> _ = jax.devices()
      >>> use_deterministic_operations()
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: --deterministic: JAX already runs in this process; ...
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    values = [each.partition("=")[2].lower() for each in flags if each.partition("=")[0] == _FLAG]
    if values and values[-1] in ("false", "0"):  # XLA uses the last one
        raise ConfigError(f"--deterministic: XLA_FLAGS has {_FLAG}={values[-1]}; remove it there")
    if values:
        return
    if upstream.backends_are_initialized():
        raise ConfigError(
            "--deterministic: JAX already runs in this process; start another one, or set "
            f"XLA_FLAGS={_FLAG}=true before the first computation"
        )
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"{_FLAG}=true"])
