"""What doctor says of a JAX that does not use what the machine has, and of slow devices."""

import types

import jax
import pytest

from resnet_jax.doctor import devices, speed
from resnet_jax.doctor.findings import OK, PROBLEM, WARNING
from resnet_jax.doctor.reasons import explain
from tests.doctor.conftest import H100

TPU = {"dev/accel0": ""}


@pytest.fixture
def installed(monkeypatch):
    def install(*names):
        found = dict.fromkeys(names, "0.10.2")
        monkeypatch.setattr(
            devices,
            "installed_versions",
            lambda wanted: {k: found[k] for k in wanted if k in found},
        )

    return install


@pytest.mark.parametrize(
    ("has", "environ", "packages", "log", "level", "words"),
    [
        (0, {}, [], [], OK, "cpu"),
        (
            2,
            {},
            [],
            [],
            PROBLEM,
            f"JAX uses the CPU, and not 2 x {H100}: JAX's CUDA plugin is missing: "
            "pip install 'jax[cuda12]'",
        ),
        (
            1,
            {"JAX_PLATFORMS": "cpu"},
            [],
            [],
            WARNING,
            f"the CPU, because JAX_PLATFORMS=cpu hides 1 x {H100}: unset it to use the accelerator",
        ),
        (
            1,
            {"CUDA_VISIBLE_DEVICES": ""},
            ["jax-cuda12-plugin"],
            [],
            WARNING,
            f"the CPU, because CUDA_VISIBLE_DEVICES= hides 1 x {H100}: unset it to use the "
            "accelerator",
        ),
        (
            1,
            {},
            ["jax-cuda12-plugin"],
            [
                "Failed to open libtpu.so: libtpu.so: cannot open shared object file",
                "Jax plugin configuration error Unable to load cuDNN. Is it installed?",
            ],
            PROBLEM,
            f"JAX uses the CPU, and not 1 x {H100}: cuDNN cannot be loaded: pip install -U "
            "'jax[cuda12]', and unset LD_LIBRARY_PATH",
        ),
        (
            1,
            {},
            ["jax-cuda12-plugin"],
            ["operation cuInit(0) failed: Unknown CUDA error 303; cuGetErrorName failed."],
            PROBLEM,
            f"JAX uses the CPU, and not 1 x {H100}: NVIDIA's driver does not answer: `nvidia-smi` "
            "has to work first (in a container, start it with --gpus=all)",
        ),
        (
            1,
            {},
            ["jax-cuda12-plugin"],
            ["something that nobody has seen before"],
            PROBLEM,
            f"JAX uses the CPU, and not 1 x {H100}: the CUDA plugin does not start (something that "
            "nobody has seen before)",
        ),
        (
            TPU,
            {},
            [],
            [],
            PROBLEM,
            "JAX uses the CPU, and not a TPU of 1 chip: libtpu is missing: pip install 'jax[tpu]'",
        ),
        (
            {},
            {"COLAB_TPU_1VM": "1"},
            [],
            [],
            PROBLEM,
            "JAX uses the CPU, and not a TPU of 1 chip: libtpu is missing: pip install 'jax[tpu]'",
        ),
        (
            TPU,
            {},
            ["libtpu"],
            ["ABORTED: The TPU is already in use by process with pid 815. Not attempting to load"],
            PROBLEM,
            "JAX uses the CPU, and not a TPU of 1 chip: process 815 holds the TPU; end it (in a "
            "notebook: restart the runtime)",
        ),
        (
            TPU,
            {"JAX_PLATFORMS": "cpu"},
            ["libtpu"],
            [],
            WARNING,
            "the CPU, because JAX_PLATFORMS=cpu hides a TPU of 1 chip: unset it to use the "
            "accelerator",
        ),
    ],
)
def test_a_cpu_where_there_is_more(
    has,
    environ,
    packages,
    log,
    level,
    words,
    machine,
    installed,
):
    installed(*packages)
    files, cards = ({}, has) if isinstance(has, int) else (has, 0)
    here = machine(files, cards, **environ)
    found = devices.judge_backend("cpu", here, log, {"backend": "cpu"})
    assert (found.level, found.text) == (level, words)


def test_a_gpu_names_what_it_has_loaded(machine):
    facts = {"backend": "gpu, cuda 12090", "CUDA in use": "12.9", "cuDNN in use": "9.10.2"}
    found = devices.judge_backend("gpu", machine(cards=1), [], facts)
    assert (found.level, found.text) == (OK, "gpu, CUDA 12.9, cuDNN 9.10.2")
    assert found.facts["platform"] == "gpu"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process "
            "with pid 12. Not attempting to load libtpu.so in this process.",
            "process 12 holds the TPU",
        ),
        (
            'Internal error when accessing libtpu multi-process lockfile. Run "sudo rm '
            '/tmp/libtpu_lockfile".',
            "remove /tmp/libtpu_lockfile",
        ),
        ("NOT_FOUND: TPU initialization failed: No jellyfish device found.", "finds no TPU"),
        (
            "TPU initialization failed: open(/dev/accel0): Operation not permitted",
            "cannot be opened: another process uses the TPU",
        ),
        (
            "E0000 cuda_dnn.cc:456] Loaded runtime CuDNN library: 9.10.1 but source was compiled "
            "with: 9.13.1.  CuDNN library needs to have matching major version",
            "cuDNN 9.10.1 is loaded, and JAX needs 9.13.1 or newer",
        ),
        (
            "Outdated cuDNN installation found.\nVersion JAX was built against: 90800\nMinimum "
            "supported: 90800\nInstalled version: 90100\nThe local installation ...",
            "cuDNN 90100 is loaded, and JAX was built for 90800",
        ),
        ("FAILED_PRECONDITION: DNN library initialization failed.", "cuDNN does not start"),
        ("CUDA driver version is insufficient for CUDA runtime version", "driver is too old"),
        ("CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected", "`nvidia-smi` has to work"),
        (
            "F1126 parse_flags_from_env.cc:234] Unknown flag in XLA_FLAGS: --xla_nonsense=1",
            "XLA does not know --xla_nonsense=1: remove it from XLA_FLAGS",
        ),
        (
            "Backend 'cuda' is not in the list of known backends: ['cpu', 'tpu'].",
            "JAX_PLATFORMS asks for cuda, which is not installed",
        ),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes", "XLA_CLIENT_MEM_FRACTION lower"),
        (
            "XLA_CLIENT_MEM_FRACTION is specified together with XLA_PYTHON_CLIENT_MEM_FRACTION. "
            "Remove the latter one, it is deprecated.",
            "are both set: unset the second",
        ),
        ("an error of\nits own kind", "an error of its own kind"),
    ],
)
def test_errors_in_words(error, words):
    assert words in explain(error)
    assert "\n" not in explain(error)
    assert "\\" not in explain(error)


def test_advice_names_the_cuda_that_is_installed(monkeypatch):
    from resnet_jax.doctor import reasons

    names = lambda wanted: dict.fromkeys(wanted, "0.10.2")  # noqa: E731
    monkeypatch.setattr(reasons, "installed_versions", names)
    assert "jax[cuda13]" in explain("Unable to load cuDNN. Is it installed?")


def test_a_jax_that_does_not_start(machine):
    here = machine(JAX_PLATFORMS="cuda")
    found = devices.judge_failure(AssertionError(), here)
    assert found.level == PROBLEM
    assert "JAX_PLATFORMS=cuda names a platform that this machine lacks" in found.text
    error = RuntimeError("Unable to initialize backend 'tpu': the sky has fallen")
    assert "the sky has fallen" in devices.judge_failure(error, machine()).text
    log = ["Unable to load cuDNN. Is it installed?"]
    assert "cuDNN cannot be loaded" in devices.judge_failure(error, machine(), log).text


class Device:
    def __init__(self, kind, platform="gpu", stats=None, capability="9.0"):
        self.device_kind = kind
        self.platform = platform
        self.compute_capability = capability
        self._stats = stats

    def memory_stats(self):
        return self._stats


@pytest.fixture
def use(monkeypatch):
    """Makes these the devices of JAX."""

    def use(*found):
        monkeypatch.setattr(jax, "local_devices", lambda: [*found])
        monkeypatch.setattr(jax, "local_device_count", lambda: len(found))
        monkeypatch.setattr(jax, "device_count", lambda: len(found))
        monkeypatch.setattr(jax, "default_backend", lambda: found[0].platform)

    return use


def test_devices_with_memory_and_peak(use):
    use(*[Device(H100, stats={"bytes_limit": 63_800_000_000})] * 8)
    found = devices.devices()
    assert found.level == OK
    assert found.text.startswith(f"8 x {H100}, 63.8 GB each for JAX, peak 989 TFLOP/s and 3.35 TB")


def test_a_kind_that_nobody_knows(use):
    use(Device("NVIDIA Z9000"))
    found = devices.devices()
    assert found.level == WARNING
    assert 'unknown kind "NVIDIA Z9000": MFU will not be shown, please report' in found.text


def test_a_cpu_has_no_memory_statistics(use):
    use(Device("cpu", "cpu"))
    assert devices.devices().text == "1 x cpu"


@pytest.mark.parametrize(
    ("platform", "capability", "asked", "tf32_off", "words"),
    [
        ("cpu", None, None, False, "exact float32"),
        ("gpu", 9.0, None, False, "TF32, 10 bits"),
        ("gpu", 8.0, None, True, "exact float32"),
        ("gpu", 7.5, None, False, "exact float32"),
        ("gpu", None, None, False, "exact float32"),  # AMD
        ("gpu", 9.0, "highest", False, "exact float32 (JAX_DEFAULT_MATMUL_PRECISION=highest)"),
        ("tpu", None, None, False, "bfloat16, 7 bits"),
        ("tpu", None, "high", False, "three in bfloat16"),
        ("tpu", None, "float32", False, "exact float32"),
    ],
)
def test_what_float32_means(platform, capability, asked, tf32_off, words):
    assert words in devices.float32_means(platform, capability, asked, tf32_off)


@pytest.mark.parametrize(
    ("capability", "number"), [("7.5", 7.5), ("12.0", 12.0), ("gfx942", None), (None, None)]
)
def test_only_nvidia_has_a_compute_capability(capability, number):
    assert devices.cuda_capability(Device("a card", capability=capability)) == number


def test_an_amd_card_is_checked_like_others(use, machine, monkeypatch):
    use(Device("AMD Instinct MI300X", capability="gfx942"))
    assert "exact float32" in devices.precision(machine()).text
    monkeypatch.setattr(speed, "_training_step", lambda dtype, *_: speed.Finding(OK, dtype))
    assert speed.training_step(half=True).name == "step, bfloat16"
    assert speed.training_step(half=False).name == "step, float32"
    use(Device("cpu", "cpu"))
    assert speed.training_step(half=True) is None


def test_how_memory_is_taken(use, machine):
    use(Device(H100))
    assert devices.preallocation(machine()).text == "75% of each card is reserved at the start"
    less = devices.preallocation(machine(XLA_CLIENT_MEM_FRACTION="0.5"))
    assert less.text == "50% of each card is reserved at the start"
    none = devices.preallocation(machine(XLA_PYTHON_CLIENT_PREALLOCATE="false"))
    assert none.text == "none; up to 75% of each card is allocated on demand"
    slow = devices.preallocation(machine(XLA_PYTHON_CLIENT_ALLOCATOR="platform"))
    assert slow.level == WARNING
    use(Device("cpu", "cpu"))
    assert devices.preallocation(machine()) is None


@pytest.mark.parametrize(
    ("rates", "peak", "level", "words"),
    [
        ([7e14], 989e12, OK, "700 TFLOP/s in bfloat16, 71% of the peak"),
        ([7e14] * 7 + [6.9e14], 989e12, OK, "690 TFLOP/s in bfloat16 on the slowest of 8, 70%"),
        ([1e14], 989e12, WARNING, "10% of the peak: the device is throttled or shared"),
        ([7e14, 4e14], 989e12, WARNING, "device 1 is slower than the best with 700"),
        ([7e14], None, OK, "700 TFLOP/s in bfloat16"),
    ],
)
def test_a_device_that_is_slow(rates, peak, level, words):
    found = speed.judge_product(rates, "bfloat16", peak)
    assert found.level == level
    assert words in found.text


def test_half_type():
    assert speed.half_type(Device("NVIDIA T4", capability="7.5")).name == "float16"
    assert speed.half_type(Device(H100)).name == "bfloat16"
    assert speed.half_type(Device("TPU v5 lite", "tpu", capability=None)).name == "bfloat16"


def test_matrix_product_on_real_devices(monkeypatch):
    two = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: two)
    found = speed.matrix_product(side=64, rounds=2)
    assert found.level in (OK, WARNING)  # a busy machine
    assert len(found.facts["flops"]) == len(two)
    real = speed.jnp.dot
    monkeypatch.setattr(speed.jnp, "dot", lambda *a, **k: real(*a, **k).at[0, 0].add(1))
    found = speed.matrix_product(side=64, rounds=2)
    assert (found.level, "wrong" in found.text) == (PROBLEM, True)


def test_copies_and_sums_on_real_devices():
    assert speed.host_copy(count=2**16).facts["bytes_per_second"] > 0
    found = speed.all_reduce()
    assert found.level == OK
    assert f"4 MB over {jax.device_count()} devices" in found.text


def test_a_training_step_where_the_peak_is_known(tiny_model, monkeypatch):
    peak = types.SimpleNamespace(flops=1e12)
    monkeypatch.setattr(speed, "find_accelerator", lambda kind: peak)
    found = speed._training_step("bfloat16", tiny_model, seconds=0.01)
    assert (found.level, found.facts["loss"] > 0) == (OK, True)
    flops = 6 * 322_720 * found.facts["images_per_second"]
    assert found.facts["mfu"] == pytest.approx(flops / (jax.device_count() * 1e12))


@pytest.mark.parametrize(
    ("losses", "words"), [([2.3, float("nan")], "the loss of tiny is nan after 2 steps")]
)
def test_a_loss_that_is_no_number(losses, words, monkeypatch, tiny_model):
    monkeypatch.setattr(speed, "_train", lambda *_: (1.0, 0.1, losses))
    found = speed.training_step(False, tiny_model)
    assert found.level == PROBLEM
    assert words in found.text
    assert found.facts["loss"] is None


def test_a_step_that_fails(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to ...")

    monkeypatch.setattr(speed, "_train", fail)
    found = speed.training_step(False)
    assert found.level == PROBLEM
    assert "resnet8_cifar does not train: the device's memory is full" in found.text


def test_decode_rate():
    assert speed.decode_rate(seconds=0.01).facts["images_per_second_per_core"] > 1
