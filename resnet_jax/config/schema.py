"""The configuration of a run: typed fields with their units and defaults.

validation.py checks the values; serialization.py reads and writes them.
"""

# No `from __future__ import annotations`: the flags library reads the types of the fields.

import dataclasses
import re
from typing import Optional

from resnet_jax.compile_cache import FOLDER

DTYPES = ("float32", "bfloat16", "float16")
SHORTCUTS = ("A", "B", "C", "D", "none")
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
# Metrics that rank states; of a loss the lowest is the best.
MULTI_LABEL_MEASURES = ("map", "f1")
MEASURES = ("top1", "top5", "loss", *MULTI_LABEL_MEASURES)


@dataclasses.dataclass
class Model:
    """The network.

    Args:
      name: One of `resnet_jax.list_models()`; "": the network of the weights in
        checkpoint.init_from. In that case data.image_size, interpolation and eval_crop and
        augment.mean and std may also be empty (0, "", ()) and take the values of the weights, as do
        data.channels, eval_size and eval_resize at 0.
      num_classes: Number of classes of the head; 0: as many as the dataset has.
      dtype: Type of the computation: float32, bfloat16 or float16 (with loss scaling).
      precision: Precision of float32 products: "default" (rounded to bfloat16 on TPUs and to TF32
        on recent GPUs), "high", or "highest" (float32 everywhere); see docs/precision.md.
      shortcut: A, B, C, D or none; unset: the shortcut that the name is registered with.
      stride_in_1x1: Put the stride of a bottleneck on its first 1x1 convolution, as in the paper
        (v1), instead of on the 3x3 (v1.5).
      zero_init_residual: Initialize residual functions to 0 (Goyal et al. 2017, section 5.1).
      bn_momentum: Fraction of the old running statistics that each step keeps.
      bn_sync: Devices that share batch statistics: "none", "all", or a "group".
      bn_group_size: Number of devices in a group, for bn_sync = "group".
      stochastic_depth_rate: Drop rate of the last block's residual; earlier blocks have
        proportionally lower rates.
      dropout_rate: Drop rate of the pooled features.
      remat: Recompute each block in the backward pass to save memory.
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
    """Images and labels, and their processing on the host.

    Args:
      name: "digits", "tfds:NAME[:VERSION]", "folder:PATH" with SPLIT/CLASS/image files, or
        "csv:FILE" or "jsonl:FILE" with a path and labels on each line.
      data_dir: Folder of TFDS's datasets; "": TFDS's own default.
      train_split: Split to train on, or parts of splits, such as "train[:90%]".
      eval_split: Split to evaluate, or parts of splits.
      multi_label: Each image has any number of labels, also none; see docs/multi_label.md.
      label_separator: Text between the labels of an image in a CSV file.
      allow_missing_classes: Accept folders and lists that have no images of some classes.
      sampler: "shuffled": each image once an epoch; "balanced": each class equally often, in
        epochs of the same length (docs/imbalance.md).
      channels: Number of channels. Images are converted to 1 (gray) or 3 (color); any other number
        must be that of the images, such as 4 to keep the transparency of RGBA; 0: as many as the
        dataset has.
      image_size: Side of the training images in pixels.
      crop: "center" (resize the shorter side, crop the center), "random_resized" (Szegedy et al.
        2015) or "scale_jitter" (He et al. 2015, section 3.4).
      crop_area: Minimum and maximum fraction of the image's area in a random resized crop.
      crop_ratio: Minimum and maximum aspect ratio (width / height) of a random resized crop.
      jitter_sides: Minimum and maximum shorter side in pixels for scale jitter.
      interpolation: "bilinear" or "bicubic".
      eval_size: Side of the evaluated images in pixels; 0: image_size.
      eval_resize: Shorter side in pixels before evaluation crops the center, or both sides with
        eval_crop = "squash"; 0: eval_size.
      eval_crop: How evaluation makes an image square: "center" resizes the shorter side, "squash"
        resizes both sides and ignores the aspect ratio. Then the center of eval_size is cropped.
      upright: Rotate images as their EXIF orientation says, in training and evaluation.
      memory_gib: Largest dataset in GiB that is kept in memory, if its crops do not vary.
      workers: Number of processes that read and decode; 0: threads of this process only.
      threads: Number of reading threads of each process.
      prefetch: Number of batches to prepare ahead.
      max_corrupt: Number of undecodable images to skip before the run stops.
      repeats: How often each image appears in a batch, each time with another augmentation (Hoffer
        et al. 2020).
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
    """Augmentation of uint8 training images on the device, in this order.

    Args:
      flip: Mirror half of the images.
      flip_alternates: Mirror every image in every other epoch instead; half of them start in the
        first (Jordan 2024, section 3.6).
      pad: Pixels of the mean color to add on each side before a random crop to the original size.
      rotate: Largest rotation in degrees, in either direction.
      trivial: Apply TrivialAugment wide (Müller & Hutter 2021).
      rand_layers: Number of RandAugment operations (Cubuk et al. 2020); 0: none.
      rand_magnitude: Magnitude of RandAugment, 0 to 10.
      rand_magnitude_std: Standard deviation of the magnitude from image to image.
      brightness: x of a random factor in [1 - x, 1 + x].
      contrast: x of a random factor in [1 - x, 1 + x].
      saturation: x of a random factor in [1 - x, 1 + x]. Saturation, hue and pca need color images.
      hue: x of a random shift in [-x, x] of the hue circle, at most 0.5.
      pca: Standard deviation of AlexNet's color shift (0.1 in He et al. 2015).
      erase: Probability of random erasing with the mean color (Zhong et al. 2020).
      cutout: Side in pixels of a square of the mean color (DeVries & Taylor 2017); 0: none.
      mixup: alpha of mixup's Beta(alpha, alpha) (Zhang et al. 2018); 0: none.
      cutmix: alpha of CutMix (Yun et al. 2019); 0: none. If both are set, each pair of images uses
        one of them. Mixing needs an even number of images on each device.
      mean: Mean to subtract from each channel, in units of 1 (255 in a uint8 image); one number, or
        one for each channel.
      std: Standard deviation to divide each channel by, in units of 1; as many numbers as mean.
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
    """The optimizer.

    Args:
      name: sgd, lars, lamb or adamw.
      learning_rate: Peak learning rate; with base_batch, the rate for that many images a step.
      base_batch: Batch size that learning_rate is for: it is multiplied by train.batch_size /
        base_batch (256 in Goyal et al. 2017); 0: the rate is used as it is.
      momentum: Momentum of sgd and lars.
      nesterov: Use Nesterov momentum in sgd and lars.
      beta1: Decay of the first moment in lamb and adamw.
      beta2: Decay of the second moment in lamb and adamw.
      epsilon: Added to the denominator in lamb and adamw.
      trust_coefficient: Trust coefficient of lars.
      weight_decay: Coefficient of weight decay.
      decay: "l2" adds the decay to the gradient; "decoupled" subtracts it from the parameters,
        times the learning rate (lamb and adamw always do).
      decay_norms_and_biases: Also decay the parameters of norms and biases, as the paper does.
      clip_norm: Largest global norm of the gradient; 0: no clipping.
      backbone_rate: Learning rate of all layers but the head, as a fraction of the head's; 0
        freezes the backbone, including its batch statistics.
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
    """The learning rate schedule.

    Args:
      name: constant, step, cosine, linear, one_cycle or plateau.
      warmup_epochs: Epochs of linear warm-up, rounded to whole steps; for one_cycle, of its rising
        part.
      warmup_start: Learning rate at the start of the warm-up, as a fraction of the peak. A warm-up
        of W steps starts at 1 / (W + 1) or more, so that its first step trains.
      boundaries: Fractions of the run, in (0, 1), after which a step schedule drops, also during a
        warm-up.
      factor: Factor of the learning rate at each drop (step, plateau).
      final: Learning rate at the end of cosine, linear and one_cycle, as a fraction of the peak.
      patience: Epochs without a lower training loss before a plateau schedule drops.
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
    """The loss function.

    Args:
      name: "softmax": softmax cross-entropy; "bce": binary cross-entropy of each class; "focal":
        bce times (1 - p)^gamma, where p is the probability of the correct answer (Lin et al. 2017).
      label_smoothing: Fraction of the label that is spread over all classes; with data.multi_label,
        over "yes" and "no" of each class.
      bce_threshold: For bce and focal: targets above it become 1, others 0; 0: keep the targets.
      focal_gamma: For focal: the exponent of 1 - p; 0 makes it bce.
      class_weights: Factors of the loss by class. "balanced": N / (K n) for a class with n of the N
        images in K classes, which averages to 1 over the images; or numbers in the order of
        classes.json, such as "1,2.5,1", which are used as they are; "": none. docs/imbalance.md
        says which terms of each loss they multiply.
    """

    name: str = "softmax"
    label_smoothing: float = 0.0
    bce_threshold: float = 0.0
    focal_gamma: float = 2.0
    class_weights: str = ""


@dataclasses.dataclass
class Train:
    """Length of the run, and what a training step does.

    Args:
      epochs: Passes over the training images; may be a fraction.
      steps: Number of optimizer steps; 0: computed from epochs.
      batch_size: Images of an optimizer step, on all devices together.
      accumulate: Number of parts that each device splits its batch into, to save memory.
      steps_per_call: Training steps in one call of the compiled program. With more than 1, the
        dataset is kept on the devices and the host only selects the images of each batch. This
        speeds up steps on small images that are shorter than the host's work for them. On a GPU,
        convolutions of these programs are in command buffers (CUDA graphs), unless XLA_FLAGS has
        --xla_gpu_enable_command_buffer. The number changes the program and thus rounding: a run
        keeps it, unless checkpoint.allow_change is set.
      seed: Seed of initial parameters, order of images, crops and augmentation.
      ema_decay: Fraction of the moving average of parameters and statistics that an update keeps;
        0: no average. It averages over about ema_every / (1 - ema_decay) steps and excludes the
        initial weights. (torchvision's --model-ema-decay differs: an update there keeps
        1 - (1 - DECAY) * batch * every / epochs.)
      ema_every: Steps between updates of the moving average.
      early_stopping: End the run after this many evaluations in a row without an improvement of
        checkpoint.best_metric; 0: never. The learning rate schedule remains that of all steps. To
        continue a run that has ended this way, set a larger number.
      min_improvement: Smallest change of the metric since the last improvement; only a larger
        change counts as an improvement.
      max_skipped: Number of steps in a row that may be skipped, because the loss, the gradients or
        the update are not finite, before the run ends as diverged.
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
    """Evaluation during training.

    Args:
      every_epochs: Epochs between evaluations; the final state is always evaluated.
      batch_size: Images of an evaluation step, on all devices together; 0: train.batch_size.
      flip: Average the logits of each image and its mirror image.
      threshold: Lowest probability at which a class is predicted, with data.multi_label.
      also: Further held-out data, evaluated with every evaluation, each as DATA:SPLIT with DATA as
        in data.name, such as "tfds:imagenet_v2/matched-frequency:test". Its records in
        metrics.jsonl have that text as `split`. It has no part in the choice of the best state or
        in early stopping, and may change from one start to the next.
    """

    every_epochs: float = 1.0
    batch_size: int = 0
    flip: bool = False
    threshold: float = 0.5
    also: tuple[str, ...] = ()


@dataclasses.dataclass
class Checkpoint:
    """Checkpoints to keep, and the initial weights.

    Args:
      every_steps: Steps between checkpoints, in addition to one at each evaluation; 0: only those.
      keep: Number of newest checkpoints to keep.
      keep_best: Number of best checkpoints to keep in addition.
      best_metric: Evaluation metric that ranks checkpoints: top1, top5, map or f1 (highest is
        best), or loss (lowest is best); map and f1 need data.multi_label. In a run with a moving
        average, the average is ranked. The metric may change when a run is resumed.
      init_from: Weight file, workdir or Hub name ("timm/resnet50.a1_in1k") of the initial
        parameters; "": random initialization.
      reset_head: Start with a new classification head, for other classes than those of init_from;
        unset: only if the head has another number of classes or is known to have other classes.
      allow_change: Resume although the configuration differs from the workdir's.
      copy_to: Bucket ("gs://BUCKET/RUN"; needs gcsfs) or any other address that fsspec opens, to
        copy states and records to after each save. When a run starts, whatever the workdir lacks,
        such as newer states, is first copied back from there; "": no copy.
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
    """What a run logs.

    Args:
      every_steps: Steps between training records; each averages the steps since the last.
      tensorboard: Also write TensorBoard event files.
      wandb: Project on Weights & Biases; "": none.
      profile: Steps to trace with jax.profiler, "FIRST:LAST": those after step FIRST, up to step
        LAST; "": none.
      compile_cache: Folder that keeps compiled programs for the next start, at most 2 GB; "": none.
        If JAX_COMPILATION_CACHE_DIR is set, it is used instead.
      report: Write report.html at the end of training, if matplotlib and Jinja2 are installed.
    """

    every_steps: int = 50
    tensorboard: bool = True
    wandb: str = ""
    profile: str = ""
    compile_cache: str = FOLDER
    report: bool = True


@dataclasses.dataclass
class Config:
    """The configuration of a run; the recipes in `configs/` return one.

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
