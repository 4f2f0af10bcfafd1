"""What a run runs on: versions and devices, noted in its workdir."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
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

    own = {"resnet_jax": __version__, "python": platform.python_version()}
    return {**own, **installed_versions(PACKAGES)}


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of packages.

    Args:
      packages: Their names on PyPI.

    Returns:
      Name to version; those that are not installed are left out.

    Example:
      >>> installed_versions(["jax", "no-such-package"]) == {"jax": jax.__version__}
      True
    """
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def computes_on(devices: Sequence[jax.Device]) -> str:
    """What computes, for people.

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
    """Versions and devices of this process.

    Returns:
      Name to text.

    Example:
      >>> environment()["devices"].startswith(str(jax.device_count()))
      True
    """
    return {
        "devices": computes_on(jax.devices()),
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
