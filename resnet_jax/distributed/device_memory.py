"""One line instead of a traceback where a device runs out of memory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import jax

from resnet_jax.errors import ConfigError, one_line

# XLA's words for a full device, whatever the status is that they come under.
_FULL = re.compile(
    r"out of memory|OUT_OF_MEMORY|ALLOC_FAILED|exceeds available HBM|allocat\w+ (?:device )?buffer"
    r"|Attempting to (?:allocate|reserve)|Failed to allocate request",
    re.IGNORECASE,
)
# Of fast memory inside the chip, a kernel needs too much; a smaller batch does not help.
_ON_CHIP = re.compile(r"shared memory|vmem|smem", re.IGNORECASE)
# What CUDA's libraries allocate themselves has to fit beside the pool that JAX takes at its start.
_BESIDE_POOL = re.compile(r"cubin|cuda graph|nccl|cudnn|cublas|CUDA_ERROR_OUT_OF_MEMORY", re.I)
_SMALLER_POOL = (
    "it is needed outside the pool that JAX takes: set XLA_CLIENT_MEM_FRACTION below 0.75, or free "
    "the memory that other processes hold"
)


@contextlib.contextmanager
def explain_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turns XLA's error for a full device into one of ours.

    Args:
      what: What did not fit, with its size.
      remedy: What makes it smaller, with the names of fields or flags.

    Raises:
      ConfigError: A device ran out of memory in the block, by its compiler's or runtime's words.

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
        text = str(error)
        if not _FULL.search(text) or _ON_CHIP.search(text):
            raise
        if _BESIDE_POOL.search(text):
            remedy = _SMALLER_POOL
        reason = one_line(text.partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: "))[:200]
        raise ConfigError(
            f"{what} does not fit in the memory of a device ({reason}); {remedy}"
        ) from error
