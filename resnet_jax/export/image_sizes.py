"""The image sizes that an exported network takes: one, or any."""

from __future__ import annotations

import dataclasses
import re

from resnet_jax.errors import ExportError
from resnet_jax.limits import MAX_SIDE
from resnet_jax.models.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class ImageSizes:
    """Height and width in pixels of the images that an exported network takes.

    Example:
      >>> ImageSizes(224, 224, least=32, is_open=True).checked
      ((224, 224), (169, 281), (32, 32))
    """

    height: int  # for open sizes, of the images that the network was evaluated on
    width: int
    least: int  # the smallest height and width that the network takes
    is_open: bool = False  # any height and width from `least` up

    @property
    def checked(self) -> tuple[tuple[int, int], ...]:
        """The sizes at which the export is compared with its source.

        For open sizes: the network's own, one with odd and unequal sides (which strides round up),
        and the smallest.
        """
        own = (self.height, self.width)
        if not self.is_open:
            return (own,)
        odd = (max(self.least, self.height * 3 // 4) | 1, self.width * 5 // 4 | 1)
        return tuple(dict.fromkeys([own, odd, (self.least, self.least)]))

    def describe(self) -> dict[str, object]:
        """The sizes as JSON."""
        if self.is_open:
            return {"height": "any", "width": "any", "least_side": self.least}
        return {"height": self.height, "width": self.width}


def parse_image_sizes(text: str, model: ResNet, image_size: int) -> ImageSizes:
    """Reads --input_size: "HEIGHTxWIDTH", "open", or "" for squares of `image_size` pixels.

    Example:
      >>> import resnet_jax as rj
      >>> parse_image_sizes("96x160", rj.ResNet50(), 224)
      ImageSizes(height=96, width=160, least=32, is_open=False)
    """
    # The model refuses images of four rows or fewer as [N, C, H, W].
    least = max(model.output_stride or model.strides()[-1], 5)
    if text in ("", "open"):
        return ImageSizes(image_size, image_size, least, is_open=text == "open")
    sides = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text, re.ASCII)
    if sides is None:
        raise ExportError(
            f"--input_size={text[:40]}: is not HEIGHTxWIDTH in pixels, such as 224x320, or open"
        )
    height, width = map(int, sides.groups())
    if not least <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise ExportError(
            f"--input_size={text}: each side must be from {least} pixels, the least that this "
            f"network takes, to {MAX_SIDE:,}"
        )
    return ImageSizes(height, width, least)
