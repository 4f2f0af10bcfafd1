"""What augmentation does to one image, with every parameter given.

Images are float32 [H, W, C] with values in 0..255, not rounded unless a function says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode "L"
# Eigenvalues and eigenvectors (in columns) of the covariance of ImageNet's colours in 0..1, for
# section 4.1 of Krizhevsky et al. 2012, as published with fb.resnet.torch.
PCA_VALUES = (0.2175, 0.0188, 0.0045)
PCA_VECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


def blend(image: jax.Array, other: jax.Array, factor: float | jax.Array) -> jax.Array:
    """Moves an image away from another one (factor > 1) or towards it (factor < 1).

    Args:
      image: Values in 0..255, of any shape.
      other: Values in 0..255 that broadcast to it: black, grey, or a smoothed image.
      factor: 1 keeps the image, 0 gives the other one.

    Returns:
      Values clipped to 0..255, not rounded.

    Example:
      >>> blend(jnp.array([100.0, 200.0]), jnp.zeros(()), 1.5).tolist()
      [150.0, 255.0]
    """
    return jnp.clip(factor * image + (1 - factor) * other, 0, 255)


def luma(image: jax.Array) -> jax.Array:
    """The brightness of each pixel as the eye weighs colours (ITU-R 601).

    Args:
      image: [H, W, C]; one channel is its own brightness, and of other than three, none of which
        is known to be a color, it is the mean.

    Returns:
      [H, W, 1].

    Example:
      >>> luma(jnp.array([[[100.0, 0.0, 0.0]]])).round().tolist()
      [[[30.0]]]
    """
    if image.shape[-1] != len(LUMA):
        return image.mean(-1, keepdims=True)
    # A sum, not a product of matrices, which a TPU would compute in bfloat16.
    return (image * jnp.array(LUMA)).sum(-1, keepdims=True)


def adjust_contrast(image: jax.Array, factor: float | jax.Array) -> jax.Array:
    """Moves an image away from its mean brightness, as torchvision's `adjust_contrast`.

    Args:
      image: [H, W, C], values in 0..255.
      factor: 1 keeps the image, 0 gives a grey one.

    Returns:
      The same shape, clipped to 0..255.

    Example:
      >>> adjust_contrast(jnp.array([50.0, 150.0]).reshape(1, 2, 1), 0.5).ravel().tolist()
      [75.0, 125.0]
    """
    return blend(image, luma(image).mean(), factor)


def adjust_hue(image: jax.Array, shift: float | jax.Array) -> jax.Array:
    """Turns the colour circle of HSV, as torchvision's `adjust_hue`.

    Args:
      image: [H, W, 3], of any non-negative scale.
      shift: Part of the circle: 1/3 makes red green.

    Returns:
      The same shape.

    Example:
      >>> adjust_hue(jnp.array([[[200.0, 0.0, 0.0]]]), 1 / 3).round(2).tolist()
      [[[0.0, 200.0, 0.0]]]
    """
    red, green, blue = jnp.moveaxis(image, -1, 0)
    value = image.max(-1)
    chroma = value - image.min(-1)
    divisor = jnp.where(chroma > 0, chroma, 1)
    # Sixths of the circle, from the largest channel. It is found by comparing channels: they need
    # not equal their maximum where the compiler computes them twice and rounds differently.
    hue = jnp.where(green >= blue, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    is_red = (red >= green) & (red >= blue)
    hue = jnp.where(is_red, (green - blue) / divisor, hue) + 6 * shift
    # Each channel falls from the largest to the least value within a sixth, and is low for two.
    place = (hue[..., None] + jnp.array([5.0, 3.0, 1.0])) % 6
    depth = jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
    return value[..., None] - chroma[..., None] * depth


def shift_colors(image: jax.Array, weights: jax.Array) -> jax.Array:
    """Shifts all pixels along the main axes of ImageNet's colours (Krizhevsky et al. 2012, 4.1).

    Args:
      image: [H, W, 3], values in 0..255.
      weights: Normal draws [3], one for each axis.

    Returns:
      The same shape, not clipped.

    Example:
      >>> shift_colors(jnp.zeros((1, 1, 3)), jnp.array([0.0, 1.0, 0.0])).round().tolist()
      [[[3.0, -0.0, -3.0]]]
    """
    along = jnp.array(PCA_VECTORS) * (jnp.array(PCA_VALUES) * weights)
    return image + 255 * along.sum(1)


def smooth(image: jax.Array) -> jax.Array:
    """Pillow's SMOOTH filter: a 3x3 mean in which the centre weighs 5; the border is kept.

    Args:
      image: [H, W, C].

    Returns:
      The same shape, rounded.

    Example:
      >>> smooth(jnp.zeros((3, 3, 1)).at[1, 1].set(130.0))[:, :, 0].tolist()
      [[0.0, 0.0, 0.0], [0.0, 50.0, 0.0], [0.0, 0.0, 0.0]]
    """
    height, width = image.shape[:2]
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    columns = padded[:-2] + padded[1:-1] + padded[2:]
    total = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * image
    inner = box((height, width), 1, 1, height - 2, width - 2)[..., None]
    return jnp.where(inner, jnp.floor(total / 13 + 0.5), image)


def pad_and_crop(
    image: jax.Array,
    pad: int,
    top: int | jax.Array,
    left: int | jax.Array,
    fill: jax.typing.ArrayLike,
) -> jax.Array:
    """Cuts a window of the image's size out of the padded image (He et al. 2015, section 4.2).

    Args:
      image: [H, W, C], whole values in 0..255.
      pad: Border in pixels on each side.
      top: Of the window in the padded image, 0 to 2 pad; pad keeps the image in place.
      left: Of the window in the padded image, 0 to 2 pad.
      fill: Value of the border, one or one for each channel.

    Returns:
      [H, W, C], float32.

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
    """The same for TPUs, which slice the images of a batch one after another.

    Each row of the two matrices has a single 1, or none where the window lies outside the image:
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
    """The affine map of a rotation about the image's centre.

    Args:
      degrees: Anticlockwise angle.
      height: Of the image in pixels.
      width: Of the image in pixels.

    Returns:
      A matrix [2, 3] for `warp`.

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
      matrix: Affine map [2, 3] from a place (x, y) in the result to one in the image, in pixels;
        the centre of the first pixel is (0.5, 0.5). On a TPU the absolute values of the first two
        numbers of a row must not add up to more than 2: no rotation, shear of up to 1, or
        translation does.
      fill: Value, or one for each channel, of what lies outside the image.
      nearest: Take the nearest pixel instead of interpolating bilinearly.
      levels: The image has whole values in 0..255, which is faster on a TPU.

    Returns:
      The same shape, not rounded.

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
    """Values of an image at places x and y [H, W], beyond the border those of the border."""
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

    Each tile of the result reads a band of 2 TILE rows of the image. One matrix product takes the
    bands out of the image; a second one takes, for each pixel of the tile, its column out of the
    band; what is left to choose is the row. Each sum has one term that is not 0, so products
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
        share, values = upper.astype(jnp.float32), take(left)
    else:
        lower = (top - first)[:, None] + 1 == row
        down, right = (y - 0.5 - top)[:, None], (x - 0.5 - left)[:, None, None]
        share = jnp.where(upper, 1 - down, jnp.where(lower, down, 0))
        values = (1 - right) * take(left) + right * take(left + 1)
    return _from_tiles((share[:, :, None] * values).sum(1), height, width)


def _tiles(values: jax.Array) -> jax.Array:
    """[H, W] to tiles [T, TILE * TILE], the last ones filled up with the values at the border."""
    height, width = values.shape
    values = jnp.pad(values, ((0, -height % TILE), (0, -width % TILE)), mode="edge")
    values = values.reshape(-(-height // TILE), TILE, -(-width // TILE), TILE)
    return values.swapaxes(1, 2).reshape(-1, TILE * TILE)


def _from_tiles(tiles: jax.Array, height: int, width: int) -> jax.Array:
    """[T, C, TILE * TILE] to [H, W, C]."""
    down, across = -(-height // TILE), -(-width // TILE)
    tiles = tiles.reshape(down, across, -1, TILE, TILE).transpose(0, 3, 1, 4, 2)
    return tiles.reshape(down * TILE, across * TILE, -1)[:height, :width]


def look_up(image: jax.Array, table: jax.Array) -> jax.Array:
    """Replaces each level by its entry in a table.

    Args:
      image: [H, W, C], whole values in 0..255.
      table: New levels [256, C], whole values in 0..255.

    Returns:
      [H, W, C], float32.

    Example:
      >>> table = 255 - jnp.arange(256.0)[:, None]
      >>> look_up(jnp.array([[[0.0], [55.0]]]), table).ravel().tolist()
      [255.0, 200.0]
    """
    return lax.platform_dependent(
        image, table, tpu=_look_up_by_products, default=_look_up_by_gather
    )


def _look_up_by_gather(image: jax.Array, table: jax.Array) -> jax.Array:
    channels = image.shape[-1]
    places = image.astype(jnp.int32) * channels + jnp.arange(channels)
    return table.ravel().at[places].get(mode="promise_in_bounds")


def _look_up_by_products(image: jax.Array, table: jax.Array) -> jax.Array:
    # The upper four bits of a level choose 16 entries by a product, the lower ones one of them.
    # Each sum has one term that is not 0, a level, which bfloat16 holds exactly.
    upper, lower = _hexadecimal(image)
    table = table.reshape(16, 16, -1).astype(jnp.bfloat16)
    entries = jnp.einsum(
        "hwcu,ulc->hwcl", upper.astype(jnp.bfloat16), table, preferred_element_type=jnp.float32
    )
    return jnp.where(lower, entries, 0).sum(-1)


def histogram(image: jax.Array) -> jax.Array:
    """How many pixels have each level.

    Args:
      image: [H, W, C], whole values in 0..255, of at most 2^24 pixels.

    Returns:
      int32 [256, C].

    Example:
      >>> histogram(jnp.array([[[0.0], [3.0], [3.0]]]))[:4, 0].tolist()
      [1, 0, 0, 2]
    """
    return lax.platform_dependent(image, tpu=_histogram_by_products, default=_histogram_by_scatter)


def _histogram_by_scatter(image: jax.Array) -> jax.Array:
    def channel(levels: jax.Array) -> jax.Array:
        return jnp.zeros(256, jnp.int32).at[levels].add(1, mode="promise_in_bounds")

    levels = image.astype(jnp.int32).reshape(-1, image.shape[-1])
    return jax.vmap(channel, 1, 1)(levels)


def _histogram_by_products(image: jax.Array) -> jax.Array:
    # Pixels with upper bits u and lower bits l: a product of two matrices of zeros and ones, of
    # which float32 holds the sums exactly. One product for all pairs of channels is faster than one
    # for each channel; only the pairs of a channel with itself are needed.
    upper, lower = (bits.astype(jnp.bfloat16) for bits in _hexadecimal(image))
    counts = jnp.einsum("hwcu,hwdl->ulcd", upper, lower, preferred_element_type=jnp.float32)
    counts = jnp.diagonal(counts, axis1=2, axis2=3)
    return counts.reshape(256, -1).astype(jnp.int32)


def _hexadecimal(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which of 16 values the upper and the lower four bits of each level have: bool [..., 16]."""
    upper = jnp.floor(image / 16)
    digits = jnp.arange(16)
    return upper[..., None] == digits, (image - 16 * upper)[..., None] == digits


# Numbers that a group of images has at most. A group has two images or more: with one, XLA for TPUs
# lay out the whole batch so that an image is not in one piece.
GROUP = 2**15


def apply_where_needed(
    function: Callable[..., jax.Array], needed: jax.Array, values: jax.Array, *others: jax.Array
) -> jax.Array:
    """Applies a function to the images of a batch, where it can, to those that it changes only.

    A conditional under `vmap` computes all images. CPUs and TPUs compute those that need it, a few
    at a time; a GPU, which would wait for the host between them, computes all.

    Args:
      function: From what belongs to one image, of `values` and of each of `others`, to a new value
        of the same shape and kind; it gives back the value that came in where it is not needed.
      needed: bool [N].
      values: [N, ...], what the function changes.
      others: Arrays [N, ...].

    Returns:
      [N, ...].

    Example:
      >>> values, factors = jnp.arange(3.0) + 1, jnp.array([2.0, 1.0, 5.0])
      >>> apply_where_needed(jnp.multiply, factors != 1, values, factors).tolist()
      [2.0, 2.0, 15.0]
    """

    def in_groups(needed: jax.Array, *arrays: jax.Array) -> jax.Array:
        numbers = max(x.size for x in arrays) // len(needed)
        size = min(max(GROUP // numbers, 2), len(needed))
        order = jnp.argsort(~needed)

        def group(index: jax.Array, results: jax.Array) -> jax.Array:
            # The last group begins earlier where it would reach past the end: it computes some
            # images a second time, from the values that came in.
            places = lax.dynamic_slice(order, (index * size,), (size,))
            parts = (x.at[places].get(mode="promise_in_bounds") for x in arrays)
            new = jax.vmap(function)(*parts)
            return results.at[places].set(new, mode="promise_in_bounds", unique_indices=True)

        groups = (needed.sum() + size - 1) // size
        return lax.fori_loop(0, groups, group, arrays[0])

    def at_once(needed: jax.Array, *arrays: jax.Array) -> jax.Array:
        return jax.vmap(function)(*arrays)

    return lax.platform_dependent(
        needed, values, *others, cpu=in_groups, tpu=in_groups, default=at_once
    )


def box(
    shape: tuple[int, int],
    top: int | jax.Array,
    left: int | jax.Array,
    height: int | jax.Array,
    width: int | jax.Array,
) -> jax.Array:
    """Which pixels lie in a box; what reaches past the image is cut off.

    Args:
      shape: Height and width of the image in pixels.
      top: First row, may be negative.
      left: First column, may be negative.
      height: Of the box in pixels.
      width: Of the box in pixels.

    Returns:
      bool [H, W].

    Example:
      >>> box((2, 3), -1, 1, 2, 5).astype(int).tolist()
      [[0, 1, 1], [0, 0, 0]]
    """
    rows, columns = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])
    inside_rows = (rows >= top) & (rows < top + height)
    return inside_rows & (columns >= left) & (columns < left + width)


def mix_neighbors(values: jax.Array, share: jax.Array) -> jax.Array:
    """Blends 2j with 2j + 1, each into the other.

    Args:
      values: [N, ...], N even.
      share: Of the neighbour, 0 to 1; broadcasts to `values`.

    Returns:
      The same shape.

    Example:
      >>> mix_neighbors(jnp.array([0.0, 8.0]), jnp.array([0.25, 0.25])).tolist()
      [2.0, 6.0]
    """
    pairs = values.reshape(-1, 2, *values.shape[1:])
    neighbors = pairs[:, ::-1].reshape(values.shape)
    return (1 - share) * values + share * neighbors
