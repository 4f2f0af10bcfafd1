"""Finds one ResNet's tensors in a checkpoint, among wrappers, prefixes and other networks.

There is no list of known checkpoints. Names of a ResNet's blocks behind a common prefix are a
network: `module.encoder_q.layer1.0.conv1.weight` reveals one behind `module.encoder_q.`. Among
several, their roles decide: an EMA is preferred to the raw weights, a query or online encoder to
the key or target encoder that follows it.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from resnet_jax.errors import WeightsError
from resnet_jax.weights.tensors import is_array, is_floating, listed, shape_of, short

_MAX_WRAPPERS = 8  # dictionaries around tensors, parts of a prefix; hostile files nest forever
_MAX_SEARCHED = 500  # characters of a name; torchvision's have fewer than 100

# Where the name of a block's layer starts, by naming scheme.
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
# Names of a head of one linear layer; those outside every naming scheme are renamed.
_HEADS = ("fc", "linear", "head.fc", "classifier", "last_linear", "head")
_SCHEME_HEADS = ("fc", "linear", "head.fc")
# Entries that training code keeps beside a network, and counters inside its layers.
_SURPLUS = re.compile(
    r"(?:criterion|loss|metric|acc|train|val|test|queue|n_averaged|optim|sched|proj|pred|prototype"
    r"|mlp|normali|mean|std|pixel_)\w*(?:\.|$)|\w+_(?:loss|acc|accuracy|metrics?|queue|ptr)(?:\.|$)"
)
_COUNTERS = ("num_batches_tracked", "total_ops", "total_params")

# Words in a prefix or wrapper that reveal a network's role.
_EMA_WORDS = {"ema", "teacher", "averaged", "swa"}
_LEADING_WORDS = {"q", "query", "online"}
_FOLLOWING_WORDS = {"k", "key", "target", "momentum"}


class Contents(NamedTuple):
    """One network's tensors, by name, without prefixes and step counters."""

    tensors: dict[str, Any]
    chosen: str = ""  # of several networks, for messages: "encoder_q, not encoder_k"
    dense: tuple[str, ...] = ()  # linear layers outside the blocks that may not be the head


class _Network(NamedTuple):
    """A ResNet in one of a checkpoint's dictionaries."""

    wrappers: tuple[str, ...]  # keys that lead to the dictionary
    prefix: str  # of its names there, with the last dot
    state_dict: Mapping[str, Any]
    size: int  # number of tensors with a block's name

    @property
    def label(self) -> str:
        return ".".join([*self.wrappers, self.prefix.rstrip(".")]).strip(".")

    @property
    def words(self) -> set[str]:
        return set(re.split(r"[^0-9a-z]+", self.label.lower()))


def find_network(
    state_dict: Mapping[str, Any], *, prefix: str | None = None, weights: str | None = None
) -> Contents:
    """Finds one network's tensors in a state dict or checkpoint.

    Among several networks, `prefix` ("encoder_q") and `weights` ("ema" or "raw") choose one. A head
    with an unusual name, or outside the prefix, is renamed "fc".

    Raises:
      WeightsError: There are no tensors, or several networks and nothing to choose one by.

    Example:
      >>> import numpy as np
      >>> kernel = np.zeros((16, 16, 3, 3), np.float32)
      >>> names = [f"encoder_{role}.layer1.0.conv1.weight" for role in "qk"]
      >>> contents = find_network({"state_dict": dict.fromkeys(names, kernel), "epoch": 200})
      >>> list(contents.tensors), contents.chosen
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
    chosen = ""
    if len(networks) > 1:
        others = [each.label or "the unprefixed names" for each in networks if each is not network]
        chosen = f"{network.label or 'the unprefixed names'}, not {listed(others)}"
    inside, outside = _split(network, networks)
    if foreign:
        return Contents(inside, chosen)
    return _settle_head(_named_children(inside), outside, chosen)


def _networks(state_dict: Mapping[str, Any]) -> tuple[list[_Network], bool]:
    """All ResNets in a checkpoint, and whether their names are of another framework."""
    networks, foreign = [], False
    for wrappers, names in _dictionaries(state_dict):
        counts: Counter[str] = Counter()
        for name, value in names.items():
            if not isinstance(name, str) or isinstance(value, Mapping):
                continue
            if found := _BLOCK.search(name[:_MAX_SEARCHED]):
                counts[name[: found.start()]] += 1
                foreign = foreign or bool(found["foreign"])
        networks += [_Network(wrappers, prefix, names, n) for prefix, n in counts.items()]
    for network in networks:
        if network.prefix.count(".") > _MAX_WRAPPERS:
            raise WeightsError(f"its names have a prefix of more than {_MAX_WRAPPERS} parts")
    # A few names behind another prefix, such as a loss that borrows a stage, are no network.
    most = max((each.size for each in networks), default=0)
    return [each for each in networks if 4 * each.size >= most], foreign


def _dictionaries(
    state_dict: Mapping[str, Any],
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """A checkpoint's dictionary and those inside it, each once, after the keys that lead to it."""
    seen: set[int] = {id(state_dict)}
    waiting: deque[tuple[tuple[str, ...], Mapping[str, Any]]] = deque([((), state_dict)])
    found, deepest = False, False
    while waiting:
        path, names = waiting.popleft()
        found = found or any(is_array(value) for value in names.values())
        yield path, names
        inner = [(k, x) for k, x in names.items() if isinstance(k, str) and isinstance(x, Mapping)]
        if len(path) == _MAX_WRAPPERS:
            deepest = deepest or bool(inner)
            continue
        for key, value in inner:
            if id(value) not in seen:
                seen.add(id(value))
                waiting.append(((*path, key), value))
    if deepest and not found:
        raise WeightsError(f"its tensors lie below more than {_MAX_WRAPPERS} dictionaries")


def _choose(networks: Sequence[_Network], prefix: str | None, weights: str | None) -> _Network:
    """The network that the arguments name, or else the roles of all of them."""
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
    """0 for a network that leads another in training, 2 for one that follows, else 1."""
    if network.words & _FOLLOWING_WORDS:
        return 2
    return 0 if network.words & _LEADING_WORDS else 1


def _counted(networks: Sequence[_Network]) -> str:
    """The prefixes of networks and their numbers of tensors."""
    each = [f"{each.label or 'no prefix'} ({each.size})" for each in networks]
    return f"there are {listed(each)}"


def _split(
    network: _Network, networks: Sequence[_Network]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors behind a network's prefix, without it; and those behind no network's prefix."""
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
    """Renames "0" to "9", a network's children in a Sequential, as the network names them."""
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
    """Whether an entry cannot be part of a ResNet, so that a model may lack a place for it."""
    if _BLOCK.match(name) or _STEM.match(name) or name.rpartition(".")[0] in _HEADS:
        return False
    return bool(_SURPLUS.match(name)) or not is_array(value) or not is_floating(value)


def _settle_head(tensors: dict[str, Any], outside: Mapping[str, Any], chosen: str) -> Contents:
    """Finds the head: a usual name, or the only linear layer that takes the last stage's output."""
    v2 = any(found["v2"] for found in map(_BLOCK.match, tensors) if found)
    target = "head.fc" if v2 else "fc"
    head = next((each for each in _HEADS if f"{each}.weight" in tensors), None)
    everything = {**outside, **tensors}
    dense = [
        name.removesuffix(".weight")
        for name, value in everything.items()
        if name.endswith(".weight") and len(shape_of(value)) == 2 and not _BLOCK.search(name)
    ]
    only = dense[0] if len(dense) == 1 and not _SURPLUS.match(f"{dense[0]}.") else None
    if head is None and only and _fits(everything, only, tensors):
        head = only
    dense = [name for name in dense if name != head]
    if head is None or (head in _SCHEME_HEADS and f"{head}.weight" in tensors):
        return Contents(tensors, chosen, tuple(dense))
    moved = {f"{head}.{leaf}" for leaf in ("weight", "bias")}
    kept = {name: x for name, x in tensors.items() if name not in moved}
    for leaf in ("weight", "bias"):
        if f"{head}.{leaf}" in everything:
            kept[f"{target}.{leaf}"] = everything[f"{head}.{leaf}"]
    note = f"{short(head)} as the head"
    return Contents(kept, f"{chosen}, {note}" if chosen else note, tuple(dense))


def _fits(everything: Mapping[str, Any], module: str, tensors: Mapping[str, Any]) -> bool:
    """Whether a linear layer has a bias and as many inputs as the last stage has channels."""
    out, features = shape_of(everything[f"{module}.weight"])
    stages: dict[int, int] = {}
    for name, value in tensors.items():
        if _BLOCK.match(name) and len(shape := shape_of(value)) == 4:
            stage = int(re.search(r"\d{1,9}", name)[0])  # type: ignore[index]
            stages[stage] = max(stages.get(stage, 0), shape[0])
    bias = everything.get(f"{module}.bias")
    return bool(stages) and features == stages[max(stages)] and shape_of(bias) == (out,)


def _unrecognized(state_dict: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
    """The tensors of a network whose names follow no known scheme, flattened."""
    names = state_dict
    for _ in range(_MAX_WRAPPERS):
        wrappers = ("state_dict", "model_state_dict", "model", "net")
        key = next((key for key in wrappers if isinstance(names.get(key), Mapping)), None)
        if key is None:
            break
        names = names[key]
    tensors = dict(_flattened(names))
    if not all(isinstance(name, str) for name in tensors):
        raise WeightsError("no state dict: some of its keys are not names")
    if not any(is_array(x) and re.search("[./]", name) for name, x in tensors.items()):
        raise WeightsError(f"no state dict among its keys: {listed(names) or 'none'}")
    if prefix:
        start = f"{prefix.strip('.')}."
        tensors = {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}
        if not tensors:
            raise WeightsError(f"no name starts with prefix={short(prefix)!r}")
    tensors = {name: x for name, x in tensors.items() if not name.endswith(_COUNTERS)}
    for _ in range(_MAX_WRAPPERS):
        first, dot, _ = next(iter(tensors), "").partition(".")
        if not dot or len(tensors) < 2 or not all(n.startswith(f"{first}.") for n in tensors):
            return tensors
        tensors = {name.removeprefix(f"{first}."): x for name, x in tensors.items()}
    raise WeightsError(f"its tensors lie below more than {_MAX_WRAPPERS} prefixes")


def _flattened(names: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Entries of nested dictionaries, such as Flax's, named "params/conv_init/kernel"."""
    if isinstance(names.get("params"), Mapping):  # leaves out the rest of a train state
        names = {key: names[key] for key in ("params", "batch_stats") if key in names}
    seen, waiting = {id(names)}, [("", names)]
    kept = []  # a FrozenDict makes its dictionaries on demand; kept, so that ids stay unique
    while waiting:
        path, found = waiting.pop()
        kept.append(found)
        for key, value in found.items():
            name = f"{path}/{key}" if path else key
            if not isinstance(value, Mapping):
                yield name, value
            elif id(value) not in seen and path.count("/") < 2 * _MAX_WRAPPERS:
                seen.add(id(value))
                waiting.append((str(name), value))
