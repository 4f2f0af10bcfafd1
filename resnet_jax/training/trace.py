"""The profiler's trace of some steps of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from resnet_jax.config.schema import Config
from resnet_jax.config.validation import profile_steps
from resnet_jax.errors import one_line


class Trace:
    """Writes a profiler trace of the steps in log.profile; a failing trace does not end the run."""

    def __init__(self, config: Config, workdir: Path, log: Callable[[str], None]) -> None:
        wanted = config.log.profile and jax.process_index() == 0
        self._steps = profile_steps(config.log.profile) if wanted else None
        self._folder = str(workdir / "profile")
        self._running = False
        self._log = log

    def before(self, done: int) -> None:
        """Starts the trace before its first step."""
        if self._steps and done == self._steps[0]:
            with self._log_errors():
                jax.profiler.start_trace(self._folder)
                self._running = True

    def after(self, done: int, metrics: Any) -> None:
        """Ends the trace after its last step."""
        if self._running and self._steps and done >= self._steps[1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._running:
            self._running = False
            with self._log_errors():  # this is where it is written
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _log_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            self._log(f"log.profile: no trace: {one_line(error)}")
