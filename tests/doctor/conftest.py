"""Machines that are made of a few files."""

import pytest

from resnet_jax.doctor.machine import Machine
from resnet_jax.doctor.nvml import Card

GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3"


def card(number, used=0.0):
    """A card whose UUID ends with its number, and of which processes use so many GiB."""
    return Card(H100, f"{number:032x}", 80 * GIB, int(used * GIB))


@pytest.fixture
def machine(tmp_path):
    """Makes one of files, by path and text, of what NVML and CUDA list, and of variables."""

    def machine(files=(), cards=0, gpus=(), **environ):
        for path, text in dict(files).items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        made = Machine(tmp_path, environ)
        made.cards = [card(i) for i in range(cards)] if isinstance(cards, int) else cards
        made.gpus = [f"{number:032x}" for number in gpus]
        return made

    return machine
