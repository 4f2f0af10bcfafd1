"""Evaluates a network on an open dataset, each image once.

network, source -> classes that compete -> batches -> a step on the devices -> EvaluationResult
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from resnet_jax.config.schema import Data
from resnet_jax.data.pipeline import CorruptImages, Shard, open_dataset
from resnet_jax.data.scales import plan_batches, scaled_batches
from resnet_jax.data.sources import Source
from resnet_jax.data.sources.base import Batch
from resnet_jax.distributed.data_parallel import check_divisible, replicate
from resnet_jax.distributed.device_memory import check_batch_memory, explain_out_of_memory
from resnet_jax.errors import ConfigError, DataError, WeightsError, unknown_name
from resnet_jax.evaluation.label_sets import CORRUPTED, LabelMatch, data_set_name, match_labels
from resnet_jax.evaluation.multi_label import MultiLabelAccumulator, check_scores_memory
from resnet_jax.evaluation.result import EvaluationResult
from resnet_jax.evaluation.views import VIEWS, default_scales, make_views_step
from resnet_jax.limits import MAX_BATCH, MAX_SIDE
from resnet_jax.weights.network import Network, require_head, sigmoid

_BATCH_SIZE = 128
# A batch for multi_scale is this much smaller: it has about 16 times the pixels.
_SMALLER_AT_SCALES = 8


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
    local: bool = False,
) -> EvaluationResult:
    """Evaluates a network on a dataset, each image once, on all devices.

    With the batch size and the number of devices of its training, a run's network gives the
    numbers of its metrics.jsonl.

    Args:
      network: From `open_network`.
      source: From `open_source`, with multi_label=None for ReaL. ImageNet's variants are
        recognized by their TFDS names.
      views: One of `views.VIEWS`. Default: flip for a run with evaluate.flip, else one_crop.
      scales: Shorter sides in pixels for multi_scale. Default: the paper's five, in proportion to
        the network's image size.
      batch_size: Images in a batch on all devices. Default: that of the run's evaluation, else
        128; an eighth of it for multi_scale.
      max_corrupt: Images that cannot be decoded and are skipped before it is an error. Default:
        the run's data.max_corrupt, else 10.
      log: Called with a line for each of them.
      bar: Show a progress bar on stderr if it is a terminal.
      local: Evaluate in this process only, on its own devices, instead of in all processes
        together. The default batch size is then 128.

    Returns:
      The metrics, and the prediction for each image.

    Raises:
      ConfigError: An unknown view, or sizes that do not go together.
      DataError: The network does not have the data's classes, or too many images cannot be
        decoded.
      WeightsError: The network's outputs are not numbers.

    Example:
      >>> import dataclasses, tempfile, jax, jax.numpy as jnp, resnet_jax as rj
      >>> from resnet_jax.data.sources import open_source
      >>> from resnet_jax.weights.source import open_network
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rj.save_weights(f"{folder}/w.npz", model, variables)
      ...     network = open_network(f"{folder}/w.npz", model="resnet20", image_size=8)
      ...     network = dataclasses.replace(network, preprocessing=rj.Preprocessing(
      ...         image_size=8, crop_fraction=1.0, mean=(0.3,), std=(0.38,)))
      ...     result = evaluate_network(network, open_source("digits", "test[:16]", folder))
      >>> result.images, result.confusion.shape, len(result.bins)
      (16, (10, 10), 15)
    """
    evaluator = Evaluator(network, views, scales, batch_size, max_corrupt, log, bar, local)
    return evaluator.evaluate(source)


class Evaluator:
    """Evaluates one network on any number of datasets, with programs that are compiled once.

    The arguments are those of `evaluate_network`, and the name of the batch size in messages.

    Raises:
      ConfigError: An unknown view, sizes that do not go together, or a network without a head.
    """

    def __init__(
        self,
        network: Network,
        views: str = "",
        scales: Sequence[int] = (),
        batch_size: int = 0,
        max_corrupt: int | None = None,
        log: Callable[[str], Any] = print,
        bar: bool = False,
        local: bool = False,
        batch_size_option: str = "--batch_size",
    ) -> None:
        require_head(network, "evaluate")
        flips = network.config is not None and network.config.evaluate.flip
        self.network = network
        self.views = views or ("flip" if flips else "one_crop")
        self.log, self.bar, self.local = log, bar, local
        self.max_corrupt = max_corrupt
        self._batch_size_option = batch_size_option
        self.devices = jax.local_devices() if local else jax.devices()
        self.size = network.preprocessing.image_size
        if self.views not in VIEWS:
            raise ConfigError(f"--views: {unknown_name('view', self.views, VIEWS)}")
        if scales and self.views != "multi_scale":
            raise ConfigError(
                f"--scales={_comma_separated(scales)}: goes with --views=multi_scale only"
            )
        self.scales = self._choose_scales(scales) if self.views == "multi_scale" else ()
        self.batch_size = self._choose_batch_size(batch_size)
        side = max(self.size, *self.scales, 1)
        processes = 1 if local else jax.process_count()
        check_batch_memory(
            network.model,
            (-(-self.batch_size // processes), side, side, network.channels),
            f"{batch_size_option} = {self.batch_size} of {side}x{side} pixels",
        )
        self._steps: dict[bytes, Any] = {}

    def evaluate(self, source: Source, variables: Any = None) -> EvaluationResult:
        """Evaluates the network on one dataset, as `evaluate_network`.

        Args:
          source: The open dataset.
          variables: Variables on the devices, to use in place of the network's.
        """
        network, match = self.network, match_labels(self.network, source)
        if match.warning:
            self.log(match.warning)
        if network.multi_label:
            what = f"--data={source.name} --split={source.split}"
            remedy = "take a part of the split, such as test[:10%]"
            check_scores_memory(len(source), len(match.names), what, remedy)
        data = self._data_config(source)
        limit = data.max_corrupt if self.max_corrupt is None else self.max_corrupt
        corrupt = CorruptImages(limit, self.log)
        start = time.monotonic()
        batches, indices = self._batches(source, data, corrupt)
        variables = self._variables if variables is None else variables
        outputs = self._run(variables, batches, match, source)
        return EvaluationResult(
            **self._setting(source, match),
            **outputs.metrics(network, source, indices),
            resize_size=data.eval_resize,
            skipped=corrupt.count,
            seconds=time.monotonic() - start,
        )

    @functools.cached_property
    def _variables(self) -> Any:
        return replicate(self.network.variables)

    def _choose_scales(self, scales: Sequence[int]) -> tuple[int, ...]:
        network, scales = self.network, tuple(scales) or default_scales(self.size)
        flag = f"--scales={_comma_separated(scales)}"
        if network.crop.eval_crop == "squash":
            raise ConfigError(
                f"--views=multi_scale: keeps the proportions of images, and {network.source} takes "
                "them squashed; take --views=one_crop, flip or ten_crop"
            )
        if network.crop.upright:
            raise ConfigError(
                "--views=multi_scale: takes images as they are stored, not upright; give "
                "--no-upright, or another view"
            )
        least = network.model.strides()[-1]
        if min(scales) < least:
            raise ConfigError(f"{flag}: {network.name} needs at least {least} pixels")
        if max(scales) > MAX_SIDE:
            raise ConfigError(f"{flag}: at most {MAX_SIDE:,} pixels each")
        return scales

    def _choose_batch_size(self, batch_size: int) -> int:
        devices = len(self.devices)
        if batch_size:
            if not 0 < batch_size <= MAX_BATCH:
                raise ConfigError(
                    f"--batch_size={batch_size}: a number of images, from 1 to {MAX_BATCH:,}"
                )
            check_divisible({"--batch_size": batch_size}, devices=devices)
            return batch_size
        config = self.network.config
        size = _BATCH_SIZE
        if config is not None and not self.local:
            size = config.evaluate.batch_size or config.train.batch_size
        if self.views == "multi_scale":
            size = max(1, size // _SMALLER_AT_SCALES)
        return -(-size // devices) * devices

    def _data_config(self, source: Source) -> Data:
        """How images are prepared: as in the training run's evaluation of the same network."""
        network, size = self.network, self.size
        resize = network.preprocessing.resize_size
        if data_set_name(source.name) == CORRUPTED:
            resize = size  # its images are crops already
        if self.views == "ten_crop":
            if resize == size:
                raise ConfigError(
                    f"--views=ten_crop: crops of {size} pixels from images of {resize} would all "
                    "be the same; give --crop_fraction, such as 0.875"
                )
            size = resize  # the devices cut the crops
        return dataclasses.replace(
            network.config.data if network.config else Data(),
            channels=network.channels,
            eval_size=size,
            eval_resize=resize,
            eval_crop=network.crop.eval_crop,
            interpolation=network.crop.interpolation,
            upright=network.crop.upright,
        )

    def _batches(
        self, source: Source, data: Data, corrupt: CorruptImages
    ) -> tuple[Iterator[Batch], np.ndarray]:
        """Batches, and the position in the dataset of each image in them, -1 for padding."""
        size = self.batch_size
        shard = Shard() if self.local else Shard(jax.process_index(), jax.process_count())
        if self.views == "multi_scale":
            plan = plan_batches(source, size, data.threads)
            batches = scaled_batches(source, data, self.scales, plan, corrupt, shard)
            return batches, plan.indices.ravel()
        dataset = open_dataset(source, data, training=False, corrupt=corrupt)
        padding = np.full(-len(dataset) % size, -1)
        return dataset.eval_batches(size, shard), np.append(dataset.indices, padding)

    def _run(
        self, variables: Any, batches: Iterator[Batch], match: LabelMatch, source: Source
    ) -> _Outputs:
        step, outputs, waiting = self._step(match.outputs), _Outputs(), None
        what = f"a batch of {self.batch_size} images"
        with (
            explain_out_of_memory(what, f"take a smaller {self._batch_size_option}"),
            self._progress(len(source)) as advance,
        ):
            # One batch is fetched while the next is computed.
            for batch in batches:
                batch["labels"] = self._classes_of(match, source, batch)
                computed = step(variables, batch)
                outputs.add(waiting)
                waiting = computed
                advance(self.batch_size)
            outputs.add(waiting)
        return outputs

    def _step(self, outputs: np.ndarray | None) -> Callable[[Any, Batch], dict[str, Any]]:
        """The compiled step for the network's outputs that compete."""
        key = b"" if outputs is None else outputs.tobytes()
        if key not in self._steps:
            self._steps[key] = make_views_step(
                self.network.model,
                self.network.preprocessing,
                self.views,
                outputs,
                self.devices if self.local else None,
                self.network.multi_label,
            )
        return self._steps[key]

    def _classes_of(self, match: LabelMatch, source: Source, batch: Batch) -> np.ndarray:
        labels = match.classes_of(batch["labels"])
        if labels.ndim == 1:
            unknown = (labels < 0) & (batch["weights"] > 0)
            if unknown.any():
                name = source.class_names[batch["labels"][unknown][0]]
                raise DataError(
                    f"{source.name}: has an image of {name}, which is not one of its "
                    f"{len(match.names)} classes; prepare it again"
                )
            if self.network.multi_label:
                return labels[:, None] == np.arange(len(match.names))
        return labels

    @contextlib.contextmanager
    def _progress(self, images: int) -> Iterator[Callable[[int], Any]]:
        if not self.bar:
            yield lambda count: None
            return
        from tqdm import tqdm

        # disable=None: only on a terminal.
        with tqdm(total=images, unit="img", disable=None, leave=False, file=sys.stderr) as bar:
            yield lambda count: bar.update(min(count, images - bar.n))

    def _setting(self, source: Source, match: LabelMatch) -> dict[str, Any]:
        """The fields of the result that are known before the evaluation."""
        network = self.network
        return {
            "network": network.source,
            "model": network.name,
            "step": network.step,
            "weights": "ema" if network.ema else "",
            "data": source.name,
            "split": source.split,
            "views": self.views,
            "image_size": self.size,
            "scales": self.scales,
            "batch_size": self.batch_size,
            "class_names": match.names,
            "outputs": network.model.num_classes,
            "matched": match.by,
            "assumed": network.assumed,
        }


class _Outputs:
    """The outputs of the steps: sums in float64, in the order of the batches, and each image's.

    The sums are computed as `metrics.evaluate` computes them.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.scores = MultiLabelAccumulator()  # of a multi-label network
        self._each: list[dict[str, np.ndarray]] = []

    def add(self, outputs: dict[str, Any] | None) -> None:
        if outputs is None:
            return
        found = jax.device_get(outputs)
        for name, value in found["sums"].items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value)
        each = found["each"]
        self._each.append(self._add_scores(**each) if "logits" in each else each)

    def _add_scores(
        self, logits: np.ndarray, labels: np.ndarray, weight: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Keeps a multi-label network's logits, and returns the metrics of each image."""
        real = weight > 0
        ranks = np.full(len(weight), -1)
        ranks[real] = self.scores.add(logits[real], labels[real])
        return {
            "prediction": logits.argmax(1),
            "confidence": sigmoid(logits.max(1)),
            "finite": np.isfinite(logits).all(1),
            "top1": ranks == 0,
            "labeled": ranks >= 0,
            "weight": weight,
        }

    def metrics(self, network: Network, source: Source, indices: np.ndarray) -> dict[str, Any]:
        """The fields of the result that are computed.

        `indices` are the positions in the dataset of the images in the batches.
        """
        each = {
            name: np.concatenate([part[name] for part in self._each])
            for name in (self._each[0] if self._each else ())
        }
        seen = each["weight"] > 0 if each else np.zeros(0, bool)
        labeled = seen & (each["labeled"] > 0) if each else seen
        count = int(labeled.sum())
        if not count:
            raise DataError(f"{source.name}: none of its images can be evaluated")
        bad = int((seen & ~each["finite"]).sum())
        if bad:
            raise WeightsError(
                f"{network.source}: its outputs are not numbers for {bad} of {seen.sum()} images; "
                "take another state or file"
            )
        # A multi-label network also predicts classes for images without labels.
        order = np.flatnonzero(seen if network.multi_label else labeled)
        order = order[np.argsort(indices[order], kind="stable")]
        metrics = {name: total / count for name, total in self.totals.items()}
        multi_label = self.scores.compute(network.threshold) if network.multi_label else None
        metrics = multi_label.record() if multi_label else metrics
        return {
            "loss": metrics.get("loss"),
            "top1": metrics["top1"],
            "top5": metrics["top5"],
            "multi_label": multi_label,
            "unlabeled": int(seen.sum()) - count,
            "indices": indices[order],
            "labels": each["label"][order] if "label" in each else None,
            "predictions": each["prediction"][order],
            "confidences": each["confidence"][order],
            "hits": each["top1"][order],
        }


def _comma_separated(scales: Sequence[int]) -> str:
    return ",".join(map(str, scales))
