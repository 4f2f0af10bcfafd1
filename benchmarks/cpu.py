"""Compares speed on a CPU with a straightforward Flax network and with PyTorch.

    pip install torch torchvision
    python benchmarks/cpu.py [--cases=resnet50-train-32,...] [--networks=ours,flax] [--rounds=10]

Each network compiles in a process of its own; then the networks take steps in turn, one at a time,
so that a machine whose speed varies slows them down alike. Prints a table of images/s (the median
step) with the median ratios of neighboring steps, and one JSON line per case. All train by SGD with
momentum in float32, with one thread per core; PyTorch's tensors are channels_last.
"""

import argparse
import json
import os
import statistics
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
# In predictions, "ours" has its batch norms folded, as `predict` and `Classifier` have by default.
NETWORKS = ("ours", "flax", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--networks", default=",".join(NETWORKS), help="ours, and others")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # runs this network, a step per line
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.cases)
        return

    networks = options.networks.split(",")
    columns = [*networks, *(f"ours/{name}" for name in networks[1:])]
    print(f"{'images/s':24}" + "".join(f"{column:>12}" for column in columns))
    for case in options.cases.split(","):
        seconds = alternate(case, networks, options.rounds)
        found = {name: CASES[case][1] / statistics.median(each) for name, each in seconds.items()}
        for name in networks[1:]:
            pairs = zip(seconds["ours"], seconds[name], strict=True)
            found[f"ours/{name}"] = statistics.median(other / ours for ours, other in pairs)
        print(f"{case:24}" + "".join(f"{found[column]:12.2f}" for column in columns), flush=True)
        print(json.dumps({"benchmark": "cpu", "case": case, "cores": os.cpu_count(), **found}))


def alternate(case: str, networks: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each network's steps, taken in turn."""
    processes = {network: start(network, case) for network in networks}
    for network, process in processes.items():
        if not process.stdout.readline():  # a line when it has compiled
            sys.exit(f"error: {network}, {case}: its process ended, see above")
    seconds: dict[str, list[float]] = {network: [] for network in networks}
    for _ in range(rounds):
        for network, process in processes.items():
            print(file=process.stdin, flush=True)
            seconds[network].append(float(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    return seconds


def start(network: str, case: str) -> subprocess.Popen:
    command = [sys.executable, __file__, f"--serve={network}", f"--cases={case}"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve(network: str, case: str) -> None:
    """Takes a step for each line of standard input and prints its seconds."""
    depth, size, side, train = CASES[case]
    if network == "ours" and not train:
        network = "folded"
    framework = steps.torch_step if network == "torch" else steps.jax_step
    step = framework(network, depth, size, side, train)
    step.seconds()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(step.seconds(), flush=True)


if __name__ == "__main__":
    main()
