"""What a run needs before it starts: data and network that fit the configuration and each other."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from resnet_jax.config.schema import Config
from resnet_jax.config.serialization import to_flat
from resnet_jax.data.augment.apply import check_channels
from resnet_jax.data.pipeline import fits_memory
from resnet_jax.data.sources.opening import Source, open_split
from resnet_jax.distributed import data_parallel
from resnet_jax.distributed.device_memory import check_batch_memory
from resnet_jax.errors import ConfigError, DataError
from resnet_jax.limits import check_host_memory
from resnet_jax.models.resnet import ResNet
from resnet_jax.training.class_balance import check_class_weights
from resnet_jax.workdirs.environment import compared


def open_sources(config: Config) -> dict[str, Source]:
    """Opens the training and the evaluation split and checks them against each other.

    Args:
      config: The configuration of a run.

    Returns:
      {"train", "eval"}.

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
    # Decided once: a split of grey images may belong to a data set of color, and the reverse.
    held_out.channels = train.channels
    return sources


def check_source(config: Config, source: Source) -> None:
    """Checks the training images against the configuration.

    Args:
      config: The configuration of a run.
      source: Its training images.

    Raises:
      ConfigError: A field that does not suit images with so many channels.
      DataError: It has one class only, or more than the network.
    """
    data, channels = config.data, channels_of(config, source)
    check_channels(config.augment, channels)
    classes = source.num_classes
    if classes < 2:
        raise DataError(f"data.name = {data.name!r}: has {classes} class; two or more are needed")
    if config.model.num_classes and config.model.num_classes < classes:
        raise DataError(
            f"model.num_classes = {config.model.num_classes}: the data set has {classes} classes; "
            f"take {classes} or more, or 0 to follow the data set"
        )
    check_class_weights(config.loss, classes)


def channels_of(config: Config, source: Source) -> int:
    """Channels of the images that the network sees."""
    return config.data.channels or source.channels


def check_calls(config: Config, source: Source) -> None:
    """Checks that a data set that is to lie on the devices can.

    Args:
      config: The configuration of a run.
      source: Its training images.

    Raises:
      ConfigError: It does not stay in memory.
    """
    steps = config.train.steps_per_call
    if steps == 1:
        return
    if not fits_memory(source, config.data, training=True):
        raise ConfigError(
            f"train.steps_per_call = {steps}: needs a data set that lies in memory, with "
            "data.crop = 'center' and at most data.memory_gib; take 1 for this one"
        )


def check_batches(config: Config, devices: int = 0) -> None:
    """Checks that batches and groups of devices divide evenly.

    Args:
      config: The configuration of a run.
      devices: How many; 0: JAX's own.

    Raises:
      ConfigError: Names the field that does not, and values that do.

    Example:
      >>> from resnet_jax.config.schema import Train
      >>> check_batches(Config(train=Train(batch_size=16 * jax.device_count())))
    """
    devices = devices or jax.device_count()
    parts = batch_parts(config)
    mixes = parts > config.train.accumulate
    why = "train.accumulate, and pairs to mix" if mixes else "train.accumulate"
    sizes = {"train.batch_size": config.train.batch_size}
    data_parallel.check_divisible(sizes, parts, why, devices)
    group = config.model.bn_group_size
    if group and devices % group:
        raise ConfigError(f"model.bn_group_size = {group}: must divide the {devices} devices")
    if config.evaluate.batch_size:
        sizes = {"evaluate.batch_size": config.evaluate.batch_size}
        data_parallel.check_divisible(sizes, devices=devices)


def check_memory(config: Config, model: ResNet, channels: int, hosts: int) -> None:
    """Checks that this host's share of a batch does not by far exceed the host's memory.

    Args:
      config: The configuration of a run.
      model: Its network.
      channels: Of its images.
      hosts: How many share a batch.

    Raises:
      ConfigError: Names the field, and what a batch needs at least.
    """
    data, train = config.data, config.train
    trained, evaluated = train.batch_size, config.evaluate.batch_size or train.batch_size
    name = "evaluate.batch_size" if config.evaluate.batch_size else "train.batch_size"
    keeps = config.optimizer.backbone_rate > 0  # what a backward pass needs
    for field, images, size, training in (
        (f"train.batch_size = {trained}", trained // train.accumulate, data.image_size, keeps),
        (f"{name} = {evaluated}", evaluated, data.eval_size or data.image_size, False),
    ):
        shape = (images // hosts, size, size, channels)
        check_batch_memory(model, shape, f"{field} of {size}x{size} pixels", training=training)
    if train.steps_per_call == 1:  # else batches are made on the devices
        ahead = (data.prefetch + 1) * (1 + data.workers)
        what = f"train.batch_size = {trained}, of which {ahead} batches are made ahead"
        batch = trained // hosts * data.image_size**2 * channels
        check_host_memory(
            ahead * batch, what, "take a smaller one, or less data.prefetch or data.workers"
        )


def batch_parts(config: Config) -> int:
    """Number that a device's share of a batch must be a multiple of.

    Args:
      config: The configuration of a run.

    Returns:
      train.accumulate, twice that where pairs of images are mixed.

    Example:
      >>> batch_parts(Config())
      1
    """
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    return config.train.accumulate * (2 if mixes else 1)


def fingerprints(sources: Mapping[str, Source]) -> dict[str, str]:
    """What tells whether the data is still the same.

    Args:
      sources: From `open_sources`.

    Returns:
      A text for each.
    """
    return {use: source.fingerprint for use, source in sources.items()}


# Where a host has its data and its programs, and how it reads them, changes no result.
_OF_A_HOST = ("data.data_dir", "data.threads", "data.workers", "data.prefetch", "log.compile_cache")


def facts(config: Config, sources: Mapping[str, Source]) -> dict[str, object]:
    """What has to be the same in all processes of a run.

    Args:
      config: The configuration of the run.
      sources: From `open_sources`.

    Returns:
      Versions and settings, fields of the configuration, the data and the devices, by what a person
      calls them.

    Example:
      >>> facts(Config(), {})["train.batch_size"]
      128
    """
    fields = {name: x for name, x in to_flat(config).items() if name not in _OF_A_HOST}
    data = {f"the data set in data.{k}_split": x for k, x in fingerprints(sources).items()}
    return {
        **compared(),
        **fields,
        **data,
    }
