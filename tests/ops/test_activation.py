"""ReLU and bias, and what their derivatives read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.ops.activation import add_bias, relu


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_and_its_gradient_are_those_of_jax(dtype):
    x = jnp.array([-jnp.inf, -2, -1e-30, -0.0, 0.0, 1e-30, 3, jnp.inf], dtype)
    weights = jnp.arange(1, 9, dtype=dtype)

    def run(function):
        value, pull_back = jax.vjp(function, x)
        return value, *pull_back(weights), jax.jvp(function, (x,), (weights,))[1]

    for found, expected in zip(run(relu), run(jax.nn.relu), strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_on_a_gpu_the_gradient_of_relu_reads_the_result(platform):
    """There a convolution may end in the ReLU, and write only the result."""
    traced = jax.jit(jax.grad(lambda x: relu(x).sum())).trace(jnp.ones(2))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    (line,) = (line for line in text.splitlines() if "stablehlo.compare" in line)
    assert ("NE," in line) == (platform in ("cuda", "rocm"))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_on_a_gpu_a_bias_has_the_type_of_the_convolution(platform):
    x = jnp.ones((2, 4), jnp.bfloat16)
    text = jax.jit(add_bias).trace(x, jnp.ones(4)).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.add" in text
    assert ("tensor<2x4xf32>" in text) == (platform in ("cpu", "tpu"))


def test_the_gradient_of_a_bias_is_summed_in_float32():
    x, bias = jnp.zeros((2, 64, 64, 3), jnp.bfloat16), jnp.zeros(3)
    by_bias = jax.grad(lambda bias: add_bias(x, bias).astype(jnp.float32).sum())(bias)
    # 8192 ones; in bfloat16, 256 + 1 is 256.
    assert by_bias.dtype == jnp.float32
    assert by_bias.tolist() == [8192.0] * 3
