"""Runs a network on images in batches of one size, while threads read the next ones."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from resnet_jax.config.schema import INTERPOLATIONS
from resnet_jax.distributed.data_parallel import compile_outputs, shard_batch
from resnet_jax.distributed.device_memory import check_batch_memory, explain_out_of_memory
from resnet_jax.errors import ConfigError, DataError, WeightsError
from resnet_jax.inference.images import in_threads, name_of, read_crop
from resnet_jax.limits import MAX_BATCH
from resnet_jax.weights.network import Network

# For each image of a batch, its place and its name, or the reason why it cannot be read.
_Entries = list[tuple[int, str] | DataError]


class BatchPredictor:
    """A function of a network's images, compiled once, for any number of them.

    Batches are filled up to one size, so that one program computes all images: the outputs for an
    image depend neither on the others nor on their number.

    Called with images, it yields the outputs of each, or a DataError for one that cannot be read.

    Args:
      network: The network.
      function: (variables, normalized images [N, S, S, C]) -> outputs [N, ...].
      batch_size: Images per batch, rounded up to a multiple of the devices. Default: a fast size.

    Raises:
      ConfigError: The batch size is below 0 or above what memory holds.
      WeightsError: The network's outputs are not finite from the first image on.

    Example:
      >>> import jax.numpy as jnp, resnet_jax as rj
      >>> network = Network("", "", rj.ResNet20(), {}, rj.Preprocessing(image_size=2), 3, ())
      >>> mean = BatchPredictor(network, lambda variables, images: images.mean((1, 2, 3)))
      >>> [row.item() > 2 for row in mean([np.full((4, 4, 3), 255, np.uint8)])]
      [True]
    """

    def __init__(
        self, network: Network, function: Callable[[Any, jax.Array], Any], batch_size: int = 0
    ) -> None:
        if not 0 <= batch_size <= MAX_BATCH:
            raise ConfigError(
                f"--batch_size={batch_size}: must be from 1 to {MAX_BATCH:,}, or 0 to choose"
            )
        if network.crop.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"{network.source}: its images are resized by {network.crop.interpolation!r}; here "
                f"there is {' and '.join(INTERPOLATIONS)}"
            )
        self._network = network
        # A user's own photos are rotated upright, however the evaluated images were stored.
        self._data = dataclasses.replace(network.crop, upright=network.upright is not False)
        self._side = network.preprocessing.image_size
        devices = jax.local_device_count()
        self.batch_size = -(-(batch_size or _fast_batch(self._side)) // devices) * devices
        self._shape = (self.batch_size, self._side, self._side, network.channels)
        check_batch_memory(
            network.model,
            self._shape,
            f"--batch_size={self.batch_size} of {self._side}x{self._side} pixels",
        )
        self._function = function

    @functools.cached_property
    def _compiled(self) -> Callable[[Any], Any]:
        network, function = self._network, self._function
        return compile_outputs(
            lambda variables, images: function(variables, network.preprocessing.normalize(images)),
            network.variables,
            jax.ShapeDtypeStruct(self._shape, np.uint8),
        )

    def __call__(self, images: Iterable[Any]) -> Iterator[np.ndarray | DataError]:
        what = f"a batch of {self.batch_size} images of {self._side}x{self._side} pixels"
        with explain_out_of_memory(what, "take a smaller --batch_size"):
            works = False  # whether any outputs were finite
            for entries, outputs in self._computed(images):
                rows = np.asarray(outputs)  # [D, N / D, ...]
                rows = rows.reshape(-1, *rows.shape[2:])
                finite = np.isfinite(rows).reshape(len(rows), -1).all(1)
                works = works or any(
                    finite[entry[0]] for entry in entries if not isinstance(entry, DataError)
                )
                for entry in entries:
                    if isinstance(entry, DataError):
                        yield entry
                    elif finite[entry[0]]:
                        yield rows[entry[0]]
                    else:
                        yield self._not_finite(entry[1], works)

    def _not_finite(self, name: str, works: bool) -> DataError:
        if works:
            return DataError(f"{name}: the network's outputs for it are not finite numbers")
        raise WeightsError(
            f"{self._network.source}: the network's outputs are not finite numbers, such as for "
            f"{name}; take another state or file"
        )

    def _computed(self, images: Iterable[Any]) -> Iterator[tuple[_Entries, Any]]:
        # Fetches one batch while the devices compute the next.
        waiting: collections.deque[tuple[_Entries, Any]] = collections.deque()
        for entries, pixels in self._batches(images):
            waiting.append((entries, self._compiled(shard_batch(pixels))))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting

    def crop(self, image: Any) -> np.ndarray:
        """Reads the crop of an image that the network sees, uint8 [S, S, channels]."""
        return read_crop(image, self._network.channels, self._data)

    def _batches(self, images: Iterable[Any]) -> Iterator[tuple[_Entries, np.ndarray]]:
        entries: _Entries = []
        pixels, filled = np.zeros(self._shape, np.uint8), 0
        names: collections.deque[str] = collections.deque()  # images that are being read
        crops = in_threads(self.crop, _noting_names(images, names), ahead=2 * self.batch_size)
        for crop in crops:
            name = names.popleft()
            if isinstance(crop, DataError):
                entries.append(crop)
                continue
            pixels[filled] = crop
            entries.append((filled, name))
            filled += 1
            if filled == self.batch_size:
                yield entries, pixels
                # New memory, because a device may still read from the old array.
                entries, pixels, filled = [], np.zeros(self._shape, np.uint8), 0
        if entries:
            yield entries, pixels


def _fast_batch(side: int) -> int:
    """Larger batches gain little, and cost more where the last one is filled up."""
    large = side >= 128
    if jax.default_backend() == "cpu":
        return 8 if large else 64
    return (64 if large else 256) * jax.local_device_count()


def _noting_names(images: Iterable[Any], names: collections.deque[str]) -> Iterator[Any]:
    for image in images:
        names.append(name_of(image))
        yield image
