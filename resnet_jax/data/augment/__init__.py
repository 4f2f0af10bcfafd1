"""Augmentation on the device, of whole batches."""

from resnet_jax.data.augment.apply import augment, check_channels, make_targets

__all__ = ["augment", "check_channels", "make_targets"]
