"""One line instead of a traceback where a device runs out of memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp

from resnet_jax.errors import ConfigError, one_line
from resnet_jax.limits import check_host_memory
from resnet_jax.models.resnet import ResNet

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


def check_batch_memory(
    model: ResNet, shape: Sequence[int], what: str, *, training: bool = False
) -> None:
    """Refuses a batch that the memory of this host cannot hold, before any is taken.

    On a CPU nothing else would say so: the process is killed. Other devices say it themselves, but
    their batches lie on the host first.

    Args:
      model: The network.
      shape: Of this host's share of a batch, [N, H, W, C].
      what: The batch's field or flag with its value.
      training: The outputs of all blocks are kept, for the backward pass.

    Raises:
      ConfigError: By far too many images.

    Example:
      >>> from resnet_jax.models.constructors import ResNet50
      >>> shape = (10**9, 224, 224, 3)
      >>> check_batch_memory(ResNet50(), shape, "batch_size")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: batch_size: needs at least ... GB of memory, and there are ...
    """
    images, height, width, channels = shape
    size = height * width * channels  # uint8
    if jax.default_backend() == "cpu":
        # A block's output in each stage; in the first there are two at a time, as it has the input.
        maps = [
            -(-height // stride) * -(-width // stride) * stage_width * model.block_cls.expansion
            for stride, stage_width in zip(model.strides(), model.stage_widths)
        ]
        counts = model.stage_sizes if training else (2,)
        numbers = sum(count * numbers for count, numbers in zip(counts, maps))
        size += numbers * jnp.dtype(model.dtype).itemsize
    check_host_memory(images * size, what, "take a smaller one")


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
