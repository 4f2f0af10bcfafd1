"""How images become a network's input."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from resnet_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a network's images were prepared.

    Args:
      image_size: Side of the crop in pixels.
      crop_fraction: Side of the crop as a share of the resized image's shorter side.
      interpolation: Filter of the resize: "bilinear", "bicubic", ...
      mean: Subtracted from each channel, in units of 1 (255 in a uint8 image).
      std: Divides each channel, in units of 1.
      crop_mode: "center": the shorter side is resized, and the center cut out; "squash": both
        sides are resized to that length, without regard to the image's proportions.

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

    @property
    def resize_size(self) -> int:
        """Shorter side in pixels to which an image is resized before the crop; squashed, both."""
        # timm cuts the fraction of a pixel, but 32 / (32 / 40) is to be 40 and not 39.999.
        return int(self.image_size / self.crop_fraction + 1e-6)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Images as the network expects them.

        Args:
          images: uint8 [N, H, W, C]. Of floating-point images nothing says whether they go to 1 or
            to 255, so they are refused.

        Returns:
          float32 [N, H, W, C].

        Raises:
          DataError: The images are not uint8.
        """
        images = jnp.asarray(images)
        if images.dtype != jnp.uint8:
            raise DataError(
                f"normalize takes uint8 images from 0 to 255, not {images.dtype}; of images from 0 "
                "to 1 take (images - mean) / std, with this object's mean and std"
            )
        scaled = images.astype(jnp.float32) / 255
        mean, std = (jnp.asarray(each, jnp.float32) for each in (self.mean, self.std))
        return (scaled - mean) / std
