"""`Network`: a trained model together with the facts that its use depends on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from resnet_jax.config.schema import DATA_NAMES, DATA_PLACES, Config, Data
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.errors import ConfigError
from resnet_jax.models.folding import fold_batch_norm
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.convert import Variables
from resnet_jax.weights.description import MULTI_LABEL


@dataclasses.dataclass(frozen=True)
class Network:
    """A model, its variables, and the facts of its training that its use depends on.

    Args:
      source: What it was opened from, for messages.
      name: Registered name, such as "resnet50".
      model: The module.
      variables: {"params", "batch_stats"}.
      preprocessing: How images become its input.
      channels: Number of image channels: 1 (grayscale), 3 (color), or another.
      class_names: The name of each output. Where the source has no names: ImageNet's for 1,000
        classes, else "0", "1", ...
      config: Configuration of the run that trained it; None for a network from elsewhere.
      step: Completed steps of that run's state; None for a network from elsewhere.
      ema: Whether the variables are the moving average of that state.
      own: Whether this user's trainer wrote `config`, so that its data can be opened.
      multi_label: Trained for images with none, one or several labels: a class's probability is
        the sigmoid of its logit instead of the softmax.
      threshold: Probability from which a multi-label network predicts a class.
      upright: Whether to rotate images by their EXIF orientation. Default: predictions do, and
        evaluation follows the run's data.upright.
      named: Whether `class_names` come from the run, the repository on the Hub, or the user.
      assumed: Facts that the source does not say and that were assumed, one sentence each.
      usual: Whose mean and std were assumed: "ImageNet's"; "" where they are known.
    """

    source: str
    name: str
    model: ResNet
    variables: Variables = dataclasses.field(repr=False)
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

    def folded(self) -> Network:
        """The network with its batch norms folded: the same outputs up to rounding, faster."""
        model, variables = fold_batch_norm(self.model, self.variables)
        return dataclasses.replace(self, model=model, variables=variables)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities of the classes for logits [..., classes]: the softmax, or the sigmoid."""
        return sigmoid(logits) if self.multi_label else softmax(logits)

    @property
    def problem(self) -> dict[str, Any]:
        """Entries of a description of the network that concern its outputs; {} for the softmax."""
        if not self.multi_label:
            return {}
        return {"problem_type": MULTI_LABEL, "threshold": self.threshold}


def require_head(network: Network, purpose: str) -> None:
    """Raises ConfigError for a network without a head; `purpose` is what needs classes."""
    if not network.model.num_classes:
        raise ConfigError(
            f"{network.source}: the network has no head of one linear layer, which {purpose} "
            "needs; `features` writes what it computes of images, and fine-tuning "
            "(configs/finetune.py) gives it a head"
        )


def evaluated_data(network: Network) -> Data:
    """The `data` section of the run that trained the network, to be read again.

    Raises:
      ConfigError: The network is not from a run, or somebody else wrote the section and it names
        a path, which may be any folder.
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


def softmax(logits: np.ndarray) -> np.ndarray:
    """The softmax over the last axis, in the logits' type."""
    # NumPy computes row by row; a compiled one could round differently in another batch size.
    with np.errstate(over="ignore"):  # for finite logits further apart than float32 reaches
        powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """The logistic function of each logit, without overflow.

    Example:
      >>> sigmoid(np.array([-1000.0, 0.0, 1000.0])).tolist()
      [0.0, 0.5, 1.0]
    """
    small = np.exp(-np.abs(logits))  # the lesser outcome's probability relative to the greater's
    return np.where(logits >= 0, 1, small) / (1 + small)


def is_predicted(logits: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the sigmoid of each logit reaches a threshold in (0, 1).

    Example:
      >>> is_predicted(np.array([-0.1, 0.0, 2.0]), 0.5).tolist()
      [False, True, True]
    """
    return logits >= math.log(threshold / (1 - threshold))
