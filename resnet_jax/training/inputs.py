"""What a run is given: configuration, data and network, checked before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from resnet_jax.config.model import make_model
from resnet_jax.config.schema import Config
from resnet_jax.config.serialization import to_flat
from resnet_jax.config.validation import check, check_types
from resnet_jax.data.augment.apply import check_channels
from resnet_jax.data.pipeline import fits_memory
from resnet_jax.data.sources import Source, open_split
from resnet_jax.distributed import data_parallel
from resnet_jax.distributed.device_memory import check_batch_memory
from resnet_jax.distributed.process_group import ProcessGroup
from resnet_jax.errors import ConfigError, DataError
from resnet_jax.evaluation.held_out import HeldOutSets
from resnet_jax.evaluation.multi_label import check_scores_memory
from resnet_jax.limits import check_host_memory
from resnet_jax.models.resnet import ResNet
from resnet_jax.training.class_balance import check_class_weights
from resnet_jax.training.init_from import Start, fill_from_weights
from resnet_jax.training.optimizer import RunLength
from resnet_jax.workdirs.environment import compared


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A checked configuration, with its splits ("train" and "eval") and its network."""

    config: Config
    sources: dict[str, Source]
    model: ResNet
    held_out: HeldOutSets = dataclasses.field(default_factory=HeldOutSets)  # of evaluate.also

    @property
    def channels(self) -> int:
        """Channels of the images that the network sees."""
        return channels_of(self.config, self.sources["train"])

    @property
    def length(self) -> RunLength:
        """The number of steps."""
        return RunLength.of(self.config, len(self.sources["train"]))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of the data."""
        return self.sources["train"].class_names

    @property
    def fingerprints(self) -> dict[str, str]:
        """Texts that change when the images of a split do."""
        return {split: source.fingerprint for split, source in self.sources.items()}


def open_inputs(
    config: Config, workdir: Path, group: ProcessGroup, log: Callable[[str], object]
) -> Inputs:
    """Opens the inputs of a run and checks them, in all processes alike.

    Raises:
      ConfigError: The configuration is wrong, does not suit the data, the devices or the memory,
        or differs between processes.
      DataError: A split cannot be used.
    """
    resolved, sources = resolve(config, log, workdir, group)
    inputs = Inputs(resolved, sources, make_model(resolved, sources["train"].num_classes))
    check_batches(resolved)
    check_steps_per_call(resolved, sources["train"])
    check_memory(resolved, inputs.model, inputs.channels, group.count)
    if resolved.data.multi_label:
        what = f"data.eval_split = {resolved.data.eval_split!r}"
        remedy = "evaluate on a part of it, such as 'test[:10%]'"
        check_scores_memory(len(sources["eval"]), inputs.model.num_classes, what, remedy)
    held_out = HeldOutSets.open(resolved, inputs.model, inputs.class_names, inputs.channels, log)
    group.check_equal({**facts(config, sources), **held_out.fingerprints})
    return dataclasses.replace(inputs, held_out=held_out)


def resolve(
    config: Config,
    log: Callable[[str], object],
    workdir: Path | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Config, dict[str, Source]]:
    """Completes a configuration from its initial weights, checks it, and opens its splits."""
    group = group or ProcessGroup()
    check_types(config)
    start = fill_from_weights(config, workdir) if group.is_first else Start(config)
    start = Start.from_json(group.broadcast_object(start.to_json()))
    check(start.config)
    sources = open_sources(start.config)
    start = start.with_head(sources["train"].class_names)
    for line in start.lines if group.is_first else ():
        log(line)
    return start.config, sources


def open_sources(config: Config) -> dict[str, Source]:
    """Opens the training and the evaluation split, {"train", "eval"}, and checks them.

    Raises:
      DataError: A split is missing or empty, or has one class only.
    """
    data = config.data
    train = open_split(data, data.train_split)
    held_out = open_split(data, data.eval_split, classes=train.class_names)
    sources = {"train": train, "eval": held_out}
    for split, source in sources.items():
        if len(source) == 0:
            name = getattr(data, f"{split}_split")
            raise DataError(f"data.{split}_split = {name!r}: holds no image; take another split")
    if held_out.class_names != train.class_names:
        raise DataError(
            f"data.eval_split = {data.eval_split!r}: has other classes than data.train_split = "
            f"{data.train_split!r}"
        )
    check_source(config, train)
    # The training split decides: a split of gray images may belong to a dataset of color images.
    held_out.channels = train.channels
    return sources


def channels_of(config: Config, source: Source) -> int:
    """Channels of the images that the network sees."""
    return config.data.channels or source.channels


def check_source(config: Config, source: Source) -> None:
    """Checks the channels and the classes of the training images."""
    data, classes = config.data, source.num_classes
    check_channels(config.augment, channels_of(config, source))
    if classes < 2:
        raise DataError(f"data.name = {data.name!r}: has {classes} class; two or more are needed")
    if config.model.num_classes and config.model.num_classes < classes:
        raise DataError(
            f"model.num_classes = {config.model.num_classes}: the dataset has {classes} classes; "
            f"take {classes} or more, or 0 to follow the dataset"
        )
    check_class_weights(config.loss, classes)


def check_steps_per_call(config: Config, source: Source) -> None:
    """Checks that a dataset that has to lie on the devices is one that lies in memory."""
    steps = config.train.steps_per_call
    if steps > 1 and not fits_memory(source, config.data, training=True):
        raise ConfigError(
            f"train.steps_per_call = {steps}: needs a dataset that lies in memory, with "
            "data.crop = 'center' and at most data.memory_gib; take 1 for this one"
        )


def check_batches(config: Config, devices: int = 0) -> None:
    """Checks that batches and groups of devices divide evenly. 0 devices: those of JAX."""
    devices = devices or jax.device_count()
    parts = batch_parts(config)
    why = "train.accumulate"
    if parts > config.train.accumulate:
        why += ", and pairs to mix"
    sizes = {"train.batch_size": config.train.batch_size}
    data_parallel.check_divisible(sizes, parts, why, devices)
    group = config.model.bn_group_size
    if group and devices % group:
        raise ConfigError(f"model.bn_group_size = {group}: must divide the {devices} devices")
    if config.evaluate.batch_size:
        sizes = {"evaluate.batch_size": config.evaluate.batch_size}
        data_parallel.check_divisible(sizes, devices=devices)


def batch_parts(config: Config) -> int:
    """The number that each device's part of a batch must be a multiple of."""
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    return config.train.accumulate * (2 if mixes else 1)


def check_memory(config: Config, model: ResNet, channels: int, processes: int = 1) -> None:
    """Checks that a process's part of a batch does not far exceed the memory of its host."""
    data, train = config.data, config.train
    trained, evaluated = train.batch_size, config.evaluate.batch_size or train.batch_size
    name = "evaluate.batch_size" if config.evaluate.batch_size else "train.batch_size"
    keeps = config.optimizer.backbone_rate > 0  # what a backward pass needs
    for field, images, size, training in (
        (f"train.batch_size = {trained}", trained // train.accumulate, data.image_size, keeps),
        (f"{name} = {evaluated}", evaluated, data.eval_size or data.image_size, False),
    ):
        shape = (images // processes, size, size, channels)
        check_batch_memory(model, shape, f"{field} of {size}x{size} pixels", training=training)
    if train.steps_per_call == 1:  # else batches are made on the devices
        ahead = (data.prefetch + 1) * (1 + data.workers)
        what = f"train.batch_size = {trained}, of which {ahead} batches are made ahead"
        batch = trained // processes * data.image_size**2 * channels
        check_host_memory(
            ahead * batch, what, "take a smaller one, or less data.prefetch or data.workers"
        )


# Where a host has its data and its programs, and how it reads them, changes no result.
_HOST_FIELDS = (
    *("data.data_dir", "data.threads", "data.workers", "data.prefetch"),
    "log.compile_cache",
)


def facts(config: Config, sources: Mapping[str, Source]) -> dict[str, object]:
    """What has to be the same in all processes: versions, settings, fields, data and devices.

    Example:
      >>> facts(Config(), {})["train.batch_size"]
      128
    """
    fields = {name: x for name, x in to_flat(config).items() if name not in _HOST_FIELDS}
    data = {f"the dataset in data.{k}_split": x.fingerprint for k, x in sources.items()}
    return {**compared(), **fields, **data}
