"""The benchmarks for machines that are not at hand, and of what it costs to save, still run."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import checkpoint
from resnet_jax.models.registry import model_info

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_cpu():
    command = [sys.executable, "benchmarks/gpu.py", "--depth=20", "--side=8", "--batches=2"]
    command += ["--rounds=1", "--seconds=0.1", "--networks=ours,flax", "--modes=inference"]
    options = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "timeout": 300}
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, **options
    ).stdout
    record = json.loads(output.splitlines()[-1])
    assert record["benchmark"] == "gpu"
    assert record["ours"] > 0
    assert record["flax"] > 0


@pytest.mark.slow
def test_checkpoint_benchmark(monkeypatch, capsys):
    arguments = ["--cases=resnet8_cifar-ema", "--batch_sizes=8", "--side=8"]
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *arguments, "--steps=2", "--rounds=1"])
    checkpoint.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["benchmark"] == "checkpoint"
    parameters = model_info("resnet8_cifar").parameters
    # Parameters, momentum, average and statistics, in float32; and what Orbax needs beside them.
    assert 0.9 < record["megabytes"] / (3 * parameters * 4 / 1e6) < 1.5
    assert 0 < record["save"] < record["sealed"]
    assert record["step"] <= record["gap_without"]
    assert min(record["verify"], record["restore"]) > 0
