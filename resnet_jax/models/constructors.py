"""The constructors of the paper's networks (He et al. 2015): `create_model` with a name in Python.

Those for ImageNet are in Table 1. A block's stride is on its 3x3 convolution (v1.5), unless
stride_in_1x1=True. Those for CIFAR have 6n + 2 layers for 32x32 images (section 4.2).
"""

# ruff: noqa: N802  (functions with the names of networks)

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

from resnet_jax.models.architectures import CONSTRUCTORS
from resnet_jax.models.registry import construct, model_info
from resnet_jax.models.resnet import ResNet

_P = ParamSpec("_P")
_Constructor = Callable[..., ResNet]


def _with_fields(
    _: Callable[_P, ResNet], name: str = ""
) -> Callable[[_Constructor], Callable[_P, ResNet]]:
    """Gives a constructor the fields of `ResNet` as keywords, for editors and notebooks."""

    def decorate(constructor: _Constructor) -> Callable[_P, ResNet]:
        registered = model_info(name or constructor.__name__.lower()).fields
        parameters = [
            each.replace(
                kind=inspect.Parameter.KEYWORD_ONLY,
                default=registered.get(each.name, each.default),
            )
            for each in inspect.signature(ResNet).parameters.values()
        ]
        constructor.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return constructor

    return decorate


@functools.cache  # pickle wants the object that the name leads to
def constructor_named(name: str) -> _Constructor:
    """The constructor of a name in `CONSTRUCTORS`, such as "SEResNet50", as `resnet_jax` has it."""
    registered = CONSTRUCTORS[name]

    def constructor(**fields: Any) -> ResNet:
        return construct(registered, **fields)

    paper = model_info(registered).paper
    constructor.__doc__ = f"The network {registered!r} ({paper}). Takes the fields of `ResNet`."
    constructor.__name__ = constructor.__qualname__ = name
    constructor.__module__ = __name__.partition(".")[0]
    return _with_fields(ResNet, registered)(constructor)


@_with_fields(ResNet)
def ResNet18(**fields: Any) -> ResNet:
    """ResNet-18 (He et al. 2015, Table 1): basic blocks. Takes the fields of `ResNet`."""
    return construct("resnet18", **fields)


@_with_fields(ResNet)
def ResNet34(**fields: Any) -> ResNet:
    """ResNet-34 (He et al. 2015, Table 1): basic blocks. Takes the fields of `ResNet`."""
    return construct("resnet34", **fields)


@_with_fields(ResNet)
def ResNet50(**fields: Any) -> ResNet:
    """ResNet-50 (He et al. 2015, Table 1): bottlenecks. Takes the fields of `ResNet`.

    A block's stride is on its 3x3 convolution (v1.5) unless stride_in_1x1=True.
    """
    return construct("resnet50", **fields)


@_with_fields(ResNet)
def ResNet101(**fields: Any) -> ResNet:
    """ResNet-101 (He et al. 2015, Table 1): bottlenecks. Takes the fields of `ResNet`."""
    return construct("resnet101", **fields)


@_with_fields(ResNet)
def ResNet152(**fields: Any) -> ResNet:
    """ResNet-152 (He et al. 2015, Table 1): bottlenecks. Takes the fields of `ResNet`."""
    return construct("resnet152", **fields)


@_with_fields(ResNet)
def ResNet20(**fields: Any) -> ResNet:
    """ResNet-20 for 32x32 images (He et al. 2015, section 4.2). Takes the fields of `ResNet`."""
    return construct("resnet20", **fields)


@_with_fields(ResNet)
def ResNet32(**fields: Any) -> ResNet:
    """ResNet-32 for 32x32 images (He et al. 2015, section 4.2). Takes the fields of `ResNet`."""
    return construct("resnet32", **fields)


@_with_fields(ResNet)
def ResNet44(**fields: Any) -> ResNet:
    """ResNet-44 for 32x32 images (He et al. 2015, section 4.2). Takes the fields of `ResNet`."""
    return construct("resnet44", **fields)


@_with_fields(ResNet)
def ResNet56(**fields: Any) -> ResNet:
    """ResNet-56 for 32x32 images (He et al. 2015, section 4.2). Takes the fields of `ResNet`."""
    return construct("resnet56", **fields)


@_with_fields(ResNet)
def ResNet110(**fields: Any) -> ResNet:
    """ResNet-110 for 32x32 images (He et al. 2015, section 4.2). Takes the fields of `ResNet`."""
    return construct("resnet110", **fields)


@_with_fields(ResNet)
def ResNet1202(**fields: Any) -> ResNet:
    """ResNet-1202 for 32x32 images (He et al. 2015, section 4.2). Takes the fields of `ResNet`."""
    return construct("resnet1202", **fields)
