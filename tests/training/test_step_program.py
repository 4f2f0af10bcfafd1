"""Several steps in one program: the same steps, with fewer arrays in the loop on a GPU."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax import config as c
from resnet_jax.training import step_program
from resnet_jax.training.packing import packing
from resnet_jax.training.state import TrainState
from resnet_jax.training.step import _joined
from resnet_jax.training.step_program import StepProgram, make_steps

STEPS, IMAGES, ADAM = 3, 6, optax.adam(0.1)


def state_of_many_arrays(vectors=40, optimizer=ADAM):
    """Vectors, scalars and matrices of several types, as a state has them."""
    rng = np.random.default_rng(0)
    params = {f"v{i}": rng.normal(size=3 + i % 4).astype(np.float32) for i in range(vectors)}
    params |= {"matrix": rng.normal(size=(3, 4)).astype(np.float32), "one": np.float32(2)}
    seen = {"half": np.ones(2, jnp.bfloat16)}
    ema = {"params": params, "batch_stats": {}}
    return TrainState(np.int32(0), params, seen, optimizer.init(params), ema, None), optimizer


def small_step(optimizer):
    def step(state, batch):
        def loss_of(params):
            total = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
            return total * batch["images"].astype(jnp.float32).mean() / 256

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state)
        new = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=jax.tree.map(lambda x: x / 2, state.batch_stats),
            opt_state=opt_state,
            ema=jax.tree.map(lambda x: x / 2, state.ema),
        )
        return new, {"loss": loss}

    return step


def images_and_choices():
    rng = np.random.default_rng(1)
    data = {"images": rng.integers(0, 256, (9, 2, 2, 1), np.uint8), "labels": np.arange(9)}
    return data, {"indices": rng.integers(0, 9, (IMAGES, STEPS))}


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_a_call_takes_the_steps_one_after_another(platform):
    state, optimizer = state_of_many_arrays(8, optax.sgd(0.1, momentum=0.9))
    step = small_step(optimizer)
    data, choices = images_and_choices()
    found, metrics = jax.jit(make_steps(step, platform))(state, data, choices)
    losses = []
    for chosen in choices["indices"].T:
        state, one = jax.jit(step)(state, {name: x[chosen] for name, x in data.items()})
        losses.append(one["loss"])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, state)
    chex.assert_trees_all_close(found, state, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)


@pytest.mark.parametrize(("platform", "few"), [("tpu", False), ("gpu", True)])
def test_the_loop_on_a_gpu_carries_few_arrays(platform, few):
    state, optimizer = state_of_many_arrays()
    program = jax.make_jaxpr(make_steps(small_step(optimizer), platform))
    jaxpr = program(state, *images_and_choices())
    (loop,) = (each for each in jaxpr.eqns if each.primitive.name == "scan")
    carried, leaves = len(loop.outvars) - 1, len(jax.tree.leaves(state))  # and the loss
    # 4 matrices; 4 x 41 vectors of float32, 32 in each part; one of bfloat16; two counts
    assert leaves == 4 + 4 * 41 + 1 + 2
    assert carried == (4 + 6 + 1 + 1 if few else leaves)


def test_packing_changes_no_bit():
    state, _ = state_of_many_arrays()
    state.params["v0"][:] = [np.nan, -0.0, np.inf]
    pack, unpack = packing(state)
    found = jax.jit(lambda tree: unpack(pack(tree)))(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, state)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_every_number_is_looked_at():
    """Before a step is taken, its numbers are joined; each has to be there once."""
    rng = np.random.default_rng(0)
    shapes = [(), (3,), (2, 5), (3, 3, 4, 8), (512, 257), *[(2,)] * 30]
    tree = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    joined = _joined(tree)
    assert len(joined) == 3  # 34 small ones, and a large one
    every = np.concatenate([np.ravel(x) for x in joined])
    np.testing.assert_array_equal(np.sort(every), np.sort(np.concatenate([*map(np.ravel, tree)])))


@pytest.mark.parametrize("steps", [1, 2])
def test_loops_have_their_own_compiler_options(steps, monkeypatch):
    given = []
    monkeypatch.setattr(step_program, "command_buffer_options", lambda: {"xla_option": "1"})
    monkeypatch.setattr(
        step_program.data_parallel,
        "parallel_step",
        lambda call, replicated, options: given.append((replicated, options)),
    )
    config = c.Config(train=c.Train(steps_per_call=steps))
    images, labels = np.zeros((4, 2, 2, 1), np.uint8), np.zeros(4, np.int32)
    data = step_program.InMemoryDataset(images, labels)
    StepProgram(lambda state, batch: (state, {}), config, data, sampler=None)
    assert given == [(1, {"xla_option": "1"}) if steps > 1 else (0, None)]
