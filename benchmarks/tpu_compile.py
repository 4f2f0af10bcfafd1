"""What a training step costs on a TPU, from its compiled program; no TPU is needed.

    pip install libtpu
    python benchmarks/tpu_compile.py [--topologies=v5e:2x2] [--batches=128,256]
        [--networks=flax,ours] [--depth=50] [--dump=FOLDER]

Compiles the same bfloat16 step of the straightforward Flax network and of ours ahead of time, and
prints a table and JSON lines. All figures but the collectives are for one image:

* GFLOP and `counted` MB are the compiler's own cost analysis. It counts every operand and result
  of every operation, also those that lie in the chip's fast memory (VMEM).
* `HBM` MB is what crosses the memory bus: operands and results that the program places in HBM,
  and copies between HBM and VMEM once.
* `temporary` MB are the activations and gradients that are alive at the same time.
* `floor` ms are a step's arithmetic, HBM traffic and all-reduce, each at the chip's peak; images/s
  are an upper bound a chip, from the longest of the three.
"""

import argparse
import json
import math
import os
import re
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from steps import jax_model, make_training

# One v5e chip: bfloat16 FLOP/s, HBM bytes/s, and bytes/s over all its interconnect links in one
# direction (cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 819 GB/s, 1,600 Gbit/s).
PEAK_FLOPS, PEAK_HBM, PEAK_LINKS = 197e12, 819e9, 200e9

COLUMNS = ("GFLOP", "counted", "HBM", "temporary", "reduced", "collectives")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topologies", default="v5e:2x2")
    parser.add_argument("--batches", default="128,256", help="images a chip")
    parser.add_argument("--networks", default="flax,ours")
    parser.add_argument("--depth", type=int, default=50, choices=(20, 50))
    parser.add_argument("--side", type=int, default=0, help="pixels; 0: 224, or 32 for depth 20")
    parser.add_argument("--dump", help="write the compiled programs as text here")
    options = parser.parse_args()

    print(
        f"{'topology':>9}{'batch':>6} network" + "".join(f"{name:>12}" for name in COLUMNS), end=""
    )
    print("   floors: arithmetic, HBM, all-reduce ms; images/s")
    for topology in options.topologies.split(","):
        for batch in map(int, options.batches.split(",")):
            rows = {}
            for network in options.networks.split(","):
                rows[network] = row = compile_step(network, topology, batch, options)
                show(topology, batch, network, row)
            if {"flax", "ours"} <= rows.keys():
                ratios = [rows["ours"][name] / rows["flax"][name] for name in COLUMNS]
                line = "".join(f"{ratio:12.2f}" for ratio in ratios)
                print(f"{'ours/flax':>23}" + line, flush=True)


def compile_step(network: str, topology: str, batch: int, options: argparse.Namespace) -> dict:
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    side = options.side or (224 if options.depth == 50 else 32)
    model = jax_model(network, options.depth, jnp.bfloat16)
    init, step = make_training(model, axis_name="batch")
    chips = len(description.devices)
    images = jax.ShapeDtypeStruct((chips, batch, side, side, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((chips, batch), jnp.int32)
    one = jax.ShapeDtypeStruct((1, side, side, 3), jnp.bfloat16)
    state = jax.eval_shape(init, jax.random.key(0), one)
    run = jax.pmap(
        step,
        axis_name="batch",
        in_axes=(None, 0, 0),
        out_axes=None,
        donate_argnums=0,
        devices=description.devices,
    )
    start = time.monotonic()
    program = run.lower(state, images, labels).compile()
    seconds = time.monotonic() - start
    text = program.as_text()
    if options.dump:
        folder = Path(options.dump)
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, f"{network}-{topology.replace(':', '-')}-{batch}.txt").write_text(text)

    cost, memory = program.cost_analysis(), program.memory_analysis()
    hbm, reduced, collectives = traffic(text)
    return {
        "chips": chips,
        "GFLOP": cost["flops"] / batch / 1e9,
        "counted": cost["bytes accessed"] / batch / 1e6,
        "HBM": hbm / batch / 1e6,
        "temporary": memory.temp_size_in_bytes / batch / 1e6,
        "reduced": reduced / 1e6,
        "collectives": collectives,
        "arithmetic_ms": 1e3 * cost["flops"] / PEAK_FLOPS,
        "hbm_ms": 1e3 * hbm / PEAK_HBM,
        # A ring passes every byte twice, less what each chip keeps.
        "reduce_ms": 1e3 * 2 * reduced * (chips - 1) / chips / PEAK_LINKS,
        "compile_s": round(seconds, 1),
    }


def show(topology: str, batch: int, network: str, row: dict) -> None:
    floors = row["arithmetic_ms"], row["hbm_ms"], row["reduce_ms"]
    cells = "".join(f"{row[name]:12.1f}" for name in COLUMNS[:-1]) + f"{row['collectives']:12d}"
    line = f"{topology:>9}{batch:>6} {network:>7}{cells}   "
    line += ", ".join(f"{floor:.2f}" for floor in floors)
    print(line + f"; {1e3 * batch / max(floors):,.0f}", flush=True)
    record = {"benchmark": "tpu_compile", "topology": topology, "batch": batch}
    print(json.dumps({**record, "network": network, "jax": jax.__version__, **row}), flush=True)


BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
# These move nothing: names for parts, or the start of what its "-done" counts.
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant"}
FREE |= {"slice-start", "copy-start", "all-reduce-start"}


def traffic(program: str) -> tuple[float, float, int]:
    """(bytes to and from HBM, bytes all-reduced, number of all-reduces) of a compiled program."""
    types: dict[str, str] = {}
    moved = reduced = collectives = 0
    for line in program[program.index("\nENTRY") :].splitlines()[2:]:
        match = INSTRUCTION.match(line)
        if not match:
            continue
        name, kind, operation, rest = match.groups()
        types[name] = kind
        if operation in ("all-reduce", "all-reduce-start"):
            collectives += 1
            reduced += sum(size for size, _ in arrays(kind))
        if operation in FREE or "ConcatBitcast" in line:
            continue
        operands = [
            types.get(each, "") for each in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        ]
        if operation in ("slice-done", "copy-done"):
            (size, fast), *_ = arrays(kind)
            spaces = {fast for _, fast in arrays(operands[0])}
            moved += size if len(spaces) > 1 else 0 if fast else 2 * size
        else:
            everything = arrays(kind) + [each for operand in operands for each in arrays(operand)]
            moved += sum(size for size, fast in everything if not fast)
    return moved, reduced, collectives


def arrays(kind: str) -> list[tuple[int, bool]]:
    """(bytes, lies in VMEM) of every array in an instruction's type."""
    return [
        (BYTES[dtype] * math.prod(map(int, filter(None, shape.split(",")))), "S(1)" in layout)
        for dtype, shape, layout in ARRAY.findall(kind)
    ]


if __name__ == "__main__":
    main()
