"""How a process of a run notices that another one is lost, wherever it waits itself.

Each process writes a beat a second into a table that process 0 keeps. Process 0 reads all of them,
the others its one: n processes cost n requests a second. Who is silent for too long, or ends with
an error, is named in a verdict, and everyone ends with that line.
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

# Beats without a sign of life. Not less: a process may hold Python's lock while it reads or traces.
_SILENT = 30
# The same once a collective has failed: then somebody is gone, and it is only asked who.
_SILENT_AFTER_FAILURE = 6
# Seconds that the main thread has to end by itself after a verdict; it may be in a collective.
_GRACE = 15
_AGAIN = "the same command on all processes goes on from the last saved state"
# The mistake that this process is about to end with, while it waits for the others.
_own_mistake: list[str] = []


def end_process(line: str, code: int) -> NoReturn:
    """Ends this process at once, whatever its threads wait for.

    Args:
      line: Why.
      code: Its exit code.
    """
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(2, f"error: {visible(line)}\n".encode())
    os._exit(code)


def end_when_aborted(coordinator: str) -> None:
    """Says who is lost when JAX's client aborts this process because process 0 is gone.

    That client is C++ and takes no handler of ours; its abort raises a signal, and a handler in
    Python's way would never run, as no bytecode follows.

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
            end_process(f"process 0 at {coordinator} is gone; {_AGAIN}", LOST)
        libc.signal(number, None)  # something else; the abort goes on

    end_when_aborted.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)  # type: ignore[attr-defined]
    libc.signal(int(signal.SIGABRT), end_when_aborted.handler)  # type: ignore[attr-defined]


def _line_and_code(text: str) -> tuple[str, int]:
    line, code = json.loads(text)
    return line, code


class Table:
    """Texts by key, which all processes see.

    Args:
      client: Of JAX's coordination service.
      prefix: Of the keys.
    """

    def __init__(self, client: Any, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    def put(self, key: str, text: str) -> None:
        """Writes or replaces a text."""
        self._client.key_value_set(self._prefix + key, text, allow_overwrite=True)

    def folder(self, key: str) -> dict[int, str]:
        """The texts below a key that ends with "/", by the number that theirs end with."""
        found = self._client.key_value_dir_get(self._prefix + key)
        return {int(name.rpartition("/")[2]): text for name, text in found}


class Watch:
    """Beats, and listens to the others.

    Args:
      table: That all processes see.
      index: This process.
      count: How many there are.
      beat: Seconds between two beats.
    """

    def __init__(self, table: Table, index: int, count: int, beat: float = 1.0) -> None:
        self.index = index
        self.count = count
        self._table = table
        self._beat = beat
        others = [i for i in range(count) if i != index]
        watched = others if index == 0 else [0]
        self._where = "" if index == 0 else "first/"
        self._seen = dict.fromkeys(watched, "")
        self._silent = dict.fromkeys(watched, 0)
        self._most_silent = _SILENT
        self._ends: dict[int, tuple[str, int]] = {}
        self._verdict: tuple[str, int] | None = None
        self._leaving = False
        self._over = threading.Event()
        threading.Thread(target=self._talk, name="beat", daemon=True).start()
        threading.Thread(target=self._judge, name="watch", daemon=True).start()

    def put(self, key: str, text: str) -> None:
        """Writes a text for the others."""
        self._table.put(key, text)

    def wait_for(self, folder: str, count: int) -> dict[int, str]:
        """Waits until a folder of the table has so many texts.

        Args:
          folder: A key that ends with "/".
          count: How many.

        Returns:
          Their numbers to the texts.

        Raises:
          ConfigError: Another process ended with a mistake of the user's.
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
        """Waits until it can be told who is gone, after a collective has failed.

        Raises:
          ConfigError: Another process ended with a mistake of the user's.
          PeerError: Another process is lost.
        """
        self._most_silent = _SILENT_AFTER_FAILURE
        for _ in range(20 * _SILENT_AFTER_FAILURE):
            self._raise_verdict()
            time.sleep(self._beat / 10)

    def linger(self) -> None:
        """Gives the others time to read the verdict, which goes when process 0 does."""
        if self.index == 0:
            time.sleep(3 * self._beat)

    def leave(self, line: str = "", code: int = 0, most: float = float("inf")) -> None:
        """Says that this process has come to its end, and waits for the others to come to theirs.

        Process 0 keeps the table, so it must go last; it may write for long, so all wait for it.

        Args:
          line: What went wrong; "" for nothing.
          code: The exit code that the others take over.
          most: Seconds to wait.
        """
        self._leaving = True
        if code == MISTAKE:
            _own_mistake.append(line)
        if self._verdict is not None:  # the others have that line already
            line, code = "", 0
        self._say_end(line, code)
        until = time.monotonic() + most
        while time.monotonic() < until and self._lost() is None:
            if all(peer in self._ends for peer in self._seen):
                return
            time.sleep(self._beat / 10)

    def stop(self) -> None:
        """Ends the watch."""
        self._over.set()

    def _talk(self) -> None:
        """Writes and reads; a request may hang where process 0 does, so nothing else is here."""
        number = 0
        while not self._over.wait(self._beat):
            number += 1
            with contextlib.suppress(Exception):
                self._table.put(self._own("beat"), str(number))
                self._listen(self._table.folder("beat/" + self._where))
                for peer, text in self._table.folder("end/" + self._where).items():
                    self._ends[peer] = _line_and_code(text)
                for text in self._table.folder("verdict/").values():
                    self._verdict = self._verdict or _line_and_code(text)

    def _own(self, kind: str) -> str:
        """A key of this process; those of process 0 have a folder that is read without the rest."""
        return f"{kind}/{'rest' if self.index else 'first'}/{self.index}"

    def _listen(self, beats: dict[int, str]) -> None:
        for peer, before in self._seen.items():
            now = beats.get(peer, "")
            if now != before:
                self._seen[peer], self._silent[peer] = now, 0

    def _judge(self) -> None:
        """Counts the silence; and ends the process where its main thread cannot."""
        while not self._over.wait(self._beat):
            for peer, beat in self._seen.items():
                if beat:  # not by the clock: a process that is stopped itself does not count
                    self._silent[peer] += 1
            found = self._verdict or self._lost()
            if found is None:
                continue
            self._verdict = found
            if self.index == 0:
                with contextlib.suppress(Exception):
                    self._table.put("verdict/0", json.dumps(found))
            if not self._over.wait(_GRACE * self._beat) and not self._leaving:
                self._say_end("", 0)
                self.linger()
                end_process(*found)

    def _say_end(self, line: str, code: int) -> None:
        """Where process 0 is gone there is no table, and where it hangs so does the request."""

        def put() -> None:
            with contextlib.suppress(Exception):
                self._table.put(self._own("end"), json.dumps([line, code]))

        thread = threading.Thread(target=put, daemon=True)
        thread.start()
        thread.join(2 * self._beat)

    def _lost(self) -> tuple[str, int] | None:
        """The verdict on the first process that is silent, or ended by an error."""
        for peer, silent in self._silent.items():
            if peer in self._ends:
                line, code = self._ends[peer]
                if line:
                    return f"process {peer} stopped: {line}", code
            elif silent > self._most_silent:
                seconds = int(silent * self._beat)
                return f"process {peer} gave no sign of life for {seconds} seconds; {_AGAIN}", LOST
        return None
