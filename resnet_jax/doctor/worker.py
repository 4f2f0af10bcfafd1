"""The process that does the checks: each for itself, with a limit in time.

It writes one JSON object a line to its standard output, which command.py reads. A check that
crashes the process, as libraries of an accelerator can, ends this process only.
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
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from resnet_jax.doctor import machine as here
from resnet_jax.doctor.findings import PROBLEM, SKIPPED, WARNING, Finding, worst
from resnet_jax.doctor.machine import Machine
from resnet_jax.doctor.processes import (
    PATIENCE,
    Group,
    hosts,
    launcher,
    own_report,
    readiness,
)
from resnet_jax.doctor.reasons import explain
from resnet_jax.errors import MISTAKE, ResNetJaxError, one_line

# Seconds that a check may take; the start of JAX and compilations may take longer.
LIMIT, LONG_LIMIT = 60, 300
# `launch.start` has a limit of its own, --start_timeout, which may be longer than that.
_JOIN_LIMIT = 3600


class Runner:
    """Does checks one after the other and says what they find.

    Args:
      say: Takes an event, a dictionary that JSON can hold.
    """

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self.findings: list[Finding] = []
        self._say = say
        self._stuck = ""

    def run(
        self,
        group: str,
        name: str,
        check: Callable[[], Finding | list[Finding] | None],
        limit: float = LIMIT,
        failure: str = WARNING,
        alone: bool = False,
        hint: str = "",
    ) -> None:
        """Does a check.

        Args:
          group: The heading it stands under.
          name: What it is about.
          check: Returns what it finds; None where there is nothing to say.
          limit: Seconds that it may take.
          failure: The level where it fails itself or does not end.
          alone: It does not touch JAX, so that neither it nor what follows waits for the other.
          hint: Why it may not end.
        """
        if self._stuck and not alone:
            text = f"not tried, because the check '{self._stuck}' has not ended"
            self.add(Finding(SKIPPED, text), group, name)
            return
        self.announce(group, name, limit)
        begin = time.monotonic()
        done: list[Any] = []
        thread = threading.Thread(target=self._do, args=(check, failure, done), daemon=True)
        thread.start()
        thread.join(limit)
        if not done:
            self._stuck = self._stuck if alone else name
            done = [Finding(failure, f"has not ended after {limit:g} seconds{hint}")]
        found = done[0] if isinstance(done[0], list) else [done[0]]
        for each in found:
            if each is not None:
                self.add(each, group, name, time.monotonic() - begin)

    def _do(self, check: Callable[[], Any], failure: str, done: list[Any]) -> None:
        try:
            done.append(check())
        except ModuleNotFoundError as error:
            done.append(Finding(failure, f"not tried: {error.name} is not installed"))
        except BaseException as error:  # whatever it is, the next check is tried
            done.append(Finding(failure, f"failed: {type(error).__name__}: {explain(error)}"))

    def announce(self, group: str, name: str, limit: float) -> None:
        """Says what is tried from now on, and how long it may take."""
        self._say({"start": name, "group": group, "limit": limit})

    def add(self, finding: Finding, group: str, name: str, seconds: float = 0.0) -> None:
        """Says what was found."""
        finding = dataclasses.replace(
            finding, group=group, name=finding.name or name, seconds=round(seconds, 3)
        )
        self.findings.append(finding)
        self._say({"finding": dataclasses.asdict(finding)})


def main(arguments: Sequence[str]) -> int:
    """Does all checks.

    Args:
      arguments: --quick, --network=NAME, and the flags of `launch.start`.

    Returns:
      The exit code of the command.
    """
    say = _events()
    _end_with_parent()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--network", default="")
    options, flags = parser.parse_known_args(arguments)
    runner, machine = Runner(say), Machine()
    with _captured_log() as log:
        _check_machine(runner, machine, flags)
        runner.announce("Processes", "other processes", _JOIN_LIMIT)
        try:
            group = _join(flags)
        except ResNetJaxError as error:
            say({"mistake": str(error)})
            return MISTAKE
        say({"index": group.index, "count": group.count})
        group.put("host", socket.gethostname())
        started = _check_devices(runner, machine, group, log)
        if not options.quick:
            _check_speed(runner, machine, group, options.network, started)
        compared = _compared(say) if started else {}
        level = _conclude(runner, group, compared)
    code = MISTAKE if level == PROBLEM else 0
    say({"end": code})
    return code


def _events() -> Callable[[dict[str, Any]], None]:
    """Says events on standard output, and sends what libraries print to standard error."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            print(json.dumps(event, default=str), file=events, flush=True)

    return say


def _end_with_parent() -> None:
    """Ends this process when its standard input ends, as it does when the parent is gone."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _captured_log() -> Iterator[list[str]]:
    """What JAX logs: that is where it says why it does not use an accelerator."""
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


def _check_machine(runner: Runner, machine: Machine, flags: Sequence[str]) -> None:
    software: dict[str, Any] = {
        "Python": here.python,
        "packages": here.core_packages,
        "training": here.train_extra,
        "extras": here.other_extras,
        "plugin": here.accelerator_packages,
    }
    hardware: dict[str, Any] = {
        "accelerator": here.accelerators,
        "huge pages": here.huge_pages,
        "card memory": here.card_memory,
        "CPU cores": here.cores,
        "memory": here.memory,
        "shared memory": here.shared_memory,
        "disk": here.disks,
        "compile cache": here.compile_cache,
    }
    for name, check in software.items():
        runner.run("Software", name, functools.partial(check, machine), alone=True)
    imports = functools.partial(importlib.import_module, "resnet_jax.training.loop")
    runner.run("Software", "imports", lambda: _imported(imports), failure=PROBLEM, alone=True)
    for name, check in hardware.items():
        runner.run("Machine", name, functools.partial(check, machine), alone=True)
    environ = machine.environ
    runner.run("Processes", "launcher", lambda: launcher(environ, flags), alone=True)


def _imported(load: Callable[[], Any]) -> Finding | None:
    """Loads all that the trainer needs: a package can be there without what it needs itself."""
    try:
        load()
    except ImportError as error:
        name = error.name or "a package"
        return Finding(PROBLEM, f"{name} cannot be imported: {one_line(error)}")
    return None


def _join(flags: Sequence[str]) -> Group:
    """Joins the other processes, as `train` does.

    Raises:
      ConfigError: A flag is unknown or cannot be used, or the processes cannot be joined.
    """
    from resnet_jax.errors import ConfigError
    from resnet_jax.training.distributed import service
    from resnet_jax.training.launch import start

    rest = start(flags)
    if rest:
        raise ConfigError(f"{rest[0]}: doctor has no such flag; see doctor --help")
    joined = service()
    if joined.client is None or joined.num_processes == 1:
        return Group()
    return Group(joined.client, joined.process_id, joined.num_processes)


def _check_devices(runner: Runner, machine: Machine, group: Group, log: list[str]) -> bool:
    """Starts JAX; returns whether it has started."""
    from resnet_jax.doctor import devices

    start = functools.partial(devices.backend, machine, log)
    hint = "; of several hosts one may be missing or broken" if group.count > 1 else ""
    runner.run("Devices", "JAX", start, LONG_LIMIT, PROBLEM, hint=hint)
    if "platform" not in runner.findings[-1].facts:
        return False
    checks: dict[str, Any] = {
        "devices": devices.devices,
        "unused": functools.partial(_unused, group),
        "float32": devices.precision,
        "float64": devices.x64,
        "preallocation": devices.preallocation,
        "settings": devices.settings,
    }
    for name, check in checks.items():
        runner.run("Devices", name, functools.partial(check, machine))
    return True


def _unused(group: Group, machine: Machine) -> Finding | None:
    """Counts the processes of this machine before it asks which devices nobody uses."""
    from resnet_jax.doctor.devices import unused_devices

    names = [*group.gather("host").values()]
    return unused_devices(machine, max(1, names.count(socket.gethostname())))


def _check_speed(
    runner: Runner, machine: Machine, group: Group, network: str, started: bool
) -> None:
    decoding = functools.partial(_speed, "decode_rate", machine)
    runner.run("Speed", "JPEG decoding", decoding, alone=True)
    if started:
        _check_devices_alone(runner, machine)
    if not _all_are_ready(runner, group, started):
        return
    import jax

    from resnet_jax.doctor.speed import NETWORK, step_types, training_step

    if jax.device_count() > 1:
        count = 1_000_000 if jax.default_backend() == "cpu" else 25_600_000
        reduce = functools.partial(_speed, "all_reduce", machine, count)
        runner.run("Speed", "all-reduce", reduce, LONG_LIMIT, PROBLEM)
        if runner.findings[-1].level == PROBLEM:
            return  # a step is full of them
    for dtype in step_types():
        step = functools.partial(training_step, machine, dtype, network or NETWORK)
        runner.run("Speed", f"step, {dtype}", step, LONG_LIMIT, PROBLEM)


def _check_devices_alone(runner: Runner, machine: Machine) -> None:
    """What no other process is needed for."""
    import jax

    if jax.default_backend() != "cpu":
        for name, check in {"matrix product": "matrix_product", "host copy": "host_copy"}.items():
            runner.run("Speed", name, functools.partial(_speed, check, machine), LONG_LIMIT)


def _all_are_ready(runner: Runner, group: Group, started: bool) -> bool:
    """Whether this process, and of several all of them, can take a step: they wait in it."""
    if group.count == 1:
        return started
    group.put("ready", worst(runner.findings) if started else PROBLEM)
    runner.announce("Speed", "other processes", LONG_LIMIT)
    finding = readiness(group, group.gather("ready", patience=LONG_LIMIT))
    if finding is not None:
        runner.add(finding, "Speed", "training step")
    return finding is None


def _speed(name: str, *arguments: Any) -> Finding | None:
    """Does a check of speed.py, whose imports may be missing."""
    from resnet_jax.doctor import speed

    return getattr(speed, name)(*arguments)


def _compared(say: Callable[[dict[str, Any]], None]) -> dict[str, str]:
    """The facts of this process that others must share."""
    from resnet_jax.training.environment import compared, environment

    say({"environment": environment()})
    return compared()


def _conclude(runner: Runner, group: Group, compared: dict[str, str]) -> str:
    """The level of this process or, of several, of all of them; process 0 shows what they found."""
    if group.count == 1:
        return worst(runner.findings)
    group.put("report", own_report(runner.findings, compared))
    runner.announce("Processes", "other processes", 3 * LONG_LIMIT)
    if group.index:
        found = group.gather("verdict", count=1, patience=3 * LONG_LIMIT)
        group.put("left", True)
        return found.get(0, PROBLEM)
    # Where they have computed together they are done at the same time. JAX ends this process 100
    # seconds after another one has died, and the others' findings with it.
    together = any(each.name == "all-reduce" for each in runner.findings)
    patience = PATIENCE if together else LONG_LIMIT
    for finding in hosts(group, group.gather("report", patience=patience)):
        runner.add(finding, "Processes", finding.name)
    level = worst(runner.findings)
    group.put("verdict", level)
    group.put("left", True)
    group.gather("left", patience=20)  # the table that the others read goes with this process
    return level


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # a check that never ended, and libraries of accelerators, would keep it alive
