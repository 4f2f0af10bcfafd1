"""NVIDIA cards, as listed by NVML, the driver's library behind nvidia-smi.

NVML also lists cards that CUDA_VISIBLE_DEVICES hides, and uses no memory of a card.
"""

from __future__ import annotations

import ctypes
import dataclasses

_NO_PERMISSION = 4


@dataclasses.dataclass(frozen=True)
class Card:
    """One NVIDIA card.

    Args:
      name: Such as "NVIDIA H100 80GB HBM3".
      uuid: 32 hexadecimal digits, as in `local_gpus.visible_gpus`; "" if the card does not answer.
      memory: Size in bytes.
      used: Bytes that all processes use.
    """

    name: str
    uuid: str
    memory: int
    used: int


class _Memory(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))


def cards(library: str = "libnvidia-ml.so.1") -> list[Card | None]:
    """The cards in the order of nvidia-smi; None for one that this process may not use.

    CUDA numbers the cards differently, so match them by UUID.

    Example:
      >>> cards("no-such-library")
      []
    """
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return []
    if nvml.nvmlInit_v2():
        return []
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        return [_card(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()


def _card(nvml: ctypes.CDLL, index: int) -> Card | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    name, uuid = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    error = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
    if error == _NO_PERMISSION:  # a card of another job
        return None
    failed = (
        error
        or nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
        or nvml.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(len(uuid)))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    )
    if failed:
        return Card("NVIDIA card that does not answer", "", 0, 0)
    digits = uuid.value.decode(errors="replace").removeprefix("GPU-").replace("-", "").lower()
    return Card(name.value.decode(errors="replace"), digits, memory.total, memory.used)
