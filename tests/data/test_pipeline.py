"""Batches are the same from memory and from files, for any number of hosts."""

import threading

import numpy as np
import pytest

from resnet_jax.config.schema import Data
from resnet_jax.data import pipeline
from resnet_jax.errors import DataError
from tests.data.photos import Photos, reports, stream


def test_memory_and_stream_take_the_same_images():
    source, order = Photos(), pipeline.IndexSampler(images=20, seed=1)
    corrupt = pipeline.Corrupt(limit=0, report=print)
    images = pipeline.load_memory(source, Data(image_size=8), True, corrupt)
    assert images.images.shape == (20, 8, 8, 3)
    np.testing.assert_array_equal(images.images[:, 4, 4, 0], 10 * np.arange(20))
    in_memory = list(pipeline.memory_batches(images, order, 8, 0, 5, mirror=True))
    streamed = stream(source, order, 0, 5, mirror=True)
    for batch, other in zip(in_memory, streamed, strict=True):
        np.testing.assert_array_equal(batch["mirrored"], other["mirrored"])
        np.testing.assert_array_equal(batch["labels"], other["labels"])
        assert batch["images"].dtype == other["images"].dtype == np.uint8


def test_too_many_damaged_images_stop_the_run():
    source, order = Photos(damaged=(3, 7, 11)), pipeline.IndexSampler(images=20, seed=1)
    with pytest.raises(DataError, match=r"data\.max_corrupt = 2: .*photo"):
        stream(source, order, 0, 10, reports()[1])
    with pytest.raises(DataError, match=r"data\.max_corrupt = 2"):
        pipeline.load_memory(source, Data(image_size=8), True, reports()[1])


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("in_memory", [True, False])
def test_evaluation_counts_every_image_once(hosts, in_memory):
    source, config = Photos(), Data(image_size=8)
    corrupt = pipeline.Corrupt(limit=0, report=print)
    images = pipeline.load_memory(source, config, False, corrupt)
    seen, counts = [], []
    for host in range(hosts):
        if in_memory:
            batches = list(pipeline.evaluation_batches(images, 8, host, hosts))
        else:
            batches = list(
                pipeline.streamed_evaluation_batches(source, config, 8, corrupt, host, hosts)
            )
        counts.append(len(batches))
        for batch in batches:
            assert len(batch["labels"]) == 8 // hosts
            seen += batch["labels"][batch["weights"] == 1].tolist()
    assert sorted(seen) == list(range(20))
    assert len(set(counts)) == 1


def test_prefetch_passes_errors_on_and_stops_its_thread():
    def failing():
        yield 1
        raise DataError("broken")

    batches = pipeline.prefetch(failing(), size=2)
    assert next(batches) == 1
    with pytest.raises(DataError, match="broken"):
        next(batches)

    endless = pipeline.prefetch(iter(int, 1), size=2)
    next(endless)
    endless.close()
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
