"""GPUs to compile for: JAX's CUDA plugin compiles for a description of a card, without one."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Sequence

import jax

from resnet_jax.distributed.device_memory import memory_fraction
from resnet_jax.errors import ConfigError, one_line
from resnet_jax.planning.topology import Topology

# Autotuning times kernels on a card. Without one, the compiler uses default kernels.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """A streaming multiprocessor (SM) of a compute capability."""

    shared: int  # bytes of shared memory
    block_shared: int  # bytes of it that one block may use
    threads: int  # resident threads
    units: int  # float32 units


# CUDA C++ Programming Guide, "Compute Capabilities".
_ARCHITECTURES = {
    (7, 0): _Architecture(98304, 98304, 2048, 64),
    (7, 5): _Architecture(65536, 65536, 1024, 64),
    (8, 0): _Architecture(167936, 166912, 2048, 64),
    (8, 6): _Architecture(102400, 101376, 1536, 128),
    (8, 9): _Architecture(102400, 101376, 1536, 128),
    (9, 0): _Architecture(233472, 232448, 2048, 128),
    (10, 0): _Architecture(233472, 232448, 2048, 128),
    (12, 0): _Architecture(102400, 101376, 1536, 128),
}


@dataclasses.dataclass(frozen=True)
class _Card:
    """What the compiler needs to know about a card, except memory and bandwidth."""

    capability: tuple[int, int]  # compute capability
    processors: int  # streaming multiprocessors
    l2: float  # MiB of L2 cache
    clock: float  # highest clock in GHz


# Sources: xla/backends/gpu/target_config/specs of openxla/xla, and NVIDIA's architecture white
# papers for cards that are not there.
_V100, _A100 = _Card((7, 0), 80, 6, 1.53), _Card((8, 0), 108, 40, 1.41)
_H100 = _Card((9, 0), 132, 50, 1.98)
_CARDS = {
    **dict.fromkeys(("v100", "v100-32", "v100-pcie", "v100-pcie-32"), _V100),
    "t4": _Card((7, 5), 40, 4, 1.59),
    **dict.fromkeys(("a100-40", "a100-80", "a100-pcie-40", "a100-pcie-80"), _A100),
    "a10": _Card((8, 6), 72, 6, 1.695),
    "a10g": _Card((8, 6), 80, 6, 1.71),
    "l4": _Card((8, 9), 58, 48, 2.04),
    "l40": _Card((8, 9), 142, 96, 2.49),
    "l40s": _Card((8, 9), 142, 96, 2.52),
    **dict.fromkeys(("h100", "h200", "gh200"), _H100),
    "h100-pcie": dataclasses.replace(_H100, processors=114, clock=1.755),
    **dict.fromkeys(("h100-nvl", "h200-nvl"), dataclasses.replace(_H100, clock=1.785)),
    "b200": _Card((10, 0), 148, 126.5, 1.965),
    "gb200": _Card((10, 0), 152, 129.25, 2.062),
    "rtx-3090": _Card((8, 6), 82, 6, 1.695),
    "rtx-4090": _Card((8, 9), 128, 72, 2.52),
    "rtx-5090": _Card((12, 0), 170, 96, 2.407),
    "rtx-a6000": _Card((8, 6), 84, 6, 1.8),
    "rtx-6000-ada": _Card((8, 9), 142, 96, 2.505),
}


def gpu_devices(topology: Topology) -> Sequence[jax.Device]:
    """The devices of hosts with GPUs, as `jax.devices()` returns them there.

    Raises ConfigError if the CUDA plugin is not installed or cannot compile for the card.
    """
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(importlib.util.find_spec(name) for name in plugins):
        raise ConfigError(
            "JAX's CUDA plugin, which compiles for GPUs without one, is not installed: pip install "
            "'jax[cuda12]', or this package's extra 'plan-gpu'"
        )
    from jax.experimental import topologies

    # Stops the plugin from looking for a card when it starts.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    gpus = topology.chips // topology.hosts
    try:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"1x{topology.hosts}x{gpus}",  # NVLink domains, hosts, GPUs
            target_config=target_config(topology),
        ).devices
    except NotImplementedError as error:
        raise ConfigError(
            "JAX's CUDA plugin is installed but did not start; JAX_PLATFORMS=cpu in the "
            f"environment keeps it from looking for a GPU ({one_line(error)})"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology={topology.name}: JAX's CUDA plugin cannot compile for this card "
            f"({one_line(error)})"
        ) from error


def target_config(topology: Topology) -> str:
    """The text of a `stream_executor.GpuTargetConfigProto`, which describes a card to XLA."""
    accelerator, card = topology.accelerator, _CARDS[topology.accelerator.name]
    chip, (major, minor) = _ARCHITECTURES[card.capability], card.capability
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {card.processors}
          fpus_per_core: {chip.units}
          clock_rate_ghz: {card.clock}
          device_memory_size: {accelerator.memory}
          memory_bandwidth: {accelerator.memory_bandwidth:.0f}
          l2_cache_size: {round(card.l2 * 2**20)}
          shared_memory_per_core: {chip.shared}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {chip.block_shared}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: {chip.threads}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "NVIDIA {accelerator.kinds[0]}"
    """


def memory_pool(topology: Topology) -> int:
    """Bytes of a card that JAX uses for programs and arrays: three quarters of it by default."""
    return int(topology.accelerator.memory * memory_fraction())
