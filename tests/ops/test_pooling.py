"""The pools equal XLA's maximum and mean over windows, with every kind of derivative."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from resnet_jax.ops.pooling import average_pool_2x2, max_pool, max_pool_by_places


@pytest.mark.parametrize("zero_padding", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (7, 6), (5, 5), (2, 3), (1, 1)], ids=str)
def test_pool_and_gradient_are_those_of_xla(size, zero_padding):
    """Whole numbers: most windows have several maxima, and only one of them has the gradient."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 3, (2, *size, 3)), jnp.float32)

    def plain(x):
        border = 0.0 if zero_padding else -jnp.inf
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=border)
        return nn.max_pool(x, (3, 3), (2, 2), "VALID")

    cotangent = rng.normal(size=plain(x).shape).astype(np.float32)

    def run(pool):
        @jax.jit
        def value_and_gradient(x):
            y, pull_back = jax.vjp(pool, x)
            return y, pull_back(cotangent)

        return value_and_gradient(x)

    def ours(x):
        return max_pool(x, zero_padding)

    chex.assert_trees_all_close(run(ours), run(plain), rtol=0, atol=1e-6)


# What a window may hold: equal pixels, no pixel above the border, bfloat16.
@pytest.mark.parametrize("values", ["whole numbers", "infinities", "negative"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "size", [pytest.param((8, 8), marks=pytest.mark.slow), (7, 6), (1, 1)], ids=str
)
def test_values_and_derivatives_by_places_are_those_of_flax(size, dtype, values):
    """A tangent and a cotangent of whole numbers, which both formulas add exactly."""
    rng = np.random.default_rng(0)
    shape = (2, *size, 3)
    drawn = {
        "whole numbers": rng.integers(-2, 3, shape),
        "infinities": rng.choice([-np.inf, 0.0, np.inf], shape, p=[0.8, 0.1, 0.1]),
        "negative": -rng.exponential(size=shape),
    }
    x, tangent = jnp.asarray(drawn[values], dtype), jnp.asarray(rng.integers(-9, 9, shape), dtype)

    def flax_pool(x):
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def by_places(tangent):
        return max_pool_by_places(x, tangent, border=1)

    flax_y, flax_tangent = jax.jvp(flax_pool, (x,), (tangent,))
    y, y_tangent = by_places(tangent)
    chex.assert_trees_all_equal(y, flax_y)
    # In a window without a pixel above -inf, only Flax's gradient goes to the first one.
    chex.assert_trees_all_equal(y_tangent[y > -jnp.inf], flax_tangent[y > -jnp.inf])

    cotangent = jnp.asarray(rng.integers(-9, 9, y.shape), dtype)
    (gradient,) = jax.linear_transpose(lambda t: by_places(t)[1], tangent)(cotangent)
    chex.assert_trees_all_equal(gradient, jax.vjp(flax_pool, x)[1](cotangent)[0])


def test_gradients_of_single_images_are_those_of_the_batch():
    x = np.random.default_rng(0).normal(size=(3, 5, 6, 2)).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(max_pool(x) ** 2))
    alone = jax.vmap(lambda x: gradient(x[None])[0])(x)
    chex.assert_trees_all_close(alone, gradient(x), rtol=1e-6)


def test_every_kind_of_derivative_exists():
    x = np.random.default_rng(0).normal(size=(1, 5, 4, 2)).astype(np.float32)
    check_grads(
        lambda x: jnp.sin(max_pool(x)), (x,), order=2, modes=["fwd", "rev"], rtol=2e-2, atol=2e-2
    )


def test_gradient_of_the_pool_follows_the_platform():
    traced = jax.jit(jax.grad(lambda x: max_pool(x).sum())).trace(jnp.zeros((1, 8, 8, 2)))
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "rocm", "tpu")
    }
    by_window = {platform: "select_and_scatter" in text for platform, text in texts.items()}
    assert by_window == {"cpu": False, "cuda": False, "rocm": False, "tpu": True}
    assert " conditional(" not in traced.lower().compile().as_text()


def test_a_number_that_is_not_finite_reaches_every_window_that_has_it():
    """First of one window and last of another, while a gradient is taken."""
    x = jnp.zeros((1, 6, 6, 1)).at[0, 1, 1].set(jnp.nan)
    y = jax.jit(lambda x: jax.vjp(max_pool, x)[0])(x)
    expected = np.zeros((3, 3), bool)
    expected[:2, :2] = True
    np.testing.assert_array_equal(np.isnan(y[0, :, :, 0]), expected)


@pytest.mark.parametrize("shape", [(1, 4, 6, 2), (1, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_average_pool_has_gradients_in_a_jitted_program(shape, stride):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    @jax.jit
    def pool(x):
        return average_pool_2x2(x, stride)

    check_grads(pool, (x,), order=2, modes=["fwd", "rev"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [(8, 8), (7, 6), (5, 5), (1, 1)], ids=str)
def test_average_pool_and_gradient_are_those_of_flax(size):
    """Under jit, as in training, where a sum over windows has a gradient only if JAX sees one."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)

    def plain(x):
        beyond = [(0, side % 2) for side in size]
        return nn.avg_pool(x, (2, 2), (2, 2), padding=beyond, count_include_pad=False)

    def run(pool):
        cotangent = np.random.default_rng(1).normal(size=plain(x).shape)

        @jax.jit
        def value_and_gradient(x):
            y, pull_back = jax.vjp(pool, x)
            return y, pull_back(cotangent.astype(np.float32))

        return value_and_gradient(x)

    chex.assert_trees_all_close(
        run(lambda x: average_pool_2x2(x, 2)), run(plain), rtol=0, atol=1e-6
    )
