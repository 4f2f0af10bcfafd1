"""What a checkpoint holds: finds one ResNet's tensors among wrappers, prefixes and other networks.

Names are not looked up in a list of known checkpoints. A network is whatever has a ResNet's blocks
behind a common prefix, so `module.encoder_q.layer1.0.conv1.weight` shows one behind
`module.encoder_q.`. Where there are several, their roles decide: an EMA comes before the raw
weights, a query or online encoder before the key or target encoder that follows it.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from resnet_jax.errors import WeightsError

_MOST_WRAPPERS = 8  # dictionaries around the tensors, or parts of a prefix; hostile ones never end
_MOST_SEARCHED = 500  # letters of a name; torch's own have fewer than 100
_SHOWN_NAMES, _SHOWN_LETTERS = 6, 80  # in one message

# How the names of a block's layers begin, by naming scheme.
_BLOCK = re.compile(
    r"(?<![^.])(?:"
    r"layer\d+\.\d+\.\w+\."  # torchvision, timm, CIFAR repositories
    r"|conv\d+(?:_x)?\.\d+\.(?:residual_function|shortcut)\."  # the review
    r"|(?P<v2>stages\.\d+\.blocks\.\d+\.)"  # timm, pre-activation
    r"|(?P<children>\d\.\d+\.(?:conv\d|bn\d|downsample)\.)"  # Sequential(*network.children())
    r"|(?P<foreign>(?:resnet\.)?encoder\.stages\.\d+\.layers\.\d+\.)"  # transformers
    r")"
)
_STEM = re.compile(r"(?:conv1|bn1|norm1?|stem|maxpool)\.")
# Names of a head of one layer; those that no naming scheme has are renamed.
_HEADS = ("fc", "linear", "head.fc", "classifier", "last_linear", "head")
_SCHEME_HEADS = ("fc", "linear", "head.fc")
# What training code keeps beside a network, and what counters add to each layer.
_SURPLUS = re.compile(
    r"(?:criterion|loss|metric|acc|train|val|test|queue|n_averaged|optim|sched|proj|pred|prototype"
    r"|mlp|normali|mean|std|pixel_)\w*(?:\.|$)|\w+_(?:loss|acc|accuracy|metrics?|queue|ptr)(?:\.|$)"
)
_COUNTERS = ("num_batches_tracked", "total_ops", "total_params")

# Words in a prefix or wrapper.
_EMA_WORDS = {"ema", "teacher", "averaged", "swa"}
_LEADING_WORDS = {"q", "query", "online"}
_FOLLOWING_WORDS = {"k", "key", "target", "momentum"}


class Contents(NamedTuple):
    """One network's tensors.

    Args:
      tensors: By name, without prefixes; no counters of steps.
      taken: Which of several networks they are, for messages: "encoder_q, not encoder_k"; "":
        there is nothing to say.
      dense: Names of linear layers outside the blocks that are not known to be the head.
    """

    tensors: dict[str, Any]
    taken: str = ""
    dense: tuple[str, ...] = ()


class _Network(NamedTuple):
    """A ResNet in one of a checkpoint's dictionaries.

    Args:
      wrappers: Keys that lead to the dictionary.
      prefix: Of its names there, with the last dot; "": none.
      state_dict: The dictionary.
      size: Tensors with a block's name.
    """

    wrappers: tuple[str, ...]
    prefix: str
    state_dict: Mapping[str, Any]
    size: int

    @property
    def label(self) -> str:
        return ".".join([*self.wrappers, self.prefix.rstrip(".")]).strip(".")

    @property
    def words(self) -> set[str]:
        return set(re.split(r"[^0-9a-z]+", self.label.lower()))


def find_network(
    state_dict: Mapping[str, Any], *, prefix: str | None = None, weights: str | None = None
) -> Contents:
    """Finds one network's tensors: out of a checkpoint's dictionary, without wrappers' prefixes.

    Args:
      state_dict: What a file holds.
      prefix: Of the names of the network that is wanted, where there are several: "encoder_q".
      weights: "ema" or "raw", where a checkpoint has both; None: "ema".

    Returns:
      The tensors by their names without the prefix, and what was taken. A head with an unusual
      name, or outside the prefix, is named "fc".

    Raises:
      WeightsError: There are no tensors, or those of several networks.

    Example:
      >>> import numpy as np
      >>> kernel = np.zeros((16, 16, 3, 3), np.float32)
      >>> names = [f"encoder_{role}.layer1.0.conv1.weight" for role in "qk"]
      >>> contents = find_network({"state_dict": dict.fromkeys(names, kernel), "epoch": 200})
      >>> list(contents.tensors), contents.taken
      (['layer1.0.conv1.weight'], 'state_dict.encoder_q, not state_dict.encoder_k')
    """
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise WeightsError(f"expected a state dict, not a {kind}; pass network.state_dict()")
    if weights not in (None, "", "ema", "raw"):
        raise WeightsError(f'weights={short(str(weights))!r}: must be "ema" or "raw"')
    networks, foreign = _networks(state_dict)
    if not networks:
        return Contents(_unrecognized(state_dict, prefix))
    network = _choose(networks, prefix, weights)
    taken = ""
    if len(networks) > 1:
        others = [each.label or "the unprefixed names" for each in networks if each is not network]
        taken = f"{network.label or 'the unprefixed names'}, not {listed(others)}"
    inside, outside = _split(network, networks)
    if foreign:
        return Contents(inside, taken)
    return _settle_head(_named_children(inside), outside, taken)


def _networks(state_dict: Mapping[str, Any]) -> tuple[list[_Network], bool]:
    """All ResNets in a checkpoint, and whether their names are another framework's."""
    networks, foreign = [], False
    for wrappers, names in _dictionaries(state_dict):
        counts: Counter[str] = Counter()
        for name, value in names.items():
            if not isinstance(name, str) or isinstance(value, Mapping):
                continue
            if found := _BLOCK.search(name[:_MOST_SEARCHED]):
                counts[name[: found.start()]] += 1
                foreign = foreign or bool(found["foreign"])
        networks += [_Network(wrappers, prefix, names, n) for prefix, n in counts.items()]
    for network in networks:
        if network.prefix.count(".") > _MOST_WRAPPERS:
            raise WeightsError(f"its names have a prefix of more than {_MOST_WRAPPERS} parts")
    # A few names with another prefix, as of a loss that borrows a stage, are no network.
    most = max((each.size for each in networks), default=0)
    return [each for each in networks if 4 * each.size >= most], foreign


def _dictionaries(
    state_dict: Mapping[str, Any],
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """A checkpoint's dictionary and those inside it, each once, with the keys that lead there."""
    seen: set[int] = {id(state_dict)}
    waiting: deque[tuple[tuple[str, ...], Mapping[str, Any]]] = deque([((), state_dict)])
    found, deepest = False, False
    while waiting:
        path, names = waiting.popleft()
        found = found or any(_is_array(value) for value in names.values())
        yield path, names
        inner = [(k, x) for k, x in names.items() if isinstance(k, str) and isinstance(x, Mapping)]
        if len(path) == _MOST_WRAPPERS:
            deepest = deepest or bool(inner)
            continue
        for key, value in inner:
            if id(value) not in seen:
                seen.add(id(value))
                waiting.append(((*path, key), value))
    if deepest and not found:
        raise WeightsError(f"its tensors lie below more than {_MOST_WRAPPERS} dictionaries")


def _choose(networks: Sequence[_Network], prefix: str | None, weights: str | None) -> _Network:
    """The one network that is asked for, or that the roles of all decide on."""
    found = list(networks)
    if prefix:
        wanted = prefix.strip(".")
        exact = [each for each in found if wanted in (each.label, each.prefix.rstrip("."))]
        within = [each for each in found if f".{wanted}." in f".{each.label}."]
        found = exact or within
        if not found:
            raise WeightsError(f"no network has prefix={short(prefix)!r}; {_counted(networks)}")
    averaged = [each for each in found if each.words & _EMA_WORDS]
    raw = [each for each in found if not each.words & _EMA_WORDS]
    if weights and not (averaged if weights == "ema" else raw):
        raise WeightsError(f'weights="{weights}": there are none; {_counted(networks)}')
    # A teacher of another size is no average of its student.
    pairs = {each.size for each in averaged} & {each.size for each in raw}
    if weights == "raw":
        found = raw
    elif weights == "ema" or pairs:
        found = averaged
    least = min(map(_rank, found))
    found = [each for each in found if _rank(each) == least]
    if len(found) > 1:
        hint = "prefix= or weights=" if averaged and raw else "prefix="
        raise WeightsError(f"several networks, choose one by {hint}: {_counted(found)}")
    return found[0]


def _rank(network: _Network) -> int:
    """0 for a network that leads another in training, 2 for one that follows, 1 otherwise."""
    if network.words & _FOLLOWING_WORDS:
        return 2
    return 0 if network.words & _LEADING_WORDS else 1


def _counted(networks: Sequence[_Network]) -> str:
    """The prefixes of networks, with how many tensors each has."""
    each = [f"{each.label or 'no prefix'} ({each.size})" for each in networks]
    return f"there are {listed(each)}"


def _split(
    network: _Network, networks: Sequence[_Network]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The names behind a network's prefix, without it; and those behind no network's."""
    others = [
        each.prefix
        for each in networks
        if each.state_dict is network.state_dict and len(each.prefix) > len(network.prefix)
    ]
    roots = [each.prefix for each in networks if each.state_dict is network.state_dict]
    inside, outside = {}, {}
    for name, value in network.state_dict.items():
        if not isinstance(name, str):
            if network.prefix:
                continue
            raise WeightsError("no state dict: some of its keys are not names")
        if name.startswith(network.prefix) and not name.startswith(tuple(others)):
            inside[name.removeprefix(network.prefix)] = value
        elif not any(root and name.startswith(root) for root in roots):
            outside[name] = value
    return {n: x for n, x in inside.items() if not n.endswith(_COUNTERS)}, outside


def _named_children(tensors: dict[str, Any]) -> dict[str, Any]:
    """Names the children of a network in a Sequential, "0" to "9", as the network does."""
    found = [match for match in map(_BLOCK.match, tensors) if match and match["children"]]
    stages = sorted({int(match["children"][0]) for match in found})
    if not stages:
        return tensors
    names = {0: "conv1", 1: "bn1"}
    names |= {child: f"layer{number}" for number, child in enumerate(stages, start=1)}
    named = {}
    for name, value in tensors.items():
        child, _, rest = name.partition(".")
        number = int(child) if re.fullmatch("[0-9]", child) else -1
        after = number > stages[-1] and rest in ("weight", "bias")
        first = "fc" if after else names.get(number, child)
        named[f"{first}.{rest}" if rest else first] = value
    return named


def is_surplus(name: str, value: Any) -> bool:
    """Whether an entry that a model has no place for can be no part of a ResNet anyway."""
    if _BLOCK.match(name) or _STEM.match(name) or name.rpartition(".")[0] in _HEADS:
        return False
    return bool(_SURPLUS.match(name)) or not _is_array(value) or not is_floating(value)


def _settle_head(tensors: dict[str, Any], outside: Mapping[str, Any], taken: str) -> Contents:
    """Finds the head: under a usual name, or the only linear layer that takes the features."""
    v2 = any(found["v2"] for found in map(_BLOCK.match, tensors) if found)
    target = "head.fc" if v2 else "fc"
    head = next((each for each in _HEADS if f"{each}.weight" in tensors), None)
    everything = {**outside, **tensors}
    dense = [
        name.removesuffix(".weight")
        for name, value in everything.items()
        if name.endswith(".weight") and len(_shape(value)) == 2 and not _BLOCK.search(name)
    ]
    only = dense[0] if len(dense) == 1 and not _SURPLUS.match(f"{dense[0]}.") else None
    if head is None and only and _fits(everything, only, tensors):
        head = only
    dense = [name for name in dense if name != head]
    if head is None or (head in _SCHEME_HEADS and f"{head}.weight" in tensors):
        return Contents(tensors, taken, tuple(dense))
    moved = {f"{head}.{leaf}" for leaf in ("weight", "bias")}
    kept = {name: x for name, x in tensors.items() if name not in moved}
    for leaf in ("weight", "bias"):
        if f"{head}.{leaf}" in everything:
            kept[f"{target}.{leaf}"] = everything[f"{head}.{leaf}"]
    note = f"{short(head)} as the head"
    return Contents(kept, f"{taken}, {note}" if taken else note, tuple(dense))


def _fits(everything: Mapping[str, Any], module: str, tensors: Mapping[str, Any]) -> bool:
    """Whether a linear layer has a bias and takes as many features as the last stage gives."""
    out, features = _shape(everything[f"{module}.weight"])
    stages: dict[int, int] = {}
    for name, value in tensors.items():
        if _BLOCK.match(name) and len(shape := _shape(value)) == 4:
            stage = int(re.search(r"\d{1,9}", name)[0])  # type: ignore[index]
            stages[stage] = max(stages.get(stage, 0), shape[0])
    bias = everything.get(f"{module}.bias")
    return bool(stages) and features == stages[max(stages)] and _shape(bias) == (out,)


def _unrecognized(state_dict: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
    """The tensors of a network whose names are of no scheme that is known here, flattened."""
    names = state_dict
    for _ in range(_MOST_WRAPPERS):
        wrappers = ("state_dict", "model_state_dict", "model", "net")
        key = next((key for key in wrappers if isinstance(names.get(key), Mapping)), None)
        if key is None:
            break
        names = names[key]
    tensors = dict(_flattened(names))
    if not all(isinstance(name, str) for name in tensors):
        raise WeightsError("no state dict: some of its keys are not names")
    if not any(_is_array(x) and re.search("[./]", name) for name, x in tensors.items()):
        raise WeightsError(f"no state dict among its keys: {listed(map(str, names)) or 'none'}")
    if prefix:
        start = f"{prefix.strip('.')}."
        tensors = {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}
        if not tensors:
            raise WeightsError(f"no name starts with prefix={short(prefix)!r}")
    tensors = {name: x for name, x in tensors.items() if not name.endswith(_COUNTERS)}
    for _ in range(_MOST_WRAPPERS):
        first, dot, _ = next(iter(tensors), "").partition(".")
        if not dot or len(tensors) < 2 or not all(n.startswith(f"{first}.") for n in tensors):
            return tensors
        tensors = {name.removeprefix(f"{first}."): x for name, x in tensors.items()}
    raise WeightsError(f"its tensors lie below more than {_MOST_WRAPPERS} prefixes")


def _flattened(names: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Entries of a tree of dictionaries, such as Flax has, named "params/conv_init/kernel"."""
    if isinstance(names.get("params"), Mapping):  # not what a train state has beside them
        names = {key: names[key] for key in ("params", "batch_stats") if key in names}
    seen, waiting = {id(names)}, [("", names)]
    kept = []  # alive, so that no other dictionary gets its id; a FrozenDict makes them on demand
    while waiting:
        path, found = waiting.pop()
        kept.append(found)
        for key, value in found.items():
            name = f"{path}/{key}" if path else key
            if not isinstance(value, Mapping):
                yield name, value
            elif id(value) not in seen and path.count("/") < 2 * _MOST_WRAPPERS:
                seen.add(id(value))
                waiting.append((str(name), value))


def _is_array(value: Any) -> bool:
    # A nested tensor of PyTorch has a shape that raises.
    return hasattr(type(value), "shape") and hasattr(type(value), "dtype")


def is_floating(value: Any) -> bool:
    """Whether a tensor or array holds real floating-point numbers."""
    if hasattr(value, "detach"):
        return bool(value.is_floating_point())
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor or array; () of anything else."""
    if not _is_array(value) or getattr(value, "is_nested", False):
        return ()
    return tuple(value.shape)


def listed(names: Iterable[str], most: int = _SHOWN_NAMES) -> str:
    """The first few names of a list, for a message."""
    shown = [short(name) for name in itertools.islice(names, most + 1)]
    return ", ".join(shown if len(shown) <= most else [*shown[:-1], "..."])


def summarized(names: Sequence[str]) -> str:
    """Names for a message: all of a few, else how many begin alike, and examples."""
    if len(names) <= _SHOWN_NAMES:
        return listed(names)
    counts = Counter(short(re.split("[./]", name, maxsplit=1)[0]) for name in names)
    groups = listed(f"{first} ({count})" for first, count in counts.most_common())
    return f"{groups}; such as {listed(names[:3])}"


def short(name: str) -> str:
    """A name, cut where it is longer than a message should be."""
    return name if len(name) <= _SHOWN_LETTERS else f"{name[:_SHOWN_LETTERS]}..."
