"""Batch norm in one operation with a product or a pool equals the plain order of both."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

import resnet_jax as rj
from resnet_jax.models.norms import BatchNorm, conv_norm, norm_relu_pool
from resnet_jax.ops.batch_norm import batch_moments, normalize
from resnet_jax.ops.convolution import ConvOptions
from resnet_jax.ops.pooling import max_pool
from resnet_jax.ops.product_norm import (
    ProductNorm,
    mean_outer_product,
    product_norm_from_input,
    product_norm_from_output,
    product_norm_sum_as_one,
    product_norm_sum_of_two,
)
from tests.variables import random_variables


def trace_as_on(platform, monkeypatch):
    """Traces the formulas of another platform; they run here all the same."""

    def choose(*operands, default, **formulas):
        return formulas.get(platform, default)(*operands)

    monkeypatch.setattr(lax, "platform_dependent", choose)


@pytest.fixture(params=["tpu", "cuda"])
def as_on_accelerator(monkeypatch, request):
    trace_as_on(request.param, monkeypatch)


def draw(seed=0, channels=4, features=12):
    rng = np.random.default_rng(seed)
    return {
        "x": np.maximum(rng.normal(size=(3, 5, 4, channels)) + 0.3, 0).astype(np.float32),
        "kernel": rng.normal(size=(channels, features)).astype(np.float32),
        "running_mean": np.zeros(features, np.float32),
        "scale": rng.normal(size=features).astype(np.float32),
        "bias": rng.normal(size=features).astype(np.float32),
    }


@pytest.mark.parametrize("stride", [1, 2])
def test_moments_of_a_product_from_its_input(stride):
    product = ProductNorm(**draw())
    rows, columns = -(-5 // stride), -(-4 // stride)
    weights = np.random.default_rng(1).normal(size=(3, rows, columns, 12)).astype(np.float32)

    def run(function):
        def weighted(product):
            options = ConvOptions(stride=stride)
            y, mean, variance = function(product, epsilon=1e-5, options=options)
            return (y * weights).sum() + mean.sum() + jnp.square(variance).sum(), (
                y,
                mean,
                variance,
            )

        return jax.jit(jax.value_and_grad(weighted, has_aux=True))(product)

    chex.assert_trees_all_close(
        run(product_norm_from_input), run(product_norm_from_output), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_a_sum_of_two_norms_as_one_product(stride):
    first, second = ProductNorm(**draw(seed=2)), ProductNorm(**draw(channels=4, seed=3))
    if stride == 2:  # [3, 5, 4, 6] -> [3, 3, 2, 6]
        first = first._replace(x=first.x[:, :3, :2])
    shape = (*first.x.shape[:3], first.kernel.shape[1])
    weights = np.random.default_rng(1).normal(size=shape).astype(np.float32)

    def run(function):
        def weighted(terms):
            y, *moments = function(*terms, epsilon=1e-5, options=ConvOptions(stride=stride))
            return (y * weights).sum() + sum(jnp.square(each).sum() for each in moments), y

        return jax.jit(jax.value_and_grad(weighted, has_aux=True))((first, second))

    chex.assert_trees_all_close(
        run(product_norm_sum_as_one), run(product_norm_sum_of_two), rtol=1e-4, atol=1e-4
    )


def test_every_kind_of_derivative_exists():
    x = draw(channels=2)["x"]
    check_grads(mean_outer_product, (x,), order=2, modes=["fwd", "rev"], rtol=2e-2, atol=2e-2)


def example_far_from_zero():
    """Channels whose means are up to thirty times their spread."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(4, 5, 3, 6)) * [1, 0.5, 2, 1, 1, 3] + [0, 15, -20, 1, 30, 5]
    scale, bias = rng.normal(size=(2, 6))
    return x, scale, bias, rng.normal(size=x.shape)


def test_batch_norm_and_its_gradients_are_those_of_the_textbook():
    x, scale, bias, cotangent = example_far_from_zero()

    # Ioffe & Szegedy 2015, section 3, in float64.
    deviation = x - x.mean((0, 1, 2))
    deviations = np.sqrt(x.var((0, 1, 2)) + 1e-5)
    normalized = deviation / deviations
    by_scale, by_bias = (cotangent * normalized).sum((0, 1, 2)), cotangent.sum((0, 1, 2))
    count = x.size // x.shape[-1]
    by_x = scale / deviations * (cotangent - (by_bias + normalized * by_scale) / count)

    norm = rj.BatchNorm()
    arguments = jax.tree.map(jnp.float32, ({"scale": scale, "bias": bias}, x))
    statistics = {"mean": jnp.zeros(6), "var": jnp.ones(6)}

    @jax.jit
    def value_and_gradients(params, x):
        def apply(params, x):
            variables = {"params": params, "batch_stats": statistics}
            return norm.apply(variables, x, train=True, mutable=["batch_stats"])

        y, pull_back, updates = jax.vjp(apply, params, x, has_aux=True)
        return y, updates["batch_stats"], pull_back(jnp.float32(cotangent))

    y, updates, (by_params, found_by_x) = value_and_gradients(*arguments)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(y, normalized * scale + bias)
    close(updates["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-6)
    close(updates["var"], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-6)
    close(found_by_x, by_x)
    close(by_params["scale"], by_scale)
    close(by_params["bias"], by_bias)


def test_batch_norm_has_every_kind_of_derivative():
    x, scale, bias, _ = example_far_from_zero()

    def apply(x, scale, bias):
        moments = batch_moments(x, jnp.zeros(6))
        return jnp.sin(normalize(x, *moments, scale, bias, 1e-5))

    arguments = jax.tree.map(jnp.float32, (x / 10, scale, bias))
    check_grads(apply, arguments, order=2, modes=["fwd", "rev"], rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older XLA keeps one more array")
def test_on_a_cpu_the_backward_pass_keeps_nothing_but_the_input():
    """Deviations from a mean, forwards and backwards, would be two arrays as large as x more."""
    x, kernel = jnp.zeros((64, 32, 32, 16)), jnp.zeros((16, 16))
    norm = rj.BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=False)

    def loss_of(x, weights):
        y, _ = norm.apply(variables, x, train=True, mutable=["batch_stats"])
        return (nn.relu(y) @ kernel * weights).sum()

    program = jax.jit(jax.value_and_grad(loss_of)).lower(x, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2.5 * x.nbytes


@pytest.mark.parametrize("stride", [1, 2])
def test_the_formula_follows_the_platform(stride):
    conv, norm = rj.Conv(12, 1, stride), rj.BatchNorm()

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return conv_norm(conv.copy(name="conv"), norm.copy(name="norm"), x, train=True)

    x = jnp.asarray(draw()["x"])
    variables = Both().init(jax.random.key(0), x)
    traced = jax.jit(lambda x: Both().apply(variables, x, mutable=["batch_stats"])).trace(x)
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    # The covariance of the input is 4 x 4.
    covariance = {platform: "-> tensor<4x4xf32>" in text for platform, text in texts.items()}
    assert covariance == {"cpu": False, "cuda": True, "tpu": stride == 1}
    assert " conditional(" not in traced.lower().compile().as_text()


def test_a_norm_with_relu_is_a_norm_then_relu():
    x, scale, bias, weights = jax.tree.map(jnp.float32, example_far_from_zero())
    norm = rj.BatchNorm()
    statistics = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}

    def run(method):
        def weighted(params, x):
            variables = {"params": params, "batch_stats": statistics}
            y, updates = norm.apply(variables, x, method=method, mutable=["batch_stats"])
            return (y * weights).sum(), (y, updates)

        gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
        return gradients({"scale": scale, "bias": bias}, x)

    def plain(norm, x):
        return nn.relu(norm(x, train=True))

    found, expected = run(rj.BatchNorm.relu), run(plain)
    assert 0.2 < (expected[0][1][0] > 0).mean() < 0.8
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_a_pool_commutes_with_a_norm(train):
    x = np.random.default_rng(0).normal(size=(3, 6, 7, 5)).astype(np.float32)
    norm = rj.BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=False)
    variables["params"]["scale"] = jnp.array([2.0, -1.0, 0.5, -3.0, 1.0])  # both signs
    variables["params"]["bias"] = jnp.array([0.1, 0.2, -0.3, 0.4, 0.0])
    variables["batch_stats"]["mean"] = jnp.array([0.5, 0.5, -0.5, 0.1, 0.2])

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x):
            return norm_relu_pool(norm.copy(name="norm"), x, train)

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return max_pool(nn.relu(norm.copy(name="norm")(x, train)))

    def run(module):
        def weighted(params, x):
            variables_ = {"params": params, "batch_stats": {"norm": variables["batch_stats"]}}
            y, updates = module.apply(variables_, x, mutable=["batch_stats"])
            return (y * jnp.arange(1.0, 6.0)).sum(), (y, updates)

        gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
        return gradients({"norm": variables["params"]}, x)

    chex.assert_trees_all_close(run(Ours()), run(Plain()), rtol=1e-4, atol=1e-5)


def bottlenecks(dtype=jnp.float32, **fields):
    return rj.ResNet(stage_sizes=(2, 1), stage_widths=(8, 16), num_classes=5, dtype=dtype, **fields)


def train_once(model, variables, images):
    def loss_of(params):
        logits, updates = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.square(logits - 1).mean(), (logits, updates)

    (_, (logits, updates)), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
        variables["params"]
    )
    return {"logits": logits, "statistics": updates, "gradients": gradients}


def distance(results, exact):
    """Relative distance of all values of each kind."""
    flat = {name: ravel_pytree(tree)[0] for name, tree in results.items()}
    true = {name: ravel_pytree(tree)[0] for name, tree in exact.items()}
    return {
        name: float(jnp.linalg.norm(flat[name].astype(jnp.float32) - true[name]))
        / float(jnp.linalg.norm(true[name]))
        for name in flat
    }


def example():
    images = np.random.default_rng(3).normal(size=(16, 32, 32, 3)).astype(np.float32)
    return random_variables(bottlenecks()), images


@pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_a_network_as_on_an_accelerator_equals_the_plain_one(platform, monkeypatch):
    variables, images = example()
    plain = train_once(bottlenecks(), variables, images)
    trace_as_on(platform, monkeypatch)
    ours = train_once(bottlenecks(), variables, images)
    assert max(distance(ours, plain).values()) < 1e-4


@pytest.mark.parametrize("platform", [pytest.param("tpu", marks=pytest.mark.slow), "cuda"])
def test_bfloat16_is_as_near_to_float32_as_the_plain_network(platform, monkeypatch):
    variables, images = example()
    exact = train_once(bottlenecks(), variables, images)
    plain = distance(train_once(bottlenecks(jnp.bfloat16), variables, images), exact)
    trace_as_on(platform, monkeypatch)
    ours = distance(train_once(bottlenecks(jnp.bfloat16), variables, images), exact)
    assert all(ours[name] < 1.2 * plain[name] for name in plain), (ours, plain)


@pytest.mark.usefixtures("as_on_accelerator")
@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.devices(8)
def test_devices_share_the_moments_of_a_product(group_size):
    arguments = draw(seed=5)
    x = np.stack([arguments["x"] * (1 + device) + device for device in range(4)])

    class Both(nn.Module):
        axis_name: str | None = None

        @nn.compact
        def __call__(self, x):
            norm = rj.BatchNorm(axis_name=self.axis_name, group_size=group_size, name="norm")
            return conv_norm(rj.Conv(12, 1, name="conv"), norm, x, train=True)

    ours, alone = Both("batch"), Both()
    variables = alone.init(jax.random.key(0), x[0])
    variables["params"]["conv"]["kernel"] = arguments["kernel"][None, None]
    apply = functools.partial(ours.apply, variables, mutable=["batch_stats"])
    found, statistics = jax.pmap(apply, axis_name="batch")(x)
    share = group_size or 4
    for first in range(0, 4, share):
        images = x[first : first + share].reshape(-1, *x.shape[2:])
        y, expected = alone.apply(variables, images, mutable=["batch_stats"])
        group = found[first : first + share].reshape(y.shape)
        chex.assert_trees_all_close(group, y, rtol=1e-4, atol=1e-4)
        each = jax.tree.map(lambda s, first=first: s[first], statistics)
        chex.assert_trees_all_close(each, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("as_on_accelerator")
def test_far_from_zero_the_running_mean_keeps_the_variance():
    """What a TPU takes deviations from; at the true mean the one-pass variance is exact."""
    x = 1000 + np.random.default_rng(0).normal(size=(64, 4, 4, 2)).astype(np.float32)
    _, variance = batch_moments(jnp.asarray(x), jnp.full(2, 1000.0))
    np.testing.assert_allclose(variance, x.var((0, 1, 2), dtype=np.float64), rtol=1e-4)


def test_other_norms_and_convolutions_keep_the_plain_order():
    x = jnp.asarray(draw()["x"])

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = conv_norm(nn.Conv(12, (1, 1), name="conv"), rj.GroupNorm(name="norm"), x, True)
            return norm_relu_pool(rj.GroupNorm(name="last"), x, True)

    y, variables = Plain().init_with_output(jax.random.key(0), x)
    conv, norm = nn.Conv(12, (1, 1)), rj.GroupNorm()
    expected = conv.apply({"params": variables["params"]["conv"]}, x)
    for name in ("norm", "last"):
        expected = norm.apply({"params": variables["params"][name]}, expected, train=True)
    chex.assert_trees_all_close(y, max_pool(nn.relu(expected)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["relu", "relu_max_pool"])
def test_statistics_stay_float32_where_jax_has_float64(method):
    with jax.enable_x64(True):
        norm, x = BatchNorm(), jnp.ones((2, 4, 4, 8), jnp.float32)
        variables = norm.init(jax.random.key(0), x, train=False)
        _, updates = norm.apply(variables, x, mutable=["batch_stats"], method=method)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {np.dtype(np.float32)}
