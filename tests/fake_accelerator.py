"""Devices that behave towards this package as those of a GPU or a TPU do; the CPU computes.

What only an accelerator reaches is code that no test on a CPU runs: the branch of another platform,
a peak that is known, a compiler that reports no cost. In here that code runs.

In a process of its own, as `train.py` on such devices:
    python -m tests.fake_accelerator gpu [--swap] [--slow_report=SECONDS] [--memory=BYTES] FLAGS
"""

import contextlib
import functools
from unittest import mock

import jax
import numpy as np
from jax import lax

# `device_kind` as the runtimes give it.
KINDS = {"gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite"}
MEMORY = {
    "bytes_in_use": 1_000_000,
    "peak_bytes_in_use": 2_000_000,
    "bytes_limit": 16 * 2**30,
    "largest_alloc_size": 500_000,
    "num_allocs": 10,
}


def _platform_dependent(platform, *operands, default=None, **branches):
    """The branch that lowering for the platform would choose."""
    chosen = branches.get("cuda" if platform == "gpu" else platform) or branches.get(platform)
    return (chosen or default)(*operands)


def _device_get(tree, _device_get=jax.device_get):
    """A copy that cannot be written to; a CPU gives views of what may be donated."""

    def copy(x):
        if not isinstance(x, np.ndarray):
            return x
        x = x.copy()
        x.flags.writeable = False
        return x

    return jax.tree.map(copy, _device_get(tree))


@contextlib.contextmanager
def fake_accelerator(platform):
    """Until the end of the block the devices of this process look like accelerators.

    Args:
      platform: "gpu" or "tpu".
    """
    device = type(jax.local_devices()[0])
    kind = property(lambda self: KINDS[platform])
    jax.clear_caches()  # of programs that were traced with the other branches
    with (
        mock.patch.object(jax, "default_backend", lambda: platform),
        mock.patch.object(jax, "device_get", _device_get),
        mock.patch.object(lax, "platform_dependent", functools.partial(_platform_dependent, platform)),
        mock.patch.object(jax.stages.Lowered, "cost_analysis", lambda self: None),
        mock.patch.object(device, "device_kind", kind),
        mock.patch.object(device, "memory_stats", lambda self: MEMORY),
    ):
        yield
    jax.clear_caches()
