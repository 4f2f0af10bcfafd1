"""Compares speed on a GPU with a straightforward Flax network, torchvision's and timm's, compiled.

    pip install torch torchvision timm
    python benchmarks/gpu.py [--minutes=8]
    python benchmarks/gpu.py [--depths=50] [--modes=train,inference] [--batches=64,128,256]
        [--networks=ours,flax,torch] [--breakdown] [--rounds=2] [--seconds=1.5] [--dtype=bfloat16]
        [--records=FILE] [--trace=FOLDER]

Without depths, modes, batches and networks it measures PLAN, most important rows first, and says
what does not fit into `minutes`. Networks: ours; folded, with its batch norms folded (inference);
trainer, a recipe's whole step with augmentation on uint8 images (training); flax; torch and timm
with torch.compile(mode="max-autotune"), torch-default, torch-freezing (inference). PyTorch uses
channels_last and automatic mixed precision. Depth 8 is cifar10_speedrun, for the trainer only.

Each network has a process, compiles there once, and takes turns with the others of its row; the
best round counts. `awaited` waits for each step, `pipelined` for the last of many, as the trainer
does. `--breakdown` adds kernels by kind. MFU is model FLOPs utilization of the pipelined rate.
`--records` appends a JSON line for each network of a row, "-" prints it. `--trace` keeps the traces.

It also runs on a CPU: --depths=20 --sides=32 --batches=8 --rounds=1 --seconds=0.1 --records=-
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import pathlib
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

import kernels
import steps

SIDES = {8: 32, 20: 32}  # others: 224
# Multiply-adds per image, from `resnet_jax.summary`; a training step counts as three passes.
MULTIPLY_ADDS = {18: 1.81e9, 20: 40.8e6, 50: 4.09e9, 152: 11.5e9}
# For the choice of what fits: seconds to compile ResNet-50 on 16 cores, alone, and GB of an image.
COMPILE = {("jax", "train"): 50, ("jax", "inference"): 15}
COMPILE |= {("torch", "train"): 90, ("torch", "inference"): 50}
MEMORY = {("jax", "train"): 0.06, ("jax", "inference"): 0.015}
MEMORY |= {("torch", "train"): 0.1, ("torch", "inference"): 0.03}
DEPTH_COSTS = {8: (0.25, 0.03), 20: (0.4, 0.03), 18: (0.45, 0.4), 152: (2.6, 2.2)}
START, CARD = 15, 65  # seconds until a process can compile; GB for all processes of a wave
WAVE = 170  # seconds of a wave, whose processes compile at the same time


class Row(NamedTuple):
    """Networks that are compared."""

    mode: str
    depth: int
    batch: int
    networks: tuple[str, ...]


PLAN = (
    Row("train", 50, 256, ("ours", "flax", "torch")),
    Row("inference", 50, 256, ("folded", "torch-freezing", "ours", "flax")),
    Row("inference", 50, 1, ("folded", "torch-freezing")),
    Row("inference", 50, 8, ("folded", "torch-freezing")),
    Row("train", 20, 128, ("trainer", "ours", "torch", "flax")),
    Row("train", 50, 256, ("trainer", "torch-default", "timm")),
    Row("train", 8, 512, ("trainer",)),
    Row("train", 50, 128, ("ours", "torch", "flax")),
    Row("train", 50, 512, ("ours", "torch", "flax")),
    Row("inference", 50, 256, ("torch", "torch-default", "timm")),
    Row("train", 50, 64, ("ours", "torch", "flax")),
    Row("train", 18, 256, ("ours", "torch", "flax")),
    Row("train", 152, 128, ("ours", "torch", "flax")),
    Row("inference", 18, 256, ("folded", "torch-freezing")),
    Row("inference", 152, 256, ("folded", "torch-freezing")),
)
NETWORKS = {
    "train": ("ours", "trainer", "flax", "torch", "torch-default", "timm"),
    "inference": (*("ours", "folded", "flax", "torch", "torch-default", "torch-freezing", "timm"),),
}


class Case(NamedTuple):
    """One network of a row."""

    network: str
    mode: str
    depth: int
    batch: int

    @property
    def framework(self) -> str:
        return "torch" if self.network.startswith(("torch", "timm")) else "jax"

    @property
    def compile_seconds(self) -> float:
        default = 0.5 if self.network == "torch-default" else 1
        cost = COMPILE[self.framework, self.mode] * default
        return cost * DEPTH_COSTS.get(self.depth, (1, 1))[0]

    @property
    def gigabytes(self) -> float:
        cost = MEMORY[self.framework, self.mode] * DEPTH_COSTS.get(self.depth, (1, 1))[1]
        return 1.5 + self.batch * cost

    def __str__(self) -> str:
        return f"{self.network}, {self.mode}, ResNet-{self.depth}, batch {self.batch}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="default: 8 for PLAN, otherwise no limit")
    parser.add_argument("--depths", help="of 8, 18, 20, 50, 152; default: 50")
    parser.add_argument("--modes", help="default: train,inference")
    parser.add_argument("--batches", help="default: 256")
    parser.add_argument("--networks", help="default: ours,flax,torch")
    parser.add_argument("--side", type=int, default=0, help="pixels; 0: 224, or 32 for 8 and 20")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="awaited, and again pipelined")
    parser.add_argument("--breakdown", action="store_true")
    parser.add_argument("--records", default="", help="file for JSON lines; -: standard output")
    parser.add_argument("--trace", default="", help="folder for traces")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # measures this case in this process
    options = parser.parse_args()
    if options.work:
        work(Case(*json.loads(options.work)), options)
        return

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the processes below
    rows = chosen_rows(options)
    if rows is PLAN:
        options.breakdown = True
        options.minutes = options.minutes or 8
    end = time.monotonic() + 60 * (options.minutes or 1e6)
    with tempfile.TemporaryDirectory() as folder:
        measure_rows(list(rows), end, pathlib.Path(folder), options)


def chosen_rows(options: argparse.Namespace) -> tuple[Row, ...]:
    if not any((options.depths, options.modes, options.batches, options.networks)):
        return PLAN
    chosen = (options.networks or "ours,flax,torch").split(",")
    if unknown := set(chosen) - {*NETWORKS["train"], *NETWORKS["inference"]}:
        raise SystemExit(f"error: --networks: no network is named {', '.join(unknown)}")
    rows = itertools.product(
        (options.modes or "train,inference").split(","),
        map(int, (options.depths or "50").split(",")),
        map(int, (options.batches or "256").split(",")),
    )
    return tuple(
        Row(mode, depth, batch, tuple(each for each in chosen if each in NETWORKS[mode]))
        for mode, depth, batch in rows
    )


def measure_rows(rows: list[Row], end: float, folder: pathlib.Path, options) -> None:
    """Measures wave after wave; the first tells how this machine's speed differs from estimates."""
    scale, title = 1.0, True
    while rows:
        start = time.monotonic()
        wave, rows = next_wave(rows, end - start, scale, options)
        if not wave:
            continue
        cases = [Case(name, *row[:3]) for row in wave for name in row.networks]
        processes = {case: Process(case, folder, options) for case in cases}
        measuring = measuring_seconds(cases, options)
        try:
            ready = prepare(processes, end - measuring)
            scale = (time.monotonic() - start) / preparing_seconds(cases)
            scale = min(max(scale, 0.3), 3)
            for row in wave:
                present = [ready[c] for c in cases if c[1:] == row[:3] and c in ready]
                if title and present:
                    title = print_title(present[0])
                measure_row([p for p in present if p.case.network in row.networks], options)
        finally:
            for process in processes.values():
                process.close()


def next_wave(rows: list[Row], left: float, scale: float, options) -> tuple[list[Row], list[Row]]:
    """(rows to compile at the same time, rows for later); says what does not fit into the time."""
    wave: list[Row] = []
    cases: list[Case] = []
    for index, row in enumerate(rows):
        new = [Case(name, *row[:3]) for name in row.networks]
        fits = lambda more, most: seconds_of(cases + more, scale, options) < most  # noqa: E731
        if not wave:
            while new and not fits(new, left):
                print(f"dropped, no time left: {new.pop()}", flush=True)
            if not new:
                return [], rows[1:]
        elif (
            not fits(new, min(left, WAVE))
            or sum(case.gigabytes for case in cases + new) > CARD
            or len(cases + new) > max(2, (os.cpu_count() or 1) // 2)
        ):
            return wave, rows[index:]
        wave.append(row._replace(networks=tuple(case.network for case in new)))
        cases += new
    return wave, []


def seconds_of(cases: list[Case], scale: float, options) -> float:
    return scale * preparing_seconds(cases) + measuring_seconds(cases, options)


def preparing_seconds(cases: list[Case]) -> float:
    """Programs of XLA are compiled one after another, as it measures kernels while it compiles."""
    jax = [case.compile_seconds for case in cases if case.framework == "jax"]
    torch = [case.compile_seconds for case in cases if case.framework == "torch"]
    return START + max(sum(jax), 0.5 * sum(torch), *torch, 0)


def measuring_seconds(cases: list[Case], options) -> float:
    return len(cases) * (2 * options.rounds * options.seconds + 1 + 5 * options.breakdown)


class Process:
    """A process that compiles a case and measures it on command."""

    def __init__(self, case: Case, folder: pathlib.Path, options: argparse.Namespace) -> None:
        self.case = case
        self._log = folder / ("-".join(map(str, case)) + f"-{time.monotonic_ns()}.log")
        command = [sys.executable, __file__, f"--work={json.dumps(case)}"]
        command += [
            f"--side={options.side}",
            f"--dtype={options.dtype}",
            f"--trace={options.trace}",
        ]
        environment = {
            "CUDA_VISIBLE_DEVICES": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # XLA keeps there which kernels were fastest, for the next process.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
            "JAX_TRACEBACK_FILTERING": "off",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            **os.environ,
            "BENCHMARK_LOCK": str(folder / "card"),
        }
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            env=environment,
            text=True,
            start_new_session=True,
        )
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._popen.stdout:
            self._replies.put(line)
        self._replies.put("")

    def ask(self, *command) -> None:
        try:
            self._popen.stdin.write(json.dumps(command) + "\n")
            self._popen.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, as the reply tells

    def reply(self, seconds: float) -> dict | None:
        """Its next reply, or None, with a line of output that says why not."""
        try:
            line = self._replies.get(timeout=max(seconds, 0))
        except queue.Empty:
            print(f"dropped, no time left: {self.case}", flush=True)
            return None
        if line:
            return json.loads(line)
        print(f"failed: {self.case}: {self._failure()}", flush=True)
        return None

    def _failure(self) -> str:
        lines = [
            line for line in self._log.read_text(errors="replace").splitlines() if line.strip()
        ]
        for line in reversed(lines):
            if missing := re.match(r"ModuleNotFoundError: No module named '(\w+)'", line):
                return f"{missing[1]} is not installed"
            if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt|Hit|OutOfMemory\w*)\b", line):
                return line[:300]
        last = lines[-1][:300] if lines else ""
        return f"exit code {self._popen.wait()}. {last}"

    def close(self) -> None:
        """Ends the process and those that it started."""
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._popen.wait()


def prepare(processes: dict[Case, Process], end: float) -> dict[Case, Process]:
    """Those that have compiled their program before `end`; ends the others."""
    ready = {}
    for case, process in processes.items():
        process.start = process.reply(end - time.monotonic())
        if process.start is None:
            process.close()
        else:
            ready[case] = process
    return ready


def measure_row(processes: list[Process], options: argparse.Namespace) -> None:
    measured = {process: [] for process in processes}
    for _ in range(options.rounds):
        for process, rounds in measured.items():
            process.ask("measure", options.seconds)
            if reply := process.reply(60 + 10 * options.seconds):
                rounds.append(reply)
    for process, rounds in measured.items():
        if not rounds:
            continue
        record = summarize(process, rounds, options)
        if options.breakdown:
            process.ask("breakdown")
            record |= process.reply(60) or {}
        print_record(record)
        write_record(record, options.records)


def summarize(process: Process, rounds: list[dict], options: argparse.Namespace) -> dict:
    """The best round counts; percentiles are those of all awaited steps."""
    images, count = process.start["images"], process.start["steps"]
    calls = sorted(1e3 * seconds / count for each in rounds for seconds in each["awaited"])
    awaited = [images / statistics.median(each["awaited"]) for each in rounds]
    pipelined = [images / each["pipelined"] for each in rounds]
    percentile = lambda p: calls[min(len(calls) - 1, int(p * len(calls)))]  # noqa: E731
    case = process.case
    return {
        "benchmark": "gpu",
        **{name: process.start[name] for name in ("device", "versions", "prepare_seconds")},
        **case._asdict(),
        "dtype": options.dtype,
        "side": side_of(case, options),
        "steps_per_call": count,
        "images_per_second": max(awaited),
        "pipelined_images_per_second": max(pipelined),
        "rounds": {"awaited": awaited, "pipelined": pipelined},
        "step_ms": {f"p{p}": percentile(p / 100) for p in (50, 90, 99)},
        "pipelined_step_ms": 1e3 * case.batch / max(pipelined),
        "mfu": mfu(case, max(pipelined), process.start["device"], options),
        "memory_gb": rounds[-1]["memory_gb"],
    }


def mfu(case: Case, rate: float, device: str, options: argparse.Namespace) -> float | None:
    from resnet_jax.distributed.accelerators import find_accelerator

    accelerator = find_accelerator(device)
    if accelerator is None or case.depth not in MULTIPLY_ADDS or options.side:
        return None
    passes = 3 if case.mode == "train" else 1
    return rate * 2 * passes * MULTIPLY_ADDS[case.depth] / accelerator.flops


def side_of(case: Case, options: argparse.Namespace) -> int:
    return options.side or SIDES.get(case.depth, 224)


def print_title(process: Process) -> bool:
    print(process.start["device"])
    print(
        f"{'mode':9} {'depth':>5} {'batch':>5} {'network':14} {'awaited':>9} {'pipelined':>9} images/s"
        f" {'MFU':>4} {'p50':>8} {'p90':>8} {'p99':>8} ms {'GB':>5} {'ready in':>8}"
    )
    return False


def print_record(r: dict) -> None:
    ms = r["step_ms"]
    utilization = f"{r['mfu']:.0%}" if r["mfu"] else ""
    print(
        f"{r['mode']:9} {r['depth']:5} {r['batch']:5} {r['network']:14}"
        f" {r['images_per_second']:9.0f} {r['pipelined_images_per_second']:9.0f} {'':8}"
        f" {utilization:>4} {ms['p50']:8.3f} {ms['p90']:8.3f} {ms['p99']:8.3f} {'':2}"
        f" {r['memory_gb']:5.1f} {r['prepare_seconds']:6.0f} s",
        flush=True,
    )
    if "ms" in r:
        gaps = r["pipelined_step_ms"] - r["kernel_ms"]
        kinds = ", ".join(
            f"{kind} {ms:.2f} ({r['count'][kind]:.0f})" for kind, ms in r["ms"].items()
        )
        print(
            f"{'':12}{r['kernels']:.0f} kernels, {r['kernel_ms']:.2f} ms of"
            f" {r['pipelined_step_ms']:.2f}, gaps {gaps:.2f} (traced: {r['traced_gaps_ms']:.2f});"
            f" ms (kernels): {kinds}",
            flush=True,
        )


def write_record(record: dict, place: str) -> None:
    line = json.dumps(record)
    if place == "-":
        print(line, flush=True)
    elif place:
        with open(place, "a") as file:
            file.write(line + "\n")


# In the process of a network.


class Alone:
    """A lock of the card, which a thread can enter again: processes choose kernels one by one."""

    def __init__(self, file: str) -> None:
        self._file, self._thread, self._depth = open(file, "w"), threading.RLock(), 0

    def __call__(self) -> "Alone":
        return self

    def __enter__(self) -> None:
        import fcntl

        self._thread.acquire()
        if not self._depth:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._depth += 1

    def __exit__(self, *_) -> None:
        import fcntl

        self._depth -= 1
        if not self._depth:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._thread.release()


def work(case: Case, options: argparse.Namespace) -> None:
    """Compiles a case, then answers commands, one JSON line each; other output goes to the log."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(reply: dict) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    start = time.monotonic()
    alone = Alone(os.environ["BENCHMARK_LOCK"])
    arguments = (case.network, case.depth, case.batch, side_of(case, options))
    arguments += (case.mode == "train", options.dtype)
    if case.framework == "jax":
        step = steps.jax_step(*arguments, alone=alone)
    else:
        step = steps.torch_step(*arguments, compiled=True, alone=alone)
    answer(
        {
            "images": step.images,
            "steps": step.steps,
            "device": device_name(case),
            "versions": versions(case),
            "prepare_seconds": time.monotonic() - start,
        }
    )
    for line in sys.stdin:
        command, *values = json.loads(line)
        answer(measure(step, case, *values) if command == "measure" else trace(step, case, options))


def end_with(parent: int) -> None:
    """Ends this process and those that it started once its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def device_name(case: Case) -> str:
    if case.framework == "jax":
        import jax

        return jax.devices()[0].device_kind
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def versions(case: Case) -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax")
    if case.framework == "torch":
        names = ("torch", "triton", "timm" if case.network == "timm" else "torchvision")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # such as triton without a GPU
            found[name] = ""
    return found


def measure(step: steps.Step, case: Case, seconds: float) -> dict:
    steps.awaited(step, 0)
    times = steps.awaited(step, seconds)
    calls = max(3, int(seconds / statistics.median(times)))
    return {
        "awaited": times,
        "pipelined": steps.pipelined(step, calls),
        "memory_gb": peak_memory(case) / 1e9,
    }


def peak_memory(case: Case) -> int:
    """Bytes on the device; 0 if unknown."""
    if case.framework == "jax":
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def trace(step: steps.Step, case: Case, options: argparse.Namespace) -> dict:
    """What the device does in a few steps that are started without waiting."""
    calls = 4 if step.steps == 1 else 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if options.trace:
            folder = pathlib.Path(options.trace, "-".join(map(str, case)))
            folder.mkdir(parents=True, exist_ok=True)
        if case.framework == "torch":
            found, programs = trace_torch(step, calls, folder), {}
        else:
            found, programs = trace_jax(step, calls, folder)
    return kernels.breakdown(found, calls * step.steps, programs)


def trace_jax(step: steps.Step, calls: int, folder: pathlib.Path):
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        steps.pipelined(step, calls)
    file = max(folder.rglob("*.xplane.pb"), key=os.path.getmtime)
    # The network's program is the largest; it says what each kernel computes.
    executables = jax.devices()[0].client.live_executables()
    texts = (module.to_string() for each in executables for module in each.hlo_modules())
    return kernels.read_jax(file), kernels.program_kinds(max(texts, key=len, default=""))


def trace_torch(step: steps.Step, calls: int, folder: pathlib.Path) -> list[kernels.Kernel]:
    import torch

    with torch.profiler.profile() as profile:
        steps.pipelined(step, calls)
    file = folder / "torch.json"
    profile.export_chrome_trace(str(file))
    return kernels.read_torch(file)


if __name__ == "__main__":
    main()
