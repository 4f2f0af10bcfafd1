"""Augmentation on the device, of whole batches."""

from resnet_jax.data.augment.apply import augment, check_channels, make_targets, normalize

__all__ = ["augment", "check_channels", "make_targets", "normalize"]
