"""How processes find each other and which GPUs each uses, with faked launchers and drivers."""

import contextlib
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from resnet_jax.cli import parser
from resnet_jax.distributed import launch, local_gpus
from resnet_jax.distributed.local_gpus import View, divide, unused
from resnet_jax.errors import MISTAKE, ConfigError
from tests import speed

ROOT = pathlib.Path(__file__).parents[2]
EXPLICIT = ["--coordinator_address=127.0.0.1:29500", "--num_processes=2", "--process_id=0"]
NODE = ["a", "b", "c", "d", "e", "f", "g", "h"]  # the GPUs of a host


@pytest.fixture(autouse=True)
def plain_host(monkeypatch):
    """No launcher, no GPU, no TPU, whatever runs the tests."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "MEGASCALE_", "TPU_", "JAX_LOCAL", "GCE_METADATA")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(local_gpus, "visible_gpus", lambda: [])
    monkeypatch.setattr(launch, "_several_tpu_hosts", lambda: False)


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize is called with, and which GPUs JAX is restricted to."""
    found = SimpleNamespace(calls=[], gpus="all")

    def initialize(*args, **kwargs):
        found.calls.append(args)

    def update(name, value):
        if name == "jax_cuda_visible_devices":
            found.gpus = value

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", update)
    monkeypatch.setattr(launch, "end_when_aborted", lambda coordinator: None)
    return found


# --- Who is one of several


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "16"}, False),  # a shell of salloc
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, False),  # a batch script
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),  # Colab
        ({"TPU_PROCESS_ADDRESSES": "local"}, False),  # Kaggle
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),  # GKE
        ({"TPU_PROCESS_ADDRESSES": "host-0:8471,host-1:8471"}, True),
        ({"TPU_PROCESS_ADDRESSES": "host-0", "TPU_WORKER_HOSTNAMES": "a,b"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"MEGASCALE_NUM_SLICES": ""}, False),
    ],
)
def test_who_was_launched_as_one_of_several(variables, several, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert bool(launch._launcher()) == several


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"SLURM_STEP_NUM_TASKS": "16"}, "a Slurm step of 16 tasks"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "an Open MPI job of 4 processes"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "a run of 2 TPU slices"),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c"}, "TPU_WORKER_HOSTNAMES, 3 hosts"),
    ],
)
def test_the_launcher_is_named(variables, launcher, monkeypatch, joined):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.join([]) == launch.Launch([], launcher)
    assert launch.join(["--no-distributed"]) == launch.Launch([])


def test_environment_variables_spare_the_metadata_server(monkeypatch):
    monkeypatch.setattr(launch, "_several_tpu_hosts", lambda: True)
    assert launch._launcher()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert not launch._launcher()


def test_tpu_hosts_from_a_file(monkeypatch, tmp_path):
    path = tmp_path / "addresses"
    monkeypatch.setenv("TPU_PROCESS_ADDRESSES_PATH", str(path))
    with pytest.raises(ConfigError, match=r"TPU_PROCESS_ADDRESSES_PATH=.*No such file"):
        launch._launcher()
    path.write_text("host-0:8471,host-1:8471\n")
    assert launch._launcher()
    path.write_text("host-0:8471\n")
    assert not launch._launcher()


@contextlib.contextmanager
def metadata_server(answers, monkeypatch):
    """Answers GET with (status, bytes), by the attribute's name; 404 for others."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            folder, _, name = self.path.rpartition("/")
            assert folder == "/computeMetadata/v1/instance/attributes"
            asked.append(name)
            answer = answers.get(name, (404, b"not found"))
            status, body = answer(self) if callable(answer) else answer
            self.send_response(status)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
        try:
            yield asked
        finally:
            server.shutdown()


def several_tpu_hosts():
    answer = [False]
    launch._ask_metadata(answer)
    return answer[0]


TWO_SLICES = (
    b"ACCELERATOR_TYPE: 'v5litepod-8'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '0'\n"
)


@pytest.mark.parametrize(
    ("answers", "several"),
    [
        ({}, False),
        ({"worker-network-endpoints": (200, b"t1v-n-0")}, False),
        ({"worker-network-endpoints": (200, b"t1v-n-0,t1v-n-1\n")}, True),
        ({"worker-network-endpoints": (200, b"a:0:10.0.0.2,b:1:10.0.0.3")}, True),
        ({"worker-network-endpoints": (200, b"t1v-n-0"), "tpu-env": (200, TWO_SLICES)}, True),
        ({"tpu-env": (200, TWO_SLICES.replace(b"'2'", b"'1'"))}, False),
        ({"tpu-env": (200, TWO_SLICES.replace(b"'2'", b"''"))}, False),
        ({"tpu-env": (200, b"MEGASCALE_NUM_SLICES: 2")}, True),
        # Something else answers, or answers badly.
        ({"worker-network-endpoints": (200, b"<html>Sign in, please, to go on</html>")}, False),
        ({"worker-network-endpoints": (200, b"\xff\xfe,\x00"), "tpu-env": (200, b"\xff")}, False),
        ({"worker-network-endpoints": (403, b"a,b")}, False),
    ],
)
def test_tpu_hosts_by_the_metadata_server(answers, several, monkeypatch):
    with metadata_server(answers, monkeypatch) as asked:
        assert several_tpu_hosts() == several
    assert asked[0] == "worker-network-endpoints"


def test_a_metadata_server_that_is_busy_is_asked_again(monkeypatch):
    answers = [(503, b""), (200, b"host-0,host-1")]
    with metadata_server(
        {"worker-network-endpoints": lambda _: answers.pop(0)}, monkeypatch
    ) as asked:
        assert several_tpu_hosts()
    assert asked == ["worker-network-endpoints"] * 2


@pytest.mark.parametrize("answer", [b"", b"\x00\xff garbage\r\n", b"HTTP/1.1 two hundred\r\n\r\n"])
def test_an_answer_that_is_no_http(answer, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.recv(4096)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.getsockname()[1]}")
        assert not several_tpu_hosts()


@pytest.mark.parametrize("server", ["no such host", "metadata.invalid", "127.0.0.1:0", "[::"])
def test_a_metadata_server_that_is_not_there(server, monkeypatch):
    monkeypatch.setenv("GCE_METADATA_IP", server)
    assert not several_tpu_hosts()


class _Folder:
    """A device folder in which every pattern is found, or none."""

    def __init__(self, found):
        self.found = found

    def __call__(self, path):
        return SimpleNamespace(glob=lambda pattern: [pattern] * self.found)


def test_the_question_is_asked_of_tpu_vms_only_and_ends_in_time(monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(launch, "_METADATA_SECONDS", 0.2)
    asked = []

    def ask(answer):
        asked.append(True)
        time.sleep(20)  # as a name server may

    monkeypatch.setattr(launch, "_ask_metadata", ask)
    monkeypatch.setattr(launch, "Path", _Folder(0))
    assert not launch._several_tpu_hosts()
    monkeypatch.setattr(launch, "Path", _Folder(1))
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert not launch._several_tpu_hosts()
    assert not asked
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    begin = time.monotonic()
    assert not launch._several_tpu_hosts()
    assert asked
    assert time.monotonic() - begin < 5


# --- Who is joined with which arguments


@pytest.mark.parametrize(
    ("variables", "flags", "calls"),
    [
        ({}, [], []),
        ({}, EXPLICIT, [("127.0.0.1:29500", 2, 0)]),
        ({}, [*EXPLICIT[:1], "--num_processes=1", "--process_id=0"], []),
        # One process by flags is one process, in a step of several too.
        (
            {"SLURM_STEP_NUM_TASKS": "8"},
            [*EXPLICIT[:1], "--num_processes=1", "--process_id=0"],
            [],
        ),
        ({}, ["--distributed"], [(None, None, None)]),
        ({"SLURM_STEP_NUM_TASKS": "8"}, [], [(None, None, None)]),
        ({"SLURM_STEP_NUM_TASKS": "8"}, ["--no-distributed"], []),
        ({"SLURM_STEP_NUM_TASKS": "8"}, EXPLICIT, [("127.0.0.1:29500", 2, 0)]),
    ],
)
def test_what_jax_is_told(variables, flags, calls, joined, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.start([*flags, "--workdir=a"]) == ["--workdir=a"]
    assert joined.calls == calls
    assert joined.gpus == "all"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (EXPLICIT[:2], "--process_id is missing; it goes"),
        (["--process_id=0"], "--coordinator_address is missing"),
        (["--coordinator_address=host", *EXPLICIT[1:]], "=host: must be HOST:PORT"),
        (["--coordinator_address=h:0", *EXPLICIT[1:]], "=h:0: must be HOST:PORT"),
        ([*EXPLICIT[:2], "--process_id=2"], "--process_id=2: must be from 0 to 1"),
        ([*EXPLICIT[:1], "--num_processes=0", "--process_id=0"], "must be at least 1"),
        ([*EXPLICIT, "--distributed"], "--distributed finds the processes by itself"),
        (["--num_processes=two"], "--num_processes: invalid int value: 'two'"),
        (["--start_timeout=0"], "--start_timeout=0: must be"),
        (
            ["--local_device_ids=0,x"],
            "--local_device_ids=0,x: must be all, or different GPU numbers",
        ),
        (["--local_device_ids=-1"], "--local_device_ids=-1: must be all, or"),
        (["--local_device_ids="], "--local_device_ids=: must be all, or"),
        (["--local_device_ids=0,1,00"], "--local_device_ids=0,1,00: must be all, or different"),
        (["--local_device_ids=0"], "--local_device_ids=0: process 0 on "),
        ([*EXPLICIT, "--local_device_ids=all"], "sees no NVIDIA GPU that JAX can use"),
    ],
)
def test_flags_that_cannot_be(flags, message, capsys, joined):
    assert parser.main(["train", *flags]) == MISTAKE
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1


def test_a_variable_of_jax_is_checked_like_its_flag(monkeypatch, joined):
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0;1")
    with pytest.raises(ConfigError, match="JAX_LOCAL_DEVICE_IDS=0;1: must be all, or"):
        launch.start(EXPLICIT)
    assert joined.calls == []


def test_processes_that_cannot_be_found_say_what_to_pass(monkeypatch):
    """JAX itself looks, and finds no cluster here."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    # Tests before this one have started JAX, and it would say that first.
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"found no other processes.*leave the flag out.*--proce"):
        launch.start(["--distributed"])


@pytest.mark.parametrize("flags", [["--distributed"], EXPLICIT])
def test_a_notebook_that_has_started_jax(flags, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: True)
    pattern = rf"^{flags[0].partition('=')[0]}: JAX has already started .* !python -m resnet_jax"
    with pytest.raises(ConfigError, match=pattern):
        launch.start(flags)


def test_hosts_of_a_slurm_job_that_stay_idle(monkeypatch, joined, capsys):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    launch.start([])
    assert "this job has 2 hosts and the run uses one of them" in capsys.readouterr().err
    launch.start(["--no-distributed"])  # on purpose
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # one of several steps
    launch.start([])
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    launch.start([])
    assert capsys.readouterr().err == ""


# --- Which GPUs


def hosts(*seen, wanted=None):
    """Views of processes, given the host and the GPUs of each."""
    return [View(host, [f"{host}-{gpu}" for gpu in gpus], wanted) for host, gpus in seen]


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        # One task a host: all of its GPUs.
        (hosts(("n1", NODE), ("n2", NODE)), [[*range(8)], [*range(8)]]),
        # One task a GPU, all GPUs visible to all tasks of a host: each its own one.
        (hosts(*[("n1", NODE)] * 8, *[("n2", NODE)] * 8), [[i] for i in range(8)] * 2),
        # --gpus-per-task=1: each sees its own GPU only, as number 0.
        (hosts(*[("n1", [gpu]) for gpu in NODE]), [[0]] * 8),
        # --gpus-per-task=4: each sees its own four.
        (hosts(("n1", NODE[:4]), ("n1", NODE[4:])), [[0, 1, 2, 3]] * 2),
        # Two tasks on a host of eight visible GPUs: half of them each.
        (hosts(("n1", NODE), ("n1", NODE)), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # Tasks dealt out to the hosts in turn.
        (hosts(("n1", "ab"), ("n2", "ab"), ("n1", "ab"), ("n2", "ab")), [[0], [0], [1], [1]]),
        # Three tasks, eight GPUs: two each.
        (hosts(*[("n1", NODE)] * 3), [[0, 1], [2, 3], [4, 5]]),
        # The same GPUs in another order.
        (hosts(("n1", "abcd"), ("n1", "dcba")), [[0, 1], [1, 0]]),
        # A run of one process, and one without GPUs.
        (hosts(("n1", NODE)), [[*range(8)]]),
        (hosts(("n1", ""), ("n2", "")), [[], []]),
        # The user's choice.
        (hosts(("n1", NODE), wanted=[2, 3]), [[2, 3]]),
        ([*hosts(("n1", "ab"), wanted=[1]), *hosts(("n1", "ab"), wanted=[0])], [[1], [0]]),
        ([*hosts(("n1", "ab"), wanted=[1]), *hosts(("n2", "ab"))], [[1], [0, 1]]),
    ],
)
def test_how_gpus_are_divided(views, expected):
    assert divide(views) == expected
    used = [view.gpus[i] for view, ids in zip(views, expected) for i in ids]
    assert len(used) == len(set(used))


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (hosts(*[("n1", "ab")] * 4), "4 processes on n1 share 2 GPUs; start at most one process"),
        (hosts(("n1", "abc"), ("n1", "cd")), "processes 0 and 1 on n1 see some of the same GPUs"),
        (hosts(("n1", "ab"), ("n2", "")), "process 1 on n2 sees no GPU, and other processes"),
        (hosts(("n1", "ab"), wanted=[2]), "=2: process 0 on n1 sees 2 GPUs, 0 to 1"),
        (hosts(("n1", ""), wanted=[0]), "=0: process 0 on n1 sees no NVIDIA GPU"),
        (hosts(("n1", ""), wanted=[]), "=all: process 0 on n1 sees no NVIDIA GPU"),
        (hosts(*[("n1", "ab")] * 2, wanted=[0, 1]), "processes 0 and 1 on n1 both use GPU 0"),
        (
            [*hosts(("n1", "ab")), *hosts(("n1", "ab"), wanted=[0])],
            "given to process 1 and not to process 0",
        ),
    ],
)
def test_gpus_that_cannot_be_divided(views, message):
    with pytest.raises(ConfigError, match=message) as error:
        divide(views)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("views", "lines"),
    [
        (hosts(*[("n1", NODE)] * 8), [""] * 8),
        (hosts(("n1", ""), ("n2", "")), ["", ""]),
        (hosts(*[("n1", [gpu]) for gpu in NODE]), [""] * 8),
        (
            hosts(*[("n1", NODE)] * 3, *[("n2", NODE)] * 3),
            ["8 GPUs are visible on n1 and the run uses 6 of them", "", ""]
            + ["8 GPUs are visible on n2 and the run uses 6 of them", "", ""],
        ),
        (
            hosts(("n1", NODE), ("n2", NODE), wanted=[0]),
            [f"8 GPUs are visible on {host} and the run uses 1 of them" for host in ("n1", "n2")],
        ),
    ],
)
def test_unused_gpus_are_named_once_a_host(views, lines):
    chosen = divide(views)
    found = [unused(views, chosen, process) for process in range(len(views))]
    assert [line.partition(";")[0] for line in found] == lines


@pytest.mark.parametrize(
    ("variables", "flags", "gpus"),
    [
        ({}, [], "all"),  # one process: JAX takes all by itself
        ({}, ["--local_device_ids=1,2"], "1,2"),
        ({}, ["--local_device_ids=all"], "0,1,2,3"),
        # One task a host, joined by Slurm, Open MPI or flags.
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, [], "0,1,2,3"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, [], "0,1,2,3"),
        ({}, EXPLICIT, "0,1,2,3"),
        ({}, [*EXPLICIT, "--local_device_ids=3"], "3"),
        ({"JAX_LOCAL_DEVICE_IDS": "2,0"}, EXPLICIT, "2,0"),
        ({"JAX_LOCAL_DEVICE_IDS": "2,0"}, [*EXPLICIT, "--local_device_ids=3"], "3"),
        ({"JAX_LOCAL_DEVICE_IDS": "2,0"}, [], "all"),  # as in JAX: for joined processes only
    ],
)
def test_which_gpus_a_process_takes(variables, flags, gpus, joined, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(local_gpus, "visible_gpus", lambda: list("abcd"))
    launch.start(flags)
    assert joined.gpus == gpus
    idle = 0 if gpus == "all" else 4 - len(gpus.split(","))
    assert capsys.readouterr().err.count("4 GPUs are visible on ") == bool(idle)


def driver_of(uuids, error=0):
    """libcuda, as far as it is asked here."""

    def count_devices(count):
        count._obj.value = len(uuids)
        return 0

    def get_device(device, index):
        device._obj.value = index + 7  # a handle, not an index
        return 0

    def get_uuid(uuid, device):
        uuid._obj[:] = uuids[device.value - 7]
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: error,
        cuDeviceGetCount=count_devices,
        cuDeviceGet=get_device,
        cuDeviceGetUuid_v2=get_uuid,
    )


@pytest.fixture
def cuda(monkeypatch):
    """A machine with CUDA: the UUIDs, JAX's platforms and plugins, and the driver."""
    uuids = [bytes(range(16)), bytes(range(1, 17))]
    found = SimpleNamespace(
        uuids=uuids,
        config=SimpleNamespace(jax_platforms=None),
        plugins=[SimpleNamespace(name="xla_cuda12")],
        driver=driver_of(uuids),
    )

    def load(name):
        if name != "libcuda.so.1" or found.driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return found.driver

    monkeypatch.undo()  # of the host without GPUs
    monkeypatch.setattr(local_gpus.ctypes, "CDLL", load)
    monkeypatch.setattr(local_gpus.metadata, "entry_points", lambda group: found.plugins)
    monkeypatch.setattr(local_gpus, "jax", SimpleNamespace(config=found.config))
    return found


@pytest.mark.parametrize(
    ("platforms", "count"),
    [(None, 2), ("", 2), ("cuda,cpu", 2), ("gpu", 2), ("cpu", 0), ("tpu,cpu", 0)],
)
def test_visible_gpus_are_those_of_the_driver(platforms, count, cuda):
    cuda.config.jax_platforms = platforms
    assert local_gpus.visible_gpus() == [uuid.hex() for uuid in cuda.uuids][:count]


def test_no_gpus_without_driver_device_or_plugin(cuda):
    assert len(local_gpus.visible_gpus()) == 2
    cuda.driver = driver_of(cuda.uuids, error=100)  # no device: CUDA_VISIBLE_DEVICES is empty
    assert local_gpus.visible_gpus() == []
    cuda.driver = None
    assert local_gpus.visible_gpus() == []
    cuda.driver = driver_of(cuda.uuids)
    cuda.plugins.clear()  # a JAX for CPUs on a machine with GPUs
    assert local_gpus.visible_gpus() == []


# --- Real processes

_JOIN = """
import json, os, sys
from resnet_jax.errors import ConfigError
from resnet_jax.distributed import local_gpus
local_gpus.visible_gpus = lambda: json.loads(os.environ["GPUS"])
from resnet_jax.distributed.launch import start
taken = []
local_gpus.use = taken.append
try:
    start(sys.argv[1:])
except ConfigError as error:
    print("error:", error)
else:
    print(*taken)
"""


@pytest.mark.parametrize(
    ("seen", "flags", "expected"),
    [
        (["ab", "ab"], [], ["[0]", "[1]"]),  # would both be GPU 0 of the launcher
        (
            ["ab", "ab"],
            ["--local_device_ids=0"],
            ["error: --local_device_ids: processes 0 and 1"] * 2,
        ),
    ],
)
def test_real_processes_divide_their_gpus(seen, flags, expected):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _JOIN, f"--coordinator_address={address}"]
            + [f"--num_processes={len(seen)}", f"--process_id={index}", *flags],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "GPUS": json.dumps(list(gpus))},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index, gpus in enumerate(seen)
    ]
    try:
        output = [process.communicate(timeout=speed.seconds(120))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * len(seen)
    assert [line[: len(start)] for line, start in zip(output, expected)] == expected
