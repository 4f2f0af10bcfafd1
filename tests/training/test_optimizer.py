"""Schedules and updates against plain statements of them."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.training import config as c
from resnet_jax.training.optimizer import (
    Length,
    current_learning_rate,
    make_optimizer,
    make_schedule,
    peak_learning_rate,
)

LENGTH = Length(steps=100, steps_per_epoch=10.0)


def rates(**fields):
    config = c.Config(optimizer=c.Optimizer(learning_rate=1.0), schedule=c.Schedule(**fields))
    schedule = make_schedule(config, LENGTH)
    return np.array([float(schedule(step)) for step in range(101)])


def test_length_follows_from_epochs_batch_and_images():
    config = c.Config(train=c.Train(epochs=3.0, batch_size=128))
    assert Length.of(config, images=50_000).steps == round(3 * 50_000 / 128)
    assert Length.of(config, images=10).steps == 1
    config.train.steps = 7
    assert Length.of(config, images=50_000).steps == 7


def test_learning_rate_scales_with_the_batch():
    config = c.Config(optimizer=c.Optimizer(learning_rate=0.1, base_batch=256))
    config.train.batch_size = 8192
    assert peak_learning_rate(config) == pytest.approx(3.2)


def test_constant():
    np.testing.assert_allclose(rates(name="constant"), 1.0)


def test_step():
    found = rates(name="step", boundaries=(0.3, 0.6), factor=0.1)
    np.testing.assert_allclose(found[[0, 29, 31, 59, 61, 99]], [1, 1, 0.1, 0.1, 0.01, 0.01], 1e-5)


def test_boundaries_are_shares_of_the_whole_run_with_warmup_too():
    found = rates(name="step", boundaries=(0.5,), factor=0.1, warmup_epochs=2.0)
    np.testing.assert_allclose(found[[10, 20, 49, 51]], [0.5, 1, 1, 0.1], 1e-5)


def test_cosine_with_warmup():
    found = rates(name="cosine", warmup_epochs=1.0, warmup_start=0.2, final=0.1)
    steps = np.arange(101)
    falling = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (steps - 10) / 90))
    expected = np.where(steps < 10, 0.2 + 0.8 * steps / 10, falling)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_linear():
    np.testing.assert_allclose(rates(name="linear")[[0, 50, 100]], [1, 0.5, 0], atol=1e-6)


def test_one_cycle():
    found = rates(name="one_cycle", warmup_epochs=4.0, warmup_start=0.1, final=0.0)
    np.testing.assert_allclose(found[[0, 20, 40, 70, 100]], [0.1, 0.55, 1, 0.5, 0], atol=1e-5)


def run(optimizer, params, gradients, values=(1.0,)):
    """Parameters after some steps, each with the same gradients."""
    state = optimizer.init(params)
    for value in values:
        updates, state = optimizer.update(gradients, state, params, value=jnp.array(value))
        params = {
            part: {name: params[part][name] + updates[part][name] for name in params[part]}
            for part in params
        }
    return params, state


PARAMS = {
    "stem": {"kernel": jnp.full((2, 2), 2.0), "scale": jnp.full(2, 3.0)},
    "head": {"kernel": jnp.full((2, 2), 4.0)},
}
GRADIENTS = {
    "stem": {"kernel": jnp.full((2, 2), 0.5), "scale": jnp.full(2, 0.25)},
    "head": {"kernel": jnp.full((2, 2), 1.0)},
}


def optimizer_config(**fields):
    return c.Config(
        optimizer=c.Optimizer(learning_rate=0.1, **fields), schedule=c.Schedule(name="constant")
    )


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", ["l2", "decoupled"])
@pytest.mark.parametrize("all_decay", [False, True])
def test_sgd(nesterov, decay, all_decay):
    config = optimizer_config(
        nesterov=nesterov, decay=decay, weight_decay=0.01, decay_norms_and_biases=all_decay
    )
    found, _ = run(make_optimizer(config, LENGTH), PARAMS, GRADIENTS, values=(1.0, 1.0, 1.0))

    def expected(weight, gradient, coefficient):
        velocity = 0.0
        for _ in range(3):
            total = gradient + (coefficient * weight if decay == "l2" else 0)
            velocity = 0.9 * velocity + total
            step = total + 0.9 * velocity if nesterov else velocity
            weight -= 0.1 * (step + (coefficient * weight if decay == "decoupled" else 0))
        return weight

    np.testing.assert_allclose(found["stem"]["kernel"], expected(2.0, 0.5, 0.01), rtol=1e-5)
    norm_decay = 0.01 if all_decay else 0.0
    np.testing.assert_allclose(found["stem"]["scale"], expected(3.0, 0.25, norm_decay), rtol=1e-5)


@pytest.mark.parametrize("name", ["lars", "lamb", "adamw"])
def test_other_optimizers_descend_and_spare_norms_from_decay(name):
    config = optimizer_config(name=name, weight_decay=0.5)
    nothing = {part: {n: 0 * x for n, x in tree.items()} for part, tree in GRADIENTS.items()}
    decayed, _ = run(make_optimizer(config, LENGTH), PARAMS, nothing)
    chex.assert_trees_all_equal(decayed["stem"]["scale"], PARAMS["stem"]["scale"])
    assert (decayed["stem"]["kernel"] < 2.0).all()
    config = optimizer_config(name=name, weight_decay=0.0)
    found, _ = run(make_optimizer(config, LENGTH), PARAMS, GRADIENTS)
    assert (found["stem"]["kernel"] < 2.0).all()
    assert (found["stem"]["scale"] < 3.0).all()


def test_clipping_by_the_global_norm():
    config = optimizer_config(clip_norm=0.1, momentum=0.0, weight_decay=0.0)
    found, _ = run(make_optimizer(config, LENGTH), PARAMS, GRADIENTS)
    norm = np.sqrt(4 * 0.5**2 + 2 * 0.25**2 + 4 * 1.0**2)
    np.testing.assert_allclose(found["head"]["kernel"], 4.0 - 0.1 * 0.1 / norm, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_slower_backbone(rate):
    config = optimizer_config(backbone_rate=rate, momentum=0.0, weight_decay=0.0)
    found, _ = run(make_optimizer(config, LENGTH), PARAMS, GRADIENTS)
    np.testing.assert_allclose(found["head"]["kernel"], 3.9, rtol=1e-6)
    np.testing.assert_allclose(found["stem"]["kernel"], 2.0 - rate * 0.1 * 0.5, rtol=1e-6)


def test_plateau_drops_after_epochs_without_a_better_loss():
    config = optimizer_config(momentum=0.0, weight_decay=0.0)
    config.schedule = c.Schedule(name="plateau", factor=0.1, patience=2)
    optimizer = make_optimizer(config, LENGTH)
    schedule = make_schedule(config, LENGTH)
    _, better = run(optimizer, PARAMS, GRADIENTS, values=np.linspace(2, 1, 50))
    assert float(current_learning_rate(schedule, better)) == pytest.approx(0.1)
    _, flat = run(optimizer, PARAMS, GRADIENTS, values=[1.0] * 50)
    assert float(current_learning_rate(schedule, flat)) < 0.011
