"""Starts the worker that runs the checks, prints its findings, and ends even if it hangs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from resnet_jax import terminal
from resnet_jax.distributed.launch import FLAGS
from resnet_jax.doctor.findings import LONG_LIMIT, OK, PROBLEM, WARNING, Finding, plural, worst
from resnet_jax.doctor.reasons import known_reason, shortened
from resnet_jax.errors import MISTAKE, ConfigError
from resnet_jax.models.registry import model_info
from resnet_jax.terminal import json_text, show, visible

# Seconds beyond the limit of a check after which the worker is killed.
_GRACE = 30
# Widths of level and name before the text of a line.
_LEVEL, _NAME = 9, 16
_COLORS = {OK: 32, WARNING: 33, PROBLEM: 31}  # ANSI: green, yellow, red


@dataclasses.dataclass
class Result:
    """The findings of the worker; `log` has the last lines that libraries have printed."""

    findings: list[Finding] = dataclasses.field(default_factory=list)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    index: int | None = None
    count: int = 1
    code: int | None = None
    log: list[str] = dataclasses.field(default_factory=list)


def doctor(arguments: Sequence[str], as_json: bool = False) -> int:
    """Checks whether training runs on this machine, and prints the findings.

    Args:
      arguments: --quick, --network=NAME, and the flags that connect processes.
      as_json: Print one JSON object at the end; progress goes to standard error.

    Returns:
      The exit code: 0 if training can run here, 2 if it cannot.

    Raises:
      ConfigError: A flag is invalid.
      ModelError: The network does not exist.
    """
    known = {"--quick", "--network", *re.findall(r"--[\w-]+", FLAGS)}
    for each in arguments:
        if each.startswith("-") and each.partition("=")[0] not in known:
            raise ConfigError(f"{each}: doctor has no such flag; see doctor --help")
    for each in arguments:
        flag, _, name = each.partition("=")
        if flag == "--network" and "--quick" in arguments:
            raise ConfigError(f"{each}: --quick trains no network; remove one of the flags")
        if flag == "--network":
            model_info(name)  # raises an error that lists the names
    printer = Printer(sys.stdout, sys.stderr, quiet=as_json)
    result = examine([sys.executable, "-m", "resnet_jax.doctor.worker", *arguments], printer)
    if result.index in (0, None):
        if as_json:
            show(json_text(to_json(result)))
        else:
            printer.conclusion(result.findings)
    return result.code or 0


def examine(command: Sequence[str], printer: Printer) -> Result:
    """Runs the worker `command`; the check in which it crashes or hangs is a problem.

    Raises:
      ConfigError: The worker reports an invalid flag.
    """
    worker = subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.PIPE,  # the worker ends when it is closed
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=_environment(),
    )
    log: collections.deque[str] = collections.deque(maxlen=200)
    events: queue.Queue[dict[str, Any] | None] = queue.Queue()
    readers = [
        threading.Thread(target=_read_events, args=(worker.stdout, events, log), daemon=True),
        threading.Thread(target=_read_log, args=(worker.stderr, log), daemon=True),
    ]
    for reader in readers:
        reader.start()
    with worker:
        try:
            result, problem = _follow(events, printer)
            if problem is None and result.code is None:
                worker.wait(timeout=_GRACE)
                readers[1].join(timeout=5)
                problem = _death(worker.returncode, [*log])
        finally:
            worker.kill()
            for reader in readers:
                reader.join(timeout=5)
    result.log = [*log]
    if problem is not None:
        problem = dataclasses.replace(problem, **printer.current)
        result.findings.append(problem)
        result.code = MISTAKE
        if printer.index is None:  # the worker crashed before it knew
            printer.joined(0)
        printer.finding(problem)
        if printer.index:
            terminal.log(f"error: process {printer.index}: {problem.text}")
    return result


def _environment() -> dict[str, str]:
    """An environment in which the worker imports the same package as this process."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _read_events(
    stream: Any, events: queue.Queue[dict[str, Any] | None], log: collections.deque[str]
) -> None:
    with contextlib.suppress(ValueError):  # closed, because the worker was too slow
        for line in stream:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                event = None
            if isinstance(event, dict):
                events.put(event)
            else:  # printed before the worker redirects standard output
                log.append(line.rstrip())
    events.put(None)


def _read_log(stream: Any, log: collections.deque[str]) -> None:
    with contextlib.suppress(ValueError):
        for line in stream:
            log.append(line.rstrip())


def _follow(
    events: queue.Queue[dict[str, Any] | None], printer: Printer
) -> tuple[Result, Finding | None]:
    """Prints events as they arrive; also returns a problem if they take too long."""
    result, limit = Result(), float(LONG_LIMIT)  # importing JAX from a slow disk takes long
    while True:
        try:
            event = events.get(timeout=limit + _GRACE)
        except queue.Empty:
            return result, Finding(PROBLEM, f"has not ended after {limit + _GRACE:g} seconds")
        if event is None:
            return result, None
        if "mistake" in event:
            raise ConfigError(event["mistake"])
        if "start" in event:
            limit = event["limit"]
            printer.start(event["start"], event["group"], limit)
        if "finding" in event:
            found = Finding(**event["finding"])
            result.findings.append(found)
            printer.finding(found)
        if "index" in event:
            result.index, result.count = event["index"], event["count"]
            printer.joined(event["index"])
        result.environment = event.get("environment", result.environment)
        if "end" in event:
            result.code = event["end"]
            return result, None


def _death(code: int, log: Sequence[str]) -> Finding:
    """Why the worker ended, from its last output."""
    text = "\n".join(log)
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        reason = known_reason(text) or _last_words(log)
        if name == "SIGKILL":
            reason = reason or "the system ends processes when memory is full"
        return Finding(PROBLEM, f"the process was ended by {name}: {reason}".removesuffix(": "))
    return Finding(PROBLEM, known_reason(text) or _last_words(log) or f"exit code {code}")


def _last_words(log: Sequence[str]) -> str:
    """The most informative line: our own error, a fatal error of a C++ library, or the last one."""
    for pattern in (r"error: ", r"F\d{4} ", r"(?:E\d{4} |\w*Error\b)"):
        said = [line for line in log if re.match(pattern, line)]
        if said:
            return shortened(said[-1].removeprefix("error: "))
    return shortened(log[-1]) if log else ""


class Printer:
    """Prints findings as they arrive, if this is the first process of its run.

    Args:
      output: Stream for findings: one line each, under headings.
      progress: Stream for the name of the current check.
      quiet: Whether to print no findings.
    """

    def __init__(self, output: TextIO, progress: TextIO, quiet: bool = False) -> None:
        self.index: int | None = None
        self.current: dict[str, Any] = {"name": "start", "group": "Software"}
        self._output = output
        self._progress = progress
        self._quiet = quiet
        self._waiting: list[Finding] = []
        self._group = ""
        self._transient = progress.isatty()
        self._colored = output.isatty() and "NO_COLOR" not in os.environ

    def joined(self, index: int) -> None:
        """Sets the number of this process, and prints the findings so far if it is the first."""
        self.index = index
        for each in self._waiting:
            self.finding(each)
        self._waiting.clear()

    def start(self, name: str, group: str, limit: float) -> None:
        """Announces a check."""
        self.current = {"name": name, "group": group}
        text = f"{'...':<{_LEVEL}}{name}" + (f" (up to {limit:g} s)" if 60 < limit < 3600 else "")
        if self._transient:
            self._write(self._progress, f"\r\x1b[K{text}")
        elif 60 < limit < 3600 and self.index == 0:
            self._write(self._progress, f"{text}\n")

    def finding(self, finding: Finding) -> None:
        """Prints a finding."""
        if self._transient:
            self._write(self._progress, "\r\x1b[K")
        if self.index is None:
            self._waiting.append(finding)
        elif self.index == 0 and not self._quiet:
            if finding.group != self._group:
                self._group = finding.group
                self._write(self._output, f"\n{finding.group}\n")
            self._write(self._output, self._line(finding))

    def conclusion(self, findings: list[Finding]) -> None:
        """Prints the conclusion."""
        self._write(self._output, "\n" + conclusion(findings) + "\n")

    def _line(self, finding: Finding) -> str:
        level = f"{finding.level:<{_LEVEL}}"
        if self._colored and finding.level in _COLORS:
            level = f"\x1b[{_COLORS[finding.level]}m{level}\x1b[0m"
        words = visible(finding.text)
        if self._output.isatty():  # in a file, each finding is one line, for grep
            room = max(40, shutil.get_terminal_size().columns - _LEVEL - _NAME)
            lines = textwrap.wrap(words, room, break_on_hyphens=False, break_long_words=False)
            words = ("\n" + " " * (_LEVEL + _NAME)).join(lines)
        return f"{level}{finding.name:<{_NAME - 1}} {words}\n"

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        with contextlib.suppress(OSError):
            stream.write(text)
            stream.flush()


def conclusion(findings: list[Finding]) -> str:
    """The last line: whether training can run.

    Example:
      >>> conclusion([Finding(OK, "fine")])
      'Training can run here.'
    """
    count: Callable[[str], int] = [each.level for each in findings].count
    if worst(findings) == PROBLEM:
        text = f"Training cannot run here as it should: {plural(count(PROBLEM), 'problem')}"
        if count(WARNING):
            text += f", {plural(count(WARNING), 'warning')}"
        return f"{text}. For an issue: python -m resnet_jax doctor --json > doctor.json"
    if worst(findings) == WARNING:
        return f"Training can run here; {plural(count(WARNING), 'warning')}."
    return "Training can run here."


def to_json(result: Result) -> dict[str, Any]:
    """Everything that was found, as a JSON object."""
    level = worst(result.findings)
    return {
        "level": level,
        "can_train": level != PROBLEM,
        "process": result.index or 0,
        "processes": result.count,
        "checks": [dataclasses.asdict(each) for each in result.findings],
        "environment": result.environment,
        "log": result.log,
    }
