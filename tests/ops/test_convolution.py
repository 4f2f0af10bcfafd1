"""Every formula for a convolution equals XLA's: values, gradients, and derivatives of both."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from resnet_jax import upstream
from resnet_jax.ops import convolution
from resnet_jax.ops.convolution import ConvOptions, convolve, xla_convolution

# (side of the kernel, height, width, stride, dilation)
CASES = [
    (1, 6, 6, 1, 1),
    (1, 6, 5, 2, 1),
    (3, 6, 6, 1, 1),
    (3, 6, 5, 1, 2),
    (3, 6, 6, 2, 1),
    (3, 7, 5, 2, 1),
    (3, 5, 6, 2, 2),
    (3, 1, 1, 1, 1),
    (5, 7, 8, 3, 1),
    (7, 12, 12, 2, 1),
]


def draw(case, channels=3, features=4):
    side, height, width, stride, dilation = case
    rng = np.random.default_rng(sum(case))
    x = rng.normal(size=(2, height, width, channels)).astype(np.float32)
    kernel = rng.normal(size=(side, side, channels, features)).astype(np.float32)
    options = ConvOptions(stride, dilation)
    y = xla_convolution(jnp.asarray(x), jnp.asarray(kernel), options)
    return x, kernel, options, rng.normal(size=y.shape).astype(np.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_xla(case):
    x, kernel, options, cotangent = draw(case)

    def run(function):
        @jax.jit
        def value_and_gradients(x, kernel):
            y, pull_back = jax.vjp(lambda x, k: function(x, k, options), x, kernel)
            return y, pull_back(cotangent)

        return value_and_gradients(x, kernel)

    chex.assert_trees_all_close(run(convolve), run(xla_convolution), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_product_is_the_convolution(case):
    x, kernel, options, _ = draw(case)
    chex.assert_trees_all_close(
        convolution.convolution_by_product(x, kernel, options),
        xla_convolution(x, kernel, options),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "case",
    [(7, 12, 12, 2, 1), (7, 11, 8, 2, 1), (3, 6, 7, 2, 1), (5, 9, 11, 3, 1), (7, 1, 2, 2, 1)],
    ids=str,
)
def test_a_convolution_of_blocks_and_its_gradients_are_xlas(case, channels):
    x, kernel, options, cotangent = draw(case, channels)

    def run(function):
        y, pull_back = jax.vjp(lambda x, k: function(x, k, options), x, kernel)
        return y, pull_back(cotangent)

    chex.assert_trees_all_close(
        run(convolution.convolution_of_blocks), run(xla_convolution), rtol=1e-5, atol=1e-5
    )


def test_a_convolution_of_blocks_in_bfloat16_is_as_near_to_float32_as_xlas():
    exact, kernel, options, _ = draw((7, 32, 32, 2, 1))
    x, kernel = jnp.asarray(exact, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    expected = xla_convolution(x.astype(jnp.float32), kernel.astype(jnp.float32), options)

    def error(function):
        return jnp.abs(function(x, kernel, options).astype(jnp.float32) - expected).max()

    assert error(convolution.convolution_of_blocks) <= error(xla_convolution)


@pytest.mark.parametrize(
    ("platform", "stride", "channels", "sides"),
    [
        ("cuda", 2, 3, "4x4x16x8"),
        ("rocm", 2, 3, "4x4x16x8"),
        ("tpu", 2, 3, "7x7x3x8"),
        ("cpu", 2, 3, "7x7x3x8"),
        ("cuda", 1, 3, "7x7x3x8"),
        ("cuda", 2, 8, "7x7x8x8"),
    ],
)
def test_a_strided_convolution_of_few_channels_runs_over_blocks_on_a_gpu(
    platform, stride, channels, sides
):
    x, kernel = jnp.ones((1, 16, 16, channels)), jnp.ones((7, 7, channels, 8))
    traced = jax.jit(lambda x, k: convolve(x, k, ConvOptions(stride))).trace(x, kernel)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    (line,) = (line for line in text.splitlines() if "stablehlo.convolution" in line)
    height, width, inputs, outputs = sides.split("x")
    shapes = {sides, f"{outputs}x{height}x{width}x{inputs}"}
    assert any(f"tensor<{shape}xf32>" in line for shape in shapes)


@pytest.mark.parametrize("slow", [False, True], ids=["small maps", "few channels and strides"])
@pytest.mark.parametrize("case", [(3, 7, 7, 1, 1), (3, 9, 8, 1, 1), (3, 9, 8, 2, 1)], ids=str)
def test_training_by_products_is_training_by_xla(case, slow, monkeypatch):
    monkeypatch.setattr(upstream, "slow_convolutions_on_cpu", lambda: slow)
    x, kernel, options, cotangent = draw(case, channels=16)

    def run(function):
        y, pull_back = jax.vjp(lambda x, k: function(x, k, options), x, kernel)
        return y, pull_back(cotangent)

    def formula(x, kernel, options):  # not `convolve`, which is traced once for a shape
        return convolution.convolution_with_product_gradient(x, kernel, options)

    chex.assert_trees_all_close(run(formula), run(xla_convolution), rtol=1e-4, atol=1e-4)
    text = jax.jit(lambda: run(formula)).lower().as_text()
    products = slow or case[1:3] == (7, 7)
    assert text.count("stablehlo.convolution") == (0 if products else 2)


@pytest.mark.parametrize("case", [(1, 4, 4, 2, 1), (3, 4, 4, 1, 1), (3, 4, 4, 2, 1)], ids=str)
def test_every_kind_of_derivative_exists(case):
    x, kernel, options, _ = draw(case, channels=2, features=2)
    check_grads(
        lambda x, k: jnp.sin(convolve(x, k, options)),
        (x, kernel),
        order=2,
        modes=["fwd", "rev"],
        rtol=2e-2,
        atol=2e-2,
    )


def test_hessian_vector_product_by_forward_over_reverse():
    x, kernel, options, direction = draw((3, 6, 6, 1, 1), channels=4, features=4)

    def curvature(function):
        def loss(x):
            return jnp.sum(jnp.tanh(function(x, kernel, options)))

        return jax.jit(lambda v: jax.jvp(jax.grad(loss), (x,), (v,))[1])(direction)

    chex.assert_trees_all_close(
        curvature(convolve), curvature(xla_convolution), rtol=1e-4, atol=1e-4
    )


def test_vmap_over_kernels():
    x, kernel, options, _ = draw((3, 6, 6, 2, 1))
    kernels = np.stack([kernel, 2 * kernel])
    y = jax.vmap(lambda k: convolve(x, k, options))(kernels)
    chex.assert_trees_all_close(y[1], 2 * y[0], rtol=1e-5)


def test_groups_are_xlas():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 4, 4, 8)), rng.normal(size=(3, 3, 2, 12))
    y = convolve(jnp.float32(x), jnp.float32(kernel), ConvOptions(groups=4))
    chex.assert_shape(y, (1, 4, 4, 12))


@pytest.mark.parametrize(
    ("platform", "dtype", "products"),
    [("cpu", "float32", 3), ("cpu", "bfloat16", 0), ("tpu", "float32", 0), ("cuda", "float32", 0)],
)
def test_the_platform_is_chosen_when_lowering(platform, dtype, products):
    """A 1x1 convolution is products of float32 on a CPU and stays a convolution elsewhere."""
    x, kernel = jnp.ones((1, 4, 4, 8), dtype), jnp.ones((1, 1, 8, 8), dtype)

    @jax.jit
    def gradients(x, kernel):
        y, pull_back = jax.vjp(lambda x, k: convolve(x, k, ConvOptions()), x, kernel)
        return pull_back(jnp.sin(y))

    text = gradients.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == products
    assert text.count("stablehlo.convolution") == 3 - products
