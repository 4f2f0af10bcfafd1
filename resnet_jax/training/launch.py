"""How the processes of a run find each other: by flags, or by what launched them."""

from __future__ import annotations

import argparse
import os
import re
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from resnet_jax.errors import LOST, ConfigError, one_line
from resnet_jax.training.determinism import use_deterministic_operations
from resnet_jax.training.distributed import service
from resnet_jax.training.watch import end_process, end_when_aborted

FLAGS = """
  --coordinator_address  HOST:PORT of process 0, for a run of several processes
  --num_processes        how many there are
  --process_id           which one this is, from 0
  --distributed          join the processes that JAX finds; by itself on a TPU pod, GKE, Slurm and
                         Open MPI. --no-distributed: this process alone
  --start_timeout        seconds to wait for the other processes to start (default: 300)
  --deterministic        the same bits at every execution on a GPU, more slowly; docs/precision.md
"""


def start(arguments: Sequence[str]) -> list[str]:
    """Joins this process with the others of its run, before JAX looks at any device.

    Without flags it finds out by itself: a TPU pod, GKE, a Slurm step or an Open MPI job of several
    processes is joined; everything else is a run of one process.

    Args:
      arguments: The command's; see `FLAGS`.

    Returns:
      Those that are left.

    Raises:
      ConfigError: A flag cannot be used.

    Example:
      >>> start(["--no-distributed", "--workdir=runs/a"])
      ['--workdir=runs/a']
    """
    flags, rest = _parse(arguments)
    if flags.deterministic:
        use_deterministic_operations()
    explicit = _check(flags)
    if flags.distributed is False or not (explicit or flags.distributed or _several_processes()):
        return rest
    # Its handler of SIGTERM would swallow the signal; ours tells the others by the step.
    jax.config.update("jax_enable_preemption_service", False)
    timer = threading.Timer(flags.start_timeout, _give_up, [flags])
    timer.daemon = True
    timer.start()
    try:
        # JAX's own limit aborts the process without a line that helps, so ours is the shorter.
        address, count, index = explicit or (None, None, None)
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=flags.start_timeout + 60,
            shutdown_timeout_seconds=30,
        )
    except Exception as error:
        what = f"--coordinator_address={address}" if explicit else "--distributed"
        reason = one_line(error)[:300]
        raise ConfigError(f"{what}: the processes cannot be joined ({reason})") from error
    finally:
        timer.cancel()
    end_when_aborted(service().coordinator_address or "")
    return rest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--coordinator_address")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    parser.add_argument("--distributed", action=argparse.BooleanOptionalAction)
    parser.add_argument("--start_timeout", type=int, default=300)
    parser.add_argument("--deterministic", action="store_true")
    return parser.parse_known_args(arguments)


def _check(flags: argparse.Namespace) -> tuple[str, int, int] | tuple[()]:
    """(address, processes, index) where they are given."""
    names = ("coordinator_address", "num_processes", "process_id")
    values = [getattr(flags, name) for name in names]
    if flags.start_timeout < 1:
        raise ConfigError(f"--start_timeout={flags.start_timeout}: must be at least 1 second")
    if all(value is None for value in values):
        return ()
    for name, value in zip(names, values):
        if value is None:
            raise ConfigError(f"--{name} is missing; it goes with {_others(name, names)}")
    address, count, index = values
    if flags.distributed is not None:
        raise ConfigError("--distributed finds the processes by itself; leave it or --process_id")
    port = re.fullmatch(r"(?:[^:\s]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", address)
    if port is None or not 0 < int(port[1]) < 65536:
        raise ConfigError(f"--coordinator_address={address}: must be HOST:PORT of process 0")
    if count < 1:
        raise ConfigError(f"--num_processes={count}: must be at least 1")
    if not 0 <= index < count:
        raise ConfigError(f"--process_id={index}: must be from 0 to {count - 1}")
    return (address, count, index) if count > 1 else ()


def _others(name: str, names: Sequence[str]) -> str:
    return " and ".join(f"--{each}" for each in names if each != name)


def _several_processes() -> bool:
    """Whether a launcher started this process as one of several, told by its environment."""
    if jax.distributed.is_initialized():
        return False  # the caller has done it
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    if any(os.environ.get(name, "1") not in ("", "0", "1") for name in counts):
        return True
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in os.environ:
            return "," in os.environ[name]
    return "," in _pod_workers()


def _pod_workers() -> str:
    """The hosts of the pod slice that this TPU VM belongs to; "" where it is none."""
    has_chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if not has_chips or "TPU_SKIP_MDS_QUERY" in os.environ:
        return ""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:  # Colab and other single machines have no such server, or it does not know of workers
        with urllib.request.urlopen(request, timeout=3) as answer:  # noqa: S310
            return answer.read().decode()
    except (OSError, ValueError):
        return ""


def _give_up(flags: argparse.Namespace) -> None:
    """Ends a process that waited too long; JAX waits where no exception can reach it."""
    others = "another process"
    if flags.num_processes:
        missing = [i for i in range(flags.num_processes) if i != flags.process_id]
        others = f"process {missing[0]}" if len(missing) == 1 else f"one of processes {missing}"
        if flags.process_id:
            others = f"process 0 at {flags.coordinator_address}, or another one,"
    end_process(
        f"{others} did not start within --start_timeout={flags.start_timeout} seconds; start all "
        "processes of the run with the same --coordinator_address and --num_processes",
        LOST,
    )
