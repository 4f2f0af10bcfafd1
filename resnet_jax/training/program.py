"""What a compiled TPU program moves: read from its text, because the compiler's count is another.

The compiler's "bytes accessed" counts every operand and result of every operation, also those
that lie in the chip's fast memory. Here only what crosses the bus to HBM counts.
"""

from __future__ import annotations

import dataclasses
import math
import re

_BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2},
    **{"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8},
}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
# Arrays elsewhere than in HBM: S(1) is VMEM, S(3) v4's CMEM, others hold scalars.
_FAST = re.compile(r"S\([1-9]")
_BODY = re.compile(r"\bbody=%([\w.\-]+)")
# These move nothing: names for parts, or the start of what its "-done" counts.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while"}
_FREE |= {"slice-start", "copy-start", "all-reduce-start"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one execution of a program moves.

    Args:
      hbm: Bytes to and from HBM.
      reduced: Bytes that all-reduces sum.
      reductions: Number of all-reduces.
    """

    hbm: int = 0
    reduced: int = 0
    reductions: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.hbm + other.hbm,
            self.reduced + other.reduced,
            self.reductions + other.reductions,
        )

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.hbm * times, self.reduced * times, self.reductions * times)


def traffic(program: str, trips: int = 1) -> Traffic:
    """Counts what a compiled program moves.

    Args:
      program: `compiled.as_text()`.
      trips: How often its largest loop runs, which the text does not tell; other loops count once.

    Returns:
      Operands and results that the program places in HBM, copies between HBM and fast memory once,
      and all-reduces.

    Example:
      >>> traffic('''
      ... ENTRY %main (x: f32[256]) -> f32[256] {
      ...   %x = f32[256]{0} parameter(0)
      ...   ROOT %y = f32[256]{0:S(1)} negate(%x)
      ... }''').hbm
      1024
    """
    computations, entry = _computations(program)
    total, loops = _count(computations[entry]), []
    for line in computations[entry]:
        if body := _BODY.search(line):
            loops.append(_count(computations[body[1]]))
    loops.sort(key=lambda loop: loop.hbm)
    for index, loop in enumerate(loops):
        total += loop * (trips if index == len(loops) - 1 else 1)
    return total


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first one."""
    found: dict[str, list[str]] = {}
    entry = ""
    lines: list[str] = []
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found[match[1]] = []
            entry = match[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return found, entry


def _count(lines: list[str]) -> Traffic:
    """What a computation moves itself; loops in it move nothing here."""
    types: dict[str, str] = {}
    moved = reduced = reductions = 0
    for line in lines:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, kind, operation, rest = match.groups()
        types[name] = kind
        if operation in ("all-reduce", "all-reduce-start"):
            reductions += 1
            reduced += sum(size for size, _ in _arrays(kind))
        if operation in _FREE or "ConcatBitcast" in line:
            continue
        operands = [types.get(each, "") for each in re.findall(r"%([\w.\-]+)", _operands(rest))]
        if operation in ("slice-done", "copy-done"):
            (size, fast), *_ = _arrays(kind)
            spaces = {fast for _, fast in _arrays(operands[0])}
            moved += size if len(spaces) > 1 else 0 if fast else 2 * size
        else:
            everything = _arrays(kind) + [each for kind in operands for each in _arrays(kind)]
            moved += sum(size for size, fast in everything if not fast)
    return Traffic(moved, reduced, reductions)


def _operands(rest: str) -> str:
    return rest.split("), ")[0]


def _arrays(kind: str) -> list[tuple[int, bool]]:
    """(bytes, lies in fast memory) of every array in an instruction's type."""
    return [
        (
            _BYTES[dtype] * math.prod(map(int, filter(None, shape.split(",")))),
            bool(_FAST.search(layout)),
        )
        for dtype, shape, layout in _ARRAY.findall(kind)
    ]
