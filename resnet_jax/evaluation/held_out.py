"""Opens held-out data and evaluates a network on it.

`evaluate_data` is the command `python -m resnet_jax evaluate`; `HeldOutSets` are the datasets of
the field `evaluate.also`, on which a network is evaluated while it trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_jax.config.schema import DATA_PLACES, DATA_SPLIT, Config, Data
from resnet_jax.config.serialization import absolute_data_name
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.data.sources import Source, open_source, split_names
from resnet_jax.data.sources.folders import are_classes
from resnet_jax.data.sources.splits import HELD_OUT
from resnet_jax.data.sources.tfds_files import prepared_configs
from resnet_jax.errors import ConfigError, DataError, WeightsError
from resnet_jax.evaluation.evaluator import Evaluator, evaluate_network
from resnet_jax.evaluation.label_sets import (
    CORRUPTED,
    DEFAULT_SPLITS,
    data_set_name,
    match_labels,
)
from resnet_jax.evaluation.multi_label import check_scores_memory
from resnet_jax.evaluation.result import CorruptionResult, EvaluationResult
from resnet_jax.files import expand_user
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.network import Network, evaluated_data, require_head
from resnet_jax.workdirs.description import read_class_names, read_json


def evaluate_data(
    network: Network,
    data: str = "",
    split: str = "",
    data_dir: str = "",
    allow_missing_classes: bool = False,
    **options: Any,
) -> EvaluationResult | CorruptionResult:
    """Opens a dataset and evaluates a network on it.

    Args:
      network: From `open_network`.
      data: As in `data.name`. Default: the data of the run that trained the network.
      split: Default: that of the run's evaluation, that of an ImageNet variant, or the dataset's
        only split named test, val, valid or validation.
      data_dir: Where TFDS keeps its datasets. Default: the run's if this user trained it, else
        TFDS's own.
      allow_missing_classes: Evaluate a run on its own data although there are no images of some
        classes. Default: the run's data.allow_missing_classes.
      **options: Options of `evaluate_network`.

    Raises:
      ConfigError: Neither the run nor the arguments name the data or the split; the run, which
        somebody else trained, names a folder; or the network has no head.
      DataError: As `open_source` and `evaluate_network` raise it.
    """
    require_head(network, "evaluate")
    log = options.get("log", print)
    config = network.config.data if network.config else None
    if not data:
        trained = evaluated_data(network)
        data, data_dir = trained.name, data_dir or trained.data_dir
    elif config is not None and network.own:
        data_dir = data_dir or config.data_dir
    own = _own_data(network, data)
    split = split or (own.eval_split if own else DEFAULT_SPLITS.get(data_set_name(data), ""))
    if data == f"tfds:{CORRUPTED}":
        _log_assumed(network, log)
        return evaluate_corruptions(network, data_dir, split, **options)
    with _naming(f"--data={data}"):
        split = split or _held_out_split(data, data_dir)
    with _naming(f"--data={data} --split={split}"):
        source = open_held_out(network, data, split, data_dir, allow_missing_classes)
    _log_assumed(network, log)
    if source.left_out:
        log(f"in {split}: {source.left_out}")
    if own and split == own.eval_split and _has_changed(network, source):
        log(f"{source.name} has changed since the run was evaluated on it")
    result = evaluate_network(network, source, **options)
    competing = len(result.class_names)
    if competing < result.outputs and data.partition(":")[0] in DATA_PLACES:
        log(
            f"{split} has {competing} of the network's {result.outputs} classes, and only these "
            "compete"
        )
    return result


def evaluate_corruptions(
    network: Network, data_dir: str = "", split: str = "", views: str = "", **options: Any
) -> CorruptionResult:
    """Evaluates a network on every prepared configuration of ImageNet-C.

    `options` are those of `evaluate_network`.

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
    results: dict[str, dict[int, EvaluationResult]] = {}
    for name in found:
        corruption, _, severity = name.partition("/")[2].rpartition("_")
        source = open_source(f"tfds:{name}", split or DEFAULT_SPLITS[CORRUPTED], data_dir)
        results.setdefault(corruption, {})[int(severity)] = evaluator.evaluate(source)
    return CorruptionResult(results)


@contextlib.contextmanager
def _naming(option: str) -> Iterator[None]:
    """Begins the messages of errors about data with the flags or the field that names it."""
    try:
        yield
    except (DataError, WeightsError) as error:
        raise type(error)(f"{option}: {error}") from error


def _log_assumed(network: Network, log: Callable[[str], Any]) -> None:
    for line in network.assumed:
        log(f"assumed: {line}")


def _held_out_split(data: str, data_dir: str) -> str:
    """The only split of a dataset that is named as a held-out one; else a ConfigError."""
    splits = split_names(data, data_dir)
    held_out = [split for split in splits if split in HELD_OUT]
    if len(held_out) == 1:
        return held_out[0]
    shown = ", ".join(splits[:8]) + (", ..." if len(splits) > 8 else "")
    kind, _, place = data.partition(":")
    folder, hint = expand_user(place).absolute(), ""
    if kind == "folder" and splits and are_classes(folder, splits):
        hint = f"; if these are classes: --data=folder:{folder.parent} --split={folder.name}"
    raise ConfigError(
        f"--split: name the split of {data} to evaluate; it has: {shown or 'none'}{hint}"
    )


def open_held_out(
    network: Network,
    data: str,
    split: str,
    data_dir: str,
    allow_missing_classes: bool = False,
    class_names: Sequence[str] = (),
) -> Source:
    """Opens a split to evaluate a network on.

    A split of a run's own data must have images of all classes of the run, which are `class_names`
    or, by default, those of its workdir; unless `allow_missing_classes` or the run's
    data.allow_missing_classes is set.

    Raises:
      DataError: As `open_source`.
    """
    options: dict[str, Any] = {"train_split": "", "multi_label": None}
    if network.config and network.config.data.multi_label:
        options["multi_label"] = True
    if own := _own_data(network, data):
        options["label_separator"] = own.label_separator
        options["train_split"] = own.train_split
        if data.partition(":")[0] in DATA_PLACES:
            options["classes"] = class_names or read_class_names(Path(network.source))
        options["allow_missing_classes"] = allow_missing_classes or own.allow_missing_classes
    return open_source(data, split, data_dir, **options)


def _own_data(network: Network, data: str) -> Data | None:
    """A run's `data` section, if it is about this data."""
    if network.config is None or absolute_data_name(data) != absolute_data_name(
        network.config.data.name
    ):
        return None
    return network.config.data


def _has_changed(network: Network, source: Source) -> bool:
    """Whether a run's images differ from those at its training, by the recorded fingerprint."""
    try:
        stored = read_json(Path(network.source, "data.json"))
    except ConfigError:  # there is no record, or it is damaged
        return False
    return stored.get("eval", source.fingerprint) != source.fingerprint


class HeldOutSets:
    """The datasets of `evaluate.also`, on which a network is evaluated while it trains.

    Each is evaluated as the `evaluate` command does it: labels are matched to outputs by name, and
    ImageNet's variants are recognized by their TFDS names. `names` are those of the field.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, resnet_jax as rj
      >>> from resnet_jax.config.schema import Evaluate
      >>> config = Config(evaluate=Evaluate(also=("digits:train[:8]", "digits:test[:8]")))
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)), train=False)
      >>> digits = tuple("0123456789")
      >>> with tempfile.TemporaryDirectory() as config.data.data_dir:
      ...     sets = HeldOutSets.open(config, model, digits, channels=1)
      ...     metrics = {name: sets.evaluate(name, variables) for name in sets.names}
      >>> metrics["digits:test[:8]"]["images"], sorted(metrics["digits:train[:8]"])
      (8, ['images', 'images_per_second', 'loss', 'top1', 'top5'])
    """

    def __init__(
        self, evaluator: Evaluator | None = None, sources: Mapping[str, Source] | None = None
    ) -> None:
        self._evaluator = evaluator
        self._sources = sources or {}

    @classmethod
    def open(
        cls,
        config: Config,
        model: ResNet,
        class_names: Sequence[str],
        channels: int,
        log: Callable[[str], Any] = print,
    ) -> HeldOutSets:
        """Opens and checks the datasets of a run, before its first step.

        Args:
          config: The configuration of the run.
          model: The network that is trained.
          class_names: Classes of the training data.
          channels: Channels of the images.
          log: Called with a line for each image that cannot be decoded.

        Raises:
          ConfigError: The logits of a multi-label network on a dataset do not fit in memory.
          DataError: A dataset is missing or damaged, or the network does not have its classes.
        """
        if not config.evaluate.also:
            return cls()
        # A head may be wider than the training data.
        numbers = map(str, range(len(class_names), model.num_classes))
        network = Network(
            source="the network",
            name=config.model.name,
            model=model.clone(axis_name=None, bn_group_size=None),
            variables={},
            preprocessing=Preprocessing.from_config(config),
            channels=channels,
            class_names=(*class_names, *numbers),
            config=config,
            multi_label=config.data.multi_label,
            threshold=config.evaluate.threshold,
            named=True,
        )
        evaluator = Evaluator(network, log=log, batch_size_option="evaluate.batch_size")
        sources = {}
        for name in config.evaluate.also:
            data, split = _parse(name)
            option = f"evaluate.also = {name!r}"
            with _naming(option):
                source = open_held_out(
                    network, data, split, config.data.data_dir, class_names=class_names
                )
                classes = len(match_labels(network, source).names)
            if network.multi_label:
                remedy = "evaluate on a part of it, such as test[:10%]"
                check_scores_memory(len(source), classes, option, remedy)
            sources[name] = source
        return cls(evaluator, sources)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each dataset, which must be the same in all processes."""
        return {name: source.fingerprint for name, source in self._sources.items()}

    def evaluate(self, name: str, variables: Any) -> dict[str, float]:
        """Evaluates {"params", "batch_stats"} on a dataset, in all processes together.

        Returns the fields of its record in metrics.jsonl: "loss" (not where a network of one label
        per image meets several), "top1", "top5", for a multi-label network also "map", "f1" and
        "f1_micro"; "images" and "images_per_second".

        Raises:
          DataError: More than data.max_corrupt images cannot be decoded.
          WeightsError: The network's outputs are not numbers.
        """
        if self._evaluator is None:
            raise KeyError(name)
        with _naming(f"evaluate.also = {name!r}"):
            return self._evaluator.evaluate(self._sources[name], variables).record()


def _parse(name: str) -> tuple[str, str]:
    found = DATA_SPLIT.fullmatch(name)
    if found is None:
        raise ConfigError(f"evaluate.also = {name!r}: must be DATA:SPLIT, such as digits:test")
    return found["data"], found["split"]
