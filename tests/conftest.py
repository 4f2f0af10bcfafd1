"""One compilation cache and eight CPU devices for all tests."""

import os
import pathlib

# Before jax starts its backend.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax

CACHE = pathlib.Path(__file__).parents[1] / "tmp" / "jax-cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
