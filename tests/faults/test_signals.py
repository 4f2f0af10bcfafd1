"""Signals, closed streams, and a machine without a home directory, in real processes."""

import contextlib
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.cli import commands, parser
from resnet_jax.data.sources import open_source
from resnet_jax.distributed import signals
from tests import speed
from tests.conftest import FAST_COMPILE, TEMPORARY

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = (
    "train.py",
    "--config=tests/tiny.py",
    "--config.data.image_size=8",
    "--config.train.batch_size=16",
    "--config.log.tensorboard=false",
    "--config.log.report=false",
    "--config.evaluate.every_epochs=1000000",
    f"--config.log.compile_cache={TEMPORARY / 'jax-cache'}",
)
FOR_EVER = (*TRAIN, "--config.train.steps=1000000", "--config.log.every_steps=5")
ENVIRONMENT = {**os.environ, "XLA_FLAGS": FAST_COMPILE, "PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True)
def _not_under_nohup():
    """The tests' own nohup would be inherited."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def started(command, **options):
    """A process in a session of its own, which ends with the block."""
    options = {"cwd": ROOT, "env": ENVIRONMENT, "start_new_session": True, **options}
    process = subprocess.Popen([sys.executable, *map(str, command)], **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def await_records(workdir, seconds=150):
    records, end = workdir / "metrics.jsonl", time.monotonic() + speed.seconds(seconds)
    while not (records.exists() and records.read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)


def newest(workdir):
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return max(int(name) for name in names if name.isdecimal())


def handles(pid, number):
    """Whether a process has a handler of a signal, by Linux' own list."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1


# Programs that run another one: in the terminal that is their standard output, or without SIGHUP.
RUN = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
IN_TERMINAL = f"import fcntl, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); {RUN}"
WITHOUT_HANGUP = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); {RUN}"


def read_until(terminal, words):
    output = b""
    while words not in output:
        output += os.read(terminal, 4096)


@pytest.mark.slow
def test_a_closed_terminal_saves_the_run(tmp_path):
    """SIGHUP comes, and every line that is written from then on fails."""
    terminal, end = pty.openpty()
    command = ["-c", IN_TERMINAL, sys.executable, *FOR_EVER, f"--workdir={tmp_path}"]
    streams = {"stdin": end, "stdout": end, "stderr": end}
    with started(command, **streams) as run:
        os.close(end)
        read_until(terminal, b"step 5/")
        os.close(terminal)
        assert run.wait(60) == 75
    assert newest(tmp_path) > 0


@pytest.mark.slow
def test_nohup_goes_on_and_other_signals_still_stop_it(tmp_path):
    command = ["-c", WITHOUT_HANGUP, sys.executable, *FOR_EVER, f"--workdir={tmp_path / 'run'}"]
    streams = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    with started(command, **streams) as run:
        await_records(tmp_path / "run")
        run.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(3)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 75
    assert newest(tmp_path / "run") > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_report_is_written(number, tmp_path):
    """The training is complete, and is said to be."""
    command = [*TRAIN, "--config.train.steps=2", "--config.log.report=true"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with started([*command, f"--workdir={tmp_path}"], **pipes) as run:
        for line in run.stderr:
            if "writing report" in line:
                break
        time.sleep(0.5)
        run.send_signal(number)
        output, errors = run.communicate(timeout=speed.seconds(100))
    assert errors == "no report.html: interrupted\n"
    assert output.startswith("top-1 ")
    assert run.returncode == 0
    assert newest(tmp_path) == 2
    assert not [path for path in tmp_path.iterdir() if "report" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.2, 1.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_other_commands(number, wait, tmp_path):
    command = ["-m", "resnet_jax", "export", "resnet20.safetensors", "--format=stablehlo"]
    model = rj.create_model("resnet20")
    variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3)), train=False)
    rj.save_weights(tmp_path / "resnet20.safetensors", model, variables)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with started([*command, "--model=resnet20", "--output=out.zip"], **pipes) as run:
        while not handles(run.pid, signal.SIGHUP):  # the last that gets its own
            assert run.poll() is None
            time.sleep(0.02)
        time.sleep(wait)
        run.send_signal(number)
        output, errors = run.communicate(timeout=speed.seconds(100))
    assert (output, errors) == ("", "stopped: interrupted; run the command again\n")
    assert run.returncode == 75
    assert os.listdir(tmp_path) == ["resnet20.safetensors"]


# The same in this process.


def test_every_command_stops_in_one_line(monkeypatch, capsys):
    def command(options):
        signal.raise_signal(numbers.pop())

    for name in ("evaluate", "export", "summary"):
        monkeypatch.setattr(commands, name, command)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    for arguments in (
        ["evaluate", "run"],
        ["export", "run", "--format=hub", "--output=x"],
        ["summary", "resnet20"],
    ):
        assert parser.main(arguments) == 75
        assert capsys.readouterr().err == "stopped: interrupted; run the command again\n"
    assert [signal.getsignal(number) for number in (2, 15, 1)] == before


class Dropping:
    """What is raised while this is deleted is dropped by Python."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        len("")  # a signal is heeded between two instructions


def test_an_interrupt_that_python_drops_is_raised_again(capsys):
    def work():
        Dropping()
        time.sleep(20)

    with pytest.raises(KeyboardInterrupt), signals.interrupts():
        work()
    with signals.interrupts():
        Dropping()  # the block ends before it is
    time.sleep(0.2)
    assert "KeyboardInterrupt" not in capsys.readouterr().err


def test_a_held_key_is_no_second_request():
    ended = []
    with signals.interrupts():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # while it cleans up
        ended.append(True)
    assert ended


def test_a_second_request_ends_the_process():
    code = (
        "import signal, time\nfrom resnet_jax.distributed.signals import Signals\n"
        "with Signals():\n"
        "    signal.raise_signal(2); time.sleep(1.1); signal.raise_signal(2); time.sleep(60)"
    )
    with started(["-c", code], stderr=subprocess.PIPE) as run:
        assert run.wait(60) == -signal.SIGINT
        assert run.stderr.read() == b"stopping after this step; everything will be saved\n"
        run.stderr.close()


# Streams.


def shell(line, *arguments, **options):
    command = ["bash", "-c", line, sys.executable, *map(str, arguments)]
    options = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True, **options}
    return subprocess.run(command, timeout=speed.seconds(200), **options)


CLOSED = "<&- >&- 2>&-"


def test_an_interrupted_exec_leaves_the_exit_code():
    code = (
        "from resnet_jax.distributed.signals import interrupts\n"
        "try:\n"
        "    with interrupts():\n"
        "        exec('import signal; signal.raise_signal(2)')\n"
        "except KeyboardInterrupt:\n"
        "    raise SystemExit(75) from None"
    )
    with started(["-c", code]) as run:
        assert run.wait(speed.seconds(60)) == 75


def test_a_closed_stream_gets_no_file_of_the_run(tmp_path):
    code = (
        "import os, sys\nfrom resnet_jax.cli import parser\n"
        "parser._open_closed_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "print('out'); print('err', file=sys.stderr); os.write(1, b'x'); os.write(2, b'x')\n"
        "assert sys.stdin.read() == ''\n"
        "file.write('mine'); file.close(); sys.stdout.flush(); os._exit(7)"
    )
    assert shell(f'"$0" -c "$1" {CLOSED}', code).returncode == 7
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", CLOSED])
def test_a_run_with_closed_streams(closed, tmp_path):
    """And with a worker, which has given all back at the end."""
    command = [*TRAIN, "--config.data.workers=1", "--config.data.crop=random_resized"]
    command += ["--config.train.steps=3", f"--workdir={tmp_path}"]
    run = shell(f'exec "$0" "$@" {closed}', *command)
    assert run.returncode == 0, run.stderr
    assert newest(tmp_path) == 3
    assert run.stdout.startswith("top-1 ") == (">" not in closed.replace("2>", ""))
    assert "resource_tracker" not in run.stderr
    assert "Traceback" not in run.stderr


# Users and limits.


def as_another_user(*command, **environment):
    """As a user without a name, a home, or a permission beyond reading, whatever the umask."""
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("another user's processes can be started by root only, with setpriv")
    reading = ["-all,+dac_read_search"] * 3
    names = ("inh-caps", "bounding-set", "ambient-caps")
    caps = [f"--{name}={value}" for name, value in zip(names, reading)]
    drop = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", *caps]
    environment = {**ENVIRONMENT, **environment, "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("HOME", "TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR"):
        environment.pop(name, None)
    return subprocess.run(
        [*drop, "bash", "-c", *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=speed.seconds(200),
    )


def test_a_limit_of_processes_that_is_too_low_for_threads():
    """XLA's and ArrayRecord's threads would hang."""
    line = 'ulimit -u 40; exec "$0" train.py --config=tests/tiny.py'
    run = as_another_user(line, sys.executable)
    assert run.returncode == 2
    assert re.fullmatch(
        r"error: only \d+ of \d+ threads can be started: raise `ulimit -u` or .*\n", run.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], r"error: data\.data_dir = '': ~/tensorflow_datasets: there is no home directory.*"),
        (
            ["--workdir=~/run", "--config.data.data_dir=DATA"],
            "error: ~/run: there is no such home directory; set HOME, or use a full path",
        ),
        (["--workdir=FOLDER/run", "--config.data.data_dir=DATA"], ""),
    ],
)
def test_without_a_home_directory(flags, line, tmp_path):
    """Only a path with ~ needs one; the compile cache is left out with a line."""
    open_source("digits", "train", str(tmp_path / "data"))
    tmp_path.chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    command = [each for each in TRAIN if "compile_cache" not in each]
    for each in ["--workdir=FOLDER/first", "--config.train.steps=2", *flags]:
        command.append(each.replace("FOLDER", str(tmp_path)).replace("DATA", f"{tmp_path}/data"))
    run = as_another_user('exec "$0" "$@"', sys.executable, *command)
    said = [each for each in run.stderr.splitlines() if "programs are not stored" not in each]
    if line:
        assert run.returncode == 2
        assert re.fullmatch(line, *said)
    else:
        assert run.returncode == 0, run.stderr
        assert len(run.stderr.splitlines()) == len(said) + 1
        assert newest(tmp_path / "run") == 2
