"""Small arrays of a tree as parts of a few long vectors, which a GPU updates with fewer kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Parts of one vector. XLA gives a kernel at most 96 operands and results; with one new value, one
# gradient and the old vectors for each part, 32 parts are updated and concatenated in one kernel.
_PARTS = 32


def packing(tree: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Functions (pack, unpack) for trees with the structure, shapes and types of `tree`.

    A packed tree is (vectors, other leaves): scalars and vectors of one type are parts of longer
    vectors, and other leaves stay as they are. No value changes.

    Example:
      >>> tree = {"scale": jnp.ones(2), "bias": jnp.zeros(2), "count": jnp.array(7)}
      >>> pack, unpack = packing(tree)
      >>> vectors, others = pack(tree)
      >>> [vector.tolist() for vector in vectors], others
      ([[0.0, 0.0, 1.0, 1.0], [7]], [])
      >>> unpack((vectors, others))["scale"].tolist()
      [1.0, 1.0]
    """
    like, structure = jax.tree.flatten(tree)
    groups = _groups(like)
    packed = {place for group in groups for place in group}
    others = [place for place in range(len(like)) if place not in packed]

    def pack(tree: Any) -> Any:
        leaves = jax.tree.leaves(tree)
        vectors = [jnp.concatenate([leaves[i].ravel() for i in group]) for group in groups]
        return vectors, [leaves[i] for i in others]

    def unpack(packed: Any) -> Any:
        vectors, whole = packed
        found = dict(zip(others, whole, strict=True))
        for group, vector in zip(groups, vectors, strict=True):
            ends = np.cumsum([like[i].size for i in group])
            parts = jnp.split(vector, ends[:-1])
            found |= {i: x.reshape(like[i].shape) for i, x in zip(group, parts, strict=True)}
        return jax.tree.unflatten(structure, [found[i] for i in range(len(like))])

    return pack, unpack


def _groups(leaves: Sequence[Any]) -> list[list[int]]:
    """Places of the scalars and vectors of one type, at most `_PARTS` in each group."""
    by_type: dict[Any, list[int]] = {}
    for place, leaf in enumerate(leaves):
        if leaf.ndim <= 1:
            by_type.setdefault(leaf.dtype, []).append(place)
    return [
        places[first : first + _PARTS]
        for places in by_type.values()
        for first in range(0, len(places), _PARTS)
    ]
