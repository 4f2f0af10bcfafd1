"""Moves the pixels of one image: crops, rotations and other affine maps.

A TPU gathers one pixel after another, so each function has a second form of matrix products for it.
Images are float32 [H, W, C]; `fill` is one value, or one for each channel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.data.augment.ops import box


def pad_and_crop(
    image: jax.Array,
    pad: int,
    top: int | jax.Array,
    left: int | jax.Array,
    fill: jax.typing.ArrayLike,
) -> jax.Array:
    """Cuts a window of the image's size out of the padded image (He et al. 2015, section 4.2).

    The image has whole values in 0..255. `top` and `left` are those of the window in the padded
    image, 0 to 2 pad.

    Example:
      >>> image = jnp.array([[1.0, 2.0], [3.0, 4.0]])[..., None]
      >>> pad_and_crop(image, 1, 0, 2, jnp.zeros(1))[..., 0].tolist()
      [[0.0, 0.0], [2.0, 0.0]]
    """
    return lax.platform_dependent(
        image.astype(jnp.float32),
        jnp.asarray(top),
        jnp.asarray(left),
        tpu=functools.partial(_crop_by_products, pad=pad, fill=fill),
        default=functools.partial(_crop_by_slice, pad=pad, fill=fill),
    )


def _crop_by_slice(
    image: jax.Array, top: jax.Array, left: jax.Array, pad: int, fill: jax.typing.ArrayLike
) -> jax.Array:
    # `jnp.pad` takes one number, not one for each channel.
    height, width, channels = image.shape
    padded = jnp.broadcast_to(fill, (height + 2 * pad, width + 2 * pad, channels))
    padded = padded.at[pad : pad + height, pad : pad + width].set(image)
    return lax.dynamic_slice(padded, (top, left, 0), image.shape)


def _crop_by_products(
    image: jax.Array, top: jax.Array, left: jax.Array, pad: int, fill: jax.typing.ArrayLike
) -> jax.Array:
    """The same for TPUs, which would slice the images of a batch one after another.

    Each row of the two matrices has a single 1, or none for pixels outside of the image, so
    bfloat16 holds all values and sums exactly.
    """
    height, width = image.shape[:2]
    rows, columns = jnp.arange(height) + top - pad, jnp.arange(width) + left - pad
    down = (rows[:, None] == jnp.arange(height)).astype(jnp.bfloat16)
    across = (columns[:, None] == jnp.arange(width)).astype(jnp.bfloat16)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.bfloat16)
    window = product("iy,yxc->ixc", down, image.astype(jnp.bfloat16))
    window = product("jx,ixc->ijc", across, window).astype(jnp.float32)
    inside = box((height, width), pad - top, pad - left, height, width)
    return jnp.where(inside[..., None], window, fill)


def rotation(degrees: float | jax.Array, height: int, width: int) -> jax.Array:
    """The matrix [2, 3] for `warp` of an anticlockwise rotation about the image's center.

    Example:
      >>> rotation(90.0, 4, 2).round().astype(int).tolist()
      [[0, -1, 3], [1, 0, 1]]
    """
    angle = jnp.deg2rad(jnp.asarray(degrees, jnp.float32))
    cos, sin, x, y = jnp.cos(angle), jnp.sin(angle), width / 2, height / 2
    return jnp.array(((cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)))


def warp(
    image: jax.Array,
    matrix: jax.Array,
    fill: jax.typing.ArrayLike,
    nearest: bool = False,
    levels: bool = False,
) -> jax.Array:
    """Resamples an image as Pillow's `Image.transform(..., AFFINE)` does.

    Args:
      image: [H, W, C].
      matrix: Affine map [2, 3] from a position (x, y) in the result to one in the image, in pixels;
        the center of the first pixel is (0.5, 0.5). On a TPU the absolute values of the first two
        numbers of a row must not add up to more than 2, as is true of rotations, translations, and
        shears of up to 1.
      fill: For positions outside of the image.
      nearest: Take the nearest pixel instead of interpolating bilinearly.
      levels: The image has whole values in 0..255, which is faster on a TPU.

    Example:
      >>> image = jnp.arange(4.0).reshape(1, 4, 1)
      >>> warp(image, jnp.array([[1.0, 0.0, 1.25], [0.0, 1.0, 0.0]]), -1.0)[0, :, 0].tolist()
      [1.25, 2.25, 3.0, -1.0]
    """
    height, width = image.shape[:2]
    # Integers first: an iota of floats would be a constant to fold at compile time.
    x = jnp.arange(width).astype(jnp.float32)[None, :] + 0.5
    y = jnp.arange(height).astype(jnp.float32)[:, None] + 0.5
    x, y = (row[0] * x + row[1] * y + row[2] for row in matrix)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    result = lax.platform_dependent(
        image,
        x,
        y,
        tpu=functools.partial(_sample_by_products, nearest=nearest, levels=levels),
        default=functools.partial(_sample_by_gather, nearest=nearest),
    )
    return jnp.where(inside[..., None], result, fill)


def _sample_by_gather(image: jax.Array, x: jax.Array, y: jax.Array, nearest: bool) -> jax.Array:
    """The image at positions x and y [H, W]; beyond the border, the border's values."""
    height, width, channels = image.shape
    pixels = image.reshape(-1, channels)

    def take(row: jax.Array, column: jax.Array) -> jax.Array:
        row = jnp.clip(row, 0, height - 1).astype(jnp.int32)
        column = jnp.clip(column, 0, width - 1).astype(jnp.int32)
        return pixels.at[row * width + column].get(mode="promise_in_bounds")

    if nearest:
        return take(jnp.floor(y), jnp.floor(x))
    top, left = jnp.floor(y - 0.5), jnp.floor(x - 0.5)
    down, right = (y - 0.5 - top)[..., None], (x - 0.5 - left)[..., None]
    upper = (1 - right) * take(top, left) + right * take(top, left + 1)
    lower = (1 - right) * take(top + 1, left) + right * take(top + 1, left + 1)
    return (1 - down) * upper + down * lower


TILE = 16  # pixels a side; 8 and 32 take longer on a TPU


def _sample_by_products(
    image: jax.Array, x: jax.Array, y: jax.Array, nearest: bool, levels: bool
) -> jax.Array:
    """The same as `_sample_by_gather`, for TPUs, which gather one pixel after another.

    Each tile of the result reads a band of 2 TILE rows of the image. One matrix product copies the
    bands out of the image; a second one copies, for each pixel of the tile, its column out of the
    band; the last step selects the row. Each sum has one term that is not 0, so the products only
    copy: levels are exact in bfloat16, and other values at the highest precision.
    """
    height, width = image.shape[:2]
    dtype = jnp.bfloat16 if levels else jnp.float32
    product = functools.partial(
        jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=dtype
    )
    x, y = _tiles(x), _tiles(y)  # [T, P]
    center = 0.0 if nearest else 0.5
    left, top = jnp.floor(x - center), jnp.floor(y - center)
    first = top.min(1, keepdims=True)
    rows = jnp.clip(first + jnp.arange(2 * TILE), 0, height - 1)
    choice = (rows[..., None] == jnp.arange(height)).astype(dtype)
    bands = product("tbh,hwc->tbcw", choice, image.astype(dtype))

    def take(column: jax.Array) -> jax.Array:
        column = jnp.clip(column, 0, width - 1)[:, None]
        choice = (column == jnp.arange(width)[:, None]).astype(dtype)
        return product("tbcw,twp->tbcp", bands, choice).astype(jnp.float32)

    row = jnp.arange(2 * TILE)[:, None]
    upper = (top - first)[:, None] == row  # [T, 2 TILE, P]
    if nearest:
        weight, values = upper.astype(jnp.float32), take(left)
    else:
        lower = (top - first)[:, None] + 1 == row
        down, right = (y - 0.5 - top)[:, None], (x - 0.5 - left)[:, None, None]
        weight = jnp.where(upper, 1 - down, jnp.where(lower, down, 0))
        values = (1 - right) * take(left) + right * take(left + 1)
    return _from_tiles((weight[:, :, None] * values).sum(1), height, width)


def _tiles(values: jax.Array) -> jax.Array:
    """[H, W] to tiles [T, TILE * TILE]; the last ones are filled with the values at the border."""
    height, width = values.shape
    values = jnp.pad(values, ((0, -height % TILE), (0, -width % TILE)), mode="edge")
    values = values.reshape(-(-height // TILE), TILE, -(-width // TILE), TILE)
    return values.swapaxes(1, 2).reshape(-1, TILE * TILE)


def _from_tiles(tiles: jax.Array, height: int, width: int) -> jax.Array:
    """[T, C, TILE * TILE] to [H, W, C]."""
    down, across = -(-height // TILE), -(-width // TILE)
    tiles = tiles.reshape(down, across, -1, TILE, TILE).transpose(0, 3, 1, 4, 2)
    return tiles.reshape(down * TILE, across * TILE, -1)[:height, :width]
