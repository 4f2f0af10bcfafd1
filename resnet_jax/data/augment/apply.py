"""Augmentation inside the training step: uint8 images and labels to what the network is fed.

`_augment_images` lists the steps in their order. To add one, write a function of one image
here or in ops.py, give it a field of `Augment` and a stream of draws in `_STREAMS`, and call it
there.

Every draw for an image comes from the step's key and the image's place in the whole batch, so
images do not depend on the number of devices. Each step has a stream of its own, so switching one
on leaves the draws of the others unchanged. A step that is switched off is not traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.config.schema import Augment
from resnet_jax.data.augment.geometry import pad_and_crop, rotation, warp
from resnet_jax.data.augment.ops import (
    adjust_contrast,
    adjust_hue,
    apply_where_needed,
    blend,
    box,
    luma,
    mix_neighbors,
    shift_colors,
)
from resnet_jax.data.augment.policy import rand_augment, trivial_augment
from resnet_jax.data.preprocessing import check_per_channel, mean_color, normalize
from resnet_jax.errors import ConfigError

# torchvision's ranges for random erasing: fraction of the image's area, and height / width.
ERASE_AREA = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
ERASE_TRIES = 10

# The index of a name is the number of its stream of draws: append, never reorder.
_STREAMS = (
    "flip",
    "pad",
    "rotate",
    "trivial",
    "rand",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "pca",
    "erase",
    "cutout",
    "mix",
)


def augment(
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    config: Augment,
    num_classes: int,
    first: int | jax.Array = 0,
    mirrored: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Augments and normalizes a device's part of a batch.

    The order: flip, pad and crop, rotate, TrivialAugment, RandAugment, brightness, contrast,
    saturation, hue, color shift, normalization, random erasing, cutout, mixup or CutMix. What is
    erased or cut out becomes 0, the mean color. Saturation, hue and the color shift leave images of
    one channel as they are, and other images must have three. The operation "Color" of
    TrivialAugment and RandAugment leaves images of other channels as they are; all else takes any
    number of channels. Contrast is that to the mean brightness, for which the channels of an image
    that has neither one nor three weigh the same.

    Mixup and CutMix mix neighbors, 2j with 2j + 1, with one draw for both.

    Args:
      images: uint8 [N, H, W, C].
      labels: int32 [N], or sets of labels, [N, classes] of 0 and 1 for the first classes.
      key: Of the step, the same on all devices; threefry, JAX's default kind. ("rbg" keys draw
        other numbers under `vmap`, and images would depend on the number of devices.)
      config: Which steps are switched on.
      num_classes: Length of the targets.
      first: Place in the whole batch of this device's first image; even if images are mixed.
      mirrored: bool [N], the images to mirror, for `flip_alternates`. Default: draw them.

    Returns:
      Images float32 [N, H, W, C], and targets float32 [N, num_classes]: fractions of labels, which
      sum to 1, or 1 for each label of a set.

    Raises:
      ConfigError: Images are to be mixed and N is odd, or C is not what `check_channels` allows.

    Example:
      >>> images = jnp.zeros((4, 32, 32, 3), jnp.uint8)
      >>> labels = jnp.array([3, 1, 4, 1])
      >>> config = Augment(flip=True, pad=4, cutmix=1.0)
      >>> images, targets = augment(images, labels, jax.random.key(0), config, num_classes=10)
      >>> images.shape, targets.shape
      ((4, 32, 32, 3), (4, 10))
    """
    count = images.shape[0]
    mixed = config.mixup > 0 or config.cutmix > 0
    if mixed and count % 2:
        raise ConfigError(
            f"train.batch_size: gives each device {count} images at a time, which mixup and "
            "cutmix cannot pair; choose one that gives an even number"
        )
    check_channels(config, images.shape[-1])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count, dtype=jnp.int32))
    if mirrored is not None:
        images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    images = _augment_images(images.astype(jnp.float32), keys, config)
    targets = make_targets(labels, num_classes)
    return _mix(images, targets, keys, config) if mixed else (images, targets)


def _augment_images(images: jax.Array, keys: jax.Array, config: Augment) -> jax.Array:
    """All steps on single images, in order: float32 [N, H, W, C], and a key for each image [N]."""

    def each(function: Callable[..., jax.Array], stream: str) -> jax.Array:
        """Applies a function of an image, its key and the configuration to all images."""
        return jax.vmap(functools.partial(function, config=config))(images, draws(stream))

    def draws(stream: str) -> jax.Array:
        number = _STREAMS.index(stream)
        return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

    if config.flip:
        images = each(_flip, "flip")
    if config.pad:
        images = each(_crop, "pad")
    if config.rotate:
        images = _rotate(images, draws("rotate"), config)
    if config.trivial:
        images = trivial_augment(jnp.round(images), draws("trivial"))
    if config.rand_layers:
        images = rand_augment(
            jnp.round(images),
            draws("rand"),
            config.rand_layers,
            config.rand_magnitude,
            config.rand_magnitude_std,
            mean_color(config.mean),
        )
    # torchvision's ColorJitter in a fixed order, then AlexNet's color shift.
    if config.brightness:
        images = each(_change_brightness, "brightness")
    if config.contrast:
        images = each(_change_contrast, "contrast")
    if images.shape[-1] == 3:
        if config.saturation:
            images = each(_change_saturation, "saturation")
        if config.hue:
            images = each(_change_hue, "hue")
        if config.pca:
            images = each(_shift_colors, "pca")
    images = normalize(images, config.mean, config.std)
    if config.erase:
        images = each(_erase, "erase")
    if config.cutout:
        images = each(_cut_out, "cutout")
    return images


def make_targets(labels: jax.Array, num_classes: int) -> jax.Array:
    """The outputs that the network is trained towards, float32 [N, num_classes], unsmoothed.

    Args:
      labels: int [N], or sets of labels, [N, classes] of 0 and 1 with classes <= num_classes.
      num_classes: Outputs of the network.

    Example:
      >>> make_targets(jnp.array([2]), 3).tolist(), make_targets(jnp.array([[1, 1]]), 3).tolist()
      ([[0.0, 0.0, 1.0]], [[1.0, 1.0, 0.0]])
    """
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return jnp.pad(labels.astype(jnp.float32), ((0, 0), (0, num_classes - labels.shape[1])))


def check_channels(config: Augment, channels: int) -> None:
    """Raises ConfigError for steps that images of these channels cannot take.

    `mean` and `std` need one number or one for each channel; `saturation`, `hue` and `pca` need
    images of one channel, which they leave unchanged, or three.

    Example:
      >>> check_channels(Augment(hue=0.1), channels=5)
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: augment.hue = 0.1: must be 0 for images of 5 channels; it \
needs color
    """
    check_per_channel("augment.mean", config.mean, channels)
    check_per_channel("augment.std", config.std, channels)
    for name in ("saturation", "hue", "pca"):
        value = getattr(config, name)
        if value and channels not in (1, 3):
            raise ConfigError(
                f"augment.{name} = {value}: must be 0 for images of {channels} channels; it needs "
                "color"
            )


def _flip(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def _crop(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    top, left = jax.random.randint(key, (2,), 0, 2 * config.pad + 1)
    return pad_and_crop(image, config.pad, top, left, mean_color(config.mean))


def _rotate(images: jax.Array, keys: jax.Array, config: Augment) -> jax.Array:
    def rotate(image: jax.Array, key: jax.Array) -> jax.Array:
        degrees = _uniform(key, config.rotate)
        return warp(image, rotation(degrees, *image.shape[:2]), mean_color(config.mean))

    def in_groups(images: jax.Array, keys: jax.Array) -> jax.Array:
        return apply_where_needed(rotate, jnp.ones(len(images), bool), images, keys)

    # All images at once take gigabytes on a TPU; in groups they take longer on a CPU.
    return lax.platform_dependent(images, keys, tpu=in_groups, default=jax.vmap(rotate))


def _change_brightness(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    factor = 1 + _uniform(key, config.brightness)
    return blend(image, jnp.zeros((), jnp.float32), factor)


def _change_contrast(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    return adjust_contrast(image, 1 + _uniform(key, config.contrast))


def _change_saturation(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    factor = 1 + _uniform(key, config.saturation)
    return blend(image, luma(image), factor)


def _change_hue(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    return adjust_hue(image, _uniform(key, config.hue))


def _shift_colors(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    return shift_colors(image, config.pca * jax.random.normal(key, (3,), jnp.float32))


def _uniform(key: jax.Array, largest: float) -> jax.Array:
    return jax.random.uniform(key, dtype=jnp.float32, minval=-largest, maxval=largest)


def _erase(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    """Sets a random box to 0, as torchvision's RandomErasing draws it."""
    shape = (image.shape[0], image.shape[1])
    happens, area, ratio, place = jax.random.split(key, 4)
    sides = jnp.array(shape)
    low, high = ERASE_AREA
    area = (
        jax.random.uniform(area, (ERASE_TRIES,), jnp.float32, minval=low, maxval=high)
        * sides.prod()
    )
    low, high = jnp.log(jnp.array(ERASE_RATIO, jnp.float32))
    ratio = jnp.exp(jax.random.uniform(ratio, (ERASE_TRIES,), jnp.float32, minval=low, maxval=high))
    boxes = jnp.round(jnp.sqrt(jnp.stack((area * ratio, area / ratio), axis=1))).astype(jnp.int32)
    fits = (boxes < sides).all(1)
    # The first box that fits; if none does, nothing is erased.
    sides_of_box = boxes[jnp.argmax(fits)]
    top, left = jax.random.randint(place, (2,), 0, jnp.maximum(sides - sides_of_box, 0) + 1)
    erased = box(shape, top, left, *sides_of_box)
    erased = erased & fits.any() & jax.random.bernoulli(happens, config.erase)
    return jnp.where(erased[..., None], 0, image)


def _cut_out(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    """Sets a square about a random pixel to 0 (DeVries & Taylor 2017)."""
    shape = (image.shape[0], image.shape[1])
    row, column = _draw_pixel(key, shape)
    half = config.cutout // 2
    hole = box(shape, row - half, column - half, config.cutout, config.cutout)
    return jnp.where(hole[..., None], 0, image)


def _draw_pixel(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.random.randint(key, (2,), 0, jnp.array(shape))


def _mix(
    images: jax.Array, targets: jax.Array, keys: jax.Array, config: Augment
) -> tuple[jax.Array, jax.Array]:
    """Mixup or CutMix of each pair of neighbors, and of their targets."""
    shape = (images.shape[1], images.shape[2])
    draw = functools.partial(_draw_fraction, shape=shape, config=config)
    fraction = jnp.repeat(jax.vmap(draw)(keys[::2]), 2, axis=0)
    images = mix_neighbors(images, fraction[..., None])
    # The mean of a CutMix box is its area after clipping: Yun et al. 2019, algorithm A1.
    return images, mix_neighbors(targets, fraction.mean((1, 2))[:, None])


def _draw_fraction(key: jax.Array, shape: tuple[int, int], config: Augment) -> jax.Array:
    """How much of the neighbor a pair's pixels take: [1, 1], or [H, W] with CutMix."""
    key = jax.random.fold_in(key, _STREAMS.index("mix"))
    which, strength, place = jax.random.split(key, 3)
    pastes = jnp.asarray(config.cutmix > 0)
    if config.mixup and config.cutmix:
        pastes = jax.random.bernoulli(which)
    alpha = jnp.where(pastes, jnp.float32(config.cutmix), jnp.float32(config.mixup))
    # 1 - lambda, which has the distribution of lambda.
    fraction = jax.random.beta(strength, alpha, alpha, dtype=jnp.float32)[None, None]
    if not config.cutmix:
        return fraction
    # Sides of sqrt(1 - lambda) about a random pixel (Yun et al. 2019, equation 2).
    half = (jnp.array(shape) * jnp.sqrt(fraction[0])).astype(jnp.int32) // 2
    top, left = _draw_pixel(place, shape) - half
    return jnp.where(pastes, box(shape, top, left, *(2 * half)), fraction)
