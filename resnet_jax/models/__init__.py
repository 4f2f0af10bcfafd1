"""The ResNet family as Flax linen modules; needs jax and flax only."""
