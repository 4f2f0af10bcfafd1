"""Weights of another framework under torchvision's or timm's names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from resnet_jax.errors import WeightsError
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.tensors import shape_of

Tensors = Mapping[str, Any]

# Leaves of JAX, TensorFlow and Keras -> PyTorch's.
LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "scale": "weight",
    "bias": "bias",
    "beta": "bias",
    "mean": "running_mean",
    "moving_mean": "running_mean",
    "var": "running_var",
    "moving_variance": "running_var",
}


@dataclasses.dataclass(frozen=True)
class Translated:
    """Weights with torchvision's or timm's names, and facts that come with their framework."""

    tensors: dict[str, Any]  # in PyTorch's layouts
    framework: str = ""
    # Fields of `ResNet` that such a network needs and that its weights do not show.
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Fields of `Preprocessing`, where the framework's networks have their own.
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    assumed: tuple[str, ...] = ()  # one sentence each

    def check(self, model: ResNet) -> None:
        """Raises WeightsError where a model lacks a field that these weights need."""
        for field, value in self.fields.items():
            found = getattr(model, field)
            # Epsilons of 1e-5 and 1.001e-5 differ less than rounding does.
            same = isinstance(value, float) and math.isclose(found, value, rel_tol=0.01)
            if found != value and not same:
                raise WeightsError(
                    f"weights of {self.framework} need {field}={value!r}, and the model has "
                    f"{field}={found!r}; make it with that field"
                )


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> dict[str, Any]:
    """Tensors by their new names; those of JAX and TensorFlow, which have "/", are transposed."""
    return {
        rename(name): to_torch(value) if "/" in name else value for name, value in tensors.items()
    }


def to_torch(value: Any) -> Any:
    """A view in PyTorch's layout: [H, W, in, out] -> [out, in, H, W]; [in, out] -> [out, in]."""
    ndim = len(shape_of(value))
    if ndim not in (2, 4):
        return value
    axes = (3, 2, 0, 1) if ndim == 4 else (1, 0)
    return value.permute(axes) if hasattr(value, "permute") else np.transpose(value, axes)
