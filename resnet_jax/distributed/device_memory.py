"""One line instead of a traceback where a device runs out of memory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

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
