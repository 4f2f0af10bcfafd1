"""What a run tells: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

from tqdm import tqdm

from resnet_jax.config.schema import Config
from resnet_jax.errors import ConfigError, importing, library_errors, one_line
from resnet_jax.files import atomic_write, make_folder
from resnet_jax.terminal import json_text, log, visible
from resnet_jax.workdirs.records import Record, is_training, series, split_at
from resnet_jax.workdirs.workdir import Appender, writing


class MetricsFile:
    """metrics.jsonl: one JSON object a line, in the order of the steps.

    Args:
      path: The file.
      completed_steps: Records past them are dropped: those steps are about to be taken again.

    Attributes:
      set_aside: File that has got the lines that are no records; None where there are none.

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
            with writing(path):
                kept, bad = split_at(path, completed_steps)
                if bad:  # whoever wrote them may want them
                    self.set_aside = path.with_name("metrics.damaged.jsonl")
                    aside = Appender(self.set_aside)
                    aside.write(bad)
                    aside.close()
                if path.is_symlink() or path.read_bytes() != kept:
                    atomic_write(path, kept)
        self._file = Appender(path)

    def write(self, record: Record) -> None:
        """Adds a record; it is on its way to the disk when this returns."""
        self._file.write(json_text(record).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class MetricWriters:
    """Takes the records of a run and tells them wherever the configuration says.

    metrics.jsonl is the record: where it cannot be written the run ends. TensorBoard, Weights &
    Biases and the terminal have copies: what cannot take them is left out, and the run goes on.

    Args:
      config: The configuration of the run.
      workdir: Its folder; None: nothing is written (another process writes).
      completed_steps: Steps that were done before this start.
      total_steps: Steps of the whole run.
      steps_per_epoch: May be a fraction.
      stream: Where a person reads; the progress bar appears where it is a terminal.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path | None,
        completed_steps: int,
        total_steps: int,
        steps_per_epoch: float,
        stream: TextIO | None = None,
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._total = total_steps
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
                f"lines of metrics.jsonl that are no records are now in {self._file.set_aside}"
            )
        if config.log.tensorboard:
            self._add(_TensorBoard, lambda: _TensorBoard(workdir / "tensorboard", completed_steps))
        if config.log.wandb:
            self._add(_WeightsAndBiases, lambda: _WeightsAndBiases(config, workdir))
        # In a narrow terminal, and in one that does not tell its width, lines are easier to read.
        if self._stream.isatty() and os.get_terminal_size(self._stream.fileno()).columns >= 80:
            self._bar = tqdm(
                total=total_steps,
                initial=completed_steps,
                unit="step",
                dynamic_ncols=True,
                leave=False,
                file=self._stream,
            )

    def _add(self, kind: type[_Copy], make: Callable[[], _Copy]) -> None:
        """Begins a copy, or says why the run has none; a package that is missing is an error."""
        try:
            self._copies.append(make())
        except ConfigError as error:
            if isinstance(error.__cause__, ImportError):
                raise
            self.log(f"{kind.name} is left out: {error}")

    def advance(self, step: int) -> None:
        """Moves the bar to the number of completed steps."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def watch(self, values: Record) -> None:
        """Shows a step's loss and accuracy on the bar, until the next record shows means."""
        if self._bar is not None and not self._recorded:
            text = f"loss {values['loss']:.3f}  top-1 {values['top1']:.1%}"
            self._bar.set_postfix_str(text, refresh=False)

    def record(self, record: Record) -> None:
        """Writes a record of "step", "split", loss, top1, ... and shows it.

        Raises:
          ConfigError: metrics.jsonl cannot be written.
        """
        if self._file is None:
            return
        self._file.write(record)
        for copy in [*self._copies]:
            try:
                copy.write(record)
            except ConfigError as error:
                self._copies.remove(copy)
                self.log(f"{copy.name} is left out from here on: {error}")
                with contextlib.suppress(ConfigError):
                    copy.close()
        if not is_training(record):
            self.log(_evaluation_line(record))
        elif self._bar is not None:
            self._recorded = True
            epoch = record["step"] / self._steps_per_epoch
            self._bar.set_description(f"epoch {epoch:.1f}", refresh=False)
            self._bar.set_postfix_str(_values(record))
        else:
            self.log(self._progress_line(record))

    def log(self, line: str) -> None:
        """One line for the person who watches; nobody does where it cannot be written."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # it may go to a log on the same full disk
            if self._bar is not None:
                self._bar.write(visible(line), file=self._stream)
            else:
                log(line, self._stream)

    def close(self) -> None:
        """Closes files and bar."""
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
        elif step > self._first[0]:  # with evaluations, but not what came before the first record
            seconds = (time.monotonic() - self._first[1]) / (step - self._first[0])
        left = seconds * (self._total - step)
        return (
            f"step {step}/{self._total}  epoch {step / self._steps_per_epoch:.1f}  "
            f"{_values(record)}  {duration(left)} left"
        )


def _values(record: Record) -> str:
    text = f"loss {record['loss']:.3f}  top-1 {record['top1']:.1%}"
    text += f"  {record['images_per_second']:,.0f} images/s"
    text += f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    return text + (f"  {record['skipped']} skipped" if record["skipped"] else "")


def _evaluation_line(record: Record) -> str:
    name = record["split"] + (" (EMA)" if record.get("weights") == "ema" else "")
    text = f"step {record['step']}  {name}:"
    if "map" in record:
        text += f" mAP {record['map']:.2%}  F1 {record['f1']:.2%} "
    text += f" top-1 {record['top1']:.2%}"
    text += f"  top-5 {record['top5']:.2%}"
    return text + (f"  loss {record['loss']:.4f}" if "loss" in record else "")


def duration(seconds: float) -> str:
    """Formats a time as on a clock.

    Args:
      seconds: The time.

    Returns:
      "M:SS", or "H:MM:SS" from an hour up.

    Example:
      >>> duration(61.2), duration(3600)
      ('1:01', '1:00:00')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Copy(Protocol):
    """Where records go beside metrics.jsonl."""

    name: ClassVar[str]

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """An event file, written on the spot.

    tensorboardX's own writer has a thread that dies when the disk is full, and a queue that then
    blocks the run for ever.
    """

    name: ClassVar[str] = "TensorBoard"

    def __init__(self, folder: Path, completed_steps: int) -> None:
        with importing("log.tensorboard = True", ConfigError):
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.record_writer import masked_crc32c
            from tensorboardX.summary import scalar

        self._scalar, self._checksum = scalar, masked_crc32c
        with writing(folder):
            make_folder(folder)
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}"
        self._file = Appender(folder / name)
        self._event = Event
        self._write(file_version="brain.Event:2")
        # Records from this step on, of an earlier start, are hidden: those steps are taken again.
        start = SessionLog(status=SessionLog.START)
        self._write(step=completed_steps + 1, session_log=start)

    def write(self, record: Record) -> None:
        name = series(record)
        for key, value in record.items():
            if isinstance(value, float):
                self._write(step=record["step"], summary=self._scalar(f"{name}/{key}", value))

    def close(self) -> None:
        self._file.close()

    def _write(self, **content: Any) -> None:
        """A record of TFRecord's: length and content, each with its checksum."""
        event = self._event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(event))
        check = struct.pack("<I", self._checksum(length))
        self._file.write(length + check + event + struct.pack("<I", self._checksum(event)))


class _WeightsAndBiases:
    name: ClassVar[str] = "Weights & Biases"

    def __init__(self, config: Config, workdir: Path) -> None:
        project = f"log.wandb = {config.log.wandb!r}"
        with importing(project, ConfigError):
            import wandb
        # The id follows from the path, so that a resumed run goes on where it was, and two folders
        # of one name are two runs. It has no characters that W&B refuses.
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
    """What Weights & Biases raises, often from a network, has no common class."""
    return ConfigError(f"{type(error).__name__}: {one_line(error)}")
