"""What doctor says of machines that are made of files, and of installations that lack parts."""

import pathlib
import types

import pytest

from resnet_jax.doctor import machine as checks
from resnet_jax.doctor import nvml
from resnet_jax.doctor.findings import OK, PROBLEM, WARNING
from resnet_jax.doctor.machine import Machine
from resnet_jax.packages import Requirement, requirements
from tests.doctor.conftest import GIB, H100, card


def driver(version):
    line = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build\n"
    return {"proc/driver/nvidia/version": line}


@pytest.fixture
def installed(monkeypatch):
    """Makes these packages the ones that are installed, by name and version."""

    def install(**versions):
        hyphens = {name.replace("_", "-"): version for name, version in versions.items()}
        present = {**versions, **hyphens}

        def installed_versions(names):
            return {name: present[name] for name in names if name in present}

        monkeypatch.setattr(checks, "installed_versions", installed_versions)

    return install


def test_what_is_plugged_in(machine):
    assert checks.accelerators(machine()).text.startswith("no NVIDIA card and no TPU")
    found = checks.accelerators(machine(driver("570.86.10"), cards=8))
    assert (found.level, found.text) == (OK, f"8 x {H100}, driver 570.86.10")


def test_cards_of_other_jobs_and_of_a_driver_that_does_not_answer(machine):
    assert machine({"dev/nvidia0": ""}, [None, None]).nvidia_cards() == []
    assert machine(cards=[None, card(1)]).nvidia_cards() == [H100]
    assert machine(gpus=[3, 4]).nvidia_cards() == ["NVIDIA card"] * 2
    files = {"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": ""}
    assert machine(files).nvidia_cards() == ["NVIDIA card"] * 2


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
    found = checks.accelerators(machine(driver("550.54.15"), cards=1))
    assert found.level == PROBLEM
    assert found.text == (
        f"1 x {H100}; its driver 550.54.15 is too old for jax-cuda13-plugin, which needs 580: "
        "update the driver"
    )


def test_a_plugin_that_does_not_go_with_jaxlib(machine, installed):
    installed(jaxlib="0.10.2", jax_cuda12_plugin="0.9.0")
    found = checks.accelerator_packages(machine(cards=1))
    assert found.level == PROBLEM
    assert "jax-cuda12-plugin 0.9.0 does not match jaxlib 0.10.2" in found.text
    assert found.text.endswith("pip install -U 'jax[cuda12]'")
    installed(jaxlib="0.10.2", jax_cuda12_plugin="0.10.2", jax_cuda13_plugin="0.10.2")
    assert "both installed" in checks.accelerator_packages(machine()).text
    installed(jaxlib="0.10.2")
    assert checks.accelerator_packages(machine()) is None


def test_a_package_that_is_too_old_is_named(installed, monkeypatch):
    monkeypatch.setattr(checks, "requirements", lambda *_: [Requirement("jax", "0.10.2")])
    installed(resnet_jax_linen="0.1.0", jax="0.9.2")
    found = checks.core_packages()
    assert found.level == WARNING
    assert found.text == "too old: jax 0.9.2 (needs 0.10.2): pip install -U 'jax>=0.10.2'"
    installed(resnet_jax_linen="0.1.0", jax="0.12.0.dev1")
    assert checks.core_packages().level == OK


def test_training_without_its_extra(installed):
    installed(jax="0.10.2", numpy="2.4.6")
    found = checks.train_extra()
    assert found.level == PROBLEM
    assert found.text.endswith("nothing of it is installed: pip install -e '.[train]'")
    names = {each.name: "9999" for each in requirements("resnet-jax-linen", "train")}
    installed(**names)
    assert checks.train_extra().level == OK
    names.pop("optax")
    installed(**names)
    assert "optax not installed" in checks.train_extra().text


def test_extras_say_what_they_lack(installed):
    names = {each.name: "9999" for each in requirements("resnet-jax-linen", "report")}
    installed(**names)
    found = checks.other_extras()
    assert "report" in found.facts["installed"]
    assert found.facts["missing"]["onnx"] == ["onnx", "onnxruntime"]
    assert "hub (huggingface-hub)" in found.text


TAKEN = (
    "other processes use 64.4 GB of the 85.9 GB of card 0 of nvidia-smi, and JAX asks for 75%: end "
    "them, or set XLA_CLIENT_MEM_FRACTION=0.20"
)


@pytest.mark.parametrize(
    ("used", "gpus", "environ", "level", "words"),
    [
        (0.5, [0, 1], {}, OK, "no other process uses the cards"),
        (10, [0, 1], {}, WARNING, "other processes use 10.7 GB of card 0 of nvidia-smi; they"),
        (60, [1, 0], {}, WARNING, TAKEN),  # CUDA numbers cards by their speed
        (60, [0], {"XLA_CLIENT_MEM_FRACTION": ".2"}, WARNING, "other processes use 64.4 GB of"),
        (60, [0], {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".2"}, WARNING, "they share its speed"),
        (60, [0], {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, WARNING, "they share its speed"),
        (60, [1], {}, OK, "no other process uses the cards"),  # the other one is hidden
    ],
)
def test_memory_that_others_use(used, gpus, environ, level, words, machine):
    found = checks.card_memory(machine((), [card(0, used), card(1)], gpus, **environ))
    assert found.level == level
    assert words in found.text


def test_memory_of_a_card_behind_one_that_does_not_answer(machine):
    found = checks.card_memory(machine((), [None, card(1, used=60)], [0, 1]))
    assert "of card 1 of nvidia-smi" in found.text
    assert [each["nvidia_smi"] for each in found.facts["cards"]] == [1]
    assert checks.card_memory(machine()) is None
    assert checks.card_memory(machine((), [None], [0])) is None


def test_nvml_of_a_driver(monkeypatch):
    """The calls in the order and with the sizes that the library takes them."""
    calls = []

    class Library:
        def __getattr__(self, name):
            def call(*arguments):
                calls.append(name)
                if name == "nvmlDeviceGetCount_v2":
                    arguments[0]._obj.value = 3
                if name == "nvmlDeviceGetHandleByIndex_v2" and arguments[0].value < 2:
                    return (15, 4)[arguments[0].value]  # the GPU is lost, no permission
                if name == "nvmlDeviceGetName":
                    arguments[1].value = H100.encode()
                if name == "nvmlDeviceGetUUID":
                    arguments[1].value = b"GPU-00000000-0000-0000-0000-0000000000AB"
                if name == "nvmlDeviceGetMemoryInfo":
                    memory = arguments[1]._obj
                    memory.total, memory.free, memory.used = 80 * GIB, 79 * GIB, GIB
                return 0

            return call

    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: Library())
    lost, hidden, found = nvml.cards()
    assert (lost.name, hidden) == ("NVIDIA card that does not answer", None)
    assert found == card(0xAB, used=1)
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


def test_disks(machine, monkeypatch, tmp_path):
    here = machine(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "made" / "later"))
    assert checks.disks(here).level == OK
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**9))
    assert "this folder" in checks.disks(here).text
    cache = f"the compile cache ({tmp_path}/made/later)"
    assert f"{cache} has only 1 GB free" in checks.disks(here).text

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refuse)
    found = checks.disks(here)
    assert found.level == WARNING
    assert f"{cache} cannot be written: Permission denied" in found.text


def test_every_check_of_this_machine():
    """None of them fails where it is developed."""
    real = Machine()
    for check in (checks.python, checks.core_packages):
        assert check().level in (OK, WARNING)
    for check in (checks.cores, checks.memory, checks.disks):
        assert check(real).level in (OK, WARNING)
    assert isinstance(real.root, pathlib.Path)
