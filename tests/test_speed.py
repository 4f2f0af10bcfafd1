"""Limits grow with the time that this machine takes; no test has a fixed one."""

import math
import re
import subprocess
from pathlib import Path

import pytest

from tests import speed


@pytest.fixture(autouse=True)
def _measured_again():
    speed.slowness.cache_clear()
    yield
    speed.slowness.cache_clear()


@pytest.mark.parametrize(("took", "factor"), [(0.5, 1), (8.001 * speed._USUAL_SECONDS, 8.001)])
def test_a_slow_machine_has_more_time(took, factor, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: started.append(1))
    times = iter([10.0, 10.0 + took])
    monkeypatch.setattr(speed.time, "monotonic", lambda: next(times))
    assert speed.seconds(120) == math.ceil(120 * factor)
    assert speed.seconds(300) == math.ceil(300 * factor)
    assert type(speed.seconds(120)) is int
    assert started == [1]  # once


def test_no_test_has_a_fixed_limit():
    fixed = {
        f"{path.name}: {line.strip()}"
        for path in Path(__file__).parent.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\btimeout=\d{2,}", line) and path.name != Path(__file__).name
    }
    assert not fixed
