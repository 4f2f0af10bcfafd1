"""Topologies to plan for: TPU slices such as v5e:4x4, and hosts of GPUs such as h100:8."""

from __future__ import annotations

import abc
import dataclasses
import math
import re

from resnet_jax.distributed.accelerators import ACCELERATORS, Accelerator
from resnet_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Topology(abc.ABC):
    """Chips of one kind that train together."""

    name: str  # as in --topology: "v5e:4x4" or "h100:2x8"
    accelerator: Accelerator
    chips: int  # TPU chips or GPUs on all hosts
    hosts: int

    @property
    def devices(self) -> int:
        """JAX devices on all hosts."""
        return self.chips * self.accelerator.devices_per_chip

    @abc.abstractmethod
    def all_reduce_seconds(self, size: float) -> float:
        """A lower bound of the time of an all-reduce of `size` bytes over all chips."""


@dataclasses.dataclass(frozen=True)
class _Torus:
    """The network of TPU chips of one kind."""

    axes: int  # of the torus, with two links each
    pod: int  # chips of the largest slice
    one_host: int = 4  # chips of the largest slice on one host
    per_host: int = 4  # chips per host of larger slices


# Sources: as in distributed/accelerators.py. Hosts of v5e and v6e have 8 chips in slices of up to 8
# chips and 4 in larger ones.
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
    """TPU chips in a mesh or torus."""

    shape: tuple[int, ...]  # chips along each axis

    @property
    def links(self) -> float:
        """Bytes/s that a chip can send: to two neighbors on each axis, to one on an axis of two."""
        used = sum(min(side - 1, 2) for side in self.shape)
        return self.accelerator.links * used / (2 * len(self.shape))

    def all_reduce_seconds(self, size: float) -> float:
        """Every chip sends every byte twice, except those of the part that it reduces itself."""
        return 2 * size * (self.chips - 1) / self.chips / self.links if self.chips > 1 else 0.0


# Default bytes/s from a GPU to other hosts: NVIDIA's DGX servers have a port of 400 Gbit/s for each
# GPU since H100, of 200 for each A100, and of 100 for two V100. Hosts of other cards are assumed to
# have 100 Gbit/s, whatever the number of cards.
_NETWORK_PER_GPU = {
    **dict.fromkeys(("h100", "h200", "gh200", "b200", "gb200"), 50e9),
    **dict.fromkeys(("a100-40", "a100-80"), 25e9),
    **dict.fromkeys(("v100", "v100-32"), 6.25e9),
}
_NETWORK_PER_HOST = 12.5e9
_MAX_NAME_LENGTH = 40
# Of --images_per_core (images/s) and --network_gbits (Gbit/s).
_MIN_RATE, _MAX_RATE = 0.001, 1e9
# The largest hosts with NVLink (HGX-2, a2-megagpu-16g) and with PCIe have 16.
_MAX_GPUS = 16
_MAX_HOSTS = 100_000


@dataclasses.dataclass(frozen=True)
class GpuHosts(Topology):
    """Hosts with equal numbers of GPUs."""

    network: float  # bytes/s from a host to other hosts

    def all_reduce_seconds(self, size: float) -> float:
        """The time on the links in a host or on the network, which overlap: the longer of the two.

        A host first reduces the gradients of its own GPUs. Between hosts every host, not every
        GPU, sends every byte twice, except those of the part that it reduces itself.
        """
        gpus = self.chips // self.hosts
        inside = 2 * size * (gpus - 1) / gpus / self.accelerator.links
        between = 2 * size * (self.hosts - 1) / self.hosts / self.network
        return max(inside, between)


def parse_topology(name: str, network_gbits: float = 0.0) -> Topology:
    """Parses CHIP:AxB or CHIP:AxBxC of TPUs, and NAME:GPUS or NAME:HOSTSxGPUS of GPUs.

    `network_gbits` is the rate in Gbit/s from a host of GPUs to others; 0: as in the usual server.
    Raises ConfigError for an unknown accelerator or a shape that it does not come in.

    Example:
      >>> tpus, gpus = parse_topology("v5e:4x4"), parse_topology("h100:2x8")
      >>> (tpus.chips, tpus.hosts), (gpus.chips, gpus.hosts)
      ((16, 4), (16, 2))
    """
    kind, _, shape = name.partition(":")
    if len(name) > _MAX_NAME_LENGTH:
        raise ConfigError(f"--topology={name[:_MAX_NAME_LENGTH]}...: is not a topology")
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
    """Raises ConfigError unless a rate is 0, which means the default, or plausible."""
    if rate != 0 and not _MIN_RATE <= rate <= _MAX_RATE:
        raise ConfigError(f"--{flag}={rate}: must be from {_MIN_RATE} to {_MAX_RATE:,.0f}")


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
    sizes = [int(size) for size in shape.split("x")]
    hosts, gpus = sizes if len(sizes) == 2 else (1, *sizes)
    if hosts > _MAX_HOSTS:
        raise ConfigError(f"--topology={name}: has {hosts:,} hosts; at most {_MAX_HOSTS:,}")
    if gpus > _MAX_GPUS:
        raise ConfigError(
            f"--topology={name}: has {gpus} GPUs on a host; at most {_MAX_GPUS}, so for more give "
            f"{kind}:HOSTSxGPUS"
        )
    check_rate("network_gbits", network_gbits)
    usual = _NETWORK_PER_GPU.get(kind, _NETWORK_PER_HOST / gpus) * gpus
    network = network_gbits * 1e9 / 8 or usual
    return GpuHosts(name, accelerator, hosts * gpus, hosts, network)
