"""kill -9 to a real training process, at any moment: nothing is lost but the last few steps.

pytest -m faults tests/faults/test_kill.py     50 kills; `pytest -m slow` has one
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import chex
import pytest

from resnet_jax.workdirs import checksums
from tests import speed
from tests.conftest import FAST_COMPILE, TEMPORARY
from tests.training.runs import state_of, without_times

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 300  # seconds of a single start
STEPS = 60
FLAGS = (
    "--config=tests/tiny.py",
    "--config.model.dropout_rate=0.1",
    "--config.data.image_size=8",
    "--config.data.channels=3",
    "--config.augment.flip=true",
    "--config.augment.pad=1",
    "--config.augment.rotate=5",
    "--config.augment.saturation=0.2",
    "--config.augment.erase=0.5",
    "--config.augment.mixup=0.2",
    "--config.augment.cutmix=1.0",
    f"--config.train.steps={STEPS}",
    "--config.train.batch_size=8",
    "--config.train.accumulate=2",
    "--config.train.ema_decay=0.9",
    "--config.evaluate.every_epochs=0.3",
    "--config.evaluate.batch_size=60",
    "--config.checkpoint.every_steps=4",
    "--config.log.every_steps=7",
    "--config.log.tensorboard=false",
    f"--config.log.compile_cache={TEMPORARY / 'jax-cache'}",
)


def start(workdir):
    command = [sys.executable, "train.py", f"--workdir={workdir}", *FLAGS]
    environment = {**os.environ, "XLA_FLAGS": FAST_COMPILE, "PYTHONPATH": str(ROOT)}
    with (workdir.parent / "stderr").open("w") as errors:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )


def said(workdir):
    return (workdir.parent / "stderr").read_text()


def finish(workdir):
    process = start(workdir)
    try:
        assert process.wait(speed.seconds(LIMIT)) == 0, said(workdir)
    finally:
        process.kill()
        process.wait()


def newest(workdir):
    names = (path.name for path in workdir.glob("checkpoints/*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def killed(workdir, moment):
    """Runs until the random moment; returns the step it can go on from; None: it was done."""
    before = newest(workdir)
    process = start(workdir)
    limit = time.monotonic() + speed.seconds(LIMIT)
    try:
        # A quarter on the way to the first step, the others while states are being written.
        if moment.random() < 0.75:
            while newest(workdir) == before and process.poll() is None:
                assert time.monotonic() < limit, said(workdir)
                time.sleep(0.002)
        wait = moment.uniform(0, 3.0)
        while wait > 0 and process.poll() is None:
            wait -= 0.01
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        code = process.wait()
    assert code in (0, -signal.SIGKILL), said(workdir)
    if before and "resuming after step" in said(workdir):
        assert f"resuming after step {before}\n" in said(workdir)
    after = newest(workdir)
    assert after >= before
    for folder in workdir.glob("checkpoints/*"):
        if folder.name.isdecimal():
            assert checksums.damage(folder) is None
    return None if code == 0 else after


def outcome(workdir):
    """The state, and the records but for times and rates."""
    return state_of(workdir), without_times(workdir)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finish(workdir)
    state, records = outcome(workdir)
    assert int(state["step"]) == STEPS
    assert {record["step"] for record in records} >= set(range(7, STEPS, 7))
    return state, records


def kill_again_and_again(folder, straight, kills, seed):
    """As many runs as it takes; each ends as the unbroken one."""
    moment, survived, runs = random.Random(seed), 0, 0  # noqa: S311
    moments = []
    while survived < kills:
        workdir = folder / f"{runs}" / "run"
        workdir.parent.mkdir()
        runs += 1
        while survived < kills:
            step = killed(workdir, moment)
            if step is None:
                break
            moments.append(step)
            survived += 1
        finish(workdir)
        state, records = outcome(workdir)
        chex.assert_trees_all_equal(state, straight[0])
        assert records == straight[1]
    print(f"{survived} kills in {runs} runs; newest states after them: {moments}")


@pytest.mark.slow
def test_a_kill(straight, tmp_path):
    kill_again_and_again(tmp_path, straight, kills=1, seed=1)


@pytest.mark.faults
def test_fifty_kills(straight, tmp_path):
    kill_again_and_again(tmp_path, straight, kills=50, seed=2)
