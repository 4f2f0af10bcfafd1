"""What a GPU does in a step: kernels by kind, from the traces of JAX's and PyTorch's profilers.

    python benchmarks/kernels.py TRACE.xplane.pb|TRACE.json [--steps=1]

Used by gpu.py --breakdown. Without the text of the program, kinds are inferred from names alone.
"""

import argparse
import collections
import json
import pathlib
import re
from typing import NamedTuple

KINDS = (
    "convolution",
    "kernel gradient",
    "input gradient",
    "GEMM",
    "elementwise",
    "reduction",
    "pool",
    "copy",
    "other",
)
# The first that occurs in a name decides. PyTorch's compiler names a kernel triton_ and poi, red or
# per (pointwise, reduction), then by what is fused in it; cuDNN by the pass: fprop, wgrad or dgrad.
_WORDS = {
    r"^triton_poi.*max_pool|^triton_.*scatter": "pool",
    r"^triton_poi": "elementwise",
    r"^triton_(red|per|mix)": "reduction",
    r"^triton_tem.*convolution": "convolution",
    r"^triton_(tem|mm|bmm|addmm)": "GEMM",
    r"memcpy|memset|transpose|tonhwc|tonchw|converttensor|\bcopy|wrapped_slice": "copy",
    r"pool|select_and_scatter|scatter|reduce_window": "pool",
    r"wgrad|bw_?-?filter|backwardfilter": "kernel gradient",
    r"dgrad|bw_?-?input|backwardinput|backwarddata": "input gradient",
    r"fprop|conv(?!ert)|implicit_?gemm": "convolution",
    r"gemm|cutlass|nvjet|cublas|matmul|splitk|_dot|wgmma": "GEMM",
    r"reduc|softmax|norm|triton_softmax": "reduction",
    r"fusion|wrapped|elementwise|multi_tensor|fused|add|multiply|vectorized": "elementwise",
}
_TARGETS = {  # of XLA's custom calls
    "convForward": "convolution",
    "convBiasActivationForward": "convolution",
    "convBackwardFilter": "kernel gradient",
    "convBackwardInput": "input gradient",
    "cublas": "GEMM",
    "triton_gemm": "GEMM",
}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(")
_MOVES = {"copy", "transpose", "slice", "concatenate", "pad", "reverse", "gather"}
_OPERATIONS = {
    **dict.fromkeys((*_MOVES, "copy-start"), "copy"),
    **dict.fromkeys(("add", "multiply", "subtract", "select", "maximum", "convert"), "elementwise"),
    **dict.fromkeys(("reduce-window", "select-and-scatter", "scatter"), "pool"),
    "reduce": "reduction",
    "dot": "GEMM",
    "convolution": "convolution",
}


class Kernel(NamedTuple):
    """A kernel or copy that ran, at times in nanoseconds."""

    name: str
    operation: str  # the instruction of XLA's program that started it, or ""
    start: float
    end: float


def read_jax(file: pathlib.Path) -> list[Kernel]:
    """The kernels in a .xplane.pb; on a CPU, the instructions of the program."""
    import jax

    return kernels_of(jax.profiler.ProfileData.from_file(str(file)))


def kernels_of(profile) -> list[Kernel]:
    planes = list(profile.planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    kernels = []
    for plane in gpus or [plane for plane in planes if plane.name == "/host:CPU"]:
        lines = list(plane.lines)
        # Other lines repeat the kernels of the streams, as modules or instructions.
        for line in [line for line in lines if line.name.startswith("Stream")] or lines:
            for event in line.events:
                operation = ""
                for name, value in event.stats:
                    if name == "hlo_op":
                        operation = str(value)
                if gpus or operation:
                    end = event.start_ns + event.duration_ns
                    kernels.append(Kernel(event.name, operation, event.start_ns, end))
    return kernels


def read_torch(file: pathlib.Path) -> list[Kernel]:
    """The kernels in a trace of torch.profiler, `export_chrome_trace`."""
    events = json.loads(file.read_text())["traceEvents"]
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return [Kernel(e["name"], "", e["ts"] * 1e3, (e["ts"] + e["dur"]) * 1e3) for e in on_device]


def breakdown(kernels: list[Kernel], steps: int, programs: dict[str, str] | None = None) -> dict:
    """Kernels and milliseconds per step. `programs` is from `program_kinds`."""
    milliseconds, counts, names = (collections.Counter() for _ in range(3))
    busy, reached = 0.0, 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        kind = kind_of(kernel, programs or {})
        duration = (kernel.end - kernel.start) / 1e6 / steps
        milliseconds[kind] += duration
        counts[kind] += 1
        names[_label(kernel)] += duration
        busy += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    first = min((kernel.start for kernel in kernels), default=0.0)
    return {
        "kernels": sum(counts.values()) / steps,
        "kernel_ms": busy / 1e6 / steps,
        "gaps_ms": (max(reached, first) - first - busy) / 1e6 / steps,
        "ms": {kind: round(milliseconds[kind], 4) for kind in KINDS if counts[kind]},
        "count": {kind: counts[kind] / steps for kind in KINDS if counts[kind]},
        "longest": {name[:80]: round(ms, 4) for name, ms in names.most_common(12)},
    }


def kind_of(kernel: Kernel, programs: dict[str, str]) -> str:
    """The kind of a kernel: as the program says, or else by its names."""
    for name in (kernel.operation, kernel.name):
        if _plain(name) in programs:
            return programs[_plain(name)]
    for name in (kernel.name, kernel.operation):
        for words, kind in _WORDS.items():
            if re.search(words, name.lower()):
                return kind
    return "other"


def _label(kernel: Kernel) -> str:
    """The instruction that started a kernel; a command buffer (a CUDA graph) starts many."""
    in_buffer = kernel.operation.startswith("command_buffer")
    return kernel.name if in_buffer or not kernel.operation else kernel.operation


def _plain(name: str) -> str:
    """An instruction's name as that of its kernel: loop_fusion.12 is loop_fusion_12."""
    return re.sub(r"\W", "_", name)


def program_kinds(text: str) -> dict[str, str]:
    """{instruction: kind} of a compiled program of XLA, `compiled.as_text()`."""
    bodies: dict[str, list[str]] = collections.defaultdict(list)
    body = ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            body = head[1]
        elif body:
            bodies[body].append(line)
    kinds = {}
    for lines in bodies.values():
        for line in lines:
            if found := _INSTRUCTION.match(line):
                kind = _kind_of_instruction(found[2], line, bodies)
                if kind:
                    kinds[_plain(found[1])] = kind
    return kinds


def _kind_of_instruction(operation: str, line: str, bodies: dict[str, list[str]]) -> str:
    if operation == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', line)
        return next((k for words, k in _TARGETS.items() if target and words in target[1]), "")
    if operation != "fusion":
        return _OPERATIONS.get(operation, "")
    called = re.search(r"calls=%?([\w.\-]+)", line)
    matches = map(_INSTRUCTION.match, bodies.get(called[1] if called else "", []))
    inside = {match[2] for match in matches if match}
    kinds = {_OPERATIONS.get(each, "") for each in inside}
    for kind in ("convolution", "GEMM", "pool", "reduction"):
        if kind in kinds:
            return kind
    moves = inside <= {*_MOVES, "parameter", "bitcast", "convert", "constant", "tuple"}
    return "copy" if moves and inside & _MOVES else "elementwise"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    read = read_torch if options.trace.suffix == ".json" else read_jax
    print(json.dumps(breakdown(read(options.trace), options.steps), indent=1))


if __name__ == "__main__":
    main()
