"""A trained network and what its use depends on: how images are prepared, its classes.

A network comes from a run's workdir, a weight file, or the Hugging Face Hub. Evaluation,
prediction, export and reports all open it here, so that they agree on what it is.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from resnet_jax.config.model import make_model
from resnet_jax.config.schema import (
    DATA_NAMES,
    DATA_PLACES,
    EVAL_CROPS,
    INTERPOLATIONS,
    Augment,
    Config,
    Data,
)
from resnet_jax.errors import ConfigError, ResNetJaxError, WeightsError
from resnet_jax.limits import MAX_SIDE
from resnet_jax.models.registry import model_info
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.class_file import check_names, read_class_file
from resnet_jax.weights.config_json import MULTI_LABEL
from resnet_jax.weights.convert import Variables, fit_variables
from resnet_jax.weights.files import WEIGHT_SUFFIXES
from resnet_jax.weights.pretrained import (
    Preprocessing,
    load_pretrained,
    pretrained_labels,
    pretrained_name,
    pretrained_threshold,
)
from resnet_jax.weights.weight_file import open_weight_file
from resnet_jax.workdirs.description import read_class_names, read_config
from resnet_jax.workdirs.signature import is_own

_IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Network:
    """A model, its variables, and the facts of its training that its use depends on.

    Args:
      source: What it was opened from, for messages.
      name: As registered: "resnet50".
      model: The module.
      variables: {"params", "batch_stats"}.
      preprocessing: How images become its input.
      channels: Of its images: 1 (grey), 3 (color), or another number.
      class_names: The name of each output; those of ImageNet where there are 1,000 and nobody said
        what they are, else "0", "1", ...
      config: Of the run that trained it; None where it was not one of ours.
      step: Completed steps of that run's state; None likewise.
      ema: It is the moving average of that state.
      own: The trainer of this user wrote `config`, so the places of its data can be trusted.
      multi_label: It was trained for images with none, one or several labels: the probability of
        a class is the logistic function of its logit, and not the softmax.
      threshold: Probability from which a class is predicted, where it is multi_label.
      upright: Turn images as their EXIF orientation says; None: predictions turn them, and
        evaluation does as the run's data.upright says.
      named: `class_names` were given: by the run, by the repository on the Hub, or by the user.
      assumed: What was taken for granted where the source does not say it, one sentence each.
      usual: Whose mean and std those of `preprocessing` are, where they are assumed: "ImageNet's".
    """

    source: str
    name: str
    model: ResNet
    variables: Variables
    preprocessing: Preprocessing
    channels: int
    class_names: tuple[str, ...]
    config: Config | None = None
    step: int | None = None
    ema: bool = False
    own: bool = False
    multi_label: bool = False
    threshold: float = 0.5
    upright: bool | None = None
    named: bool = False
    assumed: tuple[str, ...] = ()
    usual: str = ""

    @property
    def crop(self) -> Data:
        """How images are prepared for evaluation, as `data.decode.eval_crop` takes it."""
        trained_upright = self.config is not None and self.config.data.upright
        return Data(
            eval_size=self.preprocessing.image_size,
            eval_resize=self.preprocessing.resize_size,
            eval_crop=self.preprocessing.crop_mode,
            interpolation=self.preprocessing.interpolation,
            upright=trained_upright if self.upright is None else self.upright,
        )

    @property
    def colours(self) -> Augment:
        """The preprocessing's mean and deviation, as `data.augment.normalize` takes them."""
        return Augment(mean=self.preprocessing.mean, std=self.preprocessing.std)

    @property
    def problem(self) -> dict[str, Any]:
        """What a description of the network says of its outputs; {}: they are for the softmax."""
        if not self.multi_label:
            return {}
        return {"problem_type": MULTI_LABEL, "threshold": self.threshold}


def evaluated_data(network: Network) -> Data:
    """The data that a run's network was evaluated on, to be read again.

    Args:
      network: The network.

    Returns:
      The run's `data` section.

    Raises:
      ConfigError: The network is not of a run. Or somebody else wrote the section, and it names a
        place: that may be any folder.
    """
    if network.config is None:
        raise ConfigError(
            f"--data: {network.source} is no workdir and does not say what to measure it on; give "
            f"{DATA_NAMES}, and --split where the data has several that could be meant"
        )
    data = network.config.data
    if network.own or not (data.data_dir or data.name.partition(":")[0] in DATA_PLACES):
        return data
    where = f" --data_dir={data.data_dir}" if data.data_dir else ""
    raise ConfigError(
        f"--data: {network.source} was not trained by you on this machine, so the data that its "
        f"config.json names is not opened; to use it, pass --data={data.name}{where}"
    )


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

    Of a weight file, the architecture and the number of classes are inferred from the names and
    shapes of its tensors. What the file does not say is assumed: images as such networks usually
    have them, and the order of the classes. `Network.assumed` lists it.

    Args:
      source: A workdir, a weight file (as for `load_weights`), a folder in the Hub's form, or
        "owner/name" on the Hub.
      model: Name of the network in a weight file; "": it is inferred.
      best: Of a workdir, the best state by the run's checkpoint.best_metric instead of the newest.
      ema: The moving average, where a workdir or a checkpoint in a file has one.
      image_size: Side of the images in pixels; 0: as the network was trained or published.
      crop_fraction: Side of the crop as a share of the resized image's shorter side; 0: likewise.
      threshold: Probability from which a multi-label network predicts a class; 0: likewise.
      mean: Subtracted from each channel, in units of 1 (255 in a uint8 image); one number, or one
        for each channel; (): likewise.
      std: Divides each channel, in units of 1; as many numbers as mean; (): likewise.
      interpolation: "bilinear" or "bicubic"; "": likewise.
      crop_mode: "center" or "squash", as in `Preprocessing`; "": likewise.
      classes: Names of the outputs, or a file of them: one a line, or JSON (a list, or an object
        from number to name); (): as the source has them. Not for a workdir, which knows them.
      prefix: Of the tensors' names in a weight file with several networks, such as "encoder_q".
      weights: "ema" or "raw": another way to say `ema`, and an error where there is no such thing.
      upright: Turn images as their EXIF orientation says; None: as a run does in evaluation, and
        always in prediction.

    Returns:
      The network, with float32 variables. Without a head (model.num_classes = 0) where a weight
      file has none.

    Raises:
      WeightsError: There is no network at `source`, or it is damaged.
      ModelError: No network is called `model`.
      ConfigError: An option that does not go with `source`.

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
        model_info(model)  # says which names there are
    if weights not in ("", "ema", "raw"):
        raise ConfigError(f"weights={weights[:100]!r}: must be 'ema' or 'raw'")
    path = Path(os.path.expanduser(source))  # unlike Path's, as it is where ~ is nobody's
    if (path / "checkpoints").is_dir():
        _check_goes_with(path, "a workdir", prefix=prefix, classes=classes)
        network = _from_workdir(path, best, ema and weights != "raw")
        if weights == "ema" and not network.ema:
            raise ConfigError(f"weights='ema': {source} has no moving average")
    elif path.is_file() or path.suffix in WEIGHT_SUFFIXES:
        network = _from_file(path, model, prefix, weights or ("" if ema else "raw"))
    else:
        _check_goes_with(source, "in the Hub's form", prefix=prefix, weights=weights)
        network = _from_hub(str(path) if path.is_dir() else os.fspath(source))
    if model and network.name != model:
        raise ConfigError(f"--model={model}: {source} holds a {network.name}; leave the flag out")
    _check_finite(network)
    network = _with_classes(network, classes)
    network = _prepared(network, tuple(mean), tuple(std), interpolation, crop_mode)
    network = _resized(network, image_size, crop_fraction)
    network = _with_threshold(network, threshold)
    return dataclasses.replace(network, upright=upright, assumed=_assumed(network))


def require_head(network: Network, purpose: str) -> None:
    """Refuses a network without a head where classes are needed.

    Args:
      network: Any.
      purpose: What needs classes, for the message: "evaluate".

    Raises:
      ConfigError: It has no head.
    """
    if not network.model.num_classes:
        raise ConfigError(
            f"{network.source}: the network has no head of one linear layer, which {purpose} "
            "needs; `features` writes what it computes of images, and fine-tuning "
            "(configs/finetune.py) gives it a head"
        )


def _check_goes_with(source: object, kind: str, **options: object) -> None:
    """Refuses options of other kinds of sources."""
    for name, value in options.items():
        if value:
            raise ConfigError(
                f"--{name}={value}: does not go with {source}, which is {kind} and says it itself"
            )


def _check_finite(network: Network) -> None:
    """Raises WeightsError where a variable has NaN or infinities.

    The outputs do not always tell: a compiled ReLU may turn NaN into 0.
    """
    for name, leaf in traverse_util.flatten_dict(network.variables, sep="/").items():
        if not np.isfinite(leaf).all():
            raise WeightsError(
                f"{network.source}: the network's {name} has values that are not finite numbers; "
                "take another state or file"
            )


def _from_workdir(workdir: Path, best: bool, ema: bool) -> Network:
    # Orbax is loaded only where a workdir is read.
    from resnet_jax.workdirs.checkpoint import load_variables

    try:
        name, variables, step = load_variables(workdir, best=best, ema=ema)
        config, names = read_config(workdir), read_class_names(workdir)
    except ResNetJaxError as error:
        raise WeightsError(str(error)) from error
    data, classes = config.data, _classes(workdir, variables)
    size = data.eval_size or data.image_size
    # The mapped axis belongs to training.
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
        preprocessing=Preprocessing(
            image_size=size,
            crop_fraction=size / (data.eval_resize or size),
            interpolation=data.interpolation,
            mean=tuple(config.augment.mean),
            std=tuple(config.augment.std),
            crop_mode=data.eval_crop,
        ),
        channels=_channels(variables),
        class_names=_class_names(classes, names),
        named=True,
        config=config,
        step=step,
        ema=ema and config.train.ema_decay > 0,
        own=is_own(workdir),
        multi_label=data.multi_label,
        threshold=config.evaluate.threshold,
    )


def _from_file(path: Path, name: str, prefix: str, weights: str) -> Network:
    found = open_weight_file(path, name, prefix=prefix, weights=weights)
    return Network(
        source=str(path),
        name=found.name,
        model=found.model,
        variables=found.variables,
        preprocessing=found.preprocessing,
        channels=_channels(found.variables),
        class_names=_class_names(found.model.num_classes),
        assumed=found.assumed,
        usual=found.usual,
    )


def _from_hub(source: str) -> Network:
    model, variables, preprocessing = load_pretrained(source)
    if preprocessing.interpolation not in INTERPOLATIONS:
        raise WeightsError(
            f"{source}: its images are resized by {preprocessing.interpolation!r}, which is none "
            f"of {', '.join(INTERPOLATIONS)}"
        )
    threshold, labels = pretrained_threshold(source), pretrained_labels(source)
    return Network(
        source=source,
        name=pretrained_name(source),
        model=model,
        variables=variables,
        preprocessing=preprocessing,
        channels=_channels(variables),
        class_names=_class_names(model.num_classes, labels),
        named=bool(labels),
        multi_label=threshold is not None,
        threshold=threshold or 0.5,
    )


def _classes(workdir: Path, variables: Variables) -> int:
    try:
        return int(variables["params"]["head"]["bias"].shape[0])
    except (LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{workdir}: its state is of no network with a head") from error


def _channels(variables: Variables) -> int:
    return int(variables["params"]["stem"]["conv1"]["kernel"].shape[2])


def _class_names(classes: int, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The names that are known; of a thousand classes ImageNet's; else the numbers."""
    if not known and classes == _IMAGENET_CLASSES:
        return imagenet_names()
    # A head may be wider than its data set (model.num_classes).
    return known + tuple(str(number) for number in range(len(known), classes))


def imagenet_names() -> tuple[str, ...]:
    """The English names of ImageNet's 1,000 classes, in the order of their WordNet ids.

    Returns:
      As torchvision has them.

    Example:
      >>> imagenet_names()[:2]
      ('tench', 'goldfish')
    """
    return tuple(line.split(" ", 1)[1] for line in _imagenet_lines())


def imagenet_ids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in the order of the labels.

    Returns:
      As TFDS and torchvision order them.

    Example:
      >>> imagenet_ids()[:2]
      ('n01440764', 'n01443537')
    """
    return tuple(line.split(" ", 1)[0] for line in _imagenet_lines())


def _imagenet_lines() -> list[str]:
    file = resources.files("resnet_jax.evaluation") / "imagenet_classes.txt"
    return file.read_text(encoding="utf-8").splitlines()


def _with_classes(network: Network, classes: str | os.PathLike[str] | Sequence[str]) -> Network:
    """The network with the names that the user gives its outputs."""
    if not classes:
        return network
    if isinstance(classes, str | os.PathLike):
        flag, names = f"--classes={os.fspath(classes)}", read_class_file(classes)
    else:
        flag, names = "classes", check_names(classes, "classes")
    if len(names) != network.model.num_classes:
        outputs = network.model.num_classes
        raise ConfigError(
            f"{flag}: has {len(names):,} names, and {network.source} {outputs:,} outputs"
        )
    return dataclasses.replace(network, class_names=names, named=True)


def _prepared(
    network: Network,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    crop_mode: str,
) -> Network:
    """The network with other preprocessing than its source says."""
    for flag, value, allowed in (
        ("interpolation", interpolation, INTERPOLATIONS),
        ("crop_mode", crop_mode, EVAL_CROPS),
    ):
        if value and value not in allowed:
            raise ConfigError(f"--{flag}={value[:100]}: must be {' or '.join(allowed)}")
    before = network.preprocessing
    changed = dataclasses.replace(
        before,
        mean=mean or before.mean,
        std=std or before.std,
        interpolation=interpolation or before.interpolation,
        crop_mode=crop_mode or before.crop_mode,
    )
    for flag, values in (("mean", mean), ("std", std)):
        if values and (
            len(values) not in (1, network.channels)
            or not all(0 <= each <= 1 if flag == "mean" else 1e-6 <= each < 256 for each in values)
        ):
            shown = ",".join(map(str, values))[:100]
            positive = "positive " if flag == "std" else ""
            raise ConfigError(
                f"--{flag}={shown}: must be one {positive}number, or {network.channels} with "
                "commas, one for each channel; in units of 1, not of 255"
            )
    if len(changed.mean) != len(changed.std):
        given, other = ("mean", "std") if mean else ("std", "mean")
        raise ConfigError(f"--{given}: needs --{other} with as many numbers")
    usual = "" if mean and std else network.usual
    return dataclasses.replace(network, preprocessing=changed, usual=usual)


def _assumed(network: Network) -> tuple[str, ...]:
    """All that is assumed of a network, once the user's options have replaced some of it."""
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
    if not network.named and len(network.class_names) == _IMAGENET_CLASSES:
        assumed.append("the 1,000 outputs are ImageNet's classes in their usual order (--classes)")
    return tuple(assumed)


def _resized(network: Network, image_size: int, crop_fraction: float) -> Network:
    """The network at another test resolution."""
    if image_size < 0 or not 0 <= crop_fraction <= 1:
        raise ConfigError(
            f"--image_size={image_size} --crop_fraction={crop_fraction}: a number of pixels, and "
            "a share in (0, 1]; leave a flag out to keep what the network has"
        )
    preprocessing = network.preprocessing
    changed = dataclasses.replace(
        preprocessing,
        image_size=image_size or preprocessing.image_size,
        crop_fraction=crop_fraction or preprocessing.crop_fraction,
    )
    least = network.model.strides()[-1]
    if changed.image_size < least:
        raise ConfigError(
            f"--image_size={image_size}: {network.name} needs at least {least} pixels a side"
        )
    resized = changed.image_size / changed.crop_fraction
    if max(changed.image_size, resized) > MAX_SIDE:
        raise ConfigError(
            f"--image_size={changed.image_size} --crop_fraction={changed.crop_fraction}: images "
            f"would be resized to {resized:,.0f} pixels, where {MAX_SIDE:,} are the most"
        )
    return dataclasses.replace(network, preprocessing=changed)


def _with_threshold(network: Network, threshold: float) -> Network:
    """The network at another threshold."""
    if not threshold:
        return network
    if not 0 < threshold < 1:
        raise ConfigError(f"--threshold={threshold}: must be a probability in (0, 1)")
    if not network.multi_label:
        raise ConfigError(
            f"--threshold={threshold}: goes with a multi-label network; {network.source} gives "
            "each image one class"
        )
    return dataclasses.replace(network, threshold=threshold)
