"""Whole images at several scales, in batches of one shape (He et al. 2015, section 3.4).

The network takes images of any shape, but each shape is a program to compile, and padding would
change the result through the convolutions. So a batch has images of one ratio of the sides, rounded
to a twelfth (1, 5/4, 4/3 and 3/2 are exact): they are resized to one shape for each scale, whole
and stretched by 1/24 at most. A ratio beyond 3 counts as 3: 49 ratios in all.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.config.schema import Data
from resnet_jax.data import decode as decoding
from resnet_jax.data.corrupt import CorruptImages
from resnet_jax.data.sampler import ALL, Shard
from resnet_jax.data.sources.base import Batch, Source
from resnet_jax.data.stream import Batches, decode_in_threads, report_undecodable
from resnet_jax.errors import DataError

_PARTS = 12
_MAX_RATIO = 3


class Ratio(NamedTuple):
    """The ratio of an image's longer side to its shorter one, in twelfths, and its orientation.

    Example:
      >>> Ratio.of(375, 500), Ratio.of(375, 500).shape(shorter=224)
      (Ratio(twelfths=16, upright=False), (224, 299))
    """

    twelfths: int
    upright: bool  # the height is the longer side

    @classmethod
    def of(cls, height: int, width: int) -> Ratio:
        """The rounded ratio of an image of height x width pixels."""
        ratio = max(height, width) / min(height, width)
        twelfths = round(min(ratio, _MAX_RATIO) * _PARTS)
        return cls(twelfths, height > width and twelfths > _PARTS)

    def shape(self, shorter: int) -> tuple[int, int]:
        """Height and width of an image of this ratio whose shorter side has that length."""
        longer = round(shorter * self.twelfths / _PARTS)
        return (longer, shorter) if self.upright else (shorter, longer)


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The ratio of each batch, and the images in it: [steps, batch size], -1 for padding."""

    ratios: tuple[Ratio, ...]
    indices: np.ndarray


def plan_batches(source: Source, batch_size: int, threads: int) -> BatchPlan:
    """Groups images by their ratio, read from their headers; the same plan in every process."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda index: _ratio(source, index), range(len(source))))
    groups: dict[Ratio, list[int]] = {}
    for index, ratio in enumerate(found):
        groups.setdefault(ratio, []).append(index)
    ratios, rows = [], []
    for ratio, indices in sorted(groups.items()):
        for start in range(0, len(indices), batch_size):
            row = indices[start : start + batch_size]
            ratios.append(ratio)
            rows.append(row + [-1] * (batch_size - len(row)))
    return BatchPlan(tuple(ratios), np.array(rows, np.int64).reshape(-1, batch_size))


def _ratio(source: Source, index: int) -> Ratio:
    if source.image_shape is not None:
        return Ratio.of(*source.image_shape)
    try:
        header = decoding.read_header(io.BytesIO(source[index][0]))
        return Ratio.of(header.height, header.width)
    except (DataError, OSError):  # decoding reports what is wrong with it
        return Ratio(_PARTS, upright=False)


class _ScaledBatches(Batches):
    """Undecodable images, and the padding of a batch, have weight 0."""

    def __init__(
        self, source: Source, config: Data, scales: Sequence[int], plan: BatchPlan, shard: Shard
    ) -> None:
        steps, batch_size = plan.indices.shape
        super().__init__(source, config, 0, shard.size(batch_size), steps)
        self.scales = tuple(scales)
        self.plan = plan
        self.shard = shard

    def begin(self, step: int) -> tuple[Batch, list[int]]:
        shapes = [self.plan.ratios[step].shape(shorter) for shorter in self.scales]
        size, channels = self.batch_size, self.channels
        batch = {
            "images": [np.zeros((size, *shape, channels), np.uint8) for shape in shapes],
            "labels": np.zeros((size, *self.source.label_shape), np.int32),
            "weights": np.zeros(size, np.float32),
            "undecodable": np.full(size, -1),
        }
        places = self.shard.positions(0, self.plan.indices.shape[1])
        return batch, self.plan.indices[step, places].tolist()

    def fill(self, batch: Batch, images: Any, place: int) -> None:
        index = images[place]
        if index < 0:
            return
        data, batch["labels"][place] = self.source[index]
        shapes = [scaled.shape[1:3] for scaled in batch["images"]]

        def resize_bytes(height: int, width: int) -> int:
            return max(decoding.resize_bytes(height, h, w, self.channels) for h, w in shapes)

        try:
            with decoding.decoded(data, self.channels, resize_bytes) as pixels:
                for scaled, shape in zip(batch["images"], shapes):
                    scaled[place] = resize(pixels, shape, self.config.interpolation)
            batch["weights"][place] = 1.0
        except DataError:
            batch["undecodable"][place] = index


def resize(pixels: np.ndarray, shape: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resizes an image, uint8 [H, W, C], with Pillow's antialiased filters, as for evaluation.

    An image that has the shape (height, width) already is not resampled.

    Example:
      >>> resize(np.zeros((375, 500, 3), np.uint8), (224, 299), "bilinear").shape
      (224, 299, 3)
    """
    if pixels.shape[:2] == tuple(shape):
        return pixels
    return decoding.resize(pixels, *shape, interpolation)


def scaled_batches(
    source: Source,
    config: Data,
    scales: Sequence[int],
    plan: BatchPlan,
    corrupt: CorruptImages,
    shard: Shard = ALL,
) -> Iterator[Batch]:
    """Every image once, at several scales (shorter sides in pixels); equally many batches a shard.

    Yields {"images": uint8 [N, H, W, C] for each scale, "labels", "weights"}; weights are 0 for
    padding.
    """
    batches = _ScaledBatches(source, config, scales, plan, shard)
    return report_undecodable(decode_in_threads(batches), batches, corrupt)
