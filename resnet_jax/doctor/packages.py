"""What this package requires, and what of it is installed, by metadata: nothing is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import re

from resnet_jax.training.environment import installed_versions

DISTRIBUTION = "resnet-jax-linen"
# Extras that are not for people who train.
_FOR_DEVELOPERS = ("test",)


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A package that another one needs.

    Args:
      name: On PyPI.
      least: The oldest version that will do; "": any.
    """

    name: str
    least: str = ""


def requirements(package: str, extra: str = "") -> list[Requirement]:
    """What a package needs, or what one of its extras needs beside that.

    Args:
      package: Its name on PyPI.
      extra: The extra; "": the package itself.

    Returns:
      In the package's order; the requirements of a required extra, such as jax[cuda12], follow.

    Example:
      >>> Requirement("flax", "0.12.8") in requirements("resnet-jax-linen")
      True
    """
    found: dict[str, Requirement] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires(package) or []:
            of_extra = re.search(r"""extra == ['"]([\w-]+)""", line)
            if (of_extra[1] if of_extra else "") != extra:
                continue
            name, extras, bounds = _parts(line)
            least = re.search(r">=\s*([^,;\s]+)", bounds)
            found[name] = Requirement(name, least[1] if least else "")
            for each in extras:
                found.update({one.name: one for one in requirements(name, each)})
    return list(found.values())


def _parts(line: str) -> tuple[str, list[str], str]:
    """Name, extras and bounds of a requirement."""
    found = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?([^;]*)", line)
    if found is None:
        return line, [], ""
    return found[1], found[2].split(",") if found[2] else [], found[3]


def extras() -> list[str]:
    """The extras of this package; [] where it is not installed."""
    try:
        found = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [each for each in found if each not in _FOR_DEVELOPERS]


def missing(wanted: list[Requirement]) -> list[str]:
    """The names of those that are not installed."""
    present = installed_versions(each.name for each in wanted)
    return [each.name for each in wanted if each.name not in present]


def too_old(wanted: list[Requirement]) -> list[tuple[Requirement, str]]:
    """Those that are installed in too old a version, each with that version."""
    present = installed_versions(each.name for each in wanted)
    return [
        (each, present[each.name])
        for each in wanted
        if each.least and each.name in present and older(present[each.name], each.least)
    ]


def older(version: str, least: str) -> bool:
    """Whether a version is older than another one, by their leading numbers.

    Example:
      >>> older("0.9.2", "0.10.2"), older("0.10.2.dev3", "0.10.2"), older("2.0", "2.0.0")
      (True, False, False)
    """
    one, other = _numbers(version), _numbers(least)
    length = max(len(one), len(other))
    return one + [0] * (length - len(one)) < other + [0] * (length - len(other))


def _numbers(version: str) -> list[int]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return [int(each) for each in found[0].split(".")] if found else []
