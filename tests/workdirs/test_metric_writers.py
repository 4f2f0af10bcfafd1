"""The lines of a run, on a terminal and in a file, and the folders of its curves."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import termios

import pytest

import resnet_jax.workdirs.metric_writers as module
from resnet_jax.config import Config, Log
from resnet_jax.workdirs.metric_writers import MetricWriters

NUMBERS = {"loss": 0.5, "top1": 0.5, "top5": 1.0, "images_per_second": 9.0, "skipped": 0}
TRAIN = {"split": "train", "kind": "training", **NUMBERS}
TEST = {"split": "test", "kind": "evaluation", **NUMBERS}
TIME = r"\d\d-\d\d \d\d:\d\d:\d\d"


def writers(folder, stream, completed=0, tensorboard=False):
    return MetricWriters(Config(log=Log(tensorboard=tensorboard)), folder, completed, 9, 3, stream)


def test_step_lines_stay_on_a_terminal(tmp_path):
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    with os.fdopen(slave, "w") as terminal:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        told = writers(tmp_path, terminal)
        for step in (3, 6):
            told.advance(step)
            told.record({"step": step, **TRAIN})
        told.close()
        shown = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                shown += os.read(master, 2**16)
        shown = shown.decode()
    os.close(master)
    # What a carriage return overwrites is gone.
    kept = [line.rpartition("\r")[2] for line in shown.split("\r\n")]
    for step in (3, 6):
        start = rf"[\d:]{{8}}  step {step}/9  epoch "
        assert any(re.match(start, line) for line in kept), shown


@pytest.mark.parametrize(("processes", "host"), [(1, ""), (2, " node7")])
def test_lines_have_the_time_and_among_several_processes_the_host(
    processes, host, tmp_path, monkeypatch
):
    monkeypatch.setattr(module.jax, "process_count", lambda: processes)
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node7")
    stream = io.StringIO()
    told = writers(tmp_path, stream)
    told.log("resuming")
    with told.compiling("the training step"):
        pass
    told.close()
    first, *others = stream.getvalue().splitlines()
    assert re.fullmatch(rf"{TIME}{host}  resuming", first)
    assert [line.partition("  ")[2] for line in others] == [
        "compiling the training step",
        "compiled the training step in 0:00",
    ]


@pytest.mark.parametrize("classes", [5, 6])
def test_lines_leave_top_5_of_five_classes_out(classes, tmp_path):
    """The record keeps it."""
    stream, config = io.StringIO(), Config(log=Log(tensorboard=False))
    told = MetricWriters(config, tmp_path, 0, 9, 3.0, stream, num_classes=classes)
    told.record({"step": 3, **TEST})
    told.close()
    assert "top-1 50.00%" in stream.getvalue()
    assert ("top-5" in stream.getvalue()) == (classes > 5)
    assert '"top5": 1.0' in (tmp_path / "metrics.jsonl").read_text()


def test_curves_of_the_same_name_are_in_different_folders(tmp_path):
    hostile = {**TEST, "split": "../../outside"}
    (tmp_path / "run").mkdir()
    for completed in (0, 3):
        told = writers(tmp_path / "run", io.StringIO(), completed, tensorboard=True)
        for record in (TRAIN, TEST, hostile)[: 3 - completed]:  # the second start: none
            told.record({"step": completed + 1, **record})
        told.close()
    folder = tmp_path / "run" / "tensorboard"
    names = {path.name for path in folder.iterdir()}
    assert {"train", "test"} < names
    assert len(names) == 3
    assert os.listdir(tmp_path) == ["run"]
    # Each folder hears of the second start, which hides what it repeats.
    assert all(len(list(path.iterdir())) == 2 for path in folder.iterdir())
    data = b"".join(path.read_bytes() for path in (folder / "train").iterdir())
    assert b"loss" in data
    assert b"train/loss" not in data


@pytest.fixture(autouse=True)
def _second_starts_have_other_files(monkeypatch):
    seconds = iter(range(10**9, 10**9 + 100))
    monkeypatch.setattr(module.time, "time_ns", lambda: next(seconds) * 10**9)


def test_a_link_among_the_folders_is_not_followed(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    (tmp_path / "run" / "tensorboard" / "train").symlink_to(tmp_path / "outside")
    stream = io.StringIO()
    told = writers(tmp_path / "run", stream, tensorboard=True)
    told.record({"step": 1, **TRAIN})
    told.close()
    assert not os.listdir(tmp_path / "outside")
    assert "TensorBoard is disabled" in stream.getvalue()
