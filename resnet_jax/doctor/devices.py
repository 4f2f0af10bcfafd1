"""Checks of JAX's backend and devices, compared with the hardware."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax

from resnet_jax import upstream
from resnet_jax.distributed.accelerators import find_accelerator
from resnet_jax.distributed.device_memory import memory_fraction
from resnet_jax.doctor.findings import OK, PROBLEM, WARNING, Finding, plural, size
from resnet_jax.doctor.machine import Machine
from resnet_jax.doctor.reasons import explain, known_reason, shortened
from resnet_jax.packages import installed_versions
from resnet_jax.workdirs.environment import runtime, variables

_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


def backend(machine: Machine, log: Sequence[str] = ()) -> Finding:
    """Starts JAX: its platform, or why it uses no accelerator; `log` has lines that JAX logs."""
    try:
        jax.devices()
    except Exception as error:  # of any class: an unknown platform raises AssertionError
        return judge_failure(error, machine, log)
    found = runtime()
    reasons = [*log, *map(str, upstream.backend_errors().values())]
    return judge_backend(jax.default_backend(), machine, reasons, found)


def judge_failure(error: Exception, machine: Machine, log: Sequence[str] = ()) -> Finding:
    """Why JAX does not start."""
    said = shortened(error) if str(error) else type(error).__name__
    platforms = machine.environ.get("JAX_PLATFORMS", "")
    reason = known_reason("\n".join([str(error), *log]))
    if not reason and platforms and not str(error):
        reason = f"JAX_PLATFORMS={platforms} names a platform that this machine lacks: unset it"
    return Finding(PROBLEM, f"does not start: {reason or said}", {"error": said})


def judge_backend(
    platform: str, machine: Machine, reasons: Sequence[str], facts: dict[str, Any]
) -> Finding:
    """Compares JAX's platform with the hardware; `reasons` are logs and errors."""
    facts = {"platform": platform, **facts}
    said = ", ".join(
        f"{name.removesuffix(' in use')} {facts[name]}"
        for name in ("CUDA in use", "cuDNN in use")
        if name in facts
    )
    text = platform + (f", {said}" if said else "")
    if platform != "cpu":
        return Finding(OK, text, facts)
    cards, chips = machine.nvidia_cards(), machine.tpu_chips()
    if not cards and not chips:
        return Finding(OK, "cpu", facts)
    what = f"{len(cards)} x {cards[0]}" if cards else f"a TPU of {plural(chips, 'chip')}"
    if hidden := _hidden_by(machine, bool(cards)):
        text = f"the CPU, because {hidden} hides {what}: unset it to use the accelerator"
        return Finding(WARNING, text, facts)
    why = _why_unused(bool(cards), "\n".join(reasons))
    return Finding(PROBLEM, f"JAX uses the CPU, and not {what}: {why}", facts)


def _hidden_by(machine: Machine, is_card: bool) -> str:
    """The setting NAME=VALUE that hides an accelerator from JAX; "" without one."""
    names = {"cuda", "gpu"} if is_card else {"tpu"}
    for variable in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        value = machine.environ.get(variable, "")
        if value and not names & set(value.lower().split(",")):
            return f"{variable}={value}"
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    if is_card and visible is not None and visible.strip() in ("", "-1", "none", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES={visible}"
    return ""


def _why_unused(is_card: bool, log: str) -> str:
    if is_card and not installed_versions(_PLUGINS):
        return "JAX's CUDA plugin is missing: pip install 'jax[cuda12]'"
    if not is_card and not installed_versions(["libtpu"]):
        return "libtpu is missing: pip install 'jax[tpu]'"
    if reason := known_reason(_of_interest(is_card, log)):
        return reason
    name = "the CUDA plugin" if is_card else "libtpu"
    said = _of_interest(is_card, log)
    return f"{name} does not start ({explain(said)})" if said else f"{name} does not start"


def _of_interest(is_card: bool, log: str) -> str:
    """The lines that do not concern the other kind of accelerator, which JAX also tries."""
    other = ("libtpu", "TPU", "tpu") if is_card else ("cuda", "CUDA", "cuDNN")
    lines = [line for line in log.splitlines() if not any(each in line for each in other)]
    return "\n".join(lines)


def devices() -> Finding:
    """The devices of this process: kind, memory, peak."""
    own = jax.local_devices()
    kind = own[0].device_kind
    stats = own[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    facts: dict[str, Any] = {
        "kind": kind,
        "platform": own[0].platform,
        "local": len(own),
        "all": jax.device_count(),
        "bytes_limit": limit,
        "compute_capability": getattr(own[0], "compute_capability", None),
    }
    text = f"{len(own)} x {kind}"
    if jax.device_count() > len(own):
        text += f" of {jax.device_count()} in all processes"
    if own[0].platform == "cpu":
        return Finding(OK, text, facts)
    text += f", {size(limit)} each for JAX" if limit else ""
    accelerator = find_accelerator(kind)
    if accelerator is None:
        text += f'; unknown kind "{kind}": MFU will not be shown, please report this line'
        return Finding(WARNING, text, facts)
    facts.update(peak_flops=accelerator.flops, memory=accelerator.memory)
    facts["memory_bandwidth"] = accelerator.memory_bandwidth
    text += f", peak {accelerator.flops / 1e12:,.0f} TFLOP/s"
    if accelerator.memory_bandwidth:
        text += f" and {accelerator.memory_bandwidth / 1e12:.3g} TB/s"
    return Finding(OK, text, facts)


def precision(machine: Machine) -> Finding:
    """The precision of float32 products on this device."""
    device = jax.local_devices()[0]
    asked = getattr(jax.config, "jax_default_matmul_precision", None)
    tf32_off = machine.environ.get("NVIDIA_TF32_OVERRIDE") == "0"
    facts = {"platform": device.platform, "default_matmul_precision": asked}
    text = float32_means(device.platform, cuda_capability(device), asked, tf32_off)
    return Finding(OK, text, facts)


def cuda_capability(device: Any) -> float | None:
    """The compute capability of an NVIDIA GPU; None for others, such as AMD's "gfx942"."""
    found = re.fullmatch(r"\d+\.\d+", str(getattr(device, "compute_capability", "")))
    return float(found[0]) if found else None


def float32_means(
    platform: str, capability: float | None, asked: str | None, tf32_off: bool
) -> str:
    """The precision of float32 products, if JAX's default_matmul_precision is `asked`.

    Example:
      >>> float32_means("cpu", None, None, False)
      'products and convolutions are exact float32'
    """
    exact = "products and convolutions are exact float32"
    if asked in ("highest", "float32"):
        return f"{exact} (JAX_DEFAULT_MATMUL_PRECISION={asked})"
    said = f" (JAX_DEFAULT_MATMUL_PRECISION={asked})" if asked else ""
    if platform == "gpu" and capability is not None and capability >= 8 and not tf32_off:
        return f"products and convolutions round their inputs to TF32, 10 bits of mantissa{said}"
    if platform == "tpu" and asked in ("high", "bfloat16_3x", "tensorfloat32"):
        return f"products and convolutions are three in bfloat16, about 16 bits of mantissa{said}"
    if platform == "tpu":
        return f"products and convolutions round their inputs to bfloat16, 7 bits of mantissa{said}"
    return exact


def preallocation(machine: Machine) -> Finding | None:
    """How JAX reserves a GPU's memory; None on other platforms."""
    if jax.default_backend() != "gpu":
        return None
    prefix = "XLA_PYTHON_CLIENT_"
    if machine.environ.get(f"{prefix}ALLOCATOR", "").lower() == "platform":
        return Finding(
            WARNING,
            f"each array is allocated by the driver, which is slow: unset {prefix}ALLOCATOR",
        )
    share = f"{memory_fraction(machine.environ):.0%} of each card"
    if machine.environ.get(f"{prefix}PREALLOCATE", "").lower() in ("false", "0"):
        return Finding(OK, f"none; up to {share} is allocated on demand")
    return Finding(OK, f"{share} is reserved at the start")


def settings(machine: Machine) -> Finding:
    """Environment variables that JAX and its libraries read."""
    found = variables(machine.environ)
    return Finding(OK, ", ".join(f"{k}={v}" for k, v in found.items()) or "none set", dict(found))
