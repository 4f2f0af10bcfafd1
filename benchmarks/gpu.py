"""Compares speed on a GPU with a straightforward Flax network, torchvision's and timm's, compiled.

    pip install torch torchvision timm
    python benchmarks/gpu.py [--minutes=8] [--records=FILE]
    python benchmarks/gpu.py [--depth=50] [--modes=train,inference] [--batches=64,128,256]
        [--networks=ours,flax,torch] [--breakdown] [--rounds=2] [--seconds=1] [--dtype=bfloat16]

Without depth, modes, batches and networks it measures PLAN, the most important rows first, and says
what does not fit into `minutes`. Networks: `ours`; `folded`, ours with its batch norms folded
(inference); `trainer`, the whole step of a recipe with augmentation, on uint8 images (training);
`flax`; `torch` and `timm`, torchvision's and timm's with torch.compile(mode="max-autotune");
`torch-default`, torch.compile's default mode; `torch-freezing`, max-autotune with the weights as
constants (inference). PyTorch uses channels_last and automatic mixed precision. Depth 8 is the
network of configs/cifar10_speedrun.py.

Each network has a process, which compiles it once and then takes turns with the others of its row;
the best round counts. `awaited` waits for each step, `pipelined` for the last of many. MFU is model
FLOPs utilization of the pipelined rate. `--breakdown` adds kernels by kind, `--records` appends a
JSON line for each network to a file ("-": prints it), `--trace` keeps the traces in a folder.

It also runs on a CPU: --depth=20 --side=32 --batches=8 --rounds=1 --seconds=1.
"""

import argparse
import itertools
import json
import os
import pathlib
import signal
import statistics
import sys
import tempfile
import time
from typing import NamedTuple

from processes import Case, Process

from resnet_jax.distributed.accelerators import find_accelerator

# Multiply-adds per image, from `resnet_jax.summary`; a training step counts as three passes.
MULTIPLY_ADDS = {18: 1.81e9, 20: 40.8e6, 50: 4.09e9, 152: 11.5e9}
# What fits into the time and the memory of a card is estimated. For ResNet-50 by framework and
# mode: seconds to compile on 16 cores, and GB per image; for other depths, factors of both.
COMPILE = {("jax", "train"): 50, ("jax", "inference"): 10}
COMPILE |= {("torch", "train"): 90, ("torch", "inference"): 50}
MEMORY = {("jax", "train"): 0.06, ("jax", "inference"): 0.015}
MEMORY |= {("torch", "train"): 0.1, ("torch", "inference"): 0.03}
FACTORS = {8: (0.4, 0.03), 18: (0.45, 0.4), 20: (0.3, 0.03), 50: (1, 1), 152: (2.6, 2.2)}
SIMPLER = {"flax": 0.6, "torch-default": 0.5}  # factors of the seconds to compile
START, TORCH_FIRST, BREAKDOWN = 15, 4, 5  # seconds: of the imports, of their lead, of a trace
# A wave is compiled at the same time: GB, seconds and processes at most.
WAVE_MEMORY, WAVE_SECONDS, WAVE_CASES = 65, 170, max(2, (os.cpu_count() or 1) // 2)


class Row(NamedTuple):
    """Networks to compare."""

    mode: str
    depth: int
    batch: int
    networks: tuple[str, ...]

    def cases(self) -> list[Case]:
        return [Case(name, self.mode, self.depth, self.batch) for name in self.networks]


PLAN = (
    Row("train", 50, 256, ("ours", "torch", "flax")),
    Row("inference", 50, 256, ("folded", "torch-freezing", "ours")),
    Row("inference", 50, 1, ("folded", "torch-freezing")),
    Row("inference", 50, 8, ("folded", "torch-freezing")),
    Row("train", 20, 128, ("trainer", "torch", "ours")),
    Row("train", 50, 256, ("trainer",)),
    Row("train", 8, 512, ("trainer",)),
    Row("train", 50, 256, ("torch-default", "timm")),
    Row("train", 50, 512, ("ours", "torch", "flax")),
    Row("inference", 50, 256, ("torch", "flax", "torch-default", "timm")),
    Row("train", 20, 128, ("flax",)),
    Row("train", 50, 64, ("ours", "torch", "flax")),
    Row("train", 50, 128, ("ours", "torch", "flax")),
    Row("train", 18, 256, ("ours", "torch", "flax")),
    Row("train", 152, 128, ("ours", "torch", "flax")),
    Row("inference", 18, 256, ("folded", "torch-freezing")),
    Row("inference", 152, 256, ("folded", "torch-freezing")),
)
NETWORKS = ("ours", "folded", "trainer", "flax", "torch", "torch-default", "torch-freezing", "timm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="default: 8 for PLAN, otherwise no limit")
    parser.add_argument("--depth", help=f"some of {', '.join(map(str, FACTORS))}; default: 50")
    parser.add_argument("--modes", help="default: train,inference")
    parser.add_argument("--batches", help="default: 256")
    parser.add_argument("--networks", help="default: ours,flax,torch")
    parser.add_argument("--side", type=int, default=0, help="pixels; 0: 224, or 32 for 8 and 20")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1, help="awaited, and again pipelined")
    parser.add_argument("--breakdown", action="store_true")
    parser.add_argument("--records", default="", help="file for JSON lines; -: standard output")
    parser.add_argument("--trace", default="", help="folder for traces")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the processes below
    rows = chosen_rows(options)
    if rows is PLAN:
        options.breakdown = True
        options.minutes = options.minutes or 8
    end = time.monotonic() + 60 * (options.minutes or 1e6)
    with tempfile.TemporaryDirectory() as folder:
        measure_rows(list(rows), end, pathlib.Path(folder), options)


def chosen_rows(options: argparse.Namespace) -> tuple[Row, ...]:
    if not any((options.depth, options.modes, options.batches, options.networks)):
        return PLAN
    depths = [int(depth) for depth in (options.depth or "50").split(",")]
    modes = (options.modes or "train,inference").split(",")
    networks = (options.networks or "ours,flax,torch").split(",")
    for flag, values, known in (
        ("depth", depths, FACTORS),
        ("modes", modes, ("train", "inference")),
        ("networks", networks, NETWORKS),
    ):
        if unknown := [str(value) for value in values if value not in known]:
            names = ", ".join(map(str, known))
            sys.exit(f"error: --{flag}={','.join(unknown)}: must be some of {names}")
    batches = [int(batch) for batch in (options.batches or "256").split(",")]
    rows = []
    for mode, depth, batch in itertools.product(modes, depths, batches):
        there = tuple(name for name in networks if exists(name, mode, depth))
        rows += [Row(mode, depth, batch, there)] if there else []
    return tuple(rows)


def exists(network: str, mode: str, depth: int) -> bool:
    if network in ("folded", "torch-freezing") and mode == "train":
        return False
    if network == "trainer" and mode == "inference":
        return False
    return (
        depth not in (8, 20)
        or network in ("ours", "folded", "trainer")
        or (depth == 20 and network != "timm")
    )


def measure_rows(rows: list[Row], end: float, folder: pathlib.Path, options) -> None:
    """Measures wave after wave, until `end`. Each tells how this machine differs from estimates."""
    scale, title = 1.0, True
    while rows:
        start = time.monotonic()
        wave, rows = next_wave(rows, end - start, scale, options)
        if not wave:
            continue
        cases = [case for row in wave for case in row.cases()]
        most = end - measuring_seconds(cases, options)
        if options.minutes:  # no case may take the time of all others
            most = min(most, start + 2 * scale * preparing_seconds(cases))
        processes: list[Process] = []
        try:
            processes += start_processes(cases, folder, options)
            for process in processes:
                process.start = process.reply(most - time.monotonic()) or {}
            scale = (time.monotonic() - start) / max(1, preparing_seconds(cases))
            scale = min(max(scale, 0.5), 3)  # failures take no time
            for row in wave:
                # A wave can have two rows of one mode, depth and batch.
                ready = [p for p in processes if p.start and p.case in row.cases()]
                if title and ready:
                    title = print_title(ready[0])
                measure_row(ready, end, options)
        finally:
            for process in processes:
                process.close()


def start_processes(cases: list[Case], folder: pathlib.Path, options) -> list[Process]:
    """PyTorch's first, so that it measures convolutions before XLA occupies the card."""
    started = {}
    for framework in ("torch", "jax"):
        chosen = [case for case in cases if case.framework == framework]
        if started and chosen:
            time.sleep(TORCH_FIRST)
        started |= {case: Process(case, folder, options) for case in chosen}
    return [started[case] for case in cases]


def next_wave(rows: list[Row], left: float, scale: float, options) -> tuple[list[Row], list[Row]]:
    """(rows to compile at the same time, rows for later); prints what does not fit into `left`."""
    wave: list[Row] = []
    for index, row in enumerate(rows):
        if not wave:
            dropped = []
            while row.networks and seconds_of([row], scale, options) > left:
                dropped.insert(0, row.networks[-1])
                row = row._replace(networks=row.networks[:-1])
            if dropped:
                what = f"{row.mode} {', '.join(dropped)}, depth {row.depth}, batch {row.batch}"
                print(f"dropped, no time left: {what}", flush=True)
            if not row.networks:
                return [], rows[1:]
        elif seconds_of([*wave, row], scale, options) > left or not fits_wave([*wave, row], scale):
            return wave, rows[index:]
        wave.append(row)
    return wave, []


def fits_wave(wave: list[Row], scale: float) -> bool:
    cases = [case for row in wave for case in row.cases()]
    return (
        len(cases) <= WAVE_CASES
        and sum(map(gigabytes, cases)) <= WAVE_MEMORY
        and scale * preparing_seconds(cases) <= WAVE_SECONDS
    )


def seconds_of(wave: list[Row], scale: float, options: argparse.Namespace) -> float:
    cases = [case for row in wave for case in row.cases()]
    return scale * preparing_seconds(cases) + measuring_seconds(cases, options)


def preparing_seconds(cases: list[Case]) -> float:
    """Compilers measure kernels one at a time: XLA all along, PyTorch's in half of its time."""
    seconds: dict[str, list[float]] = {"jax": [], "torch": []}
    for case in cases:
        factor = FACTORS[case.depth][0] * SIMPLER.get(case.network, 1)
        seconds[case.framework].append(COMPILE[case.framework, case.mode] * factor)
    torch = max(0.5 * max(seconds["torch"], default=0), 0.3 * sum(seconds["torch"]))
    return START + sum(seconds["jax"]) + torch


def gigabytes(case: Case) -> float:
    per_image = MEMORY[case.framework, case.mode] * FACTORS[case.depth][1]
    return 1.5 + per_image * case.batch


def measuring_seconds(cases: list[Case], options: argparse.Namespace) -> float:
    traced = sum(is_traced(case, options) for case in cases)
    return len(cases) * (2 * options.rounds * options.seconds + 1) + BREAKDOWN * traced


def is_traced(case: Case, options: argparse.Namespace) -> bool:
    return options.breakdown and (case.batch >= 32 or bool(options.batches))


def measure_row(processes: list[Process], end: float, options: argparse.Namespace) -> None:
    measured: dict[Process, list[dict]] = {process: [] for process in processes}
    for _ in range(options.rounds):
        for process, rounds in measured.items():
            if process.start:
                process.ask("measure", options.seconds)
                reply = process.reply(60 + 10 * options.seconds)
                process.start = reply and process.start
                rounds += [reply] if reply else []
    for process, rounds in measured.items():
        if not process.start:
            continue
        record = summarize(process, rounds, options)
        if is_traced(process.case, options):
            process.ask("trace")
            record |= process.reply(min(60, 30 + end - time.monotonic())) or {}
        print_record(record)
        write_record(record, options.records)


def summarize(process: Process, rounds: list[dict], options: argparse.Namespace) -> dict:
    """The best round counts; percentiles are those of all awaited steps."""
    case, start = process.case, process.start
    images, steps = start["images"], start["steps"]  # of a call
    calls = sorted(1e3 * seconds / steps for each in rounds for seconds in each["awaited"])
    awaited = [images / statistics.median(each["awaited"]) for each in rounds]
    pipelined = [images / each["pipelined"] for each in rounds]
    return {
        "benchmark": "gpu",
        **{name: start[name] for name in ("device", "versions", "side", "prepare_seconds")},
        **case._asdict(),
        "dtype": options.dtype,
        "steps_per_call": steps,
        "images_per_second": max(awaited),
        "pipelined_images_per_second": max(pipelined),
        "rounds": {"awaited": awaited, "pipelined": pipelined},
        "step_ms": {
            f"p{p}": calls[min(len(calls) - 1, p * len(calls) // 100)] for p in (50, 90, 99)
        },
        "pipelined_step_ms": 1e3 * case.batch / max(pipelined),
        "mfu": mfu(case, max(pipelined), start["device"], options),
        "memory_gb": rounds[-1]["memory_gb"],
    }


def mfu(case: Case, rate: float, device: str, options: argparse.Namespace) -> float | None:
    accelerator = find_accelerator(device)
    if accelerator is None or case.depth not in MULTIPLY_ADDS or options.side:
        return None
    passes = 3 if case.mode == "train" else 1
    return rate * 2 * passes * MULTIPLY_ADDS[case.depth] / accelerator.flops


def print_title(process: Process) -> bool:
    print(
        f"{process.start['device']}; images/s awaited and pipelined, percentiles of an awaited step"
        f" in ms, peak memory in GB, seconds until compiled\n"
        f"{'mode':9} {'depth':>5} {'batch':>5} {'network':14} {'awaited':>9} {'pipelined':>9}"
        f" {'MFU':>4} {'p50':>8} {'p90':>8} {'p99':>8} {'GB':>5} {'s':>4}",
        flush=True,
    )
    return False


def print_record(r: dict) -> None:
    used = f"{r['mfu']:.0%}" if r["mfu"] else ""
    p50, p90, p99 = r["step_ms"].values()
    print(
        f"{r['mode']:9} {r['depth']:5} {r['batch']:5} {r['network']:14}"
        f" {r['images_per_second']:9.0f} {r['pipelined_images_per_second']:9.0f} {used:>4}"
        f" {p50:8.3f} {p90:8.3f} {p99:8.3f} {r['memory_gb']:5.1f} {r['prepare_seconds']:4.0f}",
        flush=True,
    )
    if r.get("kernels"):  # PyTorch has none on a CPU
        kinds = (f"{kind} {ms:.2f} ({r['count'][kind]:.0f})" for kind, ms in r["ms"].items())
        print(
            f"{'':12}{r['kernels']:.0f} kernels, {r['kernel_ms']:.2f} of"
            f" {r['pipelined_step_ms']:.2f} ms, gaps of the traced steps {r['gaps_ms']:.2f} ms;"
            f" ms (kernels): {', '.join(kinds)}",
            flush=True,
        )


def write_record(record: dict, place: str) -> None:
    line = json.dumps(record)
    if place == "-":
        print(line, flush=True)
    elif place:
        with open(place, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
