"""Pretrained networks from the Hugging Face Hub, a folder in its form, or a workdir."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.errors import ModelError, ResNetJaxError, WeightsError, importing, reason_of
from resnet_jax.files import MIB, read_json
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.channels import colors_for
from resnet_jax.weights.class_names import complete_names
from resnet_jax.weights.convert import Variables
from resnet_jax.weights.description import Description
from resnet_jax.weights.files import is_workdir, load_weights, no_network
from resnet_jax.weights.timm_config import timm_description
from resnet_jax.weights.transformers_config import (
    processor_preprocessing,
    transformers_description,
)

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_MAX_CONFIG = 16 * MIB  # the names of ImageNet-21k's classes have 1 MB
# Weight files of a repository, in order of preference.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained network; unpacks to (model, variables, preprocessing).

    Args:
      model: The module.
      variables: {"params", "batch_stats"} of float32 NumPy arrays.
      preprocessing: How images become its input.
      name: Registered name, such as "resnet50"; for a variant, the nearest registered network.
      class_names: Names in the order of the outputs; () where the repository does not say, or
        for another number of classes.
      threshold: Probability from which a multi-label network predicts a class; None for a network
        with one label per image.
    """

    model: ResNet
    variables: Variables = dataclasses.field(repr=False)
    preprocessing: Preprocessing
    name: str = ""
    class_names: tuple[str, ...] = ()
    threshold: float | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.variables, self.preprocessing))


def load_pretrained(
    repository: str | os.PathLike[str],
    *,
    revision: str | None = None,
    reset_head: bool = False,
    channels: int | None = None,
    use_test_size: bool = False,
    **overrides: Any,
) -> Pretrained:
    """Loads a network from the Hugging Face Hub, a folder in its form, or a run's workdir.

    The repository holds `config.json` as timm or Hugging Face transformers writes it, and
    `model.safetensors` or `pytorch_model.bin`; from transformers also `preprocessor_config.json`.
    Offline, the Hub's local cache is used. Of a workdir, the best state is read, and its moving
    average if it has one.

    Args:
      repository: "owner/name" on the Hub, a folder with those files, or a workdir.
      revision: Branch, tag or commit on the Hub. Only a commit always means the same weights.
      reset_head: Leave the head out and initialize a new one; set num_classes with it.
      channels: Adapt the first convolution to images with this number of channels, as `from_torch`
        does; mean and std are averaged for one channel, repeated for more than three.
      use_test_size: Use the image size and crop for which timm states the accuracy
        (test_input_size, test_crop_pct), where they differ from those of training.
      **overrides: Fields of `ResNet`, such as num_classes, dtype or output_stride.

    Returns:
      The network, which unpacks to (model, variables, preprocessing).

    Raises:
      WeightsError: The repository is not reachable and not in the cache, is not a network of
        this family, or its weights do not fit; the workdir has no intact state.

    Example:
      >>> import tempfile, json, pathlib, jax, jax.numpy as jnp, resnet_jax as rj
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     config = {"architecture": "resnet20", "num_classes": 10}
      ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
      ...     rj.save_weights(f"{folder}/model.safetensors", model, variables)
      ...     pretrained = rj.load_pretrained(folder, dtype=jnp.bfloat16)
      >>> model, variables, preprocessing = pretrained
      >>> pretrained.name, model.num_classes
      ('resnet20', 10)
    """
    folder = _folder(repository, revision)
    found = read_description(folder, use_test_size=use_test_size)
    try:
        model = create_model(found.name, **{**found.fields, **overrides})
    except ModelError as error:
        raise WeightsError(f"{repository}: {error}") from error
    variables = load_weights(model, _weight_file(folder), reset_head=reset_head, channels=channels)
    preprocessing = found.preprocessing
    if channels:
        mean, std = (colors_for(each, channels) for each in (preprocessing.mean, preprocessing.std))
        preprocessing = dataclasses.replace(preprocessing, mean=mean, std=std)
    names = found.class_names
    keeps_classes = not reset_head and len(names) == model.num_classes
    return Pretrained(
        model=model,
        variables=variables,
        preprocessing=preprocessing,
        name=found.name,
        class_names=names if keeps_classes else (),
        threshold=found.threshold,
    )


def read_description(folder: Path, *, use_test_size: bool = False) -> Description:
    """Reads config.json of a folder and, for transformers, preprocessor_config.json."""
    if is_workdir(folder):
        return _describe_run(folder)
    path = folder / CONFIG
    if folder.is_dir() and not path.exists():
        raise WeightsError(no_network(folder))
    config = _read(path)
    if isinstance(config, dict) and "architecture" not in config and "model_type" in config:
        described = _checked(path, "transformers", lambda: transformers_description(config))
        path = folder / PREPROCESSOR
        processor = _read(path) if path.exists() else {}
        return described._replace(
            preprocessing=_checked(path, "transformers", lambda: processor_preprocessing(processor))
        )
    return _checked(path, "timm", lambda: timm_description(config, use_test_size))


def _describe_run(workdir: Path) -> Description:
    """The network of a run, by its configuration and the names of its classes."""
    # Imported here, because a repository of the Hub needs none of it.
    with importing(f"{workdir} is a workdir, and reading it", WeightsError):
        from resnet_jax.config.model import make_model, model_overrides
        from resnet_jax.workdirs.description import read_class_names, read_config
    try:
        config, names = read_config(workdir), read_class_names(workdir)
        model = make_model(config, len(names))
    except ResNetJaxError as error:
        raise WeightsError(str(error)) from error
    classes = model.num_classes
    return Description(
        name=config.model.name,
        fields={
            "num_classes": classes,
            "dtype": model.dtype,
            **model_overrides(config.model),
        },
        preprocessing=Preprocessing.from_config(config),
        class_names=complete_names(names, classes),
        threshold=config.evaluate.threshold if config.data.multi_label else None,
    )


def _read(path: Path) -> Any:
    try:
        return read_json(path, _MAX_CONFIG)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error})") from error


def _checked(path: Path, library: str, parse: Callable[[], Any]) -> Any:
    """The result of `parse`, for which a value of an unexpected type is an error in the file.

    A ModelError means that the file is valid and describes a network that is unknown here.
    """
    try:
        return parse()
    except ModelError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        what = error if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}"
        raise WeightsError(
            f"{path} is not a configuration as {library} writes it ({what})"
        ) from error


def _folder(repository: str | os.PathLike[str], revision: str | None) -> Path:
    """The local folder with the repository's files; downloads them where needed."""
    local = Path(os.path.expanduser(repository))
    if local.is_dir():
        return local
    if local.is_file():
        raise WeightsError(
            f"{repository} is a file, not a folder: read it with rj.load_weights(model, path), or "
            "rj.Classifier.load(path)"
        )
    missing = f"{repository}: there is no such file or folder"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(repository)):
        raise WeightsError(f"{missing}{_similar(local)}")
    with importing(f"{missing}{_similar(local)}; as a name on the Hub it", WeightsError):
        import huggingface_hub as hub

    def download(*files: str, revision: str | None) -> Path:
        return Path(
            hub.snapshot_download(os.fspath(repository), revision=revision, allow_patterns=[*files])
        )

    try:
        # One call for all files, so that they are of one commit. Most repositories have both kinds
        # of weights; the second is downloaded, from the same commit, only without the first.
        folder = download(CONFIG, PREPROCESSOR, _WEIGHTS[0], revision=revision)
        if not (folder / _WEIGHTS[0]).exists() and (folder / CONFIG).exists():
            folder = download(*_WEIGHTS[1:], revision=folder.name)
        return folder
    except hub.errors.RevisionNotFoundError as error:
        wanted = revision or "main"
        raise WeightsError(f"{repository}: the Hub has no revision {wanted!r} of it") from error
    except (OSError, ValueError, hub.errors.EntryNotFoundError) as error:
        errors = hub.errors
        if type(error) is errors.RepositoryNotFoundError:
            reason = "the Hub has no repository of this name, or it is private"
        elif type(error) is errors.LocalEntryNotFoundError and error.__cause__ is not None:
            cause = cast(Exception, error.__cause__)
            offline = isinstance(cause, errors.OfflineModeIsEnabled)
            why = "HF_HUB_OFFLINE is set" if offline else reason_of(cause)
            reason = f"the Hub cannot be reached ({why})"
        else:
            reason = f"the Hub does not give it ({reason_of(error)})"
        raise WeightsError(f"{missing}, and {reason}{_similar(local)}") from error


def _similar(path: Path) -> str:
    """The most similar name beside a path that does not exist, as the end of a message."""
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError):  # there is no such folder either
        names = os.listdir(path.parent)
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _weight_file(folder: Path) -> Path:
    """The file to read the weights from, or the workdir itself."""
    if is_workdir(folder):
        return folder
    found = [folder / name for name in _WEIGHTS if (folder / name).exists()]
    if not found:
        raise WeightsError(f"{folder} has no file of weights ({' or '.join(_WEIGHTS)})")
    return found[0]
