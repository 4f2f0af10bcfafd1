"""TPU slices to compile for: libtpu compiles for any slice, without a TPU."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from resnet_jax.errors import ConfigError, one_line
from resnet_jax.planning.topology import Slice

# Stops libtpu from querying the metadata server for the TPU of this machine, and from logging.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
# "... required for HLO temporaries (20.00G) exceeds available HBM (15.75G)", or in older versions
# "Used 20.00G of 15.75G hbm".
_SHORTAGE = re.compile(
    r"([\d.]+)([KMGT]?)\)? (?:exceeds available HBM|of) \(?([\d.]+)([KMGT]?)", re.IGNORECASE
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def tpu_devices(topology: Slice) -> Sequence[jax.Device]:
    """The devices of a slice, as `jax.devices()` returns them there.

    Raises ConfigError if libtpu is not installed, is in use, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "libtpu, which compiles for TPUs without one, is not installed: pip install "
            "'jax[tpu]', or this package's extra 'plan'"
        )
    from jax.experimental import topologies

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = _slice_options(topology)
    try:
        return topologies.get_topology_desc(topology.name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(_topology_error(topology, str(error))) from error


def _slice_options(topology: Slice) -> dict[str, Any]:
    """What libtpu has to be told about a slice beside its name."""
    options: dict[str, Any] = {}
    if topology.accelerator.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip form one device
    if topology.hosts == 1:
        # By default a host has 2x2 chips, also where the slice has fewer, or 8 on one host.
        options["chips_per_host_bounds"] = [*topology.shape, 1][:3]
    return options


def _topology_error(topology: Slice, message: str) -> str:
    if "lockfile" in message or "already in use" in message:
        return (
            "libtpu is in use by another process and serves one at a time; try again when that "
            "process has ended. On a machine without a TPU, ALLOW_MULTIPLE_LIBTPU_LOAD=1 lets "
            "several processes plan"
        )
    return f"--topology={topology.name}: libtpu has no such slice ({one_line(message)})"


def memory_shortage(message: str) -> tuple[int, int]:
    """(bytes needed, bytes available) from a RESOURCE_EXHAUSTED error; 0 if it has no figures."""
    found = _SHORTAGE.search(message)
    if not found:
        return 0, 0
    needed, needed_unit, limit, limit_unit = found.groups()
    return round(float(needed) * _UNITS[needed_unit]), round(float(limit) * _UNITS[limit_unit])
