"""A network measured on a data set: `python -m resnet_jax evaluate`.

Here is said what is measured on what; how it goes is in measuring.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resnet_jax.config.schema import DATA_PLACES, Data
from resnet_jax.config.serialization import absolute_data_name
from resnet_jax.data.sources.opening import Source, open_source, split_names
from resnet_jax.data.sources.tfds_files import prepared_configs
from resnet_jax.errors import ConfigError, DataError
from resnet_jax.evaluation.label_sets import CORRUPTED, data_set_name
from resnet_jax.evaluation.measuring import Evaluator
from resnet_jax.evaluation.result import CorruptionReport, Report
from resnet_jax.weights.source import Network, evaluated_data, require_head
from resnet_jax.workdirs.description import read_class_names, read_json

# Splits that are measured where nobody says which.
_SPLITS = {
    "imagenet2012": "validation",
    "imagenet2012_real": "validation",
    CORRUPTED: "validation",
    "imagenet_v2": "test",
    "imagenet_a": "test",
    "imagenet_r": "test",
    "imagenet_sketch": "test",
}
# Splits that are kept for measuring, by their names.
_HELD_OUT = ("test", "val", "valid", "validation")


def evaluate_network(
    network: Network,
    source: Source,
    views: str = "",
    *,
    scales: Sequence[int] = (),
    batch_size: int = 0,
    max_corrupt: int | None = None,
    log: Callable[[str], Any] = print,
    bar: bool = False,
    alone: bool = False,
) -> Report:
    """Measures a network on a data set, on all devices, each image once.

    With the batch size and the number of devices of its training, a run's network gives the
    numbers of its metrics.jsonl.

    Args:
      network: The network.
      source: From `open_source` (with multi_label=None for ReaL). ImageNet's variants are
        known by their TFDS names.
      views: One of `views.VIEWS`; "": flip for a run with evaluate.flip, else one_crop.
      scales: Shorter sides in pixels for multi_scale; (): the paper's five, in proportion to the
        network's images.
      batch_size: On all devices together; 0: that of the run's evaluation, else 128, and an
        eighth of it for multi_scale.
      max_corrupt: Images that are skipped because they cannot be decoded, before it is an error;
        None: the run's data.max_corrupt, else 10.
      log: Called with one line for each of those.
      bar: Show a progress bar on stderr, if that is a terminal.
      alone: Of several processes only this one measures, on its own devices; by default all do,
        together. The batch size is then not that of the run, which more devices may have shared.

    Returns:
      The measures, and each image's prediction.

    Raises:
      ConfigError: An unknown view, or sizes that do not go together.
      DataError: The network has not the data's classes, or too many images cannot be decoded.
      WeightsError: The network's outputs are not numbers.

    Example:
      >>> import dataclasses, tempfile, jax, jax.numpy as jnp, resnet_jax as rj
      >>> from resnet_jax.weights.source import open_network
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rj.save_weights(f"{folder}/w.npz", model, variables)
      ...     network = open_network(f"{folder}/w.npz", model="resnet20", image_size=8)
      ...     network = dataclasses.replace(network, preprocessing=rj.Preprocessing(
      ...         image_size=8, crop_fraction=1.0, mean=(0.3,), std=(0.38,)))
      ...     report = evaluate_network(network, open_source("digits", "test[:16]", folder))
      >>> report.images, report.confusion.shape, len(report.bins)
      (16, (10, 10), 15)
    """
    evaluator = Evaluator(network, views, scales, batch_size, max_corrupt, log, bar, alone)
    return evaluator.measure(source)


def evaluate_corruptions(
    network: Network, data_dir: str = "", split: str = "", views: str = "", **options: Any
) -> CorruptionReport:
    """Measures a network on every prepared configuration of ImageNet-C.

    Args:
      network: The network.
      data_dir: Where TFDS keeps its data sets; "": TFDS's own default.
      split: As for `open_source`; "": validation.
      views: As for `evaluate_network`.
      **options: Likewise.

    Returns:
      The measures by corruption and severity.

    Raises:
      DataError: None is prepared; and as `evaluate_network` raises it.
    """
    found = prepared_configs(CORRUPTED, data_dir)
    if not found:
        raise DataError(
            f"--data=tfds:{CORRUPTED}: none of its configurations is prepared; run: "
            f"python -m resnet_jax prepare {CORRUPTED}/gaussian_noise_1"
        )
    evaluator = Evaluator(network, views, **options)
    reports: dict[str, dict[int, Report]] = {}
    for name in found:
        corruption, _, severity = name.partition("/")[2].rpartition("_")
        source = open_source(f"tfds:{name}", split or _SPLITS[CORRUPTED], data_dir)
        reports.setdefault(corruption, {})[int(severity)] = evaluator.measure(source)
    return CorruptionReport(reports)


def evaluate_data(
    network: Network,
    data: str = "",
    split: str = "",
    data_dir: str = "",
    allow_missing_classes: bool = False,
    **options: Any,
) -> Report | CorruptionReport:
    """Opens a data set and measures a network on it.

    Args:
      network: The network.
      data: As in `data.name`; "": what the network was trained for, in a workdir.
      split: Of it; "": that of the run's evaluation, the one that an ImageNet variant has, or
        the data set's only split that is called test, val, valid or validation.
      data_dir: Where TFDS keeps its data sets; "": the run's where this user trained it, else
        TFDS's own default.
      allow_missing_classes: Measure a run on its own data although some of its classes have no
        images there; by default the run's data.allow_missing_classes.
      **options: As for `evaluate_network`.

    Returns:
      The measures.

    Raises:
      ConfigError: Neither the run nor the flags say which data or split; the run, which somebody
        else trained, names a folder; or the network has no head.
      DataError: As `open_source` and `evaluate_network` raise it.
    """
    require_head(network, "evaluate")
    config = network.config.data if network.config else None
    if not data:
        trained = evaluated_data(network)
        data, data_dir = trained.name, data_dir or trained.data_dir
    elif config is not None and network.own:
        data_dir = data_dir or config.data_dir
    own = _own_section(network, data)
    split = split or (own.eval_split if own else _SPLITS.get(data_set_name(data), ""))
    log = options.get("say", print)
    assumed = [f"assumed: {line}" for line in network.assumed]
    if data == f"tfds:{CORRUPTED}":
        for line in assumed:
            log(line)
        return evaluate_corruptions(network, data_dir, split, **options)
    try:
        split = split or _held_out_split(data, data_dir)
    except DataError as error:
        raise DataError(f"--data={data}: {error}") from error
    try:
        source = open_held_out(network, data, split, data_dir, allow_missing_classes)
    except DataError as error:
        raise DataError(f"--data={data} --split={split}: {error}") from error
    for line in assumed:
        log(line)
    if source.left_out:
        log(f"in {split}: {source.left_out}")
    if own and split == own.eval_split and _has_changed(network, source):
        log(f"{source.name} has changed since the run was evaluated on it")
    report = evaluate_network(network, source, **options)
    compete = len(report.class_names)
    if compete < report.outputs and data.partition(":")[0] in DATA_PLACES:
        log(
            f"{split} has {compete} of the network's {report.outputs} classes, and only these "
            "compete"
        )
    return report


def _held_out_split(data: str, data_dir: str) -> str:
    """The split to measure on, where there is no doubt.

    Raises:
      ConfigError: There is none, or there are several.
    """
    splits = split_names(data, data_dir)
    held_out = [split for split in splits if split in _HELD_OUT]
    if len(held_out) == 1:
        return held_out[0]
    shown = ", ".join(splits[:8]) + (", ..." if len(splits) > 8 else "")
    raise ConfigError(f"--split: say which split of {data} to measure; it has: {shown or 'none'}")


def open_held_out(
    network: Network, data: str, split: str, data_dir: str, allow_missing_classes: bool = False
) -> Source:
    """Opens a split to measure a network on, which of a run's own data has all classes of the run.

    Args:
      network: The network.
      data: As in `data.name`.
      split: Of it.
      data_dir: Where TFDS keeps its data sets; "": TFDS's own default.
      allow_missing_classes: Accept one that lacks images of some classes, as the run's
        data.allow_missing_classes does.

    Returns:
      The open source.

    Raises:
      DataError: As `open_source`.
    """
    options: dict[str, Any] = {"train_split": "", "multi_label": None}
    if network.config and network.config.data.multi_label:
        options["multi_label"] = True
    if own := _own_section(network, data):
        options["label_separator"] = own.label_separator
        options["train_split"] = own.train_split
        if data.partition(":")[0] in DATA_PLACES:
            options["classes"] = read_class_names(Path(network.source))
        options["allow_missing_classes"] = allow_missing_classes or own.allow_missing_classes
    return open_source(data, split, data_dir, **options)


def _own_section(network: Network, data: str) -> Data | None:
    """A run's `data` section, if it is about this data."""
    if network.config is None or absolute_data_name(data) != absolute_data_name(
        network.config.data.name
    ):
        return None
    return network.config.data


def _has_changed(network: Network, source: Source) -> bool:
    """Whether a run's images are others than at its training, by the fingerprint that it noted."""
    try:
        stored = read_json(Path(network.source, "data.json"))
    except ConfigError:  # nothing was noted, or it is damaged
        return False
    return stored.get("eval", source.fingerprint) != source.fingerprint
