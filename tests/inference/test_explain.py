"""Attributions against what they must add up to, and against gradients taken by hand."""

import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax.data.decode import eval_crop
from resnet_jax.inference.explain import grad_cam, integrated_gradients, responses
from tests.evaluation.settings import encoded, photo, tiny_network
from tests.variables import random_variables


def small(**fields):
    """One block a stage: what is tested does not depend on the depth."""
    return rj.ResNet20(stage_sizes=(1, 1, 1), **fields)


def network(model, side=32):
    images = jax.random.normal(jax.random.key(1), (2, side, side, 3))
    return random_variables(model, images.shape[1:]), images


CLASSES = jnp.array([3, 7])


def test_integrated_gradients_are_complete():
    """Sundararajan et al. 2017, Proposition 1."""
    model = small()
    variables, images = network(model, side=16)
    variables["params"]["head"]["kernel"] *= 8  # logits that differ
    found = integrated_gradients(model, variables, images, CLASSES, steps=300)

    def logit(images):
        logits = model.apply(variables, images, train=False)
        return jnp.take_along_axis(logits, CLASSES[:, None], axis=1)[:, 0]

    expected = logit(images) - logit(jnp.zeros_like(images))
    assert jnp.abs(expected).min() > 0.1
    chex.assert_trees_all_close(found.sum((1, 2, 3)), expected, rtol=0.02)


def test_a_baseline_is_where_the_line_starts():
    model = small()
    variables, images = network(model)
    found = integrated_gradients(model, variables, images, CLASSES, baseline=images[0], steps=2)
    chex.assert_trees_all_close(found[0], jnp.zeros_like(found[0]))
    assert jnp.abs(found[1]).max() > 0


def test_grad_cam_of_the_last_map_follows_from_the_head():
    """Behind the last stage of a post-activation net come only a mean and the head."""
    model = small()
    variables, images = network(model)
    features = model.apply(variables, images, train=False, method="features")["stage3"]
    weights = variables["params"]["head"]["kernel"].T[CLASSES]  # [N, K]
    evidence = np.maximum(np.einsum("nhwk,nk->nhw", features, weights), 0)
    expected = jax.image.resize(evidence, (2, 32, 32), "bilinear")
    expected /= expected.max((1, 2), keepdims=True)
    chex.assert_trees_all_close(grad_cam(model, variables, images, CLASSES), expected, atol=1e-5)


@pytest.mark.parametrize("layer", ["stem", "stage1"])
def test_grad_cam_of_an_earlier_layer(layer):
    model = small(remat=True)
    variables, images = network(model)
    found = grad_cam(model, variables, images, CLASSES, layer)
    chex.assert_shape(found, (2, 32, 32))
    assert found.min() >= 0
    chex.assert_trees_all_close(found.max((1, 2)), jnp.ones(2))
    with pytest.raises(rj.ModelError, match="did you mean 'stage"):
        grad_cam(model, variables, images, CLASSES, "stage9")


def test_responses_are_those_of_the_norms():
    model = rj.ResNet20()
    variables, images = network(model)
    norm = variables["params"]["stage2"]["block1"]["norm2"]
    found = responses(model, variables, images)
    assert len(found) == 18  # 6 n, without the stem's
    assert list(found)[6:8] == ["stage2/block1/conv1", "stage2/block1/conv2"]
    norm |= {name: 4 * value for name, value in norm.items()}  # a power of two rounds nothing
    scaled = responses(model, variables, images)
    assert scaled["stage2/block1/conv2"] == 4 * found["stage2/block1/conv2"]
    assert scaled["stage2/block1/conv1"] == found["stage2/block1/conv1"]


def test_responses_where_the_norm_comes_first():
    model = rj.create_model("resnetv2_110", stage_sizes=(1, 1, 1), remat=True)
    variables, images = network(model)
    layers = ["conv1", "conv2"]
    expected = [f"stage{n}/block1/{layer}" for n in (1, 2, 3) for layer in layers]
    assert list(responses(model, variables, images)) == expected
    norm = variables["params"]["stage1"]["block1"]["norm1"]
    before = responses(model, variables, images)
    norm |= {name: 4 * value for name, value in norm.items()}
    scaled = responses(model, variables, images)
    assert scaled["stage1/block1/conv1"] == 4 * before["stage1/block1/conv1"]


NAMES = ("cat", "dog", "yak", "cat")


@pytest.fixture(scope="module")
def classifier():
    return rj.Classifier(tiny_network(names=NAMES), batch_size=8)


def test_a_classifier_of_a_path_names_load(tmp_path):
    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(rj.ConfigError, match=r"open it with rj\.Classifier\.load"):
            rj.Classifier(path)


def test_a_classifier_explains_its_best_classes(classifier):
    network, photos = classifier.network, [encoded(photo(seed, 12, 15)) for seed in (0, 1)]
    found = classifier.explain(photos, top=2)
    for data, best, explained in zip(photos, classifier(photos, top=2), found, strict=True):
        assert [each.index for each in explained] == [each.index for each in best]
        assert [each.probability for each in explained] == [each.probability for each in best]
        crop = eval_crop(data, network.crop, 3)
        images = network.preprocessing.normalize(np.stack([crop, crop]))
        indices = jnp.array([each.index for each in best])
        expected = grad_cam(network.model, network.variables, images, indices)
        for each, evidence in zip(explained, expected, strict=True):
            np.testing.assert_array_equal(each.image, crop)
            chex.assert_trees_all_close(each.evidence, np.asarray(evidence), atol=1e-5)
    assert len(classifier.explain(photos[0], top=100)[0]) == 4
    assert classifier.explain([]) == []


def test_a_classifier_explains_named_classes(classifier):
    pixels = photo(2)
    every = {each.index: each for each in classifier.explain(pixels, top=4)[0]}
    [[yak]] = classifier.explain(pixels, classes="yak")
    [[first, last]] = classifier.explain(pixels, classes=[np.int64(0), 3])
    for index, each in ((2, yak), (0, first), (3, last)):
        assert (each.name, each.index) == (NAMES[index], index)
        assert each.probability == every[index].probability
        chex.assert_trees_all_close(each.evidence, every[index].evidence, atol=1e-5)
    [[coarse]] = classifier.explain(pixels, classes=2, layer="stem")
    assert np.abs(coarse.evidence - yak.evidence).max() > 0.1


def test_an_explained_photo_is_upright(classifier):
    """As in predictions."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(photo(3, 8, 8)).save(file, "PNG", exif=exif)
    [[explanation]] = classifier.explain(file)
    [[upright]] = classifier.explain(np.rot90(photo(3, 8, 8), -1))
    np.testing.assert_array_equal(explanation.image, upright.image)
    assert explanation.probability == upright.probability


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (4, [0, 1, 2])])
def test_an_overlay_covers_the_image_where_the_evidence_is(channels, shown):
    classifier = rj.Classifier(tiny_network(channels=channels), batch_size=8)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, channels), np.uint8)
    [[explanation]] = classifier.explain(image)
    overlay = np.asarray(explanation.overlay())
    least, most = (function(explanation.evidence) for function in (np.argmin, np.argmax))
    before, after = explanation.image[:, :, shown].reshape(-1, 3), overlay.reshape(-1, 3)
    assert explanation.evidence.min() == 0
    np.testing.assert_array_equal(after[least], before[least])
    expected = before[most] / 3 + 2 / 3 * np.array([255, 90, 0])
    np.testing.assert_allclose(after[most], expected, atol=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "dgo"}, "classes: unknown class 'dgo'; did you mean 'dog'"),
        ({"classes": "cat"}, "classes: 2 are called 'cat'; give one of 0, 3"),
        ({"classes": [1, 4]}, "classes: 4: must be from 0 to 3"),
        ({"classes": -1}, "classes: -1: must be from 0 to 3"),
        ({"classes": 1.5}, "classes: 1.5 is neither a name nor a number"),
        ({"classes": []}, "classes: the list is empty"),
        ({"top": 0}, "top=0: must be 1 or more"),
        ({"layer": "stage7"}, "unknown layer 'stage7'"),
    ],
)
def test_mistakes_in_what_to_explain(classifier, options, message):
    error = rj.ModelError if "layer" in options else rj.ConfigError
    with pytest.raises(error, match=message):
        classifier.explain(photo(0), **options)


def test_images_that_cannot_be_explained(classifier):
    with pytest.raises(rj.DataError, match="not a valid image"):
        classifier.explain(b"<svg></svg>")
