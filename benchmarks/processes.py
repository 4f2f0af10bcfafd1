"""Processes that hold one compiled network each and measure it on command, for gpu.py.

    python benchmarks/processes.py '["ours", "train", 20, 8]' [--side=32] [--dtype=bfloat16]

Commands come as JSON on standard input, one a line: ["measure", SECONDS] and ["trace"]; so do the
replies on standard output. Everything else that the process prints goes to standard error.
"""

import argparse
import contextlib
import importlib.metadata
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

SIDES = {8: 32, 20: 32}  # by depth; others: 224


class Case(NamedTuple):
    """A network in one mode, "train" or "inference"."""

    network: str
    mode: str
    depth: int
    batch: int

    @property
    def framework(self) -> str:
        return "torch" if self.network.startswith(("torch", "timm")) else "jax"

    def __str__(self) -> str:
        return f"{self.mode} {self.network}, depth {self.depth}, batch {self.batch}"


class Process:
    """A process that compiles a case at once and measures it on command."""

    def __init__(self, case: Case, folder: pathlib.Path, options: argparse.Namespace) -> None:
        self.case = case
        self.start: dict = {}  # its first reply: what it has compiled
        self._log = folder / f"{'-'.join(map(str, case))}-{time.monotonic_ns()}.log"
        command = [sys.executable, __file__, json.dumps(case)]
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
            "BENCHMARK_LOCK": str(folder / "lock"),
        }
        with self._log.open("w") as log:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
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
        with contextlib.suppress(BrokenPipeError):  # it has ended; its reply says so
            self._popen.stdin.write(json.dumps(command) + "\n")
            self._popen.stdin.flush()

    def reply(self, seconds: float) -> dict | None:
        """Its next reply. Without one it prints why, and ends the process."""
        try:
            line = self._replies.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            print(f"dropped, no time left: {self.case}", flush=True)
        else:
            if line:
                return json.loads(line)
            print(f"failed: {self.case}: {self._failure()}", flush=True)
        self.close()
        return None

    def _failure(self) -> str:
        lines = [x for x in self._log.read_text(errors="replace").splitlines() if x.strip()]
        for line in reversed(lines):
            if missing := re.match(r"ModuleNotFoundError: No module named '(\w+)'", line):
                return f"{missing[1]} is not installed"
            if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt|Hit|OutOfMemory\w*)\b", line):
                return line[:300]
        return f"exit code {self._popen.wait()}. {lines[-1][:300] if lines else ''}"

    @property
    def ended(self) -> bool:
        return self._popen.poll() is not None

    def close(self) -> None:
        """Ends the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


class Alone:
    """A lock of the card, which a thread can enter again: processes choose kernels one by one."""

    def __init__(self, file: str) -> None:
        self._file = open(file, "w")  # noqa: SIM115
        self._thread, self._depth = threading.RLock(), 0

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", type=lambda text: Case(*json.loads(text)))
    parser.add_argument("--side", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--trace", default="", help="folder for traces")
    options = parser.parse_args()
    work(options.case, options)


def work(case: Case, options: argparse.Namespace) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(reply: dict) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    start = time.monotonic()
    alone = Alone(os.environ.get("BENCHMARK_LOCK", os.devnull))
    side = options.side or SIDES.get(case.depth, 224)
    arguments = (case.network, case.depth, case.batch, side, case.mode == "train", options.dtype)
    if case.framework == "jax":
        step = steps.jax_step(*arguments, alone=alone)
    else:
        step = steps.torch_step(*arguments, compiled=True, alone=alone)
    answer(
        {
            "side": side,
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

    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CUDA if torch.cuda.is_available() else kinds.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        steps.pipelined(step, calls)
    file = folder / "torch.json"
    profile.export_chrome_trace(str(file))
    return kernels.read_torch(file)


if __name__ == "__main__":
    main()
