"""The devices that a plan is for: TPU slices such as v5e:4x4, and hosts of GPUs such as h100:8."""

from __future__ import annotations

import dataclasses
import math
import re

from resnet_jax.distributed.accelerators import ACCELERATORS, Accelerator
from resnet_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind that train together.

    Args:
      name: As the user gave it, such as "v5e:4x4" or "h100:2x8".
      accelerator: What they are.
      chips: TPU chips or GPUs, on all hosts together.
      hosts: Machines that they are in.
    """

    name: str
    accelerator: Accelerator
    chips: int
    hosts: int

    @property
    def devices(self) -> int:
        """JAX devices of all chips."""
        return self.chips * self.accelerator.devices_per_chip

    def all_reduce_seconds(self, size: float) -> float:
        """The least time of an all-reduce of `size` bytes over all chips."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Torus:
    """How TPU chips of one kind are put together.

    Args:
      axes: Axes of the torus that the links make, two links each.
      pod: Chips of the largest slice.
      one_host: Chips of the largest slice on a single host.
      per_host: Chips of a host in larger slices.
    """

    axes: int
    pod: int
    one_host: int = 4
    per_host: int = 4


# The sources are those of the table of accelerators. Hosts of v5e and v6e have 8 chips in slices of
# up to 8 and, as virtual machines, 4 in larger ones.
_TORUS = {
    "v2": _Torus(axes=2, pod=256),
    "v3": _Torus(axes=2, pod=1024),
    "v4": _Torus(axes=3, pod=4096),
    "v5e": _Torus(axes=2, pod=256, one_host=8),
    "v5p": _Torus(axes=3, pod=8960),
    "v6e": _Torus(axes=2, pod=256, one_host=8),
}


@dataclasses.dataclass(frozen=True)
class Slice(Topology):
    """TPU chips in a mesh or torus.

    Args:
      shape: Chips along each axis.
    """

    shape: tuple[int, ...]

    @property
    def links(self) -> float:
        """Bytes/s that a chip with most neighbors can send: an axis of two has one neighbor."""
        used = sum(min(side - 1, 2) for side in self.shape)
        return self.accelerator.links * used / (2 * len(self.shape))

    def all_reduce_seconds(self, size: float) -> float:
        """Every chip sends everything twice, less the share that it keeps."""
        return 2 * size * (self.chips - 1) / self.chips / self.links if self.chips > 1 else 0.0


# Bytes/s from a GPU to other hosts where nothing else is said: NVIDIA's DGX servers have a port of
# 400 Gbit/s for each GPU of H100 and later, of 200 for each A100, of 100 for two V100. Hosts of
# other cards: 100 Gbit/s, whatever the number of cards.
_NETWORK_PER_GPU = {
    **dict.fromkeys(("h100", "h200", "gh200", "b200", "gb200"), 50e9),
    **dict.fromkeys(("a100-40", "a100-80"), 25e9),
    **dict.fromkeys(("v100", "v100-32"), 6.25e9),
}
_NETWORK_PER_HOST = 12.5e9
_MOST_LETTERS = 40
# Images/s of a core, and Gbit/s of a host.
_LEAST_RATE, _MOST_RATE = 0.001, 1e9
# As many as the largest hosts of NVLink (HGX-2, a2-megagpu-16g) and of PCIe have.
_MOST_GPUS = 16
_MOST_HOSTS = 100_000


@dataclasses.dataclass(frozen=True)
class GpuHosts(Topology):
    """Hosts with equal numbers of GPUs.

    Args:
      network: Bytes/s that a host sends to other hosts.
    """

    network: float

    def all_reduce_seconds(self, size: float) -> float:
        """The slower of the links in a host and the network, which work at the same time.

        A host reduces its own gradients first, so each byte crosses the network twice for a host
        and not for a GPU, less the share that the host keeps.
        """
        gpus = self.chips // self.hosts
        inside = 2 * size * (gpus - 1) / gpus / self.accelerator.links
        between = 2 * size * (self.hosts - 1) / self.hosts / self.network
        return max(inside, between)


def parse_topology(name: str, network_gbits: float = 0.0) -> Topology:
    """Reads the name of a topology.

    Args:
      name: For TPUs CHIP:AxB, or CHIP:AxBxC for chips with three axes; for GPUs NAME:GPUS on one
        host, or NAME:HOSTSxGPUS.
      network_gbits: Gbit/s from a host of GPUs to others; 0: that of the usual server.

    Returns:
      A `Slice` or `GpuHosts`.

    Raises:
      ConfigError: An unknown accelerator, or a shape that it does not come in.

    Example:
      >>> tpus, gpus = parse_topology("v5e:4x4"), parse_topology("h100:2x8")
      >>> (tpus.chips, tpus.hosts), (gpus.chips, gpus.hosts)
      ((16, 4), (16, 2))
    """
    kind, _, shape = name.partition(":")
    if len(name) > _MOST_LETTERS:
        raise ConfigError(f"--topology={name[:_MOST_LETTERS]}...: is not the name of any")
    accelerator = ACCELERATORS.get(kind)
    if accelerator is not None and kind in _TORUS:
        return _slice(name, accelerator, shape)
    if accelerator is not None and accelerator.platform == "gpu":
        return _gpu_hosts(name, accelerator, shape, network_gbits)
    gpus = ", ".join(each.name for each in ACCELERATORS.values() if each.platform == "gpu")
    raise ConfigError(
        f"--topology={name}: must begin with a TPU ({', '.join(_TORUS)}), as in v5e:4x4, or with a "
        f"GPU ({gpus}), as in h100:8"
    )


def check_rate(flag: str, rate: float) -> None:
    """Raises ConfigError unless a rate is 0, for the usual one, or one of real hardware."""
    if rate != 0 and not _LEAST_RATE <= rate <= _MOST_RATE:
        raise ConfigError(f"--{flag}={rate}: must be from {_LEAST_RATE} to {_MOST_RATE:,.0f}")


def _slice(name: str, accelerator: Accelerator, shape: str) -> Slice:
    torus, kind = _TORUS[accelerator.name], accelerator.name
    if not re.fullmatch("x".join([r"[1-9]\d*"] * torus.axes), shape):
        form, example = "x".join("ABC"[: torus.axes]), "x".join("221"[: torus.axes])
        raise ConfigError(
            f"--topology={name}: must be {kind}:{form}, chips along each axis, such as "
            f"{kind}:{example}"
        )
    sides = tuple(map(int, shape.split("x")))
    chips = math.prod(sides)
    if chips > torus.pod:
        raise ConfigError(f"--topology={name}: has {chips:,} chips; {kind} pods have {torus.pod:,}")
    hosts = 1 if chips <= torus.one_host else -(-chips // torus.per_host)
    return Slice(name, accelerator, chips, hosts, sides)


def _gpu_hosts(name: str, accelerator: Accelerator, shape: str, network_gbits: float) -> GpuHosts:
    kind = accelerator.name
    if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape):
        raise ConfigError(
            f"--topology={name}: must be {kind}:GPUS for one host or {kind}:HOSTSxGPUS, such as "
            f"{kind}:8 or {kind}:2x8"
        )
    *many, gpus = map(int, shape.split("x"))
    hosts = many[0] if many else 1
    if hosts > _MOST_HOSTS:
        raise ConfigError(f"--topology={name}: has {hosts:,} hosts; at most {_MOST_HOSTS:,}")
    if gpus > _MOST_GPUS:
        raise ConfigError(
            f"--topology={name}: has {gpus} GPUs on a host; at most {_MOST_GPUS}, so for more give "
            f"{kind}:HOSTSxGPUS"
        )
    check_rate("network_gbits", network_gbits)
    usual = _NETWORK_PER_GPU.get(kind, _NETWORK_PER_HOST / gpus) * gpus
    network = network_gbits * 1e9 / 8 or usual
    return GpuHosts(name, accelerator, hosts * gpus, hosts, network)
