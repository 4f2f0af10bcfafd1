"""Stopping between two steps, when a signal asks for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any


class Signals:
    """Notes SIGTERM and SIGINT, so that the loop can save and stop between two steps."""

    def __init__(self) -> None:
        self.received = False
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        # A second request ends the process; a held key, or one signal sent twice, is no second.
        if self.received and now - self._first > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.received:
            self.received, self._first = True, now
            os.write(2, b"stopping after this step; all will be saved\n")
