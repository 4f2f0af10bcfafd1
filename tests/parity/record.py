"""Records what a PyTorch network computes; needs PyTorch.

`python -m tests.parity.record` writes the fixtures that tests/parity/test_pytorch.py reads. They
were made with PyTorch 2.13.0 on a CPU.
"""

import pathlib

import numpy as np
import torch

from tests.parity.networks import ReviewResNet, TorchvisionResNet18
from tests.parity.settings import (
    FORWARD,
    GRADIENTS,
    LEARNING_RATE,
    MOMENTUM,
    STEPS,
    WEIGHT_DECAY,
)

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
BATCH, SIDE = 8, 64
# Width 4 and 8 instead of 64: a few hundred kilobytes of weights each.
REDUCED = {"review_resnet50": (ReviewResNet, 4), "torchvision_resnet18": (TorchvisionResNet18, 8)}


def randomize(network, seed=0, offset=2.0):
    """Gives norms random scales, biases and statistics, so that each of them shows.

    Even channels get biases near `offset` and odd ones near its negative, so that ReLUs pass
    about half of what they see, as always, but few inputs lie within rounding of 0. There a
    gradient is a matter of luck: PyTorch in float32 would differ from itself in float64 by a
    percent.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim != 1 or not tensor.is_floating_point():
                continue
            if name.endswith(("running_mean", "bias")):
                tensor.normal_(0, 0.1, generator=generator)
            else:
                tensor.uniform_(0.5, 1.0, generator=generator)
            if name.endswith("bias"):
                tensor[0::2] += offset
                tensor[1::2] -= offset


def record(network_cls, width):
    """What a network computes, at a point where float32 and float64 agree."""
    arrays = run(network_cls, width)
    exact = run(network_cls, width, dtype=torch.float64)
    for name, array in arrays.items():
        tolerance = GRADIENTS if name.startswith("gradients/") else FORWARD
        error = relative_error(array, exact[name])
        assert error < tolerance / 2, f"{name}: float32 differs from float64 by {error:.1e}"
    return arrays


def run(network_cls, width, draw=0, dtype=torch.float32):
    """Runs a network forward, backward, and through three SGD steps.

    Returns a flat dictionary of arrays: images [N, H, W, 3], labels, weights/NAME, logits,
    maps/STAGE [N, H, W, C] (with running statistics); train_logits, gradients/NAME (with batch
    statistics); after/NAME, the running statistics after the steps.
    """
    torch.manual_seed(draw)
    network = network_cls(width)
    randomize(network, draw)
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    labels = torch.randint(0, 10, (BATCH,))
    arrays = {"images": nhwc(images), "labels": labels.numpy()}
    arrays |= named("weights", floats(network.state_dict()))
    network, images = network.to(dtype), images.to(dtype)

    network.eval()
    with torch.no_grad():
        arrays["logits"] = network(images).numpy()
        maps = network.maps(images)
    arrays |= {f"maps/{stage}": nhwc(x) for stage, x in maps.items()}

    network.train()
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = network(images)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        if step == 0:
            arrays["train_logits"] = logits.detach().numpy().copy()
            gradients = {name: p.grad for name, p in network.named_parameters()}
            arrays |= named("gradients", floats(gradients))
        optimizer.step()
    after = {name: x for name, x in network.state_dict().items() if "running" in name}
    return arrays | named("after", floats(after))


def relative_error(value, expected):
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def floats(tensors):
    return {n: x.detach().numpy().copy() for n, x in tensors.items() if x.is_floating_point()}


def named(prefix, arrays):
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def nhwc(tensor):
    return np.ascontiguousarray(tensor.numpy().transpose(0, 2, 3, 1))


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    for name, (network_cls, width) in REDUCED.items():
        path = FIXTURES / f"{name}.npz"
        np.savez_compressed(path, **record(network_cls, width))
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
