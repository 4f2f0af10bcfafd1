"""Batches are the same from memory and from files, for any number of processes."""

import threading

import numpy as np
import pytest

from resnet_jax.config.schema import Data
from resnet_jax.data import pipeline
from resnet_jax.errors import DataError
from tests.data.photos import Photos, batches_of, reports, stream


def test_memory_and_stream_take_the_same_images():
    source, sampler = Photos(), pipeline.IndexSampler(images=20, seed=1)
    corrupt = pipeline.CorruptImages(limit=0, log=print)
    images = pipeline.open_dataset(source, Data(image_size=8), True, corrupt)
    assert images.images.shape == (20, 8, 8, 3)
    np.testing.assert_array_equal(images.images[:, 4, 4, 0], 10 * np.arange(20))
    in_memory = list(images.train_batches(sampler, batches_of(8, mirror=True), 0, 5))
    streamed = stream(source, sampler, 0, 5, mirror=True)
    for batch, other in zip(in_memory, streamed, strict=True):
        np.testing.assert_array_equal(batch["mirrored"], other["mirrored"])
        np.testing.assert_array_equal(batch["labels"], other["labels"])
        assert batch["images"].dtype == other["images"].dtype == np.uint8


def test_too_many_damaged_images_stop_the_run():
    source, sampler = Photos(damaged=(3, 7, 11)), pipeline.IndexSampler(images=20, seed=1)
    with pytest.raises(DataError, match=r"data\.max_corrupt = 2: .*photo"):
        stream(source, sampler, 0, 10, reports()[1])
    with pytest.raises(DataError, match=r"data\.max_corrupt = 2"):
        pipeline.open_dataset(source, Data(image_size=8), True, reports()[1])


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("in_memory", [True, False])
def test_evaluation_counts_every_image_once(shards, in_memory):
    config = Data(image_size=8, memory_gib=1.0 if in_memory else 0.0)
    corrupt = pipeline.CorruptImages(limit=0, log=print)
    dataset = pipeline.open_dataset(Photos(), config, False, corrupt)
    assert isinstance(dataset, pipeline.InMemoryDataset) == in_memory
    seen, counts = [], []
    for index in range(shards):
        batches = list(dataset.eval_batches(8, pipeline.Shard(index, shards)))
        counts.append(len(batches))
        for batch in batches:
            assert len(batch["labels"]) == 8 // shards
            seen += batch["labels"][batch["weights"] == 1].tolist()
    assert sorted(seen) == list(range(20))
    assert len(set(counts)) == 1


def test_a_dataset_without_an_image_that_can_be_decoded():
    source = Photos(count=2, damaged=range(2))
    source.name = "photos"
    with pytest.raises(DataError, match=r"data\.name = 'photos': none of its images can be dec"):
        pipeline.open_dataset(source, Data(image_size=8), True, reports()[1])


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
