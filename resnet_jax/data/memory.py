"""Datasets that lie decoded in memory, and their batches."""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Generator

import numpy as np

from resnet_jax.config.schema import Config, Data
from resnet_jax.data import decode as decoding
from resnet_jax.data.corrupt import CorruptImages
from resnet_jax.data.sampler import ALL, IndexSampler, Shard
from resnet_jax.data.sources import Source
from resnet_jax.data.sources.base import Batch, Label, count_labels
from resnet_jax.errors import DataError


class InMemoryDataset:
    """Decoded images, uint8 [N, S, S, C], and labels, int32 [N] or uint8 [N, classes] of 0 and 1.

    `indices`, int [N], says where each image stands in the source, which may also have images that
    cannot be decoded.

    Example:
      >>> from resnet_jax.config.schema import Train
      >>> data = InMemoryDataset(np.zeros((10, 2, 2, 1), np.uint8), np.arange(10, dtype=np.int32))
      >>> config = Config(train=Train(batch_size=5))
      >>> batches = list(data.train_batches(IndexSampler(10, seed=0), config, start=0, stop=2))
      >>> sorted(np.concatenate([batch["labels"] for batch in batches]).tolist())
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
      >>> [batch["weights"].tolist() for batch in data.eval_batches(batch_size=6)]
      [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]
    """

    labels_known = True

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray | None = None
    ) -> None:
        self.images = images
        self.labels = labels
        self.indices = np.arange(len(labels)) if indices is None else indices

    @classmethod
    def decode(
        cls, source: Source, config: Data, training: bool, corrupt: CorruptImages
    ) -> InMemoryDataset:
        """Decodes all images of a source but those that cannot be decoded."""
        side, channels = _side(config, training), config.channels or source.channels
        rng = np.random.default_rng(0)  # a center crop draws no number

        def crop(index: int) -> tuple[np.ndarray, Label]:
            data, label = source[index]
            if training:
                return decoding.train_crop(data, config, channels, rng), label
            return decoding.eval_crop(data, config, channels), label

        images = np.empty((len(source), side, side, channels), np.uint8)
        labels = np.empty((len(source), *source.label_shape), label_type(source))
        good = np.ones(len(source), bool)

        def fill(indices: range) -> list[tuple[int, str]]:
            failures = []
            for index in indices:
                try:
                    images[index], labels[index] = crop(index)
                except DataError as error:
                    good[index] = False
                    failures.append((index, str(error)))
            return failures

        # A task for every image would take longer than decoding a small one.
        everything = range(len(source))
        chunks = [everything[i : i + 64] for i in everything[::64]]
        with concurrent.futures.ThreadPoolExecutor(config.threads) as pool:
            for failures in pool.map(fill, chunks):
                for index, error in failures:
                    corrupt.add(source.image_name(index), error)
        if not good.all():
            images, labels = images[good], labels[good]
        return cls(images, labels, np.flatnonzero(good))

    def __len__(self) -> int:
        return len(self.labels)

    def read_labels(self) -> np.ndarray:
        """The label of each image, int32 [N] or uint8 [N, classes]."""
        return self.labels

    def class_counts(self, num_classes: int) -> np.ndarray:
        """Images of each class, int64 [classes]."""
        return count_labels(self.labels, num_classes)

    def train_batches(
        self,
        sampler: IndexSampler,
        config: Config,
        start: int,
        stop: int,
        shard: Shard = ALL,
    ) -> Generator[Batch, None, None]:
        """This shard of the training batches from `start` to before `stop`.

        Yields {"images": uint8 [N, S, S, C], "labels": int32 [N] or uint8 [N, classes]} for N =
        train.batch_size / shard.count; with augment.flip_alternates also "mirrored": bool [N].
        """
        for step in range(start, stop):
            batch = index_batch(sampler, config, step, 1, shard)
            batch = {name: x[:, 0] for name, x in batch.items()}
            chosen = batch.pop("indices")
            yield {"images": self.images[chosen], "labels": self.labels[chosen], **batch}

    def eval_batches(self, batch_size: int, shard: Shard = ALL) -> Generator[Batch, None, None]:
        """This shard of batches that have every image once; all shards have equally many.

        Yields {"images", "labels", "weights": float32 [N]} for N = batch_size / shard.count.
        Weights are 1 for images and 0 for the padding of the last batch.
        """
        for step in range(-(-len(self) // batch_size)):
            positions = shard.positions(step, batch_size)
            real = positions < len(self)
            chosen = np.where(real, positions, 0)
            yield {
                "images": self.images[chosen],
                "labels": self.labels[chosen],
                "weights": real.astype(np.float32),
            }


def index_batch(
    sampler: IndexSampler, config: Config, start: int, steps: int, shard: Shard = ALL
) -> Batch:
    """Which images are in the batches of several steps, for a dataset that lies on the devices.

    Returns {"indices": int32 [N, steps]} for N = train.batch_size / shard.count; with
    augment.flip_alternates also "mirrored": bool [N, steps].
    """
    size = config.train.batch_size
    positions = np.stack(
        [shard.positions(step, size) for step in range(start, start + steps)], axis=1
    )
    flat = positions.ravel()
    batch = {"indices": sampler.indices(flat).astype(np.int32)}
    if config.augment.flip_alternates:
        batch["mirrored"] = sampler.mirrored(flat)
    return {name: x.reshape(positions.shape) for name, x in batch.items()}


def fits_memory(source: Source, config: Data, training: bool) -> bool:
    """Whether crops are always the same, and take at most data.memory_gib together."""
    side, channels = _side(config, training), config.channels or source.channels
    varies = training and config.crop != "center"
    image = side * side * channels + math.prod(source.label_shape)  # bytes, with its label
    return not varies and len(source) * image <= config.memory_gib * 2**30


def label_type(source: Source) -> type[np.integer]:
    """The type of labels in batches: one byte for each class where images have sets of labels."""
    return np.uint8 if source.label_shape else np.int32


def _side(config: Data, training: bool) -> int:
    return config.image_size if training else config.eval_size or config.image_size
