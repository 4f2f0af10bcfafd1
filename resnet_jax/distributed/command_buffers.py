"""Command buffers: XLA's name for CUDA graphs, which launch many kernels at once.

Kernels of small networks take less time than their launch. By default XLA leaves convolutions out
of command buffers, so between two convolutions there are only a few kernels to launch together.
"""

from __future__ import annotations

import functools
import os

import jax

_OPTION = "xla_gpu_enable_command_buffer"
# What XLA puts into command buffers by default, and convolutions.
_KINDS = (
    "FUSION",
    "CUBLAS",
    "CUBLASLT",
    "CUDNN",
    "CUSTOM_CALL",
    "DYNAMIC_SLICE_FUSION",
    "CONDITIONAL",
    "CONVOLUTION",
)


def command_buffer_options() -> dict[str, str]:
    """Compiler options for loops of training steps that put convolutions into command buffers.

    They are {} on other platforms than GPUs, with an XLA that does not have them, and where
    XLA_FLAGS already says what command buffers contain. They are also {} in runs of several
    processes, because `data_parallel.parallel_step` takes options in one process only.

    Example:
      >>> command_buffer_options() == {} or jax.default_backend() == "gpu"
      True
    """
    chosen = _OPTION in os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() != "gpu" or jax.process_count() > 1 or chosen:
        return {}
    options = {_OPTION: ",".join(_KINDS), "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
    return options if _xla_takes(tuple(options.items())) else {}


@functools.cache
def _xla_takes(options: tuple[tuple[str, str], ...]) -> bool:
    """Whether XLA has these options and values: it refuses others when it compiles."""
    try:
        jax.jit(lambda: 0).lower().compile(dict(options))
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error) or "is not a valid" in str(error):
            return False
        raise
    return True
