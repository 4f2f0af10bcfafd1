"""Compares speed on a GPU with a straightforward Flax network and torchvision's, compiled.

    pip install torch torchvision
    python benchmarks/gpu.py [--depth=50] [--batches=64,128,256] [--modes=train,inference]
        [--networks=ours,flax,torch] [--rounds=2] [--seconds=5] [--trace=FOLDER]

Networks alternate on the same card, each in a separate process; the best round counts. All compute
in bfloat16, PyTorch by automatic mixed precision, with channels_last and
torch.compile(mode="max-autotune"). Prints a table with images/s and model FLOPs utilization (MFU),
and one JSON line per row. `--trace` writes a trace of three of our steps for jax.profiler.

It also runs on a CPU: --depth=20 --side=32 --batches=8 --rounds=1 --seconds=1.
"""

import argparse
import json
import subprocess
import sys

import steps

from resnet_jax.distributed.accelerators import find_accelerator

# Multiply-adds per image, from `resnet_jax.summary`; a training step counts as three passes.
MULTIPLY_ADDS = {50: 4.09e9, 20: 40.8e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=50, choices=(20, 50))
    parser.add_argument("--side", type=int, default=0, help="pixels; 0: 224, or 32 for depth 20")
    parser.add_argument("--batches", default="64,128,256")
    parser.add_argument("--modes", default="train,inference")
    parser.add_argument("--networks", default="ours,flax,torch")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--trace", help="folder for a trace of our network")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # measures NETWORK:MODE in this process
    options = parser.parse_args()
    if options.one:
        measure(options)
        return

    networks = options.networks.split(",")
    card = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.strip()
    accelerator = find_accelerator(card)
    peak = accelerator.flops if accelerator else None
    print(f"{card}; images/s (and MFU)")
    print(f"{'mode':>10}{'batch':>6}" + "".join(f"{name:>18}" for name in networks))
    for mode in options.modes.split(","):
        for batch in options.batches.split(","):
            best = dict.fromkeys(networks, 0.0)
            for _ in range(options.rounds):
                for network in networks:
                    best[network] = max(
                        best[network], run_in_process(network, mode, batch, options)
                    )
            cells = [f"{rate:.0f} {mfu(rate, mode, options, peak)}" for rate in best.values()]
            print(f"{mode:>10}{batch:>6}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
            record = {"benchmark": "gpu", "device": card, "depth": options.depth, "mode": mode}
            print(json.dumps({**record, "batch": int(batch), **best}), flush=True)


def mfu(rate: float, mode: str, options: argparse.Namespace, peak: float | None) -> str:
    if peak is None:
        return ""
    passes = 3 if mode == "train" else 1
    return f"({rate * 2 * passes * MULTIPLY_ADDS[options.depth] / peak:.0%})"


def run_in_process(network: str, mode: str, batch: str, options: argparse.Namespace) -> float:
    command = [sys.executable, __file__, f"--one={network}:{mode}", f"--batches={batch}"]
    command += [f"--depth={options.depth}", f"--side={options.side}"]
    command += [f"--seconds={options.seconds}"]
    if options.trace and network == "ours":
        command.append(f"--trace={options.trace}/{mode}-{batch}")
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.splitlines()[-1])


def measure(options: argparse.Namespace) -> None:
    network, mode = options.one.split(":")
    side = options.side or (224 if options.depth == 50 else 32)
    step, images = steps.make(
        network,
        options.depth,
        int(options.batches),
        side,
        mode == "train",
        "bfloat16",
        compiled=True,
    )
    print(steps.rate(step, images, options.seconds))
    if options.trace:
        import jax

        with jax.profiler.trace(options.trace):
            for _ in range(3):
                step()


if __name__ == "__main__":
    main()
