"""The records in metrics.jsonl, and how to read them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from resnet_jax.errors import ConfigError
from resnet_jax.files import MIB, open_regular

Record = dict[str, Any]

_MAX_BYTES = 256 * MIB
_MAX_RECORDS, _MAX_BAD = 2**20, 10_000
LARGEST_STEP = 2**53  # floats skip larger integers
_MAX_NUMBER = 2.0**128  # float32 is smaller
TRAINING, EVALUATION = "training", "evaluation"  # values of "kind"
_REQUIRED = ("top1",)
# An evaluation of images with several labels (ReaL) has no loss.
_REQUIRED_IN_TRAINING = ("loss", "learning_rate", "images_per_second")
_OPTIONAL = (
    *("top5", "map", "f1", "f1_micro", "epoch", "images", "mfu", "skipped"),
    *_REQUIRED_IN_TRAINING,
)


class Records(NamedTuple):
    """The content of a metrics.jsonl: records sorted by step, and the number of other lines."""

    good: list[Record]
    bad: int


def parse_record(line: bytes) -> Record | None:
    """Parses a line of metrics.jsonl, with its newline; None if it is not a complete record.

    Example:
      >>> parse_record(b'{"step": 3, "split": "test", "loss": 0.5, "top1": 0.8}\\n')["step"]
      3
      >>> parse_record(b'{"step": "3", "split": "test", "loss": 0.5, "top1": 0.8}\\n') is None
      True
    """
    try:
        record = json.loads(line.decode("utf-8")) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    record = {name: value for name, value in record.items() if value is not None}  # NaN or infinity
    return record if _is_valid(record) else None


def _is_valid(record: Record) -> bool:
    step, split = record.get("step"), record.get("split")
    # The initial weights are evaluated as step 0.
    least = 0 if record.get("kind") == EVALUATION else 1
    if type(step) is not int or not least <= step <= LARGEST_STEP:
        return False
    if not isinstance(split, str) or not split:
        return False
    if record.get("kind", TRAINING) not in (TRAINING, EVALUATION):
        return False
    training = is_training(record)
    required = [*_REQUIRED, *(_REQUIRED_IN_TRAINING if training else ())]
    numbers = {*required, *(name for name in _OPTIONAL if name in record)}
    if not all(is_number(record.get(name)) for name in numbers):
        return False
    return not training or record["images_per_second"] > 0


def is_training(record: Record) -> bool:
    """Whether a record is about training steps and not about an evaluation.

    A run may evaluate the split that it trains on. Old records without "kind" are distinguished by
    their split.

    Example:
      >>> is_training({"split": "train"}), is_training({"split": "train", "kind": "evaluation"})
      (True, False)
    """
    kind = record.get("kind") or (TRAINING if record["split"] == "train" else EVALUATION)
    return bool(kind == TRAINING)


def series(record: Record) -> str:
    """The name of a record's curve in TensorBoard and Weights & Biases.

    Example:
      >>> series({"split": "test", "weights": "ema"})
      'test_ema'
      >>> series({"split": "train", "kind": "evaluation"})
      'train_evaluation'
    """
    name = record["split"]
    if name == "train" and not is_training(record):
        name += "_evaluation"
    return f"{name}_ema" if record.get("weights") == "ema" else str(name)


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number in the range of float32."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) < _MAX_NUMBER and not math.isnan(value)


def read_records(path: str | os.PathLike[str]) -> Records:
    """Reads a metrics.jsonl, which a run may be writing: an incomplete last line is ignored.

    Raises:
      ConfigError: The file cannot be read.
    """
    good, bad = [], 0
    try:
        with open_regular(path, _MAX_BYTES) as file:
            for line in file:
                record = parse_record(line)
                if record is not None:
                    good.append(record)
                elif line.endswith(b"\n"):
                    bad += 1
                if len(good) > _MAX_RECORDS or bad > _MAX_BAD:
                    raise ConfigError(
                        f"{path} has more lines than any run writes; restore it from a copy"
                    )
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; train first") from error
    return Records(sorted(good, key=lambda record: record["step"]), bad)


def read_evaluations(path: Path) -> list[Record]:
    """Reads the evaluation records of a metrics.jsonl, in their order."""
    with open_regular(path, _MAX_BYTES) as file:
        lines = (line for line in file if b'"step"' in line)  # skips other lines fast
        found = filter(None, map(parse_record, lines))
        return [record for record in found if not is_training(record)]


def split_at(path: Path, step: int) -> tuple[bytes, bytes]:
    """Splits metrics.jsonl for a run that resumes from `step`.

    Returns:
      The lines of records up to that step, and complete lines that are not records. Later records
      are in neither.
    """
    kept, bad = [], []
    with open_regular(path, _MAX_BYTES) as file:
        for line in file:
            record = parse_record(line)
            if record is None:
                bad += [line] if line.endswith(b"\n") else []
            elif record["step"] <= step > 0:  # a new run evaluates its start again
                kept.append(line)
    return b"".join(kept), b"".join(bad)
