"""The order of a run's images, and the shard of each process."""

import copy
import hashlib
import math

import numpy as np
import pytest

from resnet_jax.data import pipeline
from tests.data.photos import batches_of


def test_every_epoch_has_every_image_once_in_an_order_of_its_own():
    sampler = pipeline.IndexSampler(images=50, seed=3)
    epochs = sampler.indices(np.arange(150)).reshape(3, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert not np.array_equal(epochs[0], epochs[1])
    other = pipeline.IndexSampler(images=50, seed=4).indices(np.arange(50))
    assert not np.array_equal(epochs[0], other)


def test_positions_in_any_order():
    sampler = pipeline.IndexSampler(images=7, seed=0)
    positions = np.random.default_rng(0).permutation(100)
    np.testing.assert_array_equal(
        sampler.indices(positions), sampler.indices(np.arange(100))[positions]
    )


def test_repeats_stand_apart():
    once = pipeline.IndexSampler(images=70, seed=0).indices(np.arange(128))
    thrice = pipeline.IndexSampler(images=70, seed=0, repeats=3).indices(np.arange(384))
    for block in range(2):
        first = once[64 * block : 64 * block + 64]
        copies = thrice[192 * block : 192 * block + 192]
        np.testing.assert_array_equal(copies, np.tile(first, 3))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_are_disjoint_parts_of_the_same_batches(count):
    whole = pipeline.Shard().positions(5, 16)
    parts = [pipeline.Shard(index, count).positions(5, 16) for index in range(count)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_every_image_is_mirrored_in_every_other_epoch():
    images = 64
    sampler = pipeline.IndexSampler(images, seed=1)
    epochs = []
    for epoch in range(3):
        positions = np.arange(epoch * images, (epoch + 1) * images)
        by_image = np.zeros(images, bool)
        by_image[sampler.indices(positions)] = sampler.mirrored(positions)
        epochs.append(by_image)
    assert 16 < epochs[0].sum() < 48
    np.testing.assert_array_equal(epochs[1], ~epochs[0])
    np.testing.assert_array_equal(epochs[2], epochs[0])
    choices = pipeline.index_batch(sampler, batches_of(8, mirror=True), start=3, steps=2)
    np.testing.assert_array_equal(choices["mirrored"][:, 1], sampler.mirrored(np.arange(32, 40)))


def test_shuffled_orders_are_those_of_earlier_versions():
    assert pipeline.IndexSampler(10, seed=7).indices(np.arange(20)).tolist() == [
        *(8, 0, 7, 1, 3, 6, 2, 4, 5, 9),
        *(9, 0, 8, 6, 7, 1, 3, 4, 2, 5),
    ]
    sampler, positions = pipeline.IndexSampler(50, seed=3, repeats=2), np.arange(40, 400)
    found = (
        sampler.indices(positions).astype("<i8").tobytes() + sampler.mirrored(positions).tobytes()
    )
    assert hashlib.sha256(found).hexdigest()[:16] == "b3f0a69d249ce39f"


SIZES = (7, 1, 0, 40, 2)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), SIZES)).astype(np.int32)


def test_a_balanced_order_has_each_class_in_each_round():
    """As often as each other over any stretch, up to one at either end."""
    sampler = pipeline.BalancedSampler(LABELS, seed=1)
    classes = LABELS[sampler.indices(np.arange(400))].reshape(100, 4)
    np.testing.assert_array_equal(np.sort(classes, axis=1), np.tile([0, 1, 3, 4], (100, 1)))
    assert len(np.unique(classes, axis=0)) == 24  # in every order


@pytest.mark.parametrize("kind", [0, 1, 3, 4])
def test_no_image_comes_again_before_all_of_its_class(kind):
    labels = LABELS
    images = pipeline.BalancedSampler(LABELS, seed=1).indices(np.arange(4 * 400))
    own = images[labels[images] == kind]
    cycles = own[: len(own) // SIZES[kind] * SIZES[kind]].reshape(-1, SIZES[kind])
    members = np.flatnonzero(labels == kind)
    np.testing.assert_array_equal(np.sort(cycles, axis=1), np.tile(members, (len(cycles), 1)))
    assert len(np.unique(cycles, axis=0)) == min(len(cycles), math.factorial(SIZES[kind]))


def test_a_balanced_order_follows_from_seed_and_position():
    """Far from the start too, in any order, and by another sampler."""
    sampler = pipeline.BalancedSampler(LABELS, seed=1)
    positions = np.random.default_rng(0).integers(0, 10**12, 20)
    found = sampler.indices(positions)
    np.testing.assert_array_equal(found[::-1], sampler.indices(positions[::-1]))
    for other in (pipeline.BalancedSampler(LABELS, seed=1), copy.deepcopy(sampler)):
        assert [int(other.indices(each[None])[0]) for each in positions] == [*found]
    assert (found != pipeline.BalancedSampler(LABELS, seed=2).indices(positions)).mean() > 0.5
    # A golden value: another stream would change the batches of a run that resumes.
    assert sampler.indices(np.arange(8)).tolist() == [42, 34, 4, 40, 30, 40, 15, 3]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_shuffles_are_uniform(size):
    """Each permutation as often as any other, and each image in each place."""
    labels = np.repeat(np.arange(2), (size, size))
    sampler = pipeline.BalancedSampler(labels, seed=3)
    shuffles = 100 * math.factorial(size)
    images = sampler.indices(np.arange(2 * size * shuffles))
    own = images[images < size].reshape(shuffles, size)
    _, counts = np.unique(own, axis=0, return_counts=True)
    assert len(counts) == math.factorial(size)
    degrees = len(counts) - 1
    # Chi squared: six standard deviations above its mean.
    assert ((counts - 100) ** 2 / 100).sum() < degrees + 6 * math.sqrt(2 * degrees)


def test_a_balanced_order_repeats_and_mirrors_as_any_other():
    once, thrice = (
        pipeline.BalancedSampler(LABELS, 1),
        pipeline.BalancedSampler(LABELS, 1, repeats=3),
    )
    first, copies = once.indices(np.arange(64, 128)), thrice.indices(np.arange(192, 384))
    np.testing.assert_array_equal(copies, np.tile(first, 3))
    images, mirrored = (f(np.arange(4000)) for f in (once.indices, once.mirrored))
    for image in np.unique(images):
        turns = mirrored[images == image]
        assert (turns[1:] != turns[:-1]).all()  # every other time
    assert 10 < once.mirrored(np.arange(4 * 40))[LABELS[images[:160]] == 3].sum() < 30


def test_shards_of_balanced_batches():
    sampler = pipeline.BalancedSampler(LABELS, seed=0)
    images = pipeline.InMemoryDataset(np.zeros((len(LABELS), 2, 2, 1), np.uint8), LABELS)
    (whole,) = images.train_batches(sampler, batches_of(8), 3, 4)
    shards = [pipeline.Shard(index, 2) for index in range(2)]
    parts = [next(images.train_batches(sampler, batches_of(8), 3, 4, each)) for each in shards]
    labels = np.concatenate([part["labels"] for part in parts])
    np.testing.assert_array_equal(labels, whole["labels"])
    assert np.bincount(labels, minlength=5).tolist() == [2, 2, 0, 2, 2]
