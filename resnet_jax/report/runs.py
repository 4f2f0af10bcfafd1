"""What a run left in its workdir, read for a report."""

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
    """A workdir's records.

    Args:
      workdir: Its folder.
      title: What it is called beside others.
      config: Its configuration.
      training: Records of training, by step.
      evaluations: Records of evaluation of the weights themselves.
      ema_evaluations: Records of evaluation of their moving average.
      bad_lines: Number of lines in metrics.jsonl that are no records.
      environment: Versions and devices; {} where the run did not note them.
      class_counts: Images of each class, by "train" and "eval", as far as the run counted them.
    """

    workdir: Path
    title: str
    config: Config
    training: list[Record]
    evaluations: list[Record]
    ema_evaluations: list[Record]
    bad_lines: int
    environment: dict[str, str]
    class_counts: dict[str, np.ndarray]

    @property
    def final(self) -> Record:
        """The last evaluation, of the moving average where there is one."""
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
        """The configuration's fields that are not at their defaults."""
        default = to_flat(Config())
        return {k: v for k, v in to_flat(self.config).items() if v != default[k]}

    def drops(self) -> list[int]:
        """Steps before which a schedule that drops dropped the learning rate."""
        if self.config.schedule.name not in ("step", "plateau"):
            return []
        pairs = zip(self.training, self.training[1:])
        return [b["step"] for a, b in pairs if b["learning_rate"] < a["learning_rate"] * 0.67]


def read_run(workdir: str | Path) -> Run:
    """Reads a workdir.

    Args:
      workdir: Folder of a run.

    Returns:
      Its records.

    Raises:
      ConfigError: It is no workdir, or nothing was recorded in it.

    Example:
      >>> read_run("nowhere")
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: nowhere is not a workdir: it has no config.json
    """
    workdir = Path(workdir).expanduser()
    if not (workdir / "config.json").exists():
        raise ConfigError(f"{workdir} is not a workdir: it has no config.json")
    config = read_config(workdir)
    records, bad = read_records(workdir / "metrics.jsonl")
    if not records:
        lines = f", and {bad} lines that are not what a run writes" if bad else ""
        raise ConfigError(f"{workdir / 'metrics.jsonl'} has no record yet{lines}; train first")
    evaluations = [record for record in records if not is_training(record)]
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
    except (OSError, ValueError, AttributeError):  # runs of before it was noted
        return {}
