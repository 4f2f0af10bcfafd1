"""What a run runs on: versions and devices, noted in its workdir."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import jax

from resnet_jax.training.workdir import write_whole

# Whose versions can change a result.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain")


def versions() -> dict[str, str]:
    """The versions of this package and of those that it computes with.

    Returns:
      Name to version; packages that are not installed are left out.

    Example:
      >>> versions()["jax"] == jax.__version__
      True
    """
    from resnet_jax import __version__

    found = {"resnet_jax": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """Versions and devices of this process.

    Returns:
      Name to text.

    Example:
      >>> environment()["devices"].startswith(str(jax.device_count()))
      True
    """
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": str(jax.process_count()),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        **versions(),
    }


def write_environment(workdir: Path) -> None:
    """Writes environment.json; that of the last start counts.

    Args:
      workdir: Folder of the run.
    """
    write_whole(workdir / "environment.json", json.dumps(environment(), indent=2) + "\n")
