"""States on disk: sealed, damaged, cut off, without room."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import shutil
import sys
import threading
import types

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from resnet_jax import config as c
from resnet_jax.errors import ConfigError, write_errors
from resnet_jax.files import atomic_write
from resnet_jax.training.state import TrainState
from resnet_jax.workdirs import checksums, description, saved_state, workdir
from resnet_jax.workdirs.checkpoint import Checkpoints, load_variables
from resnet_jax.workdirs.evaluations import Evaluations
from resnet_jax.workdirs.metric_writers import Appender


def state(step):
    """Its numbers tell its step."""
    params = {"stem": {"kernel": np.full((3, 4), step, np.float32)}, "head": np.ones(5, np.int32)}
    return TrainState(np.array(step, np.int32), params, {}, (), {}, None)


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))


def evaluate(folder, step, **metrics):
    """Appends an evaluation record."""
    record = {"step": step, "split": "test", "kind": "evaluation", "loss": 1.0, **metrics}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def save(folder, *tops, first=1, keep=9):
    """Saves the steps from the first on and evaluates them; top-1 None: not evaluated."""
    folder.mkdir(exist_ok=True)
    evaluations = Evaluations.of_workdir(folder)
    checkpoints = Checkpoints(folder, keep, evaluations=evaluations)
    for step, top1 in enumerate(tops, start=first):
        checkpoints.save(state(step), {"steps": step}, to_evaluate=top1 is not None)
        if top1 is not None:
            evaluations.add(evaluate(folder, step, top1=top1))
            checkpoints.evaluated()
    checkpoints.close()


def restored(folder, step=None):
    checkpoints = Checkpoints(folder)
    found = checkpoints.restore(LIKE, step)
    checkpoints.close()
    return found


def steps(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A workdir with the states 1 (the best) and 2."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 0.9, 0.1)
    description.write_description(folder, c.Config(), ["a", "b"], {"train": "1", "eval": "2"})
    return folder


@pytest.fixture
def copy(two, tmp_path):
    return pathlib.Path(shutil.copytree(two, tmp_path / "copy"))


def test_a_state_comes_back(two):
    chex.assert_trees_all_equal(restored(two), state(2))
    chex.assert_trees_all_equal(restored(two, 1), state(1))
    checkpoints = Checkpoints(two, read_only=True)
    assert checkpoints.records() == {"steps": 2}
    assert (checkpoints.latest, checkpoints.best) == (2, 1)


def test_orbax_itself_reads_it(two):
    with ocp.CheckpointManager(two / "checkpoints") as manager:
        assert manager.all_steps() == [1, 2]
        found = manager.restore(2, args=ocp.args.StandardRestore())
    chex.assert_trees_all_equal(found["params"], state(2).params)


def test_the_best_state_is_kept_beside_the_newest(tmp_path):
    save(tmp_path, 0.1, 0.9, float("nan"), 0.3, 0.2, None, keep=1)
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.best, checkpoints.latest) == (2, 6)
    assert steps(tmp_path) == [2, 6]
    save(tmp_path, 0.9, first=7, keep=2)
    assert steps(tmp_path) == [6, 7]  # the later of two that are as good


def test_several_of_the_best_states_are_kept(tmp_path):
    evaluations = Evaluations("loss")
    checkpoints = Checkpoints(tmp_path, 1, 2, evaluations)
    for step, loss in enumerate((0.3, 0.1, 0.5, 0.2, 0.4), start=1):
        checkpoints.save(state(step), {}, to_evaluate=True)
        evaluations.add(evaluate(tmp_path, step, loss=loss))
        checkpoints.evaluated()
    checkpoints.close()
    assert steps(tmp_path) == [2, 4, 5]
    assert checkpoints.best == 2


def test_no_state_goes_before_the_new_one_is_evaluated(tmp_path):
    """It may turn out to be worse than the best, or no good at all."""
    evaluations = Evaluations()
    checkpoints = Checkpoints(tmp_path, 1, 1, evaluations)
    seen = []
    checkpoints.after_save = lambda discarded=None: seen.append((steps(tmp_path), discarded))
    checkpoints.save(state(1), {}, to_evaluate=True)
    evaluations.add(evaluate(tmp_path, 1, top1=0.5))
    checkpoints.evaluated()
    checkpoints.save(state(2), {})
    checkpoints.save(state(3), {}, to_evaluate=True)
    checkpoints.wait()
    assert seen == [([1], None), ([1], None), ([1, 2], None), ([1, 2, 3], None)]
    checkpoints.discard(3)
    assert seen[-1] == ([1, 2], 3)
    assert checkpoints.latest == 2
    checkpoints.save(state(4), {}, to_evaluate=True)
    evaluations.add(evaluate(tmp_path, 4, top1=0.6))
    checkpoints.evaluated()
    checkpoints.close()
    assert seen[-1] == ([4], None)


def test_another_metric_ranks_anew(tmp_path):
    """By the records that are there."""
    for step, metrics in enumerate(({"top1": 0.9, "loss": 2.0}, {"top1": 0.1, "loss": 1.0}), 1):
        save(tmp_path, None, first=step)
        evaluate(tmp_path, step, **metrics)
    for metric, best in (("top1", 1), ("loss", 2)):
        (tmp_path / "config.json").write_text(json.dumps({"checkpoint": {"best_metric": metric}}))
        assert Checkpoints(tmp_path, read_only=True).best == best


def test_metrics_where_the_versions_before_had_them(tmp_path):
    """In progress.json; a record in metrics.jsonl comes first."""
    save(tmp_path, None, None, None, None)
    for step, metrics in ((1, {"top1": 0.9}), (2, {"top1": 0.1}), (3, {"top1": float("nan")})):
        folder = tmp_path / "checkpoints" / str(step)
        (folder / checksums.NAME).unlink()
        progress = json.loads((folder / "progress.json").read_text())
        (folder / "progress.json").write_text(json.dumps({**progress, "metrics": metrics}))
        checksums.seal(folder)
    assert Checkpoints(tmp_path, read_only=True).best == 1
    evaluate(tmp_path, 2, top1=0.95)
    assert Checkpoints(tmp_path, read_only=True).best == 2


@pytest.mark.accelerators
def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The next step writes into its memory while it is still being saved."""
    donate = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 0 - 1, x), donate_argnums=0)
    before = jax.tree.map(jax.numpy.asarray, state(3))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(before, {})
    donate(before)
    checkpoints.close()
    chex.assert_trees_all_equal(restored(tmp_path), state(3))


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_a_state_is_copied_once(backend, monkeypatch):
    """On a CPU device_get gives views; elsewhere it is the copy."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    got = np.zeros(3)
    monkeypatch.setattr(jax, "device_get", lambda tree: jax.tree.map(lambda _: got, tree))
    copied = saved_state.copy_to_host({"w": 0})["w"]
    assert np.shares_memory(copied, got) == (backend == "tpu")


# Damage.


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def files(folder):
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert {"SHA256SUMS", "progress.json", "_METADATA"} <= {path.name for path in found}
    return found


@pytest.mark.parametrize("harm", [flip, truncate, pathlib.Path.unlink])
def test_damage_to_any_file_is_noticed(harm, two, tmp_path):
    found = files(two / "checkpoints" / "2")
    print(f"{harm.__name__}: {len(found)} files")
    for file in found:
        name = file.relative_to(two)
        folder = shutil.copytree(two, tmp_path / name)
        harm(folder / name)
        lines = Checkpoints(folder).set_damaged_aside()
        assert len(lines) == 1, name
        assert file.name in lines[0] or file.name == checksums.NAME
        assert "\n" not in lines[0]
        assert "step 2 is damaged" in lines[0]
        chex.assert_trees_all_equal(restored(folder), state(1))


def test_all_of_the_manifest_counts(copy):
    file = copy / "checkpoints" / "2" / checksums.NAME
    sealed = file.read_bytes()
    for index in range(0, len(sealed), 3):
        changed = bytearray(sealed)
        changed[index] ^= 1 << index % 8
        file.write_bytes(changed)
        assert checksums.damage(file.parent), index
    print(f"SHA256SUMS: {len(range(0, len(sealed), 3))} flipped bits")
    file.write_bytes(sealed)
    assert checksums.damage(file.parent) is None


def test_a_file_or_manifest_too_many(copy):
    folder = copy / "checkpoints"
    (folder / "2" / "default" / "more").write_text("")
    assert checksums.damage(folder / "2") == "default/more does not belong to it"
    (folder / "2" / "default" / "more").unlink()
    shutil.copy(folder / "1" / checksums.NAME, folder / "2")
    assert checksums.damage(folder / "2")


def test_links_and_pipes_are_damage(copy):
    """A sum over a device never ends, and a link reads what lies elsewhere."""
    extra = copy / "checkpoints" / "2" / "extra"
    for make in (lambda: extra.symlink_to("/dev/zero"), lambda: os.mkfifo(extra)):
        make()
        assert checksums.damage(extra.parent) == "extra is not a plain file"
        extra.unlink()


def test_names_in_a_manifest_are_only_compared(copy):
    (copy / "config.json").write_text("{}")
    state = copy / "checkpoints" / "2"
    with (state / checksums.NAME).open("a") as file:
        file.write(f"{'0' * 64}  ../../config.json\n")
    assert checksums.damage(state) == "../../config.json is missing"


def test_other_names_are_no_states(tmp_path):
    """Looking for "7" where "007" is went on for ever."""
    (tmp_path / "config.json").write_text("{}")
    for name in ("007", "\u0663", "-1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        load_variables(tmp_path)
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        Checkpoints(tmp_path, read_only=True).read_whole(best=True)


def test_a_sealed_state_that_is_none(copy, caplog):
    """Its checksums are right: whoever made it made them too."""
    for step in ("1", "2"):
        folder = copy / "checkpoints" / step
        (folder / checksums.NAME).unlink()
        for file in folder.glob("default/*"):
            if file.is_file():
                file.write_text("[]")
        checksums.seal(folder)
    (copy / "config.json").write_text("{}")
    for read in (load_variables, restored, lambda path: Checkpoints(path).restore(LIKE, 1)):
        with pytest.raises(ConfigError, match=r"state at step [12] cannot be read \(.*checksums"):
            read(copy)


def test_a_file_that_the_disk_does_not_give(copy, monkeypatch):
    """Nobody knows then whether it is damaged: nothing is renamed, and no other state is taken."""

    def fails(file, name):
        raise OSError(errno.EIO, "Input/output error")

    before = sorted(copy.rglob("*"))
    monkeypatch.setattr(checksums.hashlib, "file_digest", fails)
    message = (
        r"state at step 2 cannot be read \(.*/default/_CHECKPOINT_METADATA: Input/output error\)"
    )
    for read in (
        lambda path: Checkpoints(path).set_damaged_aside(),
        lambda path: Checkpoints(path).restore(LIKE),
        lambda path: Checkpoints(path).records(),
        lambda path: load_variables(path, best=False),
    ):
        with pytest.raises(ConfigError, match=message.replace("step 2", "step [12]")) as caught:
            read(copy)
        assert "\n" not in str(caught.value)
        assert "move" not in str(caught.value)
    assert sorted(copy.rglob("*")) == before


def test_a_folder_that_may_not_be_listed(copy, monkeypatch):
    """`Path.rglob` passes over it, and its files would count as missing."""
    scandir = os.scandir

    def scanning(path):
        if os.fspath(path).endswith("/d"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scanning)
    with pytest.raises(ConfigError, match=r"cannot be read \(.*/d: Permission denied\)"):
        Checkpoints(copy).set_damaged_aside()


@pytest.mark.parametrize(
    "error",
    [
        AssertionError(),
        RuntimeError("UNAVAILABLE: the chip is in use"),
        ValueError("RESOURCE_EXHAUSTED"),
        MemoryError("8 GB"),
        OSError(errno.EACCES, os.strerror(errno.EACCES)),
    ],
)
def test_what_no_checksum_says_is_no_damage(error, copy, monkeypatch):
    def fails(*_, **__):
        raise error

    before = sorted(copy.rglob("*"))
    monkeypatch.setattr(ocp.Checkpointer, "restore", fails)
    words = error.strerror if isinstance(error, OSError) else type(error).__name__
    for read in (restored, load_variables):
        with pytest.raises(ConfigError, match=rf"step [12] cannot be read \({words}") as caught:
            read(copy)
        assert "move" not in str(caught.value)
        assert "another model" not in str(caught.value)
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize\nbackend"), AssertionError()])
def test_no_device(error, copy, monkeypatch):
    def fails():
        raise error

    monkeypatch.setattr(jax, "devices", fails)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    message = "step 1 cannot be read: JAX finds no device with JAX_PLATFORMS='cuda' "
    with pytest.raises(ConfigError, match=message) as caught:
        load_variables(copy)
    assert "\n" not in str(caught.value)


def test_a_state_of_another_model_says_what_differs(two):
    wrong = {"stem": {"kernel": jax.ShapeDtypeStruct((3, 5), np.float32)}}
    with pytest.raises(
        ConfigError, match=r"another model .*\(its params\.head has no place here\)"
    ):
        Checkpoints(two).restore(LIKE.replace(params=wrong))
    with pytest.raises(ConfigError, match=r"params\.stem\.kernel is \(3, 4\), not \(3, 5\)"):
        Checkpoints(two).restore(LIKE.replace(params={**LIKE.params, **wrong}))
    more = {"tail": LIKE.params["head"]}
    with pytest.raises(ConfigError, match=r"it has no params\.tail"):
        Checkpoints(two).restore(LIKE.replace(params={**LIKE.params, **more}))


# A state under another number.


def as_before(folder):
    """A state as the version before wrote it: without its step in progress.json."""
    (folder / checksums.NAME).unlink()
    progress = json.loads((folder / "progress.json").read_text())
    del progress["step"]
    (folder / "progress.json").write_text(json.dumps(progress))
    checksums.seal(folder)


@pytest.mark.parametrize("before", [False, True])
def test_a_state_under_another_number_is_damaged(before, copy):
    folder = copy / "checkpoints"
    if before:
        as_before(folder / "1")
        as_before(folder / "2")
    chex.assert_trees_all_equal(restored(copy), state(2))
    (folder / "2").rename(folder / "12")
    for read in (restored, lambda path: Checkpoints(path).records()):
        with pytest.raises(ConfigError, match="step 12 is damaged: it holds step 2, not 12"):
            read(copy)
    assert load_variables(copy, best=False).step == 1
    (line,) = Checkpoints(copy).set_damaged_aside()
    assert line == (
        "the state at step 12 is damaged: it holds step 2, not 12; it is now "
        f"{folder / '12.damaged'}"
    )
    chex.assert_trees_all_equal(restored(copy), state(1))
    (folder / "1").rename(folder / "7")
    with pytest.raises(
        ConfigError, match=r"no state .* is intact \(step 7: it holds step 1, not 7"
    ):
        load_variables(copy)


def test_a_step_that_is_only_written_there(copy):
    """The number in progress.json is sealed too, and the array still tells."""
    folder = copy / "checkpoints" / "2"
    (folder / checksums.NAME).unlink()
    progress = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps({**progress, "step": 12}))
    checksums.seal(folder)
    folder.rename(folder.with_name("12"))
    with pytest.raises(ConfigError, match="step 12 is damaged: it holds step 2, not 12"):
        restored(copy)
    assert load_variables(copy, best=False).step == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        '{"step": 2}'.encode("utf-16"),
        b'{"step": ' + b"9" * 5_000 + b"}",
        b'{"step": NaN, "metrics": {"top1": NaN}}',
        b'{"step": "2"}',
        b'{"step": true}',
        b'{"step": 2.0}',
        b'{"step": -2}',
        b'{"step": 2, "metrics": 5, "records": [1]}',
        b'{"step": 2, "metrics": {"top1": "\\ud800"}, "records": null}',
        b'{"step": 2, "metrics": {"top1": ' + b"9" * 400 + b"}}",
        b'{"step": 2, "metrics": {"top1": []}}',
    ],
)
def test_a_sealed_progress_of_a_stranger(content, copy):
    folder = copy / "checkpoints" / "2"
    (folder / checksums.NAME).unlink()
    (folder / "progress.json").write_bytes(content)
    checksums.seal(folder)
    assert load_variables(copy).step in (1, 2)
    checkpoints = Checkpoints(copy)
    assert checkpoints.best in (1, 2)
    with pytest.raises(ConfigError) as caught:
        checkpoints.records()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000
    for line in checkpoints.set_damaged_aside():
        assert "\n" not in line


# Links and special files.


@pytest.mark.parametrize("name", ["checkpoints", ".unfinished"])
def test_a_folder_that_is_a_link_is_refused(name, copy, tmp_path):
    victim = tmp_path / "victim"
    (victim / "2").mkdir(parents=True)
    (victim / "2" / "letter.txt").write_text("keep me")
    link = copy / name if name == "checkpoints" else copy / "checkpoints" / name
    shutil.rmtree(link, ignore_errors=True)
    link.symlink_to(victim)
    with pytest.raises(ConfigError, match=rf"{name} is a symbolic link, which is not followed"):
        Checkpoints(copy)
    assert [str(x.relative_to(victim)) for x in sorted(victim.rglob("*"))] == ["2", "2/letter.txt"]


def test_a_state_that_is_a_link_is_never_followed(copy, tmp_path):
    folder = copy / "checkpoints"
    (folder / "2").rename(tmp_path / "elsewhere")
    (folder / "2").symlink_to(tmp_path / "elsewhere")
    assert load_variables(copy, best=False).step == 1
    (line,) = Checkpoints(copy).set_damaged_aside()
    assert "step 2 is damaged: it is a link or not a folder" in line
    assert (tmp_path / "elsewhere" / checksums.NAME).exists()
    assert (folder / "2.damaged").is_symlink()


@pytest.mark.parametrize("name", [checksums.NAME, "progress.json", "default/manifest.ocdbt"])
def test_special_files_in_a_state(name, copy):
    path = copy / "checkpoints" / "2" / name
    makes = [
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path),
        lambda: path.mkdir(),
        lambda: (path.write_bytes(b""), os.truncate(path, 2**40)),
    ]
    for make in makes[: 4 if name != checksums.NAME else 5]:  # a terabyte of an array is summed
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make()
        assert checksums.damage(copy / "checkpoints" / "2")
        assert load_variables(copy, best=False).step == 1


def test_what_is_no_state_is_not_removed(copy):
    """Somebody's folder with a number for a name, which came while the run was going on."""
    (copy / "checkpoints" / "0").mkdir()
    (copy / "checkpoints" / "0" / "letter.txt").write_text("keep me")
    save(copy, 0.1, first=3, keep=1)
    assert steps(copy) == [0, 1, 3]


def test_damaged_states_step_aside(copy):
    folder = copy / "checkpoints"
    for number in range(2):  # what stepped aside before is not written over
        truncate(folder / "2" / "progress.json")
        lines = Checkpoints(copy).set_damaged_aside()
        aside = "2.damaged.1" if number else "2.damaged"
        assert lines == [
            "the state at step 2 is damaged: progress.json does not match its checksum; it is now "
            f"{folder / aside}"
        ]
        assert (folder / aside / "progress.json").exists()
        assert Checkpoints(copy).latest == 1
        with ocp.CheckpointManager(folder) as manager:
            assert manager.all_steps() == [1]
        save(copy, 0.2, first=2)
    assert Checkpoints(copy).set_damaged_aside() == []


def test_where_no_state_is_whole_all_stay(copy):
    """A second start must not take it for a new run."""
    for step in (1, 2):
        truncate(copy / "checkpoints" / str(step) / "progress.json")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"no state .* is intact \(step 1: progress\.json"):
            Checkpoints(copy).set_damaged_aside()
    assert steps(copy) == [1, 2]
    assert workdir.has_states(copy)


def fails(*_, **__):
    raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def test_states_that_cannot_be_listed_are_no_new_run(copy, monkeypatch):
    monkeypatch.setattr(os, "listdir", fails)
    for look in (workdir.has_states, load_variables, lambda path: Checkpoints(path).latest):
        with pytest.raises(ConfigError, match=r"checkpoints cannot be read \(Permission denied\)"):
            look(copy)


def test_a_damaged_state_that_cannot_be_renamed(copy, monkeypatch):
    truncate(copy / "checkpoints" / "2" / "progress.json")
    monkeypatch.setattr(os, "rename", fails)
    message = (
        r"step 2 is damaged: progress\.json .*; it cannot be renamed to .* \(Permission denied"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        Checkpoints(copy).set_damaged_aside()
    assert "\n" not in str(caught.value)
    assert steps(copy) == [1, 2]


def test_a_state_that_is_lost_after_its_checksums_were_right(copy):
    checkpoints = Checkpoints(copy)
    assert checkpoints.set_damaged_aside() == []
    shutil.rmtree(copy / "checkpoints" / "2")
    with pytest.raises(ConfigError, match=r"state at step 2 cannot be read \(") as caught:
        checkpoints.restore(LIKE, 2)
    assert "\n" not in str(caught.value)


def test_restore_itself_looks_at_the_checksums(copy):
    truncate(copy / "checkpoints" / "2" / "progress.json")
    with pytest.raises(ConfigError, match="step 2 is damaged: progress"):
        restored(copy)


@pytest.mark.parametrize(("best", "damaged"), [(True, 1), (False, 2)])
def test_variables_come_from_the_next_best_state(best, damaged, copy, caplog):
    """Reading renames nothing: the run may be going on."""
    flip(copy / "checkpoints" / str(damaged) / "default" / "_METADATA")
    before = sorted(copy.rglob("*"))
    with caplog.at_level(logging.WARNING):
        _, variables, _ = load_variables(copy, best=best)
    chex.assert_trees_all_equal(variables["params"], state(3 - damaged).params)
    assert f"the state at step {damaged} is damaged: default/_METADATA" in caplog.text
    assert sorted(copy.rglob("*")) == before
    truncate(next((copy / "checkpoints" / str(3 - damaged) / "default" / "d").iterdir()))
    with pytest.raises(ConfigError, match=r"no state .* is intact .*default/d/"):
        load_variables(copy, best=best)


def test_a_state_that_is_removed_while_it_is_read(copy, monkeypatch):
    """By the run that trains there, which has a newer one."""
    read = Checkpoints._read

    def reading(self, step):
        if step == 1:
            shutil.rmtree(copy / "checkpoints" / "1")
        return read(self, step)

    monkeypatch.setattr(Checkpoints, "_read", reading)
    _, variables, _ = load_variables(copy)
    chex.assert_trees_all_equal(variables["params"], state(2).params)


# Cut off.


class Killed(BaseException):
    """Nothing is cleaned up after a kill -9."""


@pytest.fixture
def disk(monkeypatch):
    """Every call that changes names or waits for the disk, of which one can be the last."""
    calls = []
    disk = {"calls": calls, "last": None}

    def watched(name, function):
        def call(*arguments, **keywords):
            if len(calls) == disk["last"]:
                raise Killed
            calls.append(name)
            return function(*arguments, **keywords)

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    return disk


def test_a_kill_between_any_two_calls_to_the_disk(tmp_path, disk):
    """The state before, or the new one, is there and whole; and the run can go on."""
    save(tmp_path / "before", 0.1, keep=1)
    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    disk["calls"].clear()
    save(tmp_path / "whole", 0.2, first=2, keep=1)
    calls = list(disk["calls"])
    assert {"fsync", "rename", "replace", "mkdir", "unlink", "rmdir"} == set(calls)
    print(f"ended before each of {len(calls)} calls to the disk")
    survived = []
    for last, call in enumerate(calls):
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(last))
        disk["calls"].clear()
        disk["last"] = last
        with contextlib.suppress(Killed):
            save(folder, 0.2, first=2, keep=1)
        disk["last"] = None
        checkpoints = Checkpoints(folder, keep=1)
        assert checkpoints.set_damaged_aside() == []
        survived.append(checkpoints.latest)
        if call in ("rename", "replace") or last % 8 == 0:  # all would take long
            chex.assert_trees_all_equal(checkpoints.restore(LIKE), state(checkpoints.latest))
            checkpoints.save(state(3), {})
            checkpoints.close()
            assert 3 in steps(folder)
            assert not list((folder / "checkpoints" / ".unfinished").iterdir())
    assert survived == sorted(survived)
    assert set(survived) == {1, 2}


# No room.


def test_what_a_failed_write_leaves_behind_is_not_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    saved_state.silence_closed_loops.__wrapped__()
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(each.exc_value) for each in told] == ["another"]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_orbax(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: write: [OS error 28: ENOSPC No space left on device]")


FAILURES = [(os, "fsync", full), (os, "rename", full), (ocp.Checkpointer, "save", full_in_orbax)]


@pytest.mark.parametrize(("where", "name", "failure"), FAILURES)
@pytest.mark.parametrize("when", ["check", "save", "close"])
def test_a_failed_write_is_told(when, where, name, failure, tmp_path, monkeypatch):
    save(tmp_path, 0.5)
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, failure)
        checkpoints.save(state(2), {})
        checkpoints._writer.shutdown()
    message = (
        r"--workdir=.*: the state at step 2 could not be written \((OSError: )?(\[Errno 28\] )?"
        r"No space left on device\); the last good one is at step 1"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        checkpoints.save(state(3), {}) if when == "save" else getattr(checkpoints, when)()
    assert "\n" not in str(caught.value)
    checkpoints.close()  # told once
    chex.assert_trees_all_equal(restored(tmp_path), state(1))
    assert not [*(tmp_path / "checkpoints" / ".unfinished").glob("*")]


def test_a_full_disk(small_disk):
    save(small_disk, 0.5)
    (small_disk / "others").write_bytes(bytes(300_000))
    checkpoints = Checkpoints(small_disk)
    large = state(2).replace(params={"w": np.random.default_rng(0).random(100_000)})
    checkpoints.save(large, {})
    with pytest.raises(ConfigError, match=r"step 2 could not be written \(No space left") as caught:
        checkpoints.close()
    assert "\n" not in str(caught.value)
    chex.assert_trees_all_equal(restored(small_disk), state(1))
    (small_disk / "others").unlink()
    save(small_disk, 0.6, first=2)
    chex.assert_trees_all_equal(restored(small_disk), state(2))


def test_a_full_disk_and_small_files(small_disk):
    path = small_disk / "config.json"
    atomic_write(path, "before")
    (small_disk / "others").write_bytes(bytes(500_000))
    full_disk = pytest.raises(ConfigError, match=r"config\.json cannot be written \(No space left")
    with full_disk, write_errors(path):
        atomic_write(path, "x" * 100_000)
    assert path.read_text() == "before"
    assert sorted(os.listdir(small_disk)) == ["config.json", "others"]
    records = Appender(small_disk / "metrics.jsonl")
    records.write(b"{}\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written \(No space left"):
        records.write(b"x" * 100_000)
    records.close()
    assert (small_disk / "metrics.jsonl").read_bytes().startswith(b"{}\n")


def test_a_workdir_that_is_gone(tmp_path):
    folder = tmp_path / "run"
    save(folder, 0.5)
    checkpoints = Checkpoints(folder)
    shutil.rmtree(folder)
    checkpoints.save(state(2), {})
    with pytest.raises(ConfigError, match=r"run: .* \(No such file or directory\); there is none"):
        checkpoints.wait()
    assert not folder.exists()


def test_a_slow_disk_holds_up_only_the_next_save(tmp_path, monkeypatch):
    room, sync = threading.Event(), os.fsync

    def slow(descriptor):
        assert room.wait(60)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), {})
    checkpoints.check()
    assert not list(tmp_path.glob("checkpoints/[0-9]*"))
    timer = threading.Timer(0.2, room.set)
    timer.start()
    checkpoints.save(state(2), {})  # after the first, which waits for the disk
    assert room.is_set()
    assert 1 in steps(tmp_path)
    checkpoints.close()
    timer.join()
    assert Checkpoints(tmp_path).latest == 2


# The folder.


def test_another_data_set_is_refused_unless_allowed(copy):
    config = c.Config()
    same = {"train": "1", "eval": "2"}
    assert workdir.open_workdir(copy, config, same) == copy
    message = r"data\.name = 'digits' has changed .*\(fingerprints: train: 1 -> 7\).*allow_change"
    with pytest.raises(ConfigError, match=message):
        workdir.open_workdir(copy, config, {**same, "train": "7"})
    assert json.loads((copy / "data.json").read_text()) == same
    config.checkpoint.allow_change = True
    workdir.open_workdir(copy, config, {**same, "train": "7"})


def test_small_files_are_whole_or_not_there(tmp_path, disk):
    path = tmp_path / "classes.json"
    atomic_write(path, "before")
    disk["calls"].clear()
    atomic_write(path, "after")
    for last in range(len(disk["calls"])):
        atomic_write(path, "before")
        disk["calls"].clear()
        disk["last"] = last
        with pytest.raises(Killed):
            atomic_write(path, "after")
        disk["last"] = None
        assert path.read_text() in ("before", "after")


def test_a_state_without_its_arrays_is_not_sealed(tmp_path, monkeypatch):
    """Orbax reports success where it writes none, in any but the runtime's first process."""
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    checkpoints.save(state(1), {})
    with pytest.raises(ConfigError, match="state at step 1 could not be written"):
        checkpoints.close()
    assert steps(tmp_path) == []


def test_a_state_that_is_not_what_was_saved_is_not_sealed(tmp_path, monkeypatch):
    saved = ocp.Checkpointer.save

    def changed(self, path, args):
        saved(
            self,
            path,
            args=ocp.args.StandardSave(jax.tree.map(lambda x: np.asarray(x + 1), args.item)),
        )

    monkeypatch.setattr(ocp.Checkpointer, "save", changed)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), {})
    with pytest.raises(ConfigError, match=r"\.step is not on disk as it was saved"):
        checkpoints.close()
    assert steps(tmp_path) == []
