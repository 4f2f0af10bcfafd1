"""Pooling over windows, by the formula that is fastest on the platform it is compiled for."""

from __future__ import annotations

import functools
import itertools

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
    # A TPU has an operation for the gradient of a window. Elsewhere, XLA's gradient makes several
    # arrays of indices, each larger than x, and a GPU scatters the gradient one number at a time.
    return lax.platform_dependent(
        *(*primals, *tangents),
        tpu=lambda x, dx: jax.jvp(lambda x: _xla_max_pool(x, border), (x,), (dx,)),
        default=functools.partial(max_pool_by_places, border=border),
    )


def max_pool_by_places(x: jax.Array, dx: jax.Array, border: int) -> tuple[jax.Array, jax.Array]:
    """The jvp of `max_pool`, with the place of each window's maximum in a byte.

    Where pixels are equal, the gradient goes to the first of a window, row by row, as in
    `flax.linen.max_pool`. Takes x and its tangent dx, both [N, H, W, C] without the border.

    Example:
      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> y, dy = max_pool_by_places(x, 10 * x, border=1)
      >>> y[0, :, :, 0].tolist(), dy[0, :, :, 0].tolist()
      ([[4.0, 5.0], [7.0, 8.0]], [[40.0, 50.0], [70.0, 80.0]])
    """
    y, places = _maxima(_in_blocks(x, border, -jnp.inf))
    return y, _pixels_at(places, _in_blocks(dx, border, 0))


# The border and the pixels are cut into blocks of 2x2. The window in row a and column b consists of
# the pixels in rows 0 to 2 and columns 0 to 2 of the 4x4 pixels that begin with block (a, b). The
# place of the pixel in row r and column c of those is 4 r + c.


def _in_blocks(x: jax.Array, border: int, value: float) -> jax.Array:
    """[N, H, W, C] to [N, A + 1, 2, B + 1, 2, C] for A times B windows; `value` fills the rest."""
    batch, height, width, channels = x.shape
    rows, columns = (1 + (side + 2 * border - 1) // 2 for side in (height, width))
    below, right = 2 * rows - height - border, 2 * columns - width - border
    edges = ((0, 0, 0), (border, below, 0), (border, right, 0), (0, 0, 0))
    x = lax.pad(x, jnp.asarray(value, x.dtype), edges)
    return x.reshape(batch, rows, 2, columns, 2, channels)


def _maxima(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maximum of each window and its place: [N, A + 1, 2, B + 1, 2, C] to two [N, A, B, C]."""
    rows, columns = blocks.shape[1] - 1, blocks.shape[3] - 1
    best = blocks[:, :rows, 0, :columns, 0]
    places = jnp.zeros(best.shape, jnp.uint8)
    for row, column in itertools.product(range(3), repeat=2):
        (down, upper), (right, left) = divmod(row, 2), divmod(column, 2)
        pixels = blocks[:, down : down + rows, upper, right : right + columns, left]
        # JAX's derivative of a maximum would divide the gradient between equal numbers.
        better = (pixels > best) | jnp.isnan(pixels)
        best = jnp.where(better, pixels, best)
        places = jnp.where(better, jnp.uint8(4 * row + column), places)
    return best, places


def _pixels_at(places: jax.Array, blocks: jax.Array) -> jax.Array:
    """Each window's pixel at the place, from the four blocks that it may be in: [N, A, B, C].

    Its transpose, the gradient, reads for each pixel the four windows that the pixel may be in.
    """
    rows, columns = places.shape[1:3]
    places = places[:, :, None, :, None]
    found = []
    for down, right in itertools.product(range(2), repeat=2):
        block = blocks[:, down : down + rows, :, right : right + columns]
        row, column = (lax.broadcasted_iota(places.dtype, block.shape, axis) for axis in (2, 4))
        # Row and column within the block; those of another block wrap around to large numbers.
        here = (places // 4 - 2 * down == row) & (places % 4 - 2 * right == column)
        found.append(jnp.where(here, block, 0).sum((2, 4)))
    return functools.reduce(jnp.add, found)


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
