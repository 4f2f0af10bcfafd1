"""Batch k follows from (seed, k), for any host, start and way of reading."""

import io
import threading

import numpy as np
import pytest
from PIL import Image

from resnet_jax.data import loader
from resnet_jax.errors import DataError
from resnet_jax.training.config import Data


class Photos:
    """A source of images whose brightness is their label; some may be damaged."""

    class_names = tuple(map(str, range(20)))
    num_classes = 20
    channels = 3

    def __init__(self, count=20, damaged=()):
        self.data = []
        for label in range(count):
            file = io.BytesIO()
            Image.new("RGB", (12, 10), (10 * label,) * 3).save(file, "PNG")
            self.data.append(b"broken" if label in damaged else file.getvalue())

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index], index

    def image_name(self, index):
        return f"photo{index}"


def reports():
    lines = []
    return lines, loader.Corrupt(limit=2, report=lines.append)


def stream(source, order, start, stop, corrupt=None, **options):
    config = Data(image_size=8, crop="random_resized", threads=2, prefetch=2)
    for name in ("workers",):
        setattr(config, name, options.pop(name, 0))
    corrupt = corrupt or loader.Corrupt(limit=0, report=print)
    return list(loader.stream_batches(source, order, config, 8, start, stop, corrupt, **options))


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected):
        assert batch.keys() == other.keys() == {"images", "labels"}
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


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


def test_memory_and_stream_take_the_same_images():
    source, order = Photos(), loader.Order(images=20, seed=1)
    corrupt = loader.Corrupt(limit=0, report=print)
    images = loader.load_memory(source, Data(image_size=8), True, corrupt)
    assert images.images.shape == (20, 8, 8, 3)
    np.testing.assert_array_equal(images.images[:, 4, 4, 0], 10 * np.arange(20))
    in_memory = list(loader.memory_batches(images, order, 8, 0, 5, mirror=True))
    streamed = stream(source, order, 0, 5, mirror=True)
    for batch, other in zip(in_memory, streamed, strict=True):
        np.testing.assert_array_equal(batch["mirrored"], other["mirrored"])
        np.testing.assert_array_equal(batch["labels"], other["labels"])
        assert batch["images"].dtype == other["images"].dtype == np.uint8


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


def test_each_position_has_a_crop_of_its_own():
    source = Photos(count=1)
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    source.data = [file.getvalue()]
    batches = stream(source, loader.Order(images=1, seed=1), 0, 3)
    crops = np.concatenate([batch["images"] for batch in batches]).reshape(24, -1)
    assert len(np.unique(crops, axis=0)) == 24


def test_a_stream_starts_anywhere():
    source, order = Photos(), loader.Order(images=20, seed=1)
    assert_same(stream(source, order, 3, 6), stream(source, order, 0, 6)[3:])


def test_hosts_of_a_stream():
    source, order = Photos(), loader.Order(images=20, seed=1)
    whole = stream(source, order, 0, 3)
    parts = [stream(source, order, 0, 3, host=host, hosts=2) for host in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts)]
    assert_same(joined, whole)


def test_worker_processes_give_the_same_batches():
    source, order = Photos(), loader.Order(images=20, seed=1)
    assert_same(stream(source, order, 0, 4, workers=2), stream(source, order, 0, 4))


def test_damaged_images_are_replaced_and_named_once():
    source, order = Photos(damaged=(3, 7)), loader.Order(images=20, seed=1)
    lines, corrupt = reports()
    batches = stream(source, order, 0, 10, corrupt)
    labels = np.concatenate([batch["labels"] for batch in batches])
    whole = stream(Photos(), order, 0, 10)
    expected = np.concatenate([batch["labels"] for batch in whole])
    np.testing.assert_array_equal(
        labels, np.where(np.isin(expected, (3, 7)), expected + 1, expected)
    )
    assert corrupt.count == 2
    assert sorted(line.split(":")[0] for line in lines) == ["skipped photo3", "skipped photo7"]


def test_damaged_images_in_a_row_are_all_named():
    _, corrupt = reports()
    stream(Photos(damaged=(3, 4)), loader.Order(images=20, seed=1), 0, 10, corrupt)
    assert corrupt.count == 2
    source = Photos(damaged=range(20))
    with pytest.raises(DataError, match="16 images in a row cannot be decoded"):
        stream(source, loader.Order(images=20, seed=1), 0, 10, reports()[1])


def test_too_many_damaged_images_stop_the_run():
    source, order = Photos(damaged=(3, 7, 11)), loader.Order(images=20, seed=1)
    with pytest.raises(DataError, match=r"data\.max_corrupt = 2: .*photo"):
        stream(source, order, 0, 10, reports()[1])
    with pytest.raises(DataError, match=r"data\.max_corrupt = 2"):
        loader.load_memory(source, Data(image_size=8), True, reports()[1])


def test_damaged_images_are_left_out_of_memory():
    images = loader.load_memory(Photos(damaged=(3,)), Data(image_size=8), True, reports()[1])
    assert 3 not in images.labels
    assert len(images) == 19


def test_what_fits_memory():
    source = Photos()
    assert loader.fits_memory(source, Data(image_size=8), training=True)
    varying = Data(image_size=8, crop="random_resized")
    assert not loader.fits_memory(source, varying, training=True)
    assert loader.fits_memory(source, varying, training=False)
    assert not loader.fits_memory(source, Data(image_size=8, memory_gib=1e-6), training=True)


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("in_memory", [True, False])
def test_evaluation_counts_every_image_once(hosts, in_memory):
    source, config = Photos(), Data(image_size=8)
    corrupt = loader.Corrupt(limit=0, report=print)
    images = loader.load_memory(source, config, False, corrupt)
    seen, counts = [], []
    for host in range(hosts):
        if in_memory:
            batches = list(loader.evaluation_batches(images, 8, host, hosts))
        else:
            batches = list(
                loader.streamed_evaluation_batches(source, config, 8, corrupt, host, hosts)
            )
        counts.append(len(batches))
        for batch in batches:
            assert len(batch["labels"]) == 8 // hosts
            seen += batch["labels"][batch["weights"] == 1].tolist()
    assert sorted(seen) == list(range(20))
    assert len(set(counts)) == 1


def test_damaged_images_have_no_weight_in_evaluation():
    source, config = Photos(damaged=(3,)), Data(image_size=8)
    lines, corrupt = reports()
    batches = list(loader.streamed_evaluation_batches(source, config, 8, corrupt))
    assert sum(batch["weights"].sum() for batch in batches) == 19
    assert len(lines) == 1


def test_prefetch_passes_errors_on_and_stops_its_thread():
    def failing():
        yield 1
        raise DataError("broken")

    batches = loader.prefetch(failing(), size=2)
    assert next(batches) == 1
    with pytest.raises(DataError, match="broken"):
        next(batches)

    endless = loader.prefetch(iter(int, 1), size=2)
    next(endless)
    endless.close()
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
