"""What a run is: typed fields with their units, and how they are written down.

What the fields may be is in rules.py.
"""

# No `from __future__ import annotations`: the flags library reads the types of the fields.

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, Optional

from resnet_jax.compile_cache import FOLDER
from resnet_jax.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("default", "high", "highest")
BN_SYNC = ("none", "all", "group")
CROPS = ("center", "random_resized", "scale_jitter")
EVAL_CROPS = ("center", "squash")
INTERPOLATIONS = ("bilinear", "bicubic")
OPTIMIZERS = ("sgd", "lars", "lamb", "adamw")
DECAYS = ("l2", "decoupled")
SCHEDULES = ("constant", "step", "cosine", "linear", "one_cycle", "plateau")
LOSSES = ("softmax", "bce", "focal")
SAMPLERS = ("shuffled", "balanced")
DATA_NAMES = "digits, tfds:NAME[:VERSION], folder:PATH, csv:FILE or jsonl:FILE"
DATA_PLACES = ("folder", "csv", "jsonl")  # kinds of data that are named by a path
# DATA:SPLIT, as in evaluate.also; a slice of the split may have a colon, as "test[:10%]" does.
DATA_SPLIT = re.compile(r"(?P<data>.+):(?P<split>([^:\[\]]|\[[^\]]*\])+)")
# Measures by which one state is better than another; of a loss the least is the best.
MULTI_LABEL_MEASURES = ("map", "f1")
MEASURES = ("top1", "top5", "loss", *MULTI_LABEL_MEASURES)


@dataclasses.dataclass
class Model:
    """The network.

    Args:
      name: One of `resnet_jax.list_models()`; "": that of the weights in checkpoint.init_from. With
        these, data.image_size, interpolation and eval_crop and augment.mean and std may be empty
        (0, "", ()) too, and are then as the weights need them; so are data.channels, eval_size and
        eval_resize at 0.
      num_classes: Classes of the head; 0: as many as the data set has.
      dtype: Type of the computation: float32, bfloat16 or float16 (with a loss scale).
      precision: How float32 numbers are multiplied: "default" (rounded to bfloat16 on a TPU and to
        TF32 on recent GPUs), "high", or "highest" (in float32 everywhere); docs/precision.md.
      shortcut: A, B, C, D or none; unset: as registered under the name.
      stride_in_1x1: Bottlenecks as in the paper (v1) instead of v1.5.
      zero_init_residual: Residual functions start at 0 (Goyal et al. 2017, section 5.1).
      bn_momentum: Share of the old running statistics kept each step.
      bn_sync: Devices that share batch statistics: "none", "all", or a "group".
      bn_group_size: Devices in a group, for bn_sync = "group".
      stochastic_depth_rate: Drop rate of the last block's residual.
      dropout_rate: Drop rate of the pooled features.
      remat: Recompute each block in the backward pass, to save memory.
    """

    name: str = "resnet20"
    num_classes: int = 0
    dtype: str = "float32"
    precision: str = "default"
    shortcut: Optional[str] = None  # noqa: UP045 (the flags library reads Optional only)
    stride_in_1x1: bool = False
    zero_init_residual: bool = False
    bn_momentum: float = 0.9
    bn_sync: str = "none"
    bn_group_size: int = 0
    stochastic_depth_rate: float = 0.0
    dropout_rate: float = 0.0
    remat: bool = False


@dataclasses.dataclass
class Data:
    """Images and labels, and what the host does with them.

    Args:
      name: "digits", "tfds:NAME[:VERSION]", "folder:PATH" with SPLIT/CLASS/image files, or
        "csv:FILE" or "jsonl:FILE" with a path and labels a line.
      data_dir: Where TFDS keeps its data sets; "": TFDS's own default.
      train_split: Trained on; a split or parts of splits, such as "train[:90%]".
      eval_split: Evaluated on.
      multi_label: Images have none, one or several labels each; docs/multi_label.md.
      label_separator: Between the labels of an image in a CSV file.
      allow_missing_classes: Accept folders and lists without images of some classes.
      sampler: "shuffled": each image once an epoch; "balanced": each class equally often, in
        epochs of the same length (docs/imbalance.md).
      channels: 1 (grey) or 3 (color), to which images are converted; any other number is that of
        the images, such as 4 to keep the transparency of RGBA; 0: as the data set has.
      image_size: Side of the training images in pixels.
      crop: "center" (resize the shorter side, cut the centre), "random_resized" (Szegedy et al.
        2015) or "scale_jitter" (He et al. 2015, section 3.4).
      crop_area: Least and largest share of the image in a random resized crop.
      crop_ratio: Least and largest width / height of a random resized crop.
      jitter_sides: Least and largest shorter side in pixels for the scale jitter.
      interpolation: "bilinear" or "bicubic".
      eval_size: Side of the evaluated images in pixels; 0: image_size.
      eval_resize: Shorter side in pixels before the centre crop of evaluation, or both sides with
        eval_crop "squash"; 0: eval_size.
      eval_crop: How evaluation makes an image square: "center" resizes the shorter side; "squash"
        both sides, without regard to proportions. Then the center of eval_size is cut out.
      upright: Turn images as their EXIF orientation says, in training and evaluation.
      memory_gib: Data sets whose crops do not vary stay in memory up to this size in GiB.
      workers: Processes that read and decode; 0: threads of this process only.
      threads: Reading threads of each process.
      prefetch: Batches made ahead.
      max_corrupt: Undecodable images that are skipped before a run stops.
      repeats: Times each image appears in a batch, differently augmented (Hoffer et al. 2020).
    """

    name: str = "digits"
    data_dir: str = ""
    train_split: str = "train"
    eval_split: str = "test"
    multi_label: bool = False
    label_separator: str = "|"
    allow_missing_classes: bool = False
    sampler: str = "shuffled"
    channels: int = 0
    image_size: int = 32
    crop: str = "center"
    crop_area: tuple[float, ...] = (0.08, 1.0)
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    jitter_sides: tuple[int, ...] = (256, 480)
    interpolation: str = "bilinear"
    eval_size: int = 0
    eval_resize: int = 0
    eval_crop: str = "center"
    upright: bool = False
    memory_gib: float = 2.0
    workers: int = 0
    threads: int = 8
    prefetch: int = 4
    max_corrupt: int = 10
    repeats: int = 1


@dataclasses.dataclass
class Augment:
    """What the device does with uint8 training images, in this order.

    Args:
      flip: Mirror half of the images.
      flip_alternates: Mirror every image in every other epoch instead, half of them first in the
        first (Jordan 2024, section 3.6).
      pad: Border in pixels, in the mean colour, of which a random crop drops as much again.
      rotate: Largest rotation in degrees, either way.
      trivial: TrivialAugment wide (Müller & Hutter 2021).
      rand_layers: Operations of RandAugment (Cubuk et al. 2020); 0: none.
      rand_magnitude: Its magnitude, 0 to 10.
      rand_magnitude_std: Standard deviation of the magnitude from image to image.
      brightness: Factor in [1 - x, 1 + x].
      contrast: Factor in [1 - x, 1 + x].
      saturation: Factor in [1 - x, 1 + x]. This, hue and pca need images in color.
      hue: Shift in [-x, x] of the colour circle, at most 0.5.
      pca: Standard deviation of AlexNet's colour shift (0.1 in He et al. 2015).
      erase: Probability of random erasing, by the mean colour (Zhong et al. 2020).
      cutout: Side in pixels of the square of mean colour (DeVries & Taylor 2017).
      mixup: alpha of mixup's Beta(alpha, alpha) (Zhang et al. 2018); 0: none.
      cutmix: alpha of CutMix (Yun et al. 2019); 0: none. With both, each pair
        draws one. Mixing needs an even number of images on each device.
      mean: Subtracted from each channel, in units of 1 (255 in a uint8 image); one number, or one
        for each channel.
      std: Divides each channel, in units of 1; as many numbers as mean.
    """

    flip: bool = False
    flip_alternates: bool = False
    pad: int = 0
    rotate: float = 0.0
    trivial: bool = False
    rand_layers: int = 0
    rand_magnitude: float = 9.0
    rand_magnitude_std: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    pca: float = 0.0
    erase: float = 0.0
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)


@dataclasses.dataclass
class Optimizer:
    """How gradients become updates.

    Args:
      name: sgd, lars, lamb or adamw.
      learning_rate: Peak learning rate, for `base_batch` images a step where that is given.
      base_batch: The learning rate is multiplied by batch_size / base_batch (256 in Goyal et al.
        2017); 0: it stands as it is.
      momentum: Of sgd and lars.
      nesterov: Nesterov's momentum, for sgd and lars.
      beta1: Of lamb and adamw.
      beta2: Of lamb and adamw.
      epsilon: Of lamb and adamw.
      trust_coefficient: Of lars.
      weight_decay: Coefficient of the decay.
      decay: "l2": part of the gradient; "decoupled": beside it, times the learning rate (lamb
        and adamw always).
      decay_norms_and_biases: Decay them too, as the paper does.
      clip_norm: Largest global norm of the gradient; 0: no limit.
      backbone_rate: Learning rate of everything but the head, as a share of the head's; 0
        freezes the backbone, its batch statistics included.
    """

    name: str = "sgd"
    learning_rate: float = 0.1
    base_batch: int = 0
    momentum: float = 0.9
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    trust_coefficient: float = 0.001
    weight_decay: float = 1e-4
    decay: str = "l2"
    decay_norms_and_biases: bool = False
    clip_norm: float = 0.0
    backbone_rate: float = 1.0


@dataclasses.dataclass
class Schedule:
    """The learning rate over a run.

    Args:
      name: constant, step, cosine, linear, one_cycle or plateau.
      warmup_epochs: Epochs of linear warm-up (one_cycle: of its rising part), in whole steps.
      warmup_start: Where the warm-up starts, as a share of the peak. A warm-up of W steps starts
        at 1 / (W + 1) at least, so that its first step trains.
      boundaries: Shares of the run, in (0, 1), after which a step schedule drops; in a warm-up too.
      factor: What a drop multiplies the learning rate by (step, plateau).
      final: Where cosine, linear and one_cycle end, as a share of the peak.
      patience: Epochs without a better training loss before a plateau schedule drops.
    """

    name: str = "cosine"
    warmup_epochs: float = 0.0
    warmup_start: float = 0.0
    boundaries: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    final: float = 0.0
    patience: int = 5


@dataclasses.dataclass
class Loss:
    """What is minimised.

    Args:
      name: "softmax" cross-entropy; "bce": a binary cross-entropy for each class; or "focal": the
        same times (1 - p)^gamma, p being the probability of the right answer (Lin et al. 2017).
      label_smoothing: Share of the label spread over all classes; with data.multi_label, over
        "yes" and "no" of each class.
      bce_threshold: For bce and focal: targets above it count as 1, others as 0; 0: targets as
        they are.
      focal_gamma: For focal: the exponent of 1 - p; with 0 it is bce.
      class_weights: Factors of the loss of each class's images: "balanced": N / (K n) for the n
        images of a class, of N images in K classes, which is 1 on average over the images; or
        numbers that are taken as they are, "1,2.5,1", in the order of classes.json; "": none.
        docs/imbalance.md says which terms of each loss they multiply.
    """

    name: str = "softmax"
    label_smoothing: float = 0.0
    bce_threshold: float = 0.0
    focal_gamma: float = 2.0
    class_weights: str = ""


@dataclasses.dataclass
class Train:
    """Length and size of the run.

    Args:
      epochs: Passes over the training images; may be a fraction.
      steps: Optimizer steps; 0: they follow from epochs.
      batch_size: Images an optimizer step, on all devices together.
      accumulate: Parts in which a device takes its share of a batch, to save memory.
      steps_per_call: Steps in one call of the compiled program. With more than 1 the data set
        lies on the devices, and the host only says which images make a batch: for small images,
        whose steps are shorter than the host's work for them. Another number is another program,
        which rounds differently: a run keeps it, unless checkpoint.allow_change is set.
      seed: Of initial parameters, order, crops and augmentation.
      ema_decay: Share that the moving average of parameters and statistics keeps at an update; 0:
        no average. It is over about ema_every / (1 - ema_decay) steps, and the initial weights are
        no part of it. (torchvision's --model-ema-decay is another number: an update there keeps
        1 - (1 - DECAY) * batch * every / epochs.)
      ema_every: Steps between its updates.
      early_stopping: Evaluations in a row without an improvement of checkpoint.best_metric after
        which the run ends; 0: it takes all its steps. The learning rate schedule stays that of all
        steps. A greater number lets a run that has ended go on.
      min_improvement: Change of the metric since the last improvement that has to be exceeded to
        count as an improvement.
      max_skipped: Steps in a row that are skipped, because loss, gradients or what would come of
        them are not finite, before the run ends as diverged.
    """

    epochs: float = 10.0
    steps: int = 0
    batch_size: int = 128
    accumulate: int = 1
    steps_per_call: int = 1
    seed: int = 0
    ema_decay: float = 0.0
    ema_every: int = 1
    early_stopping: int = 0
    min_improvement: float = 0.0
    max_skipped: int = 20


@dataclasses.dataclass
class Evaluate:
    """Evaluation while training.

    Args:
      every_epochs: Epochs between evaluations; the end is always evaluated.
      batch_size: Images a step, on all devices together; 0: that of training.
      flip: Average the logits of each image and its mirror image.
      threshold: Probability from which a class is predicted, with data.multi_label.
      also: Further held-out data, evaluated with every evaluation, each as DATA:SPLIT with DATA as
        in data.name, such as "tfds:imagenet_v2/matched-frequency:test". Its records in
        metrics.jsonl have that text as `split`; it has no part in the choice of the best state or
        in early stopping. It may change from one start to the next.
    """

    every_epochs: float = 1.0
    batch_size: int = 0
    flip: bool = False
    threshold: float = 0.5
    also: tuple[str, ...] = ()


@dataclasses.dataclass
class Checkpoint:
    """What is kept, and what a run starts from.

    Args:
      every_steps: Steps between checkpoints, beside those at each evaluation; 0: only those.
      keep: Newest checkpoints kept.
      keep_best: Best checkpoints kept beside them.
      best_metric: Metric of the evaluations that the best ones are chosen by: top1, top5, map or
        f1 (the highest), or loss (the lowest); map and f1 need data.multi_label. Of a run with a
        moving average it is the average's. It may change from one start to the next.
      init_from: Weight file, workdir or Hub name ("timm/resnet50.a1_in1k") of the initial
        parameters; "": random ones.
      reset_head: Start with a new head, for other classes than those of init_from; unset: where
        its head has another number of classes, or is known to have others.
      allow_change: Resume although the configuration differs from the workdir's.
      copy_to: A bucket ("gs://BUCKET/RUN"; needs gcsfs) or any other place that fsspec opens, where
        states and records are copied after each save. A start first takes from there what the
        workdir lacks, such as newer states; "": none.
    """

    every_steps: int = 0
    keep: int = 1
    keep_best: int = 1
    best_metric: str = "top1"
    init_from: str = ""
    reset_head: Optional[bool] = False  # noqa: UP045 (the flags library reads Optional only)
    allow_change: bool = False
    copy_to: str = ""


@dataclasses.dataclass
class Log:
    """What a run tells.

    Args:
      every_steps: Steps between training records; each is the mean since the last.
      tensorboard: Write event files too.
      wandb: Project on Weights & Biases; "": none.
      profile: "FIRST:LAST" steps to trace with jax.profiler; "": none.
      compile_cache: Folder that keeps compiled programs for the next start, at most 2 GB; "": none.
        JAX_COMPILATION_CACHE_DIR, where it is set, is used instead.
      report: Write report.html at the end of `train.py`, where matplotlib and Jinja2 are installed.
    """

    every_steps: int = 50
    tensorboard: bool = True
    wandb: str = ""
    profile: str = ""
    compile_cache: str = FOLDER
    report: bool = True


@dataclasses.dataclass
class Config:
    """A whole run; `configs/` holds recipes that return one.

    Example:
      >>> config = Config(train=Train(epochs=5.0))
      >>> config.optimizer.learning_rate
      0.1
    """

    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    augment: Augment = dataclasses.field(default_factory=Augment)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    loss: Loss = dataclasses.field(default_factory=Loss)
    train: Train = dataclasses.field(default_factory=Train)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    log: Log = dataclasses.field(default_factory=Log)


def check(config: Config) -> None:
    """Checks every field, without touching devices or data.

    Args:
      config: The configuration of a run.

    Raises:
      ConfigError: Lists every fault: field, value and what is allowed.

    Example:
      >>> check(Config(train=Train(batch_size=0)))
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: train.batch_size = 0: must be 1 or more, up to 16,777,216
    """
    from resnet_jax.config.validation import find_faults  # which is about the fields above

    if faults := find_faults(config):
        raise ConfigError("; ".join(faults))


def check_types(config: Config) -> None:
    """Checks that each field has a value of its type, before anything is made of it.

    Args:
      config: The configuration of a run.

    Raises:
      ConfigError: Lists every field that has not.

    Example:
      >>> check_types(Config(train=Train(batch_size="64")))
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: train.batch_size = '64': must be of type int
    """
    from resnet_jax.config.validation import find_type_faults

    if faults := [*find_type_faults(config)]:
        raise ConfigError("; ".join(faults))


def registered_overrides(model: Model) -> dict[str, Any]:
    """The fields that `resnet_jax.ResNet` has under the same names, as far as they are set."""
    overrides = dataclasses.asdict(model)
    for name in ("name", "num_classes", "dtype", "bn_sync", "bn_group_size"):
        del overrides[name]
    if overrides["shortcut"] is None:
        del overrides["shortcut"]
    if overrides["precision"] == "default":  # JAX's own, which may be set for the whole process
        del overrides["precision"]
    return overrides


def given_weights(text: str) -> tuple[float, ...]:
    """ "1,2.5" -> (1.0, 2.5): given class weights; () where the text says something else."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        return ()


def profile_steps(text: str) -> tuple[int, int] | None:
    """ "10:15" -> (10, 15): the steps of a trace; None where the text says something else."""
    first, _, last = text.partition(":")
    if len(text) > 40 or not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        return None
    return int(first), int(last)


def to_flat(config: Config) -> dict[str, Any]:
    """The fields by their dotted names.

    Args:
      config: The configuration of a run.

    Returns:
      Such as {"model.name": "resnet20", ...}.

    Example:
      >>> to_flat(Config())["train.batch_size"]
      128
    """
    return {
        f"{part.name}.{field.name}": getattr(getattr(config, part.name), field.name)
        for part in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, part.name))
    }


def to_json(config: Config) -> str:
    """The configuration as readable JSON.

    Args:
      config: The configuration of a run.

    Returns:
      A JSON object of objects, one field a line.

    Example:
      >>> json.loads(to_json(Config()))["data"]["name"]
      'digits'
    """
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The configuration that `to_json` wrote.

    Args:
      text: A config.json; fields that it lacks, of an older version, keep their defaults.

    Returns:
      The configuration; not checked.

    Raises:
      ConfigError: It is no JSON, or names fields that do not exist.

    Example:
      >>> from_json(to_json(Config(train=Train(seed=3)))).train.seed
      3
    """
    try:
        stored = json.loads(text)
        fields = {f"{name}.{k}": v for name, part in stored.items() for k, v in part.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"config.json is not as a run writes it ({error}); restore it") from error
    config = Config()
    if unknown := sorted(fields.keys() - to_flat(config).keys()):
        raise ConfigError(f"config.json has fields that this version lacks: {', '.join(unknown)}")
    for name, value in fields.items():
        section, _, field = name.partition(".")
        value = tuple(value) if isinstance(value, list) else value
        setattr(getattr(config, section), field, value)
    return config


def differences(config: Config, stored: dict[str, Any]) -> list[str]:
    """Fields in which a stored configuration differs, leaving aside what changes no result.

    Args:
      config: The configuration of a run.
      stored: What `to_json` wrote for an earlier one, parsed; a field that a section lacks, of an
        older version, has its default.

    Returns:
      One "field: stored -> now" each, in the order of the fields.

    Example:
      >>> stored = json.loads(to_json(Config()))
      >>> differences(Config(train=Train(seed=1)), stored)
      ['train.seed: 0 -> 1']
    """
    found, defaults = [], json_fields(Config())
    for name, value in json_fields(config).items():
        section, _, field = name.partition(".")
        part = stored.get(section)
        before = part.get(field, defaults[name]) if isinstance(part, dict) else None
        is_free = section == "log" or name in _FREE or _is_same_place(name, before, value)
        if before != value and not is_free:
            found.append(f"{name}: {before!r} -> {value!r}")
    return found


def _is_same_place(field: str, before: Any, now: Any) -> bool:
    """Whether two values name one place in two ways, or places whose contents are compared.

    A folder or list of images may have moved: its fingerprint tells whether it is the same.
    """
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    if field == "data.name":
        kind = before.partition(":")[0]
        return kind in DATA_PLACES and kind == now.partition(":")[0]
    return field == "checkpoint.init_from" and place(before) == place(now)


def place(path: str) -> str:
    """A path as it is from any folder; what is not there may be another kind of name, and stays."""
    try:
        found = Path(path).expanduser()
    except RuntimeError:  # ~ without a home
        return path
    return os.path.realpath(found) if path and found.exists() else path


def data_place(name: str) -> str:
    """The `data.name` of the same data, right from any folder.

    Args:
      name: As in `data.name`.

    Returns:
      With an absolute path, if it has one.

    Example:
      >>> data_place("folder:..") != "folder:..", data_place("tfds:mnist")
      (True, 'tfds:mnist')
    """
    kind, _, path = name.partition(":")
    return f"{kind}:{place(path)}" if kind in DATA_PLACES else name


def with_places(config: Config) -> Config:
    """The configuration with paths that are right from any folder.

    Args:
      config: The configuration of a run.

    Returns:
      A copy.

    Example:
      >>> with_places(Config(data=Data(name="folder:.."))).data.name != "folder:.."
      True
    """
    data, checkpoint = config.data, config.checkpoint
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, name=data_place(data.name), data_dir=place(data.data_dir)),
        checkpoint=dataclasses.replace(checkpoint, init_from=place(checkpoint.init_from)),
    )


# How fast batches come, where data lies and what is kept may change from one start to the next.
_FREE = {
    "data.data_dir",
    "data.memory_gib",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.max_corrupt",
    "train.early_stopping",
    "train.min_improvement",
    "train.max_skipped",
    "evaluate.batch_size",
    "evaluate.also",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_best",
    "checkpoint.best_metric",
    "checkpoint.allow_change",
    "checkpoint.copy_to",
}


def json_fields(config: Config) -> dict[str, Any]:
    """`to_flat` with the values as JSON gives them back (lists for tuples)."""
    return {name: json.loads(json.dumps(value)) for name, value in to_flat(config).items()}
