"""The compiled training step of a run, and the batches that it takes.

With train.steps_per_call = 1 a call takes one step, on a batch from the host. With more, the
dataset lies on the devices, a call takes several steps, and the host only sends which images are
in their batches. How many steps a call takes is known here alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.config.schema import Config
from resnet_jax.data.pipeline import (
    ALL,
    Dataset,
    IndexSampler,
    InMemoryDataset,
    Shard,
    index_batch,
    prefetch,
)
from resnet_jax.distributed import data_parallel
from resnet_jax.distributed.command_buffers import command_buffer_options
from resnet_jax.distributed.device_memory import explain_out_of_memory
from resnet_jax.training.packing import packing
from resnet_jax.training.state import TrainState
from resnet_jax.training.step import Batch, Metrics, TrainStep, scan


class StepProgram:
    """Takes training steps on all devices.

    `step` is the step of one device. Where the batches have several shards, each process says in
    every call whether it wants to stop, and metrics have "stop": above 0 where any process does.
    """

    def __init__(
        self,
        step: TrainStep,
        config: Config,
        data: Dataset,
        sampler: IndexSampler,
        shard: Shard = ALL,
        wants_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._data = data
        self._sampler = sampler
        self._shard = shard
        self._wants_to_stop = wants_to_stop
        self._dataset: tuple[Batch, ...] = ()  # on the devices
        # `check_steps_per_call` refuses other datasets.
        if config.train.steps_per_call > 1 and isinstance(data, InMemoryDataset):
            arrays = {"images": data.images, "labels": data.labels}
            with explain_out_of_memory("the dataset", "take train.steps_per_call = 1"):
                self._dataset = (data_parallel.replicate(arrays),)
        call: Callable[..., Any] = make_steps(step) if self._dataset else step
        self._stop_flags: tuple[Any, Any] | None = None
        if shard.count > 1:
            call = data_parallel.with_stop_flag(call)
            self._stop_flags = data_parallel.stop_flags()
        self._call = data_parallel.parallel_step(
            call,
            replicated=len(self._dataset),
            options=command_buffer_options() if self._dataset else None,
        )

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Takes the steps of one of `batches`; the metrics of several steps are [steps]."""
        if self._stop_flags is not None:
            batch = batch, self._stop_flags[self._wants_to_stop()]
        return self._call(state, *self._dataset, batch)

    def batches(
        self, start: int, stop: int, pauses_at: Callable[[int], bool] = lambda step: False
    ) -> Generator[tuple[int, Any], None, None]:
        """Yields (number of steps, batch on the devices) for each call from step start to stop.

        No call goes past a step that `pauses_at`. Closing the generator ends the threads and
        processes that make batches ahead.
        """
        lengths = [*self._call_lengths(start, stop, pauses_at)]
        made = self._host_batches(start, stop, lengths)
        sharded = prefetch(map(data_parallel.shard_batch, made), self._config.data.prefetch)
        try:
            yield from zip(lengths, sharded, strict=True)
        finally:
            sharded.close()
            made.close()

    def memory_advice(self) -> tuple[str, str]:
        """What a device holds in memory for a call, and how to reduce it."""
        train = self._config.train
        remedies = ["a smaller train.batch_size", f"train.accumulate = {2 * train.accumulate}"]
        remedies += [] if self._config.model.remat else ["model.remat = true"]
        what = f"a training step of train.batch_size = {train.batch_size}"
        if self._dataset:
            what += (
                f" with the dataset on the devices (train.steps_per_call = {train.steps_per_call})"
            )
            remedies.append("train.steps_per_call = 1")
        return what, f"take {' or '.join(remedies)}"

    def _call_lengths(
        self, done: int, stop: int, pauses_at: Callable[[int], bool]
    ) -> Iterator[int]:
        """Steps of each call: train.steps_per_call, or 1 up to where the loop pauses.

        Two lengths only, because each is a program to compile.
        """
        most = self._config.train.steps_per_call
        while done < stop:
            inside = range(done + 1, done + most)
            whole = done + most <= stop and not any(map(pauses_at, inside))
            steps = most if whole else 1
            yield steps
            done += steps

    def _host_batches(
        self, start: int, stop: int, lengths: list[int]
    ) -> Generator[dict[str, Any], None, None]:
        if not self._dataset:
            return self._data.train_batches(self._sampler, self._config, start, stop, self._shard)
        starts = itertools.accumulate(lengths[:-1], initial=start)
        return (
            index_batch(self._sampler, self._config, first, steps, self._shard)
            for first, steps in zip(starts, lengths, strict=True)
        )


def make_steps(
    step: TrainStep, platform: str = ""
) -> Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]:
    """Several training steps of one device, on batches gathered from a dataset that lies there.

    Returns steps(state, data, batch) -> (state, metrics). data has the "images" and "labels" of
    the whole dataset; batch is from `index_batch`, [N, steps]; metrics are [steps].
    """
    platform = platform or jax.default_backend()

    def steps(state: TrainState, data: Batch, batch: Batch) -> tuple[TrainState, Metrics]:
        # On a GPU, an array that an iteration returns is a kernel to launch, however small it is.
        pack, unpack = packing(state) if platform == "gpu" else (_same, _same)

        def one(packed: Any, chosen: Batch) -> tuple[Any, Metrics]:
            chosen = dict(chosen)
            indices = chosen.pop("indices")
            batch = {**chosen, **{name: x[indices] for name, x in data.items()}}
            state, metrics = step(unpack(packed), batch)
            return pack(state), metrics

        packed, metrics = scan(one, pack(state), jax.tree.map(jnp.transpose, batch), platform)
        return unpack(packed), metrics

    return steps


def _same(state: Any) -> Any:
    return state
