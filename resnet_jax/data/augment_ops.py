"""What augmentation does to one image, with every parameter given.

Images are float32 [H, W, C] with values in 0..255, not rounded unless a function says so.
"""

from __future__ import annotations

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
      image: [H, W, C]; one channel is its own brightness.

    Returns:
      [H, W, 1].

    Example:
      >>> luma(jnp.array([[[100.0, 0.0, 0.0]]])).round().tolist()
      [[[30.0]]]
    """
    if image.shape[-1] == 1:
        return image
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
      image: [H, W, C].
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
    # `jnp.pad` takes one number, not one for each channel.
    height, width, channels = image.shape
    padded = jnp.broadcast_to(fill, (height + 2 * pad, width + 2 * pad, channels))
    padded = padded.at[pad : pad + height, pad : pad + width].set(image)
    return lax.dynamic_slice(padded, (top, left, 0), image.shape)


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
    image: jax.Array, matrix: jax.Array, fill: jax.typing.ArrayLike, nearest: bool = False
) -> jax.Array:
    """Resamples an image as Pillow's `Image.transform(..., AFFINE)` does.

    Args:
      image: [H, W, C].
      matrix: Affine map [2, 3] from a place (x, y) in the result to one in the image, in pixels;
        the centre of the first pixel is (0.5, 0.5).
      fill: Value, or one for each channel, of what lies outside the image.
      nearest: Take the nearest pixel instead of interpolating bilinearly.

    Returns:
      The same shape, not rounded.

    Example:
      >>> image = jnp.arange(4.0).reshape(1, 4, 1)
      >>> warp(image, jnp.array([[1.0, 0.0, 1.25], [0.0, 1.0, 0.0]]), -1.0)[0, :, 0].tolist()
      [1.25, 2.25, 3.0, -1.0]
    """
    height, width, channels = image.shape
    # Integers first: an iota of floats would be a constant to fold at compile time.
    x = jnp.arange(width).astype(jnp.float32)[None, :] + 0.5
    y = jnp.arange(height).astype(jnp.float32)[:, None] + 0.5
    x, y = (row[0] * x + row[1] * y + row[2] for row in matrix)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixels = image.reshape(-1, channels)

    def take(row: jax.Array, column: jax.Array) -> jax.Array:
        row = jnp.clip(row, 0, height - 1).astype(jnp.int32)
        column = jnp.clip(column, 0, width - 1).astype(jnp.int32)
        return pixels.at[row * width + column].get(mode="promise_in_bounds")

    if nearest:
        result = take(jnp.floor(y), jnp.floor(x))
    else:
        top, left = jnp.floor(y - 0.5), jnp.floor(x - 0.5)
        down, right = (y - 0.5 - top)[..., None], (x - 0.5 - left)[..., None]
        upper = (1 - right) * take(top, left) + right * take(top, left + 1)
        lower = (1 - right) * take(top + 1, left) + right * take(top + 1, left + 1)
        result = (1 - down) * upper + down * lower
    return jnp.where(inside[..., None], result, fill)


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
