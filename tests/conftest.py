"""For all tests: the platform, a compilation cache, datasets, eight CPU devices, a small disk.

The tests run on the CPU, whatever the machine has. `pytest --platform=NAME` runs them elsewhere:
  fake-gpu, fake-tpu  on CPU devices that look like accelerators (fake_accelerator.py)
  gpu, tpu            on the real ones: the tests that one device is enough for
"""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import subprocess

import pytest

# Of datasets and compiled programs; one user's may not be writable for another.
TEMPORARY = pathlib.Path(
    os.environ.get("RESNET_JAX_TEST_FOLDER") or pathlib.Path(__file__).parents[1] / "tmp"
)

# Compiling takes most of the tests' time, and what it makes runs a few steps of tiny networks.
FAST_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
_JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
if _JAXLIB <= (0, 10):  # XLA ends the process at a flag that it does not know
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
if _JAXLIB >= (0, 10):
    # Eight devices on a busy machine may wait for each other longer than XLA's 40 seconds.
    FAST_COMPILE += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
CPU_FLAGS = f"--xla_force_host_platform_device_count=8 {FAST_COMPILE}"
# Before TFDS is imported.
os.environ["TFDS_DATA_DIR"] = str(TEMPORARY / "tfds")
os.environ["XDG_STATE_HOME"] = str(TEMPORARY / "state")
# Of this process, and of all that it starts.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(TEMPORARY / "jax-cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Where Python writes no bytecode beside its sources, each of a hundred subprocesses would compile
# all modules that it imports: a few seconds.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(TEMPORARY / "bytecode"))

import chex
import jax
import jax.export  # an attribute of JAX 0.7 only where it is imported

from resnet_jax.cli import parser as command_line
from resnet_jax.data import decode as decoding
from resnet_jax.data.memory import InMemoryDataset
from resnet_jax.data.sources.tfds import TfdsSource
from resnet_jax.evaluation import evaluator
from resnet_jax.training import rate_range, run
from tests import tiny
from tests.advice import foreign_flags
from tests.fake_accelerator import fake_accelerator

if not hasattr(jax, "enable_x64"):  # JAX 0.7
    jax.enable_x64 = jax.experimental.enable_x64


def pytest_addoption(parser):
    parser.addoption(
        "--platform",
        default=os.environ.get("RESNET_JAX_TEST_PLATFORM", "cpu"),
        choices=("cpu", "gpu", "tpu", "fake-gpu", "fake-tpu"),
        help="what the tests run on (default: $RESNET_JAX_TEST_PLATFORM, or cpu)",
    )


def pytest_configure(config):
    """Chooses the backend before any test can start one; subprocesses inherit the choice."""
    name = config.getoption("--platform").removeprefix("fake-")
    real = name == config.getoption("--platform")
    backends = {"gpu": "cuda,cpu", "tpu": "tpu,cpu"}.get(name, "cpu") if real else "cpu"
    os.environ["JAX_PLATFORMS"] = backends
    jax.config.update("jax_platforms", backends)
    # XLA_FLAGS from outside counts. A run that is repeated gives the same bits on a GPU too.
    flags = {"cpu": CPU_FLAGS, "cuda,cpu": "--xla_gpu_deterministic_ops=true"}
    os.environ.setdefault("XLA_FLAGS", flags.get(backends, ""))
    if backends != "cpu":
        # The test processes share the device; products are float32, as the expected values are.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        jax.config.update("jax_default_matmul_precision", "highest")
        if jax.default_backend() != name:  # JAX takes the next platform without a word
            raise pytest.UsageError(f"--platform={name}: JAX finds no {name.upper()} here")
        _loosen(factor=10)


def _loosen(factor):
    """An accelerator sums in another order, so values that are close on a CPU may be less so."""
    strict = chex.assert_trees_all_close

    def close(*trees, rtol=1e-6, atol=0.0, **options):
        strict(*trees, rtol=factor * rtol, atol=factor * atol, **options)

    chex.assert_trees_all_close = close


# What one accelerator computes; the rest is about hosts and files, and the same on any machine.
_ON_ACCELERATORS = (
    *("models", "parity", "evaluation", "inference", "weights", "data/test_augment.py"),
    *("training/test_step.py", "training/test_loop.py", "training/test_resume.py"),
    *("training/test_checkpoint.py", "training/test_state.py", "training/test_optimizer.py"),
)


def pytest_collection_modifyitems(config, items):
    """On a real accelerator only the tests that it computes run."""
    if config.getoption("--platform") not in ("gpu", "tpu"):
        return
    here = pathlib.Path(__file__).parent
    wanted = tuple(str(here / name) for name in _ON_ACCELERATORS)
    chosen = [item for item in items if str(item.path).startswith(wanted)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_collection_finish(session):
    """Python's garbage collector need not visit what lives as long as the process.

    It takes a twentieth of the time of tests that trace programs, which make many objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("devices")
    if marker and jax.device_count() < marker.args[0]:
        pytest.skip(f"needs {marker.args[0]} devices; there are {jax.device_count()}")


def pytest_generate_tests(metafunc):
    """A test marked `accelerators` also runs on a fake GPU, and as a slow test on a fake TPU."""
    marked = metafunc.definition.get_closest_marker("accelerators")
    if marked and metafunc.config.getoption("--platform") == "cpu":
        tpu = pytest.param("fake-tpu", marks=pytest.mark.slow)
        platforms = [pytest.param(None, id="cpu"), "fake-gpu", tpu]
        metafunc.parametrize("accelerator", platforms, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def accelerator(request):
    """What the devices look like: "cpu", "gpu" or "tpu"; fixtures that compile depend on it."""
    name = getattr(request, "param", None) or request.config.getoption("--platform")
    if name.startswith("fake-"):
        with fake_accelerator(name.removeprefix("fake-")):
            yield name.removeprefix("fake-")
    else:
        yield name


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs():
    """Forgets compiled programs before the process runs out of memory maps.

    Each holds about nine; at Linux' limit of 65,530 the next compilation is a segmentation fault.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _digits_decoded_once():
    """Two hundred runs train on the same digits, which take most of a second to decode."""
    opens, decoded = run.open_dataset, {}

    def open_dataset(source, config, training, corrupt):
        here = type(source) is TfdsSource and source.name == "digits"
        if not (here and source._folder.startswith(os.environ["TFDS_DATA_DIR"])):
            return opens(source, config, training, corrupt)
        # What a test replaces counts.
        reading = TfdsSource._read, decoding.train_crop, decoding.eval_crop
        key = (source._folder, source.split, repr(config), training, *reading)
        if key not in decoded:
            dataset = opens(source, config, training, corrupt)
            if type(dataset) is not InMemoryDataset or len(dataset) < len(source):
                return dataset
            for array in (dataset.images, dataset.labels, dataset.indices):
                array.flags.writeable = False
            decoded[key] = dataset
        found = decoded[key]
        return InMemoryDataset(found.images, found.labels, found.indices)

    with pytest.MonkeyPatch.context() as patch:
        for module in (run, evaluator, rate_range):
            patch.setattr(module, "open_dataset", open_dataset)
        yield


@pytest.fixture(scope="session", autouse=True)
def _errors_name_flags_of_their_command():
    """In all tests: an error of a command advises no flag that the command does not have."""
    parse, fail, words = command_line._parse, command_line._fail, []

    def remember(arguments):
        words[:] = arguments
        return parse(arguments)

    def check(error, *others):
        assert not foreign_flags(words, str(error)), f"{words}: {error}"
        return fail(error, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "_parse", remember)
        patch.setattr(command_line, "_fail", check)
        yield


@pytest.fixture(scope="module")
def tiny_model(accelerator):
    """The name of a registered network that compiles and trains in a third of the others' time."""
    with tiny.registered():
        yield tiny.NAME


@pytest.fixture
def small_disk(tmp_path, request):
    """One of half a megabyte, or of the size that `indirect` gives."""
    folder, size = tmp_path / "disk", getattr(request, "param", "512k")
    folder.mkdir()
    command = [shutil.which("mount"), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if command[0] is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run([shutil.which("umount"), folder], check=True)
