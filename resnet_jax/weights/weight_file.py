"""A weight file as a network, and what is assumed where the file does not say it.

A file holds tensors under names. The names and shapes tell the architecture; how images are to be
prepared is nowhere in it, so the values that such networks are usually trained with are taken.
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
from resnet_jax.weights.contents import find_network
from resnet_jax.weights.convert import Variables, from_torch, head_classes
from resnet_jax.weights.files import read_state_dict
from resnet_jax.weights.infer import infer_model


class WeightFile(NamedTuple):
    """A network out of a weight file.

    Args:
      name: The registered name.
      model: The module.
      variables: {"params", "batch_stats"}.
      preprocessing: How images become its input, as usual for such networks.
      usual: Whose values its mean and standard deviation are: "ImageNet's".
      assumed: What was assumed of the architecture, for people.
    """

    name: str
    model: ResNet
    variables: Variables
    preprocessing: Preprocessing
    usual: str
    assumed: tuple[str, ...]


def open_weight_file(
    path: Path, name: str = "", *, prefix: str = "", weights: str = ""
) -> WeightFile:
    """Reads a weight file and finds the network that its tensors belong to.

    Args:
      path: The file.
      name: Of the network; "": it is inferred.
      prefix: Of the tensors' names, where the file holds several networks.
      weights: "ema" or "raw", where it holds both; "": "ema".

    Returns:
      The network.

    Raises:
      WeightsError: The file cannot be read, or the tensors are not those of such a network.
      ModelError: No network is called `name`.
    """
    state_dict = read_state_dict(path)
    try:
        contents = find_network(state_dict, prefix=prefix or None, weights=weights or None)
        tensors = contents.tensors
        opened = _named(name, tensors) if name else _inferred(tensors)
    except (ModelError, WeightsError) as error:  # such as a head of too many classes
        raise WeightsError(f"{path}: {_with_flags(str(error))}") from error
    channels = int(opened.variables["params"]["stem"]["conv1"]["kernel"].shape[2])
    size = opened.image_size
    usual = _usual_colors(tensors, size, opened.model.num_classes)
    whole = channels == 3
    preprocessing = Preprocessing(
        image_size=size,
        # Small images are not resized before the crop; others as torchvision does, by 256 / 224.
        crop_fraction=1.0 if size <= _SMALL else 0.875,
        mean=usual.mean if whole else _average(usual.mean),
        std=usual.std if whole else _average(usual.std),
    )
    assumed = list(opened.assumed)
    if opened.model.num_classes and re.search(_ENCODER, contents.taken):
        assumed.insert(0, "the head is one of classes; of contrastive training it is a projection")
    if contents.taken and not prefix:
        assumed.insert(0, f"the weights are {contents.taken}")
    preprocessing = dataclasses.replace(preprocessing, **opened.preprocessing)
    whose = "" if "mean" in opened.preprocessing else usual.whose
    return WeightFile(
        opened.name, opened.model, opened.variables, preprocessing, whose, tuple(assumed)
    )


class _Opened(NamedTuple):
    name: str
    model: ResNet
    variables: Variables
    image_size: int
    assumed: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = {}  # fields that the names tell, of some frameworks


def _inferred(tensors: Mapping[str, Any]) -> _Opened:
    found = infer_model(tensors)
    model = create_model(found.name, **found.fields)
    # The head's width is no assumption.
    fields = [_shown(*field) for field in found.fields.items() if field[0] != "num_classes"]
    having = f" with {', '.join(fields)}" if fields else ""
    # The images are said with the rest of what is assumed of them.
    facts = [fact for fact in found.assumed if not fact.startswith("images have")]
    network = "; ".join([f"a {found.name}{having}, by its names and shapes (--model)", *facts])
    variables = from_torch(model, tensors)
    return _Opened(
        found.name,
        model,
        variables,
        found.image_size,
        (network,),
        found.preprocessing,
    )


def _shown(field: str, value: Any) -> str:
    """A field of the model for a message; of a class or function the name of the field alone."""
    plain = isinstance(value, str | int | float | tuple)
    return f"{field}={value}" if plain else f"another {field}"


def _named(name: str, tensors: Mapping[str, Any]) -> _Opened:
    """The network of that name, or one that differs from it in fields that the tensors show."""
    classes = head_classes(create_model(name), tensors)
    model = create_model(name, num_classes=classes or 0)
    try:
        return _Opened(name, model, from_torch(model, tensors), model_info(name).image_size)
    except WeightsError as error:
        try:
            found = _inferred(tensors)
        except (ModelError, WeightsError):
            raise error from None
        if found.name != name:
            raise WeightsError(f"the tensors are those of a {found.name}; {error}") from error
        return found


# Networks of contrastive training, in what is said to be taken.
_ENCODER = r"(?i)encoder_q|query|online"
# Arguments of the library in errors, and what takes their place where a network is only opened.
_ARGUMENTS = {
    r"pass reset_head=True": "fine-tune it with --config.checkpoint.reset_head=true",
    r"pass strict=False to leave that out": "rj.load_weights(..., strict=False) leaves that out",
    r"weights=(['\"])raw\1": "--no-ema",
    r"\bprefix=(['\"])": r"--prefix=\1",
}


def _with_flags(message: str) -> str:
    """An error of the library's in terms of commands, which do not have all its arguments."""
    for argument, flag in _ARGUMENTS.items():
        message = re.sub(argument, flag, message)
    return message


class _Colors(NamedTuple):
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whose: str


_SMALL = 32  # pixels a side up to which images are CIFAR's or like them
_IMAGENET = _Colors((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "ImageNet's")
# Those of CIFAR's training images; repositories round them differently, or take the mean of each
# image's deviation, 0.2023, 0.1994, 0.2010.
_CIFAR = {
    10: _Colors((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), "CIFAR-10's"),
    100: _Colors((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "CIFAR-100's"),
}


def _usual_colors(names: Iterable[str], size: int, classes: int) -> _Colors:
    """The mean and deviation that such networks are usually trained with."""
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


def _average(values: tuple[float, ...]) -> tuple[float, ...]:
    """One number for images of whatever channels: 0.449 for ImageNet's mean."""
    return (round(sum(values) / len(values), 4),)
