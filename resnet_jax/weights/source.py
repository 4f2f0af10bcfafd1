"""Opens a trained network from any SOURCE: a run's workdir, a weight file, or the Hugging Face Hub.

Evaluation, prediction, export and reports all open networks here, so that they agree on what a
network is, how its images are prepared and what its classes are called.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import traverse_util

from resnet_jax.config.model import make_model
from resnet_jax.config.schema import INTERPOLATIONS
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.errors import ConfigError, ResNetJaxError, WeightsError
from resnet_jax.models.registry import model_info
from resnet_jax.weights.class_names import IMAGENET_CLASSES, class_names_from, complete_names
from resnet_jax.weights.convert import Variables, fit_variables
from resnet_jax.weights.files import WEIGHT_SUFFIXES, is_workdir
from resnet_jax.weights.network import Network
from resnet_jax.weights.overrides import Overrides
from resnet_jax.weights.pretrained import load_pretrained
from resnet_jax.weights.weight_file import open_weight_file


def open_network(
    source: str | os.PathLike[str],
    *,
    model: str = "",
    best: bool = True,
    ema: bool = True,
    image_size: int = 0,
    crop_fraction: float = 0.0,
    threshold: float = 0.0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    interpolation: str = "",
    crop_mode: str = "",
    classes: str | os.PathLike[str] | Sequence[str] = (),
    prefix: str = "",
    weights: str = "",
    upright: bool | None = None,
) -> Network:
    """Opens a trained network.

    The architecture and the number of classes of a weight file are inferred from the names and
    shapes of its tensors. Preprocessing and the order of classes, which no weight file holds, are
    assumed to be the usual ones; `Network.assumed` lists all assumptions.

    Args:
      source: A workdir, a weight file (as for `load_weights`), a folder in the Hub's form, or
        "owner/name" on the Hub.
      model: Registered name of the network in a weight file. Default: inferred.
      best: Open a workdir's best state by the run's checkpoint.best_metric instead of the newest.
      ema: Open the moving average, where a workdir or a checkpoint in a file has one.
      image_size: Side of the images in pixels. Default: as the network was trained or published.
      crop_fraction: Side of the crop as a fraction of the resized image's shorter side. Default:
        as the network was trained or published.
      threshold: Probability from which a multi-label network predicts a class. Default: the
        network's own.
      mean: Subtracted from each channel, in units of 1 (255 in a uint8 image); one number, or one
        per channel. Default: the network's own.
      std: Divides each channel, in units of 1; as many numbers as mean. Default: the network's own.
      interpolation: "bilinear" or "bicubic". Default: the network's own.
      crop_mode: "center" or "squash", as in `Preprocessing`. Default: the network's own.
      classes: Names of the outputs, or a file of them: one per line, or JSON (a list, or an object
        from number to name). Not for a workdir, which has them. Default: the source's names.
      prefix: Prefix of the tensors' names in a weight file with several networks: "encoder_q".
      weights: "ema" or "raw", like `ema`, but an error where the source has no such weights.
      upright: Rotate images by their EXIF orientation. Default: predictions do, evaluation follows
        the run.

    Returns:
      The network, with float32 variables. It has no head (model.num_classes = 0) where a weight
      file has none.

    Raises:
      WeightsError: There is no network at `source`, or it is damaged.
      ModelError: No network is called `model`.
      ConfigError: An option is wrong, or does not go with `source`.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, resnet_jax as rj
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rj.save_weights(f"{folder}/w.safetensors", model, variables)
      ...     network = open_network(f"{folder}/w.safetensors")
      >>> network.name, network.channels, network.preprocessing.image_size, network.class_names[:2]
      ('resnet20', 3, 32, ('0', '1'))
    """
    if model:
        model_info(model)  # raises ModelError for an unknown name
    if weights not in ("", "ema", "raw"):
        raise ConfigError(f"weights={weights[:100]!r}: must be 'ema' or 'raw'")
    # Unlike Path.expanduser, this one leaves ~ alone where the user has no home.
    path = Path(os.path.expanduser(source))
    from_run = is_workdir(path)
    is_file = path.is_file() or path.suffix in WEIGHT_SUFFIXES
    if from_run:
        _check_no_options(path, "a workdir", prefix=prefix, classes=classes)
    elif not is_file:
        _check_no_options(source, "in the Hub's form", prefix=prefix, weights=weights)
    # Wrong options are reported before the weights are read.
    overrides = Overrides(
        image_size,
        crop_fraction,
        threshold,
        tuple(mean),
        tuple(std),
        interpolation,
        crop_mode,
        *class_names_from(classes),
    )
    overrides.check()
    if from_run:
        network = _from_workdir(path, best, ema and weights != "raw")
        if weights == "ema" and not network.ema:
            raise ConfigError(f"weights='ema': {source} has no moving average")
    elif is_file:
        network = open_weight_file(
            path, model, prefix=prefix, weights=weights or ("" if ema else "raw")
        )
    else:
        network = _from_hub(str(path) if path.is_dir() else os.fspath(source))
    if model and network.name != model:
        raise ConfigError(f"--model={model}: {source} holds a {network.name}; leave the flag out")
    _check_finite(network)
    network = overrides.apply(network)
    _check_interpolation(network)
    return dataclasses.replace(network, upright=upright, assumed=_assumptions(network))


def _check_no_options(source: object, kind: str, **options: object) -> None:
    """Refuses options that belong to other kinds of sources."""
    for name, value in options.items():
        if value:
            raise ConfigError(
                f"--{name}={value}: does not go with {source}, which is {kind} and says it itself"
            )


def _from_workdir(workdir: Path, best: bool, ema: bool) -> Network:
    # Imported here, because other sources need neither workdirs nor Orbax.
    from resnet_jax.workdirs.checkpoint import load_variables
    from resnet_jax.workdirs.description import read_class_names, read_config
    from resnet_jax.workdirs.signature import is_own

    try:
        name, variables, step = load_variables(workdir, best=best, ema=ema)
        config, names = read_config(workdir), read_class_names(workdir)
    except ResNetJaxError as error:
        raise WeightsError(str(error)) from error
    data, classes = config.data, _head_width(workdir, variables)
    # The mapped axis is for training.
    model = make_model(config, classes).clone(axis_name=None, bn_group_size=None)
    try:
        variables = fit_variables(model, variables)
    except WeightsError as error:
        raise WeightsError(f"{workdir} holds a {name}: {error}") from error
    return Network(
        source=str(workdir),
        name=name,
        model=model,
        variables=variables,
        preprocessing=Preprocessing.from_config(config),
        channels=_image_channels(variables),
        class_names=complete_names(names, classes),
        named=True,
        config=config,
        step=step,
        ema=ema and config.train.ema_decay > 0,
        own=is_own(workdir),
        multi_label=data.multi_label,
        threshold=config.evaluate.threshold,
    )


def _from_hub(source: str) -> Network:
    found = load_pretrained(source)
    return Network(
        source=source,
        name=found.name,
        model=found.model,
        variables=found.variables,
        preprocessing=found.preprocessing,
        channels=_image_channels(found.variables),
        class_names=complete_names(found.class_names, found.model.num_classes),
        named=bool(found.class_names),
        multi_label=found.threshold is not None,
        threshold=found.threshold or 0.5,
    )


def _head_width(workdir: Path, variables: Variables) -> int:
    try:
        return int(variables["params"]["head"]["bias"].shape[0])
    except (LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{workdir}: its state is of no network with a head") from error


def _image_channels(variables: Variables) -> int:
    return int(variables["params"]["stem"]["conv1"]["kernel"].shape[2])


def _check_finite(network: Network) -> None:
    """Raises WeightsError where a variable has NaN or infinities.

    The outputs do not always show it: a compiled ReLU may turn NaN into 0.
    """
    for name, leaf in traverse_util.flatten_dict(network.variables, sep="/").items():
        if not np.isfinite(leaf).all():
            raise WeightsError(
                f"{network.source}: the network's {name} has values that are not finite numbers; "
                "take another state or file"
            )


def _check_interpolation(network: Network) -> None:
    found = network.preprocessing.interpolation
    if found not in INTERPOLATIONS:
        raise WeightsError(
            f"{network.source}: its images are resized by {found!r}, which is none of "
            f"{', '.join(INTERPOLATIONS)}; --interpolation chooses one of these"
        )


def _assumptions(network: Network) -> tuple[str, ...]:
    """Everything that is assumed of a network after the user's options."""
    assumed, preprocessing = [*network.assumed], network.preprocessing
    if network.usual:
        mean, std = (
            ",".join(f"{each:g}" for each in values)
            for values in (preprocessing.mean, preprocessing.std)
        )
        side = preprocessing.image_size
        assumed.append(
            f"images of {side}x{side} pixels with {network.usual} mean {mean} and std {std} "
            "(--image_size, --mean, --std)"
        )
    if not network.named and len(network.class_names) == IMAGENET_CLASSES:
        assumed.append("the 1,000 outputs are ImageNet's classes in their usual order (--classes)")
    return tuple(assumed)
