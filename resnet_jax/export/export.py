"""Gives a network away: as a StableHLO program, an ONNX graph, or a folder for the Hub.

What is written is read again and compared with the network on real images before it gets its
name; where it disagrees, nothing is left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.errors import ExportError, ModelError, WeightsError, importing, unknown_name
from resnet_jax.export.image_sizes import ImageSizes, parse_image_sizes
from resnet_jax.files import new_folder, sync
from resnet_jax.inference.writers import explained, special_file
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.network import Network
from resnet_jax.weights.pretrained import Preprocessing

FORMATS = ("stablehlo", "hub", "onnx")
WEIGHTS = ("embedded", "beside")
# Largest difference allowed, as a share of the largest logit: float32 rounding of the deepest
# networks stays below it, and a wrong constant does not.
TOLERANCE = 1e-4
IMAGES = 8  # that an export is compared on


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How an export agrees with its source.

    Args:
      difference: Largest between two outputs (logits, or features of a network without head).
      largest: Largest absolute output of the source.
      paths: The files that were written.
      sizes: (height, width) of the images, each of which was tried; the numbers are of the size
        that agrees least.
    """

    difference: float
    largest: float
    paths: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        size = sum(path.stat().st_size for path in self.paths) / 1e6
        pixels = [f"{height}x{width}" for height, width in self.sizes]
        return (
            f"{', '.join(map(str, self.paths))} ({size:.1f} MB): largest difference from the "
            f"source on {IMAGES} real images of {', '.join(pixels)} pixels {self.difference:.1e}, "
            f"largest output {self.largest:.3g}"
        )


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a writer writes, and how."""

    network: Network
    files: Sequence[Path]
    sizes: ImageSizes
    platforms: str
    opset: int

    @property
    def predict(self) -> Callable[[Any, jax.Array], jax.Array]:
        return functools.partial(predict, self.network.model, self.network.preprocessing)

    @property
    def beside(self) -> Path | None:
        """Where the weights go that are not embedded."""
        return self.files[1] if len(self.files) > 1 else None


def export_network(
    network: Network,
    format: str,
    output: str | os.PathLike[str],
    *,
    platforms: str = "",
    fold_batch_norm: bool = False,
    weights: str = "",
    input_size: str = "",
    opset: int = 0,
    push: str = "",
    force: bool = False,
) -> Agreement:
    """Exports a network; it computes in float32 whatever it was trained in.

    Args:
      network: What to export.
      format: "stablehlo" (a program for JAX), "onnx" (a graph), or "hub" (a folder).
      output: File or, for "hub", folder.
      platforms: Of a program, with commas; "": "cpu,cuda,tpu".
      fold_batch_norm: Fold the batch norms into the convolutions; not for "hub".
      weights: "embedded" in the program or graph, or "beside" it: a program's in a .safetensors
        file of the same name, a graph's in FILE.data; "": embedded. Not for "hub".
      input_size: "HEIGHTxWIDTH" of the images in pixels, or "open" for any size; "": squares of
        the network's image size. Not for "hub".
      opset: Of a graph, the version of ONNX's operators; 0: 21.
      push: Of a folder: "owner/name" on the Hugging Face Hub to upload it to.
      force: Replace what is there.

    Returns:
      How the export, read again, agrees with the network on real images.

    Raises:
      ExportError: An option that is not one or does not go with the format, an output that
        exists or cannot be written, a package that is missing, or an export that disagrees.
      WeightsError: The network's outputs are not finite numbers.

    Example:
      >>> import tempfile, jax.numpy as jnp, resnet_jax as rj
      >>> from resnet_jax.weights.source import open_network
      >>> model = rj.create_model("plain20")
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rj.save_weights(f"{folder}/w.npz", model, variables)
      ...     network = open_network(f"{folder}/w.npz", model="plain20", image_size=8)
      ...     done = export_network(network, "hub", f"{folder}/plain20")
      >>> [path.name for path in done.paths], done.difference
      (['README.md', 'config.json', 'model.safetensors'], 0.0)
    """
    output = Path(output).expanduser()
    _check_options(format, platforms, fold_batch_norm, weights, input_size, opset, push)
    network = _in_float32(network)
    sizes = parse_image_sizes(input_size, network.model, network.preprocessing.image_size)
    exported = _folded(network) if fold_batch_norm else network
    names, folder = _file_names(format, output, weights == "beside")
    with _staged(output, names, folder, force) as (stage, paths):
        job = _Job(exported, [stage / name for name in names], sizes, platforms, opset)
        run = _WRITERS[format](job)
        agreement = _compare(network, run, sizes.checked, paths)
    if push:
        from resnet_jax.export.hub import push_folder

        push_folder(output, push)
    return agreement


def sample_images(
    network: Network, count: int = IMAGES, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Real images, prepared as a network's are: scikit-learn's photographs, or grey digits.

    Args:
      network: Whose preprocessing they get.
      count: How many.
      size: Their height and width; None: squares of the network's image size.

    Returns:
      uint8 [count, H, W, C].

    Example:
      >>> # Stands in for a network.
      >>> import types
      >>> preprocessing = Preprocessing(image_size=32)
      >>> sample_images(types.SimpleNamespace(channels=1, preprocessing=preprocessing), 4).shape
      (4, 32, 32, 1)
    """
    with importing("an export, which is checked on images of scikit-learn,", ExportError):
        from PIL import Image
        from sklearn import datasets
    height, width = size or (network.preprocessing.image_size,) * 2
    if network.channels == 1:
        digits = datasets.load_digits().images[:count] * (255 / 16)
        pictures = [digit.astype(np.uint8) for digit in digits]
    else:
        photos = datasets.load_sample_images().images  # 427 x 640
        starts = [200 * k // max(1, count // 2) for k in range((count + 1) // 2)]
        pictures = [
            photo[start // 2 :, start : start + 427] for start in starts for photo in photos
        ]
    resized = [
        np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
        for picture in pictures[:count]
    ]
    stack = np.stack(resized).reshape(count, height, width, -1)
    # A network of other channels gets colours in turn.
    return np.ascontiguousarray(stack[..., np.arange(network.channels) % stack.shape[-1]])


def predict(
    model: ResNet, preprocessing: Preprocessing, variables: Any, images: jax.Array
) -> jax.Array:
    """What every export computes: uint8 images [N, H, W, C] -> logits [N, num_classes]."""
    return jnp.asarray(model.apply(variables, preprocessing.normalize(images), train=False))


def source_logits(
    model: ResNet, variables: Any, preprocessing: Preprocessing, images: np.ndarray
) -> np.ndarray:
    """`predict` on this machine's CPU, compiled."""
    with _on_cpu():
        return np.asarray(_compiled(model, preprocessing, variables, images))


_compiled = jax.jit(predict, static_argnums=(0, 1))


def _on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Exports are compared where float32 is float32, whatever accelerator is there."""
    try:
        return jax.default_device(jax.devices("cpu")[0])
    except RuntimeError as error:
        raise ExportError(
            "JAX_PLATFORMS hides the CPU, on which exports are checked; add cpu to it"
        ) from error


def _in_float32(network: Network) -> Network:
    means = len(network.preprocessing.mean)
    if means not in (1, network.channels):
        raise ExportError(
            f"{network.source}: the preprocessing has {means} means for images of "
            f"{network.channels} channel; export the workdir, or a folder with config.json, that "
            "says which are right"
        )
    model = network.model.clone(dtype=np.float32, remat=False)
    variables = jax.tree.map(np.asarray, network.variables)
    return dataclasses.replace(network, model=model, variables=variables)


def _folded(network: Network) -> Network:
    from resnet_jax.export.fold import fold_batch_norm

    try:
        model, variables = fold_batch_norm(network.model, network.variables)
    except ModelError as error:
        raise ExportError(f"--fold_batch_norm: {error}") from error
    return dataclasses.replace(network, model=model, variables=variables)


def _check_options(
    format: str, platforms: str, fold: bool, weights: str, input_size: str, opset: int, push: str
) -> None:
    if format not in FORMATS:
        raise ExportError(f"--format={format}: {unknown_name('format', format, FORMATS)}")
    if weights not in ("", *WEIGHTS):
        raise ExportError(f"--weights={weights}: {unknown_name('place', weights, WEIGHTS)}")
    only = {
        f"--platforms={platforms}": (platforms, ("stablehlo",)),
        f"--weights={weights}": (weights == "beside", ("stablehlo", "onnx")),
        f"--input_size={input_size}": (input_size, ("stablehlo", "onnx")),
        f"--opset={opset}": (opset, ("onnx",)),
        f"--push={push}": (push, ("hub",)),
        "--fold_batch_norm": (fold, ("stablehlo", "onnx")),
    }
    for flag, (given, formats) in only.items():
        if given and format not in formats:
            which = " or ".join(formats)
            raise ExportError(f"{flag} goes with --format={which}, not {format}; leave it out")
    if push and (push.count("/") != 1 or not all(push.split("/"))):
        raise ExportError(f"--push={push}: is not OWNER/NAME")


def _file_names(format: str, output: Path, beside: bool) -> tuple[list[str], bool]:
    """The files of an export, and whether they are in a folder of their own."""
    if format == "hub":
        return ["README.md", "config.json", "model.safetensors"], True
    if not beside:
        return [output.name], False
    if format == "onnx":
        return [output.name, f"{output.name}.data"], False
    if output.suffix == ".safetensors":
        raise ExportError(f"--output={output}: is the name of the weights beside it; take another")
    return [output.name, output.with_suffix(".safetensors").name], False


# A writer writes the files and returns what runs them: uint8 images -> logits.
_Writer = Callable[[_Job], Callable[[np.ndarray], np.ndarray]]


def _write_stablehlo(job: _Job) -> Callable[[np.ndarray], np.ndarray]:
    from resnet_jax.export.stablehlo import open_stablehlo, parse_platforms, write_stablehlo

    platforms = parse_platforms(job.platforms or "cpu,cuda,tpu")
    network, path = job.network, job.files[0]
    write_stablehlo(
        *(job.predict, network.variables, job.sizes, network.channels),
        *(platforms, path, job.beside),
    )
    program = open_stablehlo(path, job.beside)

    def run(images: np.ndarray) -> np.ndarray:
        with _on_cpu():
            return program(images)

    return run


def _write_onnx(job: _Job) -> Callable[[np.ndarray], np.ndarray]:
    with importing("--format=onnx", ExportError):
        import onnxruntime  # noqa: F401 (which open_onnx needs)

        from resnet_jax.export.onnx import OPSET, open_onnx, write_onnx

    network, path = job.network, job.files[0]
    write_onnx(
        *(job.predict, network.variables, job.sizes, network.channels, _onnx_facts(job), path),
        opset=job.opset or OPSET,
        output="logits" if network.model.num_classes else "features",
        weights_path=job.beside,
    )
    return open_onnx(path)


def _onnx_facts(job: _Job) -> dict[str, Any]:
    """The metadata of a graph: what its images are, and what its outputs mean."""
    network = job.network
    return {
        "architecture": network.name,
        "class_names": network.class_names,
        "input": {
            "layout": "NHWC",
            "type": "uint8, 0 to 255; the graph subtracts mean and divides by std itself",
            "channels": network.channels,
            **job.sizes.describe(),
        },
        "preprocessing": dataclasses.asdict(network.preprocessing),
        **network.problem,
    }


def _write_hub(job: _Job) -> Callable[[np.ndarray], np.ndarray]:
    from resnet_jax.export.hub import write_hub
    from resnet_jax.weights.pretrained import load_pretrained

    folder = job.files[0].parent
    write_hub(job.network, folder)
    try:
        model, variables, preprocessing = load_pretrained(folder)
    except WeightsError as error:
        raise ExportError(
            f"--format=hub: {job.network.name} cannot be read back: {error}"
        ) from error
    return functools.partial(source_logits, model, variables, preprocessing)


_WRITERS: Mapping[str, _Writer] = {
    "stablehlo": _write_stablehlo,
    "onnx": _write_onnx,
    "hub": _write_hub,
}


def _compare(
    network: Network,
    run: Callable[[np.ndarray], np.ndarray],
    sizes: tuple[tuple[int, int], ...],
    paths: Sequence[Path],
) -> Agreement:
    """How what was written, run, agrees with the network on real images of each size."""
    found = [_difference(network, run, size) for size in sizes]
    difference, largest = max(found, key=lambda each: each[0] / each[1] if each[1] else 0)
    return Agreement(difference, largest, tuple(paths), sizes)


def _difference(
    network: Network, run: Callable[[np.ndarray], np.ndarray], size: tuple[int, int]
) -> tuple[float, float]:
    """The largest difference of two outputs, and the source's largest output, at one size."""
    images = sample_images(network, size=size)
    expected = source_logits(network.model, network.variables, network.preprocessing, images)
    if not np.isfinite(expected).all():
        raise WeightsError(
            f"{network.source}: the network's outputs are not finite numbers; take another state "
            "or file"
        )
    difference = float(np.abs(run(images) - expected).max())
    largest = float(np.abs(expected).max())
    if not difference <= TOLERANCE * largest:  # NaN is no agreement
        raise ExportError(
            f"the export disagrees with its source by {difference:.1e} on images of "
            f"{size[0]}x{size[1]} pixels; allowed is {TOLERANCE:g} of the largest output, "
            f"{largest:.3g}; nothing was written"
        )
    return difference, largest


@contextlib.contextmanager
def _staged(
    output: Path, names: Sequence[str], folder: bool, force: bool
) -> Iterator[tuple[Path, list[Path]]]:
    """A folder beside the output for its files, which get their places if nothing fails.

    With `force`, files and links of these names are replaced; whatever else is in a hub's folder
    stays. A FIFO or a device is never replaced.
    """
    paths = [(output if folder else output.parent) / name for name in names]
    flag = f"--output={output}"
    with explained(output, flag, ExportError):
        if folder and os.path.lexists(output) and not output.is_dir():
            raise ExportError(f"{flag}: is a file; remove it, or take another")
        for path in paths:
            _check_file(path, flag)
        for path in [output, *paths]:
            if os.path.lexists(path) and not force:
                raise ExportError(f"{flag}: {path} exists; take another, or give --force")
        with new_folder(output.parent) as stage:
            yield stage, paths
            _put(stage, output if folder else None, paths)


def _check_file(path: Path, flag: str) -> None:
    special = special_file(path)
    kind = "a folder" if path.is_dir() else special and special.kind
    if kind:
        raise ExportError(f"{flag}: {path} is {kind}; remove it, or take another")


def _put(stage: Path, folder: Path | None, paths: Sequence[Path]) -> None:
    """Gives complete files their names, the first one last because it needs the others."""
    for path in paths:
        sync(stage / path.name)
    if folder is not None and not folder.exists():
        os.replace(stage, folder)
        return
    for path in reversed(paths):
        os.replace(stage / path.name, path)  # a link there is replaced, not followed
