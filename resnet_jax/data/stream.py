"""Datasets whose images are read, decoded and cropped during the run.

Threads of this process divide the images of each batch among themselves and write them straight
into it. With worker processes (workers.py) each process makes whole batches.
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

from resnet_jax.config.schema import Config, Data
from resnet_jax.data import decode as decoding
from resnet_jax.data.corrupt import CorruptImages
from resnet_jax.data.memory import label_type
from resnet_jax.data.sampler import ALL, IndexSampler, Shard
from resnet_jax.data.sources import Source
from resnet_jax.data.sources.base import Batch, Label
from resnet_jax.data.workers import decode_in_processes
from resnet_jax.errors import DataError

# Consecutive images of a source that may all be undecodable.
_MAX_CONSECUTIVE_FAILURES = 16
# Images that a thread takes at a time: handing out single ones costs a tenth of decoding them.
_IMAGES_PER_TASK = 8


class StreamedDataset:
    """Encoded images that are decoded as they are needed; batches as from `InMemoryDataset`."""

    def __init__(self, source: Source, config: Data, corrupt: CorruptImages) -> None:
        self.source = source
        self.config = config
        self.corrupt = corrupt
        self.indices = np.arange(len(source))  # places of the images in the source

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels_known(self) -> bool:
        """Whether the source has its labels without reading the images."""
        return type(self.source).labels is not Source.labels

    def read_labels(self) -> np.ndarray:
        """The label of each image, int32 [N] or [N, classes]."""
        return self.source.labels()

    def class_counts(self, num_classes: int) -> np.ndarray:
        """Images of each class, int64 [classes]."""
        del num_classes  # the source knows
        return self.source.class_counts()

    def train_batches(
        self,
        sampler: IndexSampler,
        config: Config,
        start: int,
        stop: int,
        shard: Shard = ALL,
    ) -> Generator[Batch, None, None]:
        """As `InMemoryDataset.train_batches`."""
        batches = _TrainBatches(self, sampler, config, range(start, stop), shard)
        decode = decode_in_processes if self.config.workers else decode_in_threads
        return report_undecodable(decode(batches), batches, self.corrupt)

    def eval_batches(self, batch_size: int, shard: Shard = ALL) -> Generator[Batch, None, None]:
        """As `InMemoryDataset.eval_batches`; images that cannot be decoded have weight 0, too."""
        batches = _EvalBatches(self, batch_size, shard)
        return report_undecodable(decode_in_threads(batches), batches, self.corrupt)


class Batches(abc.ABC):
    """This process's shard of each batch, with random access; pickled for worker processes."""

    def __init__(
        self, source: Source, config: Data, image_size: int, batch_size: int, steps: int
    ) -> None:
        self.source = source
        self.config = config
        self.image_size = image_size
        self.batch_size = batch_size  # of this shard
        self.steps = steps
        self.channels = config.channels or source.channels

    def __len__(self) -> int:
        return self.steps

    def make(self, step: int, pixels: np.ndarray) -> Batch:
        """Decodes a whole batch into `pixels`, uint8 [N, S, S, C]."""
        batch, images = self.begin(step)
        batch["images"] = pixels
        for place in range(self.batch_size):
            self.fill(batch, images, place)
        return batch

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of a batch's images, which are uint8."""
        return self.batch_size, self.image_size, self.image_size, self.channels

    @abc.abstractmethod
    def begin(self, step: int) -> tuple[Batch, Any]:
        """An empty batch, and what `fill` needs to know about its images.

        "undecodable" is for the indices of images that cannot be decoded, -1 for none.
        """

    @abc.abstractmethod
    def fill(self, batch: Batch, images: Any, place: int) -> None:
        """Decodes the image at one place of a batch."""

    def _empty(self) -> Batch:
        labels = np.zeros((self.batch_size, *self.source.label_shape), label_type(self.source))
        return {"images": np.empty(self.shape, np.uint8), "labels": labels}


class _TrainBatches(Batches):
    """Replaces an undecodable image by the next one in the source.

    So the batches are still a function of the seed.
    """

    def __init__(
        self,
        dataset: StreamedDataset,
        sampler: IndexSampler,
        config: Config,
        steps: range,
        shard: Shard,
    ) -> None:
        data, self.global_batch_size = dataset.config, config.train.batch_size
        batch_size = shard.size(self.global_batch_size)
        super().__init__(dataset.source, data, data.image_size, batch_size, len(steps))
        self.sampler = sampler
        self.mirror = config.augment.flip_alternates
        self.first_step = steps.start
        self.shard = shard

    def begin(self, step: int) -> tuple[Batch, list[tuple[int, int]]]:
        positions = self.shard.positions(self.first_step + step, self.global_batch_size)
        batch = self._empty()
        batch["undecodable"] = np.full((self.batch_size, _MAX_CONSECUTIVE_FAILURES), -1)
        if self.mirror:
            batch["mirrored"] = self.sampler.mirrored(positions)
        return batch, [*zip(positions.tolist(), self.sampler.indices(positions).tolist())]

    def fill(self, batch: Batch, images: list[tuple[int, int]], place: int) -> None:
        position, index = images[place]
        # Each position has a generator of its own, which is the same in every run.
        rng = np.random.default_rng([self.sampler.seed, 1, position])
        pixels, undecodable = batch["images"][place], batch["undecodable"][place]
        batch["labels"][place] = self._crop(index, rng, pixels, undecodable)

    def _crop(
        self, index: int, rng: np.random.Generator, pixels: np.ndarray, undecodable: np.ndarray
    ) -> Label:
        """Crops the first decodable image from `index` on into `pixels`; returns its label."""
        for attempt in range(_MAX_CONSECUTIVE_FAILURES):
            candidate = (index + attempt) % len(self.source)
            try:
                data, label = self.source[candidate]
                decoding.train_crop(data, self.config, self.channels, rng, out=pixels)
                return label
            except DataError:
                undecodable[attempt] = candidate
        raise DataError(
            f"data.name: {_MAX_CONSECUTIVE_FAILURES} images in a row cannot be decoded, from "
            f"{self.source.image_name(index)} on; fix the data"
        )


class _EvalBatches(Batches):
    """Undecodable images, and the padding of the last batch, have weight 0."""

    def __init__(self, dataset: StreamedDataset, batch_size: int, shard: Shard) -> None:
        data, steps = dataset.config, -(-len(dataset) // batch_size)
        side = data.eval_size or data.image_size
        super().__init__(dataset.source, data, side, shard.size(batch_size), steps)
        self.global_batch_size = batch_size
        self.shard = shard

    def begin(self, step: int) -> tuple[Batch, list[int]]:
        batch = self._empty()
        batch["weights"] = np.zeros(self.batch_size, np.float32)
        batch["undecodable"] = np.full(self.batch_size, -1)
        return batch, self.shard.positions(step, self.global_batch_size).tolist()

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
            batch["undecodable"][place] = index


def decode_in_threads(batches: Batches) -> Generator[Batch, None, None]:
    """All threads work on one batch after the other, `data.prefetch` batches ahead."""
    config = batches.config
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
        firsts = range(0, batches.batch_size, _IMAGES_PER_TASK)
        parts = [range(x, min(x + _IMAGES_PER_TASK, batches.batch_size)) for x in firsts]
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
    finally:  # also where the consumer stops early
        stopped.set()
        for part in itertools.chain.from_iterable(parts for _, parts in begun):
            part.cancel()
        pool.shutdown()


def report_undecodable(
    decoded: Generator[Batch, None, None], batches: Batches, corrupt: CorruptImages
) -> Generator[Batch, None, None]:
    """Passes batches on and reports their undecodable images, each with the reason."""
    with contextlib.closing(decoded):  # ends its threads, also where too many images are broken
        for batch in decoded:
            undecodable = batch.pop("undecodable")
            for index in np.unique(undecodable[undecodable >= 0]).tolist():
                try:
                    decoding.decode(batches.source[index][0], batches.channels)
                    reason = "its crop cannot be decoded"
                except DataError as error:
                    reason = str(error)
                corrupt.add(batches.source.image_name(index), reason)
            yield batch
