"""safetensors: a JSON header, then the tensors' bytes."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from resnet_jax.errors import WeightsError, reason_of
from resnet_jax.weights.formats import MAX_HEADER

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{
        f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}")
        for kind in "IU"
        for size in (1, 2, 4, 8)
    },
    "BOOL": np.dtype(bool),
}


def is_safetensors(data: bytes) -> bool:
    """Whether a file starts with the length of a JSON header that fits into it."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Reads all tensors of a safetensors file."""
    import safetensors

    header = int.from_bytes(data[:8], "little")
    if MAX_HEADER < header <= len(data):
        raise WeightsError(f"its header has {header:,} bytes, more than any weights need")
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"not a valid safetensors file ({reason_of(error)})") from error
    arrays = {}
    for name, tensor in tensors:
        dtype = _DTYPES.get(tensor["dtype"])
        if dtype is None:
            raise WeightsError(
                f"{name} has type {tensor['dtype']}; floating-point weights have 16 bits or more"
            )
        try:
            arrays[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
        except (ValueError, OverflowError) as error:  # beside a 0, any dimension passes the check
            raise WeightsError(f"{name} has no array's shape ({reason_of(error)})") from error
    return arrays


def write_safetensors(arrays: dict[str, np.ndarray]) -> bytes:
    """The file's bytes."""
    import safetensors.numpy

    return safetensors.numpy.save(arrays, metadata={"format": "pt"})
