"""Explanations of errors from JAX, XLA, libtpu and CUDA, with remedies."""

from __future__ import annotations

import re

from resnet_jax.errors import one_line
from resnet_jax.packages import installed_versions

_LONGEST = 300

# The first match is used, so special patterns precede general ones.
_REASONS = (
    (
        r"TPU is already in use by process with pid (\d+)",
        r"process \1 holds the TPU; end it (in a notebook: restart the runtime)",
    ),
    (
        r"libtpu_lockfile|libtpu\.so (?:is )?already in use",
        "another process holds the TPU, or a crashed one has left its lock: end the process, and "
        "if there is none, remove /tmp/libtpu_lockfile",
    ),
    (
        r"/dev/(?:accel|vfio)\S*[^.;]*(?:not permitted|Permission denied|busy)",
        "the TPU's device files cannot be opened: another process uses the TPU, or this user may "
        "not (in a container, start it with --privileged)",
    ),
    (
        r"No jellyfish device found|no TPU (?:device|chip)s? (?:were )?found",
        "libtpu is installed, but finds no TPU on this machine",
    ),
    (
        r"Failed to open libtpu\.so|libtpu\.so: cannot open",
        "libtpu is missing: pip install 'jax[tpu]'",
    ),
    (
        r"Loaded runtime CuDNN library: ([\d.]*\d)[. ].*?compiled with: ([\d.]*\d)",
        r"cuDNN \1 is loaded, and JAX needs \2 or newer: pip install -U 'jax[cuda12]', and unset "
        "LD_LIBRARY_PATH",
    ),
    (
        r"Outdated (\w+) installation.*?built against: (\d+).*?Installed version: (\d+)",
        r"\1 \3 is loaded, and JAX was built for \2: pip install -U 'jax[cuda12]', and unset "
        "LD_LIBRARY_PATH",
    ),
    (
        r"Unable to load (cu\w+|CUDA)",
        r"\1 cannot be loaded: pip install -U 'jax[cuda12]', and unset LD_LIBRARY_PATH",
    ),
    (
        r"(?i)dnn library initialization failed|could not create cudnn handle",
        "cuDNN does not start: pip install -U 'jax[cuda12]', unset LD_LIBRARY_PATH, and see "
        "whether another process has taken the card's memory",
    ),
    (
        r"(?i)driver version is insufficient|UNSUPPORTED_PTX|SYSTEM_DRIVER_MISMATCH",
        "NVIDIA's driver is too old for JAX's CUDA, or was updated without a restart of the "
        "machine: CUDA 12 needs driver 525 or newer, CUDA 13 needs 580",
    ),
    (
        r"(?i)cuInit\(0\)|CUDA_ERROR_NO_DEVICE|no CUDA-capable device|CUDA_ERROR_UNKNOWN"
        r"|unable to load the CUDA libraries",
        "NVIDIA's driver does not answer: `nvidia-smi` has to work first (in a container, start "
        "it with --gpus=all)",
    ),
    (
        r"no supported devices found for platform CUDA",
        "CUDA finds no card that it can use: see CUDA_VISIBLE_DEVICES, and whether other processes "
        "have taken all of the memory",
    ),
    (
        r"XLA_CLIENT_MEM_FRACTION is specified together",
        "XLA_CLIENT_MEM_FRACTION and XLA_PYTHON_CLIENT_MEM_FRACTION are both set: unset the second",
    ),
    (
        r"Unknown flags? in XLA_FLAGS: (.+?)(?:\s*Perhaps|$)",
        r"XLA does not know \1: remove it from XLA_FLAGS",
    ),
    (
        r"(?i)backend '(\w+)' is not in the list of known backends|Unknown backend:? '?(\w+)",
        r"JAX_PLATFORMS asks for \1\2, which is not installed: unset it, or pip install "
        "'jax[cuda12]' or 'jax[tpu]'",
    ),
    (
        r"JAX distributed service detected fatal errors|GetKeyValue\(\) timed out",
        "another process of the run is lost, or does not answer: see its output",
    ),
    (
        r"(?i)RESOURCE_EXHAUSTED|out of memory|CUDA_ERROR_OUT_OF_MEMORY",
        "the device's memory is full: end the other processes on it, or set "
        "XLA_CLIENT_MEM_FRACTION lower",
    ),
)


def explain(text: object) -> str:
    """Explains an error and its remedy; an unknown error is quoted.

    Example:
      >>> explain("ABORTED: The TPU is already in use by process with pid 7. Not attempting ...")
      'process 7 holds the TPU; end it (in a notebook: restart the runtime)'
    """
    return known_reason(text) or shortened(text)


def known_reason(text: object) -> str:
    """Explains an error and its remedy; "" for an unknown error."""
    line = one_line(text)
    for pattern, words in _REASONS:
        if found := re.search(pattern, line):
            return found.expand(words).strip().replace("jax[cuda12]", f"jax[{cuda_extra()}]")
    return ""


def cuda_extra() -> str:
    """The extra of JAX for the installed CUDA plugin; "cuda12" without one."""
    return "cuda13" if installed_versions(["jax-cuda13-plugin"]) else "cuda12"


def shortened(text: object) -> str:
    """The beginning of an error, in one line."""
    line = one_line(text)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
