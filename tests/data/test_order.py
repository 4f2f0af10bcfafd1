"""The order of a run's images, and the part of it that each host reads."""

import numpy as np
import pytest

from resnet_jax.data import loader


def test_every_epoch_has_every_image_once_in_an_order_of_its_own():
    order = loader.Order(images=50, seed=3)
    epochs = order.indices(np.arange(150)).reshape(3, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert not np.array_equal(epochs[0], epochs[1])
    other = loader.Order(images=50, seed=4).indices(np.arange(50))
    assert not np.array_equal(epochs[0], other)


def test_positions_may_be_asked_in_any_order():
    order = loader.Order(images=7, seed=0)
    positions = np.random.default_rng(0).permutation(100)
    np.testing.assert_array_equal(
        order.indices(positions), order.indices(np.arange(100))[positions]
    )


def test_repeats_stand_apart():
    once = loader.Order(images=70, seed=0).indices(np.arange(128))
    thrice = loader.Order(images=70, seed=0, repeats=3).indices(np.arange(384))
    for block in range(2):
        first = once[64 * block : 64 * block + 64]
        copies = thrice[192 * block : 192 * block + 192]
        np.testing.assert_array_equal(copies, np.tile(first, 3))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_disjoint_parts_of_the_same_batches(hosts):
    whole = loader.host_positions(5, 16, 0, 1)
    parts = [loader.host_positions(5, 16, host, hosts) for host in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_every_image_is_mirrored_in_every_other_epoch():
    images = 64
    order = loader.Order(images, seed=1)
    epochs = []
    for epoch in range(3):
        positions = np.arange(epoch * images, (epoch + 1) * images)
        by_image = np.zeros(images, bool)
        by_image[order.indices(positions)] = order.mirrored(positions)
        epochs.append(by_image)
    assert 16 < epochs[0].sum() < 48
    np.testing.assert_array_equal(epochs[1], ~epochs[0])
    np.testing.assert_array_equal(epochs[2], epochs[0])
    choices = loader.memory_choices(order, 8, start=3, steps=2, mirror=True)
    np.testing.assert_array_equal(choices["mirrored"][:, 1], order.mirrored(np.arange(32, 40)))
