"""Runs commands as a user does: in processes of their own."""

import os
import pathlib
import subprocess

from tests import speed
from tests.conftest import FAST_COMPILE

ROOT = pathlib.Path(__file__).parents[1]


def run(*command, seconds=120, package=ROOT, env=None, **options):
    """The ended process, with its `returncode`, `stdout` and `stderr` as text.

    Args:
      command: The program and its arguments.
      seconds: Limit on its time on an idle machine.
      package: The folder from which it imports this package.
      env: Its environment; by default that of the tests, with one device that compiles fast.
      options: Of `subprocess.run`.
    """
    ours = {**os.environ, "PYTHONPATH": str(package), "XLA_FLAGS": FAST_COMPILE}
    return subprocess.run(
        list(map(str, command)),
        env=env or ours,
        capture_output=True,
        text=True,
        timeout=speed.seconds(seconds),
        **options,
    )
