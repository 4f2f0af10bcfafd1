"""What a run needs on TPUs or GPUs, from its compiled training step; none of them is needed.

    configuration, topology -> the trainer's own step, compiled -> memory, work, traffic -> floors

Floors are bounds, not predictions: no step is faster than its arithmetic, its memory traffic or
its all-reduces at the peak of the hardware, and real steps are slower.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from resnet_jax.config.schema import Config
from resnet_jax.config.validation import check, check_types
from resnet_jax.data.memory import fits_memory
from resnet_jax.data.sources import Source
from resnet_jax.data.sources.known_sizes import training_size
from resnet_jax.errors import ConfigError
from resnet_jax.limits import MAX_BATCH, MAX_CLASSES
from resnet_jax.packages import installed_versions
from resnet_jax.planning.aot import CompiledStep, step_compiler
from resnet_jax.planning.topology import Topology, check_rate, parse_topology
from resnet_jax.training.init_from import fill_from_weights
from resnet_jax.training.inputs import (
    batch_parts,
    check_batches,
    check_source,
    check_steps_per_call,
)
from resnet_jax.training.optimizer import RunLength

# Images/s that one core of a host decodes and crops, or gathers from memory; measured in
# docs/decoding.md.
DECODED_PER_CORE, GATHERED_PER_CORE = 1_200, 3_000_000

_MAX_IMAGES = 10**12

StepCompiler = Callable[[Config], CompiledStep]
# The packages that compile for a platform.
_COMPILER_PACKAGES = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
}


def make_plan(
    config: Config,
    topology: str,
    *,
    batch_per_chip: int = 0,
    find_batch: bool = False,
    images: int = 0,
    num_classes: int = 0,
    images_per_core: float = 0.0,
    network_gbits: float = 0.0,
    compiler: Callable[[Topology, Source], StepCompiler] = step_compiler,
) -> dict[str, Any]:
    """Compiles a run's training step for TPUs or GPUs and works out what it needs there.

    Args:
      config: The run to plan.
      topology: Devices to plan for, such as "v5e:4x4", "h100:8" or "a100-40:2x8".
      batch_per_chip: Images per step on each TPU chip or GPU. Default: train.batch_size over all.
      find_batch: Plan for the largest batch that fits; the search starts at `batch_per_chip`.
      images: Training images. Default: as many as the dataset has.
      num_classes: Classes of the dataset. Default: as many as it has.
      images_per_core: Images/s that one core of a host delivers. Default: as measured here.
      network_gbits: Gbit/s from a host of GPUs to others. Default: as in the usual server.
      compiler: Returns the function that compiles a step.

    Returns:
      The fields that `docs/plan.md` lists. If no batch fits, "fits" is False and fields that
      need the compiled program are None.

    Raises:
      ConfigError: The configuration, the topology or the batch is invalid, or the compiler for
        the topology is not installed or fails.
      DataError: The size of the dataset is not known.
    """
    check_types(config)
    config = fill_from_weights(config).config
    check(config)
    target = parse_topology(topology, network_gbits)
    for name, value, limit in (
        ("images", images, _MAX_IMAGES),
        ("num_classes", num_classes, MAX_CLASSES),
        ("batch_per_chip", batch_per_chip, MAX_BATCH),
    ):
        if not 0 <= value <= limit:
            raise ConfigError(f"--{name}={value}: must be from 1 to {limit:,}")
    check_rate("images_per_core", images_per_core)
    source = _sized_source(config, images, num_classes)
    if batch_per_chip:
        config = _with_batch_per_chip(config, batch_per_chip, target)
    check_batches(config, target.devices)

    batch, tried = _compile_batches(config, target, source, compiler, find_batch)
    config = with_batch(config, batch * target.chips)
    per_core = images_per_core or _images_per_core(config, source)
    return {
        **_run_fields(config, target, source, batch),
        **_memory_fields(tried[batch], target),
        **_bound_fields(tried[batch], target, config, len(source), per_core),
        "tried": [_tried_fields(size, tried[size], target) for size in sorted(tried)],
        "versions": installed_versions(("jax", *_COMPILER_PACKAGES[target.accelerator.platform])),
    }


def _sized_source(config: Config, images: int, num_classes: int) -> Source:
    """The dataset of a run, of which only the size needs to be known."""
    classes = num_classes or (config.model.num_classes if images else 0)
    source = training_size(config.data, images, classes)
    if config.data.multi_label:
        source.label_shape = (source.num_classes,)
    check_source(config, source)
    check_steps_per_call(config, source)
    return source


def _with_batch_per_chip(config: Config, batch_per_chip: int, topology: Topology) -> Config:
    unit = topology.accelerator.devices_per_chip * batch_parts(config)
    if batch_per_chip % unit:
        raise ConfigError(
            f"--batch_per_chip={batch_per_chip}: must be a multiple of {unit} (devices per chip, "
            "train.accumulate, and pairs to mix)"
        )
    config = with_batch(config, batch_per_chip * topology.chips)
    check(config)
    return config


def with_batch(config: Config, size: int) -> Config:
    """The configuration with another train.batch_size."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))


def _compile_batches(
    config: Config,
    topology: Topology,
    source: Source,
    compiler: Callable[[Topology, Source], StepCompiler],
    find_batch: bool,
) -> tuple[int, dict[int, CompiledStep]]:
    """The batch per chip to plan for, and the compiled steps of every batch that was tried."""
    compile_step = compiler(topology, source)
    tried: dict[int, CompiledStep] = {}

    def attempt(batch: int) -> CompiledStep:
        tried[batch] = compile_step(with_batch(config, batch * topology.chips))
        return tried[batch]

    batch = config.train.batch_size // topology.chips
    if find_batch:
        unit = math.lcm(8, topology.accelerator.devices_per_chip * batch_parts(config))
        limit = max(batch, len(source) // topology.chips)
        batch = largest_batch(attempt, batch, unit, limit)
    else:
        attempt(batch)
    return batch, tried


def largest_batch(attempt: Callable[[int], CompiledStep], start: int, unit: int, limit: int) -> int:
    """The largest batch that fits, to within an eighth, or the smallest tried if none fits.

    The search starts at `start` and stops at `limit`; every batch is a multiple of `unit`. Each
    `attempt` compiles a step, which takes minutes, so the search takes large strides.

    Example:
      >>> def attempt(batch):
      ...     return CompiledStep(fits=batch <= 700, memory=batch, memory_limit=700)
      >>> largest_batch(attempt, start=128, unit=8, limit=10_000)
      640
    """

    def round_down(size: float) -> int:
        return max(unit, int(size) // unit * unit)

    size, low, high = round_down(start), 0, 0  # low fits, high does not; 0: not known yet
    while True:
        step = attempt(size)
        if step.fits:
            low = size
        else:
            high = size
        if high:
            if high - low <= round_down(high / 8):
                return low or high
            size = round_down((low + high) / 2)
        else:
            # Memory grows slightly slower than the batch, so its ratio bounds the next stride.
            room = step.memory_limit / step.memory if step.memory else 2.0
            size = round_down(min(low * max(2, 2 ** int(math.log2(max(room, 1.0)))), limit))
            if size <= low:
                return low


def floors(step: CompiledStep, topology: Topology) -> dict[str, float]:
    """Lower bounds in seconds of a step's "compute", "memory" and "interconnect" time."""
    device = topology.accelerator
    return {
        "compute": step.flops / device.flops,
        "memory": step.traffic.memory / device.memory_bandwidth,
        "interconnect": topology.all_reduce_seconds(step.traffic.all_reduced),
    }


def _images_per_core(config: Config, source: Source) -> float:
    in_memory = fits_memory(source, config.data, training=True)
    return GATHERED_PER_CORE if in_memory else DECODED_PER_CORE


def _run_fields(config: Config, topology: Topology, source: Source, batch: int) -> dict[str, Any]:
    return {
        "topology": topology.name,
        "platform": topology.accelerator.platform,
        "chips": topology.chips,
        "hosts": topology.hosts,
        "model": config.model.name,
        "dtype": config.model.dtype,
        "image_size": config.data.image_size,
        "data": config.data.name,
        "images": len(source),
        "classes": config.model.num_classes or source.num_classes,
        "batch_per_chip": batch,
        "batch_size": batch * topology.chips,
    }


def _memory_fields(step: CompiledStep, topology: Topology) -> dict[str, Any]:
    return {
        "fits": step.fits,
        "hbm_needed": _per_chip(step.memory, topology),
        "hbm": _per_chip(step.memory_limit or topology.accelerator.memory, topology),
    }


def _per_chip(size: int, topology: Topology) -> int | None:
    """Bytes per chip from bytes per device; None for 0, which means unknown."""
    return size * topology.accelerator.devices_per_chip or None


def _tried_fields(batch: int, step: CompiledStep, topology: Topology) -> dict[str, Any]:
    return {
        "batch_per_chip": batch,
        "fits": step.fits,
        "hbm_needed": _per_chip(step.memory, topology),
        "compile_seconds": round(step.compile_seconds, 1),
    }


def _bound_fields(
    step: CompiledStep, topology: Topology, config: Config, images: int, per_core: float
) -> dict[str, Any]:
    """What follows from the work of a step; None where it does not fit."""
    steps = RunLength.of(config, images).steps
    recipe = {"steps": steps, "epochs": steps * config.train.batch_size / images}
    if not step.fits:
        return {**dict.fromkeys(_BOUNDS), **recipe, "images_per_second_per_core": per_core}
    seconds = floors(step, topology)
    bound = max(seconds, key=lambda name: seconds[name])
    rate = config.train.batch_size / seconds[bound]
    devices_per_chip = topology.accelerator.devices_per_chip
    return {
        **recipe,
        "flops": step.flops * devices_per_chip,
        "hbm_bytes": step.traffic.memory * devices_per_chip,
        "kernels": step.traffic.launches,
        "all_reduce_bytes": step.traffic.all_reduced,
        "all_reduces": step.traffic.all_reduces,
        "floor_seconds": seconds,
        "bound_by": bound,
        "images_per_second": rate,
        "images_per_second_per_chip": rate / topology.chips,
        "images_per_second_per_host": rate / topology.hosts,
        "images_per_second_per_core": per_core,
        "cores_per_host": rate / topology.hosts / per_core,
        "hours": steps * seconds[bound] / 3600,
    }


_BOUNDS = (
    *("flops", "hbm_bytes", "kernels", "all_reduce_bytes", "all_reduces"),
    *("floor_seconds", "bound_by"),
    *("images_per_second", "images_per_second_per_chip", "images_per_second_per_host"),
    *("cores_per_host", "hours"),
)


def plan_table(plan: dict[str, Any]) -> str:
    """Formats a plan as a table to read."""
    p, gib = plan, 2**30
    chip, chips, memory = _terms(p)
    needed = f"{p['hbm_needed'] / gib:.2f}" if p["hbm_needed"] else "more than available"
    rows = [
        (f"{chips}, hosts", f"{p['chips']:,}, {p['hosts']:,}"),
        (f"batch per {chip}, total", f"{p['batch_per_chip']:,}, {p['batch_size']:,}"),
        (f"{memory} per {chip}, GiB", f"{needed} of {p['hbm'] / gib:.2f}"),
        ("", "fits" if p["fits"] else "does not fit: try --find_batch"),
    ]
    if len(p["tried"]) > 1:
        tried = [f"{x['batch_per_chip']:,} {'fits' if x['fits'] else 'not'}" for x in p["tried"]]
        rows.append((f"batches per {chip} tried", ", ".join(tried)))
        if p["batch_size"] + 8 * p["chips"] > p["images"]:
            rows.append(("", "a larger one would exceed the training split"))
    if p["fits"]:
        rows += _bound_rows(p)
    width = max(len(name) for name, _ in rows)
    title = (
        f"{p['model']}, {p['dtype']}, {p['image_size']} pixels on {p['topology']}\n"
        f"{p['data']}: {p['images']:,} images, {p['classes']:,} classes"
    )
    lines = [f"  {name:<{width}}  {value}".rstrip() for name, value in rows]
    notes = [_NOTE] if p["fits"] else []
    return "\n".join([title, *lines, *notes])


def _terms(plan: dict[str, Any]) -> tuple[str, str, str]:
    """The terms of a platform for a chip, for chips, and for their memory."""
    return ("GPU", "GPUs", "memory") if plan["platform"] == "gpu" else ("chip", "chips", "HBM")


def _bound_rows(p: dict[str, Any]) -> list[tuple[str, str]]:
    floor = {name: f"{_digits(1e3 * seconds)} ms" for name, seconds in p["floor_seconds"].items()}
    chip, _, memory = _terms(p)
    cores, per_core = _digits(p["cores_per_host"]), f"{p['images_per_second_per_core']:,.0f}"
    kernels = [("kernels per step", f"{p['kernels']:,}")] if p["platform"] == "gpu" else []
    return [
        (f"arithmetic per step and {chip}", f"{_digits(p['flops'] / 1e12)} TFLOP"),
        (f"{memory} traffic per step and {chip}", f"{_digits(p['hbm_bytes'] / 1e9)} GB"),
        *kernels,
        (
            "all-reduced per step",
            f"{_digits(p['all_reduce_bytes'] / 1e6)} MB in {p['all_reduces']}",
        ),
        ("floor of a step: compute", floor["compute"]),
        ("memory", floor["memory"]),
        ("interconnect", floor["interconnect"]),
        ("images/s, at most", f"{p['images_per_second']:,.0f} (bound by {p['bound_by']})"),
        (f"per {chip}", f"{p['images_per_second_per_chip']:,.0f}"),
        ("a host must deliver", f"{p['images_per_second_per_host']:,.0f}"),
        ("host cores for that", f"{cores} of {per_core} images/s each"),
        (
            "hours, at least",
            f"{_digits(p['hours'])} for {p['steps']:,} steps, {p['epochs']:.1f} epochs",
        ),
    ]


def _digits(number: float) -> str:
    """A number with three significant digits."""
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


_NOTE = (
    "Floors are bounds, not predictions: each assumes one part of the hardware at its\n"
    "peak and the rest free. Real steps are slower; evaluation, checkpoints and\n"
    "start-up are not included."
)
