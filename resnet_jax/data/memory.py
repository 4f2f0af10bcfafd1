"""Data sets that stay decoded in memory, and their batches."""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Generator

import numpy as np

from resnet_jax.config.schema import Data
from resnet_jax.data import decode as decoding
from resnet_jax.data.corrupt import Corrupt
from resnet_jax.data.sampler import IndexSampler, host_positions
from resnet_jax.data.sources import Source
from resnet_jax.data.sources.base import Batch, Label
from resnet_jax.errors import DataError


class InMemoryDataset:
    """A data set that lies decoded in memory, as one array.

    Args:
      images: uint8 [N, S, S, C].
      labels: int32 [N], or uint8 [N, classes] of 0 and 1 where an image may have several.
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
    image = side * side * channels + math.prod(source.label_shape)  # bytes, with its label
    return not varies and len(source) * image <= config.memory_gib * 2**30


def label_type(source: Source) -> type[np.integer]:
    """The type of labels in batches: a byte each, where an image has one for every class."""
    return np.uint8 if source.label_shape else np.int32


def _side(config: Data, training: bool) -> int:
    return config.image_size if training else config.eval_size or config.image_size


def load_memory(source: Source, config: Data, training: bool, corrupt: Corrupt) -> InMemoryDataset:
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

    def crop(index: int) -> tuple[np.ndarray, Label]:
        data, label = source[index]
        if training:
            return decoding.train_crop(data, config, channels, rng), label
        return decoding.eval_crop(data, config, channels), label

    images = np.empty((len(source), side, side, channels), np.uint8)
    labels = np.empty((len(source), *source.label_shape), label_type(source))
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
    return InMemoryDataset(images, labels)


def memory_batches(
    images: InMemoryDataset,
    order: IndexSampler,
    batch_size: int,
    start: int,
    stop: int,
    mirror: bool = False,
    host: int = 0,
    hosts: int = 1,
) -> Generator[Batch, None, None]:
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
      {"images": uint8 [N, S, S, C], "labels": int32 [N] or uint8 [N, classes]} for N =
      batch_size / hosts; with `mirror` also "mirrored": bool [N].

    Example:
      >>> data = InMemoryDataset(np.zeros((10, 2, 2, 1), np.uint8), np.arange(10, dtype=np.int32))
      >>> batches = list(memory_batches(data, IndexSampler(10, seed=0), 5, start=0, stop=2))
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
    order: IndexSampler,
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
      >>> choices = memory_choices(IndexSampler(10, seed=0), batch_size=5, start=0, steps=2)
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


def evaluation_batches(
    images: InMemoryDataset, batch_size: int, host: int = 0, hosts: int = 1
) -> Generator[Batch, None, None]:
    """Every image of a data set in memory once; all hosts give equally many batches.

    Args:
      images: The data set.
      batch_size: On all hosts together.
      host: This host.
      hosts: How many there are.

    Returns:
      {"images", "labels", "weights": float32 [N]}; weights are 0 for what fills the last batch.

    Example:
      >>> data = InMemoryDataset(np.zeros((5, 2, 2, 1), np.uint8), np.arange(5, dtype=np.int32))
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
