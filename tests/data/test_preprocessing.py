"""One normalization: every user of a network's preprocessing computes the same float32 numbers."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config.schema import Augment
from resnet_jax.data.augment.apply import augment
from resnet_jax.data.preprocessing import Preprocessing, normalize
from resnet_jax.errors import ConfigError, DataError
from resnet_jax.evaluation.metrics import make_logits
from resnet_jax.export.agreement import predict
from resnet_jax.inference.batch_predictor import BatchPredictor
from tests.evaluation.settings import tiny_network

# All values of a pixel, with constants for which dividing by 255 first rounds differently.
PREPROCESSING = Preprocessing(image_size=16, crop_fraction=1.0)
PIXELS = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), (1, 16, 16, 3))
# A network that returns its input.
IDENTITY = SimpleNamespace(apply=lambda variables, images, train: images)


def trained():
    config = Augment(mean=PREPROCESSING.mean, std=PREPROCESSING.std)
    step = jax.jit(functools.partial(augment, config=config, num_classes=2))
    return step(PIXELS, jnp.zeros(1, int), jax.random.key(0))[0]


def evaluated():
    return jax.jit(make_logits(IDENTITY, PREPROCESSING))({}, PIXELS)


def predicted():
    network = dataclasses.replace(tiny_network(), preprocessing=PREPROCESSING)
    (found,) = BatchPredictor(network, lambda variables, images: images)([PIXELS[0]])
    return found[None]


def exported():
    program = jax.jit(functools.partial(predict, IDENTITY, PREPROCESSING))
    written = jax.export.export(program)({}, jax.ShapeDtypeStruct(PIXELS.shape, np.uint8))
    return jax.export.deserialize(written.serialize()).call({}, PIXELS)


def by_numpy():
    found = normalize(PIXELS, PREPROCESSING.mean, PREPROCESSING.std)
    assert isinstance(found, np.ndarray)
    return found


@pytest.mark.parametrize("user", [trained, evaluated, predicted, exported, by_numpy])
def test_every_user_normalizes_to_the_same_bits(user):
    expected = np.asarray(PREPROCESSING.normalize(PIXELS))
    assert expected.dtype == np.float32
    exact = (PIXELS / 255 - np.array(PREPROCESSING.mean)) / np.array(PREPROCESSING.std)
    np.testing.assert_allclose(expected, exact, atol=1e-6)
    found = np.asarray(user())
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


def test_constants_need_one_number_or_one_for_each_channel():
    with pytest.raises(ConfigError, match=r"mean = \(0\.5, 0\.5\): must have 1 number or 3"):
        normalize(PIXELS, (0.5, 0.5), (0.25,))
    with pytest.raises(ConfigError, match=r"std = \(0\.2, 0\.2, 0\.2\): must have one number,"):
        normalize(PIXELS[..., :1], (0.5,), (0.2, 0.2, 0.2))


def test_only_bytes_are_normalized():
    for images in (PIXELS / 255, PIXELS.astype(np.int32)):
        with pytest.raises(DataError, match="normalize takes uint8 images"):
            PREPROCESSING.normalize(images)
