"""How a trained network's images are cropped and turned, from its configuration to its card."""

import dataclasses

import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.config.schema import Config, Data
from resnet_jax.data.decode import eval_crop
from resnet_jax.data.pipeline import InMemoryDataset, StreamedDataset
from resnet_jax.evaluation.evaluator import Evaluator
from resnet_jax.export.hub import hub_config, model_card
from resnet_jax.weights.network import Network
from tests.data.photos import Photos, reports


def network(crop_mode="center", **fields):
    preprocessing = rj.Preprocessing(image_size=32, crop_fraction=0.8, crop_mode=crop_mode)
    return Network("w", "resnet20", rj.ResNet20(), {}, preprocessing, 3, (), **fields)


def test_the_crop_of_a_network():
    assert network().crop == Data(eval_size=32, eval_resize=40)
    assert network("squash").crop == Data(eval_size=32, eval_resize=40, eval_crop="squash")
    trained = Config(data=Data(upright=True))
    for asked, config, expected in (
        (None, None, False),
        (None, trained, True),
        (False, trained, False),
        (True, None, True),
    ):
        assert network(upright=asked, config=config).crop.upright is expected


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_cards_say_the_crop(crop_mode):
    squash = dataclasses.replace(network(crop_mode), class_names=("a",))
    assert hub_config(squash)["pretrained_cfg"]["crop_mode"] == crop_mode
    whole = "the center of 40 x 40 pixels: the whole image, regardless of its proportions"
    assert (whole in model_card(squash)) == (crop_mode == "squash")


@pytest.mark.parametrize("fields", [{"eval_crop": "squash"}, {"upright": True}])
def test_evaluation_in_memory_and_streamed(fields):
    """Both ways to read a dataset prepare its images as `eval_crop` does."""
    source, config = Photos(6), Data(image_size=8, threads=2, **fields)
    expected = np.stack([eval_crop(data, config, 3) for data in source.data])
    found = InMemoryDataset.decode(source, config, training=False, corrupt=reports()[1])
    np.testing.assert_array_equal(found.images, expected)
    batches = [*StreamedDataset(source, config, reports()[1]).eval_batches(6)]
    np.testing.assert_array_equal(batches[0]["images"], expected)


def test_whole_images_are_neither_squashed_nor_turned():
    for each, message in (
        (network("squash"), "multi_scale: keeps the proportions"),
        (network(upright=True), "multi_scale: takes images as they are stored"),
    ):
        with pytest.raises(rj.ConfigError, match=message):
            Evaluator(each, "multi_scale")
