"""Batches that are decoded as they are needed, by threads or worker processes."""

import io
import threading
import tracemalloc

import jax
import numpy as np
import pytest
from PIL import Image

from resnet_jax.config.schema import Data
from resnet_jax.data import pipeline
from resnet_jax.errors import DataError
from tests.data.photos import Photos, assert_same, batches_of, bombs, reports, stream


def test_each_position_has_a_crop_of_its_own():
    source = Photos(count=1)
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    source.data = [file.getvalue()]
    batches = stream(source, pipeline.IndexSampler(images=1, seed=1), 0, 3)
    crops = np.concatenate([batch["images"] for batch in batches]).reshape(24, -1)
    assert len(np.unique(crops, axis=0)) == 24


def test_a_stream_starts_anywhere():
    source, sampler = Photos(), pipeline.IndexSampler(images=20, seed=1)
    assert_same(stream(source, sampler, 3, 6), stream(source, sampler, 0, 6)[3:])


def test_shards_of_a_stream():
    source, sampler = Photos(), pipeline.IndexSampler(images=20, seed=1)
    whole = stream(source, sampler, 0, 3)
    parts = [stream(source, sampler, 0, 3, shard=pipeline.Shard(i, 2)) for i in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts)]
    assert_same(joined, whole)


def test_worker_processes_give_the_same_batches():
    source, sampler = Photos(), pipeline.IndexSampler(images=20, seed=1)
    assert_same(stream(source, sampler, 0, 4, workers=2), stream(source, sampler, 0, 4))


class Platforms(Photos):
    """Labels say whether the process that reads the images leaves accelerators alone."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0], int(jax.config.jax_platforms == "cpu")


def test_worker_processes_use_no_accelerator(monkeypatch):
    """One that started a backend of its own would take most of the memory of the parent's GPU."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")  # what the processes inherit
    (batch,) = stream(Platforms(), pipeline.IndexSampler(images=20, seed=1), 0, 1, workers=1)
    assert batch["labels"].tolist() == [1] * 8


def test_memory_stays_flat():
    sampler = pipeline.IndexSampler(images=20, seed=1)
    config = Data(image_size=32, crop="random_resized", threads=2, prefetch=2)
    dataset = pipeline.StreamedDataset(Photos(), config, pipeline.CorruptImages(0, print))
    used = {}
    tracemalloc.start()
    batches = dataset.train_batches(sampler, batches_of(8), 0, 300)
    for count, batch in enumerate(batches):
        size = batch["images"].nbytes
        if count in (100, 299):
            used[count] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used[299] - used[100] < 10 * size  # of 199 batches made between the two


def test_leaving_a_stream_early_ends_its_threads():
    before = threading.active_count()
    sampler = pipeline.IndexSampler(images=20, seed=1)
    config = Data(image_size=8, crop="random_resized", threads=3)
    dataset = pipeline.StreamedDataset(Photos(), config, pipeline.CorruptImages(0, print))
    batches = dataset.train_batches(sampler, batches_of(8), 0, 10**6)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_damaged_images_are_replaced_and_named_once():
    source, sampler = Photos(damaged=(3, 7)), pipeline.IndexSampler(images=20, seed=1)
    lines, corrupt = reports()
    batches = stream(source, sampler, 0, 10, corrupt)
    labels = np.concatenate([batch["labels"] for batch in batches])
    whole = stream(Photos(), sampler, 0, 10)
    expected = np.concatenate([batch["labels"] for batch in whole])
    np.testing.assert_array_equal(
        labels, np.where(np.isin(expected, (3, 7)), expected + 1, expected)
    )
    assert corrupt.count == 2
    assert sorted(line.split(":")[0] for line in lines) == ["skipped photo3", "skipped photo7"]


def test_images_of_too_many_pixels_are_damaged_ones():
    source = Photos()
    source.data[3], source.data[7] = bombs()["JPEG"], bombs()["PNG"]
    whole = stream(
        Photos(damaged=(3, 7)), pipeline.IndexSampler(images=20, seed=1), 0, 4, reports()[1]
    )
    lines, corrupt = reports()
    assert_same(stream(source, pipeline.IndexSampler(images=20, seed=1), 0, 4, corrupt), whole)
    what = "more than 200,000,000 pixels are not decoded"
    assert sorted(lines) == [f"skipped photo3: 60000 x 60000: {what}", f"skipped photo7: {what}"]
    with pytest.raises(DataError, match=rf"max_corrupt = 0.*{what}"):
        stream(source, pipeline.IndexSampler(images=20, seed=1), 0, 4)


def test_damaged_images_in_a_row_are_all_named():
    _, corrupt = reports()
    stream(Photos(damaged=(3, 4)), pipeline.IndexSampler(images=20, seed=1), 0, 10, corrupt)
    assert corrupt.count == 2
    source = Photos(damaged=range(20))
    with pytest.raises(DataError, match="16 images in a row cannot be decoded"):
        stream(source, pipeline.IndexSampler(images=20, seed=1), 0, 10, reports()[1])


def test_damaged_images_have_no_weight_in_evaluation():
    source, config = Photos(damaged=(3,)), Data(image_size=8)
    lines, corrupt = reports()
    batches = list(pipeline.StreamedDataset(source, config, corrupt).eval_batches(8))
    assert sum(batch["weights"].sum() for batch in batches) == 19
    assert len(lines) == 1
