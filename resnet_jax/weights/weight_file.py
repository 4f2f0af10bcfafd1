"""A weight file as a network, with assumptions where the file is silent.

A file holds tensors under names. Names and shapes reveal the architecture. Nothing in the file says
how images are prepared, so the values that such networks are usually trained with are assumed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.errors import ModelError, WeightsError
from resnet_jax.models.registry import create_model, model_info
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.channels import colors_for
from resnet_jax.weights.class_names import complete_names
from resnet_jax.weights.contents import find_network
from resnet_jax.weights.convert import Variables, from_torch, has_own_names, head_classes
from resnet_jax.weights.files import read_state_dict
from resnet_jax.weights.infer import infer_model
from resnet_jax.weights.network import Network

_SMALL = 32  # pixels a side up to which images are like CIFAR's
# Prefixes of networks from contrastive training.
_ENCODER = r"(?i)encoder_q|query|online"
# Arguments of the library in errors, and their replacement where a network is only opened.
_ARGUMENTS = {
    r"pass reset_head=True": "fine-tune it (train --config.checkpoint.reset_head=true)",
    r"pass strict=False to leave that out": "rj.load_weights(..., strict=False) leaves that out",
    r"weights=(['\"])raw\1": "--no-ema",
    r"prefix= or weights=": "--prefix= or --no-ema",
    r"(?<!--)\bprefix=": "--prefix=",
}


def open_weight_file(path: Path, name: str = "", *, prefix: str = "", weights: str = "") -> Network:
    """Reads a weight file and builds the network that its tensors belong to.

    `name` is a registered network ("" infers it), `prefix` that of the tensors' names where there
    are several networks, `weights` "ema" or "raw" where the file holds both (default "ema").
    """
    state_dict = read_state_dict(path)
    try:
        contents = find_network(state_dict, prefix=prefix or None, weights=weights or None)
        tensors = contents.tensors
        built = _named(name, tensors) if name else _inferred(tensors)
    except (ModelError, WeightsError) as error:  # such as a head of too many classes
        raise WeightsError(f"{path}: {_with_flags(str(error))}") from error
    channels = int(built.variables["params"]["stem"]["conv1"]["kernel"].shape[2])
    usual = _usual_colors(tensors, built.image_size, built.model.num_classes)
    preprocessing = Preprocessing(
        image_size=built.image_size,
        # Small images are not resized before the crop; others by 256 / 224, as in torchvision.
        crop_fraction=1.0 if built.image_size <= _SMALL else 0.875,
        mean=colors_for(usual.mean, channels),
        std=colors_for(usual.std, channels),
    )
    assumed = list(built.assumed)
    if built.model.num_classes and re.search(_ENCODER, contents.chosen):
        assumed.insert(
            0, "the head classifies; the head of a contrastively trained network is a projection"
        )
    if contents.chosen and not prefix:
        assumed.insert(0, f"the weights are {contents.chosen}")
    return Network(
        source=str(path),
        name=built.name,
        model=built.model,
        variables=built.variables,
        preprocessing=dataclasses.replace(preprocessing, **built.preprocessing),
        channels=channels,
        class_names=complete_names((), built.model.num_classes),
        assumed=tuple(assumed),
        usual="" if "mean" in built.preprocessing else usual.whose,
    )


class _Built(NamedTuple):
    name: str
    model: ResNet
    variables: Variables
    image_size: int
    assumed: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = {}  # fields that come with the weights' framework


def _inferred(tensors: Mapping[str, Any]) -> _Built:
    if has_own_names(tensors):
        raise WeightsError("the names are this package's own; say which network it is with --model")
    found = infer_model(tensors)
    model = create_model(found.name, **found.fields)
    # The width of the head is not an assumption.
    fields = [_shown(*field) for field in found.fields.items() if field[0] != "num_classes"]
    having = f" with {', '.join(fields)}" if fields else ""
    network = f"a {found.name}{having}, by its names and shapes (--model)"
    return _Built(
        name=found.name,
        model=model,
        variables=from_torch(model, tensors),
        image_size=found.image_size,
        assumed=("; ".join([network, *found.assumed]),),
        preprocessing=found.preprocessing,
    )


def _shown(field: str, value: Any) -> str:
    """A field of the model for a message, without the text of a class or function."""
    plain = isinstance(value, str | int | float | tuple)
    return f"{field}={value}" if plain else f"another {field}"


def _named(name: str, tensors: Mapping[str, Any]) -> _Built:
    """The network of that name, or one that differs from it in fields that the tensors show."""
    classes = head_classes(create_model(name), tensors)
    model = create_model(name, num_classes=classes or 0)
    try:
        return _Built(name, model, from_torch(model, tensors), model_info(name).image_size)
    except WeightsError as error:
        try:
            found = _inferred(tensors)
        except (ModelError, WeightsError):
            raise error from None
        if found.name != name:
            raise WeightsError(f"the tensors are those of a {found.name}; {error}") from error
        return found


def _with_flags(message: str) -> str:
    """An error of the library in terms of the commands, which lack some of its arguments."""
    for argument, flag in _ARGUMENTS.items():
        message = re.sub(argument, flag, message)
    return message


class _Colors(NamedTuple):
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whose: str


_IMAGENET = _Colors((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "ImageNet's")
# Of CIFAR's training images. Repositories round them differently, or take the mean of each image's
# standard deviation, 0.2023, 0.1994, 0.2010.
_CIFAR = {
    10: _Colors((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), "CIFAR-10's"),
    100: _Colors((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "CIFAR-100's"),
}


def _usual_colors(names: Iterable[str], size: int, classes: int) -> _Colors:
    """The mean and std that such networks are usually trained with."""
    if size > _SMALL or classes not in _CIFAR or _is_akamasters(names):
        return _IMAGENET
    return _CIFAR[classes]


def _is_akamasters(names: Iterable[str]) -> bool:
    """Whether the names are those of github.com/akamaster/pytorch_resnet_cifar10.

    Its CIFAR networks have parameter-free shortcuts (option A), a head called `linear`, and
    ImageNet's mean and standard deviation.
    """
    names = set(names)
    shortcuts = any(".shortcut." in name or ".downsample." in name for name in names)
    return "linear.weight" in names and not shortcuts
