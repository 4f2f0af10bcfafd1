"""What a run computes with: versions, devices, and settings that change results.

All of it is written to environment.json. What can change a result is also compared between the
processes of a run before the first step (`compared`).
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
from resnet_jax.packages import declared, installed_versions
from resnet_jax.workdirs.workdir import write_whole

# Whose versions can change a result on any platform.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
# The packages that JAX's own metadata lists for accelerators, with theirs in turn.
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
# Environment variables that change them: flags of the compiler, and the switch for TF32.
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_SWITCHES = ("NVIDIA_TF32_OVERRIDE",)
# Flags that say where files lie, who the neighbors are, how long to wait or how many devices to
# make of a CPU. The number of devices is compared in its own words.
_HARMLESS = re.compile(r"--\w*(?:dump|timeout|device_count|cache_dir|megascale|profile_file|_path)")
_RECORDED_PREFIXES = ("JAX_", "XLA_", "LIBTPU_", "NCCL_", "CUDA_VISIBLE", "TPU_VISIBLE")


def versions() -> dict[str, str]:
    """The versions of this package and of those that it computes with.

    On an accelerator that includes the package of its runtime (libtpu, or the CUDA plugin) and the
    libraries that come with it, such as cuDNN, cuBLAS and NCCL.

    Returns:
      Name to version; packages that are not installed are left out.

    Example:
      >>> versions()["jax"] == jax.__version__
      True
    """
    from resnet_jax import __version__

    own = {"resnet_jax": __version__, "python": platform.python_version()}
    return {**own, **installed_versions(PACKAGES), **installed_versions(accelerator_packages())}


def accelerator_packages() -> list[str]:
    """The installed packages that let JAX use an accelerator.

    They are read from the metadata of the packages, so none of them is imported.

    Returns:
      Names on PyPI; a plugin comes before the libraries that it needs.
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
    """What the backend that computes says of itself. Starts the backend.

    The libraries in use can differ from the installed packages, for example where LD_LIBRARY_PATH
    names another cuDNN.

    Returns:
      "backend": platform and build; on a GPU also "CUDA in use" and "cuDNN in use".

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
    """Versions of CUDA and cuDNN as JAX's plugin has loaded them; {} where it does not say."""
    found: dict[str, str] = {}
    queries = upstream.cuda_versions()
    names = {"CUDA in use": "cuda_runtime_get_version", "cuDNN in use": "cudnn_get_version"}
    for name, query in names.items():
        # The query is C++ and fails in ways of its own; a missing version is no reason to stop.
        with contextlib.suppress(Exception):
            number = getattr(queries, query)()
            major = 10_000 if "cuDNN" in name else 1_000
            minor = major // 100
            found[name] = f"{number // major}.{number % major // minor}"
            if "cuDNN" in name:
                found[name] += f".{number % minor}"
    return found


def settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings of JAX and its compiler that change results.

    Args:
      environ: Environment variables.

    Returns:
      Name to value. Of compiler flags only those that can change a program, sorted; the last of
      several for one flag counts.

    Example:
      >>> settings({"XLA_FLAGS": "--xla_dump_to=a --xla_gpu_deterministic_ops=true"})["XLA_FLAGS"]
      '--xla_gpu_deterministic_ops=true'
    """
    found = {}
    for name in _OPTIONS:
        if hasattr(jax.config, name):  # options come and go with JAX's versions
            found[name] = str(getattr(jax.config, name))
    for name in _FLAGS:
        flags = {each.partition("=")[0]: each for each in environ.get(name, "").split()}
        kept = sorted(each for flag, each in flags.items() if not _HARMLESS.match(flag))
        if kept:
            found[name] = " ".join(kept)
    found.update({name: environ[name] for name in _SWITCHES if name in environ})
    return found


def compared() -> dict[str, str]:
    """What has to be the same in all processes of a run, apart from its configuration and data.

    The driver is not in it: the kernels come from the libraries, which are, and nodes of one
    cluster are often updated one after the other.

    Returns:
      Name to text.

    Example:
      >>> compared()["jax"] == jax.__version__
      True
    """
    devices = computes_on(jax.local_devices())
    return {**versions(), **runtime(), **settings(), "the devices of a process": devices}


def nvidia_driver(proc: Path = Path("/proc")) -> str:
    """The version of NVIDIA's driver.

    Args:
      proc: The kernel's /proc.

    Returns:
      Such as "570.86.10"; "" where there is none.
    """
    try:
        text = (proc / "driver/nvidia/version").read_text()
    except OSError:
        return ""
    # "Kernel Module  550.54.15" or, of the open one, "Kernel Module for x86_64  570.86.10"
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", text)
    return found[1] if found else ""


def computes_on(devices: Sequence[jax.Device]) -> str:
    """Returns the number of devices and their kind, as messages name them.

    Args:
      devices: One or more, of one kind.

    Returns:
      Their number and kind.

    Example:
      >>> computes_on(jax.devices("cpu")[:1])
      '1 x cpu'
    """
    return f"{len(devices)} x {devices[0].device_kind}"


def environment() -> dict[str, str]:
    """All that this process knows about what it computes with.

    Returns:
      Name to text.

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
    return {**found, **variables()}


def variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables that JAX, XLA and its libraries read.

    Args:
      environ: All environment variables.

    Returns:
      Name to value, sorted, as they are set.

    Example:
      >>> variables({"HOME": "/root", "JAX_PLATFORMS": "cpu"})
      {'JAX_PLATFORMS': 'cpu'}
    """
    names = sorted(each for each in environ if each.startswith(_RECORDED_PREFIXES))
    return {name: environ[name] for name in names}


def write_environment(workdir: Path) -> None:
    """Writes environment.json; that of the last start counts.

    Args:
      workdir: Folder of the run.
    """
    write_whole(workdir / "environment.json", json.dumps(environment(), indent=2) + "\n")
