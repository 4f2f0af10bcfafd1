"""`evaluate.also` in a run: its records, and a restart that fills what is missing."""

import json

import pytest

import resnet_jax as rj
from resnet_jax.config import schema as c
from resnet_jax.training.loop import train
from resnet_jax.workdirs.evaluations import Evaluations

ALSO = ("digits:train[:20]", "digits:test[:30]")


def configuration(*also):
    return c.Config(
        model=c.Model(name="tiny"),
        data=c.Data(image_size=8, threads=2),
        augment=c.Augment(mean=(0.3,), std=(0.38,)),
        train=c.Train(steps=4, batch_size=32, ema_decay=0.5),
        evaluate=c.Evaluate(every_epochs=2 * 32 / 1437, also=also),
        log=c.Log(tensorboard=False),
    )


def evaluations(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    for record in lines:
        record.pop("images_per_second", None)
        del record["time"]
        if record["kind"] == "evaluation":
            yield record


def test_records_and_restart(tmp_path, tiny_model):
    result = train(configuration(*ALSO), tmp_path / "run")
    found = [*evaluations(tmp_path / "run")]
    splits = [(each["step"], each["split"], each.get("weights", "")) for each in found]
    names = [("test", ""), ("test", "ema"), *((name, w) for w in ("", "ema") for name in ALSO)]
    assert splits == [(step, *name) for step in (2, 4) for name in names]
    plain = train(configuration(), tmp_path / "plain")
    assert plain.metrics == result.metrics
    assert [each for each in found if each["split"] == "test"] == [*evaluations(tmp_path / "plain")]
    of_run, of_plain = map(Evaluations.of_workdir, (tmp_path / "run", tmp_path / "plain"))
    assert (of_run.best, of_run.best_value) == (of_plain.best, of_plain.best_value)
    # A run that ended between two evaluations writes what is missing, and nothing twice.
    path = tmp_path / "run/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    assert len([*evaluations(tmp_path / "run")]) == len(found) - 2
    train(configuration(*ALSO), tmp_path / "run")
    assert [*evaluations(tmp_path / "run")] == found


def test_a_mistake_before_anything_is_written(tmp_path, tiny_model):
    with pytest.raises(rj.DataError, match=r"^evaluate\.also = 'tfds:nothing:test': "):
        train(configuration("tfds:nothing:test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
