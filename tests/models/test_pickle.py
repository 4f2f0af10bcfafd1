"""Models and classifiers travel to other processes: spawned workers, Ray, Dask."""

import copy
import functools
import pickle

import jax
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.weights.network import Network


def travel(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301 (made here)


TINY = {"stage_sizes": (1,), "stage_widths": (8,)}


def test_every_model():
    for name in rj.list_models():
        model = rj.create_model(name, num_classes=3)
        for found in (travel(model), copy.deepcopy(model)):
            assert repr(found) == repr(model)


def test_a_copy_draws_the_same_weights():
    model, x = rj.ResNet(**TINY, num_classes=3), np.zeros((1, 32, 32, 3), np.float32)
    found = travel(model)
    assert found == model
    assert hash(found) == hash(model)
    first, second = (m.init(jax.random.key(0), x, train=False) for m in (model, found))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, second))


@pytest.mark.parametrize(
    "value",
    [
        functools.partial(rj.ResNet20(), train=False),
        rj.ResNet50,
        rj.model_info("resnet26d").constructor,
        rj.BottleneckBlock(width=8),
        functools.partial(rj.Conv, standardize=True),
    ],
    ids=("partial of a model", "constructor", "constructor by name", "block", "partial"),
)
def test_parts(value):
    assert repr(travel(value)).split(" at ")[0] == repr(value).split(" at ")[0]


def test_a_classifier():
    model = rj.ResNet20(**TINY, stem_cls=functools.partial(rj.CifarStem, features=8))
    x = np.zeros((1, 8, 8, 3), np.float32)
    variables = model.init(jax.random.key(0), x, train=False)
    names = tuple(map(str, range(10)))
    network = Network("", "", model, variables, Preprocessing(image_size=8), 3, names)
    classifier = rj.Classifier(network, batch_size=8)
    found = travel(classifier)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(found.logits(images), classifier.logits(images))
    assert found.outputs.batch_size == classifier.outputs.batch_size
