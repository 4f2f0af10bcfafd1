"""One network measured on one data set after the other, each image once.

network, source -> classes that compete -> batches of views -> sums on the devices -> Report
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from resnet_jax.config.schema import Data
from resnet_jax.data.pipeline import (
    Corrupt,
    evaluation_batches,
    fits_memory,
    load_memory,
    streamed_evaluation_batches,
)
from resnet_jax.data.scales import plan_batches, scaled_batches
from resnet_jax.data.sources.base import Batch
from resnet_jax.data.sources.opening import Source
from resnet_jax.distributed import data_parallel
from resnet_jax.distributed.device_memory import check_batch_memory, explain_out_of_memory
from resnet_jax.errors import ConfigError, DataError, WeightsError, unknown_name
from resnet_jax.evaluation.label_sets import CORRUPTED, Classes, data_set_name, match_classes
from resnet_jax.evaluation.multi_label import Scores, check_scores_memory
from resnet_jax.evaluation.result import Report
from resnet_jax.evaluation.views import VIEWS, default_scales, make_measuring_step
from resnet_jax.limits import MAX_BATCH, MAX_SIDE
from resnet_jax.weights.network import Network, require_head, sigmoid

_BATCH_SIZE = 128
# A multi-scale batch has about 16 times the pixels of one crop's; it is this much smaller.
_FEWER_AT_SCALES = 8


class Evaluator:
    """A network, the views, and the programs that are compiled for them.

    Args:
      network: The network; the other arguments are those of `evaluator.evaluate_network`.

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
        alone: bool = False,
    ) -> None:
        require_head(network, "evaluate")
        flips = network.config is not None and network.config.evaluate.flip
        self.network = network
        self.views = views or ("flip" if flips else "one_crop")
        self.log, self.bar, self.alone = log, bar, alone
        self.devices = jax.local_devices() if alone else jax.devices()
        if self.views not in VIEWS:
            raise ConfigError(f"--views: {unknown_name('view', self.views, VIEWS)}")
        if scales and self.views != "multi_scale":
            raise ConfigError(f"--scales={_joined(scales)}: goes with --views=multi_scale only")
        self.size = network.preprocessing.image_size
        self.scales: tuple[int, ...] = ()
        if self.views == "multi_scale":
            self.scales = tuple(scales) or default_scales(self.size)
            _check_whole_images(network)
        least = network.model.strides()[-1]
        if any(scale < least for scale in self.scales):
            raise ConfigError(
                f"--scales={_joined(self.scales)}: {network.name} needs at least {least} pixels"
            )
        if any(scale > MAX_SIDE for scale in self.scales):
            raise ConfigError(f"--scales={_joined(self.scales)}: at most {MAX_SIDE:,} pixels each")
        self.batch_size = self._batch_size(batch_size)
        side = max(self.size, *self.scales, 1)
        share = self.batch_size if alone else -(-self.batch_size // jax.process_count())
        check_batch_memory(
            network.model,
            (share, side, side, network.channels),
            f"--batch_size={self.batch_size} of {side}x{side} pixels",
        )
        self.max_corrupt = max_corrupt
        self.variables = data_parallel.replicate(network.variables)
        self._steps: dict[bytes, Any] = {}

    def _batch_size(self, wanted: int) -> int:
        if wanted:
            if not 0 < wanted <= MAX_BATCH:
                raise ConfigError(
                    f"--batch_size={wanted}: a number of images, from 1 to {MAX_BATCH:,}"
                )
            data_parallel.check_divisible({"--batch_size": wanted}, devices=len(self.devices))
            return wanted
        config = self.network.config
        size = _BATCH_SIZE
        if config is not None and not self.alone:
            size = config.evaluate.batch_size or config.train.batch_size
        if self.views == "multi_scale":
            size = max(1, size // _FEWER_AT_SCALES)
        devices = len(self.devices)
        return -(-size // devices) * devices

    def measure(self, source: Source) -> Report:
        """Measures the network on one data set, as `evaluator.evaluate_network` says."""
        classes = match_classes(self.network, source)
        if classes.doubt:
            self.log(classes.doubt)
        if self.network.multi_label:
            what = f"--data={source.name} --split={source.split}"
            remedy = "take a part of the split, such as test[:10%]"
            check_scores_memory(len(source), len(classes.names), what, remedy)
        data = self._data(source)
        limit = data.max_corrupt if self.max_corrupt is None else self.max_corrupt
        corrupt = Corrupt(limit, self.log)
        start = time.monotonic()
        batches, indices = self._batches(source, data, corrupt)
        key = b"" if classes.outputs is None else classes.outputs.tobytes()
        if key not in self._steps:
            self._steps[key] = make_measuring_step(
                self.network.model,
                self.network.colours,
                self.views,
                self.size,
                classes.outputs,
                self.devices if self.alone else None,
                self.network.multi_label,
            )
        results = _Results()
        waiting = None
        images = f"a batch of {self.batch_size} images"
        with (
            explain_out_of_memory(images, "take a smaller --batch_size"),
            self._progress(len(source)) as advance,
        ):
            # One batch is fetched while the next is computed.
            for batch in batches:
                batch["labels"] = self._translate(classes, source, batch)
                measured = self._steps[key](self.variables, batch)
                results.add(waiting)
                waiting = measured
                advance(self.batch_size)
            results.add(waiting)
        seconds = time.monotonic() - start
        return self._report(source, classes, data, results, indices, corrupt, seconds)

    def _data(self, source: Source) -> Data:
        """How images are prepared: as for the trainer's evaluation of the same network."""
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
            size = resize  # the devices cut the crops out
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
        self, source: Source, data: Data, corrupt: Corrupt
    ) -> tuple[Iterator[Batch], np.ndarray]:
        """Batches, and the place in the data set of each image in them, -1 for none."""
        size = self.batch_size
        hosts = (0, 1) if self.alone else (jax.process_index(), jax.process_count())
        if self.views == "multi_scale":
            plan = plan_batches(source, size, data.threads)
            batches = scaled_batches(source, data, self.scales, plan, corrupt, *hosts)
            return batches, plan.indices.ravel()
        if not fits_memory(source, data, training=False):
            steps = -(-len(source) // size)
            batches = streamed_evaluation_batches(source, data, size, corrupt, *hosts)
            return batches, np.arange(steps * size)
        images = load_memory(source, data, training=False, corrupt=corrupt)
        there = [*range(len(source))]
        if corrupt.count:
            there = [index for index in there if source.image_name(index) not in corrupt.names]
        filler = [-1] * (-len(there) % size)
        return evaluation_batches(images, size, *hosts), np.array(there + filler)

    def _translate(self, classes: Classes, source: Source, batch: Batch) -> np.ndarray:
        labels = classes.translate(batch["labels"])
        if labels.ndim == 1:
            strange = (labels < 0) & (batch["weights"] > 0)
            if strange.any():
                name = source.class_names[batch["labels"][strange][0]]
                raise DataError(
                    f"{source.name}: has an image of {name}, which is not one of its "
                    f"{len(classes.names)} classes; prepare it again"
                )
            if self.network.multi_label:
                return labels[:, None] == np.arange(len(classes.names))
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

    def _report(
        self,
        source: Source,
        classes: Classes,
        data: Data,
        results: _Results,
        indices: np.ndarray,
        corrupt: Corrupt,
        seconds: float,
    ) -> Report:
        network, each = self.network, results.each()
        seen = each["weight"] > 0 if each else np.zeros(0, bool)
        labelled = seen & (each["labelled"] > 0) if each else seen
        count = int(labelled.sum())
        if not count:
            raise DataError(f"{source.name}: none of its images can be measured")
        bad = int((seen & ~each["finite"]).sum())
        if bad:
            raise WeightsError(
                f"{network.source}: its outputs are not numbers for {bad} of {seen.sum()} images; "
                "take another state or file"
            )
        # Of an image without labels all classes may be right, and only the highest one cannot.
        order = np.flatnonzero(seen if network.multi_label else labelled)
        order = order[np.argsort(indices[order], kind="stable")]
        measures = results.scores.measure(network.threshold) if network.multi_label else None
        means = {name: total / count for name, total in results.total.items()}
        if measures is not None:
            means = measures.record()
        return Report(
            network=network.source,
            model=network.name,
            step=network.step,
            weights="ema" if network.ema else "",
            data=source.name,
            split=source.split,
            views=self.views,
            image_size=self.size,
            resize_size=data.eval_resize,
            scales=self.scales,
            batch_size=self.batch_size,
            skipped=corrupt.count,
            unlabelled=int(seen.sum()) - count,
            loss=means.get("loss"),
            top1=means["top1"],
            top5=means["top5"],
            class_names=classes.names,
            indices=indices[order],
            labels=each["label"][order] if "label" in each else None,
            predictions=each["prediction"][order],
            confidences=each["confidence"][order],
            hits=each["top1"][order],
            seconds=seconds,
            multi_label=measures,
            outputs=network.model.num_classes,
            matched=classes.matched,
            assumed=network.assumed,
        )


class _Results:
    """Sums in float64, in the order of the batches: the trainer's arithmetic. And each image's."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.scores = Scores()  # of a multi-label network
        self._each: list[dict[str, np.ndarray]] = []

    def add(self, measured: dict[str, Any] | None) -> None:
        if measured is None:
            return
        found = jax.device_get(measured)
        for name, value in found["sums"].items():
            self.total[name] = self.total.get(name, 0.0) + float(value)
        each = found["each"]
        self._each.append(self._judge(**each) if "logits" in each else each)

    def _judge(self, logits: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
        """Keeps a multi-label network's logits, and judges the highest one of each image."""
        real = weight > 0
        ranks = np.full(len(weight), -1)
        ranks[real] = self.scores.add(logits[real], labels[real])
        return {
            "prediction": logits.argmax(1),
            "confidence": sigmoid(logits.max(1)),
            "finite": np.isfinite(logits).all(1),
            "top1": ranks == 0,
            "labelled": ranks >= 0,
            "weight": weight,
        }

    def each(self) -> dict[str, np.ndarray]:
        names = self._each[0] if self._each else {}
        return {name: np.concatenate([part[name] for part in self._each]) for name in names}


def _check_whole_images(network: Network) -> None:
    """Refuses to resize images by their shape as stored where the network is to see another."""
    if network.crop.eval_crop == "squash":
        raise ConfigError(
            f"--views=multi_scale: keeps the proportions of images, and {network.source} takes "
            "them squashed; take --views=one_crop, flip or ten_crop"
        )
    if network.crop.upright:
        raise ConfigError(
            "--views=multi_scale: takes images as they are stored, not upright; give --no-upright, "
            "or another view"
        )


def _joined(scales: Sequence[int]) -> str:
    return ",".join(map(str, scales))
