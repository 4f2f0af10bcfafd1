"""Data sets that stay decoded in memory."""

from resnet_jax.data import loader
from resnet_jax.training.config import Data
from tests.data.photos import Photos, reports


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
