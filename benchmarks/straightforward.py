"""A straightforward ResNet of flax.linen's own layers, as the baseline of benchmarks."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class Block(nn.Module):
    width: int
    stride: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, not train, momentum=0.9, dtype=self.dtype)
        strides = (self.stride, self.stride)
        if self.bottleneck:
            y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
            y = nn.relu(norm()(conv(self.width, (3, 3), strides, padding=1)(y)))
            y = norm()(conv(4 * self.width, (1, 1))(y))
        else:
            y = nn.relu(norm()(conv(self.width, (3, 3), strides, padding=1)(x)))
            y = norm()(conv(self.width, (3, 3), padding=1)(y))
        if x.shape != y.shape:
            x = norm()(conv(y.shape[-1], (1, 1), strides)(x))
        return nn.relu(x + y)


class Network(nn.Module):
    stage_sizes: tuple[int, ...]
    stage_widths: tuple[int, ...]
    bottleneck: bool
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, not train, momentum=0.9, dtype=self.dtype)
        if self.stage_widths[0] == 64:  # for photos
            x = nn.relu(norm()(conv(64, (7, 7), (2, 2), padding=3)(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        else:
            x = nn.relu(norm()(conv(self.stage_widths[0], (3, 3), padding=1)(x)))
        for stage, (size, width) in enumerate(
            zip(self.stage_sizes, self.stage_widths, strict=True)
        ):
            for block in range(size):
                stride = 2 if stage and not block else 1
                x = Block(width, stride, self.bottleneck, self.dtype)(x, train)
        return nn.Dense(self.num_classes)(x.mean((1, 2), dtype=jnp.float32))


def resnet18(dtype=jnp.float32):
    return Network((2, 2, 2, 2), (64, 128, 256, 512), False, 1000, dtype)


def resnet20(dtype=jnp.float32):
    return Network((3, 3, 3), (16, 32, 64), False, 10, dtype)


def resnet50(dtype=jnp.float32):
    return Network((3, 4, 6, 3), (64, 128, 256, 512), True, 1000, dtype)


def resnet152(dtype=jnp.float32):
    return Network((3, 8, 36, 3), (64, 128, 256, 512), True, 1000, dtype)
