"""The buffers of worker processes, which hold images until nobody reads them any more."""

import contextlib

import jax
import numpy as np

from resnet_jax.config.schema import Data
from resnet_jax.data import pipeline
from resnet_jax.data.workers import spare_buffers
from resnet_jax.distributed import data_parallel
from tests.data.photos import Photos, batches_of, stream

PREFETCH = 2
SPARE = spare_buffers(PREFETCH, workers=1)


@contextlib.contextmanager
def one_worker(steps):
    config = Data(image_size=8, crop="random_resized", threads=2, prefetch=PREFETCH, workers=1)
    dataset = pipeline.StreamedDataset(Photos(), config, pipeline.CorruptImages(0, print))
    sampler = pipeline.IndexSampler(images=20, seed=1)
    with contextlib.closing(dataset.train_batches(sampler, batches_of(8), 0, steps)) as batches:
        yield batches


def is_lent(batch):
    return not batch["images"].flags.owndata


def test_images_in_use_are_not_overwritten():
    """By whatever they are used: each of these reads the buffer itself."""
    uses = [
        lambda images: images,
        lambda images: images.reshape(4, 2, 8, 8, 3)[1:, :, ::2],
        memoryview,
        jax.device_put,
        lambda images: np.asarray(jax.device_put(images)),
    ]
    assert len(uses) == SPARE  # so that all of them are tried with a buffer
    wanted = stream(Photos(), pipeline.IndexSampler(images=20, seed=1), 0, 30)
    with one_worker(steps=30) as batches:
        kept, lent = [], []
        for use, batch in zip(uses, batches):
            lent.append(is_lent(batch))
            kept.append(use(batch["images"]))
            del batch
        assert all(lent)
        assert all(len(batch["images"]) for batch in batches)  # the worker fills what is free
    for use, found, batch in zip(uses, kept, wanted):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(use(batch["images"])))


def test_a_training_loop_copies_no_images():
    """Even where its arrays on the devices refer to the images, as on a CPU."""
    lent = []

    def put(batch):
        lent.append(is_lent(batch))
        return data_parallel.shard_batch(batch)

    with one_worker(steps=60) as batches:
        for batch in pipeline.prefetch(map(put, batches), PREFETCH):
            assert batch["images"].shape[-4:] == (8 // jax.local_device_count(), 8, 8, 3)
    assert all(lent)
    assert len(lent) == 60  # many more than there are buffers


def test_a_consumer_may_keep_every_batch():
    wanted = stream(Photos(), pipeline.IndexSampler(images=20, seed=1), 0, 30)
    with one_worker(steps=30) as batches:
        kept = [next(batches) for _ in range(20)]
        assert sum(map(is_lent, kept)) == SPARE
        for batch, other in zip(kept, wanted):
            np.testing.assert_array_equal(batch["images"], other["images"])
        kept.clear()
        del batch
        assert all(map(is_lent, batches))


def test_images_outlive_their_worker():
    with one_worker(steps=30) as batches:
        images = next(batches)["images"]
        wanted = images.copy()
    images[0] += 1  # they are the consumer's
    np.testing.assert_array_equal(images[1:], wanted[1:])
