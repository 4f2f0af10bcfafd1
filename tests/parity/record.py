"""Records what a PyTorch network computes; needs PyTorch.

`python -m tests.parity.record` writes the fixtures that tests/parity/test_pytorch.py reads. They
were made with PyTorch 2.13.0 on a CPU.
"""

import pathlib

import numpy as np
import torch

from tests.parity.networks import ReviewResNet, TorchvisionResNet18
from tests.parity.settings import LEARNING_RATE, MOMENTUM, STEPS, WEIGHT_DECAY

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
# The norms that end a residual function. Small scales keep the networks near the identity, as
# training does; otherwise depth amplifies rounding until PyTorch no longer agrees with itself.
LAST_SCALES = ("residual_function.7.weight", "bn2.weight")
# How closely float32 and float64 must agree for a point to be recorded.
AGREEMENT = {"gradients": 1e-4, "after": 1e-5}
NOISE = (0.0, 2e-6, 2e-6, 2e-6)
# At full width so many inputs are near 0 that only a narrower margin is ever met.
NOISE_AT_FULL_WIDTH = (0.0, 5e-7)
# Width 4 and 8 instead of 64: a few hundred kilobytes of weights each.
REDUCED = {"review_resnet50": (ReviewResNet, 4), "torchvision_resnet18": (TorchvisionResNet18, 8)}


def randomize(network, seed=0):
    """Gives norms random scales, biases and statistics, so that each of them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_mean") or (tensor.ndim == 1 and name.endswith("bias")):
                tensor.normal_(0, 0.1, generator=generator)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.0, generator=generator)
                if name.endswith(LAST_SCALES):
                    tensor.mul_(0.2)


def record(network_cls, width, batch=8, side=64, noise=NOISE):
    """What a network computes at a point where float32 defines its gradient.

    A ReLU's input within rounding of 0 makes a gradient a matter of luck: PyTorch in float32
    then differs from itself in float64 by a percent. So images are drawn until float32, float64,
    and float64 with images changed in the last digits of float32 agree.
    """
    for seed in range(200):
        arrays = run(network_cls, width, batch, side, seed, torch.float32)
        others = [run(network_cls, width, batch, side, seed, torch.float64, x) for x in noise]
        if all(
            relative_error(arrays[name], other[name]) < agreement
            for kind, agreement in AGREEMENT.items()
            for name in arrays
            if name.startswith(kind)
            for other in others
        ):
            return arrays
    raise RuntimeError(f"no well-conditioned images for {network_cls.__name__}")


def run(network_cls, width, batch, side, seed, dtype, noise=0.0):
    """Runs a network forward, backward, and through three SGD steps.

    Returns a flat dictionary of arrays: images [N, H, W, 3], labels, weights/NAME, logits,
    maps/STAGE [N, H, W, C] (with running statistics); train_logits, gradients/NAME (with batch
    statistics); after/NAME, the running statistics after the steps.
    """
    torch.manual_seed(seed)
    network = network_cls(width)
    randomize(network, seed)
    images = torch.randn(batch, 3, side, side)
    labels = torch.randint(0, 10, (batch,))
    arrays = {"images": nhwc(images), "labels": labels.numpy()}
    arrays |= named("weights", floats(network.state_dict()))
    network, images = network.to(dtype), images.to(dtype)
    images *= 1 + noise * torch.randn(images.shape, dtype=dtype)

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
