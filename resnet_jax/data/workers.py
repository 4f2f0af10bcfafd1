"""Worker processes that decode whole batches.

This process sends each worker the numbers of steps. The worker writes the images into a ring of
buffers in memory that both share, and sends back what else belongs to the batch.

The memory has no name in the file system: it is gone with the last process that has it open, also
after SIGKILL, and the size of /dev/shm (64 MB in many containers) does not limit it.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import math
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import tempfile
import threading
import traceback
from collections.abc import Generator
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import jax
import numpy as np

from resnet_jax.data.sources.base import Batch, field_error
from resnet_jax.errors import DataError, one_line

if TYPE_CHECKING:
    from resnet_jax.data.stream import Batches


def decode_in_processes(batches: Batches) -> Generator[Batch, None, None]:
    """The workers make batches in turn; each of a worker's threads makes one of them."""
    config = batches.config
    count = min(config.workers, len(batches))
    ring = config.prefetch + 1  # so that a worker goes on while a batch is taken from it
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            workers.append(_Worker(batches, ring))
        for step in range(min(count * ring, len(batches))):
            workers[step % count].ask(step)
        for step in range(len(batches)):
            worker, later = workers[step % count], step + count * ring
            batch = worker.take()
            if later < len(batches):
                worker.ask(later)
            yield batch
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """A worker process, as its parent sees it."""

    def __init__(self, batches: Batches, ring: int) -> None:
        config = batches.config
        self._count = config.workers
        self._taken = 0
        context = multiprocessing.get_context("spawn")  # a fork may copy a lock that JAX holds
        shape = (ring, *batches.shape)
        threads = min(config.threads, config.prefetch)
        memory = -1
        try:
            memory = _nameless_memory(shape)
            self._images = _map(memory, shape)
            self._connection, theirs = context.Pipe()
            self._process = context.Process(
                target=_work, args=(theirs, batches, shape, threads), daemon=True
            )
            self._process.start()
            theirs.close()
            # It ignores SIGTERM, by which Python ends such processes at its own end.
            atexit.register(self._process.kill)
            reduction.send_handle(self._connection, memory, self._process.pid)
        except OSError as error:
            size = math.prod(shape) / 1e6
            raise self._fault(
                f"a worker process with {size:,.0f} MB of shared memory cannot be started "
                f"({error.strerror or error}); data.workers = 0 decodes in threads"
            ) from error
        finally:
            if memory >= 0:
                os.close(memory)  # what is mapped stays

    def ask(self, step: int) -> None:
        """Sends the number of a step; `take` returns the batches in the order of these."""
        try:
            self._connection.send(step)
        except OSError as error:
            raise self._lost() from error

    def take(self) -> Batch:
        """Waits for the next batch."""
        try:
            batch = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        if isinstance(batch, BaseException):
            raise batch
        images = self._images[self._taken % len(self._images)]
        self._taken += 1
        return {"images": images.copy(), **batch}  # the worker overwrites its own

    def close(self) -> None:
        """Ends the process, which has nothing to save."""
        self._connection.close()
        self._process.kill()
        self._process.join()
        atexit.unregister(self._process.kill)

    def _lost(self) -> DataError:
        self._process.join(timeout=10)
        code = self._process.exitcode
        if code is not None and code >= 0:
            return self._fault(f"a worker process ended with exit code {code}; its lines say why")
        return self._fault(
            "a worker process was killed, perhaps for want of memory; the same command goes on "
            "from the last checkpoint, and fewer workers or a smaller data.prefetch need less"
        )

    def _fault(self, reason: str) -> DataError:
        return field_error("data.workers", self._count, reason)


def _nameless_memory(shape: tuple[int, ...]) -> int:
    """A descriptor of memory for bytes of a shape."""
    size = math.prod(shape)
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("resnet_jax")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    try:
        os.truncate(memory, size)
    except OSError:
        os.close(memory)
        raise
    return memory


def _map(memory: int, shape: tuple[int, ...]) -> np.ndarray:
    size = math.prod(shape)
    return np.frombuffer(mmap.mmap(memory, size), np.uint8).reshape(shape)


def _work(connection: Connection, batches: Batches, shape: tuple[int, ...], threads: int) -> None:
    """What a worker does until its parent ends it, or ends."""
    jax.config.update("jax_platforms", "cpu")  # or JAX would take memory of the parent's GPU
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # these are the parent's matter
        signal.signal(number, signal.SIG_IGN)
    memory = reduction.recv_handle(connection)
    images = _map(memory, shape)
    os.close(memory)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    begun: queue.SimpleQueue[concurrent.futures.Future[Batch]] = queue.SimpleQueue()

    def make(step: int, place: int) -> Batch:
        batch = batches.make(step, images[place])
        del batch["images"]
        return batch

    def receive() -> None:
        asked = 0
        try:
            while True:
                begun.put(pool.submit(make, connection.recv(), asked % len(images)))
                asked += 1
        except (EOFError, OSError):  # the parent's end of the pipe is closed
            os._exit(0)
        except RuntimeError as error:  # a thread cannot be started
            begun.put(_failed(error))

    threading.Thread(target=receive, daemon=True).start()
    while True:
        made = begun.get()
        error = made.exception()
        try:
            connection.send(made.result() if error is None else _portable(error))
        except OSError:  # as above
            os._exit(0)


def _failed(error: BaseException) -> concurrent.futures.Future[Batch]:
    future: concurrent.futures.Future[Batch] = concurrent.futures.Future()
    future.set_exception(error)
    return future


def _portable(error: BaseException) -> BaseException:
    """The error as a pipe can carry it, with its traceback as a note."""
    error.add_note("".join(["In a worker process:\n", *traceback.format_exception(error)]))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:  # of any kind, from the error's own class
        return RuntimeError(f"{type(error).__name__}: {one_line(error)}")
    return error
