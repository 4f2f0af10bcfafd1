"""Images that cannot be decoded: reported, counted and limited."""

from __future__ import annotations

from collections.abc import Callable

from resnet_jax.errors import DataError
from resnet_jax.terminal import visible


class CorruptImages:
    """Reports each image that cannot be decoded once, and raises past a limit.

    Example:
      >>> corrupt = CorruptImages(limit=1, log=print)
      >>> corrupt.add("train/cat/1.jpg", "truncated")
      skipped train/cat/1.jpg: truncated
      >>> corrupt.add("train/cat/1.jpg", "truncated")
      >>> corrupt.count
      1
    """

    def __init__(self, limit: int, log: Callable[[str], object]) -> None:
        self.limit = limit
        self.log = log
        self._names: set[str] = set()

    @property
    def count(self) -> int:
        """The number of images that were skipped so far."""
        return len(self._names)

    def add(self, name: str, reason: str) -> None:
        """Counts an image; raises DataError where there are more than the limit."""
        if name in self._names:
            return
        self._names.add(name)
        self.log(visible(f"skipped {name}: {reason}"))
        if self.count > self.limit:
            raise DataError(
                f"data.max_corrupt = {self.limit}: more images than that cannot be decoded, the "
                f"last {name} ({reason}); fix the data or raise the limit"
            )
