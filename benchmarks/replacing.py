"""Replaces functions of the package, to time them or to leave out what they do."""

import sys
from collections.abc import Callable


def replace_everywhere(name: str, wrap: Callable) -> None:
    """Replaces a function by `wrap(function)` in all imported modules that have it."""
    modules = [module for key, module in sys.modules.items() if key.startswith("resnet_jax")]
    found = [module for module in modules if callable(vars(module).get(name))]
    if not found:
        raise SystemExit(f"no imported module of resnet_jax has a function {name}")
    for module in found:
        setattr(module, name, wrap(getattr(module, name)))
