"""A network as an ONNX graph of operators that every runtime has.

The network is traced once. Each layer is recorded as a whole, so that the graph has one `Conv`,
`BatchNormalization` or `Gemm` for it. Operations between layers (ReLU, sums, pools, padding) are
translated one by one, whatever block they come from. Activations in the graph are NCHW, as usual in
ONNX; its input is uint8 NHWC, as everywhere in this package.
"""

from __future__ import annotations

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

from resnet_jax.errors import ExportError, library_errors, one_line
from resnet_jax.export.image_sizes import ImageSizes
from resnet_jax.export.onnx_layers import (
    NCHW,
    OPSET,
    Graph,
    Tensor,
    Value,
    Window,
    record_layer,
)
from resnet_jax.terminal import json_text

OLDEST_OPSET = 17
MAX_EMBEDDED = 2**31 - 2**24  # bytes of weights in one file, which protobuf limits to 2 GiB
# Sides at which a graph for open sizes is traced. The maps of all strides up to 128 have even sides
# for one of them, and odd sides for the other.
_TRACED_SIDES = (256, 257)
_END = np.iinfo(np.int64).max  # of a slice that goes to the end of the axis


def write_onnx(
    predict: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    sizes: ImageSizes,
    channels: int,
    metadata: Mapping[str, Any],
    path: Path,
    *,
    opset: int = OPSET,
    output: str = "logits",
    weights_path: Path | None = None,
) -> None:
    """Writes the graph, and the weights to `weights_path` in the same folder if it is not None.

    `predict` is (variables, uint8 images [N, H, W, C]) -> logits [N, num_classes]. H and W are
    fixed or open; N is always open. The file stores each value of `metadata` as JSON.

    Raises:
      ExportError: The network has an operation without translation, or the graph depends on the
        size of the images where that is open; onnx does not know the opset; the weights are too
        large for one file.
    """
    _check_opset(opset)
    _check_bytes(variables, weights_path)
    images: list[int | str | None]
    if sizes.is_open:
        images = ["batch", "height", "width", channels]
        graph, classes = _graph_of_any_size(predict, variables, channels, opset, output)
    else:
        images = ["batch", sizes.height, sizes.width, channels]
        shape = (sizes.height, sizes.width, channels)
        graph, classes = _trace(predict, variables, shape, opset, output)
    proto = helper.make_graph(
        graph.nodes,
        "resnet_jax",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, images)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", classes])],
        graph.constants,
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(proto, opset_imports=opsets, producer_name="resnet_jax")
    # The oldest file format that has the opset; onnx itself would write its newest.
    model.ir_version = helper.find_min_ir_version_for(opsets)
    helper.set_model_props(model, {key: json_text(value) for key, value in metadata.items()})
    if weights_path is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=weights_path.name)
    onnx.checker.check_model(path, full_check=True)


def open_onnx(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Opens a graph with onnxruntime: uint8 images [N, H, W, C] -> logits [N, num_classes]."""
    import onnxruntime

    def refused(error: Exception) -> ExportError:
        return ExportError(
            f"--format=onnx: onnxruntime {onnxruntime.__version__} does not run the graph "
            f"({one_line(error)}); try another --opset"
        )

    with library_errors(refused):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _check_opset(opset: int) -> None:
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise ExportError(
            f"--opset={opset}: must be from {OLDEST_OPSET} to {newest}, the newest that onnx "
            f"{onnx.__version__} knows"
        )


def _check_bytes(variables: Any, weights_path: Path | None) -> None:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    if weights_path is None and size > MAX_EMBEDDED:
        raise ExportError(
            f"--format=onnx: the weights have {size / 1e9:.1f} GB, and one file of ONNX holds "
            "2 GB; give --weights=beside"
        )


def _graph_of_any_size(
    predict: Callable[..., jax.Array], variables: Any, channels: int, opset: int, output: str
) -> tuple[Graph, int]:
    """A graph for images of any size, traced at two sizes to check that they give the same."""
    (graph, classes), (other, _) = (
        _trace(predict, variables, (side, side, channels), opset, output) for side in _TRACED_SIDES
    )
    if graph.nodes != other.nodes or graph.constants != other.constants:
        raise ExportError(
            "--input_size=open: the ONNX graph of this network depends on the size of its images; "
            "give one, HEIGHTxWIDTH"
        )
    return graph, classes


def _trace(
    predict: Callable[..., jax.Array],
    variables: Any,
    image_shape: tuple[int, int, int],
    opset: int,
    output: str,
) -> tuple[Graph, int]:
    """The graph for images of one shape (H, W, C), and the width of its output."""
    # Two images stand for any number, because nothing below depends on the first axis.
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.uint8)
    with nn.intercept_methods(record_layer):
        traced = jax.make_jaxpr(lambda images: predict(variables, images))(images)
    graph = Graph(opset)
    (result,) = _translate(graph, traced.jaxpr, traced.consts, [Tensor("images")])
    if not isinstance(result, Tensor):
        raise ExportError(f"the network's {output} do not depend on the images")
    graph.finish(result.name, output)
    return graph, traced.out_avals[0].shape[1]


def _translate(
    graph: Graph, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Value]
) -> list[Value]:
    """Adds a traced function to the graph and returns its results."""
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
    if inner is not None and primitive.name != "reduce_window":  # a nested call
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
    window = graph.window_sums.get(getattr(x, "name", ""))
    if window and _is_mean(window, divisor):
        return _window_mean(graph, window)
    return _binary("Div")(graph, arguments, shape, params)


def _cast(graph: Graph, arguments: Sequence[Value], shape: Any, params: Any) -> str:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(params["new_dtype"]))
    name = graph.add("Cast", arguments[0].name, to=dtype)
    # The images are the only input, and the only value that is not float32 already.
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
    columns = zip(
        *(
            (start, _END if limit == side else limit, NCHW.index(axis), stride)
            for axis, (start, limit, stride, side) in cut
        )
    )
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
    """A sum over windows, as a convolution with ones and one group per channel."""
    (x,) = arguments
    window = _window(params)
    ones = np.ones((shape[3], 1, *window["kernel_shape"]), np.float32)
    name = graph.add("Conv", x.name, graph.constant(ones), group=shape[3], **window)
    graph.window_sums[name] = Window(x.name, shape[1:3], window)
    return name


def _pixels(window: Window) -> np.ndarray:
    """Number of pixels that each window has inside its images: [1, H, W, 1]."""
    counts = []
    attributes = window.attributes
    names = ("kernel_shape", "strides", "dilations")
    pads = attributes["pads"][:2], attributes["pads"][2:]
    axes = zip(window.sides, *(attributes[name] for name in names), *pads)
    for side, size, stride, dilation, before, after in axes:
        first = np.arange(-before, side + after - dilation * (size - 1), stride)
        taps = first[:, None] + dilation * np.arange(size)
        counts.append(((taps >= 0) & (taps < side)).sum(1))
    return np.outer(*counts)[None, :, :, None]


def _is_mean(window: Window, divisor: Value) -> bool:
    """Whether sums over windows without dilation are divided by their numbers of pixels."""
    dilated = set(window.attributes["dilations"]) != {1}
    return (
        not dilated and isinstance(divisor, np.ndarray) and np.array_equal(divisor, _pixels(window))
    )


def _window_mean(graph: Graph, window: Window) -> str:
    """The mean of the pixels that each window has inside its images."""
    attributes = dict(window.attributes)
    del attributes["dilations"]  # all 1; AveragePool has no dilations before opset 19
    return graph.add("AveragePool", window.images, count_include_pad=0, **attributes)


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
