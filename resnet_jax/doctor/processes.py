"""How this process was launched, and the findings of the other processes of its run."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from resnet_jax.distributed.heartbeat import Table
from resnet_jax.distributed.launch import Launch
from resnet_jax.distributed.process_group import first_difference
from resnet_jax.doctor.findings import OK, PROBLEM, WARNING, Finding, worst

# Seconds that process 0 waits for the findings of the others, and they for its verdict.
PATIENCE = 60


class Group:
    """The processes of a run, which exchange JSON values through a table.

    Args:
      table: Table that all processes share; None for a run of one process.
      index: Number of this process.
      count: Number of processes.
    """

    def __init__(self, table: Table | None = None, index: int = 0, count: int = 1) -> None:
        self.index = index
        self.count = count
        self._table = table

    def put(self, key: str, value: Any) -> None:
        """Publishes a value of this process."""
        if self._table is not None:
            self._table.put(f"{key}/{self.index}", json.dumps(value, default=str))

    def gather(self, key: str, count: int = 0, patience: float = PATIENCE) -> dict[int, Any]:
        """Waits for the values of `count` processes (0: all), at most `patience` seconds."""
        if self._table is None:
            return {}
        until = time.monotonic() + patience
        while True:
            found = self._table.folder(f"{key}/")
            if len(found) >= (count or self.count) or time.monotonic() > until:
                return {index: json.loads(text) for index, text in found.items()}
            time.sleep(0.1)


def launched(launch: Launch, group: Group) -> Finding:
    """The launcher of this process, and a warning if hosts or GPUs of the run are idle."""
    text = "one process"
    if launch.launcher:
        text = f"process {group.index} of {group.count}, found by {launch.launcher}"
    facts = {"launcher": launch.launcher, "idle": launch.idle}
    return Finding(WARNING if launch.idle else OK, "; ".join([text, *launch.idle]), facts)


def readiness(group: Group, levels: Mapping[int, str]) -> Finding | None:
    """Which processes cannot compute; in a collective, the others would wait for them forever."""
    absent = [str(i) for i in range(group.count) if i not in levels]
    broken = [str(i) for i, level in sorted(levels.items()) if level == PROBLEM]
    parts = []
    if broken:
        parts.append(f"process {', '.join(broken)} has a problem")
    if absent:
        parts.append(f"process {', '.join(absent)} has not reported yet")
    if not parts:
        return None
    return Finding(PROBLEM, f"they cannot compute together: {'; '.join(parts)}")


def own_report(findings: Sequence[Finding], compared: Mapping[str, str]) -> dict[str, Any]:
    """The report of this process for the others; `compared` is {} if JAX has not started."""
    named = {each.name: each for each in findings}
    shown = [named[name] for name in ("devices", "matrix product") if name in named]
    return {
        "host": socket.gethostname(),
        "text": ", ".join(each.text for each in shown if each.level != "skipped"),
        "level": worst(findings),
        "wrong": [f"{x.name}: {x.text}" for x in findings if x.level in (WARNING, PROBLEM)],
        "compared": dict(compared),
    }


def hosts(group: Group, reports: Mapping[int, dict[str, Any]]) -> list[Finding]:
    """A finding about each process, and one about different versions, settings and devices."""
    found = []
    for index in range(group.count):
        name = f"process {index}"
        report = reports.get(index)
        if report is None:
            text = "it has not reported: check its own output, and whether it was started"
            found.append(Finding(PROBLEM, text, name=name))
            continue
        own = index == group.index  # its warnings are already shown
        words = "; ".join(filter(None, [report["text"], *(() if own else report["wrong"])]))
        level = OK if own or not report["wrong"] else report["level"]
        found.append(Finding(level, f"{report['host']}: {words}", report, name))
    alike = [reports[i]["compared"] for i in sorted(reports)]
    if len(alike) == group.count and all(alike):
        difference = first_difference(alike)
        text = difference or "all processes have the same versions, settings and devices"
        found.append(Finding(PROBLEM if difference else OK, text, name="agreement"))
    return found
