"""Images that cannot be decoded: named, counted, and too many of them."""

from __future__ import annotations

from typing import Any

from resnet_jax.errors import DataError
from resnet_jax.terminal import visible


class Corrupt:
    """Names the images that cannot be decoded, and stops a run that meets too many.

    Args:
      limit: How many are skipped.
      report: Called with one line for each.

    Example:
      >>> corrupt = Corrupt(limit=1, report=print)
      >>> corrupt.add("train/cat/1.jpg", "truncated")
      skipped train/cat/1.jpg: truncated
      >>> corrupt.add("train/cat/1.jpg", "truncated")
      >>> corrupt.count
      1
    """

    def __init__(self, limit: int, report: Any) -> None:
        self.limit = limit
        self.report = report
        self._names: set[str] = set()

    @property
    def count(self) -> int:
        """How many images were skipped so far."""
        return len(self._names)

    @property
    def names(self) -> frozenset[str]:
        """Of those images."""
        return frozenset(self._names)

    def add(self, name: str, reason: str) -> None:
        """Counts one image, once; raises DataError past the limit."""
        if name in self._names:
            return
        self._names.add(name)
        self.report(visible(f"skipped {name}: {reason}"))
        if self.count > self.limit:
            raise DataError(
                f"data.max_corrupt = {self.limit}: more images than that cannot be decoded, the "
                f"last {name} ({reason}); mend the data or raise the limit"
            )
