"""Worker processes that decode whole batches.

This process sends each worker the numbers of steps, and of buffers in shared memory. The worker
writes the images of a batch into its buffer, and sends back the rest of the batch. The images that
this process hands on are the buffer itself, which is used again when the last reference to them is
gone. `jax.device_put` keeps such a reference while it copies them, or, on a CPU, while the array
lives that it makes of them.

The memory has no name in the file system: it is freed with the last process that has it open, even
after SIGKILL, and the size of /dev/shm (64 MB in many containers) does not limit it.
"""

from __future__ import annotations

import atexit
import collections
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
import weakref
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
    """The workers make batches in turn; each thread of a worker makes one batch."""
    config = batches.config
    count = min(config.workers, len(batches))
    ahead = config.prefetch + 1  # so that a worker is busy while one of its batches is read
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            workers.append(_Worker(batches, ahead, spare_buffers(config.prefetch, count)))
        for step in range(min(count * ahead, len(batches))):
            workers[step % count].request(step)
        for step in range(len(batches)):
            worker, later = workers[step % count], step + count * ahead
            batch = worker.receive()
            if later < len(batches):
                worker.request(later)
            yield batch
    finally:
        for worker in workers:
            worker.close()


def spare_buffers(prefetch: int, workers: int) -> int:
    """Buffers of each worker that are left for images in use while it fills the others.

    The trainer holds up to `prefetch` batches in its queue, and three more: the one that it puts
    there, the one that a step reads, and the one before it.
    """
    return -(-(prefetch + 3) // workers)


class _Worker:
    """A worker process, seen from its parent."""

    def __init__(self, batches: Batches, ahead: int, spare: int) -> None:
        config = batches.config
        self._count = config.workers
        self._shape = batches.shape
        self._free = list(range(ahead + spare))  # buffers that nobody reads or writes
        self._requested: collections.deque[int] = collections.deque()  # their buffers
        context = multiprocessing.get_context("spawn")  # a fork may copy a held lock of JAX
        size = len(self._free) * math.prod(self._shape)
        threads = min(config.threads, config.prefetch)
        memory = -1
        try:
            memory = _nameless_memory(size)
            self._memory = mmap.mmap(memory, size)
            self._connection, remote = context.Pipe()
            self._process = context.Process(
                target=_work, args=(remote, batches, size, threads), daemon=True
            )
            self._process.start()
            remote.close()
            # The worker ignores SIGTERM, by which Python ends daemon processes at exit.
            atexit.register(self._process.kill)
            reduction.send_handle(self._connection, memory, self._process.pid)
        except OSError as error:
            raise self._fault(
                f"a worker process with {size / 1e6:,.0f} MB of shared memory cannot be started "
                f"({error.strerror or error}); data.workers = 0 decodes in threads"
            ) from error
        finally:
            if memory >= 0:
                os.close(memory)  # the mapping stays

    def request(self, step: int) -> None:
        """Asks for the batch of a step; `receive` returns batches in the order of requests."""
        place = self._free.pop()
        self._requested.append(place)
        try:
            self._connection.send((step, place))
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> Batch:
        """Waits for the next batch, and leaves at least one buffer for a request."""
        try:
            batch = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        if isinstance(batch, BaseException):
            raise batch
        place = self._requested.popleft()
        return {"images": self._lend(place) if self._free else self._copy(place), **batch}

    def _lend(self, place: int) -> np.ndarray:
        """The images in a buffer, which is free again when no array refers to them any more."""
        images = _images(self._memory, self._shape, place)
        # NumPy makes a view refer to the first array of the chain, which is this one.
        released = weakref.finalize(images, self._free.append, place)
        released.atexit = False  # a thread may still read them
        return images

    def _copy(self, place: int) -> np.ndarray:
        """The images in a buffer, for a consumer that keeps more batches than there are buffers."""
        images = _images(self._memory, self._shape, place).copy()
        self._free.append(place)
        return images

    def close(self) -> None:
        """Kills the process, which has nothing to save."""
        self._connection.close()
        self._process.kill()
        self._process.join()
        atexit.unregister(self._process.kill)

    def _lost(self) -> DataError:
        self._process.join(timeout=10)
        code = self._process.exitcode
        if code is not None and code >= 0:
            return self._fault(f"a worker process ended with exit code {code}; its output says why")
        return self._fault(
            "a worker process was killed, perhaps because memory ran out; the same command resumes "
            "from the last checkpoint, and fewer workers or a smaller data.prefetch need less"
        )

    def _fault(self, reason: str) -> DataError:
        return field_error("data.workers", self._count, reason)


def _nameless_memory(size: int) -> int:
    """A file descriptor of anonymous memory."""
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


def _images(memory: mmap.mmap, shape: tuple[int, ...], place: int) -> np.ndarray:
    """The images in one of the buffers, which lie one after the other."""
    return np.ndarray(shape, np.uint8, memory, offset=place * math.prod(shape))


def _work(connection: Connection, batches: Batches, size: int, threads: int) -> None:
    """Makes batches in a worker until its parent kills it, or exits."""
    jax.config.update("jax_platforms", "cpu")  # or JAX would allocate memory on the parent's GPU
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent handles these
        signal.signal(number, signal.SIG_IGN)
    handle = reduction.recv_handle(connection)
    memory = mmap.mmap(handle, size)
    os.close(handle)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    begun: queue.SimpleQueue[concurrent.futures.Future[Batch]] = queue.SimpleQueue()

    def make(step: int, place: int) -> Batch:
        batch = batches.make(step, _images(memory, batches.shape, place))
        del batch["images"]
        return batch

    def receive() -> None:
        try:
            while True:
                begun.put(pool.submit(make, *connection.recv()))
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
    """The error in a form that can be pickled, with its traceback as a note."""
    error.add_note("".join(["In a worker process:\n", *traceback.format_exception(error)]))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:  # any kind: the class of the error runs its own code
        return RuntimeError(f"{type(error).__name__}: {one_line(error)}")
    return error
