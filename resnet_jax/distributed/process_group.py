"""The processes of a run: they compare settings, get the same state, and end together.

Arrays are sent by collectives, everything else by JAX's coordination service, a table of texts that
process 0 keeps. launch.py connects the processes; heartbeat.py notices that one is lost.
"""

from __future__ import annotations

import contextlib
import functools
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from resnet_jax import upstream
from resnet_jax.distributed.heartbeat import Heartbeat, Table, end_process
from resnet_jax.errors import (
    LOST,
    MISTAKE,
    STOPPED,
    ConfigError,
    DivergedError,
    PeerError,
    ResNetJaxError,
    StoppedError,
    one_line,
)

# Seconds that a process waits for the others to end after a mistake.
_FAREWELL = 20
# Errors that every process of a run raises by itself, at the same step.
_COMMON_ERRORS = (StoppedError, DivergedError)


def abandon(error: BaseException) -> None:
    """Ends this process immediately after `error`, if it is one of several.

    Python's normal exit would wait for processes that are gone or will not answer.
    """
    if upstream.distributed_state().num_processes == 1:
        return
    line, code = one_line(error), MISTAKE
    if isinstance(error, PeerError):
        code = LOST
    elif isinstance(error, KeyboardInterrupt):
        line, code = "interrupted before the first step", STOPPED
    elif not isinstance(error, ResNetJaxError):
        traceback.print_exception(error)
        line, code = f"{type(error).__name__}: {line}", 1
    end_process(line, code)


class ProcessGroup:
    """The processes of a run, from the view of one of them.

    A process has two numbers. `Heartbeat.index` is that of the coordination service and of
    `--process_id`: process 0 keeps the table, and messages name processes by it. `index` is that
    of JAX's runtime, which can differ on a TPU pod: it decides which devices and images a process
    has, whose arrays are broadcast, and which process writes.

    Args:
      count: Number of processes.
      heartbeat: The heartbeat of this process; None for a single process.
    """

    def __init__(self, count: int = 1, heartbeat: Heartbeat | None = None) -> None:
        self.count = count
        self._heartbeat = heartbeat
        self._broadcasts = 0

    @functools.cached_property
    def index(self) -> int:
        """`jax.process_index()`; the first access starts the backend."""
        return 0 if self._heartbeat is None else jax.process_index()

    @property
    def is_first(self) -> bool:
        """Whether this process writes to the disk and logs progress."""
        return self.index == 0

    def check_equal(self, facts: Mapping[str, object]) -> None:
        """Waits for all processes and checks that their facts, name -> value, are equal.

        Raises:
          ConfigError: Names the first fact that differs, its values and their processes. All
            processes raise the same error.
        """
        if self._heartbeat is None:
            return
        own = {name: _text(value) for name, value in facts.items()}
        self._heartbeat.put(f"facts/{self._heartbeat.index}", json.dumps(own))
        if self._heartbeat.index == 0:
            found = self._heartbeat.wait_for("facts/", self.count)
            each = [json.loads(found[index]) for index in range(self.count)]
            self._heartbeat.put("agreed/0", first_difference(each))
        problem = self._heartbeat.wait_for("agreed/", 1)[0]
        if problem:
            raise ConfigError(problem)

    def broadcast_object(self, value: Any) -> Any:
        """Sends a JSON value of the first process to all; the others' `value` is ignored.

        Raises:
          ConfigError: Process 0 ended earlier, with a mistake of the user.
          PeerError: Process 0 is lost.
        """
        if self._heartbeat is None:
            return value
        self._broadcasts += 1
        key = f"broadcast{self._broadcasts}/"
        if self.is_first:
            self._heartbeat.put(f"{key}0", json.dumps(value))
        return json.loads(self._heartbeat.wait_for(key, 1)[0])

    def broadcast_arrays(self, tree: Any, like: Any) -> Any:
        """Sends NumPy arrays of the first process to all, bit for bit.

        Args:
          tree: The arrays; ignored in other processes.
          like: The same tree with arrays or shapes, in all processes.

        Raises:
          ConfigError: Process 0 ended earlier, with a mistake of the user.
          PeerError: Process 0 is lost.
        """
        if self._heartbeat is None:
            return tree
        self.broadcast_object("ready")  # because an error cannot reach a process in a collective
        return _broadcast(tree if self.is_first else None, like)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _broadcast(tree: Any, like: Any) -> Any:
    from jax.experimental import multihost_utils

    leaves, structure = jax.tree.flatten(like)
    sizes = [np.dtype(x.dtype).itemsize * x.size for x in leaves]
    # As integers: the broadcast is a sum with zeros, and -0.0 + 0.0 would be 0.0.
    words = np.zeros(-(-sum(sizes) // 4), np.uint32)
    if tree is not None:
        joined = b"".join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(tree))
        words.view(np.uint8)[: len(joined)] = np.frombuffer(joined, np.uint8)
    found = np.asarray(multihost_utils.broadcast_one_to_all(words)).view(np.uint8)
    ends = np.cumsum(sizes)
    parts = [
        found[end - size : end].copy().view(x.dtype).reshape(x.shape)
        for end, size, x in zip(ends, sizes, leaves)
    ]
    return jax.tree.unflatten(structure, parts)


def first_difference(facts: Sequence[Mapping[str, str]]) -> str:
    """Describes the first difference in the facts, name -> text, of processes; "" if none differ.

    Example:
      >>> first_difference([{"jax": "0.10.2"}, {"jax": "0.12.0"}])
      'jax differs between processes: 0.10.2 (process 0), 0.12.0 (process 1); make them equal'
    """
    for name in {name: None for each in facts for name in each}:
        values: dict[str, list[int]] = {}
        for index, each in enumerate(facts):
            values.setdefault(each.get(name, "nothing"), []).append(index)
        if len(values) > 1:
            shown = ", ".join(f"{value} ({_processes(who)})" for value, who in values.items())
            return f"{name} differs between processes: {shown}; make them equal"
    return ""


def _processes(who: Sequence[int]) -> str:
    if len(who) == 1:
        return f"process {who[0]}"
    shown = ", ".join(map(str, who[:4]))
    return f"processes {shown}" + (f" and {len(who) - 4} more" if len(who) > 4 else "")


_current: list[ProcessGroup] = []  # the group that is entered, if any
_entered = 0


@contextlib.contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The group of this run's processes, which watch each other in the block and end together.

    An error in one of them also ends the others. A nested call yields the outer group.

    Raises:
      PeerError: Another process is lost. If this process hangs in a collective that cannot finish,
        no exception reaches it: it exits immediately with code 69.

    Example:
      >>> with process_group() as group:
      ...     group.count
      1
    """
    global _entered
    if _current:
        yield _current[0]
        return
    joined = upstream.distributed_state()
    if joined.client is None or joined.num_processes == 1:
        yield ProcessGroup()
        return
    _entered += 1  # the same in all processes, so that a second run has its own keys
    table = Table(joined.client, f"resnet_jax/{_entered}/")
    heartbeat = Heartbeat(table, joined.process_id, joined.num_processes)
    _current.append(ProcessGroup(joined.num_processes, heartbeat))
    try:
        yield _current[0]
        heartbeat.leave()
    except _COMMON_ERRORS:
        heartbeat.leave()
        raise
    except PeerError:
        heartbeat.linger()
        raise
    except BaseException as error:
        mistake = isinstance(error, ResNetJaxError)
        if isinstance(error, Exception) and not mistake:
            heartbeat.look_for_lost()  # which explains a failed collective
        heartbeat.leave(str(error) or type(error).__name__, MISTAKE if mistake else LOST, _FAREWELL)
        heartbeat.linger()
        raise
    finally:
        heartbeat.stop()
        _current.clear()
