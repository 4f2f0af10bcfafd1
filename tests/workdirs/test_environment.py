"""What a run notes about versions and settings, and which of it its processes compare."""

import json
import types

import jax
import pytest

from resnet_jax.config.schema import Config
from resnet_jax.distributed.process_group import first_difference
from resnet_jax.training.inputs import facts
from resnet_jax.workdirs import environment

CUDA = {
    "jax": ("0.10.2", ['jax-cuda12-plugin[with-cuda]<=0.10.2; extra == "cuda12"', "numpy>=2.0"]),
    "jax-cuda12-plugin": (
        "0.10.2",
        ["jax-cuda12-pjrt==0.10.2", 'nvidia-cudnn-cu12<10.0,>=9.8; extra == "with-cuda"'],
    ),
    "jax-cuda12-pjrt": ("0.10.2", []),
    "nvidia-cudnn-cu12": ("9.28.0.42", ["nvidia-cublas-cu12"]),
    "nvidia-cublas-cu12": ("12.9.3.13", []),
    "nvidia-nothing-of-jax": ("1.0", []),
}
TPU = {
    "jax": ("0.10.2", ['libtpu==0.0.42.*; extra == "tpu"', 'requests; extra == "tpu"']),
    "libtpu": ("0.0.42.1", []),
    "requests": ("2.34.2", []),
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts metadata of packages before the real ones."""

    def install(packages):
        for name, (version, requirements) in packages.items():
            folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            lines = [f"Requires-Dist: {each}\n" for each in requirements]
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(lines)
            (folder / "METADATA").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


class Backend:
    """A device of a PJRT plugin, with as much as is asked of it."""

    def __init__(self, platform_version):
        self.device_kind = "an accelerator"
        self.client = types.SimpleNamespace(platform_version=platform_version)


@pytest.fixture
def backend(monkeypatch):
    def use(platform, platform_version):
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "local_devices", lambda: [Backend(platform_version)])
        monkeypatch.setattr(jax, "devices", jax.local_devices)

    return use


def test_versions_of_the_cuda_plugin_and_its_libraries(install):
    install(CUDA)
    found = environment.versions()
    assert found["jax-cuda12-plugin"] == found["jax-cuda12-pjrt"] == "0.10.2"
    assert found["nvidia-cudnn-cu12"] == "9.28.0.42"
    assert found["nvidia-cublas-cu12"] == "12.9.3.13"
    assert "nvidia-nothing-of-jax" not in found


def test_version_of_libtpu(install):
    install(TPU)
    found = environment.versions()
    assert found["libtpu"] == "0.0.42.1"
    assert "requests" not in found


def test_a_cpu_has_no_accelerator_in_its_facts():
    found = {**environment.versions(), **environment.runtime()}
    assert not [name for name in found if "nvidia" in name or "cuda" in name or "tpu" in name]
    assert found["backend"] == "cpu"


def test_what_a_gpu_has_loaded(backend, monkeypatch):
    """Not what is installed: LD_LIBRARY_PATH can name another cuDNN."""
    backend("gpu", "PJRT C API\ncuda 12090")
    queries = types.SimpleNamespace(
        cuda_runtime_get_version=lambda: 12090, cudnn_get_version=lambda: 91002
    )
    monkeypatch.setattr(jax._src.lib, "cuda_versions", queries)
    assert environment.runtime() == {
        "backend": "gpu, PJRT C API, cuda 12090",
        "CUDA in use": "12.9",
        "cuDNN in use": "9.10.2",
    }

    def broken():
        raise RuntimeError("cuDNN not found")

    queries.cudnn_get_version = broken
    assert "cuDNN in use" not in environment.runtime()
    monkeypatch.setattr(jax._src.lib, "cuda_versions", None)
    assert environment.runtime() == {"backend": "gpu, PJRT C API, cuda 12090"}


@pytest.mark.parametrize(
    ("packages", "name", "other"),
    [(CUDA, "nvidia-cudnn-cu12", "9.10.2.21"), (TPU, "libtpu", "0.0.41")],
)
def test_processes_compare_accelerator_packages(packages, name, other, install):
    install(packages)
    one = facts(Config(), {})
    line = first_difference([one, {**one, name: other}])
    assert line == (
        f"{name} differs between processes: {packages[name][0]} (process 0), {other} (process 1); "
        "make them equal"
    )


def test_processes_compare_the_runtime(backend):
    builds = []
    for build in ("TFRT TPU v5 lite\nBuilt on Nov 6", "TFRT TPU v5 lite\nBuilt on Oct 1"):
        backend("tpu", build)
        builds.append({name: str(value) for name, value in facts(Config(), {}).items()})
    assert first_difference(builds).startswith("backend differs between processes: tpu, TFRT")


def test_processes_compare_settings_that_change_results(monkeypatch):
    def differs(name, value):
        before = environment.settings()
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            return first_difference([before, environment.settings()]).partition(" ")[0]

    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert differs("XLA_FLAGS", "--xla_gpu_deterministic_ops=true") == "XLA_FLAGS"
    assert differs("LIBTPU_INIT_ARGS", "--xla_tpu_x=1") == "LIBTPU_INIT_ARGS"
    assert differs("NVIDIA_TF32_OVERRIDE", "0") == "NVIDIA_TF32_OVERRIDE"
    for name, value in [
        ("XLA_FLAGS", "--xla_dump_to=/tmp/a --xla_force_host_platform_device_count=8"),
        ("XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=600"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5"),
        ("NCCL_SOCKET_IFNAME", "eth0"),
    ]:
        assert differs(name, value) == ""


def test_order_and_repetition_of_flags_do_not_matter():
    flags = [{"XLA_FLAGS": "--xla_a=1 --xla_b=2"}, {"XLA_FLAGS": "--xla_b=2 --xla_a=0 --xla_a=1"}]
    one, other = map(environment.settings, flags)
    assert one == other
    assert one["XLA_FLAGS"] == "--xla_a=1 --xla_b=2"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("jax_default_matmul_precision", "highest"),
        ("jax_enable_x64", True),
        ("jax_default_prng_impl", "rbg"),
    ],
)
def test_options_of_jax_that_change_results(option, value):
    before = environment.compared()
    default = getattr(jax.config, option)
    try:
        jax.config.update(option, value)
        after = environment.compared()
        recorded = environment.environment()
    finally:
        jax.config.update(option, default)
    assert first_difference([before, after]).startswith(f"{option} differs between processes")
    assert recorded[option] == str(value)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC "
            "2024\nGCC version:  gcc version 12.2.0",
            "550.54.15",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  "
            "(root@host)\nGCC version:  gcc version 11.4.0",
            "570.86.10",
        ),
        ("NVRM version: of another form", ""),
    ],
)
def test_version_of_the_driver(text, version, tmp_path):
    assert environment.nvidia_driver(tmp_path) == ""
    (tmp_path / "driver" / "nvidia").mkdir(parents=True)
    (tmp_path / "driver" / "nvidia" / "version").write_text(text)
    assert environment.nvidia_driver(tmp_path) == version


def test_the_driver_is_recorded_and_not_compared(monkeypatch):
    """Nodes of one cluster are updated one after the other; the kernels are not the driver's."""
    monkeypatch.setattr(environment, "nvidia_driver", lambda: "570.86.10")
    assert environment.environment()["NVIDIA driver"] == "570.86.10"
    assert "570.86.10" not in environment.compared().values()


def test_compiler_options_are_recorded(monkeypatch):
    name = "compiler options with steps_per_call > 1"
    monkeypatch.setattr(environment, "command_buffer_options", dict)
    assert name not in environment.environment()
    monkeypatch.setattr(
        environment, "command_buffer_options", lambda: {"xla_a": "B,C", "xla_d": "E"}
    )
    assert environment.environment()[name] == "xla_a=B,C xla_d=E"


def test_environment_json(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_SOMETHING", "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/a")
    environment.write_environment(tmp_path)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["JAX_SOMETHING"] == "1"
    assert found["XLA_FLAGS"] == "--xla_dump_to=/tmp/a"  # as it is set
    assert environment.compared().items() - {"XLA_FLAGS": ""}.items() <= found.items()
