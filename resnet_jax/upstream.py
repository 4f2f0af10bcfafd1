"""Code that exists because of a fault or a gap in another project, until that is mended.

Each entry says what breaks in which versions, where it is reported, and when it can go. Formulas
that are faster than what a library derives are in ops/, and so is what stands in for sharding rules
that JAX does not have (ops/sharding.py).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

_JAXLIB = tuple(map(int, jaxlib.__version__.split(".")[:2]))


def on_cpu(convolution: Callable[..., jax.Array], dtype: Any) -> Callable[..., jax.Array]:
    """A bfloat16 convolution for a CPU, kept out of fusions with other convolutions.

    XLA (jaxlib 0.11.2 and 0.12.0; not 0.10.2) fuses two bfloat16 convolutions and a sum of their
    output into one call of YNNPACK, and the sum is NaN. Other wrong results of these fusions are
    https://github.com/jax-ml/jax/issues/39103 and /39257; this one has no report yet. Remove when
    tests/test_upstream.py passes without it in the newest jaxlib.
    """
    if dtype != jnp.bfloat16 or _JAXLIB < (0, 11):
        return convolution
    return lambda x, kernel: lax.optimization_barrier(convolution(x, kernel))


def slow_convolutions_on_cpu() -> bool:
    """Whether XLA's float32 convolutions on a CPU are those before jaxlib 0.11.

    Those that went through YNNPACK ran at half the speed of a matrix product. Remove when the
    oldest jaxlib allowed is 0.11.
    """
    return _JAXLIB < (0, 11)


def window_sum(
    x: jax.Array,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """Sums over windows, with a gradient under `jax.jit`.

    Where the initial value is traced, `lax.reduce_window` does not recognize a sum and has no
    derivative: https://github.com/jax-ml/jax/issues/7815, in all versions so far. A NumPy zero is
    never traced. Remove when that issue is closed.
    """
    zero = np.zeros((), x.dtype)
    return lax.reduce_window(x, zero, lax.add, tuple(window), tuple(strides), tuple(padding))


def backends_are_initialized() -> bool:
    """Whether JAX has started its backend, without starting it.

    JAX has no public name for it: https://github.com/jax-ml/jax/issues/23320. Remove when it has.
    """
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def backend_errors() -> dict[str, Any]:
    """Why platforms that JAX tried did not start; {} where JAX does not say.

    JAX has no public name for it, and no report asks for one. Remove when it has.
    """
    from jax._src import xla_bridge

    return dict(getattr(xla_bridge, "_backend_errors", {}))


def distributed_state() -> Any:
    """JAX's record of how this process is connected to others.

    JAX has no public name for it, and Orbax uses this one too; no report asks for one. Remove when
    it has.
    """
    from jax._src import distributed

    return distributed.global_state


def keep_sigterm() -> None:
    """Lets the processes of a group handle SIGTERM themselves, as the training step does.

    JAX's preemption service would consume the signal. JAX 0.7 has no setting for it, only a method
    that starts it. Remove, but for the setting, when the oldest jax allowed has that.
    """
    setting = "jax_enable_preemption_service"
    if setting in jax.config.values:
        jax.config.update(setting, False)
    else:
        distributed_state().initialize_preemption_sync_manager = lambda: None


def shutdown_timeout(seconds: int) -> dict[str, Any]:
    """The argument of `jax.distributed.initialize` for how long a process waits for the others.

    JAX 0.7 has none, and waits for five minutes. Remove when the oldest jax allowed has it.
    """
    known = inspect.signature(jax.distributed.initialize).parameters
    name = "shutdown_timeout_seconds"
    return {name: seconds} if name in known else {}


def cuda_versions() -> Any:
    """Queries for the versions of CUDA and cuDNN that JAX's plugin has loaded; None without one.

    JAX has no public name for them: https://github.com/jax-ml/jax/issues/32729. Remove when it has.
    """
    return getattr(importlib.import_module("jax._src.lib"), "cuda_versions", None)


def use_program_store(store: Any, folder: str) -> None:
    """Makes JAX keep compiled programs of a folder in `store`, which has `get` and `put`.

    JAX's own store (up to 0.12) keeps files that a full disk or a killed process cut short, and
    until https://github.com/jax-ml/jax/issues/39880 was mended stopped writing once one of its
    files was missing. Remove when it checks what it reads and replaces what is damaged.
    """
    from jax._src import compilation_cache

    private: Any = compilation_cache
    if not hasattr(private, "get_file_cache"):  # JAX then keeps them in its own store
        return
    jaxs_own = private.get_file_cache

    def get_file_cache(path: str, *arguments: Any, **options: Any) -> Any:
        return (store, path) if path == folder else jaxs_own(path, *arguments, **options)

    private.get_file_cache = get_file_cache


def silence_orbax() -> None:
    """Turns off the "absl" logger, on which Orbax reports every file and every error.

    Orbax has no setting for it: https://github.com/google/orbax/issues/1951. Remove when it has.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def import_tfds() -> ModuleType:
    """The module tensorflow_datasets, or the ImportError of what it needs.

    Where one of its own imports fails, TFDS (4.9) logs a traceback and leaves an empty module. No
    report is known. Remove when `import tensorflow_datasets` raises the error.
    """
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        with _any_protobuf():
            import tensorflow_datasets as tfds
            import tensorflow_datasets.public_api
    finally:
        logger.disabled = before
    return tfds


@contextlib.contextmanager
def _any_protobuf() -> Iterator[None]:
    """Lets generated code load under an older protobuf than the one that generated it.

    tensorflow-metadata 1.21 declares protobuf >= 4.25 and refuses any before 6.31, such as the 5.29
    that TensorFlow and Colab have. TFDS needs only its message types, which older versions read,
    too. The variable is protobuf's own. Remove when tensorflow-metadata declares what it needs.
    """
    name = "TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
