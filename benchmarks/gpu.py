"""Speed on a GPU beside the straightforward Flax network and torchvision's under torch.compile.

    pip install torch torchvision
    python benchmarks/gpu.py [--depth=50] [--batches=64,128,256] [--modes=train,inference]
        [--networks=ours,flax,torch] [--rounds=2] [--seconds=5] [--trace=FOLDER]

Each network runs in a process of its own, in turn, on the same card; the best round counts.
bfloat16 throughout: PyTorch by automatic mixed precision, channels_last and
torch.compile(mode="max-autotune"). Prints a table with images/s and the share of the card's peak
that the network's arithmetic takes (MFU), and one JSON line a row. `--trace` writes a trace of
three steps of ours for jax.profiler's viewers.

It runs on a CPU too, at any size: --depth=20 --side=32 --batches=8 --rounds=1 --seconds=1.
"""

import argparse
import json
import subprocess
import sys

import steps

from resnet_jax.distributed.accelerators import find_accelerator

# Multiply-adds of an image (`resnet_jax.summary`); training takes three times a forward pass.
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
    parser.add_argument("--trace", help="folder for a trace of ours")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this process measures NETWORK:MODE
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
                    best[network] = max(best[network], run_alone(network, mode, batch, options))
            cells = [f"{rate:.0f} {share(rate, mode, options, peak)}" for rate in best.values()]
            print(f"{mode:>10}{batch:>6}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
            record = {"benchmark": "gpu", "device": card, "depth": options.depth, "mode": mode}
            print(json.dumps({**record, "batch": int(batch), **best}), flush=True)


def share(rate: float, mode: str, options: argparse.Namespace, peak: float | None) -> str:
    if peak is None:
        return ""
    passes = 3 if mode == "train" else 1
    return f"({rate * 2 * passes * MULTIPLY_ADDS[options.depth] / peak:.0%})"


def run_alone(network: str, mode: str, batch: str, options: argparse.Namespace) -> float:
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
