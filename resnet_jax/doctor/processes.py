"""How this process was launched, and what the other processes of its run have found."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from resnet_jax.doctor.findings import LEVELS, OK, PROBLEM, WARNING, Finding, plural

_PREFIX = "resnet_jax/doctor/"
# Seconds that process 0 waits for what the others have found, and the others for its verdict.
PATIENCE = 60


def launcher(environ: Mapping[str, str], flags: Sequence[str] = ()) -> Finding:
    """What started this process, told by its environment.

    Args:
      environ: Environment variables.
      flags: Of the command.

    Returns:
      In words; a warning where a job of several tasks has not started this process as one of them.
    """
    facts = {name: environ[name] for name in _TELLING if name in environ}
    if any(each.startswith("--coordinator_address") for each in flags):
        return Finding(OK, "flags of this command name the other processes", facts)
    job, tasks = environ.get("SLURM_JOB_ID"), environ.get("SLURM_STEP_NUM_TASKS")
    if job and tasks:
        text = f"Slurm job {job}, task {environ.get('SLURM_PROCID', '?')} of {tasks}"
        nodes = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_JOB_NUM_NODES", "1")
        return Finding(OK, f"{text} on {plural(int(nodes), 'node')}", facts)
    if job and int(environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or 1) > 1:
        text = (
            f"Slurm job {job} has several nodes, but this process was not started by srun and is "
            "alone: put srun before the command"
        )
        return Finding(WARNING, text, facts)
    if job:
        return Finding(OK, f"Slurm job {job}, not by srun; one process", facts)
    if size := environ.get("OMPI_COMM_WORLD_SIZE"):
        text = f"Open MPI, rank {environ.get('OMPI_COMM_WORLD_RANK', '?')} of {size}"
        return Finding(OK, text, facts)
    hosts = environ.get("TPU_WORKER_HOSTNAMES") or environ.get("TPU_PROCESS_ADDRESSES") or ""
    where = "GKE" if "KUBERNETES_SERVICE_HOST" in environ else "TPU VM"
    if slices := environ.get("MEGASCALE_NUM_SLICES"):
        text = f"{where}, slice {environ.get('MEGASCALE_SLICE_ID', '?')} of {slices}"
        return Finding(OK, text, facts)
    if hosts:
        count = len(hosts.split(","))
        text = f"{where}, worker {environ.get('TPU_WORKER_ID', '?')} of {count}"
        return Finding(OK, text, facts)
    return Finding(OK, "no launcher of several processes", facts)


_TELLING = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "TPU_WORKER_HOSTNAMES",
    "TPU_WORKER_ID",
    "MEGASCALE_NUM_SLICES",
    "MEGASCALE_SLICE_ID",
)


class Group:
    """The processes of a run, through the table of texts that JAX's coordination service keeps.

    Args:
      client: Of that service; None for a lone process.
      index: This process.
      count: How many there are.
    """

    def __init__(self, client: Any = None, index: int = 0, count: int = 1) -> None:
        self.index = index
        self.count = count
        self._client = client

    def put(self, key: str, value: Any) -> None:
        """Lets the others see a value of this process."""
        if self._client is not None:
            text = json.dumps(value, default=str)
            self._client.key_value_set(f"{_PREFIX}{key}/{self.index}", text, allow_overwrite=True)

    def gather(self, key: str, count: int = 0, patience: float = PATIENCE) -> dict[int, Any]:
        """What processes have put, by their numbers.

        Args:
          key: What.
          count: How many to wait for; 0: all.
          patience: Seconds to wait.

        Returns:
          Those that came in time.
        """
        if self._client is None:
            return {}
        until = time.monotonic() + patience
        while True:
            pairs = self._client.key_value_dir_get(f"{_PREFIX}{key}/")
            found = {int(name.rpartition("/")[2]): json.loads(text) for name, text in pairs}
            if len(found) >= (count or self.count) or time.monotonic() > until:
                return found
            time.sleep(0.1)


def readiness(group: Group, levels: Mapping[int, str]) -> Finding | None:
    """Whether all processes can compute together; None where they can.

    Args:
      group: The processes.
      levels: What each of them says of its own checks.

    Returns:
      Who cannot, or has not come so far. A collective would wait for it for ever.
    """
    absent = [str(i) for i in range(group.count) if i not in levels]
    broken = [str(i) for i, level in sorted(levels.items()) if level == PROBLEM]
    parts = []
    if broken:
        parts.append(f"process {', '.join(broken)} has a problem")
    if absent:
        parts.append(f"process {', '.join(absent)} has not come so far")
    if not parts:
        return None
    return Finding(PROBLEM, f"they cannot compute together: {'; '.join(parts)}")


def own_report(findings: Sequence[Finding], compared: Mapping[str, str]) -> dict[str, Any]:
    """What this process tells the others.

    Args:
      findings: Of its checks.
      compared: From `environment.compared`; {} where JAX has not started.

    Returns:
      Host, a line about its devices, whatever is not ok, and what has to be equal.
    """
    named = {each.name: each for each in findings}
    devices, rate = named.get("devices"), named.get("matrix product")
    text = devices.text if devices else ""
    if rate is not None and rate.level != "skipped":
        text += f", {rate.text}"
    wrong = [each for each in findings if each.level in (WARNING, PROBLEM)]
    return {
        "host": socket.gethostname(),
        "text": text,
        "wrong": [(each.level, f"{each.name}: {each.text}") for each in wrong],
        "compared": dict(compared),
    }


def hosts(group: Group, reports: Mapping[int, dict[str, Any]]) -> list[Finding]:
    """A line for each process, and one about versions that differ.

    Args:
      group: The processes.
      reports: From `own_report`, by process.

    Returns:
      As process 0 shows them.
    """
    from resnet_jax.training.distributed import first_difference

    found = []
    for index in range(group.count):
        name = f"process {index}"
        report = reports.get(index)
        if report is None:
            text = "it has not reported: see its own output, or whether it was started"
            found.append(Finding(PROBLEM, text, name=name))
            continue
        wrong = report["wrong"] if index else []  # that of process 0 is shown already
        level = max((each[0] for each in wrong), key=LEVELS.index, default=OK)
        words = "; ".join(filter(None, [report["text"], *(each[1] for each in wrong)]))
        found.append(Finding(level, f"{report['host']}: {words}", report, name))
    alike = [reports[i]["compared"] for i in sorted(reports)]
    if len(alike) == group.count and all(alike):
        difference = first_difference(alike)
        text = difference or "all processes have the same versions and settings"
        found.append(Finding(PROBLEM if difference else OK, text, name="agreement"))
    return found
