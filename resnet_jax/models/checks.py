"""Which values the fields of `ResNet` may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from resnet_jax.errors import ModelError
from resnet_jax.limits import MAX_CLASSES
from resnet_jax.models.blocks import SHORTCUT_OPTIONS, ResidualBlock
from resnet_jax.models.norms import NORM_KINDS, is_norm
from resnet_jax.ops.convolution import PRECISIONS

if TYPE_CHECKING:
    from resnet_jax.models.resnet import ResNet


def check_fields(model: ResNet) -> None:
    """Raises ModelError for the first field whose value is not allowed."""
    block, stages = model.block_cls, len(model.stage_sizes)
    if not (isinstance(block, type) and issubclass(block, ResidualBlock)):
        raise ModelError(f"block_cls = {block!r} is not a subclass of ResidualBlock")
    if not isinstance(getattr(model.stem_type, "stride", None), int):
        raise ModelError(f"stem_cls = {model.stem_cls!r} has no class attribute `stride`")
    strides = model.strides()
    norm_group = model.bn_group_size
    rules = {
        "stage_sizes": (stages > 0 and min(model.stage_sizes) > 0, "positive block counts"),
        "stage_widths": (len(model.stage_widths) == stages, f"{stages} widths, one a stage"),
        "num_classes": (
            _is_count(model.num_classes) and model.num_classes <= MAX_CLASSES,
            f"0 (no head) to {MAX_CLASSES:,}",
        ),
        "dtype": (_is_floating(model.dtype), "a floating-point type such as jnp.bfloat16"),
        "precision": (_is_precision(model.precision), f"None or one of {PRECISIONS}"),
        "shortcut": (model.shortcut in SHORTCUT_OPTIONS, f"one of {SHORTCUT_OPTIONS}"),
        "norm": (
            is_norm(model.norm),
            f"one of {NORM_KINDS}, or a Flax module's class (or functools.partial of it) that "
            "makes a norm",
        ),
        "axis_name": (
            isinstance(model.norm, str) or model.axis_name is None,
            "None with a norm of your own, which may have it as a field; "
            "model.bn_sync = 'none' in a configuration",
        ),
        "weight_standardization": (
            model.norm != "batch" or not model.weight_standardization,
            "False with norm = 'batch'",
        ),
        "cardinality": (
            model.cardinality >= 1 and (block.bottleneck or model.cardinality == 1),
            "1 or more, and 1 without bottleneck blocks",
        ),
        "base_width": (
            model.base_width >= 1 and (block.bottleneck or model.base_width == 64),
            "1 or more, and 64 without bottleneck blocks",
        ),
        "se_ratio": (0 <= model.se_ratio <= 1, "between 0 (none) and 1"),
        "eca": (not (model.eca and model.se_ratio), "False with se_ratio more than 0"),
        "bn_momentum": (0 <= model.bn_momentum < 1, "in [0, 1)"),
        "bn_epsilon": (model.bn_epsilon > 0, "more than 0"),
        "bn_group_size": (
            norm_group is None or (norm_group >= 1 and model.axis_name is not None),
            "None, or 1 or more together with axis_name",
        ),
        "zero_init_residual": (
            not (model.zero_init_residual and model.shortcut == "none"),
            "False in a plain network, whose signal it would stop",
        ),
        "stochastic_depth_rate": (
            0 <= model.stochastic_depth_rate < 1
            and not (model.stochastic_depth_rate and model.shortcut == "none"),
            "in [0, 1), and 0 in a plain network",
        ),
        "dropout_rate": (0 <= model.dropout_rate < 1, "in [0, 1)"),
        "output_stride": (
            model.output_stride is None
            or (_is_count(model.output_stride) and model.output_stride in strides),
            f"None or one of {strides}",
        ),
    }
    for field, (holds, allowed) in rules.items():
        if not holds:
            value = " ".join(repr(getattr(model, field)).split())  # a module's takes many lines
            raise ModelError(f"{field} = {value:.200} is not allowed: {allowed}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and bool(value >= 0)


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(dtype, jnp.floating))
    except TypeError:
        return False


def _is_precision(precision: Any) -> bool:
    return precision is None or precision in PRECISIONS or isinstance(precision, lax.Precision)
