"""The former place of `fold_batch_norm`."""

from resnet_jax.models.folding import fold_batch_norm as fold_batch_norm
