"""Batches of a run: batch number k follows from (seed, k), whoever reads it and in how many parts.

Which image stands where is in order.py. The batches themselves come from memory (memory.py) where
a data set's crops do not vary and fit there, and otherwise from its encoded images (stream.py).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any

from resnet_jax.data.corrupt import Corrupt
from resnet_jax.data.memory import (
    InMemoryDataset,
    evaluation_batches,
    fits_memory,
    load_memory,
    memory_batches,
    memory_choices,
)
from resnet_jax.data.sampler import BalancedSampler, IndexSampler, host_positions
from resnet_jax.data.sources.base import Batch
from resnet_jax.data.stream import stream_batches, streamed_evaluation_batches

__all__ = [
    "BalancedSampler",
    "Batch",
    "Corrupt",
    "InMemoryDataset",
    "IndexSampler",
    "evaluation_batches",
    "fits_memory",
    "host_positions",
    "load_memory",
    "memory_batches",
    "memory_choices",
    "prefetch",
    "stream_batches",
    "streamed_evaluation_batches",
]


def prefetch(batches: Iterable[Any], size: int) -> Generator[Any, None, None]:
    """Makes batches ahead in a thread, so that the device need not wait for the host.

    Args:
      batches: What to iterate over; an error in it is raised here.
      size: Batches ahead.

    Returns:
      The same batches.

    Example:
      >>> list(prefetch(range(3), size=2))
      [0, 1, 2]
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=size)
    stopped = threading.Event()

    def put(item: tuple[str, Any]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(("batch", batch)):
                    return
        except BaseException as error:  # raised again where the batches are used
            put(("error", error))
        else:
            put(("end", None))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = ready.get()
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item
    finally:
        stopped.set()
        thread.join()
