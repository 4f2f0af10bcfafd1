"""Exports a network as a StableHLO program, an ONNX graph, or a folder for the Hugging Face Hub.

The files are written to a temporary folder, read back and compared with the network on real images.
Only an export that agrees gets its name; nothing is left of any other.
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
import numpy as np

from resnet_jax.errors import ExportError, WeightsError, importing, unknown_name
from resnet_jax.export.agreement import Agreement, compare, on_cpu, predict, source_logits
from resnet_jax.export.image_sizes import ImageSizes, parse_image_sizes
from resnet_jax.files import expand_user, new_folder, sync
from resnet_jax.models.folding import fold_batch_norm
from resnet_jax.outputs import output_errors, special_file
from resnet_jax.weights.network import Network

FORMATS = ("stablehlo", "hub", "onnx")
WEIGHTS = ("embedded", "beside")


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
    def predict_folded(self) -> Callable[[Any, jax.Array], jax.Array]:
        """`predict` with folded batch norms; it takes the variables before folding."""

        def call(variables: Any, images: jax.Array) -> jax.Array:
            model, variables = fold_batch_norm(self.network.model, variables)
            return predict(model, self.network.preprocessing, variables, images)

        return call

    @property
    def beside(self) -> Path | None:
        """File of the weights that are not embedded."""
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
    """Exports a network; the export computes in float32 whatever the network was trained in.

    Args:
      network: What to export.
      format: "stablehlo" (a program for JAX), "onnx" (a graph), or "hub" (a folder).
      output: File or, for "hub", folder.
      platforms: Platforms of a program, separated by commas. Default: "cpu,cuda,tpu".
      fold_batch_norm: Fold the batch norms into the convolutions; not for "hub".
      weights: "embedded" in the program or graph, or "beside" it: a program's in a .safetensors
        file of the same name, a graph's in FILE.data. Default: embedded. Not for "hub".
      input_size: "HEIGHTxWIDTH" of the images in pixels, or "open" for any size. Default: squares
        of the network's image size. Not for "hub".
      opset: Version of ONNX's operators. Default: 21.
      push: "owner/name" on the Hugging Face Hub to upload a "hub" folder to.
      force: Replace existing files.

    Returns:
      How the export, read back, agrees with the network on real images.

    Raises:
      ExportError: An option is wrong or does not go with the format, the output exists or cannot be
        written, a package is missing, or the export disagrees.
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
    output = expand_user(output)
    _check_options(format, platforms, fold_batch_norm, weights, input_size, opset, push)
    network = _in_float32(network)
    sizes = parse_image_sizes(input_size, network.model, network.preprocessing.image_size)
    exported = _folded(network) if fold_batch_norm else network
    names, folder = _file_names(format, output, weights == "beside")
    with _staged(output, names, folder, force) as (stage, paths):
        job = _Job(exported, [stage / name for name in names], sizes, platforms, opset)
        run = _WRITERS[format](job)
        agreement = compare(network, run, sizes.checked, paths)
    if push:
        from resnet_jax.export.hub import push_folder

        push_folder(output, push)
    return agreement


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
    if (norm := network.model.norm) != "batch":
        reason = "its statistics are each image's own; only batch norm's are fixed"
        if not isinstance(norm, str):
            reason = "only norm = 'batch' is"
        raise ExportError(f"--fold_batch_norm: norm = {norm!r} cannot be folded: {reason}")
    return network.folded()


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
    """(names of an export's files, whether they go into a folder of their own)."""
    if format == "hub":
        return ["README.md", "config.json", "model.safetensors"], True
    if not beside:
        return [output.name], False
    if format == "onnx":
        return [output.name, f"{output.name}.data"], False
    if output.suffix == ".safetensors":
        raise ExportError(f"--output={output}: is the name of the weights beside it; take another")
    return [output.name, output.with_suffix(".safetensors").name], False


# Writes the files and returns a function that runs them: uint8 images -> logits.
_Writer = Callable[[_Job], Callable[[np.ndarray], np.ndarray]]


def _write_stablehlo(job: _Job) -> Callable[[np.ndarray], np.ndarray]:
    from resnet_jax.export.stablehlo import open_stablehlo, parse_platforms, write_stablehlo

    platforms = parse_platforms(job.platforms or "cpu,cuda,tpu")
    network, path = job.network, job.files[0]
    write_stablehlo(
        *(job.predict_folded, network.variables, job.sizes, network.channels),
        *(platforms, path, job.beside),
    )
    program = open_stablehlo(path, job.beside)

    def run(images: np.ndarray) -> np.ndarray:
        with on_cpu():
            return program(images)

    return run


def _write_onnx(job: _Job) -> Callable[[np.ndarray], np.ndarray]:
    with importing("--format=onnx", ExportError):
        import onnxruntime  # noqa: F401 (open_onnx needs it)

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
    """A graph's metadata: its input and the meaning of its outputs."""
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
        found = load_pretrained(folder)
    except WeightsError as error:
        raise ExportError(
            f"--format=hub: {job.network.name} cannot be read back: {error}"
        ) from error
    return functools.partial(source_logits, found.model, found.variables, found.preprocessing)


_WRITERS: Mapping[str, _Writer] = {
    "stablehlo": _write_stablehlo,
    "onnx": _write_onnx,
    "hub": _write_hub,
}


@contextlib.contextmanager
def _staged(
    output: Path, names: Sequence[str], folder: bool, force: bool
) -> Iterator[tuple[Path, list[Path]]]:
    """A folder beside the output for its files, which get their places if nothing fails.

    With `force`, files and links of these names are replaced. Other files in a hub's folder stay,
    and a FIFO or a device is never replaced.
    """
    paths = [(output if folder else output.parent) / name for name in names]
    flag = f"--output={output}"
    with output_errors(output, flag, ExportError):
        if folder and os.path.lexists(output) and not output.is_dir():
            raise ExportError(f"{flag}: is a file; remove it, or take another")
        for path in paths:
            _check_file(path, flag)
        for path in [output, *paths]:
            if os.path.lexists(path) and not force:
                raise ExportError(f"{flag}: {path} exists; take another, or give --force")
        with new_folder(output.parent) as stage:
            yield stage, paths
            _move(stage, output if folder else None, paths)


def _check_file(path: Path, flag: str) -> None:
    special = special_file(path)
    kind = "a folder" if path.is_dir() else special and special.kind
    if kind:
        raise ExportError(f"{flag}: {path} is {kind}; remove it, or take another")


def _move(stage: Path, folder: Path | None, paths: Sequence[Path]) -> None:
    """Moves complete files to their places, the first one last because it needs the others."""
    for path in paths:
        sync(stage / path.name)
    if folder is not None and not folder.exists():
        os.replace(stage, folder)
        return
    for path in reversed(paths):
        os.replace(stage / path.name, path)  # a link there is replaced, not followed
