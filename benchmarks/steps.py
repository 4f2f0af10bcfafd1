"""Training and inference steps to benchmark: of this package, of Flax and of PyTorch."""

import os
import statistics
import time


def make(network, depth, size, side, train, dtype="float32", compiled=False):
    """(a function that runs one step and waits for it, images per step)."""
    if network == "torch":
        return torch_step(depth, size, side, train, dtype, compiled), size
    return jax_step(network, depth, size, side, train, dtype), size


def rate(step, images, seconds):
    """Images/s: the median of the steps that fit into `seconds`, at least three."""
    step(), step()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return images / statistics.median(times)


def jax_model(network, depth, dtype):
    import straightforward

    import resnet_jax as rj

    made = {
        ("ours", 50): rj.ResNet50,
        ("ours", 20): rj.ResNet20,
        ("flax", 50): straightforward.resnet50,
        ("flax", 20): straightforward.resnet20,
    }
    return made[network, depth](dtype=dtype)


def make_training(model, axis_name=None):
    """SGD with momentum: (init(key, images), step(state, images, labels)).

    With `axis_name`, the step is that of one device, and averages gradients and statistics.
    """
    import jax
    import optax

    optimizer = optax.sgd(0.1, momentum=0.9)

    def init(key, images):
        variables = model.init(key, images[:1], train=False)
        return variables, optimizer.init(variables["params"])

    def step(state, images, labels):
        variables, opt_state = state

        def loss_of(params):
            logits, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updates

        gradients, updates = jax.grad(loss_of, has_aux=True)(variables["params"])
        if axis_name:
            gradients, updates = jax.lax.pmean((gradients, updates), axis_name)
        changes, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updates}, opt_state

    return init, step


def jax_step(network, depth, size, side, train, dtype="float32"):
    import jax
    import numpy as np

    model = jax_model(network, depth, jax.numpy.dtype(dtype))
    rng = np.random.default_rng(0)
    images = jax.device_put(rng.normal(size=(size, side, side, 3)).astype(dtype))
    labels = jax.device_put(rng.integers(0, 10, size))
    init, update = make_training(model)
    state = jax.jit(init)(jax.random.key(0), images)
    if not train:
        variables = state[0]
        infer = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
        return lambda: infer(variables, images).block_until_ready()

    update = jax.jit(update, donate_argnums=0)

    def step():
        nonlocal state
        state = update(state, images, labels)
        jax.block_until_ready(state)

    return step


def torch_step(depth, size, side, train, dtype="float32", compiled=False):
    """A step with channels_last, and automatic mixed precision for types other than float32."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    model = torch_network(depth).to(device, memory_format=torch.channels_last)
    images = torch.randn(size, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (size,), device=device)
    mixed = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")
    run = torch.compile(model, mode="max-autotune") if compiled else model
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if not train:
        model.eval()

        def infer():
            with torch.inference_mode(), mixed:
                run(images)
            wait()

        return infer

    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        with mixed:
            loss = functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        wait()

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
