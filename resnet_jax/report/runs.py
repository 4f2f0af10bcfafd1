"""What a report reads from a workdir: configuration, records and environment."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.config.schema import Config
from resnet_jax.config.serialization import to_flat
from resnet_jax.errors import ConfigError
from resnet_jax.files import expand_user, read_json
from resnet_jax.training.optimizer import RunLength
from resnet_jax.workdirs.description import (
    read_class_counts,
    read_class_names,
    read_config,
)
from resnet_jax.workdirs.records import Record, is_training, read_records

# What a run was started with: {"recipe": ..., "arguments": [...]}.
COMMAND_FILE = "command.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir records about its run."""

    workdir: Path
    title: str  # distinguishes it from the other runs of a page
    config: Config
    training: list[Record]
    evaluations: list[Record]  # of the parameters themselves
    ema_evaluations: list[Record]  # of their moving average
    bad_lines: int  # lines of metrics.jsonl that are not records
    environment: dict[str, str]  # versions and devices; {} if the run did not record them
    recipe: str  # such as "cifar:resnet56"; "" if the run did not record it
    num_classes: int  # 0 if the file of their names cannot be read
    class_counts: dict[str, np.ndarray]  # images of each class in "train" and "eval", if counted

    @property
    def records(self) -> list[Record]:
        """All records, of training and evaluation."""
        return [*self.training, *self.evaluations, *self.ema_evaluations]

    @property
    def final(self) -> Record:
        """The last evaluation, of the moving average if there is one."""
        return (self.ranked or [{}])[-1]

    @property
    def ranked(self) -> list[Record]:
        """The evaluations that rank states: of the moving average if there is one."""
        return self.ema_evaluations or self.evaluations

    @property
    def seconds(self) -> float:
        """Time in training steps, without evaluations and starts."""
        total, before = 0.0, 0
        for record in self.training:
            images = (record["step"] - before) * self.config.train.batch_size
            total += images / record["images_per_second"]
            before = record["step"]
        return total

    @property
    def images_per_second(self) -> float:
        """Mean rate of training."""
        steps = self.training[-1]["step"] if self.training else 0
        return steps * self.config.train.batch_size / self.seconds if self.seconds else 0.0

    @property
    def changed_fields(self) -> dict[str, Any]:
        """Configuration fields that differ from their defaults."""
        default = to_flat(Config())
        return {k: v for k, v in to_flat(self.config).items() if v != default[k]}

    @property
    def length(self) -> RunLength | None:
        """Steps of the whole run and of an epoch; None where no record tells the latter."""
        epochs = [each for each in self.training if each.get("epoch")]
        if not epochs:
            return None
        images = epochs[-1]["step"] / epochs[-1]["epoch"] * self.config.train.batch_size
        return RunLength.of(self.config, round(images))

    def rate_drops(self) -> list[int]:
        """Steps after which a "step" or "plateau" schedule has lowered the learning rate.

        Drops of a "step" schedule follow from the configuration. One of a "plateau" schedule comes
        at the end of an epoch between two records; where the records do not tell which, it is the
        first one.
        """
        length, schedule = self.length, self.config.schedule
        if not self.training or schedule.name not in ("step", "plateau") or length is None:
            return []
        last = self.training[-1]["step"]
        if schedule.name == "step":
            planned = {max(round(share * length.steps), 1) for share in schedule.boundaries}
            return sorted(step for step in planned if step < last)
        epoch = max(1, math.ceil(length.steps_per_epoch))  # as the optimizer counts it
        drops = []
        for before, after in zip(self.training, self.training[1:]):
            if after["learning_rate"] < before["learning_rate"] * (1 + schedule.factor) / 2:
                # The rate of a record is that of its last step, so the drop is before that.
                end = -(-before["step"] // epoch) * epoch
                drops.append(min(end, after["step"] - 1))
        return drops


def read_run(workdir: str | Path) -> Run:
    """Reads a workdir; raises ConfigError if it is not one or has no records."""
    workdir = expand_user(workdir)
    if not workdir.exists():
        raise ConfigError(f"{workdir}: there is no such folder")
    if not (workdir / "config.json").exists():
        raise ConfigError(f"{workdir} is not a workdir: it has no config.json")
    config = read_config(workdir)
    records, bad = read_records(workdir / "metrics.jsonl")
    if not records:
        lines = f", and {bad} lines that are not records" if bad else ""
        raise ConfigError(f"{workdir / 'metrics.jsonl'} has no record yet{lines}; train first")
    evaluations = [
        record
        for record in records
        if not is_training(record)
        and record["split"] == config.data.eval_split
        and "loss" in record  # as every evaluation by the trainer has it
    ]
    return Run(
        workdir=workdir,
        title=workdir.absolute().name,
        config=config,
        training=[record for record in records if is_training(record)],
        evaluations=[record for record in evaluations if "weights" not in record],
        ema_evaluations=[record for record in evaluations if record.get("weights") == "ema"],
        bad_lines=bad,
        environment=_read_environment(workdir / "environment.json"),
        recipe=_read_recipe(workdir / COMMAND_FILE),
        num_classes=_count_classes(workdir),
        class_counts=read_class_counts(workdir),
    )


def _count_classes(workdir: Path) -> int:
    try:
        return len(read_class_names(workdir))
    except ConfigError:  # the page says so where it opens the network
        return 0


def _read_environment(path: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in read_json(path).items()}
    except (OSError, ValueError, AttributeError):  # runs of older versions have none
        return {}


def _read_recipe(path: Path) -> str:
    try:
        return str(read_json(path)["recipe"])[:200]
    except (OSError, ValueError, TypeError, KeyError):  # a run from Python has none
        return ""
