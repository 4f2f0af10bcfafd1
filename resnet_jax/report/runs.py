"""What a run left in its workdir, read for a report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from resnet_jax.errors import ConfigError
from resnet_jax.training.config import Config, check, from_json, to_flat

Record = dict[str, Any]


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
      environment: Versions and devices; {} where the run did not note them.
    """

    workdir: Path
    title: str
    config: Config
    training: list[Record]
    evaluations: list[Record]
    ema_evaluations: list[Record]
    environment: dict[str, str]

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
            if record["images_per_second"]:
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
    if not (workdir / "config.json").is_file():
        raise ConfigError(f"{workdir} is not a workdir: it has no config.json")
    try:
        config = from_json((workdir / "config.json").read_text())
        check(config)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{workdir}: {error}") from error
    records = _read_records(workdir / "metrics.jsonl")
    evaluations = [record for record in records if record["split"] != "train"]
    return Run(
        workdir=workdir,
        title=workdir.absolute().name,
        config=config,
        training=[record for record in records if record["split"] == "train"],
        evaluations=[record for record in evaluations if "weights" not in record],
        ema_evaluations=[record for record in evaluations if record.get("weights") == "ema"],
        environment=_read_environment(workdir / "environment.json"),
    )


def _read_records(path: Path) -> list[Record]:
    try:
        lines = path.read_text().splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; train first") from error
    # The last line of a run that goes on may be half there.
    whole = [line for line in lines if line.endswith("\n")]
    try:
        records = [json.loads(line) for line in whole]
        if any(not {"step", "split", "loss", "top1"} <= record.keys() for record in records):
            raise ValueError("a record lacks step, split, loss or top1")
        numbers = [record[name] for record in records for name in ("step", "loss", "top1")]
        if not all(isinstance(each, int | float) for each in numbers):
            raise ValueError("a step, loss or top1 is no number")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is not what a run writes ({error})") from error
    if not records:
        raise ConfigError(f"{path} has no record yet; let the run train for a while")
    return records


def _read_environment(path: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, RecursionError):  # runs of before it was noted
        return {}
