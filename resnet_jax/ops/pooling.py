"""Pooling over windows, by the formula that is fastest on the platform it is compiled for."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax import upstream
from resnet_jax.ops.sharding import BATCH, over_batch


@over_batch(BATCH)
def max_pool(x: jax.Array, zero_padding: bool = False) -> jax.Array:
    """The stem's 3x3 max pool with stride 2: [N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), C].

    With `zero_padding` the border counts as 0 instead of being left out. BiT does so, and it
    matters there because no ReLU comes before the pool.
    """
    if zero_padding:
        return _max_of_windows(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 0)
    return _max_of_windows(x, 1)


def _xla_max_pool(x: jax.Array, border: int) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), ((border, border), (border, border)))


_max_of_windows = jax.custom_jvp(_xla_max_pool, nondiff_argnums=(1,))


@_max_of_windows.defjvp
def _max_of_windows_tangent(
    border: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    edges = ((0, 0), (border, border), (border, border), (0, 0))

    def by_pairs(x: jax.Array) -> jax.Array:
        return max_pool_by_pairs(jnp.pad(x, edges, constant_values=-jnp.inf))

    # On a CPU, XLA's gradient of a window makes four arrays of indices, each as large as x.
    return lax.platform_dependent(
        primals,
        tangents,
        cpu=functools.partial(jax.jvp, by_pairs),
        default=functools.partial(jax.jvp, functools.partial(_xla_max_pool, border=border)),
    )


def max_pool_by_pairs(x: jax.Array) -> jax.Array:
    """`max_pool` of x [N, H + 2, W + 2, C], border included, as maxima of two pixels at a time.

    Where pixels are equal, the gradient goes to the first of a window, row by row, as in
    `flax.linen.max_pool`.

    Example:
      >>> max_pool_by_pairs(jnp.arange(25.0).reshape(1, 5, 5, 1))[0, :, :, 0].tolist()
      [[12.0, 14.0], [22.0, 24.0]]
    """
    for axis in (2, 1):
        length = x.shape[axis] - 2
        neighbors = [
            lax.slice_in_dim(x, start, start + length, stride=2, axis=axis) for start in range(3)
        ]
        x = functools.reduce(_larger, neighbors)
    return x


# JAX's own rule would divide the gradient between equal numbers.
@jax.custom_jvp
def _larger(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.maximum(first, second)


@_larger.defjvp
def _larger_tangent(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _larger(*primals), jnp.where(primals[0] >= primals[1], *tangents)


@over_batch(BATCH)
def average_pool_2x2(x: jax.Array, stride: int) -> jax.Array:
    """The 2x2 average of ResNet-D: [N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), C].

    The stride is 2, or 1 where a dilated network keeps its resolution. Where windows reach past
    the lower or right edge, those with stride 2 average the pixels they have, and those with
    stride 1 count zeros beyond the edge, as timm's published networks do.

    Example:
      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> average_pool_2x2(x, 2)[0, :, :, 0].tolist()
      [[2.0, 3.5], [6.5, 8.0]]
      >>> average_pool_2x2(x, 1)[0, :, :, 0].tolist()
      [[2.0, 3.0, 1.75], [5.0, 6.0, 3.25], [3.25, 3.75, 2.0]]
    """

    def window_sum(values: jax.Array) -> jax.Array:
        # ceil(side / stride) windows for every side; the last may reach one pixel past the edge.
        edges = (0, 1)
        padding = ((0, 0), edges, edges, (0, 0))
        return upstream.window_sum(values, (1, 2, 2, 1), (1, stride, stride, 1), padding)

    if stride == 1:
        return window_sum(x) / 4
    pixels = window_sum(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
    return window_sum(x) / pixels
