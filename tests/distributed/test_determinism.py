"""The setting that makes results repeat on a GPU reaches XLA."""

import os
import subprocess
import sys

import jax
import pytest

from resnet_jax.distributed import determinism
from resnet_jax.distributed.launch import start
from resnet_jax.errors import ConfigError

PROGRAM = """
import sys
from resnet_jax.distributed.launch import start
assert start(sys.argv[1:]) == ["--workdir=x"]
import numpy as np
from resnet_jax.distributed.data_parallel import parallel_step, shard
parallel_step(lambda state, batch: (state + 1, {}))(np.float32(0), shard(np.zeros(1)))
"""


def xlas_options(folder, *flags):
    """What XLA was told when it compiled a step, as it writes it down itself."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_dump_to={folder}",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from there would not be compiled
    }
    command = [sys.executable, "-c", PROGRAM, "--no-distributed", "--workdir=x", *flags]
    subprocess.run(command, env=environment, check=True)
    files = [*folder.glob("*.debug_options")]  # one a program
    assert files
    return {line for file in files for line in file.read_text().splitlines()}


def test_the_flag_reaches_xla(tmp_path):
    assert "xla_gpu_deterministic_ops: true" in xlas_options(tmp_path, "--deterministic")


def test_without_the_flag_xla_is_free(tmp_path):
    assert "xla_gpu_deterministic_ops: true" not in xlas_options(tmp_path)


@pytest.fixture
def early(monkeypatch):
    """As in a process whose JAX has no backend yet."""
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "--xla_gpu_deterministic_ops=true"),
        ("--a=1 --b", "--a=1 --b --xla_gpu_deterministic_ops=true"),
        ("--xla_gpu_deterministic_ops --b", "--xla_gpu_deterministic_ops --b"),
        ("--xla_gpu_deterministic_ops=true", "--xla_gpu_deterministic_ops=true"),
    ],
)
@pytest.mark.usefixtures("early")
def test_other_flags_stay(before, after, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    assert start(["--deterministic", "--no-distributed"]) == []
    assert os.environ["XLA_FLAGS"] == after


@pytest.mark.usefixtures("early")
def test_a_contradiction_is_told(monkeypatch):
    flags = "--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=False"
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(ConfigError, match="XLA_FLAGS has --xla_gpu_deterministic_ops=false"):
        determinism.use_deterministic_operations()


def test_too_late_is_told(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    jax.devices()
    with pytest.raises(ConfigError, match="JAX already runs in this process"):
        start(["--deterministic", "--no-distributed"])
