"""Schedules and updates against plain statements of them."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import config as c
from resnet_jax.config.model import make_model
from resnet_jax.config.schema import SCHEDULES
from resnet_jax.training.loop import train
from resnet_jax.training.optimizer import (
    RunLength,
    current_learning_rate,
    describe_cut_warmup,
    make_optimizer,
    make_schedule,
    peak_learning_rate,
)
from resnet_jax.training.state import create_state
from tests.training.runs import state_of

LENGTH = RunLength(steps=100, steps_per_epoch=10.0)


def rates(**fields):
    config = c.Config(optimizer=c.Optimizer(learning_rate=1.0), schedule=c.Schedule(**fields))
    schedule = make_schedule(config, LENGTH)
    return np.array([float(schedule(step)) for step in range(101)])


def test_length_follows_from_epochs_batch_and_images():
    config = c.Config(train=c.Train(epochs=3.0, batch_size=128))
    assert RunLength.of(config, images=50_000).steps == round(3 * 50_000 / 128)
    assert RunLength.of(config, images=10).steps == 1
    config.train.steps = 7
    assert RunLength.of(config, images=50_000).steps == 7


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
    np.testing.assert_allclose(found[[9, 20, 49, 51]], [10 / 21, 1, 1, 0.1], 1e-5)


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


def test_one_cycle_without_a_rise_only_falls():
    np.testing.assert_allclose(rates(name="one_cycle"), rates(name="linear"))


def test_a_warmup_without_a_start_rises_by_equal_steps_from_above_0():
    found = rates(name="constant", warmup_epochs=0.4)  # 4 steps
    np.testing.assert_allclose(found[:6], [0.2, 0.4, 0.6, 0.8, 1, 1], rtol=1e-6)


def test_a_warmup_starts_where_its_source_says():
    found = rates(name="constant", warmup_epochs=0.4, warmup_start=0.5)
    np.testing.assert_allclose(found[:6], [0.5, 0.625, 0.75, 0.875, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_of_a_run_has_a_rate_above_0(name):
    for warmup, steps in itertools.product((0, 1, 10, 200), (1, 2, 100)):
        schedule = c.Schedule(name=name, warmup_epochs=warmup / 10, boundaries=(0.9,))
        found = schedule_of(schedule, RunLength(steps, 10.0))
        assert (found > 0).all()
        assert (np.diff(found[: min(warmup + 1, 89)]) > 0).all()
        assert (found.max() == 1) == (steps > warmup)


def schedule_of(schedule, length):
    """The rate of each step of a run."""
    config = c.Config(optimizer=c.Optimizer(learning_rate=1.0), schedule=schedule)
    found = np.array(make_schedule(config, length)(np.arange(length.steps)))
    return np.broadcast_to(found, length.steps)  # a constant is one number


def test_a_short_run_begins_as_the_whole_run():
    schedule = c.Schedule(warmup_epochs=2.0)
    whole = schedule_of(schedule, RunLength(100, 10.0))
    np.testing.assert_array_equal(schedule_of(schedule, RunLength(5, 10.0)), whole[:5])


def test_a_drop_within_the_warmup_is_applied_where_it_lies():
    found = rates(name="step", boundaries=(0.05,), factor=0.1, warmup_epochs=0.9)
    np.testing.assert_allclose(found[:5], np.arange(1, 6) / 10, rtol=1e-6)
    np.testing.assert_allclose(found[5:11], [0.06, 0.07, 0.08, 0.09, 0.1, 0.1], rtol=1e-5)


def test_drops_of_a_short_run_that_fall_on_one_step_all_count():
    schedule = c.Schedule(name="step", boundaries=(0.1, 0.5, 0.6, 0.9), factor=0.5)
    found = schedule_of(schedule, RunLength(3, 10.0))
    # Rounded: before steps 0 (the first: not before it), 2, 2 and 3 (the end).
    np.testing.assert_allclose(found, [1, 0.5, 0.125])
    np.testing.assert_allclose(schedule_of(schedule, RunLength(1, 10.0)), [1])


def test_a_run_that_ends_in_its_warmup_says_so():
    config = c.Config(optimizer=c.Optimizer(learning_rate=0.8))
    config.schedule = c.Schedule(warmup_epochs=1.5)
    assert describe_cut_warmup(config, RunLength(16, 10.0)) == ""
    assert describe_cut_warmup(config, RunLength(4, 10.0)) == (
        "the run ends in its warm-up, which takes 15 steps (schedule.warmup_epochs = 1.5): at its "
        "last step the learning rate is 0.2, and the peak is 0.8. To reach the peak, take more "
        "than 15 steps or a smaller schedule.warmup_epochs"
    )
    assert describe_cut_warmup(config, RunLength(15, 10.0))


@pytest.mark.usefixtures("tiny_model")
def test_one_step_within_a_warmup_trains(tmp_path, capsys):
    config = c.Config(
        model=c.Model(name="tiny"),
        data=c.Data(name="digits", image_size=8, threads=2),
        optimizer=c.Optimizer(momentum=0.0, weight_decay=0.0),
        schedule=c.Schedule(warmup_epochs=1.0),
        train=c.Train(steps=1, batch_size=48),
        log=c.Log(tensorboard=False),
    )
    train(config, tmp_path)
    assert "ends in its warm-up, which takes 30 steps" in capsys.readouterr().err
    optimizer = make_optimizer(config, RunLength(1, 1437 / 48))
    start = create_state(make_model(config, 10), optimizer, config, channels=1)
    trained = state_of(tmp_path)["params"]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), start.params, trained)))


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
