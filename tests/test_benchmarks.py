"""The benchmarks for machines that are not at hand still run."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


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
