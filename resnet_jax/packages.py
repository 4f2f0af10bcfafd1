"""Versions and requirements of installed packages, read from their metadata without imports."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import re
from collections.abc import Iterable

DISTRIBUTION = "resnet-jax-linen"  # this package on PyPI


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A package that another package requires.

    Args:
      name: PyPI name in lower case with hyphens.
      least: The oldest accepted version; "": any.
      extras: Extras of the required package, such as ("cuda12",) of jax[cuda12].
      extra: The extra that requires it; "": the package itself.
    """

    name: str
    least: str = ""
    extras: tuple[str, ...] = ()
    extra: str = ""


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages, by PyPI name, that are installed.

    Example:
      >>> import jax
      >>> installed_versions(["jax", "no-such-package"]) == {"jax": jax.__version__}
      True
    """
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def declared(package: str) -> list[Requirement]:
    """All requirements of a package and its extras; [] if the package is not installed.

    Example:
      >>> "jaxlib" in [each.name for each in declared("jax")]
      True
    """
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [_parsed(line) for line in lines]


def _parsed(line: str) -> Requirement:
    found = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?([^;]*)", line)
    name, extras, bounds = found.groups() if found else (line, "", "")
    least = re.search(r">=\s*([^,;\s]+)", bounds)
    extra = re.search(r"""extra == ['"]([\w-]+)""", line)
    return Requirement(
        re.sub(r"[-_.]+", "-", name).lower(),
        least[1] if least else "",
        tuple(extras.split(",")) if extras else (),
        extra[1] if extra else "",
    )


def requirements(package: str, extra: str = "") -> list[Requirement]:
    """The requirements of a package, or those that an extra adds.

    The requirements of a required extra, such as jax[cuda12], are included.

    Example:
      >>> [each.name for each in requirements("resnet-jax-linen")][:2]
      ['flax', 'jax']
    """
    found: dict[str, Requirement] = {}
    for each in declared(package):
        if each.extra == extra:
            found[each.name] = each
            for one in each.extras:
                found.update({more.name: more for more in requirements(each.name, one)})
    return list(found.values())


def extras() -> list[str]:
    """The extras of this package for users; [] if it is not installed."""
    found = dict.fromkeys(each.extra for each in declared(DISTRIBUTION))
    return [each for each in found if each not in ("", "test")]


def older(version: str, least: str) -> bool:
    """Whether `version` is older than `least`, by their leading numbers.

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
