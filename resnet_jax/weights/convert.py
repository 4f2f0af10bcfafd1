"""State dicts of PyTorch ResNets <-> Flax variables, exact to the last bit of float32."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from resnet_jax.errors import WeightsError, one_line
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.channels import with_channels
from resnet_jax.weights.contents import (
    Contents,
    find_network,
    is_floating,
    is_surplus,
    listed,
    short,
    summarized,
)
from resnet_jax.weights.foreign import translate
from resnet_jax.weights.infer import other_family
from resnet_jax.weights.naming import Path, Scheme, schemes_for

Variables = dict[str, Any]

# Beginnings of names in variables of this package, as in a msgpack file of them.
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

    The names of torchvision and timm, of CIFAR repositories, and of the review are told apart by
    themselves, inside the dictionary of a checkpoint and behind prefixes such as "module." too.

    Args:
      model: The ResNet that the weights are for. With num_classes=0 a head is left out.
      state_dict: Names to tensors or arrays of any floating-point type, convolutions
        [out, in / groups, H, W].
      reset_head: Leave the head out and initialize a new one, the same each time, for another
        set of classes.
      prefix: Prefix of the network's names in a checkpoint of several: "encoder_q".
      weights: "ema" or "raw" where a checkpoint has both. Default: "ema".
      strict: Refuse entries of the network that the model has no place for. False: leave them out.
      channels: Adapt the first convolution to images of so many channels: its filters are summed
        for grey images, repeated and scaled for more than three. Default: as the weights have it.

    Returns:
      {"params", "batch_stats"} of float32 NumPy arrays, convolutions [H, W, in / groups, out].

    Raises:
      WeightsError: Missing or unexpected names or wrong shapes, all of them in one message. Or
        there is no network, or several.

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
    if any(name.startswith(_OWN) for name in contents.tensors):
        own = fit_variables(model, _unflattened(contents.tensors), reset_head=new_head)
        return with_channels(own, channels)
    translated = translate(contents.tensors)
    translated.check(model)
    tensors = translated.tensors
    scheme = _closest_scheme(model, tensors)
    names = _torch_names(model, scheme)
    if new_head:
        names = {path: name for path, name in names.items() if path[1] != "head"}
    arrays = {n: _check_kind(n, tensors[n]) for n in names.values() if n in tensors}
    expected = _expected(model, scheme, arrays)
    wanted = {name: expected[path] for path, name in names.items()}
    unexpected = [
        name
        for name, value in tensors.items()
        if strict and name not in wanted and not is_surplus(name, value)
    ]
    if new_head:
        unexpected = [name for name in unexpected if not _HEAD.match(name)]
    misfit = _Misfit.between(wanted, arrays, unexpected)
    if misfit:
        if family := other_family(tensors):
            raise WeightsError(f"no ResNet of this package's weights, but {family}")
        hint = _hint(model, scheme, misfit, contents, tensors)
        taken = f" ({contents.taken})" if contents.taken else ""
        raise WeightsError(
            f"the weights{taken} ({scheme.name} names) do not fit the model{hint}; {misfit}"
        )
    leaves = {
        path: _from_torch_layout(_to_numpy(name, arrays[name]), len(expected[path]))
        for path, name in names.items()  # memory is taken for what fits only
    }
    if reset_head:
        leaves |= {
            path: _initial_head(model, path, shape)
            for path, shape in expected.items()
            if path[1] == "head"
        }
    return with_channels(traverse_util.unflatten_dict(leaves), channels)


def to_torch(model: ResNet, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts a model's variables to a PyTorch state dict.

    Args:
      model: The ResNet that the variables belong to.
      variables: {"params", "batch_stats"}.

    Returns:
      Names to float32 NumPy arrays: torchvision's names, with timm's for the parts that
      torchvision does not have and for pre-activation networks. Turn the arrays into tensors
      with `torch.from_numpy`; `load_state_dict` takes the result with `strict=True`. Layers of
      your own keep their own paths: "stem.conv_a.weight".

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
        names[path]: _to_torch_layout(leaf, scheme.is_conv(path)) for path, leaf in leaves.items()
    }


def head_classes(
    model: ResNet,
    state_dict: Mapping[str, Any],
    *,
    prefix: str | None = None,
    weights: str | None = None,
) -> int:
    """How many classes the head in a state dict has.

    Args:
      model: A ResNet of the same architecture, with any number of classes.
      state_dict: As for `from_torch`.
      prefix: Likewise.
      weights: Likewise.

    Returns:
      The number; 0 where there is no head of one layer, such as in self-supervised backbones.

    Example:
      >>> import resnet_jax as rj
      >>> model = rj.ResNet20(num_classes=7)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> head_classes(rj.ResNet20(), rj.to_torch(model, variables))
      7
    """
    tensors = translate(find_network(state_dict, prefix=prefix, weights=weights).tensors).tensors
    name = f"{_closest_scheme(model, tensors).head}.weight"
    shape = _check_kind(name, tensors[name]).shape if name in tensors else ()
    return int(shape[0]) if shape else 0


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
        leaves |= {
            path: _initial_head(model, path, shape)
            for path, shape in variable_shapes(model, _channels_of(model, leaves)).items()
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


def _unflattened(tensors: Mapping[str, Any]) -> Variables:
    """The variables in a tree of dictionaries that `find_network` has flattened."""
    arrays = {name: _check_kind(name, x) for name, x in tensors.items()}
    paths = {tuple(name.split("/")): _to_numpy(name, x) for name, x in arrays.items()}
    return traverse_util.unflatten_dict(paths)


def _torch_names(model: ResNet, scheme: Scheme) -> dict[Path, str]:
    """A scheme's name of each variable, all different."""
    names = {path: scheme.torch_name(path) for path in variable_shapes(model)}
    if len(set(names.values())) < len(names):
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        raise WeightsError(f"several variables would be named {listed(twice)}; rename your layer")
    return names


@functools.lru_cache(maxsize=32)
def _first_kernel(model: ResNet) -> tuple[Path, int, int]:
    """(path, axis, its size for 3 channels) of the kernel whose shape tells the image channels."""
    path: Path = ("params", "stem", "conv1", "kernel")
    shapes = variable_shapes(model)
    if path in shapes:
        return path, 2, 3
    more = variable_shapes(model, 6)
    for path, shape in shapes.items():  # of a stem of the user's own
        for axis, size in enumerate(shape):
            if more[path][axis] == 2 * size:
                return path, axis, size
    return path, 0, 0


def _expected(
    model: ResNet, scheme: Scheme, arrays: Mapping[str, Any]
) -> dict[Path, tuple[int, ...]]:
    """Our shapes, with as many image channels as the file's first convolution has."""
    path, _, _ = _first_kernel(model)
    array = arrays.get(scheme.torch_name(path))
    ndim = len(variable_shapes(model)[path])
    return variable_shapes(model, _channels(model, _ours(_shape_of(array), ndim)))


def _shape_of(array: Any) -> tuple[int, ...]:
    return () if array is None else tuple(array.shape)


def _channels(model: ResNet, shape: tuple[int, ...]) -> int:
    """Image channels by the first kernel's shape; 3 where it is none, which its shape will tell."""
    path, axis, size = _first_kernel(model)
    if not size or len(shape) != len(variable_shapes(model)[path]) or not math.prod(shape):
        return 3  # without numbers, any shape is free
    return max(1, shape[axis] * 3 // size)


class _Misfit(NamedTuple):
    """What differs between a model's tensors and a file's, by names in the file.

    Args:
      missing: Names.
      unexpected: Names.
      shapes: Name -> (shape in the file, shape that the model has there).
    """

    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def between(
        cls,
        wanted: Mapping[str, tuple[int, ...]],
        arrays: Mapping[str, Any],
        unexpected: Sequence[str],
    ) -> _Misfit:
        shapes = {
            name: (tuple(array.shape), _theirs(wanted[name]))
            for name, array in arrays.items()
            if _ours(tuple(array.shape), len(wanted[name])) != wanted[name]
        }
        return cls(sorted(wanted.keys() - arrays.keys()), sorted(unexpected), shapes)

    def __bool__(self) -> bool:
        return any(self)

    @property
    def names(self) -> list[str]:
        return [*self.missing, *self.unexpected, *self.shapes]

    def __str__(self) -> str:
        shapes = [f"{short(n)} {found} for {ours}" for n, (found, ours) in self.shapes.items()]
        faults = {
            "missing": summarized(self.missing),
            "unexpected": summarized(self.unexpected),
            "of the wrong shape": ", ".join(shapes[:3]) + (", ..." if len(shapes) > 3 else ""),
        }
        counts = map(len, self)
        return "; ".join(
            f"{count} {what}: {text}"
            for count, (what, text) in zip(counts, faults.items(), strict=True)
            if count
        )


def _hint(
    model: ResNet,
    scheme: Scheme,
    misfit: _Misfit,
    contents: Contents,
    tensors: Mapping[str, Any],
) -> str:
    """What most likely is the matter, with the argument that mends it."""
    found, ours = scheme.stage_sizes(tensors), tuple(model.stage_sizes)
    head = f"{scheme.head}."
    weight, bias = f"{head}weight", f"{head}bias"
    if weight in misfit.missing and len(contents.dense) > 1:
        return (
            f": there are several linear layers ({listed(contents.dense)}) and none is the head; "
            "for the backbone alone pass reset_head=True, or use a model with num_classes=0"
        )
    if weight in misfit.missing and contents.dense:
        return (
            f": its head may be {short(contents.dense[0])}, which is no linear layer with a bias "
            f"from the last stage's features; to use it, rename it {head[:-1]}; to leave it out, "
            "pass reset_head=True"
        )
    if all(name.startswith(head) for name in misfit.names):
        if weight in misfit.missing and bias in misfit.missing:
            return (
                ": they have no head; pass reset_head=True to start with a new one, or use a "
                "model with num_classes=0"
            )
        shape, _ = misfit.shapes.get(weight, ((), ()))
        classes = ""
        if shape[:1] not in ((), (model.num_classes,)):
            classes = f": its head has {shape[0]:,} classes, the model's {model.num_classes:,}"
        return f"{classes}; pass reset_head=True to start with a new head"
    if found and found != ours:
        return f": its stages have {_sizes(found)} blocks, the model's {_sizes(ours)}"
    if not misfit.missing and not misfit.shapes:
        return ": it has more than the model; pass strict=False to leave that out"
    return ""


def _sizes(stage_sizes: tuple[int, ...]) -> str:
    return str(stage_sizes) if len(stage_sizes) <= 8 else f"({len(stage_sizes)} stages)"


def _channels_of(model: ResNet, leaves: Mapping[Path, np.ndarray]) -> int:
    return _channels(model, _shape_of(leaves.get(_first_kernel(model)[0])))


def _check_variables(model: ResNet, leaves: Mapping[Path, np.ndarray]) -> None:
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


def _check_kind(name: str, value: Any) -> Any:
    """A tensor or array as it is, once its kind is one that has numbers to read."""
    name = short(name)
    if not hasattr(value, "detach"):  # no tensor of PyTorch's
        if not (hasattr(value, "shape") or isinstance(value, float | int)):
            # Lists too: a stranger's may have itself, or billions of numbers, inside.
            raise WeightsError(f"{name} is not an array but a {type(value).__name__}")
        array = np.asarray(value)
        if not is_floating(array):
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
    return shape[::-1] if len(shape) in (2, 3) else shape


def _theirs(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The inverse of `_ours`, but for dense layers that are 1x1 convolutions there."""
    if len(shape) == 4:
        return (shape[3], shape[2], *shape[:2])
    return shape[::-1] if len(shape) in (2, 3) else shape


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
