"""Biases and ReLU as a GPU's convolution kernels take them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), with a derivative that reads on a GPU the result instead of x.

    Where x is read again, a GPU cannot compute the ReLU inside the convolution before it.

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

    # XLA would make x > 0 of y > 0.
    def by_result(x: jax.Array, y: jax.Array) -> jax.Array:
        return y != 0

    def by_argument(x: jax.Array, y: jax.Array) -> jax.Array:
        return x > 0

    formulas = {"cuda": by_result, "rocm": by_result}
    passes = lax.platform_dependent(*primals, y, **formulas, default=by_argument)
    return y, jnp.where(passes, tangents[0], 0)


@jax.custom_jvp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """The sum of a convolution's output x [..., C] and a bias [C], in the type of x.

    A GPU adds inside the convolution what has its type, before it rounds the sum; in float32, it
    would write the convolution and read it again. Elsewhere float32 costs nothing.

    Example:
      >>> add_bias(jnp.ones((1, 2), jnp.bfloat16), jnp.array([1.0, 2.0])).tolist()
      [[2.0, 3.0]]
    """

    def in_type_of_x(x: jax.Array, bias: jax.Array) -> jax.Array:
        return x + bias.astype(x.dtype)

    def in_float32(x: jax.Array, bias: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) + bias).astype(x.dtype)

    if x.dtype == jnp.float32:
        return x + bias
    formulas = {"cuda": in_type_of_x, "rocm": in_type_of_x}
    return lax.platform_dependent(x, bias, **formulas, default=in_float32)


@add_bias.defjvp
def _add_bias_tangent(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    dx, dbias = tangents
    # The gradient of the bias is a sum over all pixels, and so needs float32.
    return add_bias(*primals), (dx.astype(jnp.float32) + dbias).astype(dx.dtype)
