"""RandAugment and TrivialAugment: their operations on one image, and the draws among them.

A vmapped `lax.switch` computes all its branches. So an operation is not a branch that returns an
image, but an `Edit`: a few small arrays that parametrize a table look-up, a warp and two blends.
Each of these four is computed for the images that need it. To add an operation, add its edit to
`EDITS`, and its range of magnitudes to the sets at the end of this file.

Images are float32 [H, W, C] with the whole values 0..255 of a uint8 image. Results are rounded to
the nearest value, where Pillow cuts off the fraction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.data.augment.geometry import rotation, warp
from resnet_jax.data.augment.ops import apply_where_needed, blend, histogram, look_up, smooth


class Edit(NamedTuple):
    """What one operation does to an image.

    Args:
      table: New level of each of the 256 levels [256, C].
      equalize: bool, take the table that equalizes the image's histogram instead.
      matrix: Affine map [2, 3] from a pixel (x, y) of the result to one of the image, in pixels.
      color: Factor of the distance to the gray image.
      sharpness: Factor of the distance to the smoothed image.
    """

    table: jax.Array
    equalize: jax.Array
    matrix: jax.Array
    color: jax.Array
    sharpness: jax.Array


def transform(
    image: jax.Array,
    operation: str,
    value: float | jax.Array = 0.0,
    fill: jax.typing.ArrayLike = 0.0,
    nearest: bool = False,
) -> jax.Array:
    """Applies one operation to an image.

    Args:
      image: [H, W, C], whole values in 0..255.
      operation: A key of `EDITS`.
      value: Degrees, pixels, fraction of the side, factor, bits, or threshold.
      fill: Value, or one for each channel, of pixels from outside of the image.
      nearest: Affine operations take the nearest pixel instead of interpolating bilinearly.

    Example:
      >>> transform(jnp.full((1, 1, 3), 200.0), "Posterize", 1.0)[0, 0].tolist()
      [128.0, 128.0, 128.0]
    """
    edit = EDITS[operation](image, jnp.asarray(value, jnp.float32))
    edits = jax.tree.map(lambda x: x[None], edit)
    return _apply(image[None], edits, fill, nearest)[0]


def rand_augment(
    images: jax.Array,
    keys: jax.Array,
    layers: int,
    magnitude: float,
    magnitude_std: float,
    fill: jax.typing.ArrayLike,
) -> jax.Array:
    """RandAugment (Cubuk et al. 2020) as timm's "rand-mM-nN-mstdS-inc1".

    Each layer draws one of 15 operations with replacement and applies it with probability 1/2; all
    become stronger with the magnitude. timm draws bilinear or bicubic interpolation; here it is
    always bilinear.

    Args:
      images: [N, H, W, C], whole values in 0..255.
      keys: One for each image's draws [N].
      layers: Number of draws.
      magnitude: 0 to 10.
      magnitude_std: Standard deviation of each draw's magnitude, which is clipped to 0..10.
      fill: Value, or one for each channel, of pixels from outside of the image.

    Example:
      >>> images, keys = jnp.zeros((4, 8, 8, 3)), jax.random.split(jax.random.key(0), 4)
      >>> rand_augment(images, keys, 2, 9.0, 0.5, 128.0).shape
      (4, 8, 8, 3)
    """

    def draw(image: jax.Array, key: jax.Array) -> Edit:
        chosen, applied, strength, side = jax.random.split(key, 4)
        identity = len(RAND_OPERATIONS) - 1
        index = jax.random.randint(chosen, (), 0, identity)
        index = jnp.where(jax.random.bernoulli(applied), index, identity)
        level = magnitude + magnitude_std * jax.random.normal(strength, dtype=jnp.float32)
        level = jnp.clip(level, 0, 10) / 10
        return _select_edit(image, RAND_OPERATIONS, index, level, _sign(side))

    def layer(images: jax.Array, keys: jax.Array) -> tuple[jax.Array, None]:
        return _apply(images, jax.vmap(draw)(images, keys), fill, nearest=False), None

    keys = jax.vmap(lambda key: jax.random.split(key, layers), out_axes=1)(keys)
    return lax.scan(layer, images, keys)[0]


def trivial_augment(images: jax.Array, keys: jax.Array) -> jax.Array:
    """TrivialAugment wide (Müller & Hutter 2021): one operation, one of 31 magnitudes.

    As torchvision's `TrivialAugmentWide`: affine operations take the nearest pixel, and black from
    outside of the image. The images [N, H, W, C] have whole values in 0..255; each has a key [N].

    Example:
      >>> images, keys = jnp.zeros((4, 8, 8, 3)), jax.random.split(jax.random.key(0), 4)
      >>> trivial_augment(images, keys).shape
      (4, 8, 8, 3)
    """

    def draw(image: jax.Array, key: jax.Array) -> Edit:
        chosen, strength, side = jax.random.split(key, 3)
        index = jax.random.randint(chosen, (), 0, len(TRIVIAL_OPERATIONS))
        level = jax.random.randint(strength, (), 0, 31).astype(jnp.float32) / 30
        return _select_edit(image, TRIVIAL_OPERATIONS, index, level, _sign(side))

    return _apply(images, jax.vmap(draw)(images, keys), 0.0, nearest=True)


def _select_edit(
    image: jax.Array, operations: Operations, index: jax.Array, level: jax.Array, sign: jax.Array
) -> Edit:
    def branch(name: str, value: Value) -> Callable[..., Edit]:
        def edit(image: jax.Array, level: jax.Array, sign: jax.Array) -> Edit:
            found = EDITS[name](image, value(level, sign))
            # Under jax_enable_x64 some operations compute in float64.
            return jax.tree.map(lambda x, like: x.astype(like.dtype), found, _identity(image))

        return edit

    branches = [branch(name, value) for name, value in operations.items()]
    return lax.switch(index, branches, image, level, sign)


@functools.partial(jax.jit, static_argnames="nearest")
def _apply(images: jax.Array, edits: Edit, fill: jax.typing.ArrayLike, nearest: bool) -> jax.Array:
    """Edits images [N, H, W, C], each by its own edit."""
    identity = _identity(images[0])
    tables = apply_where_needed(_equalize, edits.equalize, edits.table, images, edits.equalize)
    images = apply_where_needed(look_up, (tables != identity.table).any((1, 2)), images, tables)

    def move(image: jax.Array, matrix: jax.Array) -> jax.Array:
        return _round(warp(image, matrix, fill, nearest, levels=True))

    images = apply_where_needed(
        move, (edits.matrix != identity.matrix).any((1, 2)), images, edits.matrix
    )
    if images.shape[-1] == 3:
        images = apply_where_needed(_color, edits.color != 1, images, edits.color)
    return apply_where_needed(_sharpen, edits.sharpness != 1, images, edits.sharpness)


def _color(image: jax.Array, factor: jax.Array) -> jax.Array:
    return _round(blend(image, _gray(image), factor))


def _sharpen(image: jax.Array, factor: jax.Array) -> jax.Array:
    return _round(blend(image, smooth(image), factor))


def _gray(image: jax.Array) -> jax.Array:
    """The brightness of each pixel [H, W, 1], as `luma` in Pillow's fixed-point numbers."""
    if image.shape[-1] != 3:
        return _round(image.mean(-1, keepdims=True))
    weighed = image.astype(jnp.int32) * jnp.array([19595, 38470, 7471])
    return ((weighed.sum(-1, keepdims=True) + 2**15) >> 16).astype(jnp.float32)


def _sign(key: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key), jnp.float32(1), jnp.float32(-1))


def _round(values: jax.Array) -> jax.Array:
    # Halves go up, as in Pillow, and not to the even neighbor.
    return jnp.floor(values + 0.5)


def _matrix(rows: tuple[tuple[float | jax.Array, ...], ...]) -> jax.Array:
    return jnp.array(rows, jnp.float32)


def _identity(image: jax.Array, value: float | jax.Array = 0.0) -> Edit:
    del value
    table = jnp.broadcast_to(jnp.arange(256)[:, None], (256, image.shape[-1]))
    matrix = _matrix(((1, 0, 0), (0, 1, 0)))
    table = table.astype(jnp.float32)
    return Edit(table, jnp.zeros((), bool), matrix, jnp.float32(1), jnp.float32(1))


Levels = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Matrix = Callable[[jax.Array, int, int], tuple[tuple[float | jax.Array, ...], ...]]


def _table(new_levels: Levels) -> Callable[[jax.Array, jax.Array], Edit]:
    """An operation that maps levels, by a function of the image, all levels [256, C], the value."""

    def edit(image: jax.Array, value: jax.Array) -> Edit:
        identity = _identity(image)
        return identity._replace(table=_round(new_levels(image, identity.table, value)))

    return edit


def _affine(rows: Matrix) -> Callable[[jax.Array, jax.Array], Edit]:
    """An operation that moves pixels, by a function of the value, the height and the width."""
    return lambda image, value: _identity(image)._replace(
        matrix=_matrix(rows(value, *image.shape[:2]))
    )


def _auto_contrast(image: jax.Array, levels: jax.Array, value: jax.Array) -> jax.Array:
    low, high = (x.astype(jnp.int32) for x in (image.min((0, 1)), image.max((0, 1))))
    # In integers: the brightest level gives 255 exactly.
    stretched = (levels.astype(jnp.int32) - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), levels)


def _equalize(table: jax.Array, image: jax.Array, equalize: jax.Array) -> jax.Array:
    """The table that equalizes an image; the given one unless `equalize`, and for one level."""
    counts = histogram(image)
    # Pillow leaves out the brightest level that occurs; it maps to 255 anyway.
    brightest = jnp.arange(256)[:, None] == image.max((0, 1))
    pixels = image.shape[0] * image.shape[1]
    step = (pixels - jnp.where(brightest, counts, 0).sum(0)) // 255
    darker = jnp.cumsum(counts, axis=0) - counts
    new = jnp.minimum((darker + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(equalize & (step > 0), new, table)


def _posterize(image: jax.Array, levels: jax.Array, bits: jax.Array) -> jax.Array:
    step = jnp.round(jnp.exp2(8 - bits))
    return jnp.floor(levels / step) * step


def _contrast(image: jax.Array, levels: jax.Array, factor: jax.Array) -> jax.Array:
    return blend(levels, _round(_gray(image).mean()), factor)


EDITS: dict[str, Callable[[jax.Array, jax.Array], Edit]] = {
    "Identity": _identity,
    "AutoContrast": _table(_auto_contrast),
    "Equalize": lambda image, value: _identity(image)._replace(equalize=jnp.ones((), bool)),
    "Invert": _table(lambda image, levels, value: 255 - levels),
    "Posterize": _table(_posterize),
    "Solarize": _table(
        lambda image, levels, threshold: jnp.where(levels < threshold, levels, 255 - levels)
    ),
    "SolarizeAdd": _table(
        lambda image, levels, added: jnp.where(
            levels < 128, jnp.minimum(levels + added, 255), levels
        )
    ),
    "Brightness": _table(lambda image, levels, factor: blend(levels, jnp.zeros(()), factor)),
    "Contrast": _table(_contrast),
    "Color": lambda image, value: _identity(image)._replace(color=value),
    "Sharpness": lambda image, value: _identity(image)._replace(sharpness=value),
    "Rotate": lambda image, value: _identity(image)._replace(
        matrix=rotation(value, *image.shape[:2])
    ),
    "ShearX": _affine(lambda value, height, width: ((1, value, 0), (0, 1, 0))),
    "ShearY": _affine(lambda value, height, width: ((1, 0, 0), (value, 1, 0))),
    "TranslateX": _affine(lambda value, height, width: ((1, 0, value), (0, 1, 0))),
    "TranslateY": _affine(lambda value, height, width: ((1, 0, 0), (0, 1, value))),
    "TranslateXRel": _affine(lambda value, height, width: ((1, 0, value * width), (0, 1, 0))),
    "TranslateYRel": _affine(lambda value, height, width: ((1, 0, 0), (0, 1, value * height))),
}

# Maps a strength in 0..1 and a sign to the value of an operation.
Value = Callable[[jax.Array, jax.Array], jax.Array]
Operations = dict[str, Value]


def _signed(largest: float) -> Value:
    return lambda level, sign: sign * level * largest


def _factor(spread: float) -> Value:
    # Positive, because levels are at most 1: the least is 0.1 in timm, 0.01 in torchvision.
    return lambda level, sign: 1 + sign * level * spread


def _unused(level: jax.Array, sign: jax.Array) -> jax.Array:
    return jnp.zeros(())


# timm's set of increasing severity; the identity, which comes last, stands for "not applied".
RAND_OPERATIONS: Operations = {
    "AutoContrast": _unused,
    "Equalize": _unused,
    "Invert": _unused,
    "Rotate": _signed(30.0),
    "Posterize": lambda level, sign: 4 - jnp.floor(4 * level),
    "Solarize": lambda level, sign: 256 - jnp.floor(256 * level),
    "SolarizeAdd": lambda level, sign: jnp.floor(110 * level),
    "Color": _factor(0.9),
    "Contrast": _factor(0.9),
    "Brightness": _factor(0.9),
    "Sharpness": _factor(0.9),
    "ShearX": _signed(0.3),
    "ShearY": _signed(0.3),
    "TranslateXRel": _signed(0.45),
    "TranslateYRel": _signed(0.45),
    "Identity": _unused,
}

TRIVIAL_OPERATIONS: Operations = {
    "Identity": _unused,
    "ShearX": _signed(0.99),
    "ShearY": _signed(0.99),
    "TranslateX": lambda level, sign: sign * jnp.floor(32 * level),
    "TranslateY": lambda level, sign: sign * jnp.floor(32 * level),
    "Rotate": _signed(135.0),
    "Brightness": _factor(0.99),
    "Color": _factor(0.99),
    "Contrast": _factor(0.99),
    "Sharpness": _factor(0.99),
    "Posterize": lambda level, sign: 8 - jnp.round(6 * level),
    "Solarize": lambda level, sign: 255 * (1 - level),
    "AutoContrast": _unused,
    "Equalize": _unused,
}
