"""State dicts of PyTorch ResNets to Flax variables and back, without rounding."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from resnet_jax.errors import WeightsError
from resnet_jax.limits import MAX_CHANNELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.channels import with_channels
from resnet_jax.weights.contents import find_network, is_surplus
from resnet_jax.weights.foreign import translate
from resnet_jax.weights.mismatch import Mismatch, hint_for, other_family
from resnet_jax.weights.naming import ModulePath, Scheme, schemes_for
from resnet_jax.weights.tensors import (
    check_readable,
    flax_shape,
    listed,
    shape_of,
    to_flax_layout,
    to_numpy,
    to_torch_layout,
)

Variables = dict[str, Any]

# First names in a msgpack file of this package's variables.
_OWN = ("params/stem/", "params/stage1/")
# Names of a head, of one layer or several.
_HEAD = re.compile(r"(?:fc|linear|head|classifier|last_linear)\.")


def from_torch(
    model: ResNet,
    state_dict: Mapping[str, Any],
    *,
    reset_head: bool = False,
    prefix: str | None = None,
    weights: str | None = None,
    strict: bool = True,
    channels: int | None = None,
) -> Variables:
    """Converts a PyTorch state dict to the variables of a model.

    The names may be those of torchvision and timm, of CIFAR repositories, of the review, and of
    other frameworks; inside the dictionary of a checkpoint, and behind prefixes such as "module.".

    Args:
      model: The ResNet that the weights are for. With num_classes=0 their head is left out.
      state_dict: Names to tensors or arrays of any floating-point type, convolutions
        [out, in / groups, H, W].
      reset_head: Leave their head out and initialize a new one for another set of classes, the
        same one each time.
      prefix: Prefix of the network's names in a checkpoint of several: "encoder_q".
      weights: "ema" or "raw" where a checkpoint has both. Default: "ema".
      strict: Refuse entries of the network that the model has no place for. False: leave them out.
      channels: Adapt the first convolution to images with this number of channels: its filters
        are summed for grayscale images, repeated and scaled for more than three channels.
        Default: unchanged.

    Returns:
      {"params", "batch_stats"} of float32 NumPy arrays, convolutions [H, W, in / groups, out].

    Raises:
      WeightsError: Names are missing or unexpected, or shapes are wrong; one message reports all
        of them. Or the state dict holds no network, or several.

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
    contents = find_network(state_dict, prefix=prefix, weights=weights)
    new_head = reset_head or not model.num_classes
    if has_own_names(contents.tensors):
        own = fit_variables(model, _unflattened(contents.tensors), reset_head=new_head)
        return with_channels(own, channels)
    translated = translate(contents.tensors)
    translated.check(model)
    tensors = translated.tensors
    scheme = _closest_scheme(model, tensors)
    names = _torch_names(model, scheme)
    if new_head:
        names = {path: name for path, name in names.items() if path[1] != "head"}
    arrays = {n: check_readable(n, tensors[n]) for n in names.values() if n in tensors}
    shapes = _expected_shapes(model, scheme, arrays)
    expected = {name: shapes[path] for path, name in names.items()}
    unexpected = [
        name
        for name, value in tensors.items()
        if strict and name not in expected and not is_surplus(name, value)
    ]
    if new_head:
        unexpected = [name for name in unexpected if not _HEAD.match(name)]
    mismatch = Mismatch.between(expected, arrays, unexpected)
    if mismatch:
        if family := other_family(tensors):
            raise WeightsError(f"no ResNet of this package's weights, but {family}")
        hint = hint_for(mismatch, model, scheme, contents, tensors)
        chosen = f" ({contents.chosen})" if contents.chosen else ""
        raise WeightsError(
            f"the weights{chosen} ({scheme.name} names) do not fit the model{hint}; {mismatch}"
        )
    leaves = {
        path: to_flax_layout(to_numpy(name, arrays[name]), len(shapes[path]))
        for path, name in names.items()
    }
    if reset_head:
        leaves |= {
            path: _initial_head(model, path, shape)
            for path, shape in shapes.items()
            if path[1] == "head"
        }
    return with_channels(traverse_util.unflatten_dict(leaves), channels)


def to_torch(model: ResNet, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts a model's variables to a PyTorch state dict.

    Args:
      model: The ResNet that the variables belong to.
      variables: {"params", "batch_stats"}.

    Returns:
      Names to float32 NumPy arrays: torchvision's names, and timm's for parts that torchvision
      does not have and for pre-activation networks. Convert the arrays with `torch.from_numpy`;
      `load_state_dict` accepts the result with `strict=True`. Layers of your own keep their
      paths: "stem.conv_a.weight".

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
    names = _torch_names(model, scheme)
    return {
        names[path]: to_torch_layout(leaf, scheme.is_conv(path)) for path, leaf in leaves.items()
    }


def head_classes(model: ResNet, state_dict: Mapping[str, Any]) -> int:
    """Number of classes of the head in a state dict; 0 where it has no head of one layer.

    Example:
      >>> import resnet_jax as rj
      >>> model = rj.ResNet20(num_classes=7)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> head_classes(rj.ResNet20(), rj.to_torch(model, variables))
      7
    """
    tensors = find_network(state_dict).tensors
    if has_own_names(tensors):
        name = "params/head/bias"
    else:
        tensors = translate(tensors).tensors
        name = f"{_closest_scheme(model, tensors).head}.weight"
    shape = check_readable(name, tensors[name]).shape if name in tensors else ()
    return int(shape[0]) if shape else 0


def has_own_names(tensors: Mapping[str, Any]) -> bool:
    """Whether tensors have the names of this package's variables, as in a msgpack file."""
    return any(name.startswith(_OWN) for name in tensors)


def fit_variables(
    model: ResNet, variables: Mapping[str, Any], *, reset_head: bool = False
) -> Variables:
    """Returns a model's variables as float32 NumPy arrays, with a new head if `reset_head`.

    A model without a head takes those of a network that has one, as from a file.

    Raises:
      WeightsError: They are another model's.
    """
    leaves = traverse_util.flatten_dict(jax.tree.map(np.asarray, dict(variables)))
    if reset_head or not model.num_classes:
        leaves = {path: leaf for path, leaf in leaves.items() if path[1:2] != ("head",)}
        leaves |= {
            path: _initial_head(model, path, shape)
            for path, shape in variable_shapes(model, _channels_of(model, leaves)).items()
            if path[1] == "head"
        }
    _check_variables(model, leaves)
    return traverse_util.unflatten_dict(leaves)


def variable_shapes(model: ResNet, channels: int = 3) -> dict[ModulePath, tuple[int, ...]]:
    """Shapes of a model's variables: (collection, module, ..., leaf) -> shape.

    Example:
      >>> import resnet_jax as rj
      >>> variable_shapes(rj.ResNet20())["params", "head", "kernel"]
      (64, 10)
    """
    return dict(_variable_shapes(model.clone(parent=None), channels))


@functools.lru_cache(maxsize=32)  # tracing a deep network takes a second
def _variable_shapes(model: ResNet, channels: int) -> dict[ModulePath, tuple[int, ...]]:
    side = max(8, model.strides()[-1])  # fewer rows than channels look like a transposed image
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), images
    )
    return {path: x.shape for path, x in traverse_util.flatten_dict(variables).items()}


def check_model(model: Any) -> None:
    """Raises WeightsError unless `model` is a ResNet of this package."""
    if not isinstance(model, ResNet):
        raise WeightsError(f"the model is a {type(model).__name__}, not a ResNet of this package")


def _closest_scheme(model: ResNet, tensors: Mapping[str, Any]) -> Scheme:
    """The scheme that shares most names with the file; the first of several."""
    paths = variable_shapes(model)

    def shared(scheme: Scheme) -> int:
        return sum(scheme.torch_name(path) in tensors for path in paths)

    return max(schemes_for(model), key=shared)


def _unflattened(tensors: Mapping[str, Any]) -> Variables:
    """The variables in nested dictionaries that `find_network` has flattened."""
    arrays = {name: check_readable(name, x) for name, x in tensors.items()}
    paths = {tuple(name.split("/")): to_numpy(name, x) for name, x in arrays.items()}
    return traverse_util.unflatten_dict(paths)


def _torch_names(model: ResNet, scheme: Scheme) -> dict[ModulePath, str]:
    """A scheme's name for each variable; raises WeightsError where two would share one."""
    names = {path: scheme.torch_name(path) for path in variable_shapes(model)}
    if len(set(names.values())) < len(names):
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        raise WeightsError(f"several variables would be named {listed(twice)}; rename your layer")
    return names


@functools.lru_cache(maxsize=32)
def _first_kernel(model: ResNet) -> tuple[ModulePath, int, int]:
    """(path, axis, its size for 3 channels) of the kernel that images go into."""
    path: ModulePath = ("params", "stem", "conv1", "kernel")
    shapes = variable_shapes(model)
    if path in shapes:
        return path, 2, 3
    more = variable_shapes(model, 6)
    for path, shape in shapes.items():  # a user's own stem
        for axis, size in enumerate(shape):
            if more[path][axis] == 2 * size:
                return path, axis, size
    return path, 0, 0


def _expected_shapes(
    model: ResNet, scheme: Scheme, arrays: Mapping[str, Any]
) -> dict[ModulePath, tuple[int, ...]]:
    """The model's shapes, for images with as many channels as the file's first kernel has."""
    path, _, _ = _first_kernel(model)
    array = arrays.get(scheme.torch_name(path))
    ndim = len(variable_shapes(model)[path])
    return variable_shapes(model, _channels(model, flax_shape(shape_of(array), ndim)))


def _channels(model: ResNet, shape: tuple[int, ...]) -> int:
    """Image channels by the first kernel's shape; 3 where that shape cannot be right anyway."""
    path, axis, size = _first_kernel(model)
    if not size or len(shape) != len(variable_shapes(model)[path]) or not math.prod(shape):
        return 3  # an empty kernel may claim any shape
    channels = max(1, shape[axis] * 3 // size)
    return channels if channels <= MAX_CHANNELS else 3


def _channels_of(model: ResNet, leaves: Mapping[ModulePath, np.ndarray]) -> int:
    return _channels(model, shape_of(leaves.get(_first_kernel(model)[0])))


def _check_variables(model: ResNet, leaves: Mapping[ModulePath, np.ndarray]) -> None:
    expected = variable_shapes(model, _channels_of(model, leaves))
    wrong = sorted("/".join(path) for path in expected.keys() ^ leaves.keys())
    wrong += [
        f"{'/'.join(path)} {leaves[path].shape} for {shape}"
        for path, shape in expected.items()
        if path in leaves and leaves[path].shape != shape
    ]
    if wrong:
        shown = ", ".join(wrong[:8]) + (", ..." if len(wrong) > 8 else "")
        raise WeightsError(f"the variables are not this model's; {len(wrong)} differ: {shown}")


def _initial_head(model: ResNet, path: ModulePath, shape: tuple[int, ...]) -> np.ndarray:
    """A new head: the model's initializer with a fixed seed; zeros for the bias."""
    if path[-1] == "bias":
        return np.zeros(shape, np.float32)
    return np.asarray(model.head_init(jax.random.key(0), shape, jnp.float32))
