"""Networks from the Hugging Face Hub: weights, and how their images were prepared."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

from resnet_jax.errors import ModelError, WeightsError, importing, reason_of
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.channels import colors_for
from resnet_jax.weights.config_json import CONFIG, PREPROCESSOR, Description, read_description
from resnet_jax.weights.convert import Variables
from resnet_jax.weights.files import load_weights
from resnet_jax.weights.preprocessing import Preprocessing

# The files of weights that a repository may have; the first one is taken.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


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
    use_test_size: bool = False,
    **overrides: Any,
) -> Pretrained:
    """Loads a network from a repository of the Hugging Face Hub, or from a folder like one.

    The repository holds `config.json` as timm or Hugging Face transformers writes it, and
    `model.safetensors` or `pytorch_model.bin`; of transformers also `preprocessor_config.json`.
    Without a network the Hub's local cache is used.

    Args:
      repository: "owner/name" on the Hub, or a folder with those files.
      revision: Branch, tag or commit on the Hub; name a commit to get the same weights for ever.
      reset_head: Leave the head out and initialise a new one; set num_classes with it.
      channels: Adapt the first convolution to images of so many channels, as `from_torch` does;
        mean and std are averaged for one channel, repeated for more than three.
      use_test_size: Take the image size and crop for which timm states its accuracy, where they
        differ from those of training (test_input_size, test_crop_pct).
      **overrides: Fields of `ResNet`, such as num_classes, dtype or output_stride.

    Returns:
      (model, variables, preprocessing).

    Raises:
      WeightsError: The repository is not reachable and not in the cache, is not a network of
        this family, or its weights do not fit.

    Example:
      >>> import tempfile, json, pathlib, jax, jax.numpy as jnp, resnet_jax as rj
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
    found = read_description(folder, use_test_size=use_test_size)
    try:
        model = create_model(found.name, **{**found.fields, **overrides})
    except ModelError as error:
        raise WeightsError(f"{repository}: {error}") from error
    variables = load_weights(model, _weights(folder), reset_head=reset_head, channels=channels)
    preprocessing = found.preprocessing
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
      Such as "resnet50"; where the repository holds a variant of a registered network, the one
      that is nearest.

    Raises:
      WeightsError: As `load_pretrained` raises it.

    Example:
      >>> import json, pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = pathlib.Path(folder, "config.json").write_text('{"architecture": "resnet20"}')
      ...     pretrained_name(folder)
      'resnet20'
    """
    return _description(repository, revision).name


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
    return _description(repository, revision).labels


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
    return _description(repository, revision).threshold


def _description(repository: str | os.PathLike[str], revision: str | None) -> Description:
    return read_description(_folder(repository, revision))


def _folder(repository: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder on this machine that holds the repository's files."""
    local = Path(os.path.expanduser(repository))
    if local.is_dir():
        return local
    if local.is_file():
        raise WeightsError(
            f"{repository} is a file, not a folder: read it with rj.load_weights(model, path), or "
            "rj.Classifier.load(path)"
        )
    with importing(
        f"{repository}: there is no such file or folder here; as a name on the Hub it", WeightsError
    ):
        import huggingface_hub as hub

    def download(*files: str, revision: str | None) -> Path:
        return Path(
            hub.snapshot_download(os.fspath(repository), revision=revision, allow_patterns=[*files])
        )

    try:
        # One call for all files, so that they are of one commit; a second one of that commit for
        # weights that most repositories have beside the first kind.
        folder = download(CONFIG, PREPROCESSOR, _WEIGHTS[0], revision=revision)
        if not (folder / _WEIGHTS[0]).exists() and (folder / CONFIG).exists():
            folder = download(*_WEIGHTS[1:], revision=folder.name)
        return folder
    except (OSError, ValueError, hub.errors.EntryNotFoundError) as error:
        raise WeightsError(
            f"{repository} (revision {revision or 'main'}) can be had neither from the Hub nor "
            f"from the local cache, nor is it a folder here ({reason_of(error)})"
        ) from error


def _weights(folder: Path) -> Path:
    there = [folder / name for name in _WEIGHTS if (folder / name).exists()]
    if not there:
        raise WeightsError(f"{folder} has no file of weights ({' or '.join(_WEIGHTS)})")
    return there[0]
