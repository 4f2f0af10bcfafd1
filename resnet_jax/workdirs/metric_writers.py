"""Writers of a run's records: metrics.jsonl, TensorBoard, Weights & Biases, the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

import jax
from tqdm import tqdm

from resnet_jax.config.schema import Config
from resnet_jax.errors import ConfigError, importing, library_errors, reason_of, write_errors
from resnet_jax.files import atomic_write, make_folder, open_to_append
from resnet_jax.terminal import json_text, log, visible
from resnet_jax.workdirs.records import Record, is_training, series, split_at


class Appender:
    """A file that grows by complete records, without a buffer in this process.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = Appender(Path(folder, "log"))
      ...     file.write(b"one")
      ...     file.close()
      ...     print(Path(folder, "log").read_text())
      one
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with write_errors(path):
            # A buffer would keep what could not be written, and fail once more on closing.
            self._file = open(open_to_append(path), "ab", buffering=0)  # noqa: SIM115

    def write(self, data: bytes) -> None:
        """Adds a record.

        Raises:
          ConfigError: The disk is full, or someone removed the file: the system accepts writes to
            such a file, and nobody could read them.
        """
        with write_errors(self._path):
            if not os.fstat(self._file.fileno()).st_nlink:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            while data:  # a disk that is nearly full first accepts a part
                data = data[self._file.write(data) :]

    def close(self) -> None:
        """Closes the file."""
        with write_errors(self._path):
            self._file.close()


class MetricsFile:
    """metrics.jsonl: one JSON object on each line, ordered by step.

    Args:
      path: The file.
      completed_steps: Later records are dropped, because the run repeats those steps.

    Attributes:
      set_aside: The file that lines which are not records were moved to, if there were any.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = MetricsFile(Path(folder, "metrics.jsonl"), completed_steps=0)
      ...     file.write({"step": 1, "split": "train", "loss": 0.5})
      ...     file.close()
      ...     print(Path(folder, "metrics.jsonl").read_text().strip())
      {"step": 1, "split": "train", "loss": 0.5}
    """

    def __init__(self, path: Path, completed_steps: int) -> None:
        self.set_aside: Path | None = None
        if path.exists():
            with write_errors(path):
                kept, bad = split_at(path, completed_steps)
                if bad:  # someone may want them
                    self.set_aside = path.with_name("metrics.damaged.jsonl")
                    aside = Appender(self.set_aside)
                    aside.write(bad)
                    aside.close()
                if path.is_symlink() or path.read_bytes() != kept:
                    atomic_write(path, kept)
        self._file = Appender(path)

    def write(self, record: Record) -> None:
        """Adds a record."""
        self._file.write(json_text(record).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class MetricWriters:
    """Writes the records of a run to all places that the configuration names.

    If metrics.jsonl cannot be written, the run ends. TensorBoard, Weights & Biases and the terminal
    hold copies: one that fails is dropped, and the run continues.

    Args:
      config: The configuration of the run.
      workdir: Folder of the run; None writes nothing, in processes other than the first.
      completed_steps: Steps that were completed before this start.
      total_steps: Steps of the whole run.
      steps_per_epoch: May be a fraction.
      stream: Stream for people, by default standard error; a terminal has a progress bar.
      num_classes: Classes of the network. For five or fewer, where top-5 is always 1, lines for
        people leave it out.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path | None,
        completed_steps: int,
        total_steps: int,
        steps_per_epoch: float,
        stream: TextIO | None = None,
        *,
        num_classes: int = 1000,
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._total = total_steps
        self._with_top5 = num_classes > 5
        self._batch_size = config.train.batch_size
        self._stream = stream or sys.stderr
        self._file: MetricsFile | None = None
        self._copies: list[_Copy] = []
        self._bar: tqdm | None = None
        self._first: tuple[int, float] | None = None  # step and time of the first record
        self._recorded = False
        if workdir is None:
            return
        self._file = MetricsFile(workdir / "metrics.jsonl", completed_steps)
        if self._file.set_aside:
            self.log(
                f"lines of metrics.jsonl that are not records were moved to {self._file.set_aside}"
            )
        if config.log.tensorboard:
            self._add(_TensorBoard, lambda: _TensorBoard(workdir / "tensorboard", completed_steps))
        if config.log.wandb:
            self._add(_WeightsAndBiases, lambda: _WeightsAndBiases(config, workdir))
        # Lines are easier to read in a terminal that is narrow or of unknown width.
        if self._stream.isatty() and os.get_terminal_size(self._stream.fileno()).columns >= 80:
            self._bar = tqdm(
                total=total_steps,
                initial=completed_steps,
                # Without percentage and steps/s, all values fit into 80 columns.
                bar_format="{desc}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
                dynamic_ncols=True,
                leave=False,
                file=self._stream,
            )

    def _add(self, kind: type[_Copy], make: Callable[[], _Copy]) -> None:
        """Starts a copy, or logs why the run has none; a missing package is an error."""
        try:
            self._copies.append(make())
        except ConfigError as error:
            if isinstance(error.__cause__, ImportError):
                raise
            self.log(f"{kind.name} is disabled: {error}")

    def advance(self, step: int) -> None:
        """Moves the progress bar to the number of completed steps."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def watch(self, values: Record) -> None:
        """Shows a step's metrics on the progress bar, until the first record shows means."""
        if self._bar is not None and not self._recorded:
            text = f"loss {values['loss']:.3f}  top-1 {values['top1']:.1%}"
            self._bar.set_postfix_str(text, refresh=False)

    def record(self, record: Record) -> None:
        """Writes a record with the time, and shows it.

        Raises:
          ConfigError: metrics.jsonl cannot be written.
        """
        if self._file is None:
            return
        now = datetime.datetime.now(datetime.UTC)
        record = {**record, "time": now.isoformat(timespec="seconds")}
        self._file.write(record)
        for copy in [*self._copies]:
            try:
                copy.write(record)
            except ConfigError as error:
                self._copies.remove(copy)
                self.log(f"{copy.name} is disabled from here on: {error}")
                with contextlib.suppress(ConfigError):
                    copy.close()
        if not is_training(record):
            self.log(_evaluation_line(record, self._with_top5))
            return
        self.log(self._progress_line(record))
        if self._bar is not None:
            self._recorded = True
            epoch = record["step"] / self._steps_per_epoch
            self._bar.set_description(f"epoch {epoch:.1f}", refresh=False)
            self._bar.set_postfix_str(_values(record))

    def log(self, line: str) -> None:
        """Logs a line for people, after the time and, of several processes, the host.

        A stream that cannot be written is ignored.
        """
        if self._file is None:
            return
        line = f"{self._origin()}  {line}"
        with contextlib.suppress(OSError):  # it may be a file on the same full disk
            if self._bar is not None:
                self._bar.write(visible(line), file=self._stream)
            else:
                log(line, self._stream)

    @contextlib.contextmanager
    def compiling(self, program: str) -> Iterator[None]:
        """Logs that the block compiles a program, and how long it took."""
        self.log(f"compiling {program}")
        start = time.monotonic()
        yield
        self.log(f"compiled {program} in {duration(time.monotonic() - start)}")

    def close(self) -> None:
        """Closes the files and the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        for copy in self._copies:
            try:
                copy.close()
            except ConfigError as error:
                self.log(f"{copy.name} was not closed: {error}")
        if self._file is not None:
            self._file.close()

    def _progress_line(self, record: Record) -> str:
        step = record["step"]
        seconds = self._batch_size / record["images_per_second"]
        if self._first is None:
            self._first = step, time.monotonic()
        elif step > self._first[0]:  # includes evaluations, but nothing before the first record
            seconds = (time.monotonic() - self._first[1]) / (step - self._first[0])
        left = "" if self._bar is not None else f"  {duration(seconds * (self._total - step))} left"
        epoch = step / self._steps_per_epoch
        return f"step {step}/{self._total}  epoch {epoch:.1f}  {_values(record)}{left}"

    def _origin(self) -> str:
        """The local time of a line, and the host where a run has several processes."""
        # Above a bar, a line fits into 80 columns.
        now = time.strftime("%H:%M:%S" if self._bar is not None else "%m-%d %H:%M:%S")
        return f"{now} {socket.gethostname()}" if jax.process_count() > 1 else now


def _values(record: Record) -> str:
    text = f"loss {record['loss']:.3f}  top-1 {record['top1']:.1%}"
    text += f"  {record['images_per_second']:,.0f} images/s"
    text += f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    return text + (f"  {record['skipped']} skipped" if record["skipped"] else "")


def _evaluation_line(record: Record, with_top5: bool) -> str:
    name = record["split"] + (" (EMA)" if record.get("weights") == "ema" else "")
    text = f"step {record['step']}  {name}:"
    if "map" in record:
        text += f" mAP {record['map']:.2%}  F1 {record['f1']:.2%} "
    text += f" top-1 {record['top1']:.2%}"
    text += f"  top-5 {record['top5']:.2%}" if with_top5 else ""
    return text + (f"  loss {record['loss']:.4f}" if "loss" in record else "")


def duration(seconds: float) -> str:
    """Formats a time as M:SS, or H:MM:SS from one hour.

    Example:
      >>> duration(61.2), duration(3600)
      ('1:01', '1:00:00')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Copy(Protocol):
    """A place for copies of the records in metrics.jsonl."""

    name: ClassVar[str]

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files that are written synchronously, one in a folder for each curve.

    TensorBoard draws the same name in several folders, such as "loss" in train and test, into one
    chart. The writer of tensorboardX has a thread that dies when the disk is full, and a queue that
    then blocks the run.
    """

    name: ClassVar[str] = "TensorBoard"

    def __init__(self, folder: Path, completed_steps: int) -> None:
        with importing("log.tensorboard = True", ConfigError):
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.record_writer import masked_crc32c
            from tensorboardX.summary import scalar

        self._scalar, self._checksum = scalar, masked_crc32c
        self._event, self._session = Event, SessionLog
        self._folder, self._completed = folder, completed_steps
        self._files: dict[str, Appender] = {}
        with write_errors(folder):
            make_folder(folder)
            found = sorted(folder.iterdir())
        for each in found:  # of an earlier start
            if each.is_dir() and not each.is_symlink():
                self._open(each.name)
            elif each.name.startswith(_EVENTS):  # of the version before, all curves in one file
                self._open("")

    def write(self, record: Record) -> None:
        file = self._open(_folder_name(series(record)))
        for key, value in record.items():
            if isinstance(value, float):
                self._write(file, step=record["step"], summary=self._scalar(key, value))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _open(self, name: str) -> Appender:
        """The file of this start in a folder."""
        if name not in self._files:
            folder = self._folder / name
            with write_errors(folder):
                make_folder(folder)
            unique = f"{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}"
            self._files[name] = file = Appender(folder / f"{_EVENTS}.{unique}")
            self._write(file, file_version="brain.Event:2")
            # Hides records of an earlier start from this step on, which the run repeats.
            start = self._session(status=self._session.START)
            self._write(file, step=self._completed + 1, session_log=start)
        return self._files[name]

    def _write(self, file: Appender, **content: Any) -> None:
        """Writes a TFRecord: length and content, each with its checksum."""
        event = self._event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(event))
        check = struct.pack("<I", self._checksum(length))
        file.write(length + check + event + struct.pack("<I", self._checksum(event)))


_EVENTS = "events.out.tfevents"  # how the names of TensorBoard's files begin


def _folder_name(curve: str) -> str:
    """A folder for a curve, whose name may be that of any dataset.

    Example:
      >>> _folder_name("test_ema"), _folder_name("../x")
      ('test_ema', '_x-d6b96a')
    """
    safe = re.sub(r"[^\w-]+", "_", curve, flags=re.ASCII)[:100]
    if safe == curve:
        return curve
    digest = hashlib.sha256(curve.encode(errors="surrogateescape")).hexdigest()
    return f"{safe}-{digest[:6]}"


class _WeightsAndBiases:
    name: ClassVar[str] = "Weights & Biases"

    def __init__(self, config: Config, workdir: Path) -> None:
        project = f"log.wandb = {config.log.wandb!r}"
        with importing(project, ConfigError):
            import wandb
        # The id depends on the path: a resumed run continues its curves, and two folders of the
        # same name are two runs. It has no characters that W&B refuses.
        path = str(workdir.resolve())
        id = hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:16]
        settings = dataclasses.asdict(config)
        with library_errors(lambda error: ConfigError(f"{project}: {_wandb_error(error)}")):
            self._run = wandb.init(
                project=config.log.wandb,
                id=id,
                name=visible(workdir.resolve().name),
                dir=str(workdir),
                config=settings,
                resume="allow",
            )

    def write(self, record: Record) -> None:
        name = series(record)
        values = {f"{name}/{k}": v for k, v in record.items() if isinstance(v, float)}
        with library_errors(_wandb_error):
            self._run.log(values, step=record["step"])

    def close(self) -> None:
        with library_errors(_wandb_error):
            self._run.finish()


def _wandb_error(error: Exception) -> ConfigError:
    return ConfigError(reason_of(error))
