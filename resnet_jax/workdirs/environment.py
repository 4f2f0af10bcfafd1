"""The environment of a run: versions, devices, and settings that change results.

environment.json holds all of it. Before the first step, the processes of a run compare the part
that can change results (`compared`).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from resnet_jax import upstream
from resnet_jax.distributed.command_buffers import command_buffer_options
from resnet_jax.errors import write_errors
from resnet_jax.files import atomic_write
from resnet_jax.packages import declared, installed_versions

# Packages whose versions can change results on any platform.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
# Packages that JAX's metadata lists for accelerators, and their own requirements.
_PLUGIN = re.compile(r"libtpu|jax-(?:cuda|rocm)\d+-(?:plugin|pjrt)|nvidia-[\w-]+")

# JAX options that change the numbers that a program computes.
_OPTIONS = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_numpy_dtype_promotion",
    "jax_allow_f16_reductions",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
)
# Environment variables that do: compiler flags, and the switch for TF32.
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_SWITCHES = ("NVIDIA_TF32_OVERRIDE",)
# Flags for locations of files, neighbors, timeouts and the number of CPU devices. The number of
# devices is compared separately.
_HARMLESS = re.compile(r"--\w*(?:dump|timeout|device_count|cache_dir|megascale|profile_file|_path)")
_RECORDED_PREFIXES = ("JAX_", "XLA_", "LIBTPU_", "NCCL_", "CUDA_VISIBLE", "TPU_VISIBLE")


def versions() -> dict[str, str]:
    """The versions of this package and of the installed packages that it computes with.

    On an accelerator these include its runtime (libtpu or the CUDA plugin) and the libraries that
    come with it, such as cuDNN, cuBLAS and NCCL.

    Example:
      >>> versions()["jax"] == jax.__version__
      True
    """
    from resnet_jax import __version__

    own = {"resnet_jax": __version__, "python": platform.python_version()}
    return {**own, **installed_versions(PACKAGES), **installed_versions(accelerator_packages())}


def accelerator_packages() -> list[str]:
    """PyPI names of the installed packages that let JAX use an accelerator, by their metadata.

    A plugin precedes the libraries that it needs.
    """
    found: dict[str, None] = {}
    waiting = ["jax"]
    while waiting:
        for each in declared(waiting.pop(0)):
            name = each.name
            if name not in found and _PLUGIN.fullmatch(name) and installed_versions([name]):
                found[name] = None
                waiting.append(name)
    return list(found)


def runtime() -> dict[str, str]:
    """The "backend" in use, and on a GPU "CUDA in use" and "cuDNN in use"; starts the backend.

    The libraries in use can differ from the installed packages, for example if LD_LIBRARY_PATH
    names another cuDNN.

    Example:
      >>> runtime()["backend"].startswith(jax.default_backend())
      True
    """
    client = jax.local_devices()[0].client
    words = [jax.default_backend(), *str(getattr(client, "platform_version", "")).splitlines()]
    found = {"backend": ", ".join(dict.fromkeys(words))}  # a CPU's whole build text is "cpu"
    if jax.default_backend() == "gpu":
        found.update(_cuda_libraries())
    return found


def _cuda_libraries() -> dict[str, str]:
    """Versions of CUDA and cuDNN that JAX's plugin has loaded; {} if they are unknown."""
    found: dict[str, str] = {}
    queries = upstream.cuda_versions()
    names = {"CUDA in use": "cuda_runtime_get_version", "cuDNN in use": "cudnn_get_version"}
    for name, query in names.items():
        # The query is C++ and may raise anything; a missing version does not stop a run.
        with contextlib.suppress(Exception):
            number = getattr(queries, query)()
            major = 10_000 if "cuDNN" in name else 1_000
            minor = major // 100
            found[name] = f"{number // major}.{number % major // minor}"
            if "cuDNN" in name:
                found[name] += f".{number % minor}"
    return found


def settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings of JAX and its compiler that can change results.

    Compiler flags are sorted; if a flag is repeated, the last one is used.

    Example:
      >>> settings({"XLA_FLAGS": "--xla_dump_to=a --xla_gpu_deterministic_ops=true"})["XLA_FLAGS"]
      '--xla_gpu_deterministic_ops=true'
    """
    found = {}
    for name in _OPTIONS:
        if hasattr(jax.config, name):  # not every version of JAX has all options
            found[name] = str(getattr(jax.config, name))
    for name in _FLAGS:
        flags = {each.partition("=")[0]: each for each in environ.get(name, "").split()}
        kept = sorted(each for flag, each in flags.items() if not _HARMLESS.match(flag))
        if kept:
            found[name] = " ".join(kept)
    found.update({name: environ[name] for name in _SWITCHES if name in environ})
    return found


def compared() -> dict[str, str]:
    """What must be equal in all processes of a run, besides configuration and data.

    The driver may differ: kernels come from the libraries, which are compared, and the nodes of a
    cluster are often updated one by one.

    Example:
      >>> compared()["jax"] == jax.__version__
      True
    """
    devices = computes_on(jax.local_devices())
    return {**versions(), **runtime(), **settings(), "the devices of a process": devices}


def nvidia_driver(proc: Path = Path("/proc")) -> str:
    """The version of NVIDIA's driver, such as "570.86.10"; "" without one."""
    try:
        text = (proc / "driver/nvidia/version").read_text()
    except OSError:
        return ""
    # "Kernel Module  550.54.15", or "Kernel Module for x86_64  570.86.10" for the open driver
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", text)
    return found[1] if found else ""


def computes_on(devices: Sequence[jax.Device]) -> str:
    """The number and kind of devices, which are all of one kind, for messages.

    Example:
      >>> computes_on(jax.devices("cpu")[:1])
      '1 x cpu'
    """
    return f"{len(devices)} x {devices[0].device_kind}"


def environment() -> dict[str, str]:
    """Everything in environment.json: name -> text.

    Example:
      >>> environment()["devices"].startswith(str(jax.device_count()))
      True
    """
    found = {
        "devices": computes_on(jax.devices()),
        "processes": str(jax.process_count()),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        **compared(),
    }
    if driver := nvidia_driver():
        found["NVIDIA driver"] = driver
    if options := command_buffer_options():
        text = " ".join(f"{name}={value}" for name, value in options.items())
        found["compiler options with steps_per_call > 1"] = text
    return {**found, **variables()}


def variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables that JAX, XLA and their libraries read, sorted.

    Example:
      >>> variables({"HOME": "/root", "JAX_PLATFORMS": "cpu"})
      {'JAX_PLATFORMS': 'cpu'}
    """
    names = sorted(each for each in environ if each.startswith(_RECORDED_PREFIXES))
    return {name: environ[name] for name in names}


def write_environment(workdir: Path) -> None:
    """Writes environment.json, which describes the last start of a run."""
    path = workdir / "environment.json"
    with write_errors(path):
        atomic_write(path, json.dumps(environment(), indent=2) + "\n")
