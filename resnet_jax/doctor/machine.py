"""The machine and what is installed on it, as far as that can be told without JAX.

Everything is read below one root and from one set of environment variables, so that tests can make
a machine of any kind out of a few files.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from resnet_jax.doctor import nvml, packages
from resnet_jax.doctor.findings import OK, PROBLEM, WARNING, Finding, plural, size
from resnet_jax.training.environment import installed_versions, nvidia_driver

_GIB = 2**30
# PCI vendor and devices of Google's TPUs, v3 to TPU7x. The vendor also makes network cards.
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
# The oldest driver that CUDA 12 and CUDA 13 run with (docs.jax.dev, installation).
_LEAST_DRIVER = {"jax-cuda12-plugin": "525", "jax-cuda13-plugin": "580"}
# Below that something runs out soon.
_LEAST_MEMORY = 4 * _GIB
_LEAST_SHARED = 1 * _GIB
_LEAST_DISK = 2 * _GIB


class Machine:
    """A machine, real or made of files.

    Args:
      root: The folder that has dev, proc and sys.
      environ: Environment variables.
    """

    def __init__(self, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> None:
        self.root = root
        self.environ = environ

    def read(self, path: str) -> str:
        """The text of a file; "" where it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def nvidia_cards(self) -> list[str]:
        """Names of NVIDIA's cards that the kernel knows, also where nothing can use them."""
        found = []
        for file in sorted(self.root.glob("proc/driver/nvidia/gpus/*/information")):
            model = re.search(r"Model:\s*(.+)", self.read(str(file.relative_to(self.root))))
            found.append(model[1].strip() if model else "NVIDIA card")
        visible = [*self.root.glob("dev/nvidia[0-9]*")]  # a container gets some of them
        if visible and (not found or len(visible) < len(found)):
            return found[: len(visible)] or ["NVIDIA card"] * len(visible)
        if not found and (self.root / "usr/lib/wsl/lib/libcuda.so.1").exists():
            return ["NVIDIA card (Windows)"]
        return found

    def tpu_chips(self) -> int:
        """Chips that this machine has."""
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


def python(machine: Machine) -> Finding:
    """Python and the system."""
    facts = {"python": platform.python_version(), "system": platform.platform()}
    return Finding(OK, f"{facts['python']} on {facts['system']}", facts)


def core_packages(machine: Machine) -> Finding:
    """What the networks need, against the oldest versions that are tested."""
    names = ("resnet-jax-linen", "jax", "jaxlib", "flax", "numpy", "optax", "orbax-checkpoint")
    versions = installed_versions(names)
    if packages.DISTRIBUTION not in versions:
        text = "this package is not installed, so versions cannot be compared: pip install -e ."
        return Finding(WARNING, text, versions)
    wanted = packages.requirements(packages.DISTRIBUTION)
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return _judged(wanted, versions, text)


def train_extra(machine: Machine) -> Finding:
    """What training needs beside that."""
    wanted = packages.requirements(packages.DISTRIBUTION, "train")
    if lacking := packages.missing(wanted):
        what = "nothing of it is" if len(lacking) == len(wanted) else f"{_listed(lacking)} not"
        text = f"training needs the extra 'train'; {what} installed: pip install -e '.[train]'"
        return Finding(PROBLEM, text, {"missing": lacking})
    return _judged(wanted, {}, f"all {len(wanted)} packages of the extra 'train' are installed")


def _judged(wanted: list[packages.Requirement], facts: dict[str, str], text: str) -> Finding:
    old = packages.too_old(wanted)
    if old:
        said = ", ".join(f"{each.name} {found} (needs {each.least})" for each, found in old)
        newer = " ".join(f"'{each.name}>={each.least}'" for each, _ in old)
        return Finding(WARNING, f"too old: {said}: pip install -U {newer}", facts)
    return Finding(OK, text, facts)


def other_extras(machine: Machine) -> Finding:
    """The optional parts, and what each lacks."""
    present, lacking = [], {}
    for extra in packages.extras():
        if extra in ("train", "gpu", "tpu"):
            continue
        absent = packages.missing(packages.requirements(packages.DISTRIBUTION, extra))
        if absent:
            lacking[extra] = absent
        else:
            present.append(extra)
    text = ", ".join(present) or "none"
    if lacking:
        text += "; not installed: " + ", ".join(f"{k} ({_listed(v)})" for k, v in lacking.items())
    return Finding(OK, text, {"installed": present, "missing": lacking})


def accelerator_packages(machine: Machine) -> Finding | None:
    """The CUDA plugin or libtpu; None where there is neither a package nor an accelerator."""
    versions = installed_versions(["jaxlib", "libtpu", *_LEAST_DRIVER])
    jaxlib = versions.pop("jaxlib", "")
    plugins = [name for name in _LEAST_DRIVER if name in versions]
    if not versions:
        return None
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    if len(plugins) > 1:
        what = f"{' and '.join(plugins)} are both installed; uninstall one"
        return Finding(WARNING, what, versions)
    for name in plugins:
        if versions[name] != jaxlib:
            cuda = name.removeprefix("jax-").removesuffix("-plugin")
            what = (
                f"{name} {versions[name]} does not go with jaxlib {jaxlib}, and JAX will not load "
                f"it: pip install -U 'jax[{cuda}]'"
            )
            return Finding(PROBLEM if machine.nvidia_cards() else WARNING, what, versions)
    return Finding(OK, text, versions)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


# Hardware.


def accelerators(machine: Machine) -> Finding:
    """What is plugged in, and its driver."""
    cards, chips = machine.nvidia_cards(), machine.tpu_chips()
    driver = nvidia_driver(machine.root / "proc")
    facts: dict[str, object] = {"nvidia": cards, "tpu_chips": chips, "nvidia_driver": driver}
    if cards:
        text = " and ".join(f"{cards.count(name)} x {name}" for name in dict.fromkeys(cards))
        for plugin, least in _LEAST_DRIVER.items():
            if driver and installed_versions([plugin]) and packages.older(driver, least):
                what = f"{text}; its driver {driver} is too old for {plugin}, which needs {least}"
                return Finding(PROBLEM, f"{what}: update the driver", facts)
        return Finding(OK, f"{text}, driver {driver or 'unknown'}", facts)
    if chips:
        return Finding(OK, f"TPU, {plural(chips, 'chip')} on this machine", facts)
    return Finding(OK, "none is plugged in here (no NVIDIA card, no TPU)", facts)


def huge_pages(machine: Machine) -> Finding | None:
    """Whether the host's memory comes in large pages, without which a TPU starts slowly."""
    found = machine.read("sys/kernel/mm/transparent_hugepage/enabled")
    if not machine.tpu_chips() or not found or "[always]" in found:
        return None
    text = (
        "off, which slows the start of a TPU: "
        "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    )
    return Finding(WARNING, text)


def card_memory(machine: Machine, cards: list[nvml.Card] | None = None) -> Finding | None:
    """What other processes use of the cards, before JAX takes its share; None without cards."""
    cards = nvml.cards() if cards is None else cards
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = [int(each) for each in visible.split(",") if each.strip().isdecimal()]
    indices = [i for i in numbers if i < len(cards)] if numbers else range(len(cards))
    if not indices:
        return None
    facts = {
        "cards": [{"index": i, "used": cards[i].used, "memory": cards[i].memory} for i in indices]
    }
    takes = _preallocated(machine)
    crowded = [i for i in indices if cards[i].memory - cards[i].used < takes * cards[i].memory]
    busy = [i for i in indices if cards[i].used > 1.5 * _GIB]
    if crowded:
        i = crowded[0]
        free = (cards[i].memory - cards[i].used) / cards[i].memory
        text = (
            f"other processes use {size(cards[i].used)} of the {size(cards[i].memory)} of card {i}"
            f", and JAX asks for {takes:.0%}: end them, or set "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={max(free - 0.05, 0.05):.2f}"
        )
        return Finding(WARNING, text, facts)
    if busy:
        used = ", ".join(f"{size(cards[i].used)} of card {i}" for i in busy)
        return Finding(WARNING, f"other processes use {used}; they share its speed too", facts)
    return Finding(OK, "no other process uses the cards", facts)


def _preallocated(machine: Machine) -> float:
    """The share of a card's memory that JAX takes at its start."""
    if machine.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0"):
        return 0.0
    try:
        return float(machine.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
    except ValueError:
        return 0.75


def cores(machine: Machine) -> Finding:
    """The cores that this process may use."""
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
        text += f", but other processes keep them busy (load {load:g}): no speed below is right"
        return Finding(WARNING, text, facts)
    return Finding(OK, text, facts)


def cpu_quota(machine: Machine) -> float:
    """Cores whose time the control group of this process may use; 0.0: no limit."""
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
    """Folders of this process's control group and those around it, below the root."""
    found = re.search(r"^0::/(.*)$", machine.read("proc/self/cgroup"), re.MULTILINE)
    parts = [each for each in (found[1] if found else "").split("/") if each]
    return ["/".join(["sys/fs/cgroup", *parts[:end]]) for end in range(len(parts), -1, -1)]


def memory(machine: Machine) -> Finding:
    """Memory of the host that is free for this process."""
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


def shared_memory(machine: Machine) -> Finding:
    """The shared memory through which processes of `data.workers` hand over their images."""
    try:
        usage = shutil.disk_usage(machine.root / "dev/shm")
    except OSError:
        return Finding(WARNING, "there is no /dev/shm: leave data.workers at 0")
    facts = {"total": usage.total, "free": usage.free}
    return _judged_shared(usage.total, facts)


def _judged_shared(total: int, facts: dict[str, int]) -> Finding:
    if total < _LEAST_SHARED:
        text = (
            f"{size(total)} in /dev/shm, too little for data.workers: leave that at 0, or start "
            "the container with --shm-size=8g"
        )
        return Finding(WARNING, text, facts)
    return Finding(OK, f"{size(total)} in /dev/shm", facts)


def disks(machine: Machine, folders: Mapping[str, Path] | None = None) -> Finding:
    """Whether files can be written where runs write them, and how much room is there."""
    if folders is None:
        cache = Path("~/.cache").expanduser()
        folders = {
            "this folder": Path.cwd(),
            "the cache": cache if cache.exists() else Path.home(),
            "temporary files": Path(tempfile.gettempdir()),
        }
    said, facts, wrong = [], {}, []
    for name, folder in folders.items():
        try:
            free = shutil.disk_usage(folder).free
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            wrong.append(f"{name} ({folder}) cannot be written: {error.strerror}")
            continue
        facts[name] = {"path": str(folder), "free": free}
        said.append(f"{name} {size(free)}")
        if free < _LEAST_DISK:
            wrong.append(f"{name} ({folder}) has only {size(free)} free")
    if wrong:
        advice = "a run writes to --workdir, programs to log.compile_cache, both of which can move"
        return Finding(WARNING, f"{'; '.join(wrong)}: {advice}", facts)
    return Finding(OK, f"free: {', '.join(said)}", facts)


def compile_cache(machine: Machine) -> Finding:
    """Where compiled programs are kept from one start to the next."""
    from resnet_jax.training.config import Log

    chosen = machine.environ.get("JAX_COMPILATION_CACHE_DIR") or Log().compile_cache
    folder = Path(chosen).expanduser()
    facts: dict[str, object] = {"path": str(folder)}
    if not folder.exists():
        parents = [each for each in folder.parents if each.exists()]
        if parents and not os.access(parents[0], os.W_OK):
            text = f"{parents[0]} cannot be written: --config.log.compile_cache=DIR elsewhere"
            return Finding(WARNING, text, facts)
        return Finding(OK, f"{folder}, empty so far", facts)
    sizes = [each.stat().st_size for each in folder.iterdir() if each.is_file()]
    facts.update(files=len(sizes), bytes=sum(sizes))
    if not os.access(folder, os.W_OK):
        text = f"{folder} cannot be written: --config.log.compile_cache=DIR elsewhere"
        return Finding(WARNING, text, facts)
    return Finding(OK, f"{folder}, {plural(len(sizes), 'file')}, {size(sum(sizes))}", facts)
