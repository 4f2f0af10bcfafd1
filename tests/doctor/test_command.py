"""The command as people run it: a worker that does its checks, crashes, hangs, or is one of two."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from resnet_jax.cli import parser
from resnet_jax.distributed import local_gpus
from resnet_jax.distributed.heartbeat import Table
from resnet_jax.distributed.launch import Launch
from resnet_jax.doctor import command, processes, worker
from resnet_jax.doctor.command import Printer, examine
from resnet_jax.doctor.findings import OK, PROBLEM, SKIPPED, WARNING, Finding
from resnet_jax.doctor.processes import Group
from resnet_jax.errors import ConfigError
from resnet_jax.workdirs.environment import compared, computes_on
from tests.conftest import FAST_COMPILE, TEMPORARY
from tests.distributed.test_process_group import environment, free_port

ROOT = pathlib.Path(__file__).parents[2]
# The worker, with the network that compiles fastest.
TINY = (
    "import os, sys; from tests import tiny; tiny.get_config();"
    "from resnet_jax.doctor import worker;"
    "os._exit(worker.main([*sys.argv[1:], '--network=tiny']))"
)


def printed(code, *arguments, quiet=False):
    """(what a worker of this code found, what was printed)."""
    output = io.StringIO()
    printer = Printer(output, io.StringIO(), quiet)
    result = examine([sys.executable, "-c", code, *arguments], printer)
    return result, output.getvalue()


def saying(*events, then=""):
    """Code of a worker that says these events."""
    lines = [f"print({json.dumps(json.dumps(each))}, flush=True)" for each in events]
    return "; ".join(["import os, sys, signal, time", *lines, then or "pass"])


FOUND = {"finding": {"level": OK, "text": "fine", "name": "a check", "group": "Software"}}
STARTED = {"start": "training step", "group": "Speed", "limit": 60}
FIRST, END = {"index": 0, "count": 1}, {"end": 0}


def test_a_real_run_on_this_machine(monkeypatch, tmp_path):
    """Also under a JAX that several devices were asked of, as the tests do."""
    monkeypatch.chdir(ROOT)
    flags = f"--xla_force_host_platform_device_count=2 {FAST_COMPILE}"
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.fspath(TEMPORARY / "jax-cache"))
    result, text = printed(TINY)
    assert result.code == 0, text
    found = {each.name: each for each in result.findings}
    assert found["devices"].text == "2 x cpu"
    assert "images/s: tiny, 8 images a device" in found["step, float32"].text
    assert found["step, float32"].facts["loss"] > 0
    assert "4 MB over 2 devices" in found["all-reduce"].text
    assert found["float32"].text == "products and convolutions are exact float32"
    assert "XLA_FLAGS=" in found["settings"].text
    assert result.environment["devices"] == "2 x cpu"
    for group in ("Software", "Machine", "Processes", "Devices", "Speed"):
        assert f"\n{group}\n" in text
    json.dumps(command.to_json(result), allow_nan=False)


@pytest.mark.slow
def test_the_command(monkeypatch, capfd):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert parser.main(["doctor", "--quick", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)  # and nothing else
    assert (found["can_train"], found["process"], found["processes"]) == (True, 0, 1)
    names = [each["name"] for each in found["checks"]]
    assert "devices" in names
    assert "step, float32" not in names
    assert found["environment"]["jax"]


@pytest.mark.slow
def test_a_flag_of_xla_that_ends_the_process(monkeypatch, capfd):
    """C++ ends the process there, and no except clause sees it."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_nonsense=1")
    assert parser.main(["doctor", "--quick"]) == 2
    text = capfd.readouterr().out
    assert "problem  JAX             " in text
    assert "XLA does not know --xla_nonsense=1: remove it from XLA_FLAGS" in text
    assert "Training cannot run here as it should: 1 problem" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quick", "--nonsense"], "--nonsense: doctor has no such flag; see doctor --help"),
        (["--network=resnet5O"], "unknown model 'resnet5O'"),
        (["--quick", "--network=resnet50"], "--quick trains no network"),
    ],
)
def test_flags_that_cannot_be(flags, words, capfd):
    assert parser.main(["doctor", *flags]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert words in error


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process was ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL: the system ends processes when memory"),
        (
            "print('E1126 cuda_dnn.cc:456] Loaded runtime CuDNN library: 9.1.0 but source was "
            "compiled with: 9.8.0.', file=sys.stderr, flush=True); os.abort()",
            "the process was ended by SIGABRT: cuDNN 9.1.0 is loaded, and JAX needs 9.8.0",
        ),
        (
            "print('error: process 1 did not start within --start_timeout=5 seconds', "
            "file=sys.stderr, flush=True); os._exit(69)",
            "process 1 did not start within --start_timeout=5 seconds",
        ),
        ("raise OSError('the disk is gone')", "OSError: the disk is gone"),
    ],
)
def test_a_worker_that_dies(then, words):
    code = "\n".join(saying(FIRST, FOUND, STARTED, then="pass").split("; ") + then.split("; "))
    result, text = printed(code)
    assert result.code == 2
    last = result.findings[-1]
    assert (last.level, last.name, last.group) == (PROBLEM, "training step", "Speed")
    assert words in last.text
    assert "ok       a check         fine\n" in text
    assert f"problem  training step   {last.text}\n" in text


def test_a_worker_that_hangs(monkeypatch):
    monkeypatch.setattr(command, "_GRACE", 0.5)
    begin = time.monotonic()
    event = {**STARTED, "limit": 1}
    result, text = printed(saying(FIRST, FOUND, event, then="time.sleep(600)"))
    assert time.monotonic() - begin < 30
    assert result.code == 2
    assert "problem  training step   has not ended after 1.5 seconds" in text


def test_what_is_known_before_it_is_known_who_this_is():
    """A worker may die while it waits for the others of its run."""
    result, text = printed(saying(FOUND, STARTED, then="os._exit(3)"))
    assert text.count("\n") == 6
    assert "ok       a check         fine" in text
    assert "problem  training step   exit code 3" in text
    assert result.index is None


def test_only_the_first_process_talks(capfd):
    _, text = printed(saying(FOUND, {"index": 1, "count": 2}, FOUND, END))
    assert text == ""
    result, text = printed(saying(FOUND, {"index": 1, "count": 2}, STARTED, then="os.abort()"))
    assert (text, result.code) == ("", 2)
    assert capfd.readouterr().err == "error: process 1: the process was ended by SIGABRT\n"


def test_lines_that_are_no_events():
    """Python can print before the worker takes its standard output away."""
    result, text = printed("print('hello'); print(5); " + saying(FIRST, FOUND, END))
    assert (result.code, result.log) == (0, ["hello", "5"])
    assert "ok       a check         fine" in text


def test_a_worker_that_cannot_import(monkeypatch):
    """It ends by itself: whatever needs the import lock would wait too."""
    events = []
    monkeypatch.setattr(worker, "_events", lambda: events.append)
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    monkeypatch.setattr(worker, "LONG_LIMIT", 0.1)
    monkeypatch.setattr(worker, "_import_trainer", lambda: time.sleep(60))
    monkeypatch.setattr(worker, "_join", lambda flags: pytest.fail("would hang"))
    assert worker.main([]) == 2
    found = {each["finding"]["name"]: each["finding"] for each in events if "finding" in each}
    assert found["imports"]["level"] == PROBLEM
    assert found["imports"]["text"] == "has not ended after 0.1 seconds"
    assert found["CPU cores"]["level"] in (OK, WARNING)  # it needs no import
    assert found["JAX"]["level"] == SKIPPED
    assert {"index": 0, "count": 1} in events


def test_a_mistake_is_an_error():
    with pytest.raises(ConfigError, match="--x: doctor has no such flag"):
        printed(saying(FIRST, {"mistake": "--x: doctor has no such flag"}))


@pytest.mark.slow
def test_the_worker_ends_with_its_parent():
    code = (
        "import time; from resnet_jax.doctor import worker; worker._end_with_parent();"
        "time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=ROOT)
    child.stdin.close()
    assert child.wait(60) == 1


def test_a_check_for_itself():
    """One that fails, one that hangs and one that lacks a module do not keep the others."""
    runner = worker.Runner(lambda event: None)

    def lacking():
        raise ModuleNotFoundError("No module named 'cv9'", name="cv9")

    runner.run("Speed", "fails", lambda: 1 / 0)
    runner.run("Speed", "lacks", lacking)
    runner.run("Speed", "says nothing", lambda: None)
    runner.run("Machine", "disk hangs", lambda: time.sleep(60), limit=0.1, alone=True)
    runner.run("Devices", "JAX hangs", lambda: time.sleep(60), 0.1, PROBLEM, hint="; a host may")
    runner.run("Speed", "needs JAX", lambda: Finding(OK, "fine"))
    runner.run("Speed", "needs none", lambda: Finding(OK, "fine"), alone=True)
    found = [(each.name, each.level, each.text) for each in runner.findings]
    assert found == [
        ("fails", WARNING, "failed: ZeroDivisionError: division by zero"),
        ("lacks", WARNING, "cv9 is not installed: pip install cv9"),
        ("disk hangs", WARNING, "has not ended after 0.1 seconds"),
        ("JAX hangs", PROBLEM, "has not ended after 0.1 seconds; a host may"),
        ("needs JAX", SKIPPED, "not tried, because the check 'JAX hangs' has not ended"),
        ("needs none", OK, "fine"),
    ]


class Service:
    """The table of texts of JAX's coordination service."""

    def __init__(self):
        self.texts = {}

    def key_value_set(self, key, text, allow_overwrite=False):
        self.texts[key] = text

    def key_value_dir_get(self, prefix):
        return [(key, text) for key, text in self.texts.items() if key.startswith(prefix)]


def groups(count):
    table = Table(Service(), "doctor/")
    return [Group(table, index, count) for index in range(count)]


def test_problems_of_other_hosts():
    first_group, second_group, _ = groups(3)
    good = [
        Finding(OK, "8 x H100", name="devices"),
        Finding(OK, "700 TFLOP/s", name="matrix product"),
    ]
    bad = [Finding(PROBLEM, "does not start: no driver", name="JAX")]
    first_group.put("report", processes.own_report(good, {"jax": "0.10.2"}))
    second_group.put("report", processes.own_report(bad, {}))
    reports = first_group.gather("report", patience=0)
    first, second, third = processes.hosts(first_group, reports)
    assert (first.level, first.text.partition(": ")[2]) == (OK, "8 x H100, 700 TFLOP/s")
    assert (second.level, second.text.partition(": ")[2]) == (
        PROBLEM,
        "JAX: does not start: no driver",
    )
    assert (third.level, third.name) == (PROBLEM, "process 2")
    assert "has not reported" in third.text


def test_hosts_that_differ():
    both = groups(2)
    fine = [Finding(OK, "4 x TPU v5 lite", name="devices")]
    for group, version in zip(both, ["0.0.42", "0.0.41"]):
        group.put("report", processes.own_report(fine, {"libtpu": version}))
    *_, last = processes.hosts(both[0], both[0].gather("report"))
    assert last.level == PROBLEM
    assert last.text.startswith("libtpu differs between processes: 0.0.42 (process 0), 0.0.41")
    both[1].put("report", processes.own_report(fine, {"libtpu": "0.0.42"}))
    *_, last = processes.hosts(both[0], both[0].gather("report"))
    assert (last.level, last.name) == (OK, "agreement")


def test_processes_that_cannot_compute_together():
    group = groups(3)[0]
    assert processes.readiness(group, dict.fromkeys(range(3), OK)) is None
    found = processes.readiness(group, {0: OK, 1: PROBLEM})
    assert found.text == (
        "they cannot compute together: process 1 has a problem; process 2 has not reported yet"
    )


def test_devices_that_differ():
    """What stops `train` before its first step stops here too."""
    both = groups(2)
    for group, count in zip(both, [8, 7]):
        facts = {**compared(), "the devices of a process": f"{count} x H100"}
        group.put("report", processes.own_report([], facts))
    *_, last = processes.hosts(both[0], both[0].gather("report"))
    assert last.level == PROBLEM
    assert last.text.startswith("the devices of a process differs between processes: 8 x H100")
    assert compared()["the devices of a process"] == computes_on(jax.local_devices())


@pytest.mark.parametrize(
    ("launch", "level", "text"),
    [
        (Launch([]), OK, "one process"),
        (
            Launch([], "a Slurm step of 2 tasks"),
            OK,
            "process 0 of 2, found by a Slurm step of 2 tasks",
        ),
        (Launch([], "", ("7 GPUs stay idle",)), WARNING, "one process; 7 GPUs stay idle"),
    ],
)
def test_what_launched_this(launch, level, text):
    found = processes.launched(launch, groups(2)[0])
    assert (found.level, found.text) == (level, text)


@pytest.mark.parametrize(
    ("variables", "level", "words"),
    [
        # Slurm gives this job one card of eight: nothing stays idle.
        ({"SLURM_JOB_ID": "1", "CUDA_VISIBLE_DEVICES": "3"}, OK, "one process"),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"}, WARNING, "start it with srun"),
    ],
)
def test_what_a_job_leaves_idle(variables, level, words, monkeypatch):
    for name in [each for each in os.environ if each.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(local_gpus, "visible_gpus", lambda: ["a"])
    found = processes.launched(*worker._join([]))
    assert found.level == level
    assert words in found.text


def test_words_of_a_terminal(monkeypatch):
    """Wrapped under its own column, in color, and without a trace of what was tried before."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    printer = Printer(terminal, terminal)
    printer.joined(0)
    printer.start("JAX", "Devices", 300)
    text = "the CPU, because JAX_PLATFORMS=cpu hides 1 x H100: unset it to use the accelerator"
    printer.finding(Finding(WARNING, text, name="JAX", group="Devices"))
    assert terminal.getvalue() == (
        "\r\x1b[K...      JAX (up to 300 s)\r\x1b[K"
        "\nDevices\n"
        "\x1b[33mwarning  \x1b[0mJAX             the CPU, because JAX_PLATFORMS=cpu hides 1 x\n"
        "                         H100: unset it to use the accelerator\n"
    )


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Process 0 shows both; a sum over the devices of both takes part."""
    port, ended = free_port(), []
    with contextlib.ExitStack() as stack:
        children = []
        for index in range(2):
            output = stack.enter_context((tmp_path / str(index)).open("w"))
            code = (
                "import sys; from resnet_jax.doctor import command;"
                f"sys.exit(command.examine([sys.executable, '-c', {TINY!r}, *sys.argv[1:]],"
                "command.Printer(sys.stdout, sys.stderr)).code)"
            )
            flags = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
            child = subprocess.Popen(
                [sys.executable, "-c", code, *flags, f"--process_id={index}"],
                cwd=ROOT,
                env=environment(2)
                | {"JAX_COMPILATION_CACHE_DIR": os.fspath(TEMPORARY / "jax-cache")},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            stack.callback(child.wait)
            stack.callback(child.kill)
            children.append(child)
        ended = [child.wait(240) for child in children]
    text = (tmp_path / "0").read_text()
    assert ended == [0, 0], text
    assert "process 0 of 2, found by --coordinator_address" in text
    assert "2 x cpu of 4 in all processes" in text
    assert "4 MB over 4 devices" in text
    assert "images/s: tiny" in text
    for index in range(2):  # the other one with its warnings, if it has any
        (line,) = [each for each in text.splitlines() if f" process {index}  " in each]
        assert ": 2 x cpu of 4 in all processes" in line
    assert "all processes have the same versions, settings and devices" in text
    assert (tmp_path / "1").read_text() == ""
