"""Biases and ReLU as a GPU's convolution kernels take them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), with a derivative that reads the result.

    That of `jax.nn.relu` reads x, so x is stored beside the result, and a GPU cannot compute ReLU
    inside the convolution before it.

    Example:
      >>> relu(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_tangent(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y = relu(*primals)
    return y, jnp.where(y != 0, tangents[0], 0)


@jax.custom_jvp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """The sum of x [..., C] and a bias [C], in the type of x."""
    return x + bias.astype(x.dtype)


@add_bias.defjvp
def _add_bias_tangent(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    dx, dbias = tangents
    # The gradient of the bias is a sum over all pixels, and so needs float32.
    return add_bias(*primals), (dx.astype(jnp.float32) + dbias).astype(dx.dtype)
