"""Which state is the best and whether a run still improves, by the records of its evaluations."""

import json
import math

import pytest

from resnet_jax import config as c
from resnet_jax.errors import ConfigError
from resnet_jax.workdirs.evaluations import EMA, RAW, Evaluations


def record(step, split="test", weights="", **metrics):
    kind = {"weights": weights} if weights else {}
    return {"step": step, "split": split, "kind": "evaluation", **kind, **metrics}


def evaluations(metric, *values, **options):
    found = Evaluations(metric, **options)
    for index, value in enumerate(values, start=1):
        found.add(record(10 * index, **{metric: value}))
    return found


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("top1", (0.1, 0.4, 0.3), 20),
        ("top5", (0.4, 0.4, 0.3), 20),  # the later of two that are as good
        ("loss", (0.1, 0.4, 0.3), 10),
        ("map", (0.1, math.nan, 0.3), 30),
        ("f1", (math.nan,), None),
        ("top1", (), None),
    ],
)
def test_the_best(metric, values, best):
    assert evaluations(metric, *values).best == best


def test_a_metric_that_is_not_measured_makes_no_state_the_best():
    assert evaluations("top1", 0.1, 0.2).best == 20
    found = Evaluations("map")
    found.add(record(10, top1=0.1))
    assert found.best is None
    assert found.since_improved() == 0


def test_a_moving_average_stands_for_its_state():
    found = Evaluations(ema=True)
    assert found.missing(10) == [RAW, EMA]
    found.add(record(10, top1=0.9))
    assert found.missing(10) == [EMA]
    assert found.best is None  # it may yet be a bad one
    found.add(record(10, top1=0.2, weights=EMA))
    assert found.missing(10) == []
    assert found.score(10) == 0.2
    found.add(record(20, top1=0.1))
    found.add(record(20, top1=0.3, weights=EMA))
    assert found.best == 20


def test_records_of_another_split_do_not_count():
    found = Evaluations(split="val")
    found.add(record(10, "test", top1=0.9))
    assert found.missing(10) == [RAW]
    assert found.best is None


@pytest.mark.parametrize(
    ("metric", "least", "values", "count"),
    [
        ("top1", 0.0, (0.1, 0.2, 0.3), 0),
        ("top1", 0.0, (0.3, 0.3, 0.2), 2),
        ("loss", 0.0, (0.3, 0.2, 0.2), 1),
        ("loss", 0.0, (0.2, 0.3, 0.1, 0.4, 0.4), 2),
        ("top1", 0.25, (0.25, 0.5, 0.375), 2),
        ("top1", 0.25, (0.25, 0.375, 0.5, 0.625), 0),  # slowly, but by more than so much
        ("top1", 0.0, (0.3, math.nan, 0.4), 0),
        ("top1", 0.0, (), 0),
    ],
)
def test_evaluations_without_improvement(metric, least, values, count):
    assert evaluations(metric, *values).since_improved(least) == count


def test_what_process_0_tells_is_what_it_knows():
    mine, theirs = Evaluations(ema=True), Evaluations(ema=True)
    for weights in (RAW, EMA):
        mine.add(record(10, weights=weights, top1=0.1, top5=0.4, loss=2.0, images=7))
    for each in json.loads(json.dumps(mine.records(10))):
        theirs.add(each)
    assert theirs.records(10) == mine.records(10)
    assert theirs.missing(10) == []


def stored(folder, config, *records):
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    lines = [json.dumps({"loss": 1.0, "top1": 0.5, **each}) + "\n" for each in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return Evaluations.of_workdir(folder)


def test_a_workdir_says_what_it_is_ranked_by(tmp_path):
    records = [record(1, loss=0.1), record(2, top1=0.9), record(3, "val", top1=1.0)]
    assert stored(tmp_path, {}, *records).best == 2
    assert stored(tmp_path, {"checkpoint": {"best_metric": "loss"}}, *records).best == 1
    assert stored(tmp_path, {"data": {"eval_split": "val"}}, *records).best == 3
    assert stored(tmp_path, {"train": {"ema_decay": 0.9}}, *records).best is None
    assert stored(tmp_path, c.to_json(c.Config()), *records).best == 2
    (tmp_path / "metrics.jsonl").unlink()
    assert Evaluations.of_workdir(tmp_path).best is None


@pytest.mark.parametrize(
    "config",
    [
        {"checkpoint": None, "data": [], "train": "x"},
        {"data": {"eval_split": ["test"]}, "train": {"ema_decay": "much"}},
        {"train": {"ema_decay": math.nan}},
    ],
)
def test_a_configuration_of_a_stranger(config, tmp_path):
    assert stored(tmp_path, config, record(1)).best in (1, None)


@pytest.mark.parametrize("metric", ["accuracy", ["top1"], 3, "x" * 9_999])
def test_a_metric_of_a_stranger(metric, tmp_path):
    with pytest.raises(
        ConfigError, match=r"checkpoint\.best_metric = .*: must be one of"
    ) as caught:
        stored(tmp_path, {"checkpoint": {"best_metric": metric}})
    assert len(str(caught.value)) < 500


def test_records_of_a_stranger(tmp_path):
    odd = [record(1, top1=0.9) | {"weights": weights} for weights in ([], {}, "other", 3)]
    assert stored(tmp_path, {}, *odd, record(2)).best == 2
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be read"):
        Evaluations.of_workdir(tmp_path)


def test_splits_that_a_state_was_not_evaluated_on():
    """Records of evaluate.also reach the other processes, and choose no state."""
    evaluations = Evaluations("top1", "test", ema=True)
    splits = ["digits:train", "digits:test"]
    for step, split, weights in ((4, "digits:test", ""), (4, "digits:train", "ema")):
        record = {"step": step, "split": split, "top1": 1.0}
        evaluations.add({**record, "weights": weights} if weights else record)
    other = Evaluations("top1", "test", ema=True)
    for record in evaluations.records(4):
        other.add(record)
    for each in (evaluations, other):
        assert each.missing_splits(4, "", splits) == ["digits:train"]
        assert each.missing_splits(4, "ema", splits) == ["digits:test"]
        assert each.missing_splits(2, "", splits) == splits
        assert each.best is None
        assert each.missing(4) == ["", "ema"]
