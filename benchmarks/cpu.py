"""Speed on a CPU beside the straightforward Flax network and PyTorch.

    pip install torch torchvision
    python benchmarks/cpu.py [--cases=resnet50-train-32,...] [--rounds=3] [--seconds=6]

Each network runs in a process of its own, in turn, `rounds` times; the best round of each counts.
Prints a table and one JSON line a case. All train by SGD with momentum in float32 on two threads
or as many as there are cores; PyTorch's tensors are channels_last.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

CASES = {  # name: (depth, images a batch, side, train)
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
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this process measures that network
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, *CASES[options.cases], options.seconds)))
        return

    print(f"{'images/s':24}{'ours':>9}{'flax':>9}{'torch':>9}{'ours/flax':>11}{'ours/torch':>12}")
    for case in options.cases.split(","):
        best = dict.fromkeys(NETWORKS, 0.0)
        for _ in range(options.rounds):
            for network in NETWORKS:
                rate = run_alone(network, case, options.seconds)
                best[network] = max(best[network], rate)
        ours, flax, torch = best.values()
        row = f"{case:24}{ours:9.1f}{flax:9.1f}{torch:9.1f}{ours / flax:11.2f}{ours / torch:12.2f}"
        print(row, flush=True)
        print(json.dumps({"benchmark": "cpu", "case": case, "cores": os.cpu_count(), **best}))


def run_alone(network: str, case: str, seconds: float) -> float:
    command = [sys.executable, __file__, f"--one={network}", f"--cases={case}"]
    command.append(f"--seconds={seconds}")
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(network, depth, size, side, train, seconds) -> float:
    """Images/s: the median of as many steps as fit into `seconds`, at least three."""
    make = torch_step if network == "torch" else jax_step
    step = make(network, depth, size, side, train)
    step(), step()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return size / statistics.median(times)


def jax_step(network, depth, size, side, train):
    import jax
    import numpy as np
    import optax
    import straightforward

    import resnet_jax as rj

    made = {
        ("ours", 50): rj.ResNet50,
        ("ours", 20): rj.ResNet20,
        ("flax", 50): straightforward.resnet50,
        ("flax", 20): straightforward.resnet20,
    }
    model = made[network, depth]()
    rng = np.random.default_rng(0)
    images = jax.device_put(rng.normal(size=(size, side, side, 3)).astype(np.float32))
    labels = jax.device_put(rng.integers(0, 10, size))
    variables = jax.jit(lambda key: model.init(key, images[:1], train=False))(jax.random.key(0))
    if not train:
        infer = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
        return lambda: infer(variables, images).block_until_ready()

    optimizer = optax.sgd(0.1, momentum=0.9)

    def update(state, images, labels):
        variables, opt_state = state

        def loss_of(params):
            logits, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updates

        gradients, updates = jax.grad(loss_of, has_aux=True)(variables["params"])
        changes, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updates}, opt_state

    update = jax.jit(update, donate_argnums=0)
    state = variables, optimizer.init(variables["params"])

    def step():
        nonlocal state
        state = update(state, images, labels)
        jax.block_until_ready(state)

    return step


def torch_step(network, depth, size, side, train):
    import torch
    from torch.nn import functional

    torch.set_num_threads(os.cpu_count() or 1)
    model = torch_network(depth).to(memory_format=torch.channels_last)
    images = torch.randn(size, 3, side, side).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (size,))
    if not train:
        model.eval()

        def infer():
            with torch.inference_mode():
                model(images)

        return infer

    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def torch_network(depth):
    import torchvision
    from torch import nn
    from torchvision.models.resnet import BasicBlock, ResNet

    if depth == 50:
        return torchvision.models.resnet50()

    class ResNet20(ResNet):
        """torchvision's blocks in the paper's CIFAR arrangement (He et al. 2015, section 4.2)."""

        def __init__(self):
            super().__init__(BasicBlock, [3, 3, 3, 3], num_classes=10)
            self.inplanes = 16
            self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.bn1, self.maxpool, self.layer4 = nn.BatchNorm2d(16), nn.Identity(), nn.Identity()
            self.layer1 = self._make_layer(BasicBlock, 16, 3)
            self.layer2 = self._make_layer(BasicBlock, 32, 3, stride=2)
            self.layer3 = self._make_layer(BasicBlock, 64, 3, stride=2)
            self.fc = nn.Linear(64, 10)

    return ResNet20()


if __name__ == "__main__":
    main()
