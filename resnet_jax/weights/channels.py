"""The first convolution for images of another number of channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from resnet_jax.errors import WeightsError
from resnet_jax.limits import MAX_CHANNELS


def with_channels(variables: Mapping[str, Any], channels: int | None) -> dict[str, Any]:
    """Adapts a network's first convolution to images of another number of channels.

    As in timm: for grey images its filters are summed over the channels, which is exact for color
    images whose channels are equal; for more channels they are repeated in turn and scaled, so
    that responses keep their size.

    Args:
      variables: {"params", "batch_stats"} of a network for grey or color images.
      channels: Of the images; None: as the network has it.

    Returns:
      The variables with another ("stem", "conv1", "kernel") [H, W, channels, K].

    Raises:
      WeightsError: The network is for neither grey nor color images, or its stem has no conv1.

    Example:
      >>> color = {"params": {"stem": {"conv1": {"kernel": np.ones((7, 7, 3, 64), np.float32)}}}}
      >>> grey = with_channels(color, 1)["params"]["stem"]["conv1"]["kernel"]
      >>> grey.shape, float(grey.max())
      ((7, 7, 1, 64), 3.0)
    """
    if channels is None:
        return dict(variables)
    if isinstance(channels, bool) or not isinstance(channels, int):
        raise WeightsError(f"channels={channels!r}: must be a whole number")
    if not 1 <= channels <= MAX_CHANNELS:
        raise WeightsError(f"channels={channels}: must be from 1 to {MAX_CHANNELS:,}")
    params = variables["params"]
    stem = params.get("stem", {})
    if "kernel" not in stem.get("conv1", {}):
        raise WeightsError(f"channels={channels}: the model's stem has no conv1 to adapt")
    kernel = _adapted(np.asarray(stem["conv1"]["kernel"]), channels)
    conv1 = {**stem["conv1"], "kernel": kernel}
    return {**variables, "params": {**params, "stem": {**stem, "conv1": conv1}}}


def _adapted(kernel: np.ndarray, channels: int) -> np.ndarray:
    """[H, W, in, K] -> [H, W, channels, K]."""
    found = kernel.shape[2]
    if found == channels:
        return kernel
    if found not in (1, 3):
        raise WeightsError(
            f"channels={channels}: the network takes {found} channels, and only those for grey "
            "or color images (1 or 3) are adapted to others"
        )
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    return kernel[:, :, np.arange(channels) % found] * np.float32(found / channels)


def colors_for(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A mean or standard deviation a channel, for images of another number of channels."""
    if len(values) in (1, channels):
        return values
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[index % len(values)] for index in range(channels))
