"""Divides the GPUs of each host among the processes of a run.

JAX gives a process that Slurm or Open MPI has started the GPU with the number of its local rank.
That is one of eight GPUs if one task uses the whole host, and none if the launcher shows each task
only its own GPU, which has number 0 in every task. So the processes exchange the UUIDs of the GPUs
that they see, and processes that see the same GPUs divide them evenly.
"""

from __future__ import annotations

import ctypes
import dataclasses
import socket
from collections.abc import Sequence
from importlib import metadata

import jax

from resnet_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class View:
    """The GPUs that one process sees.

    Args:
      host: Name of the host.
      gpus: UUIDs in CUDA's order: their positions are JAX's local device ids.
      wanted: Local device ids that the user has chosen; None: an even share.
    """

    host: str
    gpus: list[str]
    wanted: list[int] | None = None


def look(wanted: str, optional: bool = False) -> View:
    """The GPUs that this process sees, before JAX starts its backend.

    Args:
      wanted: The user's choice: "all", ids such as "0,1", or "".
      optional: Whether to ignore the choice without any GPUs.
    """
    gpus = visible_gpus()
    ids = None
    if wanted and (gpus or not optional):
        ids = list(range(len(gpus))) if wanted == "all" else [int(x) for x in wanted.split(",")]
    return View(socket.gethostname(), gpus, ids)


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that JAX can use here, in the order of the CUDA driver.

    Only the driver is reliable, because it applies CUDA_VISIBLE_DEVICES, containers and cgroups. It
    counts a MIG slice as a GPU.
    """
    platforms = getattr(jax.config, "jax_platforms", None)
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if not any("cuda" in plugin.name for plugin in metadata.entry_points(group="jax_plugins")):
        return []  # a JAX without CUDA
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver
        return []
    count, device, uuid = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    gpus = []
    for index in range(count.value):
        if cuda.cuDeviceGet(ctypes.byref(device), index):
            return []
        if cuda.cuDeviceGetUuid_v2(ctypes.byref(uuid), device):
            return []
        gpus.append(bytes(uuid).hex())
    return gpus


def use(ids: Sequence[int]) -> None:
    """Restricts JAX's CUDA backend, before it starts, to these local device ids."""
    if ids:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, ids)))


def divide(views: Sequence[View]) -> list[list[int]]:
    """Assigns GPUs to every process of a run, given the views of all processes.

    A process uses the GPUs that the user has chosen for it, or else an even share of those it
    sees: all of them if no other process sees them.

    Returns:
      Local device ids of each process; [] for all if no process sees a GPU.

    Raises:
      ConfigError: The GPUs cannot be divided.

    Example:
      >>> host = ["gpu-a", "gpu-b", "gpu-c", "gpu-d"]
      >>> divide([View("node1", host), View("node1", host)])
      [[0, 1], [2, 3]]
    """
    seers = _seers(views)
    chosen = [_ids(views, seers, process) for process in range(len(views))]
    taken: dict[str, int] = {}
    for process, (view, ids) in enumerate(zip(views, chosen)):
        for each in ids:
            other = taken.setdefault(view.gpus[each], process)
            if other != process:
                raise ConfigError(
                    f"--local_device_ids: processes {other} and {process} on {view.host} both use "
                    f"GPU {each}; give each process its own, or remove the flag"
                )
    empty = [process for process, ids in enumerate(chosen) if not ids]
    if taken and empty:
        raise ConfigError(
            f"process {empty[0]} on {views[empty[0]].host} sees no GPU, and other processes of the "
            "run do; compare `nvidia-smi` and CUDA_VISIBLE_DEVICES there"
        )
    return chosen


def unused(views: Sequence[View], chosen: Sequence[Sequence[int]], process: int) -> str:
    """A message about GPUs that the run leaves idle, in the first process that sees them; else "".

    Args:
      views: The views of all processes.
      chosen: The result of `divide`.
      process: Number of the process that prints the message.
    """
    own = views[process]
    sharers = _sharers(own, _seers(views))
    if not sharers or sharers[0] != process:
        return ""
    used = {views[each].gpus[i] for each in sharers for i in chosen[each]} & set(own.gpus)
    if len(used) == len(own.gpus):
        return ""
    return (
        f"{len(own.gpus)} GPUs are visible on {own.host} and the run uses {len(used)} of them; to "
        "use all, start one process for each GPU or for each host, without --local_device_ids"
    )


def _seers(views: Sequence[View]) -> dict[str, list[int]]:
    """The processes that see each GPU."""
    seers: dict[str, list[int]] = {}
    for process, view in enumerate(views):
        for gpu in view.gpus:
            seers.setdefault(gpu, []).append(process)
    return seers


def _sharers(own: View, seers: dict[str, list[int]]) -> list[int]:
    """The processes that see any of the same GPUs, sorted."""
    return sorted({process for gpu in own.gpus for process in seers[gpu]})


def _ids(views: Sequence[View], seers: dict[str, list[int]], process: int) -> list[int]:
    """The local device ids of one process."""
    own = views[process]
    if own.wanted is not None:
        _check_wanted(own.wanted, own, process)
        return own.wanted
    sharers = _sharers(own, seers)
    for each in sharers:
        if views[each].wanted is not None:
            raise ConfigError(
                f"--local_device_ids is given to process {each} and not to process {process}, "
                f"which sees the same GPUs of {own.host}; give it to both or to neither"
            )
        if set(views[each].gpus) != set(own.gpus):
            raise ConfigError(
                f"processes {process} and {each} on {own.host} see some of the same GPUs but not "
                "all; give each of them --local_device_ids, or a CUDA_VISIBLE_DEVICES of its own"
            )
    if len(sharers) > len(own.gpus):
        raise ConfigError(
            f"{len(sharers)} processes on {own.host} share {len(own.gpus)} GPUs; "
            "start at most one process for each GPU"
        )
    if not sharers:
        return []
    share = len(own.gpus) // len(sharers)
    begin = sharers.index(process) * share
    # In the same order for all: their CUDA_VISIBLE_DEVICES may list the GPUs differently.
    return [own.gpus.index(gpu) for gpu in views[sharers[0]].gpus[begin : begin + share]]


def _check_wanted(wanted: Sequence[int], own: View, process: int) -> None:
    count = len(own.gpus)
    if not wanted or max(wanted) >= count:
        ids = ",".join(map(str, wanted)) or "all"
        seen = f"{count} GPUs, 0 to {count - 1}" if count else "no NVIDIA GPU that JAX can use"
        raise ConfigError(f"--local_device_ids={ids}: process {process} on {own.host} sees {seen}")
