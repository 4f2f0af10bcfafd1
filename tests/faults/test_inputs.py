"""What goes wrong with images, data files and worker processes while a run goes on."""

import contextlib
import errno
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax.config.schema import Config, Data, Train
from resnet_jax.data import pipeline
from resnet_jax.data.sources import open_source
from resnet_jax.errors import ConfigError, DataError
from resnet_jax.evaluation.metrics import evaluate
from resnet_jax.training import inputs
from resnet_jax.training.loop import train
from resnet_jax.training.metrics import MetricAccumulator
from tests import speed
from tests.conftest import FAST_COMPILE
from tests.data.photos import Photos, batches_of
from tests.training.runs import state_of
from tests.training.test_loop import configuration

ROOT = pathlib.Path(__file__).parents[2]
SHARED = pathlib.Path("/dev/shm")  # noqa: S108 - where Linux shows its shared memory
pytestmark = pytest.mark.usefixtures("tiny_model")


@contextlib.contextmanager
def limit(seconds):
    """Fails what hangs."""

    def late(*_):
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def stream(source, corrupt, steps=400, **fields):
    sampler = pipeline.IndexSampler(len(source), seed=1)
    config = Data(image_size=8, crop="random_resized", threads=2, prefetch=2, **fields)
    dataset = pipeline.StreamedDataset(source, config, corrupt)
    return dataset.train_batches(sampler, batches_of(8), 0, steps)


def reports(most=10):
    lines = []
    return lines, pipeline.CorruptImages(most, lines.append)


# Worker processes.


def kill_one_worker():
    """SIGKILL, as the kernel sends it where memory runs out."""
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def test_a_killed_worker_ends_the_stream():
    with limit(120):
        batches = stream(Photos(), reports()[1], workers=2)
        next(batches)
        assert len(multiprocessing.active_children()) == 2
        kill_one_worker()
        with pytest.raises(DataError, match=r"data\.workers = 2: a worker process was killed"):
            for _ in batches:
                pass
        assert not multiprocessing.active_children()


def maps_of(pid):
    """The mapped images of a process."""
    lines = pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if "memfd:resnet_jax" in line]


def open_files():
    paths = list(pathlib.Path("/proc/self/fd").iterdir())
    return [os.readlink(path) for path in paths if path.is_symlink()]


def names_in_shared_memory():
    return {path.name for path in SHARED.iterdir() if path.stat().st_uid == os.getuid()}


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="looks memory up as Linux shows it")
def test_a_closed_stream_has_given_its_memory_back():
    """While it is open it has no name that could outlive it."""
    before = names_in_shared_memory()
    batches = stream(Photos(), reports()[1], workers=1)
    with limit(120):
        kept = next(batches)
        [worker] = multiprocessing.active_children()
        assert len(maps_of("self")) == len(maps_of(worker.pid)) == 1
        assert names_in_shared_memory() <= before
        batches.close()
    assert not multiprocessing.active_children()
    assert kept["images"].any()  # the memory is given back with the last images
    del kept
    assert not maps_of("self")
    assert not [each for each in open_files() if "memfd:resnet_jax" in each]


def test_an_error_in_a_worker_is_raised_with_its_traceback():
    with limit(120), pytest.raises(ZeroDivisionError) as caught:
        next(stream(Faulty(), reports()[1], workers=1))
    assert "in __getitem__" in caught.value.__notes__[0]


class Faulty(Photos):
    def __getitem__(self, index):
        return index // 0


class Ending(Photos):
    def __getitem__(self, index):
        os._exit(3)


def test_a_worker_that_ends_by_itself_is_told_from_a_killed_one():
    with limit(120), pytest.raises(DataError, match=r"workers = 1: .* ended with exit code 3"):
        next(stream(Ending(), reports()[1], workers=1))


def test_a_worker_that_cannot_start(monkeypatch):
    """As at the limits of processes and of memory."""

    def start(*_):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", start)
    with pytest.raises(DataError, match=r"data\.workers = 1: .*cannot be started \(Resource temp"):
        next(stream(Photos(), reports()[1], workers=1))


@pytest.mark.slow
def test_a_run_goes_on_after_a_killed_worker(tmp_path, monkeypatch):
    """It stops with its last checkpoint whole, and the same command ends it as without the kill."""
    config = configuration(data__crop="random_resized", checkpoint__every_steps=2)
    config.train.steps = 20  # more than the worker has made when it is killed
    expected = train(config, tmp_path / "straight")
    config.data.workers, config.data.prefetch = 1, 1
    add = MetricAccumulator.add

    def adding(self, done, metrics):
        add(self, done, metrics)
        if done == 3:
            kill_one_worker()

    with limit(240):
        with monkeypatch.context() as patch:
            patch.setattr(MetricAccumulator, "add", adding)
            with pytest.raises(DataError, match=r"data\.workers = 1"):
                train(config, tmp_path / "killed")
        assert 0 < state_of(tmp_path / "killed")["step"] < 20
        found = train(config, tmp_path / "killed")
    assert found.metrics == expected.metrics
    chex.assert_trees_all_equal(state_of(tmp_path / "killed"), state_of(tmp_path / "straight"))


PARENT = """
import multiprocessing, time
from resnet_jax.data import pipeline
from tests.faults.test_inputs import Photos, reports, stream
if __name__ == "__main__":
    batches = stream(Photos(), reports()[1], steps=10**6, workers=2)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    for _ in batches:
        time.sleep(0.01)
"""


def is_running(pid):
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition, seconds):
    end = time.monotonic() + speed.seconds(seconds)
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    """And nothing of them stays in /dev/shm, which no later start would clear."""
    before = names_in_shared_memory()
    path = tmp_path / "parent.py"
    path.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, env=environment)
    try:
        with limit(120):
            workers = [int(each) for each in parent.stdout.readline().split()]
    finally:
        parent.kill()
        parent.stdout.close()
        parent.wait()
    assert len(workers) == 2
    try:
        assert wait_for(lambda: not any(map(is_running, workers)), 20)
        assert names_in_shared_memory() <= before
    finally:
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_to_all_processes_saves_without_a_traceback(number, tmp_path):
    """As Ctrl-C in a terminal, and a batch system, send it."""
    flags = [
        f"--workdir={tmp_path}",
        "--config=tests/tiny.py",
        "--config.data.image_size=8",
        "--config.data.crop=random_resized",
        "--config.data.workers=1",
        "--config.train.steps=100000",
        "--config.train.batch_size=16",
        "--config.log.every_steps=5",
        "--config.log.tensorboard=false",
        "--config.evaluate.every_epochs=1000000",
    ]
    environment = {**os.environ, "XLA_FLAGS": FAST_COMPILE}
    run = subprocess.Popen(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        records = tmp_path / "metrics.jsonl"
        assert wait_for(lambda: records.exists() and records.read_text(), 150)
        os.killpg(run.pid, number)
        output, _ = run.communicate(timeout=speed.seconds(60))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 75, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("stopped: ")
    step = int(output.rpartition("after step ")[2].split(";")[0])
    assert (tmp_path / "checkpoints" / str(step)).is_dir()


def test_batches_that_no_memory_holds(tmp_path, monkeypatch):
    config = configuration(train__batch_size=2**24)
    monkeypatch.setattr("resnet_jax.limits.host_memory", lambda: 2**30)
    with pytest.raises(ConfigError, match=r"train\.batch_size = 16777216 of 8x8 pixels: needs"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batches_that_are_made_ahead(monkeypatch):
    monkeypatch.setattr("resnet_jax.limits.host_memory", lambda: 10**6)
    config = Config(train=Train(batch_size=100), data=Data(image_size=8, crop="random_resized"))
    model = rj.create_model("tiny")
    inputs.check_memory(config, model, channels=1, processes=1)
    config.data.workers = 100
    with pytest.raises(ConfigError, match=r"batches are made ahead: needs .* data\.workers"):
        inputs.check_memory(config, model, channels=1, processes=1)
    inputs.check_memory(config, model, channels=1, processes=4)


# Images and files.


@pytest.fixture
def folder(tmp_path):
    """A folder of 20 images in two classes."""
    for index in range(20):
        path = tmp_path / "train" / f"class{index % 2}" / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (12, 10, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path


def images_of(folder):
    return sorted((folder / "train").rglob("*.png"))


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_while_a_run_goes_on_is_skipped_and_named(folder, workers):
    source = open_source(f"folder:{folder}", "train")
    lines, corrupt = reports(most=3)
    with limit(120):
        batches = stream(source, corrupt, steps=40, workers=workers)
        next(batches)
        cut, gone, empty, *_ = images_of(folder)
        os.truncate(cut, 60)
        gone.unlink()
        empty.write_bytes(b"")
        assert len(list(batches)) == 39
    found = sorted(line.split(":")[0].removeprefix("skipped ") for line in lines)
    assert found == sorted(map(str, (cut, gone, empty)))


def test_too_much_damage_stops_the_run(folder):
    source = open_source(f"folder:{folder}", "train")
    batches = stream(source, reports(most=1)[1], steps=40)
    next(batches)
    for path in images_of(folder)[:4]:
        path.unlink()
    with limit(60), pytest.raises(DataError, match=r"data\.max_corrupt = 1: .*cannot read"):
        list(batches)


def test_a_data_set_that_vanishes_stops_the_run(folder):
    source = open_source(f"folder:{folder}", "train")
    batches = stream(source, reports()[1], steps=40)
    next(batches)
    for path in images_of(folder):
        path.unlink()
    with limit(60), pytest.raises(DataError, match=r"images in a row|max_corrupt") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("deed", "workers"), [("truncate", 0), ("truncate", 1), ("unlink", 0), ("overwrite", 0)]
)
def test_a_record_file_that_is_lost(deed, workers, tmp_path):
    """Threads keep the file open; a worker opens it again. Neither hangs, or crashes."""
    source = open_source("digits", "train", str(tmp_path))
    [path] = [each for each in tmp_path.rglob("*array_record*") if "train" in each.name]
    batches = stream(source, reports()[1], workers=workers)
    with limit(120):
        next(batches)
        if deed == "truncate":
            os.truncate(path, path.stat().st_size // 2)
        elif deed == "unlink":
            path.unlink()
        else:
            path.write_bytes(bytes(path.stat().st_size))
        with contextlib.suppress(DataError) as _:
            list(batches)
    if deed != "unlink":  # a file that is open is there until it is closed
        with pytest.raises(DataError) as caught:
            list(stream(open_again(source), reports()[1]))
        assert "\n" not in str(caught.value)


def open_again(source):
    source._set_up()
    return source


@pytest.mark.parametrize(
    "small_disk", ["40k", pytest.param("400k", marks=pytest.mark.slow)], indirect=True
)
def test_a_disk_that_is_full_at_the_first_use_of_the_digits(small_disk):
    with pytest.raises(DataError) as caught:
        open_source("digits", "train", str(small_disk))
    assert str(caught.value) == (
        f"data.data_dir = '{small_disk}': cannot write the digits there (No space left on device)"
    )
    assert not [path for path in small_disk.rglob("*") if not path.is_dir()]


def test_no_image_to_evaluate():
    source = Photos(count=4, damaged=range(4))
    batches = pipeline.StreamedDataset(source, Data(image_size=8), reports()[1]).eval_batches(8)
    sums = dict.fromkeys(("images", "loss", "top1", "top5"), 0.0)
    with pytest.raises(DataError, match=r"data\.eval_split: none of its images"):
        evaluate(lambda *_: sums, {}, batches)
