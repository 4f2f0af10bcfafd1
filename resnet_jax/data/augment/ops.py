"""What augmentation does to the colors of one image, with every parameter given; and helpers.

Images are float32 [H, W, C] with values in 0..255, not rounded unless a function says so.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode "L"
# Eigenvalues and eigenvectors (in columns) of the covariance of ImageNet's colors in 0..1, for
# section 4.1 of Krizhevsky et al. 2012, as published with fb.resnet.torch.
PCA_VALUES = (0.2175, 0.0188, 0.0045)
PCA_VECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


def blend(image: jax.Array, other: jax.Array, factor: float | jax.Array) -> jax.Array:
    """Moves an image away from another one (factor > 1) or towards it (factor < 1).

    Both have values in 0..255, to which the result is clipped; `other` broadcasts to the image.

    Example:
      >>> blend(jnp.array([100.0, 200.0]), jnp.zeros(()), 1.5).tolist()
      [150.0, 255.0]
    """
    return jnp.clip(factor * image + (1 - factor) * other, 0, 255)


def luma(image: jax.Array) -> jax.Array:
    """The brightness of each pixel as the eye weighs colors (ITU-R 601): [H, W, 1].

    For other than three channels, none of which is known to be a color, it is their mean.

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

    Example:
      >>> adjust_contrast(jnp.array([50.0, 150.0]).reshape(1, 2, 1), 0.5).ravel().tolist()
      [75.0, 125.0]
    """
    return blend(image, luma(image).mean(), factor)


def adjust_hue(image: jax.Array, shift: float | jax.Array) -> jax.Array:
    """Turns the color circle of HSV, as torchvision's `adjust_hue`; a shift of 1/3 makes red green.

    The values of the image [H, W, 3] may have any non-negative scale.

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
    """Shifts all pixels along the main axes of ImageNet's colors (Krizhevsky et al. 2012, 4.1).

    The weights are normal draws [3], one for each axis. The result is not clipped.

    Example:
      >>> shift_colors(jnp.zeros((1, 1, 3)), jnp.array([0.0, 1.0, 0.0])).round().tolist()
      [[[3.0, -0.0, -3.0]]]
    """
    along = jnp.array(PCA_VECTORS) * (jnp.array(PCA_VALUES) * weights)
    return image + 255 * along.sum(1)


def smooth(image: jax.Array) -> jax.Array:
    """Pillow's SMOOTH filter: a 3x3 mean in which the center weighs 5, rounded; keeps the border.

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


def look_up(image: jax.Array, table: jax.Array) -> jax.Array:
    """Replaces each level by its entry in a table [256, C]; image and table have whole values.

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
    # The upper four bits of a level select 16 entries by a product; the lower ones select one of
    # them. Each sum has one term that is not 0, a level, which bfloat16 holds exactly.
    upper, lower = _hexadecimal(image)
    table = table.reshape(16, 16, -1).astype(jnp.bfloat16)
    entries = jnp.einsum(
        "hwcu,ulc->hwcl", upper.astype(jnp.bfloat16), table, preferred_element_type=jnp.float32
    )
    return jnp.where(lower, entries, 0).sum(-1)


def histogram(image: jax.Array) -> jax.Array:
    """How many pixels have each level: int32 [256, C]. At most 2^24 pixels, of whole values.

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
    # A product of two matrices of zeros and ones counts the pixels with upper bits u and lower bits
    # l; float32 holds the sums exactly. One product for all pairs of channels is faster than one
    # for each channel; only the pairs of a channel with itself are needed.
    upper, lower = (bits.astype(jnp.bfloat16) for bits in _hexadecimal(image))
    counts = jnp.einsum("hwcu,hwdl->ulcd", upper, lower, preferred_element_type=jnp.float32)
    counts = jnp.diagonal(counts, axis1=2, axis2=3)
    return counts.reshape(256, -1).astype(jnp.int32)


def _hexadecimal(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One-hot upper and lower four bits of each level: bool [..., 16] each."""
    upper = jnp.floor(image / 16)
    digits = jnp.arange(16)
    return upper[..., None] == digits, (image - 16 * upper)[..., None] == digits


# The most numbers in a group of images. A group has at least two images: with one, XLA for TPUs
# chooses a layout of the batch in which an image is not contiguous.
GROUP = 2**15


def apply_where_needed(
    function: Callable[..., jax.Array], needed: jax.Array, values: jax.Array, *others: jax.Array
) -> jax.Array:
    """Applies a function to the images of a batch; CPUs and TPUs skip those that do not need it.

    A conditional under `vmap` computes all images. CPUs and TPUs therefore compute those that need
    it, a few at a time. A GPU would wait for the host between them, and computes all.

    Args:
      function: Takes one image's part of `values` and of each of `others`, and returns a new value
        of the same shape and type: the old value, if it is not needed.
      needed: bool [N].
      values: [N, ...], what the function changes.
      others: Arrays [N, ...].

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
            # The last group starts earlier if it would reach past the end: it computes some images
            # a second time, from the original values.
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
    """The pixels of an image that lie in a box: bool [H, W]; the box may reach past the image.

    Example:
      >>> box((2, 3), -1, 1, 2, 5).astype(int).tolist()
      [[0, 1, 1], [0, 0, 0]]
    """
    rows, columns = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])
    inside_rows = (rows >= top) & (rows < top + height)
    return inside_rows & (columns >= left) & (columns < left + width)


def mix_neighbors(values: jax.Array, fraction: jax.Array) -> jax.Array:
    """Blends 2j with 2j + 1, each into the other; `fraction` is that of the neighbor.

    Example:
      >>> mix_neighbors(jnp.array([0.0, 8.0]), jnp.array([0.25, 0.25])).tolist()
      [2.0, 6.0]
    """
    pairs = values.reshape(-1, 2, *values.shape[1:])
    neighbors = pairs[:, ::-1].reshape(values.shape)
    return (1 - fraction) * values + fraction * neighbors
