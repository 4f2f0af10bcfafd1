"""How images become a network's input: the crop, and the normalization that every user shares.

Training, evaluation, prediction, exports and `Preprocessing.normalize` call the one `normalize`
below, so the same pixels give the same float32 numbers in all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config.schema import Config
from resnet_jax.errors import ConfigError, DataError

Images = TypeVar("Images", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images are resized, cropped and normalized for a network.

    Args:
      image_size: Side of the crop in pixels.
      crop_fraction: Side of the crop as a fraction of the resized image's shorter side.
      interpolation: Filter of the resize: "bilinear", "bicubic", ...
      mean: Subtracted from each channel, in units of 1 (255 in a uint8 image); one number, or one
        for each channel.
      std: Divides each channel, in units of 1; as many numbers as mean.
      crop_mode: "center": the shorter side is resized, and the center cut out; "squash": both
        sides are resized to that length, regardless of the image's proportions.

    Example:
      >>> preprocessing = Preprocessing(image_size=224, crop_fraction=0.875)
      >>> preprocessing.resize_size
      256
      >>> preprocessing.normalize(jnp.zeros((1, 2, 2, 3), jnp.uint8))[0, 0, 0].round(2).tolist()
      [-2.119999885559082, -2.0399999618530273, -1.7999999523162842]
    """

    image_size: int = 224
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_mode: str = "center"

    @classmethod
    def from_config(cls, config: Config) -> Preprocessing:
        """The preprocessing of a run's evaluation."""
        data = config.data
        size = data.eval_size or data.image_size
        return cls(
            image_size=size,
            crop_fraction=size / (data.eval_resize or size),
            interpolation=data.interpolation,
            mean=tuple(config.augment.mean),
            std=tuple(config.augment.std),
            crop_mode=data.eval_crop,
        )

    @property
    def resize_size(self) -> int:
        """Side in pixels to which images are resized before the crop: the shorter, or both."""
        # timm cuts the fraction of a pixel, but 32 / (32 / 40) is to be 40 and not 39.999.
        return int(self.image_size / self.crop_fraction + 1e-6)

    def normalize(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Converts cropped uint8 images to the network's input.

        Args:
          images: uint8 [N, H, W, C]. Floating-point images are refused, because they may go up to
            1 or to 255.

        Returns:
          float32 [N, H, W, C].

        Raises:
          DataError: The images are not uint8.
          ConfigError: `mean` or `std` have neither 1 nor C numbers.
        """
        images = jnp.asarray(images)
        if images.dtype != jnp.uint8:
            raise DataError(
                f"normalize takes uint8 images from 0 to 255, not {images.dtype}; of images from 0 "
                "to 1 take (images - mean) / std, with this object's mean and std"
            )
        return normalize(images, self.mean, self.std)


def normalize(images: Images, mean: Sequence[float], std: Sequence[float]) -> Images:
    """Subtracts the mean and divides by the standard deviation, in float32.

    Args:
      images: [..., C] with values from 0 to 255: uint8, or float after augmentation.
      mean: Of each channel in units of 1: one number, or C.
      std: Of each channel in units of 1: one number, or C.

    Returns:
      float32 [..., C]: a NumPy array for a NumPy array, with the same values as under `jax.jit`.

    Raises:
      ConfigError: `mean` or `std` have neither 1 nor C numbers.

    Example:
      >>> normalize(np.full((1, 1, 1, 1), 255, np.uint8), mean=(0.5,), std=(0.25,)).item()
      2.0
    """
    check_per_channel("mean", mean, images.shape[-1])
    check_per_channel("std", std, images.shape[-1])
    # A pixel of the mean color becomes exactly 0. XLA turns a division by a constant into this
    # product; written as one, the result is the same with and without `jit`.
    scale = 1 / (255 * np.array(std, np.float32))
    return (images.astype(np.float32) - mean_color(mean)) * scale


def mean_color(mean: Sequence[float]) -> np.ndarray:
    """The pixel that `normalize` maps to 0: float32 [1] or [C], values from 0 to 255."""
    # Computed by NumPy: inside a program XLA could fuse the product and round it differently.
    return 255 * np.array(mean, np.float32)


def check_per_channel(name: str, values: Sequence[float], channels: int) -> None:
    """Raises a ConfigError unless there is one value, or one for each channel."""
    if len(values) not in (1, channels):
        numbers = "one number" if channels == 1 else f"1 number or {channels}"
        plural = "s" if channels > 1 else ""
        raise ConfigError(
            f"{name} = {values}: must have {numbers}, since the images have "
            f"{channels} channel{plural}"
        )
