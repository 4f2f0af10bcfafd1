"""The process that runs the checks, each in its own thread with a time limit.

It writes a JSON object for each event to standard output, for command.py. A crash, as in the
libraries of an accelerator, ends this process only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from resnet_jax import upstream
from resnet_jax.distributed.heartbeat import Table
from resnet_jax.distributed.launch import Launch, join
from resnet_jax.doctor import devices, speed
from resnet_jax.doctor import machine as here
from resnet_jax.doctor.findings import LIMIT, LONG_LIMIT, PROBLEM, SKIPPED, WARNING, Finding, worst
from resnet_jax.doctor.machine import Machine
from resnet_jax.doctor.processes import PATIENCE, Group, hosts, launched, own_report, readiness
from resnet_jax.doctor.reasons import explain
from resnet_jax.errors import MISTAKE, ConfigError, ResNetJaxError, import_failure, one_line
from resnet_jax.workdirs.environment import compared, environment

# `launch.join` has its own limit, --start_timeout.
_JOIN_LIMIT = 3600

Check = Callable[[], Finding | list[Finding] | None]


class Runner:
    """Runs checks one after the other and reports their findings.

    Args:
      say: Reports an event, a JSON object.
    """

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self.findings: list[Finding] = []
        self.stuck = ""  # a check that has not ended
        self._say = say

    def run(
        self,
        group: str,
        name: str,
        check: Check,
        limit: float = LIMIT,
        failure: str = WARNING,
        alone: bool = False,
        hint: str = "",
    ) -> list[Finding]:
        """Runs a check and returns its findings.

        Args:
          group: Heading of the check.
          name: Name of the check.
          check: Returns findings, or None.
          limit: Time limit in seconds.
          failure: Level if the check raises an error or does not end.
          alone: Whether the check neither uses JAX nor imports, so that it can run after another
            one that has not ended.
          hint: Why it may not end.
        """
        if self.stuck and not alone:
            text = f"not tried, because the check '{self.stuck}' has not ended"
            return [self.add(Finding(SKIPPED, text), group, name)]
        self.announce(group, name, limit)
        begin = time.monotonic()
        done: list[Any] = []
        thread = threading.Thread(target=_do, args=(check, failure, done), daemon=True)
        thread.start()
        thread.join(limit)
        if not done:
            self.stuck = self.stuck if alone else name
            done = [Finding(failure, f"has not ended after {limit:g} seconds{hint}")]
        found = done[0] if isinstance(done[0], list) else [done[0]]
        seconds = time.monotonic() - begin
        return [self.add(each, group, name, seconds) for each in found if each is not None]

    def announce(self, group: str, name: str, limit: float) -> None:
        """Reports the start of a check and its time limit."""
        self._say({"start": name, "group": group, "limit": limit})

    def add(self, finding: Finding, group: str, name: str, seconds: float = 0.0) -> Finding:
        """Reports a finding."""
        finding = dataclasses.replace(
            finding, group=group, name=finding.name or name, seconds=round(seconds, 3)
        )
        self.findings.append(finding)
        self._say({"finding": dataclasses.asdict(finding)})
        return finding


def _do(check: Check, failure: str, done: list[Any]) -> None:
    try:
        done.append(check())
    except BaseException as error:  # the next check runs in any case
        done.append(Finding(failure, _explained(error)))


def _explained(error: BaseException) -> str:
    if isinstance(error, ImportError):
        with contextlib.suppress(ImportError):  # a bug of ours
            return import_failure(error)
    if isinstance(error, ResNetJaxError):
        return str(error)
    return f"failed: {type(error).__name__}: {explain(error)}"


def main(arguments: Sequence[str]) -> int:
    """Runs all checks and returns the exit code; arguments are those of `command.doctor`."""
    say = _events()
    _end_with_parent()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--network", default="")
    options, flags = parser.parse_known_args(arguments)
    runner, machine = Runner(say), Machine()
    launch, group = Launch([]), Group()
    with _captured_log() as log:
        _check_machine(runner, machine)
        if not runner.stuck:  # otherwise an import would wait for it
            runner.announce("Processes", "other processes", _JOIN_LIMIT)
            try:
                launch, group = _join(flags)
            except ResNetJaxError as error:
                say({"mistake": str(error)})
                return MISTAKE
        say({"index": group.index, "count": group.count})
        runner.add(launched(launch, group), "Processes", "launcher")
        started = _check_devices(runner, machine, group, log)
        if not options.quick:
            _check_speed(runner, group, options.network, started)
        facts: dict[str, str] = {}
        if started and not runner.stuck:
            say({"environment": environment()})
            facts = compared()
        level = _conclude(runner, group, facts)
    code = MISTAKE if level == PROBLEM else 0
    say({"end": code})
    return code


def _events() -> Callable[[dict[str, Any]], None]:
    """Reports events on standard output, and redirects what libraries print to standard error."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the parent is gone
            print(json.dumps(event, default=str), file=events, flush=True)

    return say


def _end_with_parent() -> None:
    """Ends this process when its standard input is closed, as when the parent is gone."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _captured_log() -> Iterator[list[str]]:
    """The lines that JAX logs, which explain why it does not use an accelerator."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.exc_info and record.exc_info[1]:
                text += f" {one_line(record.exc_info[1])}"
            lines.append(text)

    handler, logger = Keep(logging.WARNING), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def _check_machine(runner: Runner, machine: Machine) -> None:
    def on(check: Callable[[Machine], Finding | None]) -> Check:
        return functools.partial(check, machine)

    software: dict[str, Check] = {
        "Python": here.python,
        "packages": here.core_packages,
        "training": here.train_extra,
        "extras": here.other_extras,
        "plugin": on(here.accelerator_packages),
    }
    hardware = {
        "accelerator": on(here.accelerators),
        "huge pages": on(here.huge_pages),
        "card memory": on(here.card_memory),
        "CPU cores": on(here.cores),
        "memory": on(here.memory),
        "disk": on(here.disks),
    }
    for name, check in software.items():
        runner.run("Software", name, check, alone=True)
    # It may read thousands of files from a network disk, which later checks also need.
    runner.run("Software", "imports", _import_trainer, LONG_LIMIT, PROBLEM)
    for name, check in hardware.items():
        runner.run("Machine", name, check, alone=True)


def _import_trainer() -> None:
    """Imports everything that training needs: an installed package may lack its requirements."""
    importlib.import_module("resnet_jax.training.loop")


def _join(flags: Sequence[str]) -> tuple[Launch, Group]:
    """Connects to the other processes, as `train` does."""
    launch = join(flags)
    if launch.rest:
        raise ConfigError(f"{launch.rest[0]}: doctor has no such flag; see doctor --help")
    joined = upstream.distributed_state()
    if joined.client is None or joined.num_processes == 1:
        return launch, Group()
    table = Table(joined.client, "resnet_jax/doctor/")
    return launch, Group(table, joined.process_id, joined.num_processes)


def _check_devices(runner: Runner, machine: Machine, group: Group, log: list[str]) -> bool:
    """Starts JAX, and returns whether it has started."""
    start = functools.partial(devices.backend, machine, log)
    hint = "; one of the hosts may be missing or broken" if group.count > 1 else ""
    found = runner.run("Devices", "JAX", start, LONG_LIMIT, PROBLEM, hint=hint)
    if "platform" not in found[0].facts:
        return False
    checks: dict[str, Check] = {
        "devices": devices.devices,
        "float32": functools.partial(devices.precision, machine),
        "preallocation": functools.partial(devices.preallocation, machine),
        "settings": functools.partial(devices.settings, machine),
    }
    for name, check in checks.items():
        runner.run("Devices", name, check)
    return True


def _check_speed(runner: Runner, group: Group, network: str, started: bool) -> None:
    run = functools.partial(runner.run, "Speed")
    run("JPEG decoding", speed.decode_rate)
    if started:
        run("matrix product", functools.partial(_unless_cpu, speed.matrix_product), LONG_LIMIT)
        run("host copy", functools.partial(_unless_cpu, speed.host_copy), LONG_LIMIT)
    if not _all_are_ready(runner, group, started):
        return
    found = run("all-reduce", speed.all_reduce, LONG_LIMIT, PROBLEM)
    if worst(found) == PROBLEM:
        return  # training steps need it
    for name in ("step, 16 bits", "step, float32"):
        half = name != "step, float32"
        run(name, functools.partial(speed.training_step, half, network), LONG_LIMIT, PROBLEM)


def _unless_cpu(check: Callable[[], Finding]) -> Finding | None:
    return None if jax.default_backend() == "cpu" else check()


def _all_are_ready(runner: Runner, group: Group, started: bool) -> bool:
    """Whether all processes can run a step, in which each waits for the others."""
    if group.count == 1:
        return started
    ready = started and not runner.stuck
    group.put("ready", worst(runner.findings) if ready else PROBLEM)
    runner.announce("Speed", "other processes", LONG_LIMIT)
    finding = readiness(group, group.gather("ready", patience=LONG_LIMIT))
    if finding is not None:
        runner.add(finding, "Speed", "training step")
    return finding is None


def _conclude(runner: Runner, group: Group, facts: dict[str, str]) -> str:
    """The worst level in all processes; process 0 also reports the findings of the others."""
    if group.count == 1:
        return worst(runner.findings)
    group.put("report", own_report(runner.findings, facts))
    runner.announce("Processes", "other processes", 3 * LONG_LIMIT)
    if group.index:
        found = group.gather("verdict", count=1, patience=3 * LONG_LIMIT)
        group.put("left", True)
        return found.get(0, PROBLEM)
    # Processes that have computed together end at the same time. JAX ends this process 100 seconds
    # after another one has died, and the findings are lost.
    together = any(each.name == "all-reduce" for each in runner.findings)
    patience = PATIENCE if together else LONG_LIMIT
    for finding in hosts(group, group.gather("report", patience=patience)):
        runner.add(finding, "Processes", finding.name)
    level = worst(runner.findings)
    group.put("verdict", level)
    group.put("left", True)
    group.gather("left", patience=20)  # the table ends with this process
    return level


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # unfinished checks and accelerator libraries would keep it alive
