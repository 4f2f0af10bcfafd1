"""Batches of a run: batch number k follows from (seed, k), whoever reads it and in how many parts.

The images of a run form one endless stream: epoch after epoch, each in an order of its own drawn
from (seed, epoch). Position p of the stream is in batch p // B. Resuming is starting at another
position, and hosts that each read their part of every batch read disjoint parts of one stream.
"""

from __future__ import annotations

import concurrent.futures
import functools
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np

from resnet_jax.data import decode
from resnet_jax.data.sources import Source
from resnet_jax.errors import DataError
from resnet_jax.training.config import Data

Batch = dict[str, Any]  # of arrays


class Corrupt:
    """Names the images that cannot be decoded, and stops a run that meets too many.

    Args:
      limit: How many are skipped.
      report: Called with one line for each.

    Example:
      >>> corrupt = Corrupt(limit=1, report=print)
      >>> corrupt.add("train/cat/1.jpg", "truncated")
      skipped train/cat/1.jpg: truncated
      >>> corrupt.add("train/cat/1.jpg", "truncated")
      >>> corrupt.count
      1
    """

    def __init__(self, limit: int, report: Any) -> None:
        self.limit = limit
        self.report = report
        self._names: set[str] = set()

    @property
    def count(self) -> int:
        """How many images were skipped so far."""
        return len(self._names)

    def add(self, name: str, reason: str) -> None:
        """Counts one image, once; raises DataError past the limit."""
        if name in self._names:
            return
        self._names.add(name)
        self.report(f"skipped {name}: {reason}")
        if self.count > self.limit:
            raise DataError(
                f"data.max_corrupt = {self.limit}: more images than that cannot be decoded, the "
                f"last {name} ({reason}); mend the data or raise the limit"
            )


class MemoryImages:
    """A data set that lies decoded in memory, as one array.

    Args:
      images: uint8 [N, S, S, C].
      labels: int32 [N].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


def fits_memory(source: Source, config: Data, training: bool) -> bool:
    """Whether a data set is decoded once and kept.

    Args:
      source: The encoded images.
      config: With the crop and the limit in GiB.
      training: For training; otherwise for evaluation.

    Returns:
      True where the crops are always the same and small enough together.
    """
    side, channels = _side(config, training), config.channels or source.channels
    varies = training and config.crop != "center"
    return not varies and len(source) * side * side * channels <= config.memory_gib * 2**30


def _side(config: Data, training: bool) -> int:
    return config.image_size if training else config.eval_size or config.image_size


def load_memory(source: Source, config: Data, training: bool, corrupt: Corrupt) -> MemoryImages:
    """Decodes a whole data set.

    Args:
      source: The encoded images.
      config: With crop, channels, interpolation and threads.
      training: For training; otherwise for evaluation.
      corrupt: Counts what cannot be decoded; that is left out.

    Returns:
      Its images and labels.
    """
    side, channels = _side(config, training), config.channels or source.channels
    rng = np.random.default_rng(0)  # a centre crop draws nothing

    def crop(index: int) -> tuple[np.ndarray, int]:
        data, label = source[index]
        if training:
            return decode.train_crop(data, config, channels, rng), label
        return decode.eval_crop(data, config, channels), label

    images = np.empty((len(source), side, side, channels), np.uint8)
    labels = np.empty(len(source), np.int32)
    good = np.ones(len(source), bool)

    def fill(index: int) -> tuple[int, str] | None:
        try:
            images[index], labels[index] = crop(index)
        except DataError as error:
            good[index] = False
            return index, str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(config.threads) as pool:
        for fault in pool.map(fill, range(len(source)), chunksize=64):
            if fault is not None:
                corrupt.add(source.image_name(fault[0]), fault[1])
    if not good.all():
        images, labels = images[good], labels[good]
    return MemoryImages(images, labels)


_APART = 64


class Order:
    """Which image stands at each position of the stream.

    Args:
      images: Number of images.
      seed: Of the run.
      repeats: Times each image appears. The copies stand 64 positions apart, so that they are in
        one batch and yet mixing, which pairs neighbours, pairs different images.

    Example:
      >>> order = Order(images=4, seed=0)
      >>> sorted(order.indices(np.arange(4, 8)).tolist())
      [0, 1, 2, 3]
    """

    def __init__(self, images: int, seed: int, repeats: int = 1) -> None:
        self.images = images
        self.seed = seed
        self.repeats = repeats

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The image at each position, [len(positions)]."""
        return self._find(positions)[0]

    def mirrored(self, positions: np.ndarray) -> np.ndarray:
        """Whether an image's turn to be mirrored is odd: every other epoch, bool."""
        found, epochs = self._find(positions)
        return _first_mirrored(self.images, self.seed)[found] ^ (epochs % 2 == 1)

    def _find(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(image, epoch) at each position."""
        blocks = positions // (_APART * self.repeats)
        slots = blocks * _APART + positions % _APART
        epochs, places = np.divmod(slots, self.images)
        found = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = _permutation(self.images, self.seed, int(epoch))[places[chosen]]
        return found, epochs


@functools.lru_cache(maxsize=4)
def _first_mirrored(images: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 2]).integers(2, size=images, dtype=np.uint8) == 1


@functools.lru_cache(maxsize=4)
def _permutation(images: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(images)


def host_positions(step: int, batch_size: int, host: int, hosts: int) -> np.ndarray:
    """Positions of a host's part of a batch; hosts take it in the order of their devices.

    Args:
      step: Number of the batch.
      batch_size: Images in it on all hosts together.
      host: This one.
      hosts: How many there are.

    Returns:
      [batch_size / hosts].

    Example:
      >>> host_positions(step=2, batch_size=8, host=1, hosts=2).tolist()
      [20, 21, 22, 23]
    """
    share = batch_size // hosts
    return step * batch_size + host * share + np.arange(share)


def memory_batches(
    images: MemoryImages,
    order: Order,
    batch_size: int,
    start: int,
    stop: int,
    mirror: bool = False,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[Batch]:
    """Training batches of a data set in memory.

    Args:
      images: The data set.
      order: Of its images.
      batch_size: On all hosts together.
      start: First batch.
      stop: The one after the last.
      mirror: Say which images to mirror.
      host: This host.
      hosts: How many there are.

    Returns:
      {"images": uint8 [N, S, S, C], "labels": int32 [N]} for N = batch_size / hosts; with
      `mirror` also "mirrored": bool [N].

    Example:
      >>> data = MemoryImages(np.zeros((10, 2, 2, 1), np.uint8), np.arange(10, dtype=np.int32))
      >>> batches = list(memory_batches(data, Order(10, seed=0), 5, start=0, stop=2))
      >>> sorted(np.concatenate([batch["labels"] for batch in batches]).tolist())
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    for step in range(start, stop):
        batch = {
            name: x[:, 0]
            for name, x in memory_choices(order, batch_size, step, 1, mirror, host, hosts).items()
        }
        chosen = batch.pop("indices")
        yield {"images": images.images[chosen], "labels": images.labels[chosen], **batch}


def memory_choices(
    order: Order,
    batch_size: int,
    start: int,
    steps: int,
    mirror: bool = False,
    host: int = 0,
    hosts: int = 1,
) -> Batch:
    """What is in the batches of several steps, for a data set that lies on the devices.

    Args:
      order: Of its images.
      batch_size: On all hosts together.
      start: First batch.
      steps: Number of batches.
      mirror: Say which images to mirror.
      host: This host.
      hosts: How many there are.

    Returns:
      {"indices": int32 [N, steps]} for N = batch_size / hosts; with `mirror` also "mirrored":
      bool [N, steps].

    Example:
      >>> choices = memory_choices(Order(10, seed=0), batch_size=5, start=0, steps=2)
      >>> sorted(choices["indices"].ravel().tolist())
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    each = [host_positions(step, batch_size, host, hosts) for step in range(start, start + steps)]
    positions = np.stack(each, axis=1)
    flat = positions.ravel()
    found = {"indices": order.indices(flat).astype(np.int32)}
    if mirror:
        found["mirrored"] = order.mirrored(flat)
    return {name: x.reshape(positions.shape) for name, x in found.items()}


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


def evaluation_batches(
    images: MemoryImages, batch_size: int, host: int = 0, hosts: int = 1
) -> Iterator[Batch]:
    """Every image of a data set in memory once; all hosts give equally many batches.

    Args:
      images: The data set.
      batch_size: On all hosts together.
      host: This host.
      hosts: How many there are.

    Returns:
      {"images", "labels", "weights": float32 [N]}; weights are 0 for what fills the last batch.

    Example:
      >>> data = MemoryImages(np.zeros((5, 2, 2, 1), np.uint8), np.arange(5, dtype=np.int32))
      >>> [batch["weights"].tolist() for batch in evaluation_batches(data, 4)]
      [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    """
    for step in range(-(-len(images) // batch_size)):
        positions = host_positions(step, batch_size, host, hosts)
        real = positions < len(images)
        chosen = np.where(real, positions, 0)
        yield {
            "images": images.images[chosen],
            "labels": images.labels[chosen],
            "weights": real.astype(np.float32),
        }


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
        side = _side(self.config, training=False)
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
