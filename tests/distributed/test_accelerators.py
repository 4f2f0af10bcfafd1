"""The table of accelerators against the device names of real machines."""

import pytest

from resnet_jax.distributed.accelerators import ACCELERATORS, find_accelerator

GIB = 2**30


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        *[("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie")],
        *[
            ("NVIDIA H100 NVL", "h100-nvl"),
            ("NVIDIA H200", "h200"),
            ("NVIDIA H200 NVL", "h200-nvl"),
        ],
        *[("NVIDIA B200", "b200"), ("NVIDIA GB200", "gb200"), ("NVIDIA GH200 480GB", "gh200")],
        *[("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100-80")],
        *[("A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-PCIE-40GB", "a100-pcie-40")],
        *[("NVIDIA A100 80GB PCIe", "a100-pcie-80"), ("Tesla V100-SXM2-16GB", "v100")],
        *[("Tesla V100-SXM2-32GB", "v100-32"), ("Tesla V100-PCIE-16GB", "v100-pcie")],
        *[("Tesla V100-PCIE-32GB", "v100-pcie-32"), ("Tesla T4", "t4"), ("NVIDIA L4", "l4")],
        *[("NVIDIA L40S", "l40s"), ("NVIDIA L40", "l40"), ("NVIDIA A10G", "a10g")],
        *[("NVIDIA A10", "a10"), ("NVIDIA RTX A6000", "rtx-a6000")],
        *[("NVIDIA GeForce RTX 3090", "rtx-3090"), ("NVIDIA GeForce RTX 4090", "rtx-4090")],
        *[("NVIDIA GeForce RTX 5090", "rtx-5090")],
        *[("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada")],
        *[("TPU v2", "v2"), ("TPU v3", "v3"), ("TPU v4", "v4"), ("TPU v5 lite", "v5e")],
        *[("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e")],
        *[("TPU v6e", "v6e"), ("TPU7x", "v7x"), ("TPU v7x", "v7x")],
    ],
)
def test_names_of_real_devices(device_kind, name):
    assert find_accelerator(device_kind).name == name


@pytest.mark.parametrize(
    "device_kind",
    [
        # Each begins like a known device and is another one, or a part of it.
        *["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "TPU v4 lite"],
        *["NVIDIA GeForce RTX 3090 Ti", "NVIDIA H20", "NVIDIA A2", "TPU7", "cpu", "", "NVIDIA"],
    ],
)
def test_other_devices_are_unknown(device_kind):
    assert find_accelerator(device_kind) is None


def test_every_name_belongs_to_one_row():
    kinds = [kind.lower() for each in ACCELERATORS.values() for kind in each.kinds]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("device", ACCELERATORS.values(), ids=ACCELERATORS)
def test_figures_are_plausible(device):
    """A slip of a thousand, or of a thousand and twenty-four cubed, shows in the ratios."""
    assert 50 < device.flops / device.memory_bandwidth < 600
    links = device.links / device.devices_per_chip
    assert 2 < device.memory_bandwidth / links < (13 if device.platform == "tpu" else 80)
    assert 8 * GIB <= device.memory <= 192 * GIB


def test_both_devices_of_a_chip_share_it():
    v3 = find_accelerator("TPU v3")
    assert (v3.devices_per_chip, v3.flops, v3.memory) == (2, 61.5e12, 16 * GIB)
