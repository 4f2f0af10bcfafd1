"""The copy of a run that outlives its machine; a folder and fsspec's memory stand for a bucket."""

import contextlib
import hashlib
import io
import os
import shutil
from importlib.util import find_spec

import chex
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from resnet_jax.errors import ConfigError, DivergedError, StoppedError
from resnet_jax.training import state_evaluator
from resnet_jax.training.loop import train
from resnet_jax.workdirs.checkpoint import Checkpoints
from resnet_jax.workdirs.remote_copy import RemoteCopy
from resnet_jax.workdirs.workdir import saved_steps
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


def test_the_copy_has_the_last_evaluation(tmp_path, monkeypatch):
    """Of a run whose last state is not its best, and that ended early."""
    tops = iter((0.9, 0.1))
    monkeypatch.setattr(state_evaluator, "evaluate", lambda *_: metrics(next(tops)))
    config = configuration(
        checkpoint__copy_to=str(tmp_path / "copy"),
        train__early_stopping=1,
        train__steps=9,
        train__ema_decay=0.0,
    )
    assert train(config, tmp_path / "run").steps == 6
    assert saved_steps(tmp_path / "copy") == saved_steps(tmp_path / "run") == [3, 6]
    assert Checkpoints(tmp_path / "copy", read_only=True).best == 3
    assert without_times(tmp_path / "copy") == without_times(tmp_path / "run")


def metrics(top1, loss=1.0):
    return {"images": 360.0, "loss": loss, "top1": top1, "top5": 1.0}


def test_a_state_that_has_diverged_leaves_the_copy(tmp_path, monkeypatch):
    """Or the next start would take it from there, and never get past it."""
    losses = iter((1.0, 1.0, float("nan")))
    monkeypatch.setattr(state_evaluator, "evaluate", lambda *_: metrics(0.5, next(losses)))
    config = configuration(checkpoint__copy_to=str(tmp_path / "copy"))
    with pytest.raises(DivergedError, match="step 6; the last good state is at step 3"):
        train(config, tmp_path / "run")
    assert saved_steps(tmp_path / "copy") == saved_steps(tmp_path / "run") == [3]


def bucket(copy, workdir, **changes):
    return RemoteCopy(configuration(checkpoint__copy_to=str(copy), **changes), workdir)


def test_only_complete_states_are_taken(copy, tmp_path):
    """A copy that was cut off has no checksums yet."""
    newest = copy / "checkpoints" / str(saved_steps(copy)[-1])
    shutil.copytree(newest, copy / "checkpoints" / "99")
    (copy / "checkpoints" / "99" / "SHA256SUMS").unlink()
    (tmp_path / "run").mkdir()
    place = bucket(copy, tmp_path / "run")
    assert place.steps() == [int(newest.name)]
    place.fetch()
    assert saved_steps(tmp_path / "run") == [int(newest.name)]
    assert not list((tmp_path / "run" / "checkpoints" / ".unfinished").iterdir())
    place.push()  # what no state of the run's is goes
    assert saved_steps(copy) == [int(newest.name)]


@pytest.fixture(scope="module")
def several(tmp_path_factory, tiny_model):
    """(workdir, its copy) with three states."""
    folder = tmp_path_factory.mktemp("several")
    config = several_states(folder / "copy")
    train(config, folder / "run")
    return folder / "run", folder / "copy"


def several_states(copy):
    return configuration(
        checkpoint__copy_to=str(copy), checkpoint__every_steps=2, checkpoint__keep=3
    )


@pytest.fixture
def places(several, tmp_path):
    """A workdir and its copy to be harmed; states 3, 4 and 6 are in both."""
    for source in several:
        shutil.copytree(source, tmp_path / source.name)
    assert saved_steps(tmp_path / "run") == saved_steps(tmp_path / "copy") == [3, 4, 6]
    return tmp_path / "run", tmp_path / "copy"


def damage(workdir, *steps):
    for step in steps:
        path = workdir / "checkpoints" / str(step) / "progress.json"
        path.write_bytes(path.read_bytes()[:-1])


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def go_on(run, copy):
    """A start that has nothing left to train; what it said."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert train(several_states(copy), run).steps == 6
    return said.getvalue()


def test_what_is_missing_or_damaged_comes_from_the_copy(places, several):
    """And the copy loses nothing by it."""
    run, copy = places
    before = contents(copy)
    damage(run, 6)
    shutil.rmtree(run / "checkpoints" / "3")
    said = go_on(run, copy)
    assert "resuming after step 6" in said
    assert "step 6 is damaged: progress.json does not match its checksum; it is now" in said
    assert f"the state at step 6 is from checkpoint.copy_to = '{copy}'" in said
    assert contents(copy).keys() == before.keys()
    assert all(contents(copy)[name] == before[name] for name in before if "/" in name)
    assert saved_steps(run) == [3, 4, 6]
    chex.assert_trees_all_equal(state_of(run), state_of(several[0]))


def test_all_states_here_are_damaged(places, several):
    run, copy = places
    damage(run, 3, 4, 6)
    said = go_on(run, copy)
    assert all(f"the state at step {step} is from" in said for step in (3, 4, 6))
    assert saved_steps(run) == [3, 4, 6]
    chex.assert_trees_all_equal(state_of(run), state_of(several[0]))


def test_no_state_is_whole_in_either(places):
    run, copy = places
    damage(run, 3, 4, 6)
    damage(copy, 3, 4)
    (copy / "checkpoints" / "6" / "progress.json").unlink()
    before = contents(copy)
    message = (
        r"no state of the run is intact, neither in .*run/checkpoints \(step 3: progress.*step 6"
        r": .*"
        r"nor in checkpoint\.copy_to = .*copy' \(step 6: progress\.json is missing; step 4: "
    )
    with pytest.raises(ConfigError, match=message) as caught:
        train(several_states(copy), run)
    assert "\n" not in str(caught.value)
    assert contents(copy) == before
    assert saved_steps(run) == [3, 4, 6]
    shutil.rmtree(run)
    with pytest.raises(ConfigError, match=r"neither in .* \(there is none\) nor in checkpoint"):
        train(several_states(copy), run)
    assert contents(copy) == before


def test_a_state_that_is_damaged_in_the_copy_is_not_taken(places):
    run, copy = places
    damage(run, 6)
    damage(copy, 6)
    bucket = RemoteCopy(several_states(copy), run)
    bucket.fetch()
    assert [
        line
        for line in bucket.fetched
        if "step 6 of the copy is damaged and not used: progress.json does" in line
    ]
    assert saved_steps(run) == [3, 4, 6]
    assert Checkpoints(run).set_damaged_aside()
    bucket.push()  # nothing newer has replaced it yet
    assert saved_steps(copy) == [3, 4, 6]
    chex.assert_trees_all_equal(state_of(run), state_of(copy))  # of step 4


def test_a_state_under_another_number_in_the_copy(places):
    run, copy = places
    (copy / "checkpoints" / "6").rename(copy / "checkpoints" / "9")
    bucket = RemoteCopy(several_states(copy), run)
    bucket.fetch()
    assert "step 9 of the copy is damaged and not used: it holds step 6, not 9" in bucket.fetched[0]
    assert saved_steps(run) == [3, 4, 6]


def test_lost_records_come_from_the_copy(places, several):
    run, copy = places
    whole = without_times(several[0])
    for harm in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:300]),
        lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(True)[2:])),
    ):
        harm(run / "metrics.jsonl")
        RemoteCopy(several_states(copy), run).fetch()
        assert without_times(run) == without_times(copy) == whole


def test_records_are_not_replaced_by_fewer(places, several):
    """However they were lost, and also while the run is going on."""
    run, copy = places
    (run / "metrics.jsonl").write_bytes(b"")
    RemoteCopy(several_states(copy), run).push()
    assert without_times(copy) == without_times(several[0])
    (run / "metrics.jsonl").unlink()
    RemoteCopy(several_states(copy), run).push()
    assert without_times(copy) == without_times(several[0])


def test_only_records_of_the_steps_that_are_done_are_taken(places):
    run, copy = places
    shutil.rmtree(run / "checkpoints" / "6")
    shutil.rmtree(copy / "checkpoints" / "6")
    (run / "metrics.jsonl").unlink()
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": NaN}\n[]\n{"step": 1e9}\n' + b"[" * 9_000 + b"\n\xff\xfe\n")
    RemoteCopy(several_states(copy), run).fetch()
    assert {record["step"] for record in without_times(run)} == {2, 3, 4}


def test_a_configuration_there_that_cannot_be_read(places):
    """It is not taken for another run's; whose the states are their checksums may tell."""
    run, copy = places
    for content, words in (
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"{}", "is not one that"),
    ):
        (copy / "config.json").write_bytes(content)
        bucket = RemoteCopy(several_states(copy), run)
        bucket.push()
        assert (copy / "config.json").read_bytes() == (run / "config.json").read_bytes()
        (copy / "config.json").write_bytes(content)
        before = contents(copy)
        message = rf"its config\.json {words}.*, so it is unknown whether its states"
        with pytest.raises(ConfigError, match=message) as caught:
            train(several_states(copy), run.with_name("elsewhere"))
        assert "None ->" not in str(caught.value)
        assert contents(copy) == before
    config = several_states(copy)
    config.checkpoint.allow_change = True
    assert train(config, run.with_name("elsewhere")).steps == 6


def test_a_flipped_bit_in_a_configuration_that_is_sealed(places):
    run, copy = places
    sums = [
        f"{hashlib.sha256((copy / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "data.json")
    ]
    (copy / "SHA256SUMS").write_text("".join(sums))
    for name in ("config.json", "data.json"):
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace('"seed": 0', '"seed": 1').replace('"eval"', '"oval"'))
        assert (copy / name).read_text() != text
    RemoteCopy(several_states(copy), run)
    with pytest.raises(ConfigError, match=r"config\.json does not match its checksum, so it"):
        RemoteCopy(several_states(copy), run.with_name("elsewhere"))
    (run / "data.json").unlink()
    RemoteCopy(several_states(copy), run).fetch()
    assert not (run / "data.json").exists()  # the start writes it
    assert (run / "SHA256SUMS").exists()


# What is not ours.


def foreign(folder):
    (folder / "7").mkdir(parents=True)
    (folder / "7" / "thesis.txt").write_text("keep me")
    (folder / "config.json").write_text("{}")


def foreign_states(folder):
    (folder / "checkpoints" / "7").mkdir(parents=True)
    (folder / "checkpoints" / "7" / "thesis.txt").write_text("keep me")


def foreign_metrics(folder):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("keep me")


def foreign_run(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model": {"name": "bert"}, "data": {}, "train": {}}')


@pytest.mark.parametrize("make", [foreign, foreign_states, foreign_metrics, foreign_run])
@pytest.mark.parametrize("with_states", [True, False])
def test_a_place_of_somebody_else(make, with_states, several, tmp_path):
    copy, run = tmp_path / "victim", tmp_path / "run"
    make(copy)
    if with_states:
        shutil.copytree(several[0], run)
    before = contents(copy)
    with pytest.raises(
        ConfigError, match=r"copy_to = .*holds files that are not a run of resnet_jax"
    ):
        train(several_states(copy), run)
    assert contents(copy) == before
    assert run.exists() == with_states


def test_what_a_start_that_was_killed_leaves_is_ours(tmp_path):
    (tmp_path / "copy").mkdir()
    for name in (".writable", ".resnet_jax.0123456789abcdef.partial"):
        (tmp_path / "copy" / name).write_text("")
    assert bucket(tmp_path / "copy", tmp_path / "run").steps() == []


def test_files_of_somebody_else_in_a_copy_stay(places):
    run, copy = places
    letters = [
        copy / "letter.txt",
        copy / "tensorboard" / "events",
        copy / "checkpoints" / "letter.txt",
        copy / "checkpoints" / "3" / "letter.txt",
        copy / "checkpoints" / "3.damaged" / "SHA256SUMS",
        copy / "checkpoints" / "007" / "default" / "letter.txt",
    ]
    for letter in letters:
        letter.parent.mkdir(exist_ok=True, parents=True)
        letter.write_text("keep me")
    shutil.rmtree(run / "checkpoints" / "3")
    RemoteCopy(several_states(copy), run).push()
    assert all(letter.read_text() == "keep me" for letter in letters)
    left = [path for path in (copy / "checkpoints" / "3").rglob("*") if path.is_file()]
    assert left == [letters[3]]


def test_half_a_state_there_does_not_stay_in_the_whole_one(places, several):
    """Its arrays have other names, and would not belong to it."""
    run, copy = places
    (copy / "checkpoints" / "6" / "SHA256SUMS").unlink()
    (copy / "checkpoints" / "6" / "default" / "d" / "0123").write_text("of a push that was cut off")
    (copy / "checkpoints" / "6" / ".resnet_jax.0123.partial").write_text("likewise")
    RemoteCopy(several_states(copy), run).push()
    chex.assert_trees_all_equal(state_of(copy), state_of(several[0]))


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "metrics.jsonl", "checkpoints", "checkpoints/6", "checkpoints/6/default"),
        *("checkpoints/6/SHA256SUMS", "checkpoints/6/progress.json"),
    ],
)
def test_nothing_is_written_through_links_there(name, places, tmp_path):
    run, copy = places
    victim = tmp_path / "victim"
    (copy / name).rename(victim)
    before = contents(victim) if victim.is_dir() else victim.read_bytes()
    (copy / name).symlink_to(victim)
    with pytest.raises(ConfigError, match=r"is a link or not a plain file; use another address"):
        RemoteCopy(several_states(copy), run)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(ConfigError, match=r"is a link or not a plain file; use another address"):
        RemoteCopy(several_states(copy), run)
    assert (contents(victim) if victim.is_dir() else victim.read_bytes()) == before


@pytest.mark.parametrize(
    "name",
    [
        "../../../../out",
        "/out",
        "default/../../../../../out",
        "default//out",
        "default/" + 300 * "x",
    ],
)
def test_names_in_a_bucket_lead_nowhere_else(name, several, tmp_path):
    """Object stores take any."""
    system = MemoryFileSystem()
    root = f"/names/{abs(hash(name))}"
    system.put(str(several[1]), root, recursive=True)
    store = system.store
    seal = f"{root}/checkpoints/6/SHA256SUMS"
    system.pipe_file(seal, system.cat_file(seal) + f"{64 * '0'}  {name}\n".encode())
    store[f"{root}/checkpoints/6/{name}"] = MemoryFile(system, name, b"harm")
    (tmp_path / "run").mkdir()
    bucket = RemoteCopy(several_states(f"memory:/{root}"), tmp_path / "run")
    bucket.fetch()
    assert "step 6 of the copy is damaged and not used: " in bucket.fetched[0]
    assert saved_steps(tmp_path / "run") == [3, 4]
    assert not list(tmp_path.rglob("*out*"))


def test_files_in_the_copy_that_are_too_large(places):
    run, copy = places
    shutil.rmtree(run / "checkpoints" / "6")
    os.truncate(copy / "checkpoints" / "6" / "SHA256SUMS", 2**40)
    bucket = RemoteCopy(several_states(copy), run)
    bucket.fetch()
    assert "SHA256SUMS has 1,099,511,627,776 bytes" in bucket.fetched[0]
    os.truncate(copy / "metrics.jsonl", 2**40)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl has 1,099,511,627,776 bytes, more than"):
        bucket.fetch()
    os.truncate(copy / "config.json", 2**40)
    with pytest.raises(ConfigError, match=r"its config\.json has 1,099,511,627,776 bytes"):
        RemoteCopy(several_states(copy), run.with_name("elsewhere"))


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
    assert "cannot be written (ConnectionError: no route)" in line
    assert saved_steps(copy) == saved_steps(tmp_path / "run")
    chex.assert_trees_all_equal(state_of(copy), state_of(straight[0]))


def test_another_run_in_the_workdir_is_not_mixed_with_it(copy, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    (run / "checkpoints" / "6").rename(run / "checkpoints" / "2")
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"seed": 0', '"seed": 5'))
    (run / "SHA256SUMS").unlink()
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
