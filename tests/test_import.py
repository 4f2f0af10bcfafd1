"""What importing the package loads, and what it exports."""

import subprocess
import sys

import resnet_jax as rj

HEAVY = ["tensorflow", "torch", "tensorflow_datasets", "orbax", "huggingface_hub", "chex"]


def test_import_loads_nothing_heavy():
    code = f"import sys, resnet_jax; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_exports_exist_and_are_documented():
    for name in rj.__all__:
        assert getattr(rj, name).__doc__, name
