"""The input pipeline: a source of encoded images in, batches of uint8 arrays out.

source -> open_dataset -> train_batches (in the order of a sampler) or eval_batches -> prefetch

A dataset whose crops do not vary and fit in memory is decoded once (memory.py). Any other is read,
decoded and cropped during the run (stream.py). Both have the same two methods:

    dataset.train_batches(sampler, config, start, stop, shard)
    dataset.eval_batches(batch_size, shard)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any

from resnet_jax.config.schema import Data
from resnet_jax.data.corrupt import CorruptImages
from resnet_jax.data.memory import InMemoryDataset, fits_memory, index_batch
from resnet_jax.data.sampler import ALL, BalancedSampler, IndexSampler, Shard
from resnet_jax.data.sources import Source
from resnet_jax.data.sources.base import Batch
from resnet_jax.data.stream import StreamedDataset
from resnet_jax.errors import DataError

__all__ = [
    "ALL",
    "BalancedSampler",
    "Batch",
    "CorruptImages",
    "Dataset",
    "InMemoryDataset",
    "IndexSampler",
    "Shard",
    "StreamedDataset",
    "fits_memory",
    "index_batch",
    "open_dataset",
    "prefetch",
]

Dataset = InMemoryDataset | StreamedDataset


def open_dataset(source: Source, config: Data, training: bool, corrupt: CorruptImages) -> Dataset:
    """Decodes a source into memory where it fits, and otherwise streams it.

    Raises:
      DataError: No image can be decoded, or more than data.max_corrupt cannot.
    """
    if not fits_memory(source, config, training):
        return StreamedDataset(source, config, corrupt)
    dataset = InMemoryDataset.decode(source, config, training, corrupt)
    if len(dataset) == 0:
        raise DataError(f"data.name = {source.name!r}: none of its images can be decoded")
    return dataset


def prefetch(batches: Iterable[Any], size: int) -> Generator[Any, None, None]:
    """Makes up to `size` batches ahead in a thread; an error in it is raised here.

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

    def produce() -> None:
        try:
            for batch in batches:
                if not put(("batch", batch)):
                    return
        except BaseException as error:  # raised again in the consumer's thread
            put(("error", error))
        else:
            put(("end", None))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
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
