"""One compilation cache, one folder of data sets, and eight CPU devices for all tests."""

import os
import pathlib

TEMPORARY = pathlib.Path(__file__).parents[1] / "tmp"

# Before jax starts its backend, and before TFDS is imported.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    # Eight devices on a busy machine may wait for each other longer than XLA's 40 seconds.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ["TFDS_DATA_DIR"] = str(TEMPORARY / "tfds")

import jax

jax.config.update("jax_compilation_cache_dir", str(TEMPORARY / "jax-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
