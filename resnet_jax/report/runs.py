"""What a report reads from a workdir: configuration, records and environment."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.config.schema import Config
from resnet_jax.config.serialization import to_flat
from resnet_jax.errors import ConfigError
from resnet_jax.files import read_json
from resnet_jax.workdirs.description import read_class_counts, read_config
from resnet_jax.workdirs.records import Record, is_training, read_records


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
    class_counts: dict[str, np.ndarray]  # images of each class in "train" and "eval", if counted

    @property
    def final(self) -> Record:
        """The last evaluation, of the moving average if there is one."""
        return (self.ema_evaluations or self.evaluations or [{}])[-1]

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

    def rate_drops(self) -> list[int]:
        """First recorded steps after each drop of a "step" or "plateau" schedule."""
        if self.config.schedule.name not in ("step", "plateau"):
            return []
        pairs = zip(self.training, self.training[1:])
        return [b["step"] for a, b in pairs if b["learning_rate"] < a["learning_rate"] * 0.67]


def read_run(workdir: str | Path) -> Run:
    """Reads a workdir; raises ConfigError if it is not one or has no records."""
    workdir = Path(workdir).expanduser()
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
        class_counts=read_class_counts(workdir),
    )


def _read_environment(path: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in read_json(path).items()}
    except (OSError, ValueError, AttributeError):  # runs of older versions have none
        return {}
