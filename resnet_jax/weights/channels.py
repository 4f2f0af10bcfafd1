"""A network for images with another number of channels: its first convolution, mean and std."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from resnet_jax.errors import WeightsError
from resnet_jax.limits import MAX_CHANNELS


def with_channels(variables: Mapping[str, Any], channels: int | None) -> dict[str, Any]:
    """Adapts a network's first convolution to images with another number of channels.

    As in timm: for grayscale images its filters are summed over the channels, which is exact for
    color images with equal channels; for more channels they are repeated in turn and scaled, so
    that responses keep their size. None leaves the network as it is.

    Example:
      >>> color = {"params": {"stem": {"conv1": {"kernel": np.ones((7, 7, 3, 64), np.float32)}}}}
      >>> gray = with_channels(color, 1)["params"]["stem"]["conv1"]["kernel"]
      >>> gray.shape, float(gray.max())
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
            f"channels={channels}: the network takes {found} channels, and only those for gray "
            "or color images (1 or 3) are adapted to others"
        )
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    return kernel[:, :, np.arange(channels) % found] * np.float32(found / channels)


def colors_for(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A mean or std per color, for images with another number of channels.

    The average for one channel; for more than three, repeated in turn as the filters are.

    Example:
      >>> colors_for((0.25, 0.5, 0.75), 1), colors_for((0.25, 0.5, 0.75), 4)
      ((0.5,), (0.25, 0.5, 0.75, 0.25))
    """
    if len(values) in (1, channels):
        return values
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[index % len(values)] for index in range(channels))
