"""Weights of a network for color as the start of one for more channels."""

import jax
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.errors import ConfigError
from resnet_jax.training.config import Checkpoint, Config, Data
from resnet_jax.training.initial import initial_variables
from tests.variables import random_variables


def test_filters_for_color_are_repeated_where_the_channels_are_given(tmp_path):
    model = rj.ResNet8Cifar(num_classes=3)
    variables = random_variables(model, (32, 32, 3))
    rj.save_weights(tmp_path / "w.safetensors", model, variables)
    start = Checkpoint(init_from=str(tmp_path / "w.safetensors"))
    with pytest.raises(
        ConfigError, match=r"takes 3 channels, the data has 5; set data.channels = 5"
    ):
        initial_variables(Config(checkpoint=start), model, channels=5)
    with pytest.raises(ConfigError, match=r"the data has 1; set data.channels = 3"):
        initial_variables(Config(checkpoint=start), model, channels=1)
    found = initial_variables(Config(checkpoint=start, data=Data(channels=5)), model, channels=5)
    kernel = np.asarray(variables["params"]["stem"]["conv1"]["kernel"])
    expected = kernel[:, :, [0, 1, 2, 0, 1]] * 3 / 5
    np.testing.assert_allclose(found["params"]["stem"]["conv1"]["kernel"], expected, rtol=1e-6)
    logits = model.apply(found, np.zeros((1, 32, 32, 5), np.float32), train=False)
    assert logits.shape == (1, 3)
    del found["params"]["stem"], variables["params"]["stem"]
    assert jax.tree.all(jax.tree.map(np.array_equal, found, variables))
