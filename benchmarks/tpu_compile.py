"""Compares training steps on a TPU by their compiled programs; no TPU is needed.

    pip install libtpu
    python benchmarks/tpu_compile.py [--topologies=v5e:2x2] [--batches=128,256]
        [--networks=flax,ours] [--depth=50] [--dump=FOLDER]

Compiles the same bfloat16 step of the straightforward Flax network and of ours ahead of time, and
prints a table and JSON lines; `python -m resnet_jax plan` does this for a whole run. All figures
except the collectives are per image:

* GFLOP and `counted` MB are the compiler's own cost analysis. It counts every operand and result
  of every operation, including those in the chip's fast memory (VMEM).
* `HBM` MB crosses the memory bus: operands and results that the program places in HBM, and copies
  between HBM and VMEM once.
* `temporary` MB are the activations and gradients that are alive at the same time.
* `floor` ms are a step's arithmetic, HBM traffic and all-reduce, each at the chip's peak; images/s
  are an upper bound per chip, from the longest of the three.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from steps import jax_model, make_training

from resnet_jax.planning.aot import CompiledStep
from resnet_jax.planning.plan import floors
from resnet_jax.planning.topology import parse_topology
from resnet_jax.planning.tpu import tpu_devices
from resnet_jax.planning.traffic import count_traffic

COLUMNS = ("GFLOP", "counted", "HBM", "temporary", "reduced", "collectives")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topologies", default="v5e:2x2")
    parser.add_argument("--batches", default="128,256", help="images per chip")
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
                rows[network] = row = analyze_step(network, topology, batch, options)
                show(topology, batch, network, row)
            if {"flax", "ours"} <= rows.keys():
                ratios = [rows["ours"][name] / rows["flax"][name] for name in COLUMNS]
                line = "".join(f"{ratio:12.2f}" for ratio in ratios)
                print(f"{'ours/flax':>23}" + line, flush=True)


def analyze_step(network: str, topology: str, batch: int, options: argparse.Namespace) -> dict:
    tpus = parse_topology(topology)
    devices = tpu_devices(tpus)
    side = options.side or (224 if options.depth == 50 else 32)
    model = jax_model(network, options.depth, jnp.bfloat16)
    init, step = make_training(model, axis_name="batch")
    chips = len(devices)
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
        devices=devices,
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
    moved = count_traffic(text)
    work = CompiledStep(True, flops=cost["flops"], traffic=moved)
    floor = {name: 1e3 * each for name, each in floors(work, tpus).items()}
    return {
        "chips": chips,
        "GFLOP": cost["flops"] / batch / 1e9,
        "counted": cost["bytes accessed"] / batch / 1e6,
        "HBM": moved.memory / batch / 1e6,
        "temporary": memory.temp_size_in_bytes / batch / 1e6,
        "reduced": moved.all_reduced / 1e6,
        "collectives": moved.all_reduces,
        "arithmetic_ms": floor["compute"],
        "hbm_ms": floor["memory"],
        "reduce_ms": floor["interconnect"],
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


if __name__ == "__main__":
    main()
