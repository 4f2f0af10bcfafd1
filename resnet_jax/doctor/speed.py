"""Checks that compute: whether the device is correct and fast, and whether training runs."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnet_jax.config.schema import Config, Data, Model, Train
from resnet_jax.distributed import data_parallel
from resnet_jax.distributed.accelerators import find_accelerator
from resnet_jax.doctor.devices import cuda_capability
from resnet_jax.doctor.findings import OK, PROBLEM, WARNING, Finding, duration, plural, size
from resnet_jax.doctor.reasons import explain
from resnet_jax.models.registry import model_info
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.summary import training_flops

# A network that compiles in seconds and is wide enough to keep a device busy.
NETWORK = "resnet8_cifar"
# A device below this fraction of its peak is throttled, shared, or mislabeled. Large products reach
# 60 to 95% of the peak; a T4, limited to 70 W, reaches 40%.
_LEAST_SHARE = 0.3
# A device below this fraction of its fastest neighbor is too slow.
_LEAST_OF_BEST = 0.8
_LEAST_COPY = 1e9
_CLASSES = 10


def matrix_product(side: int = 8192, rounds: int = 20) -> Finding:
    """The rate of products of `side` x `side` matrices on each device of this process.

    One program computes `rounds` of them. Small products are compared with exact results.
    """
    own = jax.local_devices()
    dtype = half_type(own[0])
    if wrong := [each for each in own if not _computes_right(each, dtype)]:
        text = f"{wrong[0]} computes wrong products of small integers: do not use this device"
        return Finding(PROBLEM, text)
    rates = [_product_flops(each, dtype, side, rounds) for each in own]
    accelerator = find_accelerator(own[0].device_kind)
    return judge_product(rates, dtype.name, accelerator.flops if accelerator else None)


def judge_product(rates: list[float], dtype: str, peak: float | None) -> Finding:
    """Compares the FLOP/s of devices with their peak, if it is known, and with each other."""
    facts = {"flops": rates, "dtype": dtype, "peak": peak}
    slow = min(rates)
    text = f"{slow / 1e12:,.3g} TFLOP/s in {dtype}"
    if len(rates) > 1:
        text += f" on the slowest of {len(rates)}"
    if peak:
        text += f", {slow / peak:.0%} of the peak"
    if slow < _LEAST_OF_BEST * max(rates):
        text += (
            f"; device {rates.index(slow)} is slower than the best with {max(rates) / 1e12:,.3g}: "
            "it is throttled or shared (nvidia-smi -q -d PERFORMANCE)"
        )
        return Finding(WARNING, text, facts)
    if peak and slow < _LEAST_SHARE * peak:
        text += ": the device is throttled or shared (nvidia-smi -q -d PERFORMANCE)"
        return Finding(WARNING, text, facts)
    return Finding(OK, text, facts)


def half_type(device: Any) -> np.dtype:
    """The fast 16-bit type of a device: bfloat16, or float16 on cards before Ampere."""
    capability = cuda_capability(device)
    return jnp.dtype(jnp.float16 if capability is not None and capability < 8 else jnp.bfloat16)


def _computes_right(device: Any, dtype: np.dtype, side: int = 512) -> bool:
    """Checks a product of small integers, which is exact in any precision."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-2, 3, (side, side)).astype(np.float32) for _ in range(2))
    put = [jax.device_put(each.astype(dtype), device) for each in (a, b)]
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    return bool((np.asarray(product(*put)) == a @ b).all())


def _product_flops(device: Any, dtype: np.dtype, side: int, rounds: int) -> float:
    @jax.jit
    def chain(x: jax.Array, y: jax.Array) -> jax.Array:
        # y is scaled so that the products do not grow.
        return lax.fori_loop(0, rounds, lambda _, x: jnp.dot(x, y), x)

    def start(key: jax.Array) -> jax.Array:
        return (jax.random.normal(key, (side, side)) / math.sqrt(side)).astype(dtype)

    with jax.default_device(device):
        x, y = (jax.jit(start)(jax.random.key(seed)) for seed in (0, 1))
        seconds = _fastest(lambda: chain(x, y))
    return 2 * side**3 * rounds / seconds


def _fastest(call: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest of several calls, after one that compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def host_copy(count: int = 256 * 2**20) -> Finding:
    """The rate of copying `count` bytes from host memory to a device."""
    data = np.ones(count, np.uint8)  # pages of zeros would not be read from memory
    device = jax.local_devices()[0]
    rate = count / _fastest(lambda: jax.device_put(data, device))
    facts = {"bytes_per_second": rate}
    text = f"{rate / 1e9:.3g} GB/s from the host to a device"
    if rate < _LEAST_COPY:
        return Finding(WARNING, f"{text}, which is slow: is the host busy?", facts)
    return Finding(OK, text, facts)


def all_reduce() -> Finding | None:
    """The time of a float32 sum over all devices; None for one device.

    It has the size of ResNet-50's gradient; on CPUs, which share their cores, it is smaller.
    """
    if jax.device_count() == 1:
        return None
    count = 1_000_000 if jax.default_backend() == "cpu" else 25_600_000
    own = jax.local_device_count()
    total = jax.pmap(lambda x: lax.psum(x, "devices"), axis_name="devices")
    ones = jax.pmap(lambda _: jnp.ones(count, jnp.float32))(np.zeros(own))
    seconds = _fastest(lambda: total(ones))
    if (found := float(total(ones)[0, 0])) != jax.device_count():
        text = f"a sum of ones over {jax.device_count()} devices is {found:g}"
        return Finding(PROBLEM, f"{text}: do not train here")
    moved = 2 * 4 * count * (1 - 1 / jax.device_count())
    facts = {"seconds": seconds, "bytes": 4 * count, "bytes_per_second": moved / seconds}
    text = f"{size(4 * count)} over {plural(jax.device_count(), 'device')} in {duration(seconds)}"
    return Finding(OK, f"{text}, {moved / seconds / 1e9:.3g} GB/s a device", facts)


def training_step(half: bool, network: str = "", seconds: float = 1.0) -> Finding | None:
    """Runs training steps on random images and all devices for some seconds.

    The finding has the time to compile, the time of a step, images/s and, if the peak is known, the
    MFU. It is None for 16 bits (`half`) on a CPU, which would convert them.
    """
    network = network or NETWORK
    device = jax.local_devices()[0]
    if half and device.platform == "cpu":
        return None
    dtype = half_type(device).name if half else "float32"
    finding = _training_step(dtype, network, seconds)
    return dataclasses.replace(finding, name=f"step, {dtype}")


def _training_step(dtype: str, network: str, seconds: float) -> Finding:
    from resnet_jax.config.model import make_model

    try:
        config = _config(dtype, network)
        model = make_model(config, classes=_CLASSES)
        compiled, per_step, losses = _train(config, model, seconds)
    except Exception as error:  # whatever fails here would stop a run
        return Finding(PROBLEM, f"{network} does not train: {explain(error)}", {"dtype": dtype})
    batch = config.train.batch_size
    per_device = batch // jax.device_count()
    facts = {
        "network": network,
        "dtype": dtype,
        "batch_per_device": per_device,
        "compile_seconds": compiled,
        "step_seconds": per_step,
        "images_per_second": batch / per_step,
        "loss": losses[-1] if math.isfinite(losses[-1]) else None,  # JSON has no NaN
    }
    if not all(map(math.isfinite, losses)):
        text = f"the loss of {network} is {losses[-1]} after {len(losses)} steps"
        return Finding(PROBLEM, f"{text}: do not train here", facts)
    text = (
        f"{batch / per_step:,.0f} images/s: {network}, {per_device} images a device, "
        f"{duration(per_step)} a step, compiled in {duration(compiled)}"
    )
    accelerator = find_accelerator(jax.local_devices()[0].device_kind)
    if accelerator is not None and dtype != "float32":
        side = config.data.image_size
        flops = training_flops(model, (batch, side, side, 3))
        facts["mfu"] = flops / per_step / (accelerator.flops * jax.device_count())
        text += f", MFU {facts['mfu']:.1%}"
    return Finding(OK, text, facts)


def _config(dtype: str, network: str) -> Config:
    """The configuration for the steps, with batches that keep a device busy."""
    side = model_info(network).image_size
    on_cpu = jax.default_backend() == "cpu"
    per_device = (8 if on_cpu else 512) if side <= 64 else (2 if on_cpu else 64)
    return Config(
        model=Model(name=network, dtype=dtype),
        data=Data(image_size=side),
        train=Train(batch_size=per_device * jax.device_count()),
    )


def _train(config: Config, model: ResNet, seconds: float) -> tuple[float, float, list[float]]:
    """Returns (seconds to compile, seconds of a step, losses) of a short run."""
    from resnet_jax.training.optimizer import RunLength, make_optimizer
    from resnet_jax.training.state import create_state
    from resnet_jax.training.step import make_train_step

    length = RunLength(1_000, 100.0)
    optimizer = make_optimizer(config, length)
    step = data_parallel.parallel_step(make_train_step(model, optimizer, config, length))
    state = data_parallel.replicate(create_state(model, optimizer, config, channels=3))
    rng = np.random.default_rng(jax.process_index())
    side = config.data.image_size
    share = config.train.batch_size // jax.device_count() * jax.local_device_count()
    batch = data_parallel.shard_batch(
        {
            "images": rng.integers(0, 256, (share, side, side, 3), np.uint8),
            "labels": rng.integers(0, _CLASSES, share, np.int32),
        }
    )

    def run(steps: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
            # One step runs while the next is queued, as in training. The collectives of more would
            # use all threads of a CPU and deadlock.
            jax.block_until_ready(losses[-3:-2])
        jax.block_until_ready((state, losses[-1]))
        return time.perf_counter() - begin

    losses: list[Any] = []
    first = run(1)
    once = run(2) / 2
    steps = _same_everywhere(max(1, min(200, math.ceil(seconds / max(once, 1e-4)))))
    per_step = run(steps) / steps
    return first - per_step, per_step, [float(each) for each in losses]


def _same_everywhere(steps: int) -> int:
    """Process 0's number of steps: with different ones, processes would hang in a collective."""
    if jax.process_count() == 1:
        return steps
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(steps)))


def decode_rate(seconds: float = 0.5) -> Finding:
    """JPEGs that one core decodes and crops per second, measured for `seconds`."""
    from PIL import Image

    from resnet_jax.data.decode import train_crop

    rng = np.random.default_rng(0)
    # Blurred noise, which compresses about as well as photos.
    small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
    file = io.BytesIO()
    small.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    data, config = file.getvalue(), Data(image_size=224, crop="random_resized")
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        train_crop(data, config, 3, rng)
        count += 1
    rate = count / (time.perf_counter() - begin)
    text = f"{rate:,.0f} JPEGs/s a core (500x375 pixels, random crops of 224)"
    return Finding(OK, text, {"images_per_second_per_core": rate, "bytes": len(data)})
