"""TPU chips and slices: what the vendor says of them, and the names of slices such as v5e:4x4."""

from __future__ import annotations

import dataclasses
import math
import re

from resnet_jax.errors import ConfigError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, and how chips are put together.

    Args:
      kind: What JAX calls its devices.
      flops: Peak of dense bfloat16 matrix products, FLOP/s.
      hbm: Memory in bytes.
      hbm_bandwidth: Bytes/s.
      links: Bytes/s over all links to other chips together, in one direction.
      axes: Axes of the torus that the links make, two links each.
      pod: Chips of the largest slice.
      one_host: Chips of the largest slice on a single host.
      per_host: Chips a host has in larger slices.
      devices: JAX's devices on a chip: with two, each has half of everything.
      libtpu_config: How libtpu is to see the chip; "": as it does by itself.
    """

    kind: str
    flops: float
    hbm: int
    hbm_bandwidth: float
    links: float
    axes: int
    pod: int
    one_host: int = 4
    per_host: int = 4
    devices: int = 1
    libtpu_config: str = ""


# Sources: cloud.google.com/tpu/docs/v3, v4, v5e, v5p-training and v6e ("key specifications" and
# configurations). They give the links in both directions together, which is halved here. v2, and
# the links of v2 and v3 (4 of 496 and of 656 Gbit/s): Jouppi et al. 2020, "A Domain-Specific
# Supercomputer for Training Deep Neural Networks", table 3. The links of v4 (6 of 50 GB/s): Jouppi
# et al. 2023, arXiv:2304.01433, table 4. Hosts of v5e and v6e have 8 chips in slices of up to 8
# and, as virtual machines, 4 in larger ones.
CHIPS = {
    "v2": Chip("TPU v2", 46e12, 16 * _GIB, 700e9, 4 * 62e9, axes=2, pod=256, devices=2),
    "v3": Chip("TPU v3", 123e12, 32 * _GIB, 900e9, 4 * 82e9, axes=2, pod=1024, devices=2),
    # Both cores of a v4 chip are one device ("megacore").
    "v4": Chip(
        kind="TPU v4",
        flops=275e12,
        hbm=32 * _GIB,
        hbm_bandwidth=1200e9,
        links=6 * 50e9,
        axes=3,
        pod=4096,
        libtpu_config="megacore",
    ),
    "v5e": Chip("TPU v5 lite", 197e12, 16 * _GIB, 819e9, 200e9, axes=2, pod=256, one_host=8),
    "v5p": Chip("TPU v5", 459e12, 95 * _GIB, 2765e9, 600e9, axes=3, pod=8960),
    "v6e": Chip("TPU v6 lite", 918e12, 32 * _GIB, 1638e9, 400e9, axes=2, pod=256, one_host=8),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are linked to each other.

    Args:
      name: Such as "v5e:4x4".
      chip: What it is made of.
      shape: Chips along each axis.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Machines that they are in, each with a process of its own."""
        if self.chips <= self.chip.one_host:
            return 1
        return -(-self.chips // self.chip.per_host)

    @property
    def links(self) -> float:
        """Bytes/s that a chip with most neighbours can send: on an axis of two it has but one."""
        used = sum(min(side - 1, 2) for side in self.shape)
        return self.chip.links * used / (2 * self.chip.axes)


def parse_slice(name: str) -> Slice:
    """The slice of a name.

    Args:
      name: CHIP:AxB or, of chips with three axes, CHIP:AxBxC.

    Returns:
      The slice.

    Raises:
      ConfigError: An unknown chip, or a shape that it does not come in.

    Example:
      >>> small = parse_slice("v5e:4x4")
      >>> small.chips, small.hosts
      (16, 4)
    """
    chip_name, _, sides = name.partition(":")
    chip = CHIPS.get(chip_name)
    if chip is None:
        raise ConfigError(
            f"--topology={name}: the chip must be one of {', '.join(CHIPS)}, as in v5e:4x4"
        )
    if not re.fullmatch("x".join([r"[1-9]\d*"] * chip.axes), sides):
        form, example = "x".join("ABC"[: chip.axes]), "x".join("221"[: chip.axes])
        raise ConfigError(
            f"--topology={name}: must be {chip_name}:{form}, chips along each axis, such as "
            f"{chip_name}:{example}"
        )
    found = Slice(name, chip, tuple(map(int, sides.split("x"))))
    if found.chips > chip.pod:
        raise ConfigError(
            f"--topology={name}: has {found.chips:,} chips; {chip_name} pods have {chip.pod:,}"
        )
    return found
