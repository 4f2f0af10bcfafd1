"""Networks from the Hugging Face Hub: weights, and how their images were prepared."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from resnet_jax.errors import ModelError, WeightsError, importing
from resnet_jax.files import MIB, read_json
from resnet_jax.limits import MAX_CHANNELS, MAX_CLASSES, MAX_SIDE
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.channels import colors_for
from resnet_jax.weights.convert import Variables
from resnet_jax.weights.files import load_weights

MULTI_LABEL = "multi_label_classification"  # a "problem_type" of transformers'
# Of ImageNet-21k's classes, the names take 1 MB.
_MOST_CONFIG = 16 * MIB
# Networks of timm's with one of our names and another function.
_OTHER_NETWORKS = {
    name: (
        "passes the stem's output around its first block before the first norm and ReLU, where "
        f"the paper (He et al. 2016, section 5) and {name} here pass it after them"
    )
    for name in ("resnetv2_18", "resnetv2_34")
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a network's images were prepared.

    Args:
      image_size: Side of the crop in pixels.
      crop_fraction: Side of the crop as a share of the resized image's shorter side.
      interpolation: Filter of the resize: "bilinear", "bicubic", ...
      mean: Subtracted from each channel, in units of 1 (255 in a uint8 image).
      std: Divides each channel, in units of 1.
      crop_mode: "center": the shorter side is resized and the center cut out; "squash": the whole
        image is resized to the square, without regard to its proportions.

    Example:
      >>> preprocessing = Preprocessing(image_size=224, crop_fraction=0.875)
      >>> preprocessing.resize_size
      256
      >>> preprocessing.normalize(jnp.zeros((1, 2, 2, 3), jnp.uint8))[0, 0, 0].round(2).tolist()
      [-2.119999885559082, -2.0399999618530273, -1.7999999523162842]
    """

    image_size: int = 224
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_mode: str = "center"

    @property
    def resize_size(self) -> int:
        """Shorter side in pixels to which an image is resized before the crop."""
        # timm cuts the fraction of a pixel, but 32 / (32 / 40) is to be 40 and not 39.999.
        return int(self.image_size / self.crop_fraction + 1e-6)

    def normalize(self, images: jax.Array) -> jax.Array:
        """uint8 images [N, H, W, C] -> float32 images [N, H, W, C] as the network expects them."""
        scaled = jnp.asarray(images, jnp.float32) / 255
        return (scaled - jnp.asarray(self.mean)) / jnp.asarray(self.std)


class Pretrained(NamedTuple):
    """A model, its variables, and how its images are prepared."""

    model: ResNet
    variables: Variables
    preprocessing: Preprocessing


def load_pretrained(
    repository: str | os.PathLike[str],
    *,
    revision: str | None = None,
    reset_head: bool = False,
    channels: int | None = None,
    **overrides: Any,
) -> Pretrained:
    """Loads a network from a repository of the Hugging Face Hub, or from a folder like one.

    The repository holds `config.json` in timm's form and `model.safetensors`. Without a network
    the Hub's local cache is used.

    Args:
      repository: "owner/name" on the Hub, or a folder with those two files.
      revision: Branch, tag or commit on the Hub; name a commit to get the same weights for ever.
      reset_head: Leave the head out and initialise a new one; set num_classes with it.
      channels: Adapt the first convolution to images of so many channels, as `from_torch` does;
        mean and std are averaged for one channel, repeated for more than three.
      **overrides: Fields of `ResNet`, such as num_classes, dtype or output_stride.

    Returns:
      (model, variables, preprocessing).

    Raises:
      WeightsError: The repository is not reachable and not in the cache, is not a network of
        this family, or its weights do not fit.

    Example:
      >>> import tempfile, json, pathlib, resnet_jax as rj
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     config = {"architecture": "resnet20", "num_classes": 10}
      ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
      ...     rj.save_weights(f"{folder}/model.safetensors", model, variables)
      ...     model, variables, preprocessing = rj.load_pretrained(folder, dtype=jnp.bfloat16)
      >>> model.num_classes
      10
    """
    folder = _folder(repository, revision)
    config = _read_config(folder / "config.json")
    try:
        model = create_model(config.architecture, **{**config.fields, **overrides})
    except ModelError as error:
        raise WeightsError(f"{repository}: {error}") from error
    variables = load_weights(
        model, folder / "model.safetensors", reset_head=reset_head, channels=channels
    )
    preprocessing = config.preprocessing
    if channels:
        mean, std = (colors_for(each, channels) for each in (preprocessing.mean, preprocessing.std))
        preprocessing = dataclasses.replace(preprocessing, mean=mean, std=std)
    return Pretrained(model, variables, preprocessing)


def pretrained_name(repository: str | os.PathLike[str], *, revision: str | None = None) -> str:
    """The registered name of the network in a repository.

    Args:
      repository: As for `load_pretrained`.
      revision: Likewise.

    Returns:
      Such as "resnet50".

    Raises:
      WeightsError: As `load_pretrained` raises it.

    Example:
      >>> import json, pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = pathlib.Path(folder, "config.json").write_text('{"architecture": "resnet20"}')
      ...     pretrained_name(folder)
      'resnet20'
    """
    return _read_config(_folder(repository, revision) / "config.json").architecture


def pretrained_labels(
    repository: str | os.PathLike[str], *, revision: str | None = None
) -> tuple[str, ...]:
    """The names of the classes of the network in a repository.

    Args:
      repository: As for `load_pretrained`.
      revision: Likewise.

    Returns:
      In the order of the outputs; () where the repository does not say.

    Raises:
      WeightsError: As `load_pretrained` raises it.

    Example:
      >>> import json, pathlib, tempfile
      >>> config = {"architecture": "resnet20", "num_classes": 2, "label_names": ["cat", "dog"]}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
      ...     pretrained_labels(folder)
      ('cat', 'dog')
    """
    return _read_config(_folder(repository, revision) / "config.json").labels


def pretrained_threshold(
    repository: str | os.PathLike[str], *, revision: str | None = None
) -> float | None:
    """The probability from which a multi-label network in a repository predicts a class.

    Its config.json says `"problem_type": "multi_label_classification"`, as in transformers, and may
    have a `"threshold"`.

    Args:
      repository: As for `load_pretrained`.
      revision: Likewise.

    Returns:
      In (0, 1), 0.5 where the repository does not say; None for a network whose images have one
      label each.

    Raises:
      WeightsError: As `load_pretrained` raises it.

    Example:
      >>> import json, pathlib, tempfile
      >>> config = {"architecture": "resnet20", "problem_type": "multi_label_classification"}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
      ...     pretrained_threshold(folder)
      0.5
    """
    return _read_config(_folder(repository, revision) / "config.json").threshold


class _Config(NamedTuple):
    architecture: str
    fields: dict[str, Any]
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    threshold: float | None


def _folder(repository: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder on this machine that holds the repository's two files."""
    if Path(repository).is_dir():
        return Path(repository)
    with importing(
        f"{repository}: there is no such file or folder here; as a name on the Hub it", WeightsError
    ):
        import huggingface_hub as hub
    try:
        # One call for both files, so that they are of one commit.
        files = ["config.json", "model.safetensors"]
        return Path(
            hub.snapshot_download(os.fspath(repository), revision=revision, allow_patterns=files)
        )
    except (OSError, ValueError, hub.errors.EntryNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(
            f"{repository} (revision {revision or 'main'}) can be had neither from the Hub nor "
            f"from the local cache, nor is it a folder here ({type(error).__name__}: {reason})"
        ) from error


def _read_config(path: Path) -> _Config:
    """Reads timm's config.json: facts of the weights stand in "pretrained_cfg"."""
    try:
        config = read_json(path, _MOST_CONFIG)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error})") from error
    try:
        return _parse_config(config)
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        what = error if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}"
        raise WeightsError(f"{path} is not a configuration as timm writes it ({what})") from error


def _parse_config(config: dict[str, Any]) -> _Config:
    architecture = config["architecture"]
    if architecture in _OTHER_NETWORKS:
        raise WeightsError(f"timm's {architecture} {_OTHER_NETWORKS[architecture]}")
    facts = {**config, **config.get("pretrained_cfg", {})}
    classes = config.get("num_classes", facts.get("num_classes", 1000))
    fields: dict[str, Any] = {"num_classes": _count("num_classes", classes, 0, MAX_CLASSES)}
    for argument, value in (config.get("model_args") or {}).items():
        if argument == "in_chans":  # the weights say it
            continue
        if argument == "output_stride":
            fields["output_stride"] = _count("model_args.output_stride", value, 1, MAX_SIDE)
        elif argument == "drop_rate":
            fields["dropout_rate"] = _number("model_args.drop_rate", value)
        else:
            shown = f"model_args.{argument} = {value!r}"[:200]
            raise WeightsError(f"{shown} has no counterpart here")
    default = Preprocessing()
    channels, side, _ = facts.get("input_size", [3, default.image_size, default.image_size])
    _count("input_size", channels, 1, MAX_CHANNELS)
    preprocessing = Preprocessing(
        image_size=_count("input_size", side, 1, 4096),
        crop_fraction=_number("crop_pct", facts.get("crop_pct", default.crop_fraction)),
        interpolation=str(facts.get("interpolation", default.interpolation)),
        mean=_numbers("mean", facts.get("mean", default.mean)),
        std=_numbers("std", facts.get("std", default.std)),
    )
    _check_preprocessing(preprocessing, channels)
    labels = _labels(facts, classes)
    return _Config(architecture, fields, preprocessing, labels, _threshold(config))


def _labels(facts: dict[str, Any], classes: int) -> tuple[str, ...]:
    """The classes' names; () where there are none, or those of other classes."""
    names = facts.get("label_names") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsError("label_names: must be a list of names")
    return tuple(names) if len(names) == classes else ()


def _threshold(config: dict[str, Any]) -> float | None:
    """Of a multi-label network; None for any other."""
    if config.get("problem_type") != MULTI_LABEL:
        return None
    threshold = _number("threshold", config.get("threshold", 0.5))
    if not 0 < threshold < 1:
        raise WeightsError(f"threshold = {threshold}: must be in (0, 1)")
    return threshold


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise WeightsError(f"{field} = {str(value)[:100]}: must be a number")
    return float(value)


def _numbers(field: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        raise WeightsError(f"{field} = {str(values)[:100]}: must be a list of numbers")
    return tuple(_number(field, value) for value in values)


def _count(field: str, value: Any, least: int, most: int) -> int:
    """A whole number in the file, once it is one and in range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise WeightsError(f"{field} = {str(value)[:100]}: must be a whole number")
    if not least <= value <= most:
        raise WeightsError(f"{field} = {value}: must be from {least:,} to {most:,}")
    return value


def _check_preprocessing(preprocessing: Preprocessing, channels: int) -> None:
    """Refuses numbers that no image can be prepared by."""
    size, crop = preprocessing.image_size, preprocessing.crop_fraction
    mean, std = preprocessing.mean, preprocessing.std
    if not 0 < crop <= 1:
        raise WeightsError(f"crop_pct = {crop}: must be a share in (0, 1]")
    if size / crop > MAX_SIDE:
        raise WeightsError(
            f"crop_pct = {crop}: images would be resized to {size / crop:,.0f} pixels, where "
            f"{MAX_SIDE:,} are the most"
        )
    # timm also writes three for networks of other channels.
    if len(mean) not in (1, 3, channels) or not all(map(math.isfinite, mean)):
        more = "" if channels in (1, 3) else f", or {channels:,}"
        raise WeightsError(f"mean = {str(mean)[:200]}: must be 1 or 3 numbers{more}")
    if len(std) != len(mean) or not all(1e-6 <= each < math.inf for each in std):
        raise WeightsError(
            f"std = {std}: must be as many positive numbers as mean has, 1e-6 or more"
        )
