"""Explained errors for devices and hosts that run out of memory."""

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

# XLA's messages about a full device, which come with various status codes.
_FULL = re.compile(
    r"out of memory|OUT_OF_MEMORY|ALLOC_FAILED|exceeds available HBM|allocat\w+ (?:device )?buffer"
    r"|Attempting to (?:allocate|reserve)|Failed to allocate request",
    re.IGNORECASE,
)
# A kernel needs too much memory inside the chip; a smaller batch does not help.
_ON_CHIP = re.compile(r"shared memory|vmem|smem", re.IGNORECASE)
# CUDA's libraries allocate outside the pool that JAX reserves when it starts.
_BESIDE_POOL = re.compile(r"cubin|cuda graph|nccl|cudnn|cublas|CUDA_ERROR_OUT_OF_MEMORY", re.I)
_SMALLER_POOL = (
    "it is needed outside the pool that JAX takes: set XLA_CLIENT_MEM_FRACTION below 0.75, or free "
    "the memory that other processes hold"
)


@contextlib.contextmanager
def explain_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turns XLA's error about a full device in the block into a ConfigError.

    Args:
      what: What does not fit, with its size.
      remedy: How to make it smaller, with the names of fields or flags.

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
    """Refuses a batch that is too large for the memory of this host.

    On a CPU, the system would kill the process without a message. Other devices report it
    themselves, but their batches are in host memory first.

    Args:
      model: The network.
      shape: Shape [N, H, W, C] of this host's part of a batch.
      what: Field or flag of the batch size, with its value.
      training: Whether the outputs of all blocks are kept for the backward pass.

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
        # Numbers in a block's output, by stage; inference holds an input and an output at a time.
        maps = [
            -(-height // stride) * -(-width // stride) * stage_width * model.block_cls.expansion
            for stride, stage_width in zip(model.strides(), model.stage_widths)
        ]
        counts = model.stage_sizes if training else (2,)
        numbers = sum(count * numbers for count, numbers in zip(counts, maps))
        size += numbers * jnp.dtype(model.dtype).itemsize
    check_host_memory(images * size, what, "use a smaller one")


# The current name of the variable, and the deprecated one.
_FRACTION, _OLD_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


def memory_fraction(environ: Mapping[str, str] = os.environ) -> float:
    """The fraction of a GPU's memory that JAX reserves.

    It is XLA_CLIENT_MEM_FRACTION, or XLA_PYTHON_CLIENT_MEM_FRACTION, its deprecated name, or JAX's
    default of 0.75.

    Raises:
      ConfigError: The value is not in (0, 1], or both variables are set, which JAX does not accept.

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
