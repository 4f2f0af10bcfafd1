"""A network as a folder for the Hugging Face Hub: weights, timm's config.json, a model card."""

from __future__ import annotations

import fnmatch
import functools
import re
from pathlib import Path
from typing import Any

from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.errors import ExportError, importing, library_errors, reason_of
from resnet_jax.models.registry import create_model, model_info
from resnet_jax.models.summary import summary
from resnet_jax.terminal import json_text, visible
from resnet_jax.weights.files import save_weights
from resnet_jax.weights.naming import schemes_for
from resnet_jax.weights.network import Network
from resnet_jax.workdirs.records import is_training, read_records

# Fields that config.json cannot say: they must be those of the registered network.
_OF_THE_NAME = (
    *("stage_sizes", "block_cls", "stem_cls", "stage_widths", "shortcut", "stride_in_1x1"),
    *("cardinality", "base_width", "se_ratio", "eca", "norm", "weight_standardization"),
    "bn_epsilon",
)
# Patterns of registered names that timm does not have.
_ONLY_HERE = (
    *("plain*", "*_cifar", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    *("resnet1202", "resnetv2_110", "resnetv2_164", "resnetv2_200", "wide_resnet28_10"),
)

# Fields of a recipe that are always shown, and those that concern the machine, not the result.
_ALWAYS = (
    *("optimizer.name", "optimizer.learning_rate", "optimizer.weight_decay", "schedule.name"),
    *("train.epochs", "train.batch_size"),
)
_PRIVATE = ("log.", "checkpoint.", "data.name", "data.data_dir", "data.threads", "data.workers")


def in_timm(name: str) -> bool:
    """Whether timm has a network under a registered name.

    Example:
      >>> in_timm("resnet50"), in_timm("resnet20")
      (True, False)
    """
    return not any(fnmatch.fnmatch(name, pattern) for pattern in _ONLY_HERE)


def write_hub(network: Network, folder: Path) -> None:
    """Writes model.safetensors, config.json and README.md into an existing folder.

    Raises:
      ExportError: A field that config.json cannot say differs from the registered network.
    """
    named = create_model(network.name, num_classes=network.model.num_classes)
    for field in _OF_THE_NAME:
        found, expected = getattr(network.model, field), getattr(named, field)
        if not _equal(found, expected):
            raise ExportError(
                f"--format=hub: this {network.name} has {field} = {found!r}, which config.json "
                "cannot say; use --format=stablehlo or onnx"
            )
    config = json_text(hub_config(network), indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(network), encoding="utf-8")
    save_weights(folder / "model.safetensors", network.model, network.variables)


def _equal(field: Any, other: Any) -> bool:
    """Whether two fields of a model are equal, also partials, which compare by identity."""
    if isinstance(field, functools.partial) and isinstance(other, functools.partial):
        return (field.func, field.args, field.keywords) == (other.func, other.args, other.keywords)
    return bool(field == other)


def hub_config(network: Network) -> dict[str, Any]:
    """A network's config.json, as timm writes it and `load_pretrained` and timm read it."""
    model, preprocessing, channels = network.model, network.preprocessing, network.channels
    side, pool = preprocessing.image_size, preprocessing.image_size // model.strides()[-1]
    scheme = schemes_for(model)[0]
    arguments: dict[str, Any] = {}
    if channels != 3:
        arguments["in_chans"] = channels
    if model.output_stride is not None:
        arguments["output_stride"] = model.output_stride
    return {
        "architecture": network.name,
        "num_classes": model.num_classes,
        "num_features": list(model.feature_info().values())[-1].channels,
        "label_names": list(network.class_names),
        **network.problem,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "input_size": [channels, side, side],
            "fixed_input_size": False,
            "pool_size": [pool, pool],
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_fraction,
            "crop_mode": preprocessing.crop_mode,
            "mean": _per_channel(preprocessing.mean, channels),
            "std": _per_channel(preprocessing.std, channels),
            "num_classes": model.num_classes,
            "first_conv": scheme.top["stem/conv1"],
            "classifier": scheme.head,
        },
    }


def _per_channel(values: tuple[float, ...], channels: int) -> list[float]:
    """One number for each channel."""
    return list(values) * (channels if len(values) == 1 else 1)


def last_evaluation(network: Network) -> dict[str, Any] | None:
    """The record of the last evaluation of the exported state; None without one."""
    path = Path(network.source, "metrics.jsonl")
    if network.step is None or not path.is_file():
        return None
    own = [
        record
        for record in read_records(path).good
        if record["step"] == network.step
        and not is_training(record)
        and (network.config is None or record["split"] == network.config.data.eval_split)
        and (record.get("weights") == "ema") == network.ema
    ]
    return own[-1] if own else None


def model_card(network: Network) -> str:
    """The README.md of a network's folder, with the front matter that the Hub reads."""
    tags = ["image-classification", "resnet", "jax", "flax"]
    tags += ["timm"] if in_timm(network.name) else []
    front = ["---", "tags:", *(f"- {tag}" for tag in tags)]
    front += ["pipeline_tag: image-classification", "---"]
    parts = [
        "\n".join(front),
        f"# {network.name}",
        ". ".join(filter(None, [model_info(network.name).paper, "Made with resnet_jax."])),
        _table(_facts(network)),
        *_training(network),
        _usage(network),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(network: Network) -> dict[str, str]:
    preprocessing = network.preprocessing
    shape = (1, preprocessing.image_size, preprocessing.image_size, network.channels)
    counts = summary(network.model, shape)
    facts = {
        "parameters": f"{counts.parameters:,}",
        "multiply-adds": f"{counts.multiply_adds:,} an image",
        "image": f"{shape[1]} x {shape[2]} pixels, {_colors(shape[3])}: {_geometry(preprocessing)} "
        f"({preprocessing.interpolation})",
        "classes": str(network.model.num_classes)
        + (", none, one or several for an image" if network.multi_label else ""),
    }
    record = last_evaluation(network)
    if network.config is not None:
        kind, _, path = network.config.data.name.partition(":")
        # Only the last part of a path, because the rest is private.
        facts["dataset"] = _plain(f"{kind}:{Path(path).name}" if path else kind)
    if record is not None:
        average = ", moving average" if network.ema else ""
        split = _plain(record["split"])
        for name, title in (("map", "mAP"), ("f1", "macro F1"), ("f1_micro", "micro F1")):
            if name in record:
                facts[f"{title} ({split})"] = f"{record[name]:.2%}"
        facts[f"top-1 ({split})"] = f"{record['top1']:.2%}"
        if "top5" in record and network.model.num_classes > 5:
            facts[f"top-5 ({split})"] = f"{record['top5']:.2%}"
        if "images" in record:
            facts["images evaluated"] = f"{record['images']:,}"
        facts["state"] = f"after {record['step']:,} steps{average}"
    return facts


def _colors(channels: int) -> str:
    return {1: "grayscale", 3: "RGB"}.get(channels, f"{channels} channels")


def _geometry(preprocessing: Preprocessing) -> str:
    size, resized = preprocessing.image_size, preprocessing.resize_size
    if preprocessing.crop_mode == "center":
        return f"the center, with the shorter side resized to {resized} pixels"
    of = "" if resized == size else f"the center of {resized} x {resized} pixels: "
    return f"{of}the whole image, regardless of its proportions"


def _plain(name: object) -> str:
    """A name with the characters of Markdown and HTML escaped."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", visible(name))


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in facts.items())])


def _training(network: Network) -> list[str]:
    """The recipe: the usual fields, and all that differ from the defaults."""
    from resnet_jax.config.schema import Config
    from resnet_jax.config.serialization import to_flat

    if network.config is None:
        return []
    defaults, values = to_flat(Config()), to_flat(network.config)
    lines = [
        f"{field} = {value!r}"
        for field, value in values.items()
        if field in _ALWAYS or (value != defaults[field] and not field.startswith(_PRIVATE))
    ]
    return ["## Recipe", _code("text", "\n".join(lines))]


def _usage(network: Network) -> str:
    here = """import resnet_jax as rj

model, variables, preprocessing = rj.load_pretrained("PATH_OR_OWNER/NAME")
logits = model.apply(variables, preprocessing.normalize(uint8_images), train=False)  # NHWC"""
    if network.multi_label:
        found = f"found = jax.nn.sigmoid(logits) >= {network.threshold}  # [N, classes]"
        here = f"import jax\n{here}\n{found}"
    parts = ["## Use", _code("python", here)]
    if in_timm(network.name):
        timm = """import timm

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)  # or local-dir:PATH"""
        parts.append(_code("python", timm))
    return "\n\n".join(parts)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def push_folder(folder: Path, repository: str) -> None:
    """Uploads a folder in one commit to "owner/name" on the Hub, which is created where needed.

    Raises:
      ExportError: huggingface_hub is missing, or the Hub refuses.
    """
    with importing(f"{folder} is written, but --push={repository}", ExportError):
        import huggingface_hub as hub

    def refused(error: Exception) -> ExportError:
        return ExportError(
            f"--push={repository}: the Hub refused ({reason_of(error)}); {folder} is written"
        )

    files = ["README.md", "config.json", "model.safetensors"]
    with library_errors(refused):  # no connection, token or right
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files)
