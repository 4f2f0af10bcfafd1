"""Records what other frameworks compute for tiny networks.

    python -m tests.weights.record_foreign

Needs torch, timm, transformers, keras with h5py, and jax-resnet (pip install jax-resnet==0.0.4 or
its repository), none of which the tests need.
"""

import functools
import json
import os
import tempfile

os.environ["KERAS_BACKEND"] = "jax"

import flax
import h5py
import jax
import jax_resnet
import keras
import numpy as np
import timm
import torch
import transformers
from keras.src.applications import resnet as keras_resnet
from torch import nn

from tests.weights.foreign_nets import FIXTURE, images, numbers

jax.config.update("jax_default_matmul_precision", "highest")


def main():
    """Writes the fixture."""
    networks = {
        "transformers bottleneck": transformers_net("bottleneck", (32, 64)),
        "transformers basic": transformers_net("basic", (16, 32)),
        "Big Transfer": bit(),
        "WideResNet-pytorch": wide(),
        "Keras": keras_net("net.h5"),
        "Keras 3": keras_net("net.weights.h5"),
        "jax-resnet 18": jax_net(jax_resnet.ResNet18),
        "jax-resnet 50": jax_net(jax_resnet.ResNet50),
        "jax-resnet D50": jax_net(jax_resnet.ResNetD50),
        "jax-resnet ResNeXt": jax_net(
            jax_resnet.ResNet50,
            block_cls=functools.partial(jax_resnet.ResNetBottleneckBlock, groups=8, base_width=16),
        ),
    }
    entries = []
    for name, (shapes, logits) in networks.items():
        shapes = {key: list(shapes[key]) for key in sorted(shapes)}
        logits = np.asarray(logits).round(6).tolist()
        entries.append(f"{json.dumps(name)}: {json.dumps({'shapes': shapes, 'logits': logits})}")
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def logits_of(network):
    """Of a PyTorch network."""
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(images().transpose(0, 3, 1, 2)))
    return getattr(logits, "logits", logits).numpy()


def fill(network):
    """Gives a PyTorch network its numbers: their shapes."""
    state = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    values = {name: torch.from_numpy(value) for name, value in numbers(shapes).items()}
    network.load_state_dict(values, strict=False)
    return shapes


def transformers_net(kind, sizes):
    """ResNet of Hugging Face transformers."""
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=list(sizes), depths=[2, 1], layer_type=kind, num_labels=5
    )
    network = transformers.ResNetForImageClassification(config)
    return fill(network), logits_of(network)


def bit():
    """Big Transfer's names, as timm reads them from .npz files."""
    network = timm.models.resnetv2.ResNetV2(
        layers=[1, 2],
        channels=[128, 256],
        stem_chs=32,
        num_classes=5,
        stem_type="fixed",
        conv_layer=functools.partial(timm.layers.StdConv2d, eps=1e-8),
    )
    shapes = {}
    for name, value in network.state_dict().items():
        shape = tuple(value.shape)
        shapes[_bit_name(name)] = (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else shape
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/bit.npz", **numbers(shapes))
        network.load_pretrained(f"{folder}/bit.npz", prefix="resnet/")
    return shapes, logits_of(network)


def _bit_name(name):
    leaf = {"weight": "gamma", "bias": "beta"}[name.rpartition(".")[2]]
    match name.split("."):
        case ["stem", *_]:
            return "resnet/root_block/standardized_conv2d/kernel"
        case ["norm", _]:
            return f"resnet/group_norm/{leaf}"
        case ["head", _, leaf]:
            return f"resnet/head/conv2d/{'kernel' if leaf == 'weight' else 'bias'}"
        case ["stages", stage, _, block, layer, *_]:
            unit = f"resnet/block{int(stage) + 1}/unit{int(block) + 1:02d}"
            if layer == "downsample":
                return f"{unit}/a/proj/standardized_conv2d/kernel"
            inside = "abc"[int(layer[-1]) - 1]
            conv = layer.startswith("conv")
            end = "standardized_conv2d/kernel" if conv else f"group_norm/{leaf}"
            return f"{unit}/{inside}/{end}"
    raise ValueError(name)


class _WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        activated = self.bn1(x).relu()
        shortcut = self.convShortcut(activated) if hasattr(self, "convShortcut") else x
        return shortcut + self.conv2(self.bn2(self.conv1(activated)).relu())


class _Wide(nn.Module):
    """The network of xternalz/WideResNet-pytorch, depth 16."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        widths = (8, 16, 32, 64)
        for number in (1, 2, 3):
            stage = nn.Module()
            inputs, outputs, stride = widths[number - 1], widths[number], 1 + (number > 1)
            stage.layer = nn.Sequential(
                _WideBlock(inputs, outputs, stride), _WideBlock(outputs, outputs, 1)
            )
            setattr(self, f"block{number}", stage)
        self.bn1, self.fc = nn.BatchNorm2d(64), nn.Linear(64, 5)

    def forward(self, x):
        x = self.conv1(x)
        for stage in (self.block1, self.block2, self.block3):
            x = stage.layer(x)
        return self.fc(self.bn1(x).relu().mean((2, 3)))


def wide():
    """A wide ResNet for CIFAR."""
    network = _Wide()
    return fill(network), logits_of(network)


def keras_net(name):
    """ResNet of keras.applications, by a file of that name; images blue first."""
    keras.backend.clear_session()

    def stages(x):
        x = keras_resnet.stack_residual_blocks_v1(x, 32, 2, stride1=1, name="conv2")
        return keras_resnet.stack_residual_blocks_v1(x, 48, 2, name="conv3")

    network = keras_resnet.ResNet(
        stages,
        preact=False,
        use_bias=True,
        weights=None,
        classes=5,
        input_shape=(48, 48, 3),
        weights_name="none",
        classifier_activation=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{name}"
        network.save_weights(path) if "weights" in name else network.save(path)
        shapes = {}
        with h5py.File(path, "r+") as file:
            file.visititems(lambda key, x: shapes.update({key: x.shape}) if _is_data(x) else None)
            for key, value in numbers(shapes).items():
                file[key][...] = value
        network.load_weights(path)
    return shapes, network(images()[..., ::-1])


def _is_data(item):
    return isinstance(item, h5py.Dataset)


def jax_net(network_cls, **fields):
    """A network of jax-resnet."""
    network = network_cls(n_classes=5, stage_sizes=(2, 1), hidden_sizes=(32, 64), **fields)
    variables = jax.eval_shape(network.init, jax.random.key(0), images())
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    shapes = {name: leaf.shape for name, leaf in flat.items()}
    variables = flax.traverse_util.unflatten_dict(numbers(shapes), sep="/")
    return shapes, jax.jit(network.apply)(variables, images())


if __name__ == "__main__":
    main()
