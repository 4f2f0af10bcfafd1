"""Whole runs on the digits: what they write, how they go on, how they fail."""

import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.cli import parser
from resnet_jax.data.memory import InMemoryDataset
from resnet_jax.distributed.accelerators import ACCELERATORS
from resnet_jax.errors import ConfigError, DataError, DivergedError, StoppedError
from resnet_jax.report.runs import read_run
from resnet_jax.training import metrics as metrics_module
from resnet_jax.training import run as run_module
from resnet_jax.training import state_evaluator
from resnet_jax.training import step as step_module
from resnet_jax.training.loop import train
from resnet_jax.training.metrics import MetricAccumulator
from resnet_jax.workdirs.checkpoint import load_variables
from resnet_jax.workdirs.workdir import saved_steps
from tests.conftest import FAST_COMPILE
from tests.training.runs import records, state_of, stop_after, without_times

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("tiny_model")


def configuration(**changes):
    """Six steps of a small network on digits of 8x8 pixels, evaluated twice."""
    config = c.Config(
        model=c.Model(name="tiny"),
        data=c.Data(name="digits", image_size=8, threads=2),
        augment=c.Augment(pad=1),
        train=c.Train(steps=6, batch_size=48, ema_decay=0.5),
        evaluate=c.Evaluate(every_epochs=3 * 48 / 1437),
        log=c.Log(every_steps=2, tensorboard=False),
    )
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_model):
    """A run without interruption."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, train(configuration(), workdir)


@pytest.mark.accelerators
def test_what_a_run_writes(straight, accelerator):
    workdir, result = straight
    assert result.steps == 6
    found = records(workdir)
    training = [record for record in found if record["split"] == "train"]
    assert [record["step"] for record in training] == [2, 3, 4, 6]
    times = [datetime.datetime.fromisoformat(record["time"]) for record in found]
    assert times == sorted(times)
    assert times[0].utcoffset() == datetime.timedelta(0)
    for record in training:
        assert ("mfu" in record) == (accelerator != "cpu")
        assert record.keys() >= {
            "loss",
            "top1",
            "top5",
            "learning_rate",
            "epoch",
            "images_per_second",
            "skipped",
        }
    evaluated = [(r["step"], r.get("weights")) for r in found if r["split"] == "test"]
    assert evaluated == [(3, None), (3, "ema"), (6, None), (6, "ema")]
    assert found[-1]["images"] == 360
    assert result.metrics["top1"] == found[-1]["top1"]
    assert 0 <= found[-1]["top1"] <= found[-1]["top5"] <= 1
    stored = json.loads((workdir / "config.json").read_text())
    assert stored == json.loads(c.to_json(configuration()))
    assert (workdir / "checkpoints" / "6").is_dir()
    assert json.loads((workdir / "classes.json").read_text()) == [str(n) for n in range(10)]


def test_a_workdir_is_a_weight_file(straight):
    workdir, _ = straight
    model = rj.create_model("tiny")
    variables = rj.load_weights(model, workdir)
    name, stored, _ = load_variables(workdir)
    assert name == "tiny"
    chex.assert_trees_all_equal(variables, stored)
    other = rj.load_weights(rj.create_model("tiny", num_classes=3), workdir, reset_head=True)
    chex.assert_shape(other["params"]["head"]["kernel"], (16, 3))
    with pytest.raises(rj.WeightsError, match="not this model's"):
        rj.load_weights(rj.ResNet32(), workdir)


@pytest.mark.accelerators
@pytest.mark.parametrize(
    "steps", [pytest.param(2, marks=pytest.mark.slow), 5]
)  # at a record, between
def test_a_stopped_run_ends_as_one_that_was_not(steps, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(StoppedError, match=f"after step {steps}"):
            train(configuration(), tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with (tmp_path / "metrics.jsonl").open("a") as file:  # as after a kill: records of lost steps
        file.write('{"step": 99, "split": "train", "loss": 1.0}\n{"step": 5, "spl')
    result = train(configuration(), tmp_path)
    assert result.metrics == straight[1].metrics
    chex.assert_trees_all_equal(state_of(tmp_path), state_of(straight[0]))
    assert without_times(tmp_path) == without_times(straight[0])


@pytest.mark.accelerators
def test_several_steps_a_call(straight, tmp_path, monkeypatch):
    """The dataset lies on the devices; the loop looks at the same steps as before."""
    calls = []
    add = MetricAccumulator.add

    def adding(self, done, metrics):
        calls.append(done)
        add(self, done, metrics)

    monkeypatch.setattr(MetricAccumulator, "add", adding)
    train(configuration(train__steps_per_call=2), tmp_path)
    assert calls == [2, 3, 4, 6]  # 3 is evaluated, so 2 + 1 steps, and 4 is logged
    for found, expected in zip(records(tmp_path), records(straight[0]), strict=True):
        assert (found["step"], found["split"]) == (expected["step"], expected["split"])
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    chex.assert_trees_all_close(state_of(tmp_path), state_of(straight[0]), rtol=2e-3, atol=1e-5)


def test_steps_a_call_belong_to_the_run(straight, tmp_path):
    """Another number of them rounds differently, most of all in float16."""
    run = shutil.copytree(straight[0], tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train\.steps_per_call: 1 -> 2"):
        train(configuration(train__steps_per_call=2), run)


@pytest.mark.slow
def test_a_run_of_several_steps_a_call_goes_on_exactly(tmp_path, monkeypatch):
    changes = {"train__steps_per_call": 2, "augment__flip_alternates": True}
    expected = train(configuration(**changes), tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(StoppedError, match="after step 4"):
            train(configuration(**changes), tmp_path / "stopped")
    assert train(configuration(**changes), tmp_path / "stopped").metrics == expected.metrics
    chex.assert_trees_all_equal(state_of(tmp_path / "stopped"), state_of(tmp_path / "straight"))


def test_reading_a_workdir_changes_nothing_in_it(straight, tmp_path):
    """Another process may be writing there: its unfinished checkpoint stays."""
    shutil.copytree(straight[0], tmp_path / "run")
    unfinished = tmp_path / "run" / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    before = sorted(tmp_path.rglob("*"))
    rj.load_weights(rj.create_model("tiny"), tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_one_process_a_workdir(straight, tmp_path):
    from resnet_jax.workdirs.workdir import locked

    shutil.copytree(straight[0], tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(ConfigError, match="another process is training"):
        train(configuration(), tmp_path / "run")


def test_a_run_that_never_started_binds_nobody(tmp_path):
    with pytest.raises(DivergedError, match="no state was saved"):
        train(configuration(optimizer__learning_rate=1e20), tmp_path)
    assert train(configuration(), tmp_path).steps == 6
    assert [record["step"] for record in records(tmp_path)] == [2, 3, 3, 3, 4, 6, 6, 6]


def test_a_finished_run_is_only_evaluated(straight):
    workdir, result = straight
    before = (workdir / "metrics.jsonl").read_text()
    assert train(configuration(), workdir).metrics == result.metrics
    assert (workdir / "metrics.jsonl").read_text() == before


def test_another_configuration_is_refused_unless_allowed(straight):
    workdir, _ = straight
    before = (workdir / "config.json").read_text()
    changed = configuration(train__seed=1, optimizer__momentum=0.5)
    message = r"optimizer\.momentum: 0\.9 -> 0\.5; train\.seed: 0 -> 1"
    with pytest.raises(ConfigError, match=message):
        train(changed, workdir)
    assert (workdir / "config.json").read_text() == before


def test_a_workdir_of_another_model(straight, tmp_path):
    workdir, _ = straight
    changed = configuration(model__name="resnet20", checkpoint__allow_change=True)
    shutil.copytree(workdir, tmp_path / "copy")
    with pytest.raises(ConfigError, match="another model or optimizer"):
        train(changed, tmp_path / "copy")
    chex.assert_trees_all_equal(state_of(tmp_path / "copy"), state_of(workdir))
    for name in ("config.json", "metrics.jsonl"):
        assert (tmp_path / "copy" / name).read_bytes() == (workdir / name).read_bytes()


def test_divergence(tmp_path):
    config = configuration(optimizer__learning_rate=1e20)
    with pytest.raises(DivergedError, match="not a number at step"):
        train(config, tmp_path)


def poison(monkeypatch, *steps):
    """Makes loss and gradients of some steps no numbers."""
    gradients = step_module._gradients

    def poisoned(model, config, state, *rest):
        bad = jnp.isin(state.step, jnp.array(steps))
        found = gradients(model, config, state, *rest)
        return jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), found)

    monkeypatch.setattr(step_module, "_gradients", poisoned)


@pytest.mark.parametrize("steps_per_call", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_skipped_steps_are_counted(steps_per_call, tmp_path, monkeypatch):
    poison(monkeypatch, 0, 3, 4)
    train(configuration(train__steps_per_call=steps_per_call), tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    training = [record for record in records(tmp_path) if record["split"] == "train"]
    # Step 4, the only one since step 3, was skipped: its count is in the next record.
    counts = [(record["step"], record["skipped"]) for record in training]
    assert counts == [(2, 1), (3, 0), (6, 2)]
    state = state_of(tmp_path)
    assert state["step"] == 6
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_too_many_skipped_steps_in_a_row(tmp_path, monkeypatch):
    """The run ends as diverged; the last saved state stays, and the run can resume from it."""
    poison(monkeypatch, 3, 4, 5)
    config = configuration(train__max_skipped=1, checkpoint__every_steps=3)
    config.evaluate.every_epochs = 1.0
    with pytest.raises(DivergedError) as caught:
        train(config, tmp_path)
    message = "is not a number at step 5, one of 2 skipped steps; the last good state is at step 3"
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.glob("checkpoints/[0-9]*")] == ["3"]
    monkeypatch.undo()
    assert train(config, tmp_path).steps == 6


def test_an_evaluation_that_is_no_number_is_no_record(tmp_path, monkeypatch):
    measured = {"images": 360.0, "loss": float("inf"), "top1": 0.1, "top5": 0.5}
    monkeypatch.setattr(state_evaluator, "evaluate", lambda *_: dict(measured))
    with pytest.raises(DivergedError, match=r"evaluated loss is not a number at step 3; no state"):
        train(configuration(), tmp_path)
    assert {record["split"] for record in records(tmp_path)} == {"train"}


@pytest.mark.parametrize("steps", [3, 6])
def test_a_state_whose_evaluation_is_no_number_is_not_kept(steps, tmp_path, monkeypatch):
    """The run resumes from the state before it, as if the bad one had never been saved."""
    measure_after(monkeypatch, steps - 3, lambda metrics: {**metrics, "loss": float("nan")})
    where = "the last good state is at step 3" if steps == 6 else "no state was saved"
    with pytest.raises(DivergedError, match=f"not a number at step {steps}; {where}"):
        train(configuration(), tmp_path)
    assert saved_steps(tmp_path) == ([3] if steps == 6 else [])


def measure_after(monkeypatch, calls, change):
    """Changes what evaluations give, or raises, after so many of `evaluate`'s calls."""
    made, measure = [], state_evaluator.evaluate

    def measuring(*arguments):
        made.append(measure(*arguments))
        return change(made[-1]) if len(made) > calls else made[-1]

    monkeypatch.setattr(state_evaluator, "evaluate", measuring)


def fail(_):
    raise DataError("data.max_corrupt = 10: more images than that cannot be decoded")


@pytest.mark.parametrize(
    "calls", [*(pytest.param(x, marks=pytest.mark.slow) for x in (0, 1, 2)), 3]
)  # of step 3: weights and average; then of step 6
def test_a_failed_evaluation_loses_nothing(calls, straight, tmp_path, monkeypatch, capsys):
    """The next start evaluates the state, or what is left of that, and takes no step twice."""
    step = 3 if calls < 2 else 6
    with monkeypatch.context() as patch:
        measure_after(patch, calls, fail)
        with pytest.raises(DataError, match=r"max_corrupt"):
            train(configuration(), tmp_path)
    assert f"the evaluation after step {step} failed; the same command" in capsys.readouterr().err
    assert saved_steps(tmp_path)[-1] == step
    assert records(tmp_path)[-1].get("weights", "") == ""
    assert train(configuration(), tmp_path).metrics == straight[1].metrics
    line = f"the state of step {step} was saved but not evaluated; evaluating\n"
    assert line in capsys.readouterr().err
    assert without_times(tmp_path) == without_times(straight[0])
    chex.assert_trees_all_equal(state_of(tmp_path), state_of(straight[0]))
    assert saved_steps(tmp_path) == saved_steps(straight[0])


@pytest.mark.parametrize("step", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_a_signal_during_an_evaluation(step, straight, tmp_path, monkeypatch):
    """The run stops at once: its state is saved, and evaluated by the next start."""
    with monkeypatch.context() as patch:
        seen, batches = [], InMemoryDataset.eval_batches

        def stopping(*arguments):
            for batch in batches(*arguments):
                seen.append(batch)
                if len(seen) == 2 + (step == 6) * 2 * 8:  # 360 images are 8 batches, twice
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        patch.setattr(InMemoryDataset, "eval_batches", stopping)
        with pytest.raises(StoppedError, match=f"after step {step}; all is saved"):
            train(configuration(), tmp_path)
    assert saved_steps(tmp_path)[-1] == step
    assert [x["step"] for x in records(tmp_path) if x["split"] == "test"] == [3, 3] * (step == 6)
    train(configuration(), tmp_path)
    assert without_times(tmp_path) == without_times(straight[0])


def measured(monkeypatch, *tops):
    """Lets evaluations find these top-1."""
    left = iter(tops)
    change = lambda metrics: {**metrics, "top1": next(left)}  # noqa: E731
    measure_after(monkeypatch, 0, change)


EARLY = {
    "train__steps": 8,
    "train__ema_decay": 0.0,
    "evaluate__every_epochs": 48 / 1437,  # after each step
    "train__early_stopping": 2,
    "checkpoint__keep_best": 2,
}


def test_early_stopping(tmp_path, monkeypatch, capsys):
    config = configuration(**EARLY)
    with monkeypatch.context() as patch:
        measured(patch, 0.2, 0.5, 0.4, 0.3, 0.9)
        result = train(config, tmp_path)
    assert (result.steps, result.metrics["top1"]) == (4, 0.3)
    line = (
        "top1 has not improved in 2 evaluations (train.early_stopping); the run ends after step 4 "
        "of 8. Its best state is that of step 2: top1 = 0.5\n"
    )
    assert line in capsys.readouterr().err
    assert saved_steps(tmp_path) == [2, 3, 4]
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(config, tmp_path).steps == 4
    assert line in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    config.train.early_stopping = 4
    with monkeypatch.context() as patch:
        measured(patch, 0.5, 0.6, 0.1, 0.1)
        assert train(config, tmp_path).steps == 8
    assert saved_steps(tmp_path) == [5, 6, 8]  # 5 is as good as 2, and later


@pytest.mark.slow
def test_early_stopping_follows_from_the_records(tmp_path, monkeypatch):
    """However often the run is interrupted, here before each evaluation."""
    config = configuration(**EARLY, train__min_improvement=0.1, checkpoint__best_metric="loss")
    losses = (2.0, 1.8, 1.75, 1.72, 0.1)

    def evaluations():
        return [record for record in records(tmp_path) if record["split"] == "test"]

    measure_after(monkeypatch, 0, lambda found: {**found, "loss": losses[len(evaluations())]})
    for step in (1, 2, 3, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(StoppedError, match=f"after step {step}"):
                train(config, tmp_path)
        assert len(evaluations()) == step - 1
    assert train(config, tmp_path).steps == 4
    assert [record["loss"] for record in evaluations()] == [*losses[:4]]


def test_evaluation_images_may_be_mended(straight, tmp_path, capsys):
    """They change no weights; training images do."""
    run = shutil.copytree(straight[0], tmp_path / "run")
    path = run / "data.json"
    noted = json.loads(path.read_text())
    path.write_text(json.dumps({**noted, "eval": "other"}))
    train(configuration(), run)
    assert "the images of data.eval_split have changed since the last start" in (
        capsys.readouterr().err
    )
    assert json.loads(path.read_text()) == noted
    train(configuration(), run)
    assert "have changed" not in capsys.readouterr().err


def test_fine_tuning_from_a_workdir(straight, tmp_path):
    config = configuration(
        checkpoint__init_from=str(straight[0]),
        optimizer__backbone_rate=0.0,
        train__steps=2,
        train__ema_decay=0.0,
    )
    shutil.copytree(straight[0], tmp_path / "first")
    config.checkpoint.init_from = str(tmp_path / "first")
    train(config, tmp_path)
    shutil.rmtree(tmp_path / "first")
    train(config, tmp_path)  # resumes without its initial weights
    _, start, _ = load_variables(straight[0])
    _, end, _ = load_variables(tmp_path)
    for part in start["params"]:
        same = jax.tree.map(np.array_equal, start["params"][part], end["params"][part])
        assert all(jax.tree.leaves(same)) == (part != "head")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"augment__mean": (0.1,) * 3, "augment__std": (0.1,) * 3},
            r"augment\.mean = .* 1 channel",
        ),
        (
            {"model__bn_sync": "group", "model__bn_group_size": 3},
            r"model\.bn_group_size = 3: must divide the 8 devices",
        ),
        ({"train__batch_size": 12}, r"train\.batch_size = 12: must be a multiple of 8 devices"),
        (
            {"train__steps_per_call": 2, "data__crop": "random_resized"},
            r"train\.steps_per_call = 2: needs a dataset that lies in memory",
        ),
        ({"evaluate__batch_size": 4}, r"evaluate\.batch_size = 4"),
        ({"data__name": "tfds:mnist"}, r"data\.\w+.*prepare"),
        ({"data__name": "folder:/nowhere"}, "/nowhere"),
        ({"data__train_split": "training"}, r"data\.\w*.*train.*test"),
        (
            {"data__image_size": 2, "model__name": "resnet20"},
            r"data\.image_size = 2: resnet20 needs at least 4 pixels",
        ),
        ({"model__num_classes": 4}, r"model\.num_classes = 4: the dataset has 10 classes"),
        ({"checkpoint__init_from": "/none.npz"}, r"checkpoint\.init_from = '/none\.npz': .*read"),
    ],
)
def test_mistakes_leave_no_workdir(changes, message, tmp_path):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        train(configuration(**changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--workdir=.*cannot be written"):
        train(configuration(), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("steps_per_call", "accumulate"),
    [pytest.param(1, 1, marks=pytest.mark.slow), (2, 1), (1, 2)],
)
def test_utilization_where_the_peak_is_known(steps_per_call, accumulate, tmp_path, monkeypatch):
    known = dataclasses.replace(ACCELERATORS["h100"], flops=1e9)
    monkeypatch.setattr(metrics_module, "find_accelerator", lambda kind: known)
    changes = {"train__steps_per_call": steps_per_call, "train__accumulate": accumulate}
    train(configuration(**changes), tmp_path)
    record = [r for r in records(tmp_path) if r["split"] == "train"][-1]
    # A forward pass and twice that backward, two operations a multiply-add.
    operations = 6 * rj.summary(rj.create_model("tiny"), (1, 8, 8, 1)).multiply_adds
    expected = record["images_per_second"] * operations / (jax.device_count() * 1e9)
    assert record["mfu"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "dtype", "backend", "slow"),
    [
        ("resnet50", "bfloat16", "cpu", True),
        ("resnetv2_50", "float16", "cpu", True),
        ("resnet50", "bfloat16", "gpu", False),
        ("resnet50", "float32", "cpu", False),
        ("resnet18", "bfloat16", "cpu", False),  # as fast as float32
    ],
)
def test_half_precision_is_slow_on_a_cpu(name, dtype, backend, slow, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = c.Config(model=c.Model(name=name, dtype=dtype))
    assert run_module._is_slow_on_cpu(config, rj.create_model(name)) == slow


def test_weights_and_biases(tmp_path, monkeypatch):
    """Against a stand-in: an account is not needed to see what is sent."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **options: calls.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    train(configuration(log__wandb="digits"), tmp_path)
    options, (step, values), *_, last = calls
    assert options["project"] == "digits"
    assert (len(options["id"]), options["name"]) == (16, tmp_path.name)
    assert (step, set(values) >= {"train/loss", "train/top1"}, last) == (2, True, "finished")


def test_training_in_a_thread(tmp_path):
    """A notebook or a server may train where signals cannot be caught."""
    results = []
    work = lambda: results.append(train(configuration(), tmp_path))  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].steps == 6


FLAGS = (
    f"--config={ROOT}/tests/tiny.py",
    "--config.data.image_size=8",
    "--config.train.steps=3",
    "--config.train.batch_size=16",
    "--config.log.tensorboard=true",
    "--config.log.profile=1:2",
)


def test_the_command(tmp_path):
    """train.py itself: exit codes, the printed result, and no TensorFlow."""
    code = (
        "import sys; from resnet_jax.cli.parser import main\n"
        f"code = main(['train', '--workdir={tmp_path}/run', *{FLAGS!r}])\n"
        "assert 'tensorflow' not in sys.modules\n"
        "sys.exit(code)"
    )
    environment = {**os.environ, "XLA_FLAGS": FAST_COMPILE}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_exit_codes(tmp_path, monkeypatch, capsys):
    flags = [f"--workdir={tmp_path}", *FLAGS[:4]]
    assert parser.main(["train", *flags, "--config.optimizer.learning_rate=1e20"]) == 70
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert parser.main(["train", *flags, "--config.train.batch_size=-1"]) == 2
    assert "train.batch_size = -1" in capsys.readouterr().err


def test_a_run_that_is_evaluated_on_its_training_images(tmp_path, capsys):
    """Its records say what they are, whatever the split is called."""
    config = configuration(data__eval_split="train", log__tensorboard=True)
    metrics = train(config, tmp_path / "run").metrics
    assert "evaluation images are also training images" in capsys.readouterr().err
    run = read_run(tmp_path / "run")
    assert [record["step"] for record in run.training] == [2, 3, 4, 6]
    assert [record["step"] for record in run.evaluations] == [3, 6]
    assert run.ema_evaluations[-1]["top1"] == metrics["top1"]
    assert {record["split"] for record in records(tmp_path / "run")} == {"train"}
    written = {path.name for path in (tmp_path / "run/tensorboard").iterdir()}
    assert written == {"train", "train_evaluation", "train_evaluation_ema"}
