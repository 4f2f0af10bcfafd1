"""What a run will need on TPUs or GPUs, from its compiled training step; none of them is needed.

    configuration + topology -> the trainer's own step, compiled -> memory, work, traffic -> floors

Floors are bounds, not predictions: no step is faster than its arithmetic, its memory traffic or
its all-reduce at the peak of the hardware, and real ones are slower.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from resnet_jax.config.schema import Config
from resnet_jax.config.validation import check, check_types
from resnet_jax.data.memory import fits_memory
from resnet_jax.data.sources.known import training_size
from resnet_jax.data.sources.opening import Source
from resnet_jax.errors import ConfigError
from resnet_jax.limits import MAX_BATCH, MAX_CLASSES
from resnet_jax.packages import installed_versions
from resnet_jax.planning.ahead import Program, step_compiler
from resnet_jax.planning.topology import Topology, check_rate, parse_topology
from resnet_jax.training.init_from import look_at_weights
from resnet_jax.training.optimizer import RunLength
from resnet_jax.training.setup import batch_parts, check_batches, check_calls, check_source

# Images/s that one core of a host reads, decodes and crops, or gathers from memory, as
# docs/decoding.md measured them.
DECODED_PER_CORE, GATHERED_PER_CORE = 1_200, 3_000_000

_MOST_IMAGES = 10**12

Compile = Callable[[Config], Program]
# The packages that compile for a platform.
_COMPILERS = {
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
    compiler: Callable[[Topology, Source], Compile] = step_compiler,
) -> dict[str, Any]:
    """Compiles a run's training step for TPUs or GPUs and works out what it needs there.

    Args:
      config: The configuration of the run.
      topology: What to plan for, such as "v5e:4x4", "h100:8" or "a100-40:2x8".
      batch_per_chip: Images of a step on each TPU chip or GPU; 0: train.batch_size over all.
      find_batch: Plan for the largest batch that fits, looking upwards and downwards from there.
      images: Training images; 0: as many as the data set has.
      num_classes: Classes of the data set; 0: as many as it has.
      images_per_core: Images/s that a core of a host delivers; 0: as measured.
      network_gbits: Gbit/s from a host of GPUs to others; 0: that of the usual server.
      compiler: Makes what compiles a step.

    Returns:
      What `docs/plan.md` lists. If nothing fits, "fits" is False and what only a program could tell
      is None.

    Raises:
      ConfigError: The configuration, the topology or the batch is not possible, or what compiles
        for it is not installed or fails.
      DataError: Nothing is known of the data set.
    """
    check_types(config)
    config = look_at_weights(config).config
    check(config)
    place = parse_topology(topology, network_gbits)
    for name, value, most in (
        ("images", images, _MOST_IMAGES),
        ("num_classes", num_classes, MAX_CLASSES),
        ("batch_per_chip", batch_per_chip, MAX_BATCH),
    ):
        if not 0 <= value <= most:
            raise ConfigError(f"--{name}={value}: must be from 1 to {most:,}")
    check_rate("images_per_core", images_per_core)
    classes = num_classes or (config.model.num_classes if images else 0)
    source = training_size(config.data, images, classes)
    if config.data.multi_label:
        source.label_shape = (source.num_classes,)
    check_source(config, source)
    check_calls(config, source)
    per_chip = place.accelerator.devices_per_chip
    if batch_per_chip:
        unit = per_chip * batch_parts(config)
        if batch_per_chip % unit:
            raise ConfigError(
                f"--batch_per_chip={batch_per_chip}: must be a multiple of {unit} (devices a chip, "
                "train.accumulate, and pairs to mix)"
            )
        config = with_batch(config, batch_per_chip * place.chips)
        check(config)
    check_batches(config, place.devices)
    compile_step = compiler(place, source)
    tried: dict[int, Program] = {}

    def attempt(batch: int) -> Program:
        tried[batch] = compile_step(with_batch(config, batch * place.chips))
        return tried[batch]

    batch = config.train.batch_size // place.chips
    if find_batch:
        unit = math.lcm(8, per_chip * batch_parts(config))
        batch = largest_batch(attempt, batch, unit, most=max(batch, len(source) // place.chips))
    else:
        attempt(batch)
    config = with_batch(config, batch * place.chips)
    rate = images_per_core or _images_per_core(config, source)
    return {
        **_run(config, place, source, batch),
        **_memory(tried[batch], place),
        **_bounds(tried[batch], place, config, len(source), rate),
        "tried": [_attempt(size, tried[size], place) for size in sorted(tried)],
        "versions": installed_versions(("jax", *_COMPILERS[place.accelerator.platform])),
    }


def with_batch(config: Config, size: int) -> Config:
    """The configuration with another train.batch_size."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))


def largest_batch(attempt: Callable[[int], Program], start: int, unit: int, most: int) -> int:
    """The largest batch that fits, to an eighth of its size; each try costs minutes.

    Args:
      attempt: Compiles the step for a batch.
      start: The batch to begin with.
      unit: What it must be a multiple of.
      most: Where to stop looking.

    Returns:
      The batch; one of those that were tried, and the smallest where none fits.

    Example:
      >>> def attempt(batch):
      ...     return Program(fits=batch <= 700, needed=batch, limit=700)
      >>> largest_batch(attempt, start=128, unit=8, most=10_000)
      640
    """

    def down(size: float) -> int:
        return max(unit, int(size) // unit * unit)

    size, low, high = down(start), 0, 0  # low fits and high does not; 0: not known yet
    while True:
        program = attempt(size)
        if program.fits:
            low = size
        else:
            high = size
        if high:
            if high - low <= down(high / 8):
                return low or high
            size = down((low + high) / 2)
        else:
            # Memory grows a little slower than the batch: what is left tells how far to leap.
            room = program.limit / program.needed if program.needed else 2.0
            size = down(min(low * max(2, 2 ** int(math.log2(max(room, 1.0)))), most))
            if size <= low:
                return low


def floors(program: Program, topology: Topology) -> dict[str, float]:
    """The least seconds that a step can take, by what could hold it up.

    Args:
      program: The compiled step of one device.
      topology: Where it runs.

    Returns:
      {"compute", "memory", "interconnect"}.
    """
    device = topology.accelerator
    return {
        "compute": program.flops / device.flops,
        "memory": program.traffic / device.memory_bandwidth,
        "interconnect": topology.all_reduce_seconds(program.reduced),
    }


def _images_per_core(config: Config, source: Source) -> float:
    in_memory = fits_memory(source, config.data, training=True)
    return GATHERED_PER_CORE if in_memory else DECODED_PER_CORE


def _run(config: Config, topology: Topology, source: Source, batch: int) -> dict[str, Any]:
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


def _memory(program: Program, topology: Topology) -> dict[str, Any]:
    return {
        "fits": program.fits,
        "hbm_needed": _whole_chip(program.needed, topology),
        "hbm": _whole_chip(program.limit or topology.accelerator.memory, topology),
    }


def _whole_chip(size: int, topology: Topology) -> int | None:
    return size * topology.accelerator.devices_per_chip or None


def _attempt(batch: int, program: Program, topology: Topology) -> dict[str, Any]:
    return {
        "batch_per_chip": batch,
        "fits": program.fits,
        "hbm_needed": _whole_chip(program.needed, topology),
        "compile_seconds": round(program.seconds, 1),
    }


def _bounds(
    program: Program, topology: Topology, config: Config, images: int, per_core: float
) -> dict[str, Any]:
    """All that follows from the work of a step; None where there is no program."""
    steps = RunLength.of(config, images).steps
    recipe = {"steps": steps, "epochs": steps * config.train.batch_size / images}
    if not program.fits:
        return {**dict.fromkeys(_BOUNDS), **recipe, "images_per_second_per_core": per_core}
    seconds = floors(program, topology)
    bound = max(seconds, key=lambda name: seconds[name])
    rate = config.train.batch_size / seconds[bound]
    per_chip = topology.accelerator.devices_per_chip
    return {
        **recipe,
        "flops": program.flops * per_chip,
        "hbm_bytes": program.traffic * per_chip,
        "kernels": program.kernels,
        "all_reduce_bytes": program.reduced,
        "all_reduces": program.reductions,
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
    """A plan as a table to read.

    Args:
      plan: From `make_plan`.

    Returns:
      Lines of text.
    """
    p, gib = plan, 2**30
    chip, chips, memory = _words(p)
    needed = f"{p['hbm_needed'] / gib:.2f}" if p["hbm_needed"] else "more than there is"
    rows = [
        (f"{chips}, hosts", f"{p['chips']:,}, {p['hosts']:,}"),
        (f"batch per {chip}, in all", f"{p['batch_per_chip']:,}, {p['batch_size']:,}"),
        (f"{memory} per {chip}, GiB", f"{needed} of {p['hbm'] / gib:.2f}"),
        ("", "fits" if p["fits"] else "does not fit: take a smaller batch, or --find_batch"),
    ]
    if len(p["tried"]) > 1:
        each = (f"{x['batch_per_chip']:,} {'fits' if x['fits'] else 'not'}" for x in p["tried"])
        rows.append((f"batches per {chip} tried", ", ".join(each)))
        if p["batch_size"] + 8 * p["chips"] > p["images"]:
            rows.append(("", "a larger batch would be more than the training images"))
    if p["fits"]:
        rows += _bound_rows(p)
    width = max(len(name) for name, _ in rows)
    title = (
        f"{p['model']}, {p['dtype']}, {p['image_size']} pixels, {p['data']} "
        f"({p['images']:,} images, {p['classes']:,} classes) on {p['topology']}"
    )
    lines = [f"  {name:<{width}}  {value}".rstrip() for name, value in rows]
    notes = [_NOTE] if p["fits"] else []
    return "\n".join([title, *lines, *notes])


def _words(plan: dict[str, Any]) -> tuple[str, str, str]:
    """What a chip, several of them and their memory are called."""
    return ("GPU", "GPUs", "memory") if plan["platform"] == "gpu" else ("chip", "chips", "HBM")


def _bound_rows(p: dict[str, Any]) -> list[tuple[str, str]]:
    floor = {name: f"{_digits(1e3 * seconds)} ms" for name, seconds in p["floor_seconds"].items()}
    chip, _, memory = _words(p)
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
    """A number with three digits that count, however small it is."""
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


_NOTE = (
    "Floors are bounds, not predictions: each takes one part of the hardware at its peak and all "
    "else as free.\nReal steps are slower; evaluation, checkpoints and start-up come on top."
)
