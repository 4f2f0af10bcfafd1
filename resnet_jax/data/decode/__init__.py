"""From a file's bytes to pixels, on the host."""

from resnet_jax.data.decode.crop import crop_bytes, crop_pixels, eval_crop, train_crop
from resnet_jax.data.decode.pixels import decode, decoded, image_pixels
from resnet_jax.data.decode.reading import (
    image_error,
    open_image,
    read_encoded,
    read_header,
)
from resnet_jax.data.decode.resize import resize, resize_bytes

__all__ = [
    "crop_bytes",
    "crop_pixels",
    "decode",
    "decoded",
    "eval_crop",
    "image_error",
    "image_pixels",
    "open_image",
    "read_encoded",
    "read_header",
    "resize",
    "resize_bytes",
    "train_crop",
]
