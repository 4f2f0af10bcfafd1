"""What NVIDIA's driver says of its cards, by its management library (NVML, which nvidia-smi uses).

The library comes with the driver, and asking it takes no memory of a card. It sees all cards of the
machine, also those that CUDA_VISIBLE_DEVICES hides.
"""

from __future__ import annotations

import ctypes
import dataclasses


@dataclasses.dataclass(frozen=True)
class Card:
    """One card.

    Args:
      name: Such as "NVIDIA H100 80GB HBM3".
      memory: Bytes.
      used: Bytes in use, by all processes.
    """

    name: str
    memory: int
    used: int


class _Memory(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))


def cards(library: str = "libnvidia-ml.so.1") -> list[Card]:
    """The cards of this machine.

    Args:
      library: Name of NVML's shared library.

    Returns:
      In the order of the driver; [] where there is no driver, or it does not answer.

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
        found = [_card(nvml, index) for index in range(count.value)]
        return [each for each in found if each is not None]
    finally:
        nvml.nvmlShutdown()


def _card(nvml: ctypes.CDLL, index: int) -> Card | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    name = ctypes.create_string_buffer(96)
    failed = (
        nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
        or nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    )
    if failed:
        return None
    return Card(name.value.decode(errors="replace"), int(memory.total), int(memory.used))
