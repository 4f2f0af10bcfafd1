"""An ONNX graph under construction, and the layers of a network as its nodes.

While a network is traced, each call of a layer is recorded as one operation, "layer", which carries
the function that adds its node.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

from resnet_jax.models.layers import Conv, standardize_kernel
from resnet_jax.models.norms import BatchNorm, GroupNorm

NCHW = (0, 3, 1, 2)  # the NHWC axis at each place
OPSET = 21  # the first with per-channel GroupNormalization


class Tensor(NamedTuple):
    """A value that the graph computes; other values are constants, NumPy arrays."""

    name: str


Value = Any  # a Tensor, or an array in JAX's layout


class Window(NamedTuple):
    """A window over the pixels of a tensor."""

    images: str  # name of the tensor
    sides: tuple[int, int]  # its height and width
    attributes: dict[str, Any]  # of an ONNX node


class Graph:
    """Nodes and constants of an ONNX graph under construction.

    Example:
      >>> graph = Graph()
      >>> graph.add("Relu", "x"), graph.nodes[0].op_type
      ('Relu_0', 'Relu')
    """

    def __init__(self, opset: int = OPSET) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.sums: dict[str, tuple[str, int]] = {}  # sums over all pixels -> (images, pixels)
        self.window_sums: dict[str, Window] = {}
        self._numbers = itertools.count()

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Adds a node with one output; returns the output's name."""
        name = name or f"{operator}_{next(self._numbers)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def constant(self, array: Any, name: str = "") -> str:
        """Adds a constant; returns its name."""
        name = name or f"constant_{next(self._numbers)}"
        # Not ascontiguousarray, which makes a vector of a scalar.
        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def finish(self, result: str, name: str) -> None:
        """Names the result, and drops nodes and constants that it does not depend on."""
        wanted, kept = {result}, []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                wanted |= set(node.input)
                kept.append(node)
        for node in kept:
            for names in (node.input, node.output):
                names[:] = [name if each == result else each for each in names]
        self.nodes = kept[::-1]
        self.constants = [each for each in self.constants if each.name in wanted]

    def name_of(self, value: Value) -> str:
        """The name of a value; an array becomes a constant in ONNX's layout."""
        if isinstance(value, Tensor):
            return value.name
        return self.constant(value.transpose(NCHW) if value.ndim == 4 else value)


# Adds a layer's node for an input; returns the output's name.
_Emit = Callable[[Graph, str], str]

_layer = core.Primitive("layer")
_layer.def_abstract_eval(
    lambda x, *, emit, shape: jax.core.ShapedArray(shape, jnp.float32)  # x's type is float32 too
)


def record_layer(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Records a layer's call as one operation, for `nn.intercept_methods` while tracing."""
    module, make = context.module, _LAYERS.get(type(context.module))
    if make is None or context.method_name != "__call__":
        return call(*args, **kwargs)
    leaves = {
        name: np.asarray(leaf)
        for collection in module.variables.values()
        for name, leaf in collection.items()
    }
    x = args[0]
    emit, shape = make(module, leaves, x.shape)
    return _layer.bind(x, emit=emit, shape=shape)


def _conv(module: Conv, leaves: Mapping[str, np.ndarray], shape: Any) -> tuple[_Emit, Any]:
    kernel = leaves["kernel"]
    if module.standardize:
        with jax.ensure_compile_time_eval():
            kernel = np.asarray(standardize_kernel(jnp.asarray(kernel)))
    padding = module.dilation * (module.kernel_size - 1) // 2

    def emit(graph: Graph, x: str) -> str:
        name = "/".join(module.path)
        return graph.add(
            "Conv",
            x,
            graph.constant(kernel.transpose(3, 2, 0, 1), f"{name}/kernel"),
            name=name,
            kernel_shape=kernel.shape[:2],
            strides=[module.stride] * 2,
            dilations=[module.dilation] * 2,
            pads=[padding] * 4,
            group=module.groups,
        )

    sides = [-(-side // module.stride) for side in shape[1:3]]
    return emit, (shape[0], *sides, module.features)


def _batch_norm(module: BatchNorm, leaves: Mapping[str, Any], shape: Any) -> tuple[_Emit, Any]:
    def emit(graph: Graph, x: str) -> str:
        name = "/".join(module.path)
        if "factor" in leaves:  # folded, but not into a convolution
            return _scale_and_shift(graph, x, name, leaves["factor"], leaves["bias"])
        if "scale" not in leaves:  # folded into a convolution, which gets the bias too
            node = next(node for node in graph.nodes if node.output[0] == x)
            node.input.append(graph.constant(leaves["bias"], f"{name}/bias"))
            return x
        inputs = [
            graph.constant(leaves[leaf], f"{name}/{leaf}")
            for leaf in ("scale", "bias", "mean", "var")
        ]
        return graph.add("BatchNormalization", x, *inputs, name=name, epsilon=module.epsilon)

    return emit, shape


def _scale_and_shift(graph: Graph, x: str, name: str, scale: np.ndarray, bias: np.ndarray) -> str:
    factor = graph.constant(scale[:, None, None], f"{name}/scale")
    constant = graph.constant(bias[:, None, None], f"{name}/bias")
    return graph.add("Add", graph.add("Mul", x, factor), constant, name=name)


def _group_norm(module: GroupNorm, leaves: Mapping[str, Any], shape: Any) -> tuple[_Emit, Any]:
    def emit(graph: Graph, x: str) -> str:
        name = "/".join(module.path)
        groups = math.gcd(32, shape[-1])
        if graph.opset < 21:  # before, scale and bias were one number per group
            return _decomposed(graph, x, name, groups)
        inputs = [graph.constant(leaves[leaf], f"{name}/{leaf}") for leaf in ("scale", "bias")]
        options = {"num_groups": groups, "epsilon": module.epsilon}
        return graph.add("GroupNormalization", x, *inputs, name=name, **options)

    def _decomposed(graph: Graph, x: str, name: str, groups: int) -> str:
        """An instance norm with a group as one channel, then scale and bias of each channel."""
        ones, zeros = (graph.constant(np.full(groups, fill, np.float32)) for fill in (1, 0))
        y = graph.add("Reshape", x, graph.constant([0, groups, -1]))
        y = graph.add("InstanceNormalization", y, ones, zeros, epsilon=module.epsilon)
        y = graph.add("Reshape", y, graph.add("Shape", x))
        return _scale_and_shift(graph, y, name, leaves["scale"], leaves["bias"])

    return emit, shape


def _dense(module: nn.Dense, leaves: Mapping[str, Any], shape: Any) -> tuple[_Emit, Any]:
    def emit(graph: Graph, x: str) -> str:
        name = "/".join(module.path)
        inputs = [graph.constant(leaves[leaf], f"{name}/{leaf}") for leaf in ("kernel", "bias")]
        return graph.add("Gemm", x, *inputs, name=name)

    return emit, (shape[0], module.features)


_LAYERS: dict[type, Callable[..., tuple[_Emit, Any]]] = {
    Conv: _conv,
    BatchNorm: _batch_norm,
    GroupNorm: _group_norm,
    nn.Dense: _dense,
}
