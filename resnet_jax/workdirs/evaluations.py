"""The evaluations of a run: which state is the best, and whether the run still improves.

Both follow from the evaluation records in metrics.jsonl, so a resumed run decides like one that was
never interrupted. A state is saved before it is evaluated and never rewritten, so its metrics are
in that file only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from resnet_jax.config.schema import MEASURES, Config
from resnet_jax.errors import ConfigError
from resnet_jax.workdirs.description import read_json
from resnet_jax.workdirs.records import Record, is_number, read_evaluations

# Names of the moving average and of the parameters in records, which omit the latter.
EMA, RAW = "ema", ""
Metrics = Mapping[str, Any]


class Evaluations:
    """The metrics of evaluated states.

    An evaluation is complete when all weights of a state are evaluated: the parameters and, if the
    run has one, their moving average, which then represents the state.

    Args:
      metric: One of `MEASURES`, which ranks the states.
      split: The evaluated split; records of other splits are ignored.
      ema: Whether states have a moving average.

    Example:
      >>> evaluations = Evaluations("loss", "test", ema=False)
      >>> for step, loss in ((10, 0.9), (20, 0.4), (30, 0.5)):
      ...     evaluations.add({"step": step, "split": "test", "loss": loss})
      >>> evaluations.best, evaluations.since_improved(), evaluations.missing(40)
      (20, 1, [''])
    """

    def __init__(self, metric: str = "top1", split: str = "test", ema: bool = False) -> None:
        self.metric = metric
        self.weights = [RAW, EMA] if ema else [RAW]
        self._split = split
        self._found: dict[int, dict[str, dict[str, float]]] = {}  # step -> weights -> metrics
        self._others: dict[int, list[Record]] = {}  # step -> records of other splits

    @classmethod
    def of(cls, config: Config) -> Evaluations:
        """The evaluations of a new run: none yet."""
        return cls(
            config.checkpoint.best_metric, config.data.eval_split, config.train.ema_decay > 0
        )

    @classmethod
    def of_workdir(cls, workdir: Path) -> Evaluations:
        """Reads the evaluations of a run on disk, which an older version may have written."""
        path = workdir / "config.json"
        stored = read_json(path) if path.exists() else {}
        metric = _field(stored, "checkpoint", "best_metric", Config().checkpoint.best_metric)
        if metric not in MEASURES:
            raise ConfigError(
                f"{path}: checkpoint.best_metric = {json.dumps(metric)[:100]}: must be one of "
                f"{', '.join(MEASURES)}"
            )
        split = _field(stored, "data", "eval_split", Config().data.eval_split)
        decay = _field(stored, "train", "ema_decay", Config().train.ema_decay)
        found = cls(metric, split, is_number(decay) and decay > 0)
        found.read(workdir / "metrics.jsonl")
        return found

    def read(self, path: Path, newest: float = math.inf) -> None:
        """Adds the records of a metrics.jsonl, if it exists, up to the step `newest`."""
        try:
            records = read_evaluations(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}); restore it from a copy"
            ) from error
        for record in records:
            if record["step"] <= newest:
                self.add(record)

    def add(self, record: Record) -> None:
        """Adds an evaluation record; one of step 0 does not count, which no state is saved of."""
        step, weights = record["step"], record.get("weights", RAW)
        if not step or weights not in (RAW, EMA):
            return
        if record["split"] != self._split:
            self._others.setdefault(step, []).append(record)
            return
        metrics = {name: record[name] for name in MEASURES if is_number(record.get(name))}
        self._found.setdefault(step, {})[weights] = metrics

    def missing(self, step: int) -> list[str]:
        """The weights of a state that have not been evaluated: a part of `self.weights`."""
        return [each for each in self.weights if self.metrics(step, each) is None]

    def missing_splits(self, step: int, weights: str, splits: Collection[str]) -> list[str]:
        """Those of some other splits that the weights of a state have not been evaluated on."""
        found = {
            record["split"]
            for record in self._others.get(step, ())
            if record.get("weights", RAW) == weights
        }
        return [split for split in splits if split not in found]

    def metrics(self, step: int, weights: str) -> dict[str, float] | None:
        """The metrics of the weights of a state; None if they were not evaluated."""
        return self._found.get(step, {}).get(weights)

    def score(self, step: int, stored: Metrics | None = None) -> float:
        """A number that is higher for better states; -inf for one without metrics.

        Args:
          step: Completed steps of the state.
          stored: Metrics to use if its evaluation is not complete.
        """
        if not self.missing(step):
            stored = self.metrics(step, self.weights[-1])
        value: Any = stored.get(self.metric) if isinstance(stored, Mapping) else None
        if not is_number(value):
            return -math.inf
        return -float(value) if self.metric == "loss" else float(value)

    @property
    def best(self) -> int | None:
        """Step of the best state, the later one of a tie; None if no state was evaluated."""
        return max(self._scored(), key=lambda step: (self.score(step), step), default=None)

    @property
    def best_value(self) -> float:
        """The metric of the best state; NaN if no state was evaluated."""
        return math.nan if self.best is None else abs(self.score(self.best))

    def since_improved(self, least: float = 0.0) -> int:
        """Counts the evaluations since the last one that improved the best by more than `least`."""
        best, count = -math.inf, 0
        for step in self._scored():
            if self.score(step) > best + least:
                best, count = self.score(step), 0
            else:
                count += 1
        return count

    def records(self, step: int) -> list[Record]:
        """The records of a step that are known, as `add` accepts them."""
        found = self._found.get(step, {})
        return [
            {"step": step, "split": self._split, "weights": weights, **metrics}
            for weights, metrics in found.items()
        ] + self._others.get(step, [])

    def _scored(self) -> Collection[int]:
        return [step for step in sorted(self._found) if self.score(step) > -math.inf]


def _field(stored: Mapping[str, Any], section: str, name: str, default: Any) -> Any:
    part = stored.get(section)
    return part.get(name, default) if isinstance(part, dict) else default
