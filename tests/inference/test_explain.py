"""Attributions against what they must add up to, and against gradients taken by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.inference.explain import grad_cam, integrated_gradients, responses
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
    norm |= {name: 3 * value for name, value in norm.items()}
    tripled = responses(model, variables, images)
    assert tripled["stage2/block1/conv2"] == pytest.approx(3 * found["stage2/block1/conv2"])
    assert tripled["stage2/block1/conv1"] == pytest.approx(found["stage2/block1/conv1"])


def test_responses_where_the_norm_comes_first():
    model = rj.create_model("resnetv2_110", stage_sizes=(1, 1, 1), remat=True)
    variables, images = network(model)
    layers = ["conv1", "conv2"]
    expected = [f"stage{n}/block1/{layer}" for n in (1, 2, 3) for layer in layers]
    assert list(responses(model, variables, images)) == expected
    norm = variables["params"]["stage1"]["block1"]["norm1"]
    before = responses(model, variables, images)
    norm |= {name: 3 * value for name, value in norm.items()}
    tripled = responses(model, variables, images)
    assert tripled["stage1/block1/conv1"] == pytest.approx(3 * before["stage1/block1/conv1"])
