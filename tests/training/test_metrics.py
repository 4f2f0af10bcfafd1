"""The rates of records, whenever the loop learns of the steps behind them."""

import threading
import time

import numpy as np
import pytest

from resnet_jax import config as c
from resnet_jax.errors import ConfigError
from resnet_jax.training.metrics import MetricAccumulator, _Sums
from resnet_jax.training.optimizer import RunLength

BATCH = 100
STEPS_PER_CALL = 10
LENGTH = RunLength(steps=100, steps_per_epoch=100.0)


class Device:
    """Runs calls one after the other, each for a while; what it returns may still be running."""

    def __init__(self, seconds):
        self._seconds = seconds
        self._free = 0.0

    def call(self, steps=STEPS_PER_CALL, compile_seconds=0.0):
        self._free = max(self._free, time.monotonic()) + compile_seconds + self._seconds
        zeros = np.zeros(steps)
        names = ("loss", "top1", "top5", "learning_rate", "skipped")
        return {name: Running(zeros, self._free) for name in names}

    def wait(self):
        time.sleep(max(self._free - time.monotonic(), 0))


class Running:
    """An array that is ready at a time."""

    def __init__(self, value, ready):
        self._value, self._ready = value, ready

    def block_until_ready(self):
        time.sleep(max(self._ready - time.monotonic(), 0))
        return self

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return self._value


class Records:
    def __init__(self):
        self.rates = []

    def record(self, record):
        self.rates.append(record["images_per_second"])

    def watch(self, values):
        pass


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def accumulator(records):
    config = c.Config(
        train=c.Train(batch_size=BATCH, steps_per_call=STEPS_PER_CALL),
        log=c.Log(every_steps=STEPS_PER_CALL),
    )
    made = MetricAccumulator(config, LENGTH, records, 0)
    yield made
    made.close()


def test_each_record_has_the_rate_of_its_own_steps(accumulator, records):
    """The loop is held up, and then reads three calls at once."""
    seconds = 0.2
    device = Device(seconds)
    for call in range(1, 7):
        metrics = device.call()
        if call % 3 == 0:
            device.wait()
        accumulator.add(call * STEPS_PER_CALL, metrics)
    accumulator.flush()
    assert len(records.rates) == 6
    assert records.rates == pytest.approx([BATCH * STEPS_PER_CALL / seconds] * 6, rel=0.25)


def test_waiting_for_the_compiler_is_left_out_where_other_steps_tell(records):
    config = c.Config(train=c.Train(batch_size=BATCH), log=c.Log(every_steps=3 * STEPS_PER_CALL))
    accumulator = MetricAccumulator(config, LENGTH, records, 0)
    device = Device(0.1)
    for call in range(1, 4):
        accumulator.add(call * STEPS_PER_CALL, device.call(compile_seconds=0.5 * (call == 1)))
    accumulator.flush()
    accumulator.close()
    assert records.rates == pytest.approx([BATCH * STEPS_PER_CALL / 0.1], rel=0.25)


def test_the_program_of_another_number_of_steps_is_compiled_too(records):
    config = c.Config(train=c.Train(batch_size=BATCH), log=c.Log(every_steps=3 * STEPS_PER_CALL))
    accumulator = MetricAccumulator(config, LENGTH, records, 0)
    device = Device(0.1)
    for call in range(1, 4):
        accumulator.add(call * STEPS_PER_CALL, device.call())
    accumulator.add(31, device.call(steps=1, compile_seconds=0.5))
    accumulator.add(32, device.call(steps=1))
    accumulator.flush()
    accumulator.close()
    assert records.rates == pytest.approx([BATCH * STEPS_PER_CALL / 0.1, BATCH / 0.1], rel=0.25)


def test_an_evaluation_is_not_counted(accumulator, records):
    device = Device(0.1)
    accumulator.add(STEPS_PER_CALL, device.call())
    accumulator.flush()
    time.sleep(0.5)
    accumulator.restart_clock()
    accumulator.add(2 * STEPS_PER_CALL, device.call())
    accumulator.flush()
    assert records.rates[1] == pytest.approx(BATCH * STEPS_PER_CALL / 0.1, rel=0.25)


def test_the_thread_ends(accumulator):
    accumulator.add(STEPS_PER_CALL, Device(0.01).call())
    accumulator.flush()
    accumulator.close()
    for thread in threading.enumerate():
        if thread.name.startswith("metrics"):
            thread.join(5)
            assert not thread.is_alive()


GOOD = {"steps": 2, "totals": {"loss": 1.0}, "learning_rate": 0.1, "skipped": 0}


@pytest.mark.parametrize(
    "change",
    [
        *({"steps": x} for x in (-1, 10**400, 2.5, True, "2", None, float("nan"), [])),
        *({"totals": x} for x in ({"loss": float("nan")}, {"loss": 10**400}, {"loss": "1"}, [], 3)),
        *({"learning_rate": x} for x in (float("inf"), None, "0.1")),
        {"unknown": 1},
    ],
)
def test_what_a_checkpoint_carries_may_be_anything(change):
    assert _Sums.of(GOOD).means() == {"loss": 0.5, "learning_rate": 0.1}
    with pytest.raises(ConfigError, match=r"progress.json of the checkpoint has no sums"):
        _Sums.of({**GOOD, **change})
