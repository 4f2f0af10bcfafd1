"""The range test: it trains as a run does, and its curve is read as it should be."""

import csv
import dataclasses
import itertools
import threading
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax import config as c
from resnet_jax.cli import parser
from resnet_jax.errors import ConfigError, DataError
from resnet_jax.training import rate_range
from resnet_jax.training.loop import train
from resnet_jax.training.rate_range import RateCurve, find_rate
from tests.training.runs import records

pytestmark = pytest.mark.usefixtures("tiny_model")

RATES = np.geomspace(1e-4, 10, 51)  # ten steps for each factor of 10
FALL = [2.0] * 21 + [1.9, 1.7, 1.2, 0.9, 0.8] + [0.7] * 5
FLAGS = (
    "--config.model.name=tiny",
    "--config.data.image_size=8",
    "--config.train.batch_size=48",
    "--low=1e-4",
    "--steps=51",
)


def configuration(**changes):
    config = c.Config(
        model=c.Model(name="tiny"),
        data=c.Data(name="digits", image_size=8, threads=2),
        augment=c.Augment(pad=1, rotate=5.0, flip_alternates=True),
        train=c.Train(batch_size=48),
        log=c.Log(every_steps=1, tensorboard=False),
    )
    return dataclasses.replace(config, **changes)


OPTIMIZER = c.Optimizer(learning_rate=0.025, base_batch=24, nesterov=True, weight_decay=1e-2)


@pytest.fixture(scope="module")
def losses_at_one_rate(tmp_path_factory, tiny_model):
    """Of a run with a constant schedule."""
    workdir = tmp_path_factory.mktemp("constant")
    config = configuration(optimizer=OPTIMIZER, schedule=c.Schedule(name="constant"))
    config.train.steps = 20
    train(config, workdir)
    return [x["loss"] for x in records(workdir) if x["split"] == "train"]


def test_a_rise_at_the_start_leaves_nothing_to_suggest():
    """As with a `low` that is too high already."""
    losses = [3.0, 1.0, 1.0, 1.0] + [3.5] * 30
    curve = RateCurve.of(np.geomspace(0.1, 10, len(losses)), losses, window=8)
    assert np.isnan([curve.steepest, curve.lowest]).all()


@pytest.mark.parametrize(
    "unused",
    [
        {"schedule": c.Schedule(name="plateau", patience=1)},
        pytest.param(
            {
                "schedule": c.Schedule(name="step", boundaries=(0.1, 0.2), warmup_epochs=3.0),
                "train": c.Train(batch_size=48, steps=2, steps_per_call=2, ema_decay=0.9),
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_takes_the_steps_of_a_training(unused, losses_at_one_rate):
    optimizer = dataclasses.replace(OPTIMIZER, learning_rate=7.0)
    tested = configuration(optimizer=optimizer, **unused)
    before = c.to_json(tested)
    curve = find_rate(tested, 0.025, 0.025 * (1 + 1e-6), 20, log=lambda line: None)
    np.testing.assert_allclose(curve.losses, losses_at_one_rate, rtol=1e-3)
    assert curve.scale == 2
    assert c.to_json(tested) == before


def test_the_rate_rises_from_step_to_step(monkeypatch):
    taken = []

    def spy(config, length, schedule):
        taken.append(np.array(schedule(np.arange(20))))
        return make_optimizer(config, length, schedule)

    make_optimizer = rate_range.make_optimizer
    monkeypatch.setattr(rate_range, "make_optimizer", spy)
    config = configuration(optimizer=c.Optimizer(base_batch=24))
    first = find_rate(config, 1e-3, 1.0, 20, log=lambda line: None)
    np.testing.assert_allclose(taken[0], 2 * first.rates, rtol=1e-5)
    np.testing.assert_allclose(first.rates, np.geomspace(1e-3, 1.0, 20))
    second = find_rate(config, 1e-3, 1.0, 20, log=lambda line: None)
    np.testing.assert_array_equal(first.losses, second.losses)


def test_the_fastest_fall_and_the_least_loss():
    curve = RateCurve.of(RATES, FALL + [3.0] * 20, window=1)
    assert curve.steepest == RATES[23]
    assert curve.lowest == RATES[26]


def test_a_second_fall_after_the_first_clear_rise_is_not_taken():
    losses = FALL + [3.0] * 5 + [2.0, 1.0, 0.1] + [0.1] * 12
    for window in (1, 2, 4):
        curve = RateCurve.of(RATES, losses, window)
        assert RATES[22] <= curve.steepest <= RATES[25]
        assert RATES[26] <= curve.lowest <= RATES[31]


def test_noise_is_no_rise():
    noise = 0.2 * np.random.default_rng(0).standard_normal(51)
    losses = [2.0] * 16 + [*np.linspace(2.0, 0.5, 30)] + [5.0] * 5 + noise
    curve = RateCurve.of(RATES, losses, window=8)
    assert RATES[18] < curve.steepest < RATES[44]


@pytest.mark.parametrize(
    "losses", [[], [2.0], [2.0] * 51, [2.0] * 40 + [9.0] * 11, [*np.linspace(2.0, 3.0, 51)]]
)
def test_without_a_clear_fall_nothing_is_suggested(losses):
    curve = RateCurve.of(RATES[: len(losses)], losses, window=2)
    assert np.isnan(curve.steepest)
    assert np.isnan(curve.lowest)


NAN = float("nan")


@pytest.mark.parametrize(
    ("results", "scaled", "expected"),
    [
        ([(2, 0), (1, 0)], False, ([2, 1], "")),
        ([(2, 0), (NAN, 1), (1, 0)], False, ([2], "the loss is not a number")),
        ([(2, 0), (2, 1), (1, 0)], False, ([2], "the update is not finite")),
        ([(2, 1), (2, 1), (2, 0), (1, 0)], True, ([2, 1], "")),
        ([(2, 1)] * 4, True, ([], "the update is not finite")),
        ([(1, 0), (9, 0), (1, 0)], False, ([1, 9], "4 times its minimum")),
    ],
)
def test_where_it_ends(results, scaled, expected):
    """Results of steps are (loss, skipped); float16 skips steps until its scale fits."""
    left = iter(results)

    def step(state, batch):
        loss, skipped = next(left)
        return state, {"loss": jnp.float32(loss), "skipped": jnp.float32(skipped)}

    state = types.SimpleNamespace(loss_scale=object() if scaled else None)
    config = c.Config(train=c.Train(max_skipped=3))
    losses, end = rate_range._train(config, state, step, results, window=1)
    assert losses == expected[0]
    assert end.endswith(expected[1])
    assert bool(end) == bool(expected[1])


@pytest.mark.parametrize(
    ("low", "high", "steps", "message"),
    [
        (0.0, 1.0, 100, "low = 0 and high = 1: must rise and lie above 0"),
        (1.0, 0.1, 100, "low = 1 and high = 0.1: must rise"),
        (NAN, 1.0, 100, "low = nan and high = 1: must rise"),
        (
            0.1,
            float("inf"),
            100,
            "low = 0.1 and high = inf: must rise and lie above 0 and up to 1,000,000",
        ),
        (0.1, 1.0, 19, "steps = 19: a range test takes 20 to 100,000"),
    ],
)
def test_ranges_that_make_no_sense(low, high, steps, message):
    with pytest.raises(ConfigError, match=message):
        find_rate(configuration(), low, high, steps)


def test_broken_images_are_counted_as_in_training(tmp_path):
    for split, name in itertools.product(("train", "test"), ("a", "b")):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8), 40 * index).save(folder / f"{index}.png")
    (tmp_path / "train" / "a" / "4.png").write_bytes(b"broken")
    config = configuration(train=c.Train(batch_size=8))
    config.data = c.Data(name=f"folder:{tmp_path}", image_size=8, crop="random_resized", threads=2)
    lines = []
    find_rate(config, 1e-4, 1e-3, 20, log=lines.append)
    assert [line for line in lines if line.startswith("skipped")]
    config.data.max_corrupt = 0
    with pytest.raises(DataError, match="max_corrupt = 0"):
        find_rate(config, 1e-4, 1e-3, 20, log=lines.append)
    threads = [each.name for each in threading.enumerate()]
    assert not [name for name in threads if name.startswith("decode")]


@pytest.fixture
def measured(monkeypatch):
    """What the steps of a test give, instead of a training."""
    found = [[*FALL, *[3.0] * 20], ""]
    monkeypatch.setattr(rate_range, "_train", lambda *arguments: found)
    return found


def test_the_command(tmp_path, capsys, monkeypatch, measured):
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, "--config.optimizer.base_batch=24"]
    assert parser.main(["find_rate", *flags]) == 0
    out, err = capsys.readouterr()
    assert out == "--config.optimizer.learning_rate=0.02\n"
    assert "falls fastest at 0.02; before its first rise it is lowest at 0.1, a tenth" in err
    assert "a tenth of which is 0.01; the curve is in rate.png" in err
    assert "train.batch_size multiplies them by 2" in err
    assert (tmp_path / "rate.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "rate.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [float(row["optimizer.learning_rate"]) for row in rows]
    np.testing.assert_allclose(found, RATES, rtol=1e-5)
    assert [float(row["loss"]) for row in rows] == measured[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rate.csv", "rate.png"]

    assert parser.main(["find_rate", *FLAGS]) == 2
    assert "error: --output=rate.png: exists; give --force" in capsys.readouterr().err
    measured[:] = [[2.0], "the loss is not a number"]
    assert parser.main(["find_rate", *FLAGS, "--output=rate.csv", "--force"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-2] == "ended after the rate 0.0001: the loss is not a number"
    assert err.splitlines()[-1].startswith("error: no rate to suggest")
    assert len((tmp_path / "rate.csv").read_text().splitlines()) == 2


def test_a_test_that_is_interrupted_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(rate_range, "_train", interrupted)
    assert parser.main(["find_rate", *FLAGS, f"--output={tmp_path}/rate.png"]) == 75
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped: interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=rate.pdf"], "--output=rate.pdf: must end in .png, or in .csv"),
        (["--output=no/rate.png"], "--output=no/rate.png: cannot be written"),
        (["--steps=1"], "steps = 1: a range test takes 20"),
        (["--low=x"], "--low"),
        (["--config.optimizer.learning_rat=1"], "unknown field"),
        (["--config.train.batch_size=0"], "train.batch_size = 0"),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parser.main(["find_rate", *FLAGS, *flags]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert message in err[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_curve_without_a_step_is_drawn_too():
    from resnet_jax.report.drawing import to_png
    from resnet_jax.report.figures import rate_curve

    assert to_png(rate_curve(RateCurve.of([], [], 8), "nothing")).startswith(b"\x89PNG")
