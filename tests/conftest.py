"""For all tests: a compilation cache, a folder of data sets, eight CPU devices, a small disk."""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import subprocess

import pytest

TEMPORARY = pathlib.Path(__file__).parents[1] / "tmp"

# Compiling takes most of the tests' time, and what it makes runs a few steps of tiny networks.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # others do not know it, and end
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
# Before jax starts its backend, and before TFDS is imported. XLA_FLAGS from outside counts.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    # Eight devices on a busy machine may wait for each other longer than XLA's 40 seconds.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + FAST_COMPILE,
)
os.environ["TFDS_DATA_DIR"] = str(TEMPORARY / "tfds")

import jax

from tests import tiny

jax.config.update("jax_compilation_cache_dir", str(TEMPORARY / "jax-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs():
    """Forgets compiled programs before the process runs out of memory maps.

    Each holds about nine; at Linux' limit of 65,530 the next compilation is a segmentation fault.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def tiny_model():
    """The name of a registered network that compiles and trains in a third of the others' time."""
    with tiny.registered():
        yield tiny.NAME


@pytest.fixture
def small_disk(tmp_path, request):
    """One of half a megabyte, or of the size that `indirect` gives."""
    folder, size = tmp_path / "disk", getattr(request, "param", "512k")
    folder.mkdir()
    command = [shutil.which("mount"), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if command[0] is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run([shutil.which("umount"), folder], check=True)
