"""Heartbeats: how a process notices that another one is lost, even while it waits in a collective.

Each process writes a heartbeat every second into a table that process 0 keeps. Process 0 reads all
of them and the others read that of process 0, so n processes cost n requests a second. A process
that is silent for too long, or ends with an error, is named in a verdict, and all processes end
with that message.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from resnet_jax.errors import LOST, MISTAKE, ConfigError, PeerError
from resnet_jax.terminal import visible

# Heartbeats that may be missed. A process may hold the GIL for long while it reads or traces.
_MAX_MISSED = 30
# The same after a failed collective, when it is certain that a process is gone.
_MAX_MISSED_AFTER_FAILURE = 6
# Seconds after a verdict in which the main thread may end by itself; it may be in a collective.
_GRACE = 15
_RESUME = "run the same command on all processes to resume from the last saved state"
# The mistake that this process ends with, while it waits for the others.
_own_mistake: list[str] = []


def end_process(line: str, code: int) -> NoReturn:
    """Prints an error line and exits immediately, even if threads are waiting."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(2, f"error: {visible(line)}\n".encode())
    os._exit(code)


def end_when_aborted(coordinator: str) -> None:
    """Prints which process is lost when JAX's client aborts because process 0 is gone.

    The client is C++ and accepts no handler. Its abort raises a signal whose Python handler would
    never run, because no bytecode follows, so the handler is a C function.

    Args:
      coordinator: HOST:PORT of process 0.
    """
    libc = ctypes.CDLL(None)
    host, _, port = coordinator.rpartition(":")

    def handle(number: int) -> None:
        if _own_mistake:  # the others have ended because of it
            end_process(_own_mistake[0], MISTAKE)
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except (OSError, ValueError):
            end_process(f"process 0 at {coordinator} is gone; {_RESUME}", LOST)
        libc.signal(number, None)  # another reason: abort as usual

    end_when_aborted.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)  # type: ignore[attr-defined]
    libc.signal(int(signal.SIGABRT), end_when_aborted.handler)  # type: ignore[attr-defined]


def _parse_verdict(text: str) -> tuple[str, int]:
    line, code = json.loads(text)
    return line, code


class Table:
    """A key-value table of texts, shared by all processes through JAX's coordination service."""

    def __init__(self, client: Any, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    def put(self, key: str, text: str) -> None:
        """Writes or replaces a text."""
        self._client.key_value_set(self._prefix + key, text, allow_overwrite=True)

    def folder(self, key: str) -> dict[int, str]:
        """The texts of the keys KEY/NUMBER, for a key that ends with "/", by number."""
        found = self._client.key_value_dir_get(self._prefix + key)
        return {int(name.rpartition("/")[2]): text for name, text in found}


class Heartbeat:
    """Sends heartbeats in the background and watches those of other processes.

    Args:
      table: The table that all processes share.
      index: Number of this process.
      count: Number of processes.
      beat: Seconds between heartbeats.
    """

    def __init__(self, table: Table, index: int, count: int, beat: float = 1.0) -> None:
        self.index = index
        self.count = count
        self._table = table
        self._beat = beat
        others = [i for i in range(count) if i != index]
        watched = others if index == 0 else [0]
        self._where = "" if index == 0 else "first/"
        self._beats = dict.fromkeys(watched, "")
        self._missed = dict.fromkeys(watched, 0)
        self._max_missed = _MAX_MISSED
        self._ends: dict[int, tuple[str, int]] = {}
        self._verdict: tuple[str, int] | None = None
        self._leaving = False
        self._over = threading.Event()
        threading.Thread(target=self._exchange, name="beat", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def put(self, key: str, text: str) -> None:
        """Writes a text for the others."""
        self._table.put(key, text)

    def wait_for(self, folder: str, count: int) -> dict[int, str]:
        """Waits until a folder of the table has `count` texts, and returns them by number.

        Raises:
          ConfigError: Another process ended with a mistake of the user.
          PeerError: Another process is lost.
        """
        while True:
            found = self._table.folder(folder)
            if len(found) >= count:
                return found
            self._raise_verdict()
            time.sleep(self._beat / 10)

    def _raise_verdict(self) -> None:
        if self._verdict is not None:
            line, code = self._verdict
            raise ConfigError(line) if code == MISTAKE else PeerError(line)

    def look_for_lost(self) -> None:
        """Waits for the verdict after a collective has failed, and raises it as an error."""
        self._max_missed = _MAX_MISSED_AFTER_FAILURE
        for _ in range(20 * _MAX_MISSED_AFTER_FAILURE):
            self._raise_verdict()
            time.sleep(self._beat / 10)

    def linger(self) -> None:
        """Gives the others time to read the verdict before process 0 and the table end."""
        if self.index == 0:
            time.sleep(3 * self._beat)

    def leave(self, line: str = "", code: int = 0, most: float = float("inf")) -> None:
        """Announces the end of this process, and waits until all others have announced theirs.

        Process 0 keeps the table, so it must end last; all wait for it, because it may write for
        long.

        Args:
          line: What went wrong, if anything.
          code: The exit code for the other processes.
          most: Maximum seconds to wait.
        """
        self._leaving = True
        if code == MISTAKE:
            _own_mistake.append(line)
        if self._verdict is not None:  # the others already have it
            line, code = "", 0
        self._announce_end(line, code)
        until = time.monotonic() + most
        while time.monotonic() < until and self._lost() is None:
            if all(peer in self._ends for peer in self._beats):
                return
            time.sleep(self._beat / 10)

    def stop(self) -> None:
        """Stops the background threads."""
        self._over.set()

    def _exchange(self) -> None:
        """Writes and reads the table; in a thread of its own, because a request may hang."""
        number = 0
        while not self._over.wait(self._beat):
            number += 1
            with contextlib.suppress(Exception):
                self._table.put(self._own("beat"), str(number))
                self._record_beats(self._table.folder("beat/" + self._where))
                for peer, text in self._table.folder("end/" + self._where).items():
                    self._ends[peer] = _parse_verdict(text)
                for text in self._table.folder("verdict/").values():
                    self._verdict = self._verdict or _parse_verdict(text)

    def _own(self, kind: str) -> str:
        """A key of this process; process 0 has a folder that can be read without the rest."""
        return f"{kind}/{'rest' if self.index else 'first'}/{self.index}"

    def _record_beats(self, beats: dict[int, str]) -> None:
        for peer, before in self._beats.items():
            now = beats.get(peer, "")
            if now != before:
                self._beats[peer], self._missed[peer] = now, 0

    def _watch(self) -> None:
        """Counts missed heartbeats, and ends the process if its main thread cannot."""
        while not self._over.wait(self._beat):
            for peer, beat in self._beats.items():
                if beat:  # no clock, so that this process may be suspended
                    self._missed[peer] += 1
            found = self._verdict or self._lost()
            if found is None:
                continue
            self._verdict = found
            if self.index == 0:
                with contextlib.suppress(Exception):
                    self._table.put("verdict/0", json.dumps(found))
            if not self._over.wait(_GRACE * self._beat) and not self._leaving:
                self._announce_end("", 0)
                self.linger()
                end_process(*found)

    def _announce_end(self, line: str, code: int) -> None:
        """Announces the end in a thread, because the request hangs if process 0 does."""

        def put() -> None:
            with contextlib.suppress(Exception):
                self._table.put(self._own("end"), json.dumps([line, code]))

        thread = threading.Thread(target=put, daemon=True)
        thread.start()
        thread.join(2 * self._beat)

    def _lost(self) -> tuple[str, int] | None:
        """The verdict on the first process that is silent or ended with an error, if any."""
        for peer, missed in self._missed.items():
            if peer in self._ends:
                line, code = self._ends[peer]
                if line:
                    return f"process {peer} stopped: {line}", code
            elif missed > self._max_missed:
                seconds = int(missed * self._beat)
                return f"process {peer} gave no sign of life for {seconds} seconds; {_RESUME}", LOST
        return None
