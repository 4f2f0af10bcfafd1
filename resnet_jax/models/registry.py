"""Networks by name: those of the family, and those that a user registers."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Mapping
from typing import Any

from resnet_jax.errors import UNREGISTERED, ModelError, unknown_name
from resnet_jax.limits import MAX_SIDE
from resnet_jax.models.architectures import TABLE
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.summary import Summary, summary

_IMAGE_SIZE = 224


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A registered network.

    Args:
      name: Its name for `create_model`.
      paper: Where it comes from.
      image_size: Side in pixels of the images it was made for.
      model_cls: `ResNet`, or a subclass of it.
      fields: The fields of `model_cls` in which it differs from the defaults.
    """

    name: str
    paper: str
    image_size: int
    model_cls: type[ResNet]
    fields: Mapping[str, Any] = dataclasses.field(hash=False)

    def constructor(self, **overrides: Any) -> ResNet:
        """Makes the module; see `create_model`."""
        known = _field_names(self.model_cls)
        for field in overrides:
            if field == "pretrained":
                raise ModelError(
                    f"{self.name}: weights come from rj.load_pretrained or rj.load_weights"
                )
            if field not in known:
                raise ModelError(f"{self.name}: {unknown_name('field', field, known)}")
        return self.model_cls(**{**self.fields, **overrides})

    @property
    def parameters(self) -> int:
        """Trainable parameters, with its own number of classes and images of three channels."""
        return self._summary.parameters

    @property
    def multiply_adds(self) -> int:
        """Of convolutions and head, for one image of `image_size`."""
        return self._summary.multiply_adds

    @functools.cached_property
    def _summary(self) -> Summary:
        return summary(self.constructor(), (1, self.image_size, self.image_size, 3))


def _is_same(one: Architecture, other: Architecture) -> bool:
    """Whether both describe one network, also with partials made by other calls."""
    fields, others = (
        {name: _parts(value) for name, value in each.fields.items()} for each in (one, other)
    )
    return fields == others and dataclasses.replace(one, fields=other.fields) == other


def _parts(value: Any) -> Any:
    """A value to compare: partials, which compare by identity, as what they were made of."""
    if not isinstance(value, functools.partial):
        return value
    keywords = {key: _parts(each) for key, each in value.keywords.items()}
    return value.func, tuple(map(_parts, value.args)), keywords


def _field_names(model_cls: type[ResNet]) -> set[str]:
    return {field.name for field in dataclasses.fields(model_cls)}  # linen's name and parent too


def _architecture(name: str) -> Architecture:
    paper, stage_sizes, others = TABLE[name]
    fields = {"stage_sizes": stage_sizes, **others}
    return Architecture(name, paper, fields.pop("image_size", _IMAGE_SIZE), ResNet, fields)


_ARCHITECTURES = {name: _architecture(name) for name in TABLE}


def register_model(
    name: str,
    model_cls: type[ResNet] = ResNet,
    *,
    image_size: int = _IMAGE_SIZE,
    paper: str = "",
    replace: bool = False,
    **fields: Any,
) -> Architecture:
    """Gives a network a name, by which it is then created, listed and trained.

    `Config(model=Model(name=...))` and `--config.model.name` know the name in every process that
    has registered it. A recipe file registers its networks at its top.

    Args:
      name: Letters, digits and ``_ . -``; not one of the family's.
      model_cls: `ResNet`, or a subclass of it.
      image_size: Side in pixels of the images it is made for.
      paper: Where it comes from.
      replace: Let the name, if it was registered before, mean this network from now on. Without
        it, only the same network can be registered again.
      **fields: Fields of `model_cls` in which the network differs from the defaults, such as
        stage_sizes or a block_cls of your own.

    Returns:
      Its entry, as `model_info(name)`.

    Raises:
      ModelError: (a ValueError) The name is taken or not allowed, or a field is.

    Example:
      >>> entry = register_model("resnet68", stage_sizes=(3, 4, 12, 3))
      >>> create_model("resnet68", num_classes=7).num_classes
      7
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name):
        raise ModelError(f"name = {str(name)[:100]!r}: must be letters, digits, '_', '.' and '-'")
    if not (isinstance(model_cls, type) and issubclass(model_cls, ResNet)):
        raise ModelError(f"{name}: model_cls = {model_cls!r} is not ResNet or a subclass of it")
    if type(image_size) is not int or not 0 < image_size <= MAX_SIDE:
        raise ModelError(f"{name}: image_size = {image_size!r}: must be from 1 to {MAX_SIDE:,}")
    entry = Architecture(name, paper, image_size, model_cls, fields)
    try:
        entry.constructor(**fields)
    except TypeError as error:  # a field without a default, or a value of another type
        raise ModelError(f"{name}: {error}") from error
    if name in TABLE or (not replace and not _is_same(_ARCHITECTURES.get(name, entry), entry)):
        advice = "choose another" if name in TABLE else "choose another, or pass replace=True"
        raise ModelError(f"name = {name!r}: another network has this name; {advice}")
    _ARCHITECTURES[name] = entry
    return entry


def create_model(name: str, **overrides: Any) -> ResNet:
    """Makes a registered network.

    Args:
      name: One of `list_models()`.
      **overrides: Fields of `ResNet` that differ from the registered ones.

    Returns:
      The module, without parameters.

    Raises:
      ModelError: (a ValueError) An unknown name or field, with the closest ones; a field value
        that is not allowed.

    Example:
      >>> create_model("resnet50", num_classes=10).num_classes
      10
    """
    return construct(name, **overrides)


def construct(registered: str, /, **fields: Any) -> ResNet:
    """`create_model`, where `name` is a field: that of the Flax module."""
    return model_info(registered).constructor(**fields)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered networks.

    Args:
      pattern: Shell-style: "*", "?" and "[...]".

    Returns:
      The names that match, in alphabetical order.

    Example:
      >>> list_models("resnext50*")
      ['resnext50_32x4d', 'resnext50d_32x4d']
    """
    return sorted(fnmatch.filter(_ARCHITECTURES, pattern))


def model_info(name: str) -> Architecture:
    """A registered network's paper, image size, parameters and multiply-adds.

    Args:
      name: One of `list_models()`.

    Returns:
      Its entry. Counting parameters and multiply-adds takes a second.

    Raises:
      ModelError: (a ValueError) An unknown name, with the closest ones.

    Example:
      >>> model_info("resnet50").parameters
      25557032
    """
    if name not in _ARCHITECTURES:
        message = unknown_name("model", name, _ARCHITECTURES)
        raise ModelError(f"{message}; {UNREGISTERED}")
    return _ARCHITECTURES[name]
