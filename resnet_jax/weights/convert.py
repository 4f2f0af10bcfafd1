"""State dicts of PyTorch ResNets <-> Flax variables, exact to the last bit of float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from resnet_jax.errors import WeightsError, one_line
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.contents import find_network, listed, short
from resnet_jax.weights.foreign import translate
from resnet_jax.weights.naming import Path, Scheme, schemes_for

Variables = dict[str, Any]


def from_torch(
    model: ResNet, state_dict: Mapping[str, Any], *, reset_head: bool = False
) -> Variables:
    """Converts a PyTorch state dict to the variables of a model.

    The names of torchvision and timm, of CIFAR repositories, and of the review are told apart by
    themselves, inside a checkpoint's "state_dict" and behind "module." too.

    Args:
      model: The ResNet that the weights are for.
      state_dict: Names to tensors or arrays of any floating-point type, convolutions
        [out, in / groups, H, W].
      reset_head: Leave the head out and initialise a new one, the same each time, for another
        set of classes.

    Returns:
      {"params", "batch_stats"} of float32 NumPy arrays, convolutions [H, W, in / groups, out].

    Raises:
      WeightsError: Missing or unexpected names or wrong shapes, all of them in one message.

    Example:
      >>> import resnet_jax as rj
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> state_dict = rj.to_torch(model, variables)
      >>> again = rj.from_torch(model, {f"module.{k}": v for k, v in state_dict.items()})
      >>> bool((again["params"]["head"]["kernel"] == variables["params"]["head"]["kernel"]).all())
      True
    """
    check_model(model)
    tensors = translate(find_network(state_dict).tensors)
    scheme = _closest_scheme(model, tensors)
    if reset_head:
        prefix = f"{scheme.head}."
        tensors = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    arrays = {name: _check_kind(name, value) for name, value in tensors.items()}
    wanted = expected = _expected(model, scheme, arrays)
    if reset_head:
        wanted = {path: shape for path, shape in expected.items() if path[1] != "head"}
    _check_fit(scheme, wanted, arrays, model.stage_sizes, reset_head)
    leaves = {}
    for path, shape in wanted.items():
        name = scheme.torch_name(path)  # memory is taken for what fits only
        leaves[path] = _from_torch_layout(_to_numpy(name, arrays[name]), len(shape))
    if reset_head:
        leaves |= {
            path: _initial_head(model, path, shape)
            for path, shape in expected.items()
            if path not in wanted
        }
    return traverse_util.unflatten_dict(leaves)


def to_torch(model: ResNet, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts a model's variables to a PyTorch state dict.

    Args:
      model: The ResNet that the variables belong to.
      variables: {"params", "batch_stats"}.

    Returns:
      Names to float32 NumPy arrays: torchvision's names, with timm's for the parts that
      torchvision does not have and for pre-activation networks. Turn the arrays into tensors
      with `torch.from_numpy`; `load_state_dict` takes the result with `strict=True`.

    Raises:
      WeightsError: The variables are not those of this model.

    Example:
      >>> import resnet_jax as rj
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> rj.to_torch(model, variables)["layer1.0.conv1.weight"].shape
      (16, 16, 3, 3)
    """
    check_model(model)
    scheme = schemes_for(model)[0]
    collections = {key: variables[key] for key in ("params", "batch_stats") if key in variables}
    leaves = traverse_util.flatten_dict(jax.tree.map(np.asarray, collections))
    _check_variables(model, leaves)
    return {
        scheme.torch_name(path): _to_torch_layout(leaf, scheme.is_conv(path))
        for path, leaf in leaves.items()
    }


def head_classes(model: ResNet, state_dict: Mapping[str, Any]) -> int | None:
    """How many classes the head in a state dict has.

    Args:
      model: A ResNet of the same architecture, with any number of classes.
      state_dict: As for `from_torch`.

    Returns:
      The number; None where there is no head under any name that is known.

    Example:
      >>> import resnet_jax as rj
      >>> model = rj.ResNet20(num_classes=7)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> head_classes(rj.ResNet20(), rj.to_torch(model, variables))
      7
    """
    tensors = translate(find_network(state_dict).tensors)
    name = f"{_closest_scheme(model, tensors).head}.weight"
    shape = _check_kind(name, tensors[name]).shape if name in tensors else ()
    return int(shape[0]) if shape else None


def fit_variables(
    model: ResNet, variables: Mapping[str, Any], *, reset_head: bool = False
) -> Variables:
    """Checks that variables are those of a model, with a new head where it is asked for.

    Args:
      model: The ResNet that the variables are for.
      variables: {"params", "batch_stats"}.
      reset_head: Leave the head out and initialise a new one.

    Returns:
      {"params", "batch_stats"} of float32 NumPy arrays.

    Raises:
      WeightsError: They are another model's.
    """
    leaves = traverse_util.flatten_dict(jax.tree.map(np.asarray, dict(variables)))
    if reset_head:
        leaves = {path: leaf for path, leaf in leaves.items() if path[1:2] != ("head",)}
        channels = _channels(leaves.get(("params", "stem", "conv1", "kernel")), axis=2)
        leaves |= {
            path: _initial_head(model, path, shape)
            for path, shape in variable_shapes(model, channels).items()
            if path[1] == "head"
        }
    _check_variables(model, leaves)
    return traverse_util.unflatten_dict(leaves)


def variable_shapes(model: ResNet, channels: int = 3) -> dict[Path, tuple[int, ...]]:
    """Shapes of a model's variables, flattened: (collection, module, ..., leaf) -> shape.

    Args:
      model: A ResNet.
      channels: Of its images.

    Returns:
      One entry a parameter or statistic.

    Example:
      >>> import resnet_jax as rj
      >>> variable_shapes(rj.ResNet20())["params", "head", "kernel"]
      (64, 10)
    """
    return dict(_variable_shapes(model.clone(parent=None), channels))


@functools.lru_cache(maxsize=32)  # to trace a deep network takes a second, and it is asked often
def _variable_shapes(model: ResNet, channels: int) -> dict[Path, tuple[int, ...]]:
    side = max(8, model.strides()[-1])  # images of 4 rows and more channels look transposed
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), images
    )
    return {path: x.shape for path, x in traverse_util.flatten_dict(variables).items()}


def check_model(model: Any) -> None:
    """Raises WeightsError where something else stands in a model's place."""
    if not isinstance(model, ResNet):
        raise WeightsError(f"the model is a {type(model).__name__}, not a ResNet of this package")


def _closest_scheme(model: ResNet, tensors: Mapping[str, Any]) -> Scheme:
    """The scheme that shares most names with the file; on a tie the first."""
    paths = variable_shapes(model)

    def shared(scheme: Scheme) -> int:
        return sum(scheme.torch_name(path) in tensors for path in paths)

    return max(schemes_for(model), key=shared)


def _expected(
    model: ResNet, scheme: Scheme, arrays: Mapping[str, Any]
) -> dict[Path, tuple[int, ...]]:
    """Our shapes, with as many image channels as the file's first convolution has."""
    first = arrays.get(scheme.torch_name(("params", "stem", "conv1", "kernel")))
    return variable_shapes(model, _channels(first, axis=1))


def _channels(kernel: Any, axis: int) -> int:
    """Image channels of a first convolution; 3 where it is none, which its shape will tell."""
    if (
        kernel is None or len(kernel.shape) != 4 or not math.prod(kernel.shape)
    ):  # without numbers, any shape is free
        return 3
    return int(kernel.shape[axis])


def _check_fit(
    scheme: Scheme,
    wanted: Mapping[Path, tuple[int, ...]],
    arrays: Mapping[str, Any],
    stage_sizes: Sequence[int],
    reset_head: bool,
) -> None:
    """Raises one WeightsError that lists every name that is missing, left over or misshapen."""
    names = {scheme.torch_name(path): shape for path, shape in wanted.items()}
    missing = sorted(names.keys() - arrays.keys())
    unexpected = sorted(arrays.keys() - names.keys())
    misshapen = [
        name
        for name, shape in names.items()
        if name in arrays and _ours(tuple(arrays[name].shape), len(shape)) != shape
    ]
    shapes = [
        f"{name} {tuple(arrays[name].shape)} for {_theirs(names[name])}" for name in misshapen
    ]
    faults = [("missing", missing), ("unexpected", unexpected), ("of the wrong shape", shapes)]
    parts = [f"{len(each)} {what}: {listed(each)}" for what, each in faults if each]
    if not parts:
        return
    wrong = (*missing, *unexpected, *misshapen)
    blocks = scheme.stage_sizes(arrays)
    hint = ""
    if all(name.startswith(f"{scheme.head}.") for name in wrong) and not reset_head:
        hint = "; pass reset_head=True to start with a new head"
    elif blocks and blocks != tuple(stage_sizes):
        hint = f": its stages have {blocks} blocks, the model's {tuple(stage_sizes)}"
    raise WeightsError(
        f"the weights ({scheme.name} names) do not fit the model{hint}; {'; '.join(parts)}"
    )


def _check_variables(model: ResNet, leaves: Mapping[Path, np.ndarray]) -> None:
    stem = leaves.get(("params", "stem", "conv1", "kernel"))
    expected = variable_shapes(model, _channels(stem, axis=2))
    wrong = sorted("/".join(path) for path in expected.keys() ^ leaves.keys())
    wrong += [
        f"{'/'.join(path)} {leaves[path].shape} for {shape}"
        for path, shape in expected.items()
        if path in leaves and leaves[path].shape != shape
    ]
    if wrong:
        shown = ", ".join(wrong[:8]) + (", ..." if len(wrong) > 8 else "")
        raise WeightsError(f"the variables are not this model's; {len(wrong)} differ: {shown}")


def _check_kind(name: str, value: Any) -> Any:
    """A tensor or array as it is, once its kind is one that has numbers to read."""
    name = short(name)
    if not hasattr(value, "detach"):  # no tensor of PyTorch's
        if not (hasattr(value, "shape") or isinstance(value, float | int)):
            # Lists too: a stranger's may have itself, or billions of numbers, inside.
            raise WeightsError(f"{name} is not an array but a {type(value).__name__}")
        array = np.asarray(value)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise WeightsError(f"{name} holds {array.dtype}, not floating-point numbers")
        return array
    kind = str(value.dtype).removeprefix("torch.")
    if value.is_nested:
        raise WeightsError(f"{name} is a nested tensor, which has no shape")
    if is_sparse(value):
        raise WeightsError(f"{name} is sparse ({value.layout}); save it .to_dense()")
    if value.is_meta:
        raise WeightsError(f"{name} is on PyTorch's meta device, where tensors have no numbers")
    if value.is_quantized:
        raise WeightsError(f"{name} is quantized ({kind}); save it .dequantize()")
    if not value.is_floating_point():
        raise WeightsError(f"{name} holds {kind}, not floating-point numbers")
    return value


def is_sparse(tensor: Any) -> bool:
    """Whether a PyTorch tensor has another layout than one number an element."""
    return str(tensor.layout) != "torch.strided"


def _to_numpy(name: str, value: Any) -> np.ndarray:
    """A tensor or array of any floating-point type as a new float32 array."""
    if hasattr(value, "detach"):  # a torch tensor; NumPy has no bfloat16 to give it as
        try:
            value = value.detach().cpu().resolve_neg().float().numpy()
        except (RuntimeError, TypeError) as error:  # packed types, and subclasses of tensors
            raise WeightsError(f"{name} has no numbers to read ({one_line(error)})") from error
    return np.asarray(value).astype(np.float32)


def _ours(shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The shape that a tensor of theirs has here."""
    if len(shape) == 4 and ndim == 2 and shape[2:] == (1, 1):
        shape = shape[:2]
    if len(shape) == 4:
        return (*shape[2:], shape[1], shape[0])
    return shape[::-1]


def _theirs(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The inverse of `_ours`, but for dense layers that are 1x1 convolutions there."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _from_torch_layout(array: np.ndarray, ndim: int) -> np.ndarray:
    """[out, in, H, W] -> [H, W, in, out]; [out, in] or [out, in, 1, 1] -> [in, out].

    Of a convolution along one axis, [out, in, K] -> [K, in, out].
    """
    if ndim == 3:
        return np.ascontiguousarray(array.T)
    if ndim == 4:
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    if ndim == 2:
        return np.ascontiguousarray(array.reshape(array.shape[:2]).T)
    return array


def _to_torch_layout(leaf: np.ndarray, dense_as_conv: bool) -> np.ndarray:
    """The inverse of `_from_torch_layout`."""
    leaf = leaf.astype(np.float32)
    if leaf.ndim == 4:
        return np.ascontiguousarray(leaf.transpose(3, 2, 0, 1))
    if leaf.ndim == 3:
        return np.ascontiguousarray(leaf.T)
    if leaf.ndim == 2:
        matrix = np.ascontiguousarray(leaf.T)
        return matrix[:, :, None, None] if dense_as_conv else matrix
    return leaf


def _initial_head(model: ResNet, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A new head: the model's own initialiser with a fixed seed, zeros for the bias."""
    if path[-1] == "bias":
        return np.zeros(shape, np.float32)
    return np.asarray(model.head_init(jax.random.key(0), shape, jnp.float32))
