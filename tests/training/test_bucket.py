"""The copy of a run that outlives its machine; a folder and fsspec's memory stand for a bucket."""

import shutil
from importlib.util import find_spec

import chex
import pytest
from fsspec.implementations.local import LocalFileSystem

from resnet_jax.errors import ConfigError, StoppedError
from resnet_jax.training.bucket import Bucket
from resnet_jax.training.loop import train
from resnet_jax.training.workdir import saved_steps
from tests.training.runs import state_of, stop_after, without_times
from tests.training.test_loop import configuration

pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_model):
    """(workdir, its copy) of a run without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    train(configuration(checkpoint__copy_to=f"file://{folder}/copy"), folder / "run")
    return folder / "run", folder / "copy"


@pytest.fixture
def copy(straight, tmp_path):
    shutil.copytree(straight[1], tmp_path / "copy")
    return tmp_path / "copy"


def test_the_copy_is_a_workdir(straight):
    """With all that the run goes on from."""
    run, copy = straight
    assert saved_steps(copy) == saved_steps(run) == [6]
    assert without_times(copy) == without_times(run)
    chex.assert_trees_all_equal(state_of(copy), state_of(run))


def test_a_run_goes_on_where_its_disk_is_gone(straight, tmp_path, monkeypatch):
    config = configuration(checkpoint__copy_to="memory://runs/gone")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(StoppedError, match="after step 4"):
            train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert train(config, tmp_path / "elsewhere").steps == 6
    assert without_times(tmp_path / "elsewhere") == without_times(straight[0])
    chex.assert_trees_all_equal(state_of(tmp_path / "elsewhere"), state_of(straight[0]))


def bucket(copy, workdir, **changes):
    return Bucket(configuration(checkpoint__copy_to=str(copy), **changes), workdir)


def test_only_complete_states_are_taken(copy, tmp_path):
    """A copy that was cut off has no checksums yet."""
    newest = copy / "checkpoints" / str(saved_steps(copy)[-1])
    shutil.copytree(newest, copy / "checkpoints" / "99")
    (copy / "checkpoints" / "99" / "SHA256SUMS").unlink()
    place = bucket(copy, tmp_path / "run")
    assert place.steps() == [int(newest.name)]
    place.fetch()
    assert saved_steps(tmp_path / "run") == [int(newest.name)]
    assert not list((tmp_path / "run" / "checkpoints" / ".unfinished").iterdir())
    place.push()  # what no state of the run's is goes
    assert saved_steps(copy) == [int(newest.name)]


def test_the_newer_of_both_is_kept(straight, copy, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    (newest,) = saved_steps(run)
    (run / "checkpoints" / str(newest)).rename(run / "checkpoints" / "2")
    bucket(copy, run).fetch()
    assert saved_steps(run) == [2, newest]
    (copy / "checkpoints" / str(newest)).rename(copy / "checkpoints" / "1")
    shutil.rmtree(run / "checkpoints" / "2")
    bucket(copy, run).fetch()
    assert saved_steps(run) == [newest]


def test_another_run_is_not_replaced(copy, tmp_path):
    before = sorted(copy.rglob("*"))
    config = configuration(checkpoint__copy_to=str(copy), train__seed=5)
    with pytest.raises(ConfigError, match=r"copy_to = .*copy': holds a run .*seed: 0 -> 5"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert sorted(copy.rglob("*")) == before


def test_a_failing_copy_is_one_line_and_is_made_up_for(
    copy, straight, tmp_path, monkeypatch, capsys
):
    shutil.rmtree(copy)
    calls, put = [], LocalFileSystem.put_file

    def putting(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise ConnectionError("no route\nto host")
        return put(self, *arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "put_file", putting)
    config = configuration(checkpoint__copy_to=str(copy))
    train(config, tmp_path / "run")
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "copy_to" in x]
    assert "cannot be written (ConnectionError: no route to host)" in line
    assert saved_steps(copy) == saved_steps(tmp_path / "run")
    chex.assert_trees_all_equal(state_of(copy), state_of(straight[0]))


def test_another_run_in_the_workdir_is_not_mixed_with_it(copy, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    (run / "checkpoints" / "6").rename(run / "checkpoints" / "2")
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"seed": 0', '"seed": 5'))
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"workdir=.*another configuration .*seed: 5 -> 0"):
        train(configuration(checkpoint__copy_to=str(copy)), run)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert saved_steps(run) == [2]


def test_a_run_that_is_there_is_copied_at_its_next_start(straight, tmp_path):
    config = configuration(checkpoint__copy_to=f"{tmp_path}/copy")
    shutil.copytree(straight[0], tmp_path / "run")
    train(config, tmp_path / "run")
    assert saved_steps(tmp_path / "copy") == [6]


def test_a_state_that_is_damaged_there_is_replaced(copy, straight, tmp_path):
    (copy / "checkpoints" / "6" / "SHA256SUMS").write_text("another state's")
    shutil.copytree(straight[0], tmp_path / "run")
    bucket(copy, tmp_path / "run").push()
    chex.assert_trees_all_equal(state_of(copy), state_of(straight[0]))


def test_the_workdir_itself_is_no_place(tmp_path):
    with pytest.raises(ConfigError, match="is the workdir itself"):
        bucket(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("bucket://a/b", "Protocol not known: bucket"),
        ("gs:/a/b", "two slashes"),
        ("/dev/null/a", "cannot be (read|written)"),
        pytest.param(
            *("gs://a/b", "needs gcsfs, which is not installed: pip install gcsfs"),
            marks=pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed"),
        ),
    ],
)
def test_addresses_that_cannot_be_used(address, message, tmp_path):
    with pytest.raises(ConfigError, match=rf"checkpoint\.copy_to = '{address}'.*{message}"):
        train(configuration(checkpoint__copy_to=address), tmp_path / "run")
    assert not (tmp_path / "run").exists()
