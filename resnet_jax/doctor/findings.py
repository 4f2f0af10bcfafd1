"""The result of a check: a level, one line of text, and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

# From good to bad. With a problem, training cannot run here properly.
OK, SKIPPED, WARNING, PROBLEM = LEVELS = ("ok", "skipped", "warning", "problem")
# Time limits of a check in seconds. The second is for imports, the start of JAX and compilation.
LIMIT, LONG_LIMIT = 60, 300


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
      level: One of LEVELS.
      text: One line; with a warning or problem it says what to do.
      facts: Data for JSON.
      name: Name of the check, set by the runner.
      group: Heading of the check, set by the runner.
      seconds: Duration of the check, set by the runner.
    """

    level: str
    text: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""
    group: str = ""
    seconds: float = 0.0


def worst(findings: Sequence[Finding]) -> str:
    """The worst level of findings.

    Example:
      >>> worst([Finding(OK, "fine"), Finding(WARNING, "slow")])
      'warning'
    """
    return max((each.level for each in findings), key=LEVELS.index, default=OK)


def size(count: float) -> str:
    """Formats a number of bytes in powers of ten.

    Example:
      >>> size(85_520_809_984), size(512e6), size(4096)
      ('85.5 GB', '512 MB', '4 kB')
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """Formats a duration with its unit.

    Example:
      >>> duration(1.191), duration(0.0462), duration(0.0000853)
      ('1.19 s', '46.2 ms', '85.3 us')
    """
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}" if seconds < 999 else f"{seconds:.0f} s"
    return f"{seconds * 1e6:.3g} us"


def plural(count: int, noun: str) -> str:
    """Formats a number and its noun.

    Example:
      >>> plural(1, "device"), plural(4, "device"), plural(2, "process")
      ('1 device', '4 devices', '2 processes')
    """
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"
