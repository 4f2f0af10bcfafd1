"""Results on disk and on the way there: whole files or none, progress, images that are skipped."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from resnet_jax.errors import ConfigError, DataError
from resnet_jax.inference.images import ImageFile


@contextlib.contextmanager
def new_file(output: str | os.PathLike[str], force: bool, flag: str = "--output") -> Iterator[Path]:
    """A file that appears when all of it is written, and not at all if that fails.

    Args:
      output: Where.
      force: Replace a file that is there.
      flag: That it was given by, for messages.

    Yields:
      Where to write it: beside, by another name.

    Raises:
      ConfigError: There is such a file, or it cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with new_file(f"{folder}/a.txt", force=False) as path:
      ...         _ = path.write_text("whole")
      ...     os.listdir(folder)
      ['a.txt']
    """
    path = Path(output).expanduser()
    if path.is_dir():
        raise ConfigError(f"{flag}={output}: is a folder; give a file in it")
    if path.exists() and not force:
        raise ConfigError(f"{flag}={output}: exists; give --force to replace it")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()  # says at once whether that can be done
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{flag}={output}: cannot be written ({reason})") from error
    finally:
        partial.unlink(missing_ok=True)


class Progress:
    """Pairs images with results, shows how far that is, and names what is skipped.

    Args:
      files: The images.
      bar: Show a bar, if standard error is a terminal.

    Raises:
      DataError: At the end, if not one image could be read.

    Example:
      >>> progress = Progress([ImageFile("a.png"), ImageFile("b.png")], bar=False)
      >>> [file.name for file, _ in progress([DataError("a.png: cut short"), np.zeros(3)])]
      ['b.png']
      >>> progress.skipped
      1
    """

    def __init__(self, files: Sequence[ImageFile], bar: bool = True) -> None:
        self._files = files
        self._bar = bar
        self.skipped = 0

    def __call__(
        self, results: Iterable[np.ndarray | DataError]
    ) -> Iterator[tuple[ImageFile, np.ndarray]]:
        first = None
        hidden = None if self._bar else True  # None: where no terminal shows it
        with tqdm(total=len(self._files), unit=" images", disable=hidden) as bar:
            for file, result in zip(self._files, results):
                if isinstance(result, DataError):
                    first = first or result
                    self.skipped += 1
                    if len(self._files) > 1:
                        reason = " ".join(str(result).split())
                        tqdm.write(f"skipped: {reason}", file=sys.stderr)
                else:
                    yield file, result
                bar.update()
        if first is not None and self.skipped == len(self._files):
            raise DataError(f"no image could be read; {first}" if self.skipped > 1 else str(first))
