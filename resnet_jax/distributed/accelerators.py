"""The table of accelerators: peak, memory and links of known TPUs and GPUs."""

from __future__ import annotations

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """The capabilities of one JAX device, by its data sheet.

    Args:
      name: Short name, such as "h100" or "v5e", for `plan --topology`.
      kinds: The values of `device_kind` of such devices.
      flops: Peak of dense matrix products in bfloat16, or in float16 on cards without bfloat16,
        in FLOP/s.
      memory: Device memory in bytes; of GPUs, the total that CUDA reports.
      memory_bandwidth: Bandwidth of that memory in bytes/s.
      links: Bandwidth in bytes/s from a chip to other chips of its slice or host, of all links
        together in one direction: ICI, NVLink through a switch, or PCIe.
      devices_per_chip: JAX devices on a chip. With 2, `flops`, `memory` and `memory_bandwidth` are
        those of half a chip.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: int
    memory_bandwidth: float
    links: float
    devices_per_chip: int = 1

    @property
    def platform(self) -> str:
        """JAX's name of the platform: "tpu" or "gpu"."""
        return "tpu" if self.kinds[0].startswith("TPU") else "gpu"


def _half_chip(
    name: str, kinds: tuple[str, ...], flops: float, memory: int, bandwidth: float, links: float
) -> Accelerator:
    """One of the two devices of a TPU chip, from the data of the chip."""
    return Accelerator(name, kinds, flops / 2, memory // 2, bandwidth / 2, links, 2)


# Sources: cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e and tpu7x ("key specifications"). They
# give links in both directions together; half of that is here. v2, and the links of v2 and v3 (4 of
# 496 and of 656 Gbit/s): Jouppi et al. 2020, "A Domain-Specific Supercomputer for Training Deep
# Neural Networks", table 3. The links of v4 (6 of 50 GB/s): Jouppi et al. 2023, arXiv:2304.01433,
# table 4. Both cores of a v4 or v5p chip are one device. Spellings of device_kind: as in
# jax/_src/pallas/mosaic/tpu_info.py; libtpu says "lite" and "TPU v5" where Cloud says e and p.
_TPUS = (
    _half_chip("v2", ("TPU v2",), 46e12, 16 * _GIB, 700e9, 4 * 62e9),
    _half_chip("v3", ("TPU v3",), 123e12, 32 * _GIB, 900e9, 4 * 82e9),
    Accelerator("v4", ("TPU v4",), 275e12, 32 * _GIB, 1200e9, 6 * 50e9),
    Accelerator("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB, 819e9, 200e9),
    Accelerator("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * _GIB, 2765e9, 600e9),
    Accelerator("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * _GIB, 1638e9, 400e9),
    _half_chip("v7x", ("TPU7x", "TPU v7x"), 2307e12, 192 * _GIB, 7380e9, 600e9),
)

# Sources: NVIDIA's data sheets and architecture white papers. Peaks are dense ("without sparsity"),
# of GeForce and RTX cards with accumulation in float32; V100 and T4 have no bfloat16, so theirs are
# float16. Memory is what CUDA reports, a little less than the data sheet says, as in openxla/xla's
# xla/backends/gpu/target_config/specs for the cards that are there. `links` is NVLink where it
# joins all GPUs of a host; cards that bridges join in pairs have PCIe here.
_PCIE3, _PCIE4, _PCIE5 = 16e9, 32e9, 64e9  # 16 lanes
_GPUS = (
    Accelerator("v100", ("V100-SXM2-16GB",), 125e12, 16_935_682_048, 898e9, 150e9),
    Accelerator(
        "v100-32", ("V100-SXM2-32GB", "V100-SXM3-32GB"), 125e12, 34_080_000_000, 898e9, 150e9
    ),
    Accelerator("v100-pcie", ("V100-PCIE-16GB",), 112e12, 16_935_682_048, 898e9, _PCIE3),
    Accelerator("v100-pcie-32", ("V100-PCIE-32GB",), 112e12, 34_080_000_000, 898e9, _PCIE3),
    Accelerator("t4", ("T4",), 65e12, 15_840_000_000, 320e9, _PCIE3),
    Accelerator("a100-40", ("A100-SXM4-40GB",), 312e12, 42_331_013_120, 1555e9, 300e9),
    Accelerator("a100-80", ("A100-SXM4-80GB",), 312e12, 85_100_068_864, 2039e9, 300e9),
    Accelerator("a100-pcie-40", ("A100-PCIE-40GB",), 312e12, 42_331_013_120, 1555e9, _PCIE4),
    Accelerator(
        "a100-pcie-80", ("A100 80GB PCIe", "A100-PCIE-80GB"), 312e12, 85_100_068_864, 1935e9, _PCIE4
    ),
    Accelerator("a10", ("A10",), 125e12, 23_650_000_000, 600e9, _PCIE4),
    Accelerator("a10g", ("A10G",), 70e12, 23_650_000_000, 600e9, _PCIE4),
    Accelerator("l4", ("L4",), 121e12, 23_650_000_000, 300e9, _PCIE4),
    Accelerator("l40", ("L40",), 181e12, 47_600_000_000, 864e9, _PCIE4),
    Accelerator("l40s", ("L40S",), 362e12, 47_600_000_000, 864e9, _PCIE4),
    Accelerator(
        "h100", ("H100 80GB HBM3", "H100 SXM5 80GB"), 989e12, 84_942_979_072, 3352e9, 450e9
    ),
    Accelerator("h100-pcie", ("H100 PCIe",), 756e12, 84_942_979_072, 2039e9, _PCIE5),
    Accelerator("h100-nvl", ("H100 NVL",), 835e12, 99_960_000_000, 3938e9, _PCIE5),
    Accelerator("h200", ("H200", "H200 141GB HBM3e"), 989e12, 151_397_597_184, 4800e9, 450e9),
    Accelerator("h200-nvl", ("H200 NVL",), 835e12, 151_397_597_184, 4800e9, _PCIE5),
    Accelerator("gh200", ("GH200 480GB",), 989e12, 101_500_000_000, 4000e9, 450e9),
    Accelerator("b200", ("B200",), 2250e12, 191_514_411_008, 7672e9, 900e9),
    Accelerator("gb200", ("GB200",), 2500e12, 197_897_748_480, 7928e9, 900e9),
    Accelerator("rtx-3090", ("GeForce RTX 3090",), 71e12, 25_430_000_000, 936e9, _PCIE4),
    Accelerator("rtx-4090", ("GeForce RTX 4090",), 165.2e12, 25_380_000_000, 1008e9, _PCIE4),
    Accelerator("rtx-5090", ("GeForce RTX 5090",), 209.5e12, 33_670_000_000, 1792e9, _PCIE5),
    Accelerator("rtx-a6000", ("RTX A6000",), 154.8e12, 51_041_271_808, 768e9, _PCIE4),
    Accelerator(
        "rtx-6000-ada", ("RTX 6000 Ada Generation",), 364.2e12, 50_900_000_000, 960e9, _PCIE4
    ),
)

ACCELERATORS = {each.name: each for each in (*_TPUS, *_GPUS)}
_BY_KIND = {kind.lower(): each for each in ACCELERATORS.values() for kind in each.kinds}


def find_accelerator(device_kind: str) -> Accelerator | None:
    """Looks up a `device_kind` of JAX; None if it is not in the table.

    The whole name must match, except for the brand ("NVIDIA", "Tesla"): "RTX 4090 Laptop GPU",
    "H100 PCIe" and "A100-SXM4-40GB MIG 1g.5gb" are other devices than their first words suggest.

    Example:
      >>> find_accelerator("NVIDIA L40S").name, find_accelerator("TPU v5 lite").name
      ('l40s', 'v5e')
      >>> find_accelerator("cpu") is None
      True
    """
    words = device_kind.lower().split()
    while words and words[0] in ("nvidia", "tesla"):
        words.pop(0)
    return _BY_KIND.get(" ".join(words))
