"""Checks of the machine and its packages that do not start JAX.

All files are read below one root, and environment variables from one mapping, so that tests can
describe any machine by a few files.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from resnet_jax.compile_cache import FOLDER
from resnet_jax.distributed import local_gpus
from resnet_jax.distributed.device_memory import memory_fraction
from resnet_jax.doctor import nvml
from resnet_jax.doctor.findings import OK, PROBLEM, WARNING, Finding, plural, size
from resnet_jax.errors import ConfigError
from resnet_jax.files import expand_user
from resnet_jax.packages import (
    DISTRIBUTION,
    Requirement,
    extras,
    installed_versions,
    older,
    requirements,
)
from resnet_jax.workdirs.environment import nvidia_driver

_GIB = 2**30
# PCI vendor and device ids of TPUs, v3 to TPU7x. Google also makes network cards.
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
# The oldest drivers for CUDA 12 and CUDA 13 (docs.jax.dev, installation).
_LEAST_DRIVER = {"jax-cuda12-plugin": "525", "jax-cuda13-plugin": "580"}
# Less than this is short for a run.
_LEAST_MEMORY = 4 * _GIB
_LEAST_DISK = 2 * _GIB


class Machine:
    """A machine, real or described by files.

    Args:
      root: The folder with dev, proc and sys.
      environ: Environment variables.
    """

    def __init__(self, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> None:
        self.root = root
        self.environ = environ

    @functools.cached_property
    def cards(self) -> list[nvml.Card | None]:
        """The NVIDIA cards, in the order of nvidia-smi."""
        return nvml.cards()

    @functools.cached_property
    def gpus(self) -> list[str]:
        """UUIDs of the NVIDIA GPUs that JAX can use, in CUDA's order."""
        return local_gpus.visible_gpus()

    def read(self, path: str) -> str:
        """The text of a file; "" if it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def nvidia_cards(self) -> list[str]:
        """Names of the NVIDIA cards that this process may use, even if JAX cannot."""
        if self.cards:
            return [each.name for each in self.cards if each is not None]
        files = [*self.root.glob("dev/nvidia[0-9]*")]
        return ["NVIDIA card"] * (len(self.gpus) or len(files))

    def tpu_chips(self) -> int:
        """Number of TPU chips."""
        on_bus = 0
        for vendor in self.root.glob("sys/bus/pci/devices/*/vendor"):
            on_bus += (
                self.read(str(vendor.relative_to(self.root))) == _GOOGLE
                and self.read(str(vendor.with_name("device").relative_to(self.root))) in _TPUS
            )
        files = len([*self.root.glob("dev/accel[0-9]*")])
        in_colab = "COLAB_TPU_ADDR" in self.environ or "COLAB_TPU_1VM" in self.environ
        return on_bus or files or int(in_colab)


# Software.


def python() -> Finding:
    """Python and the operating system."""
    facts = {"python": platform.python_version(), "system": platform.platform()}
    return Finding(OK, f"{facts['python']} on {facts['system']}", facts)


def core_packages() -> Finding:
    """The packages that models need, compared with the oldest supported versions."""
    names = (DISTRIBUTION, "jax", "jaxlib", "flax", "numpy", "optax", "orbax-checkpoint")
    versions = installed_versions(names)
    if DISTRIBUTION not in versions:
        text = "this package is not installed, so versions cannot be compared: pip install -e ."
        return Finding(WARNING, text, versions)
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return _judge_versions(requirements(DISTRIBUTION), versions, text)


def train_extra() -> Finding:
    """The additional packages of training."""
    wanted = requirements(DISTRIBUTION, "train")
    if lacking := _missing(wanted):
        what = "nothing of it is" if len(lacking) == len(wanted) else f"{_listed(lacking)} not"
        text = f"training needs the extra 'train'; {what} installed: pip install -e '.[train]'"
        return Finding(PROBLEM, text, {"missing": lacking})
    return _judge_versions(
        wanted, {}, f"all {len(wanted)} packages of the extra 'train' are installed"
    )


def _judge_versions(wanted: list[Requirement], facts: dict[str, str], text: str) -> Finding:
    present = installed_versions(each.name for each in wanted)
    old = [x for x in wanted if x.name in present and x.least and older(present[x.name], x.least)]
    if old:
        said = ", ".join(f"{each.name} {present[each.name]} (needs {each.least})" for each in old)
        newer = " ".join(f"'{each.name}>={each.least}'" for each in old)
        return Finding(WARNING, f"too old: {said}: pip install -U {newer}", facts)
    return Finding(OK, text, facts)


def other_extras() -> Finding:
    """The optional extras and their missing packages."""
    lacking = {
        extra: _missing(requirements(DISTRIBUTION, extra))
        for extra in extras()
        if extra not in ("train", "gpu", "tpu")
    }
    present = [extra for extra, names in lacking.items() if not names]
    lacking = {extra: names for extra, names in lacking.items() if names}
    text = ", ".join(present) or "none"
    if lacking:
        text += "; not installed: " + ", ".join(f"{k} ({_listed(v)})" for k, v in lacking.items())
    return Finding(OK, text, {"installed": present, "missing": lacking})


def _missing(wanted: list[Requirement]) -> list[str]:
    present = installed_versions(each.name for each in wanted)
    return [each.name for each in wanted if each.name not in present]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def accelerator_packages(machine: Machine) -> Finding | None:
    """The CUDA plugin or libtpu; None if neither is installed."""
    versions = installed_versions(["jaxlib", "libtpu", *_LEAST_DRIVER])
    jaxlib = versions.pop("jaxlib", "")
    plugins = [name for name in _LEAST_DRIVER if name in versions]
    if not versions:
        return None
    if len(plugins) > 1:
        what = f"{' and '.join(plugins)} are both installed; uninstall one"
        return Finding(WARNING, what, versions)
    for name in plugins:
        if versions[name] != jaxlib:
            cuda = name.removeprefix("jax-").removesuffix("-plugin")
            what = (
                f"{name} {versions[name]} does not match jaxlib {jaxlib}, so JAX will not "
                f"load it: pip install -U 'jax[{cuda}]'"
            )
            return Finding(PROBLEM if machine.nvidia_cards() else WARNING, what, versions)
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding(OK, text, versions)


# Hardware.


def accelerators(machine: Machine) -> Finding:
    """The installed accelerators, and NVIDIA's driver."""
    cards, chips = machine.nvidia_cards(), machine.tpu_chips()
    driver = nvidia_driver(machine.root / "proc")
    facts: dict[str, object] = {"nvidia": cards, "tpu_chips": chips, "nvidia_driver": driver}
    if cards:
        text = " and ".join(f"{cards.count(name)} x {name}" for name in dict.fromkeys(cards))
        for plugin, least in _LEAST_DRIVER.items():
            if driver and installed_versions([plugin]) and older(driver, least):
                what = f"{text}; its driver {driver} is too old for {plugin}, which needs {least}"
                return Finding(PROBLEM, f"{what}: update the driver", facts)
        return Finding(OK, f"{text}, driver {driver or 'unknown'}", facts)
    if chips:
        return Finding(OK, f"TPU, {plural(chips, 'chip')} on this machine", facts)
    return Finding(OK, "no NVIDIA card and no TPU on this machine", facts)


def huge_pages(machine: Machine) -> Finding | None:
    """Whether a TPU host uses transparent huge pages; without them, a TPU starts slowly."""
    found = machine.read("sys/kernel/mm/transparent_hugepage/enabled")
    if not machine.tpu_chips() or not found or "[always]" in found:
        return None
    text = (
        "off, which slows the start of a TPU: "
        "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    )
    return Finding(WARNING, text)


def card_memory(machine: Machine) -> Finding | None:
    """Memory that other processes use on the GPUs that JAX can use, before JAX starts."""
    found = {i: x for i, x in enumerate(machine.cards) if x is not None and x.uuid in machine.gpus}
    if not found:
        return None
    facts = {
        "cards": [
            {"nvidia_smi": number, "uuid": card.uuid, "used": card.used, "memory": card.memory}
            for number, card in found.items()
        ]
    }
    on_demand = machine.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0")
    takes = 0.0 if on_demand else memory_fraction(machine.environ)
    for number, card in found.items():
        free = 1 - card.used / card.memory
        if free < takes:
            text = (
                f"other processes use {size(card.used)} of the {size(card.memory)} of card "
                f"{number} of nvidia-smi, and JAX asks for {takes:.0%}: end them, or set "
                f"XLA_CLIENT_MEM_FRACTION={max(free - 0.05, 0.05):.2f}"
            )
            return Finding(WARNING, text, facts)
    busy = {number: card for number, card in found.items() if card.used > 1.5 * _GIB}
    if busy:
        said = ", ".join(f"{size(card.used)} of card {i}" for i, card in busy.items())
        text = f"other processes use {said} of nvidia-smi; they share its speed too"
        return Finding(WARNING, text, facts)
    return Finding(OK, "no other process uses the cards", facts)


def cores(machine: Machine) -> Finding:
    """The CPU cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    usable = usable or os.cpu_count() or 1
    quota = cpu_quota(machine)
    load = float((machine.read("proc/loadavg").split() or ["0"])[0])
    facts = {"cores": os.cpu_count(), "usable": usable, "quota": quota, "load": load}
    text = f"{usable} of {os.cpu_count()} usable"
    if quota and quota < usable:
        text += f", and a container limits them to the time of {quota:g}"
    if usable == 1 and (os.cpu_count() or 1) > 1:
        text += ": ask for more (Slurm: --cpus-per-task), or decoding will be slow"
        return Finding(WARNING, text, facts)
    if load > 2 * (os.cpu_count() or 1):
        text += f", but other processes keep them busy (load {load:g}): the speeds below are wrong"
        return Finding(WARNING, text, facts)
    return Finding(OK, text, facts)


def cpu_quota(machine: Machine) -> float:
    """The CPU limit of this process's control group, in cores; 0.0: no limit."""
    limits = []
    for folder in _control_groups(machine):
        quota, _, period = machine.read(f"{folder}/cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            limits.append(int(quota) / int(period))
    old = [machine.read(f"sys/fs/cgroup/cpu/cpu.cfs_{x}_us") for x in ("quota", "period")]
    if all(each.isdecimal() for each in old) and int(old[1]):  # -1: no limit
        limits.append(int(old[0]) / int(old[1]))
    return min(limits, default=0.0)


def _control_groups(machine: Machine) -> list[str]:
    """The folders of this process's control group and its parents, relative to the root."""
    found = re.search(r"^0::/(.*)$", machine.read("proc/self/cgroup"), re.MULTILINE)
    parts = [each for each in (found[1] if found else "").split("/") if each]
    return ["/".join(["sys/fs/cgroup", *parts[:end]]) for end in range(len(parts), -1, -1)]


def memory(machine: Machine) -> Finding:
    """The host memory that is available to this process."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", machine.read("proc/meminfo"), re.MULTILINE))
    if "MemAvailable" not in found:
        return Finding(OK, "unknown")
    total, free = (int(found[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for folder in _control_groups(machine):
        limit = machine.read(f"{folder}/memory.max")
        used = machine.read(f"{folder}/memory.current")
        if limit.isdecimal() and used.isdecimal():
            total, free = min(total, int(limit)), min(free, int(limit) - int(used))
    facts = {"total": total, "available": free}
    text = f"{size(free)} of {size(total)} free"
    if free < _LEAST_MEMORY:
        return Finding(WARNING, f"{text}: a run needs some GB; lower data.memory_gib", facts)
    return Finding(OK, text, facts)


def disks(machine: Machine) -> Finding:
    """Whether the folders that a run uses can be written, and their free space."""
    cache = machine.environ.get("JAX_COMPILATION_CACHE_DIR") or FOLDER
    folders = {"this folder": Path.cwd()}
    if "://" not in cache:
        with contextlib.suppress(ConfigError):  # without a home directory programs are not stored
            folders["the compile cache"] = expand_user(cache)
    said, facts, wrong = [], {}, []
    for name, folder in folders.items():
        there = next(each for each in (folder, *folder.parents) if each.exists())
        try:
            free = shutil.disk_usage(there).free
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            wrong.append(f"{name} ({folder}) cannot be written: {error.strerror}")
            continue
        facts[name] = {"path": str(folder), "free": free}
        said.append(f"{name} {size(free)}")
        if free < _LEAST_DISK:
            wrong.append(f"{name} ({folder}) has only {size(free)} free")
    if wrong:
        advice = "set --workdir, and --config.log.compile_cache=DIR for compiled programs"
        return Finding(WARNING, f"{'; '.join(wrong)}: {advice}", facts)
    return Finding(OK, f"free: {', '.join(said)}", facts)
