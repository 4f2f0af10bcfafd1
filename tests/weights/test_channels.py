"""The first convolution for images of another number of channels."""

import json

import jax
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.config.schema import Checkpoint, Config, Data
from resnet_jax.errors import WeightsError
from resnet_jax.training.init_from import initial_variables
from resnet_jax.weights.channels import with_channels
from tests.variables import random_variables

MODEL = rj.ResNet8Cifar(num_classes=3)


def kernel_of(variables):
    return np.asarray(variables["params"]["stem"]["conv1"]["kernel"])


@pytest.fixture(scope="module")
def color():
    return random_variables(MODEL)


@pytest.fixture(scope="module")
def saved(color, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    rj.save_weights(path, MODEL, color)
    return path


def test_summed_filters_see_gray_images_as_color_ones_do(color):
    gray = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)
    apply = jax.jit(MODEL.apply, static_argnames="train")
    expected = apply(color, gray.repeat(3, -1), train=False)
    found = apply(with_channels(color, 1), gray, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_loaded_weights_are_adapted(color, saved, tmp_path):
    five = kernel_of(color)[:, :, [0, 1, 2, 0, 1]] * np.float32(3 / 5)
    loaded = rj.load_weights(MODEL, saved, channels=5)
    np.testing.assert_array_equal(kernel_of(loaded), five)
    converted = rj.from_torch(MODEL, rj.to_torch(MODEL, color), channels=5)
    np.testing.assert_array_equal(kernel_of(converted), five)
    assert kernel_of(rj.load_weights(MODEL, saved)).shape[2] == 3
    config = {"architecture": "resnet8_cifar", "num_classes": 3}
    (saved.parent / "config.json").write_text(json.dumps(config))
    _, variables, preprocessing = rj.load_pretrained(saved.parent, channels=5)
    np.testing.assert_array_equal(kernel_of(variables), five)
    assert preprocessing.mean == (0.485, 0.456, 0.406, 0.485, 0.456)
    _, variables, preprocessing = rj.load_pretrained(saved.parent, channels=1)
    np.testing.assert_array_equal(kernel_of(variables)[:, :, 0], kernel_of(color).sum(2))
    assert preprocessing.std == (pytest.approx(0.226),)


def test_a_run_on_gray_images_starts_from_color(color, saved):
    start = Checkpoint(init_from=str(saved))
    config = Config(checkpoint=start, data=Data(channels=1))
    found = initial_variables(config, MODEL, channels=1)
    np.testing.assert_array_equal(kernel_of(found)[:, :, 0], kernel_of(color).sum(2))


def test_a_gray_network_takes_color(color):
    gray = with_channels(color, 1)
    again = kernel_of(with_channels(gray, 3))
    np.testing.assert_allclose(again.sum(2), kernel_of(gray)[:, :, 0], rtol=1e-6)


def test_what_cannot_be_adapted_is_said(color):
    five = with_channels(color, 5)
    with pytest.raises(WeightsError, match=r"channels=3: the network takes 5 channels"):
        with_channels(five, 3)
    with pytest.raises(WeightsError, match=r"channels=0: must be from 1"):
        with_channels(color, 0)
    with pytest.raises(WeightsError, match=r"channels='3': must be a whole number"):
        with_channels(color, "3")
    with pytest.raises(WeightsError, match="stem has no conv1"):
        with_channels({"params": {"stem": {}}}, 4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_kernels_are_those_that_timm_makes(color, channels):
    timm = pytest.importorskip("timm.models", reason="compares with timm")
    torch = pytest.importorskip("torch")
    theirs = torch.from_numpy(kernel_of(color).transpose(3, 2, 0, 1).copy())
    theirs = timm.adapt_input_conv(channels, theirs).numpy()
    found = kernel_of(with_channels(color, channels))
    np.testing.assert_allclose(found, theirs.transpose(2, 3, 1, 0), rtol=1e-6, atol=1e-7)
