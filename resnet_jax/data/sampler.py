"""Which image stands where in a run's batches.

The images of a run form one endless stream: epoch after epoch, each in an order of its own drawn
from (seed, epoch); a balanced order has rounds of one image of each class instead. Position p of
the stream is in batch p // B. Resuming is starting at another position, and hosts that each read
their part of every batch read disjoint parts of one stream.
"""

from __future__ import annotations

import functools

import numpy as np

_APART = 64
# Of a balanced order: slots that are drawn at a time, the streams of its keys, and how often a
# shuffle mixes rows and columns.
_DRAWN, _ROUND, _CYCLE, _TURNS = 2**13, 1, 2, 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class IndexSampler:
    """Which image stands at each position of the stream: every image once an epoch.

    Args:
      images: Number of images.
      seed: Of the run.
      repeats: Times each image appears. The copies stand 64 positions apart, so that they are in
        one batch and yet mixing, which pairs neighbours, pairs different images.

    Example:
      >>> order = IndexSampler(images=4, seed=0)
      >>> sorted(order.indices(np.arange(4, 8)).tolist())
      [0, 1, 2, 3]
    """

    def __init__(self, images: int, seed: int, repeats: int = 1) -> None:
        self.images = images
        self.seed = seed
        self.repeats = repeats

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The image at each position, [len(positions)]."""
        return self._find(self._slots(positions))[0]

    def mirrored(self, positions: np.ndarray) -> np.ndarray:
        """Whether an image's turn to be mirrored is odd: every other time it is seen, bool."""
        found, times = self._find(self._slots(positions))
        return _first_mirrored(self.images, self.seed)[found] ^ (times % 2 == 1)

    def _slots(self, positions: np.ndarray) -> np.ndarray:
        """Places in the stream without repeats."""
        blocks = positions // (_APART * self.repeats)
        return blocks * _APART + positions % _APART

    def _find(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(image, how many times it was seen before) at each slot."""
        epochs, places = np.divmod(slots, self.images)
        found = np.empty(len(slots), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = _permutation(self.images, self.seed, int(epoch))[places[chosen]]
        return found, epochs


class BalancedSampler(IndexSampler):
    """An order in which every class appears equally often.

    The stream is a sequence of rounds. A round has one image of each class, in an order of its
    own. Successive rounds take a class's images in turn, and in another order each time all of
    them were seen: round r has image r % n of a class of n images, in its shuffle r // n. Shuffles
    are computed place by place, so an image at any position is found without those before it, and
    nothing is kept but the images of each class.

    Args:
      labels: The class of each image, int [N]. Classes without images are left out.
      seed: Of the run.
      repeats: As for `Order`.

    Attributes:
      classes: Those that have images, ascending.
      class_counts: Images of each of these.

    Example:
      >>> order = BalancedSampler(np.array([0, 0, 0, 0, 0, 1]), seed=0)
      >>> order.indices(np.arange(10)).tolist().count(5)
      5
    """

    def __init__(self, labels: np.ndarray, seed: int, repeats: int = 1) -> None:
        super().__init__(len(labels), seed, repeats)
        self._by_class = np.argsort(labels, kind="stable").astype(np.int32)
        self.classes, self.class_counts = np.unique(labels, return_counts=True)
        self._starts = np.cumsum(self.class_counts) - self.class_counts

    def _find(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts, places = np.divmod(slots, _DRAWN)
        found, cycles = np.empty(len(slots), np.int64), np.empty(len(slots), np.int64)
        for part in np.unique(parts):
            chosen = parts == part
            drawn = _draw(self, int(part))
            found[chosen], cycles[chosen] = (each[places[chosen]] for each in drawn)
        return found, cycles

    def _place(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`_find`, without keeping anything."""
        count = len(self.class_counts)
        rounds, places = np.divmod(slots, count)
        classes = _shuffled(places, np.full_like(slots, count), self._keys(_ROUND, rounds))
        sizes = self.class_counts[classes]
        cycles, places = np.divmod(rounds, sizes)
        places = _shuffled(places, sizes, self._keys(_CYCLE, classes, cycles))
        return self._by_class[self._starts[classes] + places], cycles

    def _keys(self, stream: int, *parts: np.ndarray) -> np.ndarray:
        """Another key for each seed, stream and parts, uint64 [N]."""
        keys = np.full(parts[0].shape, self.seed, np.uint64)
        for part in (np.full(parts[0].shape, stream), *parts):
            keys = _hash(keys, part)
        return keys


@functools.lru_cache(maxsize=4)
def _draw(order: BalancedSampler, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Some slots at a time: for those of a single small batch NumPy's calls would take longer."""
    return order._place(np.arange(part * _DRAWN, (part + 1) * _DRAWN))


def _shuffled(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The element at one place of each shuffle, of `sizes` elements and drawn by `keys`; all [N].

    A Feistel network permutes a rectangle of at least as many places. Whoever lands outside of the
    shuffle is permuted again until inside, which keeps it a permutation (Black & Rogaway 2002).
    """
    rows = np.ceil(np.sqrt(sizes)).astype(np.int64)
    columns = -(-sizes // rows)
    found, outside = places.copy(), np.arange(len(places))
    while outside.size:
        found[outside] = _permuted(*(x[outside] for x in (found, rows, columns, keys)))
        outside = outside[found[outside] >= sizes[outside]]
    return found


def _permuted(
    places: np.ndarray, rows: np.ndarray, columns: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """The element at one place of each permutation of rows * columns; all [N]."""
    row, column = np.divmod(places, columns)
    for turn in range(_TURNS):
        row = row + _drawn(rows, keys ^ _SALTS[2 * turn], column)
        row = np.where(row >= rows, row - rows, row)
        column = column + _drawn(columns, keys ^ _SALTS[2 * turn + 1], row)
        column = np.where(column >= columns, column - columns, column)
    return row * columns + column


def _drawn(limits: np.ndarray, keys: np.ndarray, value: np.ndarray) -> np.ndarray:
    """A number from 0 to below each limit, which key and value decide."""
    share = _hash(keys, value) >> np.uint64(32)
    return ((share * limits.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def _hash(keys: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Other keys, uint64 [N], by the finalizer of SplitMix64 (Steele et al. 2014)."""
    x = keys + (value.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_SALTS = _hash(np.zeros(2 * _TURNS, np.uint64), np.arange(2 * _TURNS))


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
