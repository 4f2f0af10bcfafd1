"""Which image stands where in a run's batches.

The images of a run form one endless stream of positions: epoch after epoch, each in an order drawn
from (seed, epoch). A balanced sampler has rounds of one image of each class instead. Position p is
in batch p // batch_size, so batch k is a function of (seed, k) alone: a run resumes by starting at
another position, and processes read disjoint shards of the same batches.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

# Distance between the copies of an image that is repeated.
_REPEAT_DISTANCE = 64
# A balanced sampler draws this many slots at a time. Its shuffles hash keys of two kinds, one for
# the order of the classes in a round and one for the images of a class, and take 8 Feistel rounds.
_SLOTS_AT_A_TIME = 2**13
_CLASS_KEYS, _IMAGE_KEYS = 1, 2
_FEISTEL_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of every batch that belongs to one process.

    Example:
      >>> Shard(index=1, count=2).positions(step=2, batch_size=8).tolist()
      [20, 21, 22, 23]
    """

    index: int = 0
    count: int = 1

    def size(self, batch_size: int) -> int:
        """Number of images of this shard in a global batch."""
        return batch_size // self.count

    def positions(self, step: int, batch_size: int) -> np.ndarray:
        """Positions of this shard's images of a batch, int [batch_size / count].

        They are consecutive, as a process's devices are in the global order of devices.
        """
        size = self.size(batch_size)
        return step * batch_size + self.index * size + np.arange(size)


ALL = Shard()  # of the only process


class IndexSampler:
    """Maps positions to images: every image `repeats` times an epoch, in random order.

    The copies of a repeated image stand 64 positions apart: in the same batch, and yet Mixup and
    CutMix, which pair neighbors, pair different images.

    Example:
      >>> sampler = IndexSampler(images=4, seed=0)
      >>> sorted(sampler.indices(np.arange(4, 8)).tolist())
      [0, 1, 2, 3]
    """

    def __init__(self, images: int, seed: int, repeats: int = 1) -> None:
        self.images = images
        self.seed = seed
        self.repeats = repeats

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The image at each position, int64 [N]."""
        return self._look_up(self._slots(positions))[0]

    def mirrored(self, positions: np.ndarray) -> np.ndarray:
        """Whether to mirror the image at each position, bool [N]: every second time it appears."""
        images, times = self._look_up(self._slots(positions))
        return _first_mirrored(self.images, self.seed)[images] ^ (times % 2 == 1)

    def _slots(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the stream without repeats."""
        blocks = positions // (_REPEAT_DISTANCE * self.repeats)
        return blocks * _REPEAT_DISTANCE + positions % _REPEAT_DISTANCE

    def _look_up(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(image, how many times it appeared before) at each slot."""
        epochs, places = np.divmod(slots, self.images)
        images = np.empty(len(slots), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            images[chosen] = _permutation(self.images, self.seed, int(epoch))[places[chosen]]
        return images, epochs


class BalancedSampler(IndexSampler):
    """A sampler by which every class appears equally often.

    The stream is a sequence of rounds. Each round has one image of each class, in a random order.
    Successive rounds go through the images of a class in a random order, which is drawn anew after
    the last one: round r has image r % n of a class of n images, in its shuffle r // n. A shuffle
    can be evaluated at a single place, so any position is looked up without those before it, and
    only the images of each class are stored.

    Args:
      labels: The class of each image, int [N]. Classes without images are left out.
      seed: Seed of the run.
      repeats: As in `IndexSampler`.

    Attributes:
      classes: Classes that have images, ascending.
      class_counts: The number of images of each of these classes.

    Example:
      >>> sampler = BalancedSampler(np.array([0, 0, 0, 0, 0, 1]), seed=0)
      >>> sampler.indices(np.arange(10)).tolist().count(5)
      5
    """

    def __init__(self, labels: np.ndarray, seed: int, repeats: int = 1) -> None:
        super().__init__(len(labels), seed, repeats)
        self._by_class = np.argsort(labels, kind="stable").astype(np.int32)
        self.classes, self.class_counts = np.unique(labels, return_counts=True)
        self._starts = np.cumsum(self.class_counts) - self.class_counts

    def _look_up(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts, places = np.divmod(slots, _SLOTS_AT_A_TIME)
        images, cycles = np.empty(len(slots), np.int64), np.empty(len(slots), np.int64)
        for part in np.unique(parts):
            chosen = parts == part
            drawn = _draw(self, int(part))
            images[chosen], cycles[chosen] = (each[places[chosen]] for each in drawn)
        return images, cycles

    def _compute(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`_look_up` without a cache."""
        count = len(self.class_counts)
        rounds, places = np.divmod(slots, count)
        classes = _shuffled(places, np.full_like(slots, count), self._keys(_CLASS_KEYS, rounds))
        sizes = self.class_counts[classes]
        cycles, places = np.divmod(rounds, sizes)
        places = _shuffled(places, sizes, self._keys(_IMAGE_KEYS, classes, cycles))
        return self._by_class[self._starts[classes] + places], cycles

    def _keys(self, kind: int, *parts: np.ndarray) -> np.ndarray:
        """A different key for each seed, kind and parts, uint64 [N]."""
        keys = np.full(parts[0].shape, self.seed, np.uint64)
        for part in (np.full(parts[0].shape, kind), *parts):
            keys = _hash(keys, part)
        return keys


@functools.lru_cache(maxsize=4)
def _draw(sampler: BalancedSampler, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Many slots at a time: for those of one small batch, NumPy's calls would take longer."""
    return sampler._compute(np.arange(part * _SLOTS_AT_A_TIME, (part + 1) * _SLOTS_AT_A_TIME))


def _shuffled(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The element at one place of each shuffle, which has `sizes` elements and a key; all [N].

    A Feistel network permutes a rectangle of at least as many places. A result outside of the
    shuffle is permuted again until it is inside, which is still a permutation (Black & Rogaway
    2002, "Ciphers with arbitrary finite domains").
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
    for turn in range(_FEISTEL_ROUNDS):
        row = row + _hash_below(rows, keys ^ _SALTS[2 * turn], column)
        row = np.where(row >= rows, row - rows, row)
        column = column + _hash_below(columns, keys ^ _SALTS[2 * turn + 1], row)
        column = np.where(column >= columns, column - columns, column)
    return row * columns + column


def _hash_below(limits: np.ndarray, keys: np.ndarray, value: np.ndarray) -> np.ndarray:
    """A hash of key and value in [0, limit), int64 [N]."""
    high = _hash(keys, value) >> np.uint64(32)
    return ((high * limits.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def _hash(keys: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014), uint64 [N]."""
    x = keys + (value.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_SALTS = _hash(np.zeros(2 * _FEISTEL_ROUNDS, np.uint64), np.arange(2 * _FEISTEL_ROUNDS))


@functools.lru_cache(maxsize=4)
def _first_mirrored(images: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 2]).integers(2, size=images, dtype=np.uint8) == 1


@functools.lru_cache(maxsize=4)
def _permutation(images: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(images)
