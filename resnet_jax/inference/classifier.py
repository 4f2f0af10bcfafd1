"""`Classifier`: a trained network that names the classes of images."""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from resnet_jax.data.decode import image_error
from resnet_jax.errors import ConfigError, DataError, library_errors, unknown_name
from resnet_jax.inference.batch_predictor import BatchPredictor
from resnet_jax.inference.explain import grad_cam
from resnet_jax.inference.images import ImageFile, from_memory, name_of
from resnet_jax.limits import MAX_CHANNELS
from resnet_jax.weights.network import Network, is_predicted
from resnet_jax.weights.source import open_network

_ORANGE, _MAX_OPAQUE = (255, 90, 0), 2 / 3  # of the evidence in an overlay


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A class and its probability.

    Args:
      name: The class's name.
      index: The class's number, its place in the logits.
      probability: From 0 to 1.
    """

    name: str
    index: int
    probability: float


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation(Prediction):
    """A class, its probability, and where the evidence for it lies in the image.

    Args:
      name: The class's name.
      index: The class's number, its place in the logits.
      probability: From 0 to 1.
      image: The crop of the image that the network sees, uint8 [S, S, C].
      evidence: Its heat map by Grad-CAM, float32 [S, S] in [0, 1]; the maximum is 1, or 0 where
        nothing in the image speaks for the class.
    """

    image: np.ndarray = dataclasses.field(repr=False)
    evidence: np.ndarray = dataclasses.field(repr=False)

    def overlay(self) -> Image.Image:
        """Draws the evidence over the image, more opaque where there is more of it.

        Returns:
          An RGB image of S x S pixels. Of an image with more channels it shows the first three;
          with two, the first one.
        """
        channels = 3 if self.image.shape[2] >= 3 else 1
        opacity = _MAX_OPAQUE * self.evidence[:, :, None]
        blended = (1 - opacity) * self.image[:, :, :channels] + opacity * np.array(_ORANGE)
        return Image.fromarray(blended.round().astype(np.uint8))


class Classifier:
    """A trained network that takes images of any kind and returns class names and probabilities.

    Images are a path, an encoded image as bytes or an open binary file, a Pillow image, an array of
    NumPy, JAX or the like ([H, W, C], [N, H, W, C] or grayscale [H, W]), or a list of any of these.
    They are rotated upright by their EXIF orientation (unless the network was opened with
    upright=False), converted to the network's channels (transparency is dropped), resized and
    cropped as in evaluation. Arrays are uint8, or have values as docs/decoding.md describes for
    files: floating-point from 0 to 1, for example. A network for other than 1 or 3 channels needs
    images with that number of channels, which RGBA images, TIFF and .npy files and arrays may have.

    An image gives the same numbers whatever the other images are, because batches are always filled
    up to `batch_size`. For single small images, batch_size=1 saves that work.

    Args:
      network: From `load`, or `resnet_jax.weights.source.open_network`.
      batch_size: Images per batch. Default: a fast size.

    Raises:
      ConfigError: The network has no head, or is a path; or `batch_size` is below 0.

    Example:
      >>> import jax, tempfile, resnet_jax as rj
      >>> model = rj.ResNet20(num_classes=10)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rj.save_weights(f"{folder}/w.safetensors", model, variables)
      ...     classifier = rj.Classifier.load(f"{folder}/w.safetensors", model="resnet20")
      >>> [best, second] = classifier(Image.new("RGB", (60, 40)), top=2)[0]
      >>> best.probability >= second.probability
      True
      >>> classifier.probabilities(np.zeros((3, 60, 40, 3), np.uint8)).shape
      (3, 10)
      >>> [[explanation]] = classifier.explain(Image.new("RGB", (60, 40)))
      >>> explanation.name == best.name, explanation.overlay().size
      (True, (32, 32))
    """

    def __init__(self, network: Network, *, batch_size: int = 0) -> None:
        if isinstance(network, (str, os.PathLike)):
            raise ConfigError(f"{network}: open it with rj.Classifier.load")
        if not network.model.num_classes:
            raise ConfigError(f"{network.source}: the network has no head, and so no classes")
        self.network, folded = network, network.folded()
        model = folded.model
        self.outputs = BatchPredictor(
            folded,
            lambda variables, images: jnp.asarray(model.apply(variables, images, train=False)),
            batch_size,
        )

    def __repr__(self) -> str:
        network = self.network
        facts = [network.name, f"{network.model.num_classes} classes"]
        facts += [f"assumed: {line}" for line in network.assumed]
        return f"<Classifier of {network.source}: {'; '.join(facts)}>"

    def __reduce__(self) -> Any:  # a program cannot be pickled; the copy compiles its own
        make = functools.partial(type(self), batch_size=self.outputs.batch_size)
        return make, (self.network,)

    @classmethod
    def load(
        cls, source: str | os.PathLike[str], *, batch_size: int = 0, **options: Any
    ) -> Classifier:
        """Opens a trained network.

        Args:
          source: A workdir, a weight file, a folder in the Hub's form, or "owner/name" on the Hub.
          batch_size: Images per batch. Default: a fast size.
          **options: Options of `open_network`, such as `model`, `best`, `ema`, `image_size`,
            `crop_fraction` and `classes`.

        Returns:
          The classifier.

        Raises:
          WeightsError: There is no network at `source`, or it is damaged.
          ModelError: No network is called `model`.
          ConfigError: An option is wrong or does not go with `source`.
        """
        return cls(open_network(source, **options), batch_size=batch_size)

    def __call__(self, images: Any, top: int | None = None) -> list[list[Prediction]]:
        """The most likely classes of each image.

        Args:
          images: One or several, of any kind named above.
          top: Number of classes, or all of a network with fewer. Default: five; for a multi-label
            network those whose probability reaches `network.threshold`, which may be none.

        Returns:
          A list for each image, the most likely class first; the lower index first where equal.

        Raises:
          DataError: An image cannot be read, or is not of a kind named above.
          WeightsError: The network's outputs are not finite numbers.
          ConfigError: `top` is below 1.
        """
        check_top(top)
        return [self.best(row, top) for row in self.logits(images)]

    def logits(self, images: Any) -> np.ndarray:
        """The network's outputs.

        Args:
          images: One or several, of any kind named above.

        Returns:
          float32 [N, classes].

        Raises:
          DataError: An image cannot be read, or is not of a kind named above.
          WeightsError: The network's outputs are not finite numbers.
        """
        rows = list(map(_or_raise, self.outputs(list(_each(images)))))
        return np.stack(rows) if rows else np.empty((0, self.network.model.num_classes), np.float32)

    def probabilities(self, images: Any) -> np.ndarray:
        """The probabilities of the classes.

        Args:
          images: One or several, of any kind named above.

        Returns:
          float32 [N, classes]: the softmax of the logits, or the sigmoid of each for a multi-label
          network.

        Raises:
          DataError: An image cannot be read, or is not of a kind named above.
          WeightsError: The network's outputs are not finite numbers.
        """
        return self.network.probabilities(self.logits(images))

    def explain(
        self, images: Any, top: int = 1, *, classes: Any = None, layer: str = ""
    ) -> list[list[Explanation]]:
        """Where the evidence for a class lies in each image, by Grad-CAM (Selvaraju et al. 2017).

        Args:
          images: One or several, of any kind named above.
          top: Number of classes to explain, the most likely ones, or all of a network with fewer.
          classes: The classes to explain instead, in each image: a name, a number, or a list of
            these.
          layer: The layer whose map is used: "stem", "stage1", ... Default: the last stage, whose
            map is the coarsest and says most about classes.

        Returns:
          A list for each image with an `Explanation` for each class: the class, its probability,
          the heat map `evidence`, and `overlay()`, a picture to look at.

        Raises:
          DataError: An image cannot be read, or is not of a kind named above.
          WeightsError: The network's outputs are not finite numbers.
          ConfigError: `top` is below 1, or there is no class of a name or a number in `classes`.
          ModelError: There is no such layer.

        Example:
          >>> import tempfile, resnet_jax as rj
          >>> model = rj.ResNet20(num_classes=2)
          >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     rj.save_weights(f"{folder}/w.safetensors", model, variables)
          ...     classifier = rj.Classifier.load(
          ...         f"{folder}/w.safetensors", model="resnet20", classes=["cat", "dog"]
          ...     )
          >>> photo = np.zeros((60, 40, 3), np.uint8)
          >>> [[dog]] = classifier.explain(photo, classes="dog")
          >>> dog.name, dog.evidence.shape, dog.overlay().size
          ('dog', (32, 32), (32, 32))
        """
        check_top(top)
        chosen = None if classes is None else self._indices(classes)
        images = list(_each(images))
        explained = []
        for image, logits in zip(images, self.logits(images)):
            indices = self._most_likely(logits)[:top] if chosen is None else chosen
            crop = self.outputs.crop(image)
            maps = self._evidence(crop, indices, layer)
            explained.append(
                [
                    Explanation(each.name, each.index, each.probability, crop, evidence)
                    for each, evidence in zip(self._predictions(logits, indices), maps)
                ]
            )
        return explained

    def _evidence(self, crop: np.ndarray, indices: np.ndarray, layer: str) -> np.ndarray:
        """Grad-CAM of K classes for a crop, float32 [K, S, S]."""
        network = self.network
        images = network.preprocessing.normalize(np.stack([crop] * len(indices)))
        classes = jnp.asarray(indices)
        return np.asarray(grad_cam(network.model, self._variables, images, classes, layer))

    @functools.cached_property
    def _variables(self) -> Any:
        """The variables on a device, with their norms, which `outputs` has folded."""
        return jax.device_put(self.network.variables)

    def best(self, logits: np.ndarray, top: int | None = None) -> list[Prediction]:
        """The most likely classes for one image's logits [classes], as `__call__` returns them."""
        if top is None and self.network.multi_label:
            top = int(is_predicted(logits, self.network.threshold).sum())
        return self._predictions(logits, self._most_likely(logits)[: 5 if top is None else top])

    def _most_likely(self, logits: np.ndarray) -> np.ndarray:
        """The numbers of all classes, by decreasing probability."""
        # Large logits differ where their probabilities are both rounded to 1.
        key = logits if self.network.multi_label else self.network.probabilities(logits)
        return np.argsort(-key, kind="stable")

    def _predictions(self, logits: np.ndarray, indices: Iterable[int]) -> list[Prediction]:
        names, probabilities = self.network.class_names, self.network.probabilities(logits)
        return [Prediction(names[i], int(i), float(probabilities[i])) for i in indices]

    def _indices(self, classes: Any) -> np.ndarray:
        """The numbers of classes, given as one name or number or several."""
        several = [classes] if isinstance(classes, str) or np.ndim(classes) == 0 else classes
        if not len(several):
            raise ConfigError("classes: the list is empty; give names or numbers")
        return np.array([_index_of(each, self.network.class_names) for each in several])


def _index_of(chosen: Any, names: Sequence[str]) -> int:
    """The number of a class, given as its name or number."""
    if isinstance(chosen, str):
        found = [index for index, name in enumerate(names) if name == chosen]
        if len(found) > 1:
            numbers = ", ".join(map(str, found))
            raise ConfigError(f"classes: {len(found)} are called {chosen!r}; give one of {numbers}")
        if not found:
            raise ConfigError(f"classes: {unknown_name('class', chosen, names)}")
        return found[0]
    try:
        index = operator.index(chosen)
    except TypeError as error:
        raise ConfigError(f"classes: {chosen!r} is neither a name nor a number") from error
    if not 0 <= index < len(names):
        raise ConfigError(f"classes: {index}: must be from 0 to {len(names) - 1:,}")
    return index


def check_top(top: int | None) -> None:
    """Raises ConfigError for a number of classes below 1."""
    if top is not None and top < 1:
        raise ConfigError(f"--top={top}: must be 1 or more")


def _or_raise(row: np.ndarray | DataError) -> np.ndarray:
    if isinstance(row, DataError):
        raise row
    return row


def _each(images: Any) -> Iterator[Any]:
    """The single images in a caller's argument."""
    images = from_memory(images)
    if isinstance(images, str | os.PathLike | ImageFile):
        yield images
    elif isinstance(images, Image.Image):
        name = name_of(images)
        with library_errors(lambda error: DataError(f"{name}: {image_error(error)}")):
            images.load()  # here, because two threads must not load one image
        yield images
    elif isinstance(images, np.ndarray):
        yield from _each_pixels(images)
    elif isinstance(images, Iterable):
        for image in images:
            yield from _each(image)
    else:
        raise DataError(
            f"images: {type(images).__name__} is not an image; give paths, bytes, open binary "
            "files, Pillow images, arrays"
        )


def _each_pixels(pixels: np.ndarray) -> Iterator[np.ndarray]:
    if pixels.ndim == 4:
        for each in pixels:
            yield from _each_pixels(each)
        return
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels > MAX_CHANNELS or not pixels.size:
        raise DataError(
            f"images: an array of shape {pixels.shape}; give [H, W], [H, W, C] or [N, H, W, C], C "
            f"from 1 to {MAX_CHANNELS:,}"
        )
    yield pixels
