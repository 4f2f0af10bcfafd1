"""Training and inference steps to benchmark: of this package, of Flax and of PyTorch.

Networks: `ours`; `folded`, ours with its batch norms folded (inference only); `trainer`, a recipe's
whole step with augmentation (training only); `flax`, straightforward.py; `torch`, torchvision's.
"""

import contextlib
import functools
import os
import pathlib
import runpy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
RECIPES = {8: "cifar10_speedrun", 20: "cifar"}  # by depth; others: imagenet_torchvision_v2
PER_CALL = 25  # steps that the trainer takes in one call, for small images (on a CPU one)


class Step(NamedTuple):
    """A step whose program is compiled and has run. `wait` takes what `run` returns."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    images: int  # in a call of `run`
    steps: int = 1  # in a call of `run`

    def seconds(self):
        """Seconds of a call that is awaited."""
        start = time.perf_counter()
        self.wait(self.run())
        return time.perf_counter() - start


def awaited(step, seconds):
    """Seconds of each call, where the next starts when the last has ended."""
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        times.append(step.seconds())
    return times


def pipelined(step, calls):
    """Seconds per call of several that are started without waiting, as the trainer does."""
    start = time.perf_counter()
    for _ in range(calls):
        result = step.run()
    step.wait(result)
    return (time.perf_counter() - start) / calls


def jax_model(network, depth, dtype):
    import straightforward

    import resnet_jax as rj

    if network == "flax":
        return getattr(straightforward, f"resnet{depth}")(dtype=dtype)
    return rj.create_model("resnet8_cifar" if depth == 8 else f"resnet{depth}", dtype=dtype)


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


def jax_step(network, depth, size, side, train, dtype="float32", alone=contextlib.nullcontext):
    """A step of a Flax network on a batch in device memory; XLA compiles inside `alone()`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    if network == "trainer":
        return trainer_step(depth, size, side, dtype, alone)
    model = jax_model(network, depth, jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(size, side, side, 3)).astype(jnp.dtype(dtype))
    labels = rng.integers(0, 10, size).astype(np.int32)
    init, update = make_training(model)
    state = random_values(jax.eval_shape(init, jax.random.key(0), images), rng)
    if network == "folded":
        return folded_step(model, state[0], images, alone)
    if not train:
        variables, images = jax.device_put((state[0], images))
        infer = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
        lowered = infer.lower(variables, images)
        with alone():
            program = lowered.compile()
            jax.block_until_ready(program(variables, images))
        return Step(lambda: program(variables, images), jax.block_until_ready, size)

    state, images, labels = jax.device_put((state, images, labels))
    lowered = jax.jit(update, donate_argnums=0).lower(state, images, labels)
    with alone():
        program = lowered.compile()
        state = jax.block_until_ready(program(state, images, labels))

    def run():
        nonlocal state
        state = program(state, images, labels)
        return jax.tree.leaves(state)[0]  # ready when the program has ended, as all others are

    return Step(run, jax.block_until_ready, size)


def folded_step(model, variables, images, alone):
    """What predict runs: batch norms folded, and weights that lie as the program reads them."""
    import jax

    from resnet_jax import fold_batch_norm
    from resnet_jax.distributed import data_parallel

    model, variables = fold_batch_norm(model, variables)

    def infer(variables, images):
        return model.apply(variables, images, train=False)

    batch = data_parallel.shard_batch(images)
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    with alone():
        program = data_parallel.compile_outputs(infer, variables, shape)
        jax.block_until_ready(program(batch))
    return Step(lambda: program(batch), jax.block_until_ready, len(images))


def random_values(shapes, rng):
    """Variables as they are initialized, without a program to compile; optimizer states are 0."""
    import jax
    import numpy as np

    def value(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "kernel":
            deviation = np.sqrt(2 / np.prod(shape[:-1]))
            return (deviation * rng.standard_normal(shape, np.float32)).astype(leaf.dtype)
        return np.full(shape, name in ("scale", "var"), leaf.dtype)

    variables, opt_state = shapes
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), opt_state)
    return jax.tree_util.tree_map_with_path(value, variables), zeros


def trainer_step(depth, size, side, dtype, alone=contextlib.nullcontext):
    """The step of a recipe on uint8 images; for small images a call takes several steps."""
    import jax
    import numpy as np

    from resnet_jax.config.model import make_model
    from resnet_jax.data.pipeline import IndexSampler, InMemoryDataset
    from resnet_jax.distributed import data_parallel
    from resnet_jax.training.optimizer import RunLength, make_optimizer
    from resnet_jax.training.state import create_state
    from resnet_jax.training.step import make_train_step
    from resnet_jax.training.step_program import StepProgram

    small = depth in RECIPES
    per_call = PER_CALL if small and jax.default_backend() != "cpu" else 1
    recipe = CONFIGS / f"{RECIPES.get(depth, 'imagenet_torchvision_v2')}.py"
    config = runpy.run_path(str(recipe))["get_config"](*(() if small else (f"resnet{depth}",)))
    config.data.image_size, config.model.dtype = side, dtype
    config.train.batch_size, config.train.steps_per_call = size, per_call

    rng = np.random.default_rng(0)
    count, classes = (50_000, 10) if small else (2 * size, 1_000)
    images = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    data = InMemoryDataset(images, rng.integers(0, classes, count).astype(np.int32))
    length = RunLength.of(config, 50_000 if small else 1_281_167)
    model = make_model(config, classes)
    optimizer = make_optimizer(config, length)
    program = StepProgram(
        make_train_step(model, optimizer, config, length),
        config,
        data,
        IndexSampler(count, seed=0),
    )
    one = np.zeros((1, side, side, 3), np.float32)
    init = functools.partial(model.init, train=False)
    variables, _ = random_values((jax.eval_shape(init, jax.random.key(0), one), {}), rng)
    batches = program.batches(0, per_call)
    _, batch = next(batches)
    batches.close()
    with alone():
        state = create_state(model, optimizer, config, 3, variables)
        state, _ = program(data_parallel.replicate(state), batch)
        state, _ = jax.block_until_ready(program(state, batch))

    def run():
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    return Step(run, jax.block_until_ready, size * per_call, per_call)


def torch_step(
    network,
    depth,
    size,
    side,
    train,
    dtype="float32",
    compiled=False,
    alone=contextlib.nullcontext,
):
    """A step with channels_last, and automatic mixed precision for types other than float32.

    `network` is torch (torch.compile(mode="max-autotune") if `compiled`), torch-default
    (torch.compile's default mode), torch-freezing (max-autotune with the weights as constants, for
    inference) or timm (max-autotune). What chooses kernels by their time runs inside `alone()`.
    """
    import torch
    from torch.nn import functional

    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    kind = getattr(torch, dtype)
    model = torch_network(network, depth).to(device, memory_format=torch.channels_last)
    model.train(train)
    images = torch.randn(size, 3, side, side, device=device, dtype=kind)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (size,), device=device)
    mixed = torch.autocast(device, kind, enabled=dtype != "float32")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=device == "cuda")

    def step(network):
        if not train:
            with torch.inference_mode(), mixed:
                return network(images)
        optimizer.zero_grad()
        with mixed:
            loss = functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    def wait(_=None):
        if device == "cuda":
            torch.cuda.synchronize()

    frozen = contextlib.nullcontext()
    if compiled:
        if device == "cuda":
            with alone():  # cuDNN chooses convolutions, and remembers its choice
                step(model), wait()
            torch.cuda.empty_cache()
            isolate_autotuning(alone)
        if network == "torch-freezing":
            import torch._inductor.config as inductor

            frozen = inductor.patch(freezing=True)
        mode = "default" if network == "torch-default" else "max-autotune"
        model = torch.compile(model, mode=mode, dynamic=False, fullgraph=True)
    with frozen:
        for _ in range(3 if compiled else 1):
            step(model), wait()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return Step(lambda: step(model), wait, size)


def isolate_autotuning(alone):
    """Lets PyTorch's compiler measure kernels inside `alone()` only, and compile at any time."""
    from torch._inductor.runtime import benchmarking

    if hasattr(benchmarking, "set_gpu_benchmark_lock_context"):  # newer PyTorch
        benchmarking.set_gpu_benchmark_lock_context(alone)
        return

    def isolated(measure):
        @functools.wraps(measure)
        def call(*arguments, **options):
            with alone():
                return measure(*arguments, **options)

        return call

    for owner in vars(benchmarking).values():
        if isinstance(owner, type) and "benchmark_gpu" in vars(owner):
            owner.benchmark_gpu = isolated(owner.benchmark_gpu)


def torch_network(network, depth):
    if network == "timm":
        import timm

        return timm.create_model(f"resnet{depth}")

    import torchvision
    from torch import nn
    from torchvision.models.resnet import BasicBlock, ResNet

    if depth != 20:
        return getattr(torchvision.models, f"resnet{depth}")()

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
