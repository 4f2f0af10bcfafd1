"""Connects the processes of a run, by flags or by the launcher that started them."""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from resnet_jax import upstream
from resnet_jax.distributed import local_gpus
from resnet_jax.distributed.determinism import use_deterministic_operations
from resnet_jax.distributed.heartbeat import end_process, end_when_aborted
from resnet_jax.errors import LOST, ConfigError, library_errors, one_line

FLAGS = """
  --coordinator_address  HOST:PORT of process 0, for a run of several processes
  --num_processes        number of processes of the run
  --process_id           number of this process, from 0
  --local_device_ids     GPUs of the host that this process uses: numbers such as 0,1, or all
                         (default: processes that see the same GPUs divide them evenly)
  --distributed          connect the processes that JAX finds; the default on TPU pods, GKE, Slurm
                         and Open MPI. --no-distributed: run this process alone
  --start_timeout        seconds to wait for the other processes to start (default: 300)
  --deterministic        compute the same bits in every execution on a GPU, which is slower; see
                         docs/precision.md
"""

# Seconds for all requests to the metadata server of a TPU VM, including name resolution.
_METADATA_SECONDS = 3
_GPUS = "resnet_jax/gpus/"  # keys in the coordination service


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process was launched.

    Args:
      rest: Arguments of the command that do not concern processes.
      launcher: What shows that the run has several processes; "" for a run of one process.
      idle: Messages about hosts and GPUs that the run does not use.
    """

    rest: list[str]
    launcher: str = ""
    idle: tuple[str, ...] = ()


def start(arguments: Sequence[str]) -> list[str]:
    """Connects the processes of the run as `join` does, and prints which hosts and GPUs are idle.

    Returns:
      The arguments that do not concern processes.

    Example:
      >>> start(["--no-distributed", "--workdir=runs/a"])
      ['--workdir=runs/a']
    """
    launch = join(arguments)
    for line in launch.idle:
        print(line, file=sys.stderr)
    return launch.rest


def join(arguments: Sequence[str]) -> Launch:
    """Connects this process with the others of its run, before JAX starts its backend.

    Without flags (see `FLAGS`), the processes of a TPU pod, of GKE, of a Slurm step or of an Open
    MPI job are connected, and any other process runs alone. Processes that see the same GPUs divide
    them.

    Raises:
      ConfigError: A flag is invalid, the processes cannot be connected, or their GPUs cannot be
        divided.

    Example:
      >>> join(["--no-distributed"])
      Launch(rest=[], launcher='', idle=())
    """
    flags, rest = _parse(arguments)
    if flags.deterministic:
        use_deterministic_operations()
    explicit = _check(flags)
    alone = flags.distributed is False or (explicit is not None and explicit[1] == 1)
    launcher = ""
    if not alone:
        by_flag = "--coordinator_address" if explicit else "--distributed" * bool(flags.distributed)
        launcher = by_flag or _launcher()
    if launcher:
        ids, line = _join(flags, explicit)
    elif flags.local_device_ids:
        ids, line = _divide([local_gpus.look(flags.local_device_ids)])[0]
    else:
        ids, line = [], ""
    local_gpus.use(ids)
    hosts = "" if alone or launcher else _idle_hosts()
    return Launch(rest, launcher, tuple(filter(None, (line, hosts))))


def _join(
    flags: argparse.Namespace, explicit: tuple[str, int, int] | None
) -> tuple[list[int], str]:
    """Returns local device ids, and a message about idle GPUs or ""."""
    own = _look(flags)
    upstream.keep_sigterm()
    timer = threading.Timer(flags.start_timeout, _give_up, [flags])
    timer.daemon = True
    timer.start()
    try:
        # After its own limit, JAX aborts without a helpful message, so ours is shorter.
        address, count, index = explicit or (None, None, None)
        with library_errors(lambda error: ConfigError(_why_not_joined(error, explicit))):
            jax.distributed.initialize(
                address,
                count,
                index,
                initialization_timeout=flags.start_timeout + 60,
                **upstream.shutdown_timeout(30),
            )
        end_when_aborted(upstream.distributed_state().coordinator_address or "")
        try:
            return _share_gpus(own, flags.start_timeout)
        except ConfigError:
            jax.distributed.shutdown()  # process 0 ends after the others have read the error
            raise
        except jax.errors.JaxRuntimeError as error:  # another process is lost
            raise ConfigError(_why_not_joined(error, explicit)) from error
    finally:
        timer.cancel()


def _why_not_joined(error: Exception, explicit: tuple[str, int, int] | None) -> str:
    reason = one_line(error)[:300]
    if "before any JAX" in reason:
        flag = "--coordinator_address" if explicit else "--distributed"
        return (
            f"{flag}: JAX has already started in this process, as in a notebook after a first "
            "computation, and can no longer be connected. Start the run as a command of its own "
            "(in a notebook: !python -m resnet_jax train ...), or without the flag: one process "
            "uses all devices of its host"
        )
    if explicit:
        return f"--coordinator_address={explicit[0]}: the processes cannot be joined ({reason})"
    if "coordinator_address should be defined" in reason:
        return (
            "--distributed: found no other processes; JAX finds those of a TPU pod with libtpu, of "
            "GKE, Slurm and Open MPI 4. On one host (a notebook, too), leave the flag out: one "
            "process uses all devices. Elsewhere pass --coordinator_address, --num_processes and "
            "--process_id"
        )
    return (
        f"the processes cannot be joined ({reason}); JAX finds them on a TPU pod with libtpu, on "
        "GKE, in Slurm and in Open MPI 4. Elsewhere pass --coordinator_address, --num_processes "
        "and --process_id, or --no-distributed to run this process alone"
    )


def _look(flags: argparse.Namespace) -> local_gpus.View:
    if flags.local_device_ids:
        return local_gpus.look(flags.local_device_ids)
    # JAX also reads this variable, but only when it connects processes.
    return local_gpus.look(os.environ.get("JAX_LOCAL_DEVICE_IDS", ""), optional=True)


def _share_gpus(own: local_gpus.View, timeout: int) -> tuple[list[int], str]:
    """Divides the GPUs of each host among the processes that see them.

    Process ids are those of the coordination service: `jax.process_index()` can differ from them on
    TPUs, and would start the backend.

    Args:
      own: The GPUs that this process sees.
      timeout: Seconds to wait for the other processes.

    Returns:
      Local device ids, and a message to print or "".
    """
    joined = upstream.distributed_state()
    if joined.client is None or joined.num_processes == 1:
        return _divide([own])[0]
    client, limit = joined.client, timeout * 1000
    client.key_value_set(f"{_GPUS}seen/{joined.process_id}", json.dumps(dataclasses.asdict(own)))
    # Process 0 reads all views and the others one line each, so n processes cost 2n requests.
    if joined.process_id == 0:
        seen = [
            client.blocking_key_value_get(f"{_GPUS}seen/{each}", limit)
            for each in range(joined.num_processes)
        ]
        for each, answer in enumerate(_answers([local_gpus.View(**json.loads(x)) for x in seen])):
            client.key_value_set(f"{_GPUS}use/{each}", json.dumps(answer))
    ids, line, problem = json.loads(
        client.blocking_key_value_get(f"{_GPUS}use/{joined.process_id}", limit)
    )
    if problem:
        raise ConfigError(problem)
    return ids, line


def _answers(views: Sequence[local_gpus.View]) -> list[tuple[list[int], str, str]]:
    """Returns (local device ids, message, error) for each process."""
    try:
        return [(ids, line, "") for ids, line in _divide(views)]
    except ConfigError as error:
        return [([], "", str(error))] * len(views)


def _divide(views: Sequence[local_gpus.View]) -> list[tuple[list[int], str]]:
    """Returns (local device ids, message) for each process."""
    chosen = local_gpus.divide(views)
    return [(ids, local_gpus.unused(views, chosen, i)) for i, ids in enumerate(chosen)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--coordinator_address")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    parser.add_argument("--local_device_ids")
    parser.add_argument("--distributed", action=argparse.BooleanOptionalAction)
    parser.add_argument("--start_timeout", type=int, default=300)
    parser.add_argument("--deterministic", action="store_true")
    return parser.parse_known_args(arguments)


def _check(flags: argparse.Namespace) -> tuple[str, int, int] | None:
    """Returns (address, number of processes, process id) if they are given."""
    names = ("coordinator_address", "num_processes", "process_id")
    values = [getattr(flags, name) for name in names]
    if flags.start_timeout < 1:
        raise ConfigError(f"--start_timeout={flags.start_timeout}: must be at least 1 second")
    if flags.local_device_ids is not None:
        _check_ids("--local_device_ids", flags.local_device_ids)
    elif ids := os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        _check_ids("JAX_LOCAL_DEVICE_IDS", ids)
    if all(value is None for value in values):
        return None
    for name, value in zip(names, values):
        if value is None:
            raise ConfigError(f"--{name} is missing; it goes with {_others(name, names)}")
    address, count, index = values
    if flags.distributed is not None:
        raise ConfigError("--distributed finds the processes by itself; remove it or --process_id")
    port = re.fullmatch(r"(?:[^:\s]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", address)
    if port is None or not 0 < int(port[1]) < 65536:
        raise ConfigError(f"--coordinator_address={address}: must be HOST:PORT of process 0")
    if count < 1:
        raise ConfigError(f"--num_processes={count}: must be at least 1")
    if not 0 <= index < count:
        raise ConfigError(f"--process_id={index}: must be from 0 to {count - 1}")
    return address, count, index


def _check_ids(name: str, text: str) -> None:
    ids = text.split(",")
    known = all(re.fullmatch(r"[0-9]{1,4}", each) for each in ids)
    if text != "all" and not (known and len({int(each) for each in ids}) == len(ids)):
        raise ConfigError(f"{name}={text}: must be all, or different GPU numbers such as 0,1")


def _others(name: str, names: Sequence[str]) -> str:
    return " and ".join(f"--{each}" for each in names if each != name)


def _launcher() -> str:
    """Describes the launcher that started this process as one of several; "" without one.

    It looks where JAX's own detection does (`jax._src.clusters`), which then finds the number of
    processes and the address of process 0.
    """
    if jax.distributed.is_initialized():
        return ""  # by the caller
    # In Slurm the step's count: a batch script or shell has the job's, and is alone.
    counts = {
        "SLURM_STEP_NUM_TASKS": "a Slurm step of {} tasks",
        "OMPI_COMM_WORLD_SIZE": "an Open MPI job of {} processes",
        "MEGASCALE_NUM_SLICES": "a run of {} TPU slices",
    }
    for name, words in counts.items():
        if _is_several(count := os.environ.get(name, "")):
            return words.format(count.strip())
    if path := os.environ.get("TPU_PROCESS_ADDRESSES_PATH"):  # JAX reads it since 0.12
        try:
            return _listed("TPU_PROCESS_ADDRESSES_PATH", Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"TPU_PROCESS_ADDRESSES_PATH={path}: {one_line(error)}") from error
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in os.environ:
            return _listed(name, os.environ[name])
    return "the TPU VM's metadata server, several hosts" if _several_tpu_hosts() else ""


def _listed(name: str, hosts: str) -> str:
    return f"{name}, {hosts.count(',') + 1} hosts" if "," in hosts else ""


def _is_several(count: str) -> bool:
    return count.strip() not in ("", "0", "1")


def _idle_hosts() -> str:
    """A message about hosts of a Slurm job that a run outside a step leaves idle, else ""."""
    hosts = os.environ.get("SLURM_JOB_NUM_NODES", "")
    if "SLURM_STEP_NUM_TASKS" in os.environ or not _is_several(hosts):
        return ""
    return (
        f"this job has {hosts} hosts and the run uses one of them; to use all, start it with srun"
    )


def _several_tpu_hosts() -> bool:
    """Whether this TPU VM is one of several hosts, according to its metadata server."""
    has_chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if not has_chips or "TPU_SKIP_MDS_QUERY" in os.environ:  # JAX sets it if it finds no chip
        return False
    answer = [False]
    # A thread, because urllib's timeout covers neither name resolution nor a slow response.
    asking = threading.Thread(target=_ask_metadata, args=[answer], daemon=True)
    asking.start()
    asking.join(_METADATA_SECONDS)
    return answer[0]


def _ask_metadata(answer: list[bool]) -> None:
    """Stores in `answer` whether the slice has several hosts or is one of several slices."""
    until = time.monotonic() + _METADATA_SECONDS
    hosts = _attribute("worker-network-endpoints", until).strip()
    # Host names, or name:id:address of each; a page of another server has spaces or tags.
    if re.fullmatch(r"[^\s,<>]+(,[^\s,<>]+)+", hosts):
        answer[0] = True
        return
    slices = re.search(
        r"^\s*MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", _attribute("tpu-env", until), re.MULTILINE
    )
    answer[0] = slices is not None and _is_several(slices[1])


def _attribute(name: str, until: float) -> str:
    """Returns an attribute of this TPU VM; "" without it or without a metadata server."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # the server is on this host
    while time.monotonic() < until:
        try:
            request = urllib.request.Request(
                f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
                headers={"Metadata-Flavor": "Google"},
            )
            with opener.open(request, timeout=_METADATA_SECONDS) as answer:
                return answer.read(1 << 20).decode()
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return ""
            time.sleep(0.2)  # overloaded
        except (OSError, ValueError, http.client.HTTPException):
            return ""
    return ""


def _give_up(flags: argparse.Namespace) -> None:
    """Ends a process that has waited too long, because no exception can reach JAX's wait."""
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
