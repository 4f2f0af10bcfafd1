"""TPU slices that are not here, by way of libtpu, which compiles for them on any machine."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence

import jax

from resnet_jax.errors import ConfigError, one_line
from resnet_jax.planning.topology import Topology

# Keeps libtpu from asking the machine which TPU it has, and from logging.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
# "... required for HLO temporaries (20.00G) exceeds available HBM (15.75G)", or, of older
# compilers, "Used 20.00G of 15.75G hbm".
_SHORTAGE = re.compile(
    r"([\d.]+)([KMGT]?)\)? (?:exceeds available HBM|of) \(?([\d.]+)([KMGT]?)", re.IGNORECASE
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def tpu_devices(topology: Topology) -> Sequence[jax.Device]:
    """Devices of a slice to compile for.

    Args:
      topology: The slice.

    Returns:
      As `jax.devices()` would give there.

    Raises:
      ConfigError: libtpu is not installed, is in use, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "libtpu is not installed, which compiles for TPUs (no TPU is needed): pip install "
            "'jax[tpu]', or this package's extra 'plan'"
        )
    from jax.experimental import topologies

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Both cores of a v4 chip are one device, which libtpu has to be told.
    options = {"chip_config_name": "megacore"} if topology.accelerator.name == "v4" else {}
    try:
        return topologies.get_topology_desc(topology.name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(_refusal(topology, str(error))) from error


def _refusal(topology: Topology, message: str) -> str:
    if "lockfile" in message or "already in use" in message:
        return (
            "libtpu is in use by another process, and serves one at a time; try again when that "
            "has ended. On a machine without a TPU, ALLOW_MULTIPLE_LIBTPU_LOAD=1 lets several plan"
        )
    return f"--topology={topology.name}: libtpu has no such slice ({one_line(message)})"


def memory_shortage(message: str) -> tuple[int, int]:
    """Reads how much memory is missing from the error of a program that does not fit.

    Args:
      message: Of a RESOURCE_EXHAUSTED error.

    Returns:
      Bytes that are needed and bytes that there are; 0 where the message does not say.

    Example:
      >>> memory_shortage("RESOURCE_EXHAUSTED: ... (20.00G) exceeds available HBM (15.75G)")
      (21474836480, 16911433728)
    """
    found = _SHORTAGE.search(message)
    if not found:
        return 0, 0
    needed, unit, limit, other = found.groups()
    return round(float(needed) * _UNITS[unit]), round(float(limit) * _UNITS[other])
