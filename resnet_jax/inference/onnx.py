"""A network as an ONNX graph of the operators that runtimes know best.

The network is traced once. Its layers are recorded as layers, so that the graph has one `Conv`,
`BatchNormalization` or `Gemm` for each; what stands between them (ReLU, sums, pools, padding) is
translated operation by operation, whatever block it comes from. Activations are NCHW in the graph,
as ONNX has them; images come in as everywhere here, uint8 NHWC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend import core
from onnx import TensorProto, helper

from resnet_jax.errors import ExportError
from resnet_jax.inference.onnx_layers import NCHW, Graph, Tensor, Value, record_layer
from resnet_jax.output import json_text

OPSET = 21  # the first with per-channel GroupNormalization
IR_VERSION = 10  # the file format that belongs to it; onnx itself would write its newest


def write_onnx(
    predict: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    image_shape: Sequence[int],
    metadata: Mapping[str, Any],
    path: Path,
) -> None:
    """Writes the graph.

    Args:
      predict: (variables, uint8 images [N, S, S, C]) -> logits [N, num_classes].
      variables: Its first argument, NumPy arrays.
      image_shape: (S, S, C); N stays open.
      metadata: Kept in the file, each value as JSON.
      path: Where the graph goes.

    Raises:
      ExportError: The network has an operation that this translation does not know.
    """
    # Two images stand for any number: nothing below looks at the first axis.
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.uint8)
    with nn.intercept_methods(record_layer):
        traced = jax.make_jaxpr(lambda images: predict(variables, images))(images)
    graph = Graph()
    (logits,) = _translate(graph, traced.jaxpr, traced.consts, [Tensor("images")])
    classes = traced.out_avals[0].shape[1]
    graph.nodes[-1].output[0] = "logits"  # made by the last node, the head
    if not isinstance(logits, Tensor):
        raise ExportError("the network's logits do not depend on the images")
    nodes = _used(graph.nodes)
    read = {name for node in nodes for name in node.input}
    proto = helper.make_graph(
        nodes,
        "resnet_jax",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *image_shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [constant for constant in graph.constants if constant.name in read],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(proto, opset_imports=opsets, producer_name="resnet_jax")
    model.ir_version = IR_VERSION
    helper.set_model_props(model, {key: json_text(value) for key, value in metadata.items()})
    onnx.save(model, path)
    onnx.checker.check_model(path, full_check=True)


def run_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    """Runs a graph with onnxruntime.

    Args:
      path: What `write_onnx` wrote.
      images: uint8 [N, S, S, C].

    Returns:
      Logits [N, num_classes].
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


def _used(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that the logits depend on."""
    wanted, kept = {"logits"}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


# What stands between the layers, by JAX's name of the operation.


def _translate(
    graph: Graph, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Value]
) -> list[Value]:
    """Adds a traced function to the graph; returns its results."""
    values: dict[Any, Value] = dict(zip(jaxpr.constvars, map(np.asarray, constants)))
    values |= zip(jaxpr.invars, inputs)

    def read(variable: Any) -> Value:
        is_literal = isinstance(variable, core.Literal)
        return np.asarray(variable.val) if is_literal else values[variable]

    for equation in jaxpr.eqns:
        arguments = [read(variable) for variable in equation.invars]
        values |= zip(equation.outvars, _translate_one(graph, equation, arguments))
    return [read(variable) for variable in jaxpr.outvars]


def _translate_one(graph: Graph, equation: Any, arguments: list[Value]) -> list[Value]:
    primitive, params = equation.primitive, equation.params
    inner = params.get("call_jaxpr", params.get("jaxpr"))
    if inner is not None and primitive.name != "reduce_window":  # a function called by its name
        jaxpr, constants = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
        return _translate(graph, jaxpr, constants, arguments)
    if not any(isinstance(each, Tensor) for each in arguments):
        results = primitive.bind(*map(jnp.asarray, arguments), **params)
        return [np.asarray(each) for each in (results if primitive.multiple_results else [results])]
    if primitive.name not in _OPERATIONS:
        raise ExportError(
            f"the network has the operation {primitive.name!r}, which the ONNX export does not know"
        )
    shape = equation.invars[0].aval.shape
    return [Tensor(_OPERATIONS[primitive.name](graph, arguments, shape, params))]


def _binary(operator: str) -> Callable[..., str]:
    def add(graph: Graph, arguments: Sequence[Value], shape: Any, params: Any) -> str:
        del shape, params
        return graph.add(operator, *map(graph.name_of, arguments))

    return add


def _max(graph: Graph, arguments: Sequence[Value], shape: Any, params: Any) -> str:
    x, bound = arguments
    if isinstance(bound, np.ndarray) and not bound.any():
        return graph.add("Relu", x.name)
    return _binary("Max")(graph, arguments, shape, params)


def _div(graph: Graph, arguments: Sequence[Value], shape: Any, params: Any) -> str:
    x, divisor = arguments
    images, count = graph.sums.get(getattr(x, "name", ""), ("", 0))
    if count and isinstance(divisor, np.ndarray) and (divisor == count).all():  # a mean
        return graph.add("Flatten", graph.add("GlobalAveragePool", images))
    return _binary("Div")(graph, arguments, shape, params)


def _cast(graph: Graph, arguments: Sequence[Value], shape: Any, params: Any) -> str:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(params["new_dtype"]))
    name = graph.add("Cast", arguments[0].name, to=dtype)
    # The images are the only input, and the only thing that is not float32 already.
    return graph.add("Transpose", name, perm=NCHW) if arguments[0].name == "images" else name


def _sum(graph: Graph, arguments: Sequence[Value], shape: Any, params: Any) -> str:
    _require(len(shape) == 4 and tuple(params["axes"]) == (1, 2), "a sum but over all pixels")
    (x,) = arguments
    name = graph.add("ReduceSum", x.name, graph.constant([2, 3]), keepdims=0)
    graph.sums[name] = x.name, shape[1] * shape[2]
    return name


def _broadcast(graph: Graph, arguments: Sequence[Value], shape: Any, params: Any) -> str:
    as_gate = params["shape"] == (shape[0], 1, 1, shape[-1])
    as_gate = as_gate and tuple(params["broadcast_dimensions"]) == (0, 3)
    _require(as_gate, "a broadcast but of [N, C] to [N, 1, 1, C]")
    return graph.add("Unsqueeze", arguments[0].name, graph.constant([2, 3]))


def _pad(graph: Graph, arguments: Sequence[Value], shape: Any, params: Any) -> str:
    x, value = arguments
    config = [params["padding_config"][axis] for axis in NCHW[: len(shape)]]
    _require(len(shape) == 4 and not any(between for *_, between in config), "this padding")
    pads = np.array([[before, after] for before, after, _ in config], np.int64).T.ravel()
    return graph.add("Pad", x.name, graph.constant(pads), graph.name_of(value))


def _slice(graph: Graph, arguments: Sequence[Value], shape: Any, params: Any) -> str:
    strides = params["strides"] or (1,) * len(shape)
    parts = zip(params["start_indices"], params["limit_indices"], strides, shape)
    cut = [(axis, part) for axis, part in enumerate(parts) if part != (0, part[3], 1, part[3])]
    _require(len(shape) == 4 and all(axis for axis, _ in cut), "this slice")
    columns = zip(*((*part[:2], NCHW.index(axis), part[2]) for axis, part in cut))
    return graph.add("Slice", arguments[0].name, *(graph.constant(list(each)) for each in columns))


def _window(params: Any) -> dict[str, Any]:
    """A window over the pixels as ONNX's attributes."""
    pads = params["padding"][1:3]
    return {
        "kernel_shape": params["window_dimensions"][1:3],
        "strides": params["window_strides"][1:3],
        "dilations": params["window_dilation"][1:3],
        "pads": [before for before, _ in pads] + [after for _, after in pads],
    }


def _max_pool(graph: Graph, arguments: Sequence[Value], shape: Any, params: Any) -> str:
    return graph.add("MaxPool", arguments[0].name, **_window(params))


def _window_sum(graph: Graph, arguments: Sequence[Value], shape: Any, params: Any) -> str:
    window = _window(params)
    mean = graph.add("AveragePool", arguments[0].name, count_include_pad=1, **window)
    return graph.add("Mul", mean, graph.constant(np.float32(math.prod(window["kernel_shape"]))))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ExportError(f"the network has {what}, which the ONNX export does not know")


_OPERATIONS: dict[str, Callable[..., str]] = {
    "layer": lambda graph, arguments, shape, params: params["emit"](graph, arguments[0].name),
    "add": _binary("Add"),
    "sub": _binary("Sub"),
    "mul": _binary("Mul"),
    "div": _div,
    "max": _max,
    "logistic": lambda graph, arguments, *_: graph.add("Sigmoid", arguments[0].name),
    "convert_element_type": _cast,
    "reduce_sum": _sum,
    "broadcast_in_dim": _broadcast,
    "pad": _pad,
    "slice": _slice,
    "reduce_window_max": _max_pool,
    "reduce_window_sum": _window_sum,
}
