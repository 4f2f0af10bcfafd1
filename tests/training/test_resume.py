"""A run that is stopped ends as one that is not, to the bit, with everything switched on."""

import chex
import pytest

from resnet_jax import config as c
from resnet_jax.errors import ConfigError, StoppedError
from resnet_jax.training.loop import train
from resnet_jax.workdirs.checkpoint import Checkpoints
from resnet_jax.workdirs.metric_writers import MetricsFile
from tests.training.runs import state_of, stop_after, without_times

pytestmark = pytest.mark.usefixtures("tiny_model")


def configuration(rand_layers):
    """All augmentations that go together, parts of batches, averages, a schedule with a state."""
    return c.Config(
        model=c.Model(name="tiny", stochastic_depth_rate=0.2, dropout_rate=0.1),
        data=c.Data(image_size=8, channels=3, repeats=2, threads=2),
        augment=c.Augment(
            flip=True,
            pad=1,
            rotate=5.0,
            rand_layers=rand_layers,
            brightness=0.1,
            contrast=0.1,
            saturation=0.1,
            hue=0.1,
            pca=0.1,
            erase=0.5,
            cutout=2,
            mixup=0.2,
            cutmix=1.0,
        ),
        schedule=c.Schedule(name="plateau", patience=1, warmup_epochs=0.1),
        train=c.Train(steps=9, batch_size=32, accumulate=2, ema_decay=0.9, ema_every=2),
        evaluate=c.Evaluate(every_epochs=5.1 * 32 / 1437),  # after steps 6 and 9
        log=c.Log(every_steps=4, tensorboard=False),
    )


# RandAugment takes its random numbers as the others do, and four times as long to compile.
@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def rand_layers(request):
    return request.param


@pytest.fixture(scope="module")
def straight(rand_layers, tmp_path_factory, tiny_model):
    workdir = tmp_path_factory.mktemp("straight")
    train(configuration(rand_layers), workdir)
    return workdir


def test_a_run_that_is_stopped_again_and_again(straight, rand_layers, tmp_path, monkeypatch):
    """Between two records; once more where it was also evaluated."""
    for step in (3, 6):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(StoppedError, match=f"after step {step}"):
                train(configuration(rand_layers), tmp_path)
    train(configuration(rand_layers), tmp_path)
    found = without_times(tmp_path)
    assert [(r["step"], r["split"]) for r in found if "weights" not in r] == [
        *((4, "train"), (6, "train"), (6, "test"), (8, "train"), (9, "train"), (9, "test"))
    ]
    assert found == without_times(straight)
    chex.assert_trees_all_equal(state_of(tmp_path), state_of(straight))


@pytest.mark.slow
def test_saving_changes_no_record(straight, rand_layers, tmp_path):
    """Checkpoints between records, and a start from one that is not the newest."""
    config = configuration(rand_layers)
    config.checkpoint.every_steps, config.checkpoint.keep = 1, 9
    train(config, tmp_path)
    assert without_times(tmp_path) == without_times(straight)
    damaged = [9, 8, 6]
    for step in damaged:
        (tmp_path / "checkpoints" / str(step) / "progress.json").write_text("{}")
    train(config, tmp_path)
    aside = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.damaged"))
    assert aside == [f"{step}.damaged" for step in sorted(damaged)]
    assert without_times(tmp_path) == without_times(straight)
    chex.assert_trees_all_equal(state_of(tmp_path), state_of(straight))


def test_where_no_state_is_whole_nothing_is_touched(straight, rand_layers):
    steps = sorted(path for path in straight.glob("checkpoints/*") if path.name.isdecimal())
    for step in steps:
        (step / "more").touch()
    before = (straight / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"no state .* is intact .*more does not belong"):
        train(configuration(rand_layers), straight)
    assert (straight / "metrics.jsonl").read_bytes() == before
    for step in steps:
        (step / "more").unlink()


def fails(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics", "state"])
def test_a_disk_that_fills_up_in_the_middle(name, straight, rand_layers, tmp_path, monkeypatch):
    """One line, the last good state stays, and the same command resumes and ends the same."""
    config = configuration(rand_layers)
    config.checkpoint.every_steps = 2
    with monkeypatch.context() as patch:
        write, seal = MetricsFile.write, "resnet_jax.workdirs.checksums.seal"
        if name == "state":
            save = Checkpoints.save

            def saving(self, state, *rest):
                if state.step == 8:
                    self.wait()
                    patch.setattr(seal, fails)
                save(self, state, *rest)

            patch.setattr(Checkpoints, "save", saving)
        else:

            def writing(self, record):
                if record["step"] == 8:
                    self._file._file.close()
                    self._file._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
                write(self, record)

            patch.setattr(MetricsFile, "write", writing)
        message = {"state": "step 8 could not be written", "metrics": r"metrics\.jsonl cannot be"}
        with pytest.raises(ConfigError, match=message[name] + ".*No space left") as caught:
            train(config, tmp_path)
        assert "\n" not in str(caught.value)
    assert Checkpoints(tmp_path, read_only=True).latest == 6
    train(config, tmp_path)
    assert without_times(tmp_path) == without_times(straight)
    chex.assert_trees_all_equal(state_of(tmp_path), state_of(straight))


def test_the_last_state_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_jax.workdirs.checksums.seal", fails)
    config = c.Config(
        model=c.Model(name="tiny"),
        data=c.Data(image_size=8),
        train=c.Train(steps=1, batch_size=16),
        log=c.Log(tensorboard=False),
    )
    with pytest.raises(ConfigError, match=r"step 1 could not be written .*there is none before it"):
        train(config, tmp_path)
