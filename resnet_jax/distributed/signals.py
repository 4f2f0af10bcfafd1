"""Signals that stop a process: training between two steps, other commands immediately."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# SIGHUP: the terminal was closed, or the connection to it is lost.
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A repeated signal within these seconds, such as a held key, is not a second request.
_SAME_REQUEST = 1.0
_RESEND_SECONDS = 0.05  # until a signal that was lost is sent again


class Signals:
    """Records a signal to stop, so that the training loop can save and stop between two steps."""

    def __init__(self) -> None:
        self.received = False
        self._handled = contextlib.ExitStack()

    def __enter__(self) -> Signals:
        self._handled.enter_context(_on_first_signal(self._note))
        return self

    def __exit__(self, *exception: object) -> None:
        self._handled.close()

    def _note(self) -> None:
        self.received = True
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"stopping after this step; everything will be saved\n")


class _Interrupt(KeyboardInterrupt):
    """Python's own may not pass through `exec` of a text, as in the making of a dataclass.

    Although it is handled later, CPython then ends the process by SIGINT instead of its exit code.
    """


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """In the block, the first signal to stop raises KeyboardInterrupt."""

    def interrupt() -> None:
        raise _Interrupt

    with _on_first_signal(interrupt) as first, contextlib.ExitStack() as stack:
        previous = sys.unraisablehook

        def raise_again(unraisable: sys.UnraisableHookArgs) -> None:
            """Sends the signal again if Python drops the exception, as in garbage collection."""
            if unraisable.exc_type is not _Interrupt:
                previous(unraisable)
                return
            first.clear()
            main = threading.main_thread().ident
            timer = threading.Timer(_RESEND_SECONDS, signal.pthread_kill, [main, signal.SIGTERM])
            stack.callback(timer.join)
            stack.callback(timer.cancel)
            timer.start()

        stack.callback(setattr, sys, "unraisablehook", previous)
        sys.unraisablehook = raise_again
        yield


@contextlib.contextmanager
def _on_first_signal(act: Callable[[], None]) -> Iterator[list[float]]:
    """Calls `act` at the first signal; a second request ends the process.

    Yields:
      [] until the first signal, then its time.
    """
    first: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if not first:
            first.append(now)
            act()
        elif now - first[0] > _SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # only this thread may set handlers
        for number in _STOPPING:
            handler = signal.getsignal(number)
            if number != signal.SIGHUP or handler != signal.SIG_IGN:  # set by nohup
                before[number] = signal.signal(number, handle)
    try:
        yield first
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
