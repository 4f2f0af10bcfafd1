"""The state before the first step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import resnet_jax as rj
from resnet_jax.config.schema import Config, Model, Train
from resnet_jax.training.state import create_state, state_shapes
from tests.variables import random_variables

SETTINGS = {
    "plain": Config(),
    "averages and loss scale": Config(Model(dtype="float16"), train=Train(ema_decay=0.9)),
}


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
def test_shapes_are_those_of_the_state(config):
    arguments = rj.ResNet8Cifar(), optax.adamw(0.1), config, 3
    shapes, state = state_shapes(*arguments), create_state(*arguments)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


def test_random_parameters_follow_from_the_seed(tiny_model, accelerator):
    """On a CPU the compiler optimizes less there, and gives the same bits."""
    if accelerator != "cpu":
        pytest.skip("compiler options of the CPU")
    model = rj.create_model(tiny_model)
    state = create_state(model, optax.sgd(0.1), Config(train=Train(seed=3)), channels=3)
    init = jax.jit(
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False),
        compiler_options={"xla_backend_optimization_level": 2},  # above those of state and tests
    )
    expected = init(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, state.variables, dict(expected))


def test_given_parameters_are_kept():
    model = rj.ResNet8Cifar()
    given = random_variables(model)
    config = Config(train=Train(ema_decay=0.9))
    state = create_state(model, optax.sgd(0.1, momentum=0.9), config, 3, dict(given))
    jax.tree.map(np.testing.assert_array_equal, state.variables, dict(given))
    jax.tree.map(np.testing.assert_array_equal, state.ema, dict(given))
    assert not any(x.any() for x in jax.tree.leaves(state.opt_state))
