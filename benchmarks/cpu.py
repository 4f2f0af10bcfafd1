"""Compares speed on a CPU with a straightforward Flax network and with PyTorch.

    pip install torch torchvision
    python benchmarks/cpu.py [--cases=resnet50-train-32,...] [--rounds=3] [--seconds=6]

Networks alternate for `rounds` rounds, each in a separate process; the best round counts. Prints a
table and one JSON line per case. All train by SGD with momentum in float32, with one thread per
core; PyTorch's tensors are channels_last.
"""

import argparse
import json
import os
import subprocess
import sys

import steps

CASES = {  # name: (depth, batch size, side, train)
    "resnet50-train-32": (50, 32, 224, True),
    "resnet50-train-8": (50, 8, 224, True),
    "resnet50-inference-32": (50, 32, 224, False),
    "resnet20-train-128": (20, 128, 32, True),
    "resnet20-inference-128": (20, 128, 32, False),
}
NETWORKS = ("ours", "flax", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # measures this network in this process
    options = parser.parse_args()
    if options.one:
        step, images = steps.make(options.one, *CASES[options.cases])
        print(steps.rate(step, images, options.seconds))
        return

    print(f"{'images/s':24}{'ours':>9}{'flax':>9}{'torch':>9}{'ours/flax':>11}{'ours/torch':>12}")
    for case in options.cases.split(","):
        best = dict.fromkeys(NETWORKS, 0.0)
        for _ in range(options.rounds):
            for network in NETWORKS:
                rate = run_in_process(network, case, options.seconds)
                best[network] = max(best[network], rate)
        ours, flax, torch = best.values()
        row = f"{case:24}{ours:9.1f}{flax:9.1f}{torch:9.1f}{ours / flax:11.2f}{ours / torch:12.2f}"
        print(row, flush=True)
        print(json.dumps({"benchmark": "cpu", "case": case, "cores": os.cpu_count(), **best}))


def run_in_process(network: str, case: str, seconds: float) -> float:
    command = [sys.executable, __file__, f"--one={network}", f"--cases={case}"]
    command.append(f"--seconds={seconds}")
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    main()
