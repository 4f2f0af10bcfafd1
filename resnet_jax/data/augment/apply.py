"""Augmentation inside the training step: uint8 images and labels to what the network is fed.

Every draw for an image comes from the step's key and the image's place in the whole batch, so
images do not depend on the number of devices. Each transform has a stream of its own: switching
one on leaves the draws of the others as they were. What is switched off is not traced.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.config.schema import Augment
from resnet_jax.data.augment.ops import (
    adjust_contrast,
    adjust_hue,
    apply_where_needed,
    blend,
    box,
    luma,
    mix_neighbors,
    pad_and_crop,
    rotation,
    shift_colors,
    warp,
)
from resnet_jax.data.augment.policy import rand_augment, trivial_augment
from resnet_jax.data.preprocessing import check_per_channel, mean_color, normalize
from resnet_jax.errors import ConfigError

# torchvision's ranges for random erasing: share of the image's area, and height / width.
ERASE_AREA = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
ERASE_TRIES = 10

# The place of a name is the number of its stream of draws: append, never reorder.
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
    """Augments and normalises a device's part of a batch.

    The order: flip, pad and crop, rotate, TrivialAugment, RandAugment, brightness, contrast,
    saturation, hue, colour shift, normalisation, random erasing, cutout, mixup or CutMix. What
    is erased or cut out becomes 0, the mean colour. Saturation, hue and the colour shift leave
    images of one channel as they are, and other images must have three. So does the operation
    "Color" of TrivialAugment and RandAugment, which leaves images of other channels as they are;
    all else takes any number of channels. Contrast is that to the mean brightness, for which the
    channels of an image that has neither one nor three weigh the same.

    Mixup and CutMix mix neighbours, 2j with 2j + 1, with one draw for both.

    Args:
      images: uint8 [N, H, W, C].
      labels: int32 [N], or sets of labels, [N, classes] of 0 and 1 for the first classes.
      key: Of the step, the same on all devices; threefry, JAX's default kind. ("rbg" keys draw
        other numbers under `vmap`, and images would depend on the number of devices.)
      config: What is switched on.
      num_classes: Length of the targets.
      first: Place in the whole batch of this device's first image; even where images are mixed.
      mirrored: bool [N], which images to mirror, for `flip_alternates`; None: draw it.

    Returns:
      Images float32 [N, H, W, C], and targets float32 [N, num_classes]: shares of one label,
      which sum to 1, or 1 for each label of a set.

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
    images = _before_normalization(images.astype(jnp.float32), keys, config)
    images = normalize(images, config.mean, config.std)
    images = jax.vmap(functools.partial(_after_normalization, config=config))(images, keys)
    targets = make_targets(labels, num_classes)
    if mixed:
        shape = (images.shape[1], images.shape[2])
        draw = functools.partial(_draw_share, shape=shape, config=config)
        share = jnp.repeat(jax.vmap(draw)(keys[::2]), 2, axis=0)
        images = mix_neighbors(images, share[..., None])
        # The mean of a CutMix box is its area after clipping: Yun et al. 2019, algorithm A1.
        targets = mix_neighbors(targets, share.mean((1, 2))[:, None])
    return images, targets


def make_targets(labels: jax.Array, num_classes: int) -> jax.Array:
    """What the network's outputs should be, before smoothing.

    Args:
      labels: int [N], or sets of labels, [N, classes] of 0 and 1.
      num_classes: Outputs of the network, as many as the data set has classes or more.

    Returns:
      float32 [N, num_classes].

    Example:
      >>> make_targets(jnp.array([2]), 3).tolist(), make_targets(jnp.array([[1, 1]]), 3).tolist()
      ([[0.0, 0.0, 1.0]], [[1.0, 1.0, 0.0]])
    """
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return jnp.pad(labels.astype(jnp.float32), ((0, 0), (0, num_classes - labels.shape[1])))


def check_channels(config: Augment, channels: int) -> None:
    """Checks what is switched on against the channels of the images.

    Args:
      config: What is switched on, and `mean` and `std`.
      channels: Of the images.

    Raises:
      ConfigError: `mean` or `std` have neither one number nor as many; or `saturation`, `hue` or
        `pca` is on, and the images are neither grey nor in color.

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


def _stream(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, _STREAMS.index(name))


def _before_normalization(images: jax.Array, keys: jax.Array, config: Augment) -> jax.Array:
    images = jax.vmap(functools.partial(_move, config=config))(images, keys)
    if config.rotate:
        images = _rotate(images, keys, config)
    if config.trivial:
        images = trivial_augment(jnp.round(images), _streams(keys, "trivial"))
    if config.rand_layers:
        images = rand_augment(
            jnp.round(images),
            _streams(keys, "rand"),
            config.rand_layers,
            config.rand_magnitude,
            config.rand_magnitude_std,
            mean_color(config.mean),
        )
    return jax.vmap(functools.partial(_jitter, config=config))(images, keys)


def _streams(keys: jax.Array, name: str) -> jax.Array:
    return jax.vmap(lambda key: _stream(key, name))(keys)


def _move(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    if config.flip:
        mirrored = jax.random.bernoulli(_stream(key, "flip"))
        image = jnp.where(mirrored, image[:, ::-1], image)
    if config.pad:
        top, left = jax.random.randint(_stream(key, "pad"), (2,), 0, 2 * config.pad + 1)
        image = pad_and_crop(image, config.pad, top, left, mean_color(config.mean))
    return image


def _rotate(images: jax.Array, keys: jax.Array, config: Augment) -> jax.Array:
    def rotate(image: jax.Array, key: jax.Array) -> jax.Array:
        degrees = _uniform(key, config.rotate)
        return warp(image, rotation(degrees, *image.shape[:2]), mean_color(config.mean))

    def in_groups(images: jax.Array, keys: jax.Array) -> jax.Array:
        return apply_where_needed(rotate, jnp.ones(len(images), bool), images, keys)

    # On a TPU a batch at once takes gigabytes; a CPU takes longer in groups.
    keys = _streams(keys, "rotate")
    return lax.platform_dependent(images, keys, tpu=in_groups, default=jax.vmap(rotate))


def _jitter(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    """ColorJitter of torchvision in a fixed order, then AlexNet's colour shift."""
    if config.brightness:
        factor = 1 + _uniform(_stream(key, "brightness"), config.brightness)
        image = blend(image, jnp.zeros((), jnp.float32), factor)
    if config.contrast:
        image = adjust_contrast(image, 1 + _uniform(_stream(key, "contrast"), config.contrast))
    if image.shape[-1] != 3:
        return image
    if config.saturation:
        factor = 1 + _uniform(_stream(key, "saturation"), config.saturation)
        image = blend(image, luma(image), factor)
    if config.hue:
        image = adjust_hue(image, _uniform(_stream(key, "hue"), config.hue))
    if config.pca:
        weights = config.pca * jax.random.normal(_stream(key, "pca"), (3,), jnp.float32)
        image = shift_colors(image, weights)
    return image


def _uniform(key: jax.Array, largest: float) -> jax.Array:
    return jax.random.uniform(key, dtype=jnp.float32, minval=-largest, maxval=largest)


def _after_normalization(image: jax.Array, key: jax.Array, config: Augment) -> jax.Array:
    shape = (image.shape[0], image.shape[1])
    if config.erase:
        erased = _draw_erased(_stream(key, "erase"), shape, config.erase)
        image = jnp.where(erased[..., None], 0, image)
    if config.cutout:
        row, column = _draw_pixel(_stream(key, "cutout"), shape)
        half = config.cutout // 2
        hole = box(shape, row - half, column - half, config.cutout, config.cutout)
        image = jnp.where(hole[..., None], 0, image)
    return image


def _draw_pixel(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.random.randint(key, (2,), 0, jnp.array(shape))


def _draw_erased(key: jax.Array, shape: tuple[int, int], probability: float) -> jax.Array:
    """Pixels to erase [H, W], as torchvision's RandomErasing draws them."""
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
    # The first box that fits; where none does, nothing is erased.
    sides_of_box = boxes[jnp.argmax(fits)]
    top, left = jax.random.randint(place, (2,), 0, jnp.maximum(sides - sides_of_box, 0) + 1)
    erased = box(shape, top, left, *sides_of_box)
    return erased & fits.any() & jax.random.bernoulli(happens, probability)


def _draw_share(key: jax.Array, shape: tuple[int, int], config: Augment) -> jax.Array:
    """The neighbour's share for a pair: [1, 1], or [H, W] where CutMix is on."""
    which, strength, place = jax.random.split(_stream(key, "mix"), 3)
    pastes = jnp.asarray(config.cutmix > 0)
    if config.mixup and config.cutmix:
        pastes = jax.random.bernoulli(which)
    alpha = jnp.where(pastes, jnp.float32(config.cutmix), jnp.float32(config.mixup))
    # 1 - lambda, which has the distribution of lambda.
    share = jax.random.beta(strength, alpha, alpha, dtype=jnp.float32)[None, None]
    if not config.cutmix:
        return share
    # Sides of sqrt(1 - lambda) about a random pixel (Yun et al. 2019, equation 2).
    half = (jnp.array(shape) * jnp.sqrt(share[0])).astype(jnp.int32) // 2
    top, left = _draw_pixel(place, shape) - half
    return jnp.where(pastes, box(shape, top, left, *(2 * half)), share)
