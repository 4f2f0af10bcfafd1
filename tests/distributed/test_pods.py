"""Two processes on devices that look like accelerators, as on a pod or a node of GPUs."""

import sys

import chex
import pytest

from resnet_jax.errors import MISTAKE
from tests.distributed.test_process_group import (
    FLAGS,
    ends,
    errors,
    last_records,
    numbers,
    several,
    started,
    text,
)
from tests.training.runs import state_of

SHORT = [*FLAGS, "--config.train.steps=4", "--config.checkpoint.every_steps=2"]


def on(platform, *options):
    return [sys.executable, "-m", "tests.fake_accelerator", platform, *options]


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "steps_per_call"), [("tpu", 2), ("gpu", 1), ("gpu", 2)])
def test_swapped_indices_and_a_report_that_takes_long(platform, steps_per_call, tmp_path):
    """The runtime's process 0 is not the coordinator, and outlasts JAX's exit barrier."""
    single, double = tmp_path / "single", tmp_path / "double"
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output in outputs:
        output.mkdir()
    flags = [*SHORT, f"--config.train.steps_per_call={steps_per_call}"]
    program = on(platform, "--swap", "--exit_barrier=2", "--slow_report=8")
    processes = several(2, *flags, "--config.log.report=true", f"--workdir={double}")
    with started(outputs[1], *processes, program=program) as running:
        assert ends(running) == [0, 0]
    alone = [*flags, f"--workdir={single}"]
    with started(outputs[0], alone, devices=2, program=on(platform)) as running:
        assert ends(running) == [0]
    assert "top-1" in text(outputs[1], 1)  # the runtime's process 0 has --process_id=1
    assert "top-1" not in text(outputs[1], 0)
    assert (double / "report.html").exists()
    chex.assert_trees_all_close(state_of(double), state_of(single), rtol=1e-4, atol=1e-5)
    found, expected = last_records(double), last_records(single)
    assert found.keys() == expected.keys()
    for key, record in found.items():
        assert numbers(record) == pytest.approx(numbers(expected[key]), rel=1e-4, abs=1e-6), key


@pytest.mark.slow
def test_a_device_without_memory_ends_all_processes_as_a_mistake(tmp_path):
    """And not as a lost process, which a job script would start again for ever."""
    processes = several(2, *SHORT, f"--workdir={tmp_path / 'run'}")
    with started(tmp_path, *processes, program=on("gpu", "--full=1")) as running:
        assert ends(running) == [MISTAKE, MISTAKE]
    for index in range(2):
        (line,) = errors(tmp_path, index)
        assert "train.batch_size = 16 does not fit in the memory of a device" in line
        assert "(Out of memory allocating 1073741824 bytes.)" in line
        assert "train.accumulate = 2 or model.remat = true" in line
        assert "Traceback" not in text(tmp_path, index)
