"""The training batches of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Generator

from resnet_jax.config.schema import Config
from resnet_jax.data.pipeline import (
    Batch,
    Corrupt,
    IndexSampler,
    InMemoryDataset,
    fits_memory,
    load_memory,
    memory_batches,
    stream_batches,
)
from resnet_jax.data.sources import Source
from resnet_jax.errors import DataError


def load_images(
    config: Config, source: Source, training: bool, corrupt: Corrupt
) -> InMemoryDataset | Source:
    """The decoded data set where it fits in memory, else the source itself.

    Args:
      config: The configuration of a run.
      source: Its data set.
      training: For training; otherwise for evaluation.
      corrupt: Counts what cannot be decoded; that is left out.

    Raises:
      DataError: No image can be decoded.
    """
    if not fits_memory(source, config.data, training):
        return source
    images = load_memory(source, config.data, training, corrupt)
    if len(images) == 0:
        raise DataError(f"data.name = {config.data.name!r}: none of its images can be decoded")
    return images


def training_batches(
    config: Config,
    data: InMemoryDataset | Source,
    order: IndexSampler,
    start: int,
    stop: int,
    corrupt: Corrupt,
    host: int = 0,
    hosts: int = 1,
) -> Generator[Batch, None, None]:
    """A host's part of the batches of steps start to stop.

    Args:
      config: The configuration of a run.
      data: From `load_images`.
      order: Of its images.
      start: First batch.
      stop: The one after the last.
      corrupt: Counts what cannot be decoded.
      host: This host.
      hosts: How many there are.

    Returns:
      {"images": uint8 [N, S, S, C], "labels": int32 [N]} for N = train.batch_size / hosts; with
      augment.flip_alternates also "mirrored": bool [N].
    """
    size, mirror = config.train.batch_size, config.augment.flip_alternates
    if isinstance(data, InMemoryDataset):
        return memory_batches(data, order, size, start, stop, mirror, host, hosts)
    return stream_batches(data, order, config.data, size, start, stop, corrupt, mirror, host, hosts)
