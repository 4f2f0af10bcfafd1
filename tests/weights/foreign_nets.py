"""Tiny networks of other frameworks: names, shapes and logits, which record_foreign.py recorded.

Their numbers follow from the names' order, so that nothing but names and shapes is stored.
"""

import json
from pathlib import Path

import numpy as np

FIXTURE = Path(__file__).parent / "fixtures" / "foreign.json"


def recorded():
    """The fixture: {network: {"shapes": {name: shape}, "logits": [2, classes]}}."""
    return json.loads(FIXTURE.read_text())


def images():
    """Two images [2, 48, 48, 3], as if normalised."""
    return np.random.default_rng(1).normal(size=(2, 48, 48, 3)).astype(np.float32)


def numbers(shapes):
    """Tensors of these shapes, as in a trained network: {name: array}."""
    generator = np.random.default_rng(0)
    tensors = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        if len(shape) > 1:  # kernels; sums stay near 1
            inputs = np.prod(shape) / max(shape[0], shape[-1])
            values = generator.normal(0, inputs**-0.5, shape)
        elif name.endswith(("var", "variance", "scale", "gamma", "weight", "vars/3")):
            values = generator.uniform(0.5, 1.5, shape)
        else:
            values = generator.normal(0, 0.2, shape)
        tensors[name] = values.astype(np.float32)
    return tensors
