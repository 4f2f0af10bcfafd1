"""One line instead of a traceback where a device runs out of memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping

import jax

from resnet_jax.errors import ConfigError, one_line

# XLA reports other shortages by the same status, such as a message that is too long for gRPC.
_SHORTAGE = re.compile(r"RESOURCE_EXHAUSTED: (.*?(?:memory|allocat|hbm).*)", re.I | re.S)


@contextlib.contextmanager
def explain_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turns XLA's error for a full device into one of ours.

    Args:
      what: What did not fit, with its size.
      remedy: What makes it smaller, with the names of fields or flags.

    Raises:
      ConfigError: The compiler or the runtime of a device ran out of its memory in the block.

    Example:
      >>> with explain_out_of_memory("a batch of 64 images", "take a smaller --batch_size"):
      ...     raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: a batch of 64 images does not fit in the memory of a device \
(Out of memory.); take a smaller --batch_size
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = _SHORTAGE.search(str(error))
        if found is None:
            raise
        reason = one_line(found[1].partition("\n")[0])[:200]
        raise ConfigError(
            f"{what} does not fit in the memory of a device ({reason}); {remedy}"
        ) from error


# The current name of the variable, and the deprecated one.
_FRACTION, _OLD_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


def memory_fraction(environ: Mapping[str, str] = os.environ) -> float:
    """The share of a GPU's memory that JAX takes for programs and arrays.

    Args:
      environ: Environment variables.

    Returns:
      XLA_CLIENT_MEM_FRACTION or XLA_PYTHON_CLIENT_MEM_FRACTION, its deprecated name; 0.75, JAX's
      default, if neither is set.

    Raises:
      ConfigError: The value is not a number above 0 and up to 1, or both variables are set, which
        JAX does not accept.

    Example:
      >>> memory_fraction({}), memory_fraction({"XLA_CLIENT_MEM_FRACTION": ".9"})
      (0.75, 0.9)
    """
    found = {name: environ[name] for name in (_FRACTION, _OLD_FRACTION) if environ.get(name)}
    if len(found) == 2:
        raise ConfigError(
            f"{_FRACTION}={found[_FRACTION]} and {_OLD_FRACTION}={found[_OLD_FRACTION]}: JAX "
            "does not start with both; unset the second, which is deprecated"
        )
    for name, text in found.items():
        try:
            fraction = float(text)
        except ValueError:
            fraction = 0.0
        if not 0 < fraction <= 1:
            raise ConfigError(f"{name}={text}: must be more than 0 and at most 1")
        return fraction
    return 0.75
