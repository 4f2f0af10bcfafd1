"""Which network a file of weights holds, told from the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Inferred(NamedTuple):
    """A network that weights fit.

    Args:
      name: Of the registered network that is nearest.
      fields: Of `ResNet`, which differ from those registered: `create_model(name, **fields)`.
        num_classes is among them (0 without a head).
      channels: Of its images.
      image_size: Side in pixels for which such networks are made.
      assumed: What the weights do not show, one sentence each: "a bottleneck's stride is on its
        3x3 (v1.5)".
    """

    name: str
    fields: dict[str, Any]
    channels: int
    image_size: int
    assumed: tuple[str, ...] = ()


def infer_model(tensors: Mapping[str, Any]) -> Inferred:
    """Tells a network from its weights.

    Args:
      tensors: One network's, with the names that `from_torch` reads (`find_network`, `translate`).

    Returns:
      The network.

    Raises:
      WeightsError: They are of no ResNet; the message says what was found.
    """
    raise NotImplementedError
