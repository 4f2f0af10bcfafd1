"""metrics.jsonl, read back: the records of a run, and how many of its lines are none."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from resnet_jax.errors import ConfigError
from resnet_jax.files import MIB, open_regular

Record = dict[str, Any]

_LARGEST_FILE = 256 * MIB
_MOST_RECORDS, _MOST_BAD = 2**20, 10_000
LARGEST_STEP = 2**53  # beyond it floats skip integers
_LARGEST_NUMBER = 2.0**128  # beyond what float32 holds
TRAINING, EVALUATION = "training", "evaluation"  # values of "kind"
_ALWAYS = ("top1",)
# An evaluation on images with several labels (ReaL) has no loss.
_IN_TRAINING = ("loss", "learning_rate", "images_per_second")
_SOMETIMES = (
    *("top5", "map", "f1", "f1_micro", "epoch", "images", "mfu", "skipped"),
    *_IN_TRAINING,
)


class Records(NamedTuple):
    """What a metrics.jsonl holds.

    Args:
      good: The records, by step.
      bad: Number of lines that are no records.
    """

    good: list[Record]
    bad: int


def parse_record(line: bytes) -> Record | None:
    """Parses a line of metrics.jsonl.

    Args:
      line: With its newline.

    Returns:
      The record; None where the line is not one that a run writes, or is cut off.

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
    record = {name: value for name, value in record.items() if value is not None}  # was no number
    return record if _is_valid(record) else None


def _is_valid(record: Record) -> bool:
    step, split = record.get("step"), record.get("split")
    # Weights that a run starts from are evaluated as step 0.
    least = 0 if record.get("kind") == EVALUATION else 1
    if type(step) is not int or not least <= step <= LARGEST_STEP:
        return False
    if not isinstance(split, str) or not split:
        return False
    if record.get("kind", TRAINING) not in (TRAINING, EVALUATION):
        return False
    training = is_training(record)
    needed = [*_ALWAYS, *(_IN_TRAINING if training else ())]
    numbers = {*needed, *(name for name in _SOMETIMES if name in record)}
    if not all(is_number(record.get(name)) for name in numbers):
        return False
    return not training or record["images_per_second"] > 0


def is_training(record: Record) -> bool:
    """Whether a record is of training steps; otherwise it is of an evaluation.

    A run may be evaluated on the split that it trains on. Records of before "kind" was written
    are told by their split.

    Example:
      >>> is_training({"split": "train"}), is_training({"split": "train", "kind": "evaluation"})
      (True, False)
    """
    kind = record.get("kind") or (TRAINING if record["split"] == "train" else EVALUATION)
    return bool(kind == TRAINING)


def series(record: Record) -> str:
    """The name of the curve that a record belongs to, in TensorBoard and the like.

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
    """Whether a value from JSON is a number that float32 could hold; NaN and infinity are not."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) < _LARGEST_NUMBER and not math.isnan(value)


def read_records(path: str | os.PathLike[str]) -> Records:
    """Reads a metrics.jsonl, which a run may still be writing.

    Args:
      path: The file.

    Returns:
      Its records. The last line does not count as bad where it is only not complete yet.

    Raises:
      ConfigError: It cannot be read.
    """
    good, bad = [], 0
    try:
        with open_regular(path, _LARGEST_FILE) as file:
            for line in file:
                record = parse_record(line)
                if record is not None:
                    good.append(record)
                elif line.endswith(b"\n"):
                    bad += 1
                if len(good) > _MOST_RECORDS or bad > _MOST_BAD:
                    raise ConfigError(f"{path} has more lines than any run writes; restore it")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; train first") from error
    return Records(sorted(good, key=lambda record: record["step"]), bad)


def read_evaluations(path: Path) -> list[Record]:
    """Reads the evaluation records of a metrics.jsonl.

    Args:
      path: The file.

    Returns:
      The records, in the order of the file.

    Raises:
      OSError: It cannot be read.
    """
    with open_regular(path, _LARGEST_FILE) as file:
        lines = (line for line in file if b'"step"' in line)  # millions may be no records
        found = filter(None, map(parse_record, lines))
        return [record for record in found if not is_training(record)]


def split_at(path: Path, step: int) -> tuple[bytes, bytes]:
    """Splits metrics.jsonl where a run goes on.

    Args:
      path: The file.
      step: Completed steps of the state that the run goes on from.

    Returns:
      The lines of records up to that step, and whole lines that are no records.

    Raises:
      OSError: It cannot be read.
    """
    kept, bad = [], []
    with open_regular(path, _LARGEST_FILE) as file:
        for line in file:
            record = parse_record(line)
            if record is None:
                bad += [line] if line.endswith(b"\n") else []
            elif record["step"] <= step > 0:  # a run that starts anew evaluates its start anew
                kept.append(line)
    return b"".join(kept), b"".join(bad)
