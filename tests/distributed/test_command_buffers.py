"""Convolutions in command buffers: where the compiler has them and nobody chose otherwise."""

import jax
import numpy as np
import pytest
from jax import lax

from resnet_jax.distributed import command_buffers, data_parallel
from resnet_jax.distributed.command_buffers import command_buffer_options

# jax 0.7's XLA refuses the options, so there `parallel_step` gets none.
with_options = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA takes these options from jax 0.10 on"
)


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU; the compiler of the CPU reads the options of GPUs too."""
    jax.devices()  # starts the backend, while XLA_FLAGS has the number of CPU devices
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    command_buffers._xla_takes.cache_clear()
    yield
    command_buffers._xla_takes.cache_clear()


@with_options
def test_the_installed_xla_takes_them(gpu):
    options = command_buffer_options()
    assert "CONVOLUTION" in options["xla_gpu_enable_command_buffer"].split(",")
    assert options["xla_gpu_command_buffer_scheduling_mode"] == "CONCURRENT"


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms_have_none(platform, gpu, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert command_buffer_options() == {}


def test_xla_flags_come_first(gpu, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_gpu_enable_command_buffer=")
    assert command_buffer_options() == {}


def test_several_processes_have_none(gpu, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert command_buffer_options() == {}


@pytest.mark.parametrize(
    ("name", "value"), [("_OPTION", "xla_gpu_of_tomorrow"), ("_KINDS", ("FUSION", "OF_TOMORROW"))]
)
def test_an_xla_without_them(name, value, gpu, monkeypatch):
    monkeypatch.setattr(command_buffers, name, value)
    assert command_buffer_options() == {}


def test_other_errors_of_the_compiler_are_not_hidden(gpu, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        command_buffer_options()


@with_options
@pytest.mark.devices(2)
def test_a_step_with_options_is_the_same_step():
    """Also the placement of what it returns, so that the next call compiles nothing."""
    traced = []

    def step(state, data, batch):
        traced.append(1)
        mean = lax.pmean(batch.mean(), data_parallel.AXIS)
        return state + data.sum() + mean, mean

    data, outcomes = data_parallel.replicate(np.ones(3, np.float32)), []
    for options in (None, {"xla_gpu_graph_min_graph_size": "5"}):
        call = data_parallel.parallel_step(step, replicated=1, options=options)
        state, steps, traced[:] = data_parallel.replicate(np.float32(0)), [], []
        for index in range(3):
            given = state
            batch = np.arange(8, dtype=np.float32) + index
            state, total = call(state, data, data_parallel.shard_batch(batch))
            assert given.is_deleted()
            steps.append((float(state), float(total), state.sharding))
        assert len(traced) <= 1
        outcomes.append(steps)
    assert outcomes[0] == outcomes[1]


@with_options
def test_options_reach_the_compiler():
    call = data_parallel.parallel_step(lambda s, b: (s, b.sum()), options={"xla_nonsense": "1"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_nonsense"):
        call(np.float32(0), data_parallel.shard(np.ones(8, np.float32)))
