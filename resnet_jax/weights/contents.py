"""What a file of weights holds: one network's tensors, inside a checkpoint and behind prefixes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from resnet_jax.errors import WeightsError

# Training scripts save the state dict beside epoch, optimizer and the like.
_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net")
_MOST_WRAPPERS = 8  # of dictionaries and prefixes around the tensors; a stranger's may never end
_MOST_NAMES, _MOST_LETTERS = 200, 200  # in one message


class Contents(NamedTuple):
    """One network's tensors.

    Args:
      tensors: By name, without prefixes; no counters of steps.
      taken: Which of several networks they are, for messages: "the EMA (state_dict_ema), behind
        module."; "": there is nothing to say.
    """

    tensors: dict[str, Any]
    taken: str = ""


def find_network(
    state_dict: Mapping[str, Any], *, prefix: str | None = None, weights: str | None = None
) -> Contents:
    """Finds one network's tensors: out of a checkpoint's dictionary, without wrappers' prefixes.

    Args:
      state_dict: What a file holds.
      prefix: Of the names of the network that is wanted, where there are several: "encoder_q".
      weights: "ema" or "raw", where a checkpoint has both; None: "ema".

    Returns:
      The tensors by their names without the prefix, and what was taken.

    Raises:
      WeightsError: There are no tensors, or those of several networks.
    """
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise WeightsError(f"expected a state dict, not a {kind}; pass network.state_dict()")
    for _ in range(_MOST_WRAPPERS):
        inner = _inside(state_dict)
        if inner is None:
            # A counter of steps that only matters where momentum is None; Flax has no such thing.
            counter = "num_batches_tracked"
            tensors = {n: x for n, x in state_dict.items() if not n.endswith(counter)}
            return Contents(tensors)
        state_dict = inner
    raise WeightsError(f"its tensors lie below more than {_MOST_WRAPPERS} dictionaries or prefixes")


def _inside(state_dict: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What is below the outermost wrapper; None: there is none, these are the tensors."""
    for key in _WRAPPER_KEYS:
        if isinstance(state_dict.get(key), Mapping):
            return state_dict[key]
    if not all(isinstance(name, str) for name in state_dict):
        raise WeightsError("no state dict: some of its keys are not names")
    if not any(
        hasattr(value, "shape") and re.search("[./]", name) for name, value in state_dict.items()
    ):
        raise WeightsError(f"no state dict among its keys: {listed(state_dict) or 'none'}")
    # "module." of DataParallel, "_orig_mod." of torch.compile, "model." of trainers: a ResNet's
    # own names never share their first part.
    first, _, _ = next(iter(state_dict)).partition(".")
    if len(state_dict) > 1 and all(name.startswith(f"{first}.") for name in state_dict):
        return {name.removeprefix(f"{first}."): x for name, x in state_dict.items()}
    return None


def listed(names: Iterable[str]) -> str:
    """Names in a message: all that a network has, but not a million, nor one of a megabyte."""
    shown = [short(name) for name in itertools.islice(names, _MOST_NAMES + 1)]
    return ", ".join(shown if len(shown) <= _MOST_NAMES else [*shown[:-1], "..."])


def short(name: str) -> str:
    """A name, cut where it is longer than a message should be."""
    return name if len(name) <= _MOST_LETTERS else f"{name[:_MOST_LETTERS]}..."
