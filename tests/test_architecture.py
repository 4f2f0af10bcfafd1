"""The worked examples of docs/architecture.md, applied to a copy of the package."""

import json
import re
import shutil
import sys

import numpy as np
import pytest

from tests.processes import ROOT, run

PAGE = ROOT / "docs" / "architecture.md"
FILES_OFF = ["--config.log.report=false", "--config.log.tensorboard=false"]
# Two commands in one process, as starting one takes most of their time.
LIST = """
from resnet_jax.cli.parser import main
assert main(["models", "resnet5*"]) == 0
raise SystemExit(main(["models", "alexnet"]))
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def copy(tmp_path):
    """A function that runs a command in a copy of the package."""
    shutil.copytree(ROOT / "resnet_jax", tmp_path / "resnet_jax")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "train.py", tmp_path)

    def run_here(*command, **options):
        return run(*command, seconds=300, package=tmp_path, cwd=tmp_path, **options)

    run_here.folder = tmp_path
    return run_here


@pytest.mark.slow  # the tutorial about blocks trains one, too
def test_a_block_in_a_recipe(copy):
    (recipe,) = blocks("python")
    (copy.folder / "my_recipe.py").write_text(recipe)
    (commands,) = [block for block in blocks("bash") if "my_recipe.py" in block]
    for command in commands.splitlines():
        flags = FILES_OFF if "train.py" in command else []
        done = copy(sys.executable, *command.split()[1:], *flags)
        assert done.returncode == 0, done.stderr
        assert "oneconv8" in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git, which applies the examples")
def test_changes_of_the_package(copy):
    for change in blocks("diff"):
        applied = copy("git", "apply", "--unidiff-zero", "-", input=change)
        assert applied.returncode == 0, applied.stderr

    listed = copy(sys.executable, "-c", LIST)
    assert "resnet50" in listed.stdout.split()
    assert listed.returncode == 2, listed.stderr

    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (16, 8, 8, 3), np.uint8)
        arrays[f"{split}_labels"] = np.arange(16) % 2
    np.savez(copy.folder / "data.npz", **arrays)
    fields = {
        "model.name": "resnet8_cifar",
        "data.name": "npz:data.npz",
        "data.image_size": 8,
        "augment.mean": "(0.5,)",
        "augment.std": "(0.25,)",
        "augment.solarize": 0.5,
        "optimizer.name": "lion",
        "optimizer.learning_rate": 1e-3,
        "train.batch_size": 8,
        "train.steps": 2,
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    done = copy(sys.executable, "train.py", "--workdir=run", *flags, *FILES_OFF)
    assert done.returncode == 0, done.stderr
    lines = (copy.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines if '"test"' in line] == [16]
