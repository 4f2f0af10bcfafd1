"""Which errors of XLA say that a device is full, by the words that its runtimes use."""

import jax
import pytest

from resnet_jax.distributed.device_memory import explain_out_of_memory
from resnet_jax.errors import ConfigError

FULL = [
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6442450944 bytes.",
    "RESOURCE_EXHAUSTED: Failed to allocate request for 1.00GiB (1073741824B) on device ordinal 0",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 30.16G of 15.48G hbm. Exceeded hbm capacity by 14.68G.",
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 2.00G. That was "
    "not possible. There are 1.50G free.; (0x0x0_HBM0)",
    "RESOURCE_EXHAUSTED: Error loading program: Attempting to reserve 11.21G at the bottom of "
    "memory. That was not possible. There are 8.99G free, 0B reserved, and 8.99G reservable.",
]
BESIDE_POOL = [
    "RESOURCE_EXHAUSTED: Failed to load in-memory CUBIN (compiled for a different GPU?): "
    "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "INTERNAL: Failed to instantiate CUDA graph: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "INTERNAL: NCCL operation ncclCommInitRank failed: Cuda failure 2 'out of memory'",
    "INTERNAL: CUDNN_STATUS_ALLOC_FAILED",
]
OTHERS = [
    "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 270336, available: 232448",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem.",
    "RESOURCE_EXHAUSTED: Received message larger than max (5000000 vs. 4194304)",
    "INTERNAL: Failed to execute a convolution",
]


def explained(text):
    with explain_out_of_memory("a step", "take a smaller batch"):
        raise jax.errors.JaxRuntimeError(f"{text}\n\nLargest buffers:\n\t1. 2.00GiB")


@pytest.mark.parametrize("text", FULL)
def test_a_full_device(text):
    with pytest.raises(ConfigError) as caught:
        explained(text)
    assert str(caught.value).startswith("a step does not fit in the memory of a device (")
    assert str(caught.value).endswith("; take a smaller batch")
    assert "Largest" not in str(caught.value)


@pytest.mark.parametrize("text", BESIDE_POOL)
def test_no_room_beside_the_pool(text):
    """A smaller batch does not help there: the pool stays as large."""
    with pytest.raises(ConfigError, match=r"set XLA_CLIENT_MEM_FRACTION below 0\.75"):
        explained(text)


@pytest.mark.parametrize("text", OTHERS)
def test_other_errors_stay_what_they_are(text):
    with pytest.raises(jax.errors.JaxRuntimeError):
        explained(text)
