"""Whole images at several scales, in batches of one shape (He et al. 2015, section 3.4).

The network takes images of any shape, but each shape is a program to compile, and padding would
enter the result through the convolutions. So a batch has images of one ratio of the sides, rounded
to a twelfth (1, 5/4, 4/3 and 3/2 are exact): they are resized to one shape for each scale, whole,
stretched by 1/24 at most, and nothing is padded. Beyond 3 the ratio counts as 3: 49 ratios in all.
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
from resnet_jax.data.corrupt import Corrupt
from resnet_jax.data.sources.base import Batch, Source
from resnet_jax.data.stream import Batches, by_threads, reported
from resnet_jax.errors import DataError

_PARTS = 12
_MOST = 3


class Ratio(NamedTuple):
    """The ratio of an image's sides, rounded.

    Args:
      twelfths: Of the longer side by the shorter.
      upright: The height is the longer side.

    Example:
      >>> Ratio.of(375, 500), Ratio.of(375, 500).shape(shorter=224)
      (Ratio(twelfths=16, upright=False), (224, 299))
    """

    twelfths: int
    upright: bool

    @classmethod
    def of(cls, height: int, width: int) -> Ratio:
        """The ratio of an image of so many pixels."""
        ratio = max(height, width) / min(height, width)
        twelfths = round(min(ratio, _MOST) * _PARTS)
        return cls(twelfths, height > width and twelfths > _PARTS)

    def shape(self, shorter: int) -> tuple[int, int]:
        """Height and width where the shorter side has that length."""
        longer = round(shorter * self.twelfths / _PARTS)
        return (longer, shorter) if self.upright else (shorter, longer)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which images are in which batch.

    Args:
      ratios: Of the images of each batch.
      indices: Of the images, [steps, batch size]; -1 fills a ratio's last batch.
    """

    ratios: tuple[Ratio, ...]
    indices: np.ndarray


def plan_batches(source: Source, batch_size: int, threads: int) -> Plan:
    """Sorts images by the ratio of their sides, which takes their headers only.

    Args:
      source: The encoded images.
      batch_size: On all hosts together.
      threads: That read.

    Returns:
      The same plan on every host.
    """
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
    return Plan(tuple(ratios), np.array(rows, np.int64).reshape(-1, batch_size))


def _ratio(source: Source, index: int) -> Ratio:
    if source.image_shape is not None:
        return Ratio.of(*source.image_shape)
    try:
        header = decoding.read_header(io.BytesIO(source[index][0]))
        return Ratio.of(header.height, header.width)
    except (DataError, OSError):  # whatever is wrong with it, decoding will say
        return Ratio(_PARTS, upright=False)


class _Scaled(Batches):
    """Undecodable images, and what fills a batch, get weight 0."""

    def __init__(
        self,
        source: Source,
        config: Data,
        scales: Sequence[int],
        plan: Plan,
        host: int,
        hosts: int,
    ) -> None:
        steps, size = plan.indices.shape
        super().__init__(source, config, 0, size // hosts, steps)
        self.scales = tuple(scales)
        self.plan = plan
        self.part = slice(host * self.share, (host + 1) * self.share)

    def begin(self, step: int) -> tuple[Batch, list[int]]:
        shapes = [self.plan.ratios[step].shape(shorter) for shorter in self.scales]
        batch = {
            "images": [np.zeros((self.share, *shape, self.channels), np.uint8) for shape in shapes],
            "labels": np.zeros((self.share, *self.source.label_shape), np.int32),
            "weights": np.zeros(self.share, np.float32),
            "faulty": np.full(self.share, -1),
        }
        return batch, self.plan.indices[step, self.part].tolist()

    def fill(self, batch: Batch, images: Any, place: int) -> None:
        index = images[place]
        if index < 0:
            return
        data, batch["labels"][place] = self.source[index]
        shapes = [scaled.shape[1:3] for scaled in batch["images"]]

        def beside(height: int, width: int) -> int:
            return max(decoding.resize_bytes(height, h, w, self.channels) for h, w in shapes)

        try:
            with decoding.decoded(data, self.channels, beside) as pixels:
                for scaled, shape in zip(batch["images"], shapes):
                    scaled[place] = resize(pixels, shape, self.config.interpolation)
            batch["weights"][place] = 1.0
        except DataError:
            batch["faulty"][place] = index


def resize(pixels: np.ndarray, shape: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resizes an image with Pillow's antialiased filters, as for evaluation.

    Args:
      pixels: uint8 [H, W, C].
      shape: New height and width in pixels; an image that has them is not resampled.
      interpolation: "bilinear" or "bicubic".

    Returns:
      uint8 [*shape, C].

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
    plan: Plan,
    corrupt: Corrupt,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[Batch]:
    """Every image of a data set once, at several scales; all hosts give equally many batches.

    Args:
      source: The encoded images.
      config: Channels, interpolation, threads and prefetch.
      scales: Shorter sides in pixels.
      plan: From `plan_batches`.
      corrupt: Counts what cannot be decoded.
      host: This host.
      hosts: How many there are.

    Returns:
      {"images": uint8 [N, H, W, C] for each scale, "labels", "weights"}, where weights are 0 for
      what fills a batch.
    """
    batches = _Scaled(source, config, scales, plan, host, hosts)
    return reported(by_threads(batches, config), source, batches.channels, corrupt)
