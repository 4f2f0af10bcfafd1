"""Which image stands where in a run's batches.

The images of a run form one endless stream: epoch after epoch, each in an order of its own drawn
from (seed, epoch). Position p of the stream is in batch p // B. Resuming is starting at another
position, and hosts that each read their part of every batch read disjoint parts of one stream.
"""

from __future__ import annotations

import functools

import numpy as np

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
