"""What the user says of a network in place of its source: preprocessing, threshold, class names."""

from __future__ import annotations

import dataclasses

from resnet_jax.config.schema import EVAL_CROPS, INTERPOLATIONS
from resnet_jax.errors import ConfigError
from resnet_jax.limits import MAX_SIDE
from resnet_jax.weights.network import Network


@dataclasses.dataclass(frozen=True)
class Overrides:
    """Options of `open_network`; 0, "" and () keep what the source says."""

    image_size: int = 0
    crop_fraction: float = 0.0
    threshold: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str = ""
    crop_mode: str = ""
    classes: tuple[str, ...] = ()
    classes_flag: str = ""  # how the user passed `classes`, for messages

    def check(self) -> None:
        """Raises ConfigError for whatever is wrong with any network, before one is read."""
        for flag, value, allowed in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("crop_mode", self.crop_mode, EVAL_CROPS),
        ):
            if value and value not in allowed:
                raise ConfigError(f"--{flag}={value[:100]}: must be {' or '.join(allowed)}")
        _check_colors("mean", self.mean, all(0 <= each <= 1 for each in self.mean))
        _check_colors("std", self.std, all(1e-6 <= each < 256 for each in self.std))
        if self.mean and self.std:
            self._check_pair(self.mean, self.std)
        if self.image_size < 0 or not 0 <= self.crop_fraction <= 1:
            raise ConfigError(
                f"--image_size={self.image_size} --crop_fraction={self.crop_fraction}: a number of "
                "pixels, and a fraction in (0, 1]; leave a flag out to keep what the network has"
            )
        if self.threshold and not 0 < self.threshold < 1:
            raise ConfigError(f"--threshold={self.threshold}: must be a probability in (0, 1)")

    def _check_pair(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        if len(mean) != len(std):
            given, other = ("mean", "std") if self.mean else ("std", "mean")
            raise ConfigError(f"--{given}: needs --{other} with as many numbers")

    def apply(self, network: Network) -> Network:
        """The network with these values; raises ConfigError for those that do not fit it."""
        return self._with_threshold(self._resized(self._colored(self._named(network))))

    def _named(self, network: Network) -> Network:
        if not self.classes:
            return network
        outputs = network.model.num_classes
        if len(self.classes) != outputs:
            raise ConfigError(
                f"{self.classes_flag}: has {len(self.classes):,} names, and {network.source} "
                f"{outputs:,} outputs"
            )
        return dataclasses.replace(network, class_names=self.classes, named=True)

    def _colored(self, network: Network) -> Network:
        for flag, values in (("mean", self.mean), ("std", self.std)):
            _check_colors(flag, values, len(values) in (0, 1, network.channels), network.channels)
        before = network.preprocessing
        changed = dataclasses.replace(
            before,
            mean=self.mean or before.mean,
            std=self.std or before.std,
            interpolation=self.interpolation or before.interpolation,
            crop_mode=self.crop_mode or before.crop_mode,
        )
        self._check_pair(changed.mean, changed.std)
        usual = "" if self.mean and self.std else network.usual
        return dataclasses.replace(network, preprocessing=changed, usual=usual)

    def _resized(self, network: Network) -> Network:
        before = network.preprocessing
        changed = dataclasses.replace(
            before,
            image_size=self.image_size or before.image_size,
            crop_fraction=self.crop_fraction or before.crop_fraction,
        )
        least = network.model.strides()[-1]
        if changed.image_size < least:
            raise ConfigError(
                f"--image_size={self.image_size}: {network.name} needs at least {least} pixels a "
                "side"
            )
        resized = changed.image_size / changed.crop_fraction
        if max(changed.image_size, resized) > MAX_SIDE:
            raise ConfigError(
                f"--image_size={changed.image_size} --crop_fraction={changed.crop_fraction}: "
                f"images would be resized to {resized:,.0f} pixels, where {MAX_SIDE:,} are the most"
            )
        return dataclasses.replace(network, preprocessing=changed)

    def _with_threshold(self, network: Network) -> Network:
        if not self.threshold:
            return network
        if not network.multi_label:
            raise ConfigError(
                f"--threshold={self.threshold}: goes with a multi-label network; {network.source} "
                "gives each image one class"
            )
        return dataclasses.replace(network, threshold=self.threshold)


def _check_colors(
    flag: str, values: tuple[float, ...], valid: bool, channels: int | None = None
) -> None:
    if not valid:
        shown = ",".join(map(str, values))[:100]
        positive = "positive " if flag == "std" else ""
        each = f"{channels} with commas, one for each channel" if channels else "one per channel"
        raise ConfigError(
            f"--{flag}={shown}: must be one {positive}number, or {each}; in units of 1, not of 255"
        )
