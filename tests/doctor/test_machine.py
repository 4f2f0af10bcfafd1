"""What doctor says of machines that are made of files, and of installations that lack parts."""

import pathlib
import types

import pytest

from resnet_jax.doctor import machine as checks
from resnet_jax.doctor import nvml, packages
from resnet_jax.doctor.findings import OK, PROBLEM, WARNING
from resnet_jax.doctor.machine import Machine
from resnet_jax.doctor.packages import Requirement

GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3"


def gpu_files(count, driver="570.86.10"):
    files = {
        f"proc/driver/nvidia/gpus/0000:{i}0:00.0/information": f"Model: \t\t {H100}\nIRQ: 1\n"
        for i in range(count)
    }
    files["proc/driver/nvidia/version"] = (
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\n"
    )
    return {**files, **{f"dev/nvidia{i}": "" for i in range(count)}}


@pytest.fixture
def installed(monkeypatch):
    """Makes these packages the ones that are installed, by name and version."""

    def install(**versions):
        hyphens = {name.replace("_", "-"): version for name, version in versions.items()}
        present = {**versions, **hyphens}

        def installed_versions(names):
            return {name: present[name] for name in names if name in present}

        for module in (checks, packages):
            monkeypatch.setattr(module, "installed_versions", installed_versions)

    return install


def test_what_is_plugged_in(machine):
    assert checks.accelerators(machine()).text.startswith("none is plugged in")
    found = checks.accelerators(machine(gpu_files(8)))
    assert (found.level, found.text) == (OK, f"8 x {H100}, driver 570.86.10")


def test_cards_that_a_container_gets(machine):
    """The kernel tells of all cards of the host, /dev of those that were passed on."""
    files = {k: v for k, v in gpu_files(8).items() if k not in [f"dev/nvidia{i}" for i in range(6)]}
    assert machine(files).nvidia_cards() == [H100] * 2


@pytest.mark.parametrize(
    ("files", "environ", "chips"),
    [
        ({f"dev/accel{i}": "" for i in range(4)}, {}, 4),
        (
            {
                "sys/bus/pci/devices/0/vendor": "0x1ae0\n",
                "sys/bus/pci/devices/0/device": "0x0063\n",
                "sys/bus/pci/devices/1/vendor": "0x1ae0\n",  # Google's network card
                "sys/bus/pci/devices/1/device": "0x0042\n",
            },
            {},
            1,
        ),
        ({}, {"COLAB_TPU_1VM": "1"}, 1),
        ({"dev/vfio/0": ""}, {}, 0),  # a card that a virtual machine gets
    ],
)
def test_tpu_chips(files, environ, chips, machine):
    assert machine(files, **environ).tpu_chips() == chips


def test_a_driver_that_is_too_old(machine, installed):
    installed(jax_cuda13_plugin="0.10.2")
    found = checks.accelerators(machine(gpu_files(1, driver="550.54.15")))
    assert found.level == PROBLEM
    assert found.text == (
        f"1 x {H100}; its driver 550.54.15 is too old for jax-cuda13-plugin, which needs 580: "
        "update the driver"
    )


def test_a_plugin_that_does_not_go_with_jaxlib(machine, installed):
    installed(jaxlib="0.10.2", jax_cuda12_plugin="0.9.0")
    found = checks.accelerator_packages(machine(gpu_files(1)))
    assert found.level == PROBLEM
    assert "jax-cuda12-plugin 0.9.0 does not go with jaxlib 0.10.2" in found.text
    assert found.text.endswith("pip install -U 'jax[cuda12]'")
    installed(jaxlib="0.10.2", jax_cuda12_plugin="0.10.2", jax_cuda13_plugin="0.10.2")
    assert "both installed" in checks.accelerator_packages(machine()).text
    installed(jaxlib="0.10.2")
    assert checks.accelerator_packages(machine()) is None


def test_a_package_that_is_too_old_is_named(machine, installed, monkeypatch):
    monkeypatch.setattr(packages, "requirements", lambda *_: [Requirement("jax", "0.10.2")])
    installed(resnet_jax_linen="0.1.0", jax="0.9.2")
    found = checks.core_packages(machine())
    assert found.level == WARNING
    assert found.text == "too old: jax 0.9.2 (needs 0.10.2): pip install -U 'jax>=0.10.2'"
    installed(resnet_jax_linen="0.1.0", jax="0.12.0.dev1")
    assert checks.core_packages(machine()).level == OK


def test_training_without_its_extra(machine, installed):
    installed(jax="0.10.2", numpy="2.4.6")
    found = checks.train_extra(machine())
    assert found.level == PROBLEM
    assert found.text.endswith("nothing of it is installed: pip install -e '.[train]'")
    names = {each.name: "9999" for each in packages.requirements("resnet-jax-linen", "train")}
    installed(**names)
    assert checks.train_extra(machine()).level == OK
    names.pop("grain")
    installed(**names)
    assert "grain not installed" in checks.train_extra(machine()).text


def test_extras_say_what_they_lack(machine, installed):
    names = {each.name: "9999" for each in packages.requirements("resnet-jax-linen", "report")}
    installed(**names)
    found = checks.other_extras(machine())
    assert "report" in found.facts["installed"]
    assert found.facts["missing"]["onnx"] == ["onnx", "onnxruntime"]
    assert "hub (huggingface-hub)" in found.text


@pytest.mark.parametrize(
    ("used", "environ", "level", "words"),
    [
        (0.5, {}, OK, "no other process uses the cards"),
        (10, {}, WARNING, "other processes use 10.7 GB of card 0"),
        (60, {}, WARNING, "JAX asks for 75%: end them, or set XLA_PYTHON_CLIENT_MEM_FRACTION=0.20"),
        (60, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".2"}, WARNING, "other processes use 64.4 GB"),
        (60, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, WARNING, "share its speed"),
        (60, {"CUDA_VISIBLE_DEVICES": "1"}, OK, "no other process uses the cards"),
    ],
)
def test_memory_that_others_use(used, environ, level, words, machine):
    cards = [nvml.Card(H100, 80 * GIB, int(used * GIB)), nvml.Card(H100, 80 * GIB, 0)]
    found = checks.card_memory(machine(**environ), cards)
    assert found.level == level
    assert words in found.text
    assert checks.card_memory(machine(), []) is None


def test_nvml_of_a_driver(monkeypatch):
    """The calls in the order and with the sizes that the library takes them."""
    calls = []

    class Library:
        def __getattr__(self, name):
            def call(*arguments):
                calls.append(name)
                if name == "nvmlDeviceGetCount_v2":
                    arguments[0]._obj.value = 1
                if name == "nvmlDeviceGetName":
                    arguments[1].value = H100.encode()
                if name == "nvmlDeviceGetMemoryInfo":
                    memory = arguments[1]._obj
                    memory.total, memory.free, memory.used = 80 * GIB, 79 * GIB, GIB
                return 0

            return call

    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: Library())
    assert nvml.cards() == [nvml.Card(H100, 80 * GIB, GIB)]
    assert calls[0] == "nvmlInit_v2"
    assert calls[-1] == "nvmlShutdown"


def test_huge_pages_of_a_tpu(machine):
    setting = {"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n"}
    assert checks.huge_pages(machine(setting)) is None
    assert "echo always" in checks.huge_pages(machine({**setting, "dev/accel0": ""})).text
    setting = {"sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n"}
    assert checks.huge_pages(machine(setting)) is None


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, 0.0),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 0.0),
        ({"sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/cpu.max": "400000 100000",
                "sys/fs/cgroup/job/step/cpu.max": "max 100000",
            },
            4.0,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            0.0,
        ),
    ],
)
def test_cores_that_a_control_group_leaves(files, quota, machine):
    assert checks.cpu_quota(machine(files)) == quota


def test_one_core_of_many(machine, monkeypatch):
    monkeypatch.setattr(checks.os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 64)
    found = checks.cores(machine())
    assert found.level == WARNING
    assert "--cpus-per-task" in found.text


def test_cores_that_others_keep_busy(machine, monkeypatch):
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 2)
    assert checks.cores(machine({"proc/loadavg": "1.50 1.0 1.0 2/300 4000"})).level == OK
    found = checks.cores(machine({"proc/loadavg": "18.08 16.54 13.37 9/300 4000"}))
    assert (found.level, "(load 18.08)" in found.text) == (WARNING, True)


def test_memory_that_a_control_group_leaves(machine):
    files = {"proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 50331648 kB\n"}
    assert checks.memory(machine(files)).text == "51.5 GB of 68.7 GB free"
    limited = {
        **files,
        "sys/fs/cgroup/memory.max": str(8 * GIB),
        "sys/fs/cgroup/memory.current": str(6 * GIB),
    }
    found = checks.memory(machine(limited))
    assert found.level == WARNING
    assert found.text.startswith("2.15 GB of 8.59 GB free")


def test_shared_memory_of_a_container(machine, monkeypatch):
    usage = types.SimpleNamespace(total=64 * 2**20, free=64 * 2**20)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    found = checks.shared_memory(machine())
    assert found.level == WARNING
    assert "67.1 MB in /dev/shm, too little for data.workers" in found.text


def test_disks(machine, monkeypatch, tmp_path):
    assert checks.disks(machine(), {"this folder": tmp_path}).level == OK
    found = checks.disks(machine(), {"the cache": tmp_path / "gone"})
    assert found.level == WARNING
    assert f"the cache ({tmp_path / 'gone'}) cannot be written" in found.text
    usage = types.SimpleNamespace(free=10**9)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    assert "has only 1 GB free" in checks.disks(machine(), {"this folder": tmp_path}).text


def test_compile_cache(machine, tmp_path, monkeypatch):
    folder = tmp_path / "xla"
    environ = {"JAX_COMPILATION_CACHE_DIR": str(folder)}
    assert checks.compile_cache(machine(**environ)).text == f"{folder}, empty so far"
    folder.mkdir()
    (folder / "a").write_bytes(bytes(2000))
    assert checks.compile_cache(machine(**environ)).text == f"{folder}, 1 file, 2 kB"
    monkeypatch.setattr(checks.os, "access", lambda *_: False)  # root may write everywhere
    found = checks.compile_cache(machine(**environ))
    assert (found.level, "--config.log.compile_cache" in found.text) == (WARNING, True)


def test_every_check_of_this_machine():
    """None of them fails where it is developed."""
    real = Machine()
    for check in (checks.python, checks.core_packages, checks.cores, checks.memory, checks.disks):
        assert check(real).level in (OK, WARNING)
    assert isinstance(real.root, pathlib.Path)
