"""Several processes as one run: real ones, on this machine, and how they watch each other."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import chex
import pytest

from resnet_jax.cli import parser
from resnet_jax.distributed import heartbeat
from resnet_jax.distributed.heartbeat import Heartbeat
from resnet_jax.distributed.process_group import first_difference, process_group
from resnet_jax.errors import LOST, MISTAKE, STOPPED, ConfigError, PeerError
from tests import speed
from tests.conftest import FAST_COMPILE
from tests.training.runs import records, state_of

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 240  # seconds until every process of a test is killed

STEPS = 60
FLAGS = [
    "--config=tests/tiny.py",
    "--config.model.bn_sync=all",
    "--config.data.image_size=8",
    "--config.augment.pad=1",
    f"--config.train.steps={STEPS}",
    "--config.train.batch_size=16",
    "--config.train.ema_decay=0.9",
    "--config.optimizer.learning_rate=0.01",  # rounding stays small for all steps
    "--config.evaluate.every_epochs=10",  # at the end; 360 images leave an uneven last batch
    "--config.evaluate.batch_size=32",
    "--config.checkpoint.every_steps=4",
    "--config.train.early_stopping=9",
    "--config.log.every_steps=20",
    "--config.log.tensorboard=false",
    "--config.log.report=false",
]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(devices):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}",
    }


@contextlib.contextmanager
def started(folder, *commands, devices=1, program=(sys.executable, "train.py")):
    """Processes whose output goes to folder/0, 1, ...; killed at the end, whatever happens."""
    with contextlib.ExitStack() as stack:
        processes = []
        for index, command in enumerate(commands):
            output = stack.enter_context((folder / str(index)).open("w"))
            processes.append(
                subprocess.Popen(
                    [*program, *command],
                    cwd=ROOT,
                    env=environment(devices),
                    stdout=output,
                    stderr=output,
                )
            )
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def several(count, *flags):
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    return [
        [address, f"--num_processes={count}", f"--process_id={i}", *flags] for i in range(count)
    ]


def ends(processes):
    until = time.monotonic() + speed.seconds(LIMIT)
    return [process.wait(max(until - time.monotonic(), 1)) for process in processes]


def wait_for(condition, processes):
    until = time.monotonic() + speed.seconds(LIMIT)
    while not condition():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def text(folder, index):
    return (folder / str(index)).read_text()


def errors(folder, index):
    return [line for line in text(folder, index).splitlines() if line.startswith("error: ")]


def numbers(record):
    return {name: value for name, value in record.items() if not isinstance(value, str)}


def last_records(workdir):
    found = {(r["step"], r["split"], r.get("weights")): r for r in records(workdir)}
    for record in found.values():
        record.pop("images_per_second")
        record.pop("time")
        record.pop("mfu", None)
    return found


@pytest.mark.slow
def test_lost_stopped_and_resumed_by_another_number_of_processes(tmp_path):
    """Two processes, one is killed; two again, one is stopped; then one of two devices.

    At the end it is the run of one process that nothing happened to.
    """
    straight, workdir = tmp_path / "straight", tmp_path / "run"
    straight_output = tmp_path / "output"
    straight_output.mkdir()
    alone = [*FLAGS, f"--workdir={straight}"]
    flags = [*FLAGS, f"--workdir={workdir}"]

    with started(tmp_path, *several(2, *flags)) as processes:
        wait_for((workdir / "checkpoints" / "4").exists, processes)
        processes[1].kill()
        begin = time.monotonic()
        assert ends(processes) == [LOST, -signal.SIGKILL]
        assert time.monotonic() - begin < 60
        (line,) = errors(tmp_path, 0)
        assert "process 1 gave no sign of life" in line

    flags.append("--config.checkpoint.allow_change=true")  # of the steps a call
    with (
        started(tmp_path, *several(2, "--config.train.steps_per_call=2", *flags)) as processes,
        started(straight_output, alone, devices=2) as lone,
    ):
        wait_for(lambda: "resuming after step" in text(tmp_path, 0), processes)
        processes[1].send_signal(signal.SIGTERM)  # process 0 hears of it by the step
        assert ends(processes) == [STOPPED, STOPPED]
        stopped = [text(tmp_path, i).splitlines()[-1] for i in range(2)]
        assert stopped[0] == stopped[1]
        assert stopped[0].startswith("stopped: by a signal after step ")
        assert "top-1" not in text(tmp_path, 1)  # only the first process talks
        assert int(state_of(workdir)["step"]) < STEPS
        assert ends(lone) == [0]

    with started(tmp_path, flags, devices=2) as processes:
        assert ends(processes) == [0]
    chex.assert_trees_all_close(state_of(workdir), state_of(straight), rtol=1e-3, atol=1e-4)
    found, expected = last_records(workdir), last_records(straight)
    assert found.keys() == expected.keys()
    for key, record in found.items():
        assert numbers(record) == pytest.approx(numbers(expected[key]), rel=1e-3, abs=1e-2), key
    assert found[STEPS, "test", "ema"]["images"] == 360


@pytest.mark.faults
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_stopped_is_as_good_as_lost(stopped, tmp_path):
    """SIGSTOP: its connections stay open, and nobody is told; only its silence tells."""
    workdir = tmp_path / "run"
    with started(tmp_path, *several(2, *FLAGS, f"--workdir={workdir}")) as processes:
        wait_for((workdir / "checkpoints" / "4").exists, processes)
        processes[stopped].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        assert processes[1 - stopped].wait(speed.seconds(LIMIT)) == LOST
        taken = time.monotonic() - begin
        (line,) = errors(tmp_path, 1 - stopped)
        print(f"{taken:.0f} s: {line}")
        assert taken < 60
        assert line.startswith(f"error: process {stopped} gave no sign of life for ")
    assert int(state_of(workdir)["step"]) >= 4


def test_two_processes_equal_one(tmp_path):
    single, double = tmp_path / "single", tmp_path / "double"
    short = [*FLAGS, "--config.train.steps=3"]
    outputs = [tmp_path / name for name in ("one", "two")]
    for output in outputs:
        output.mkdir()
    with started(outputs[1], *several(2, *short, f"--workdir={double}")) as processes:
        assert ends(processes) == [0, 0]
    with started(outputs[0], [*short, f"--workdir={single}"], devices=2) as lone:
        assert ends(lone) == [0]
    chex.assert_trees_all_close(state_of(double), state_of(single), rtol=1e-5, atol=1e-6)
    found, expected = last_records(double), last_records(single)
    for key, record in found.items():
        assert numbers(record) == pytest.approx(numbers(expected[key]), rel=1e-5), key


@pytest.mark.slow  # `first_difference` is tested below, the exchange by the run above
def test_processes_with_different_flags_say_which(tmp_path):
    wrong = several(2, *FLAGS, f"--workdir={tmp_path / 'run'}")
    wrong[1].append("--config.optimizer.learning_rate=0.02")
    with started(tmp_path, *wrong) as processes:
        assert ends(processes) == [MISTAKE, MISTAKE]
    for index in range(2):
        (line,) = errors(tmp_path, index)
        assert "optimizer.learning_rate differs between processes: 0.01 (process 0), 0.02" in line
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be(capsys):
    assert parser.main(["train", "--workdir=gs://bucket/run"]) == MISTAKE
    output = capsys.readouterr().err
    assert "gs://bucket/run: must be a local folder" in output
    assert output.count("\n") == 1


def test_differences_name_the_processes():
    facts = [{"jax": "1", "seed": "0"}, {"jax": "1", "seed": "2"}, {"jax": "1", "seed": "0"}]
    assert first_difference(facts).startswith(
        "seed differs between processes: 0 (processes 0, 2), 2 (process 1)"
    )
    assert first_difference(facts[::2]) == ""
    assert "9 (processes 0, 1, 2, 3 and 2 more)" in first_difference([{"a": "9"}] * 6 + [{}])


def test_alone_there_is_nobody_to_wait_for():
    with process_group() as group:
        group.check_equal({"jax": 1})
        assert group.broadcast_object([1]) == [1]
        assert group.broadcast_arrays({"a": 1}, None) == {"a": 1}
        assert group.is_first


class Texts:
    """A table in this process."""

    def __init__(self):
        self.texts = {}

    def put(self, key, value):
        self.texts[key] = value

    def folder(self, key):
        found = {**self.texts}
        return {int(k.rpartition("/")[2]): v for k, v in found.items() if k.startswith(key)}


@pytest.fixture
def watches(monkeypatch):
    """Of three processes with a hundred beats a second; none of them may end this one."""
    ended = []
    monkeypatch.setattr(heartbeat, "end_process", lambda *verdict: ended.append(verdict))
    table = Texts()
    found = [Heartbeat(table, index, 3, beat=0.01) for index in range(3)]
    for each in found:
        each.ended = ended
    yield found
    for each in found:
        each.stop()


def verdict_of(each):
    for _ in range(1000):
        with contextlib.suppress(TimeoutError):
            each._raise_verdict()
        time.sleep(0.01)


def test_a_silent_process_is_named_to_all(watches):
    time.sleep(0.3)
    watches[2].stop()
    for each in watches[:2]:
        with pytest.raises(PeerError, match="process 2 gave no sign of life"):
            verdict_of(each)
    for _ in range(500):
        if len(watches[0].ended) >= 2:
            break
        time.sleep(0.01)
    assert {code for _, code in watches[0].ended} == {LOST}


def test_a_mistake_of_one_ends_all_with_its_code(watches):
    watches[1].leave("data.name: gone", MISTAKE, most=0)
    for each in (watches[0], watches[2]):
        with pytest.raises(ConfigError, match=r"process 1 stopped: data.name: gone"):
            each.wait_for("facts/", 3)


def test_all_come_to_the_end_together(watches):
    watches[1].leave(most=0)
    watches[2].leave(most=0)
    begin = time.monotonic()
    watches[0].leave()
    assert time.monotonic() - begin < 5
    watches[2].leave()
    time.sleep(0.6)  # longer than a silence that counts
    assert watches[0].ended == []
