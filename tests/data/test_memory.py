"""Datasets that lie decoded in memory."""

from resnet_jax.config.schema import Data
from resnet_jax.data import pipeline
from tests.data.photos import Photos, reports


def test_damaged_images_are_left_out_of_memory():
    source = Photos(damaged=(3,))
    images = pipeline.InMemoryDataset.decode(source, Data(image_size=8), True, reports()[1])
    assert 3 not in images.labels
    assert len(images) == 19
    assert images.indices.tolist() == [x for x in range(20) if x != 3]


def test_what_fits_memory():
    source = Photos()
    assert pipeline.fits_memory(source, Data(image_size=8), training=True)
    varying = Data(image_size=8, crop="random_resized")
    assert not pipeline.fits_memory(source, varying, training=True)
    assert pipeline.fits_memory(source, varying, training=False)
    assert not pipeline.fits_memory(source, Data(image_size=8, memory_gib=1e-6), training=True)
