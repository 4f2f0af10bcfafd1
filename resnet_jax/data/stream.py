"""Batches that are read, decoded and cropped while the run goes on.

Threads of this process share each batch's images out among themselves and write them straight
into the batch. With worker processes (workers.py) each makes whole batches.
"""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import contextlib
import itertools
import threading
from collections.abc import Generator
from typing import Any

import numpy as np

from resnet_jax.config.schema import Data
from resnet_jax.data import decode as decoding
from resnet_jax.data.corrupt import Corrupt
from resnet_jax.data.memory import label_type
from resnet_jax.data.sampler import IndexSampler, host_positions
from resnet_jax.data.sources import Source
from resnet_jax.data.sources.base import Batch, Label
from resnet_jax.data.workers import by_processes
from resnet_jax.errors import DataError

# Undecodable images that may follow each other in a source.
_MOST_IN_A_ROW = 16
# Images that a thread takes at a time: handing out single ones costs a tenth of decoding them.
_AT_A_TIME = 8


class Batches(abc.ABC):
    """This host's part of each batch, with random access.

    Args:
      source: The encoded images.
      config: Crop and channels.
      size: Side of a crop in pixels.
      share: Images in a batch on this host.
      steps: Number of batches.
    """

    def __init__(self, source: Source, config: Data, size: int, share: int, steps: int) -> None:
        self.source = source
        self.config = config
        self.size = size
        self.share = share
        self.steps = steps
        self.channels = config.channels or source.channels

    def __len__(self) -> int:
        return self.steps

    def make(self, step: int, pixels: np.ndarray) -> Batch:
        """A batch whose images are in `pixels`."""
        batch, images = self.begin(step)
        batch["images"] = pixels
        for place in range(self.share):
            self.fill(batch, images, place)
        return batch

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a batch's images, which are uint8."""
        return self.share, self.size, self.size, self.channels

    @abc.abstractmethod
    def begin(self, step: int) -> tuple[Batch, Any]:
        """A batch without its images, and what `fill` needs to know of them.

        "faulty" has the indices of undecodable images; -1 is none.
        """

    @abc.abstractmethod
    def fill(self, batch: Batch, images: Any, place: int) -> None:
        """Decodes the image at one place of a batch."""

    def _pixels(self) -> np.ndarray:
        return np.empty(self.shape, np.uint8)


class _Training(Batches):
    """An image that cannot be decoded is replaced by the one after it in the source.

    So the batches stay a function of the seed.
    """

    def __init__(
        self,
        source: Source,
        order: IndexSampler,
        config: Data,
        batch_size: int,
        start: int,
        stop: int,
        mirror: bool,
        host: int,
        hosts: int,
    ) -> None:
        super().__init__(source, config, config.image_size, batch_size // hosts, stop - start)
        self.order = order
        self.batch_size = batch_size
        self.start = start
        self.mirror = mirror
        self.host = host
        self.hosts = hosts

    def begin(self, step: int) -> tuple[Batch, list[tuple[int, int]]]:
        positions = host_positions(self.start + step, self.batch_size, self.host, self.hosts)
        batch = {
            "images": self._pixels(),
            "labels": np.empty((self.share, *self.source.label_shape), label_type(self.source)),
            "faulty": np.full((self.share, _MOST_IN_A_ROW), -1),
        }
        if self.mirror:
            batch["mirrored"] = self.order.mirrored(positions)
        return batch, [*zip(positions.tolist(), self.order.indices(positions).tolist())]

    def fill(self, batch: Batch, images: list[tuple[int, int]], place: int) -> None:
        position, index = images[place]
        # No two positions share a generator, and position p has the same one in every run.
        rng = np.random.default_rng([self.order.seed, 1, position])
        image, faulty = batch["images"][place], batch["faulty"][place]
        batch["labels"][place] = self._crop(index, rng, image, faulty)

    def _crop(
        self, index: int, rng: np.random.Generator, image: np.ndarray, faulty: np.ndarray
    ) -> Label:
        """Fills in the image and the indices of undecodable ones before it; returns its label."""
        for attempt in range(_MOST_IN_A_ROW):
            candidate = (index + attempt) % len(self.source)
            try:
                data, label = self.source[candidate]
                decoding.train_crop(data, self.config, self.channels, rng, out=image)
                return label
            except DataError:
                faulty[attempt] = candidate
        raise DataError(
            f"data.name: {_MOST_IN_A_ROW} images in a row cannot be decoded, from "
            f"{self.source.image_name(index)} on; mend the data"
        )


class _Evaluation(Batches):
    """Undecodable images, and what fills the last batch, get weight 0."""

    def __init__(
        self, source: Source, config: Data, batch_size: int, host: int, hosts: int
    ) -> None:
        steps = -(-len(source) // batch_size)
        side = config.eval_size or config.image_size
        super().__init__(source, config, side, batch_size // hosts, steps)
        self.batch_size = batch_size
        self.host = host
        self.hosts = hosts

    def begin(self, step: int) -> tuple[Batch, list[int]]:
        batch = {
            "images": self._pixels(),
            "labels": np.zeros((self.share, *self.source.label_shape), label_type(self.source)),
            "weights": np.zeros(self.share, np.float32),
            "faulty": np.full(self.share, -1),
        }
        return batch, host_positions(step, self.batch_size, self.host, self.hosts).tolist()

    def fill(self, batch: Batch, images: list[int], place: int) -> None:
        index, pixels = images[place], batch["images"][place]
        if index >= len(self.source):
            pixels[:] = 0
            return
        try:
            data, batch["labels"][place] = self.source[index]
            pixels[:] = decoding.eval_crop(data, self.config, self.channels)
            batch["weights"][place] = 1.0
        except DataError:
            pixels[:] = 0
            batch["faulty"][place] = index


def stream_batches(
    source: Source,
    order: IndexSampler,
    config: Data,
    batch_size: int,
    start: int,
    stop: int,
    corrupt: Corrupt,
    mirror: bool = False,
    host: int = 0,
    hosts: int = 1,
) -> Generator[Batch, None, None]:
    """Training batches that are read, decoded and cropped as they are needed.

    Args:
      source: The encoded images.
      order: Of its images.
      config: Crop, workers, threads and prefetch.
      batch_size: On all hosts together.
      start: First batch.
      stop: The one after the last.
      corrupt: Counts what cannot be decoded.
      mirror: Say which images to mirror.
      host: This host.
      hosts: How many there are.

    Returns:
      As `memory_batches`.
    """
    batches = _Training(source, order, config, batch_size, start, stop, mirror, host, hosts)
    made = by_processes(batches, config) if config.workers else by_threads(batches, config)
    return reported(made, source, batches.channels, corrupt)


def streamed_evaluation_batches(
    source: Source,
    config: Data,
    batch_size: int,
    corrupt: Corrupt,
    host: int = 0,
    hosts: int = 1,
) -> Generator[Batch, None, None]:
    """`evaluation_batches` of a data set that does not lie in memory.

    Args:
      source: The encoded images.
      config: Crop, threads and prefetch.
      batch_size: On all hosts together.
      corrupt: Counts what cannot be decoded.
      host: This host.
      hosts: How many there are.

    Returns:
      As `evaluation_batches`.
    """
    batches = _Evaluation(source, config, batch_size, host, hosts)
    return reported(by_threads(batches, config), source, batches.channels, corrupt)


def by_threads(batches: Batches, config: Data) -> Generator[Batch, None, None]:
    """All threads work on one batch after the other, `prefetch` batches ahead."""
    begun: collections.deque[tuple[Batch, list[concurrent.futures.Future[None]]]]
    begun = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(config.threads, thread_name_prefix="decode")
    stopped = threading.Event()

    def fill(batch: Batch, images: Any, places: range) -> None:
        for place in places:
            if stopped.is_set():  # a large image takes seconds
                return
            batches.fill(batch, images, place)

    def begin(step: int) -> None:
        batch, images = batches.begin(step)
        firsts = range(0, batches.share, _AT_A_TIME)
        parts = [range(each, min(each + _AT_A_TIME, batches.share)) for each in firsts]
        begun.append((batch, [pool.submit(fill, batch, images, part) for part in parts]))

    def finish() -> Batch:
        batch, parts = begun.popleft()
        for part in parts:
            part.result()
        return batch

    try:
        for step in range(len(batches)):
            begin(step)
            if len(begun) > config.prefetch:
                yield finish()
        while begun:
            yield finish()
    finally:  # also where nobody wants the rest
        stopped.set()
        for part in itertools.chain.from_iterable(parts for _, parts in begun):
            part.cancel()
        pool.shutdown()


def reported(
    batches: Generator[Batch, None, None], source: Source, channels: int, corrupt: Corrupt
) -> Generator[Batch, None, None]:
    """Names the images that could not be decoded, with the reason."""
    with contextlib.closing(batches):  # its threads end here, also where too many are broken
        for batch in batches:
            faulty = batch.pop("faulty")
            for index in np.unique(faulty[faulty >= 0]).tolist():
                try:
                    decoding.decode(source[index][0], channels)
                    reason = "its crop cannot be decoded"
                except DataError as error:
                    reason = str(error)
                corrupt.add(source.image_name(index), reason)
            yield batch
