"""The benchmarks run, each at its smallest size."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from resnet_jax.models.registry import model_info

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
# Each prints a JSON line at its end; {photos} is a folder of JPEGs.
SMALLEST = {
    "cpu": ["--cases=resnet20-inference-128", "--one=ours", "--seconds=0.1"],
    "decode": ["{photos}", "--rounds=1"],
    "dispatch": ["--batch=16", "--steps=300", "--per_call=25"],
    "folded": ["--model=resnet8_cifar", "--batch=2", "--side=16", "--rounds=1"],
    "input": ["{photos}", "--seconds=0.1", "--rounds=1"],
    "loop": ["--config=configs/digits.py", "--steps=10", "--rounds=1"],
    "predict": ["{photos}", "--network=resnet20", "--images=8", "--batch_size=4", "--rounds=1"],
    "startup": ["--rounds=1", "--model=resnet8_cifar", "--config.log.tensorboard=false"],
}


def run(name, *arguments, timeout=600):
    command = [sys.executable, f"benchmarks/{name}.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_imports():
    """Every benchmark finds what it imports, also those that need a TPU's compiler to run."""
    code = f"import importlib; [importlib.import_module(name) for name in {BENCHMARKS}]"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), "benchmarks"])}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).resize((500, 400)).save(folder / f"{seed}.jpg")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_runs(name, photos):
    arguments = [each.format(photos=photos) for each in SMALLEST[name]]
    assert json.loads(run(name, *arguments)[-1])


@pytest.mark.slow
def test_augment():
    [line] = run("augment", "--batch=2", "--side=16", "--cases=trivial")
    assert line.startswith("trivial: ")


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_cpu():
    arguments = ["--depth=20", "--side=8", "--batches=2", "--modes=inference"]
    arguments += ["--rounds=1", "--seconds=0.1", "--networks=ours,flax"]
    record = json.loads(run("gpu", *arguments)[-1])
    assert record["benchmark"] == "gpu"
    assert record["ours"] > 0
    assert record["flax"] > 0


@pytest.mark.slow
def test_checkpoint():
    arguments = ["--cases=resnet8_cifar-ema", "--batch_sizes=8", "--side=8"]
    record = json.loads(run("checkpoint", *arguments, "--steps=2", "--rounds=1")[-1])
    assert record["benchmark"] == "checkpoint"
    parameters = model_info("resnet8_cifar").parameters
    # Parameters, momentum, average and statistics in float32, and files of Orbax.
    assert 0.9 < record["megabytes"] / (3 * parameters * 4 / 1e6) < 1.5
    assert 0 < record["save"] < record["sealed"]
    assert record["step"] <= record["gap_without"]
    assert min(record["verify"], record["restore"]) > 0
