"""Several processes as one run: they agree, get the same state, and end together.

Arrays go by collectives. Everything else goes by JAX's coordination service, a table of texts that
process 0 keeps. How processes are joined is in launch.py, how a lost one is noticed in watch.py.
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

from resnet_jax.distributed.heartbeat import Table, Watch, end_process
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

# Seconds that a process waits for the others to come to an end after a mistake.
_FAREWELL = 20
# What every process of a run ends with by itself, at the same step.
_ORDERLY = (StoppedError, DivergedError)


def service() -> Any:
    """JAX's record of how this process was joined with others."""
    from jax._src import distributed  # the table is not public; Orbax reaches it the same way

    return distributed.global_state


def abandon(error: BaseException) -> None:
    """Ends this process at once where it is one of several that did not come to an end together.

    Python's own end would wait for processes that are gone, or are not going to answer.

    Args:
      error: Why.
    """
    if service().num_processes == 1:
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
    """The processes of a run, as one of them sees them.

    A process has two numbers. `Watch.index` is the one that it joined the coordination service
    with: it says who keeps the table, and messages name it, because it is what `--process_id`
    gave. `index` is the runtime's, and on a TPU pod it can differ from the first: it says which
    devices and images a process has, whose arrays a broadcast sends, and who writes.

    Args:
      count: Number of processes; a single one has nobody to agree with.
      watch: The heartbeat of this process; None for a single one.
    """

    def __init__(self, count: int = 1, watch: Watch | None = None) -> None:
        self.count = count
        self._watch = watch
        self._told = 0

    @functools.cached_property
    def index(self) -> int:
        """`jax.process_index()`; the first look starts the backend."""
        return 0 if self._watch is None else jax.process_index()

    @property
    def is_first(self) -> bool:
        """Whether this process writes to the disk and prints progress."""
        return self.index == 0

    def check_equal(self, facts: Mapping[str, object]) -> None:
        """Checks that all processes say the same, and waits for them.

        Args:
          facts: Names to values.

        Raises:
          ConfigError: They do not; names the first fact that differs, its values, and who says
            them. All processes raise the same.
        """
        if self._watch is None:
            return
        own = {name: _text(value) for name, value in facts.items()}
        self._watch.put(f"facts/{self._watch.index}", json.dumps(own))
        if self._watch.index == 0:
            found = self._watch.wait_for("facts/", self.count)
            each = [json.loads(found[index]) for index in range(self.count)]
            self._watch.put("agreed/0", first_difference(each))
        problem = self._watch.wait_for("agreed/", 1)[0]
        if problem:
            raise ConfigError(problem)

    def broadcast_object(self, value: Any) -> Any:
        """What process 0 says, as JSON has it.

        Args:
          value: Looked at in process 0 only.

        Returns:
          Its value, in all processes.

        Raises:
          ConfigError: Process 0 ended before it came here, by a mistake of the user's.
          PeerError: It is lost.
        """
        if self._watch is None:
            return value
        self._told += 1
        key = f"told{self._told}/"
        if self.is_first:
            self._watch.put(f"{key}0", json.dumps(value))
        return json.loads(self._watch.wait_for(key, 1)[0])

    def broadcast_arrays(self, tree: Any, like: Any) -> Any:
        """What process 0 has, bit for bit.

        Args:
          tree: NumPy arrays; looked at in process 0 only.
          like: Arrays, or shapes, of the same tree.

        Returns:
          NumPy arrays, the same in all processes.

        Raises:
          ConfigError: Process 0 ended before it came here, by a mistake of the user's.
          PeerError: It is lost.
        """
        if self._watch is None:
            return tree
        self.broadcast_object("ready")  # in a collective, an error of process 0 could not reach us
        return _broadcast(tree if self.is_first else None, like)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _broadcast(tree: Any, like: Any) -> Any:
    from jax.experimental import multihost_utils

    leaves, structure = jax.tree.flatten(like)
    sizes = [np.dtype(x.dtype).itemsize * x.size for x in leaves]
    # As integers, because it is a sum with zeros: -0.0 + 0.0 would be 0.0.
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
    """What processes do not agree on.

    Args:
      facts: Of each process, names to texts.

    Returns:
      One line; "" where they agree on everything.

    Example:
      >>> first_difference([{"jax": "0.10.2"}, {"jax": "0.12.0"}])
      'jax differs between processes: 0.10.2 (process 0), 0.12.0 (process 1); make them equal'
    """
    for name in {name: None for each in facts for name in each}:
        sayers: dict[str, list[int]] = {}
        for index, each in enumerate(facts):
            sayers.setdefault(each.get(name, "nothing"), []).append(index)
        if len(sayers) > 1:
            said = ", ".join(f"{value} ({_processes(who)})" for value, who in sayers.items())
            return f"{name} differs between processes: {said}; make them equal"
    return ""


def _processes(who: Sequence[int]) -> str:
    if len(who) == 1:
        return f"process {who[0]}"
    shown = ", ".join(map(str, who[:4]))
    return f"processes {shown}" + (f" and {len(who) - 4} more" if len(who) > 4 else "")


_together: list[ProcessGroup] = []  # the one that is entered
_entered = 0


@contextlib.contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """From here on the processes of a run watch each other, and end together.

    An error in one of them ends the others too. Inside itself it is what is there already.

    Returns:
      The processes, to agree with.

    Raises:
      PeerError: Another process is lost. Where this one hangs in a collective that nobody can
        finish, no exception reaches it: it ends at once with exit code 69.

    Example:
      >>> with together() as peers:
      ...     peers.count
      1
    """
    global _entered
    if _together:
        yield _together[0]
        return
    joined = service()
    if joined.client is None or joined.num_processes == 1:
        yield ProcessGroup()
        return
    _entered += 1  # as often in all processes, so that a second run has keys of its own
    table = Table(joined.client, f"resnet_jax/{_entered}/")
    watch = Watch(table, joined.process_id, joined.num_processes)
    _together.append(ProcessGroup(joined.num_processes, watch))
    try:
        yield _together[0]
        watch.leave()
    except _ORDERLY:
        watch.leave()
        raise
    except PeerError:
        watch.linger()
        raise
    except BaseException as error:
        mistake = isinstance(error, ResNetJaxError)
        if isinstance(error, Exception) and not mistake:
            watch.look_for_lost()  # then that is why a collective failed
        watch.leave(str(error) or type(error).__name__, MISTAKE if mistake else LOST, _FAREWELL)
        watch.linger()
        raise
    finally:
        watch.stop()
        _together.clear()
