"""A disk that fills up, turns read-only or loses a file, under everything that a run writes.

What is only a copy (TensorBoard, a trace, the report, the terminal) is left out with one line.
Where metrics.jsonl or a file of the start cannot be written the run ends with one line and exit
code 2; where a state cannot, see tests/workdirs/test_checkpoint.py and test_resume.py.
"""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import chex
import jax
import pytest

from resnet_jax import config as c
from resnet_jax.cli import commands, parser
from resnet_jax.errors import ConfigError, DivergedError, PeerError, StoppedError
from resnet_jax.training.loop import train
from resnet_jax.training.metrics import MetricAccumulator, diverged
from resnet_jax.training.run import Run
from resnet_jax.training.trace import Trace
from resnet_jax.workdirs.checkpoint import Checkpoints
from resnet_jax.workdirs.metric_writers import Appender, MetricWriters
from tests.training.test_loop import configuration, records, state_of

pytestmark = pytest.mark.usefixtures("tiny_model")
NUMBERS = {"loss": 0.5, "top1": 0.5, "top5": 1.0, "images_per_second": 9.0, "skipped": 0}


def writers(folder, stream, **log):
    return MetricWriters(c.Config(log=c.Log(**log)), folder, 0, 9, 3.0, stream)


def failing(code):
    def fails(*_, **__):
        raise OSError(code, os.strerror(code))

    return fails


# Standard output.


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize(("what", "code"), [("print_copy('top-1')", 0), ("result()", 2)])
def test_a_log_on_a_full_disk(what, code):
    """Lost is what a workdir holds too; a result that was only printed ends with one line."""
    program = f"""
import sys
from resnet_jax.cli import parser
from resnet_jax.cli import commands
from resnet_jax.terminal import print_copy, printing

def result():
    with printing():
        print("a result")

commands.summary = lambda options: {what}
sys.exit(parser.main(["summary", "resnet20"]))
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == code
    line = "error: standard output cannot be written ([Errno 28] No space left on device)\n"
    assert done.stderr == (line if code else "")


# Copies of the records.


def fill_up(file, folder, patch):
    file._file.close()
    file._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115


def lose(file, folder, patch):
    shutil.rmtree(folder / "tensorboard")


def turn_read_only(file, folder, patch):
    patch.setattr(file, "_file", types.SimpleNamespace(fileno=file._file.fileno, close=int))
    file._file.write = failing(errno.EROFS)


HARMS = [(fill_up, "No space"), (lose, "No such file"), (turn_read_only, "Read-only file system")]


@pytest.mark.parametrize(("harm", "words"), HARMS)
def test_tensorboard_is_left_out(harm, words, tmp_path, monkeypatch):
    stream = io.StringIO()
    told = writers(tmp_path, stream)
    told.record({"step": 1, "split": "train", **NUMBERS})
    events = told._copies[0]._files["train"]
    file = events._file
    harm(events, tmp_path, monkeypatch)
    for step in (2, 3):
        told.record({"step": step, "split": "train", **NUMBERS})
    told.close()
    file.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    (line,) = [line for line in stream.getvalue().splitlines() if "TensorBoard" in line]
    assert "TensorBoard is disabled from here on: " in line
    assert words in line


@pytest.mark.parametrize("when", ["log", "finish"])
def test_weights_and_biases_is_left_out(when, tmp_path, monkeypatch):
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    setattr(run, when, failing(errno.EIO))
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **_: run
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    stream = io.StringIO()
    told = writers(tmp_path, stream, tensorboard=False, wandb="digits")
    told.record({"step": 1, "split": "train", **NUMBERS})
    told.close()
    assert len(records(tmp_path)) == 1
    (line,) = [line for line in stream.getvalue().splitlines() if "Weights" in line]
    assert "Input/output error" in line


def test_a_copy_that_cannot_begin_is_left_out(tmp_path, monkeypatch):
    """Training does not depend on a server, a key, or a file in the place of a folder."""
    stand_in = types.ModuleType("wandb")
    stand_in.init = failing(errno.ECONNREFUSED)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    (tmp_path / "tensorboard").touch()
    stream = io.StringIO()
    told = writers(tmp_path, stream, wandb="digits")
    told.record({"step": 1, "split": "train", **NUMBERS})
    told.close()
    assert len(records(tmp_path)) == 1
    lines = stream.getvalue().splitlines()
    told_of = [line.partition("  ")[2] for line in lines]  # after the time
    found = [line.partition(":")[0] for line in told_of if "is disabled" in line]
    assert found == ["TensorBoard is disabled", "Weights & Biases is disabled"]


def test_the_same_name_in_two_folders_is_two_runs(tmp_path, monkeypatch):
    ids = []
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda id, **_: ids.append(id) or types.SimpleNamespace(finish=int)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for name in ("a/lr=0.1 #2", "b/lr=0.1 #2", "a/lr=0.1 #2"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        writers(tmp_path / name, io.StringIO(), tensorboard=False, wandb="digits").close()
    assert ids[0] == ids[2] != ids[1]
    assert all(each.isalnum() for each in ids)


class FullTerminal(io.StringIO):
    write = failing(errno.ENOSPC)


def test_nobody_can_be_told(tmp_path, monkeypatch):
    """As with `2> log` on the disk of the workdir."""
    told = writers(tmp_path, FullTerminal(), tensorboard=False)
    told.log("a line")
    told.record({"step": 1, "split": "train", **NUMBERS})
    told.close()
    assert len(records(tmp_path)) == 1
    monkeypatch.setattr(sys, "stderr", FullTerminal())
    assert parser.main(["summary", "resnet2O"]) == 2


@pytest.mark.parametrize("call", ["start_trace", "stop_trace"])
def test_a_trace_is_left_out(call, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("FAILED_PRECONDITION: profile is not\na directory")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(jax.profiler, call, fails)
    lines = []
    trace = Trace(c.Config(log=c.Log(profile="1:2")), tmp_path, lines.append)
    trace.before(1)
    trace.after(2, ())
    trace.close()
    assert lines == ["log.profile: no trace: FAILED_PRECONDITION: profile is not a directory"]


def test_a_report_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("resnet_jax.report.page.write_report", failing(errno.ENOSPC))
    commands._report_at_the_end(tmp_path)
    words = "no report.html: [Errno 28] No space left on device"
    assert capsys.readouterr().err == f"writing report.html\n{words}\n"


# The record.


@pytest.mark.parametrize(("harm", "words"), HARMS)
def test_metrics_that_cannot_be_written_are_told(harm, words, tmp_path, monkeypatch):
    (tmp_path / "tensorboard").mkdir()  # the folder that `lose` removes
    file = Appender(tmp_path / "tensorboard" / "metrics.jsonl")
    opened = file._file
    file.write(b"{}\n")
    harm(file, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=rf"metrics\.jsonl cannot be written \({words}") as caught:
        file.write(b"{}\n")
    assert "\n" not in str(caught.value)
    file.close()
    opened.close()


def test_a_damaged_line_of_metrics_is_dropped(tmp_path):
    """What was written before and after it stays."""
    path = tmp_path / "metrics.jsonl"
    record = {"split": "test", "loss": 0.5, "top1": 0.5}
    lines = [json.dumps({"step": step, **record}).encode() + b"\n" for step in (1, 2, 3, 4)]
    path.write_bytes(lines[0] + b'{"step\xff": 2}\n' + lines[2] + lines[3])
    telemetry_of_three = MetricWriters(
        c.Config(log=c.Log(tensorboard=False)), tmp_path, 3, 9, 3.0, io.StringIO()
    )
    telemetry_of_three.close()
    assert path.read_bytes() == lines[0] + lines[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six steps, and states after two of them."""
    workdir = tmp_path_factory.mktemp("trained")
    train(configuration(checkpoint__every_steps=2, checkpoint__keep=2), workdir)
    return workdir


NAMES = ["config.json", "classes.json", "data.json", "environment.json"]


@pytest.mark.parametrize(("name", "code"), [*zip(NAMES, [errno.ENOSPC, errno.EROFS] * 2)])
def test_a_start_that_cannot_write_its_files(name, code, trained, tmp_path, monkeypatch):
    """It touches neither the states nor the records."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    replace = os.replace

    def replacing(source, target):
        if os.path.basename(target) == name:
            failing(code)()
        replace(source, target)

    with (workdir / name).open("a") as file:
        file.write(" ")  # the same to JSON, and not the same file: only what differs is written
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "replace", replacing)
    with pytest.raises(ConfigError, match=f"{name} cannot be written") as caught:
        train(configuration(checkpoint__every_steps=2, checkpoint__keep=2), workdir)
    assert os.strerror(code) in str(caught.value)
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"environment.json"}  # of the last start


# Errors of a state that is written while another one is under way.


def run_that_cannot_save():
    """As much of a run as tells of the end, with a state that the disk did not take."""
    lines = []

    def close():
        raise ConfigError("the state at step 2 could not be written")

    class States:
        def __init__(self):
            self.close = close

        @property
        def latest(self):
            close()

    run = types.SimpleNamespace(
        checkpoints=States(), writers=types.SimpleNamespace(log=lines.append)
    )
    return run, lines


@pytest.mark.parametrize("error", [DivergedError, PeerError, RuntimeError, KeyboardInterrupt])
def test_both_errors_are_told(error):
    run, lines = run_that_cannot_save()
    with pytest.raises(error), Run.closing_checkpoints(run):
        raise error("another")
    assert lines == ["the state at step 2 could not be written"]


def test_a_stop_that_could_not_save_is_no_stop():
    """It would end with "all is saved"."""
    run, lines = run_that_cannot_save()
    with pytest.raises(ConfigError, match="step 2"), Run.closing_checkpoints(run):
        raise StoppedError("stopped; all is saved")
    with pytest.raises(ConfigError, match="step 2"), Run.closing_checkpoints(run):
        pass
    assert lines == []


def test_divergence_beside_a_state_that_could_not_be_written():
    run, _ = run_that_cannot_save()
    line = str(diverged("training loss", 3, run.checkpoints))
    assert line.startswith("the training loss is not a number at step 3; the state at step 2 could")


# Whole runs.


def at_step(patch, step, deed):
    add = MetricAccumulator.add

    def adding(self, done, metrics):
        add(self, done, metrics)
        if done == step:
            deed()

    patch.setattr(MetricAccumulator, "add", adding)


FLAGS = (
    "--config.data.image_size=8",
    "--config.train.steps=12",
    "--config.train.batch_size=16",
    "--config.log.every_steps=1",
    "--config.log.tensorboard=false",
    "--config.checkpoint.every_steps=2",
    "--config.evaluate.every_epochs=1000",
)


@pytest.mark.faults
@pytest.mark.parametrize("small_disk", ["12m"], indirect=True)
def test_a_disk_that_is_full_to_the_last_byte(small_disk, tmp_path, capsys, monkeypatch):
    """Again and again at another step; the same command goes on, and ends as without that."""
    assert parser.main(["train", f"--workdir={tmp_path / 'straight'}", *FLAGS]) == 0
    workdir, others = small_disk / "run", small_disk / "others"

    def fill():
        with others.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError as error:
                    assert error.errno == errno.ENOSPC  # noqa: PT017

    save, told = Checkpoints.save, []
    for step in (4, 6, 8, 10, 12):

        def saving(self, state, *rest, step=step):
            if state.step == step:
                self.wait()  # or the state before the last would go, and leave room
                fill()
            save(self, state, *rest)

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", saving)
            assert parser.main(["train", f"--workdir={workdir}", *FLAGS]) == 2
        said = capsys.readouterr().err.splitlines()
        told.append(said[-1])
        assert f"the state at step {step} could not be written (No space left" in said[-1]
        assert said[-1].startswith("error: ")
        assert "Traceback" not in "".join(said)
        others.unlink()
    assert parser.main(["train", f"--workdir={workdir}", *FLAGS]) == 0
    chex.assert_trees_all_equal(state_of(workdir), state_of(tmp_path / "straight"))
    found, expected = records(workdir), records(tmp_path / "straight")
    assert [(r["step"], r["loss"]) for r in found] == [(r["step"], r["loss"]) for r in expected]
    print(*told, sep="\n")


@pytest.mark.faults
def test_a_workdir_that_vanishes(tmp_path, monkeypatch):
    """It is not made again: a disk that was unmounted would be trained on below its mount point."""
    workdir = tmp_path / "run"
    at_step(monkeypatch, 1, lambda: shutil.rmtree(workdir))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written \(No such file"):
        train(configuration(), workdir)
    assert not workdir.exists()


@pytest.mark.faults
def test_a_signal_where_the_last_state_cannot_be_written(tmp_path, monkeypatch):
    """A mistake, not a stop: the same command would not go on from there."""

    def deed():
        monkeypatch.setattr("resnet_jax.workdirs.checksums.seal", failing(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, 2, deed)
    with pytest.raises(ConfigError, match=r"step 2 could not be written \(No space left"):
        train(configuration(), tmp_path)
    assert Checkpoints(tmp_path, read_only=True).latest is None
