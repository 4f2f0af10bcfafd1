"""Batches that are read, decoded and cropped while the run goes on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from resnet_jax.data import decode
from resnet_jax.data.base import Batch
from resnet_jax.data.corrupt import Corrupt
from resnet_jax.data.order import Order, host_positions
from resnet_jax.data.sources import Source
from resnet_jax.errors import DataError
from resnet_jax.training.config import Data

# Undecodable images that may follow each other in a source.
_MOST_IN_A_ROW = 16


class _Stream:
    """Random access to this host's part of the stream, for Grain to read in parallel.

    An image that cannot be decoded is replaced by the one after it in the source, so that the
    stream stays a function of the seed; its index travels along to be reported.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        config: Data,
        batch_size: int,
        start: int,
        stop: int,
        host: int,
        hosts: int,
        mirror: bool,
    ) -> None:
        self.source = source
        self.order = order
        self.config = config
        self.mirror = mirror
        self.batch_size = batch_size
        self.start = start
        self.host = host
        self.hosts = hosts
        self.share = batch_size // hosts
        self._length = (stop - start) * self.share

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> Batch:
        step, place = divmod(int(item), self.share)
        position = (self.start + step) * self.batch_size + self.host * self.share + place
        index = int(self.order.indices(np.array([position]))[0])
        # No two positions share a generator, and position p has the same one in every run.
        rng = np.random.default_rng([self.order.seed, 1, position])
        channels = self.config.channels or self.source.channels
        faulty = np.full(_MOST_IN_A_ROW, -1)
        for attempt in range(_MOST_IN_A_ROW):
            candidate = (index + attempt) % len(self.source)
            data, label = self.source[candidate]
            try:
                image = decode.train_crop(data, self.config, channels, rng)
            except DataError:
                faulty[attempt] = candidate
            else:
                found = {"images": image, "labels": np.int32(label), "faulty": faulty}
                if self.mirror:
                    found["mirrored"] = self.order.mirrored(np.array([position]))[0]
                return found
        raise DataError(
            f"data.name: {_MOST_IN_A_ROW} images in a row cannot be decoded, from "
            f"{self.source.image_name(index)} on; mend the data"
        )


def stream_batches(
    source: Source,
    order: Order,
    config: Data,
    batch_size: int,
    start: int,
    stop: int,
    corrupt: Corrupt,
    mirror: bool = False,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[Batch]:
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
    import grain

    share = batch_size // hosts
    stream = _Stream(source, order, config, batch_size, start, stop, host, hosts, mirror)
    images = grain.MapDataset.source(stream)
    if config.workers:  # each process takes whole batches, in turn
        _mark_flags_parsed()
        threads = min(config.threads, config.prefetch)
        options = grain.ReadOptions(threads, prefetch_buffer_size=config.prefetch)
        dataset = images.batch(share).to_iter_dataset(options)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(config.workers))
    else:  # each thread takes single images
        options = grain.ReadOptions(config.threads, prefetch_buffer_size=config.prefetch * share)
        dataset = images.to_iter_dataset(options).batch(share)
    for batch in dataset:
        _report(source, batch.pop("faulty"), corrupt)
        yield batch


class _Evaluated:
    """Random access to this host's part of an evaluation; undecodable images get weight 0."""

    def __init__(self, source: Source, config: Data, positions: np.ndarray) -> None:
        self.source = source
        self.config = config
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> Batch:
        channels = self.config.channels or self.source.channels
        position = int(self.positions[item])
        side = self.config.eval_size or self.config.image_size
        image, label = np.zeros((side, side, channels), np.uint8), 0
        weight, faulty = 0.0, -1
        if position < len(self.source):
            data, label = self.source[position]
            try:
                image, weight = decode.eval_crop(data, self.config, channels), 1.0
            except DataError:
                faulty = position
        return {
            "images": image,
            "labels": np.int32(label),
            "weights": np.float32(weight),
            "faulty": np.int64(faulty),
        }


def streamed_evaluation_batches(
    source: Source,
    config: Data,
    batch_size: int,
    corrupt: Corrupt,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[Batch]:
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
    import grain

    steps = range(-(-len(source) // batch_size))
    positions = np.concatenate([host_positions(k, batch_size, host, hosts) for k in steps])
    share = batch_size // hosts
    options = grain.ReadOptions(config.threads, prefetch_buffer_size=config.prefetch * share)
    evaluated = _Evaluated(source, config, positions)
    for batch in grain.MapDataset.source(evaluated).to_iter_dataset(options).batch(share):
        _report(source, batch.pop("faulty"), corrupt)
        yield batch


def _report(source: Source, faulty: np.ndarray, corrupt: Corrupt) -> None:
    """Names the images whose indices are not -1, with the reason."""
    for index in np.unique(faulty[faulty >= 0]):
        try:
            decode.decode(source[int(index)][0], source.channels)
            reason = "its crop cannot be decoded"
        except DataError as error:
            reason = str(error)
        corrupt.add(source.image_name(int(index)), reason)


def _mark_flags_parsed() -> None:
    """Grain's worker processes read absl flags; in a notebook nobody has parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
