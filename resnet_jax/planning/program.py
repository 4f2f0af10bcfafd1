"""What a compiled program moves: read from its text, because the compilers' own counts are others.

A TPU's compiler counts every operand and result of every operation, also those that lie in the
chip's fast memory; here only what crosses the bus to HBM counts. A GPU's compiler gives no count.
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
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
# Arrays elsewhere than in HBM: S(1) is VMEM, S(3) v4's CMEM, others hold scalars.
_FAST = re.compile(r"S\([1-9]")
_BODY = re.compile(r"\bbody=%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Scratch memory that cuDNN and cuBLAS get is part of the result's type, and not traffic.
_SCRATCH = re.compile(r", u8\[\d+\]\{0\}(?=\)$)")
# These move nothing: names for parts, or the start of what its "-done" counts.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant"}
_FREE |= {"slice-start", "copy-start", "all-reduce-start"}
# These read from their first operand what they return, and no more.
_SLICES = {"slice", "dynamic-slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one execution of a program moves.

    Args:
      memory: Bytes between the chip and its memory.
      reduced: Bytes that all-reduces sum.
      reductions: Number of all-reduces.
      operations: Operations that it starts one after the other: on a GPU, kernels and copies.
    """

    memory: int = 0
    reduced: int = 0
    reductions: int = 0
    operations: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(self._values(), other._values())))

    def __mul__(self, times: int) -> Traffic:
        return Traffic(*(value * times for value in self._values()))

    def _values(self) -> tuple[int, ...]:
        return dataclasses.astuple(self)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One line of a computation: `%name = type operation(%operands), ...`."""

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    line: str
    is_root: bool


def traffic(program: str, trips: int = 1) -> Traffic:
    """Counts what a compiled program moves.

    Operands and results of every operation count that the program places in the device's memory,
    and copies between that and fast memory once. An operation that reads or writes a part of an
    array counts that part. Caches of a GPU are not taken into account.

    Args:
      program: `compiled.as_text()`.
      trips: How often the largest loop runs whose trip count the text does not tell; other such
        loops count once.

    Returns:
      The sums over the program.

    Example:
      >>> traffic('''
      ... ENTRY %main (x: f32[256]) -> f32[256] {
      ...   %x = f32[256]{0} parameter(0)
      ...   ROOT %y = f32[256]{0:S(1)} negate(%x)
      ... }''').memory
      1024
    """
    computations, entry = _computations(program)
    return _count(computations, entry, trips)


def _computations(program: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, and the name of the one where the program begins."""
    found: dict[str, list[_Instruction]] = {}
    entry = ""
    instructions: list[_Instruction] = []
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            instructions = found[match[1]] = []
            entry = match[1] if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            root, name, kind, operation, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            instructions.append(_Instruction(name, kind, operation, operands, line, bool(root)))
    return found, entry


def _count(computations: dict[str, list[_Instruction]], name: str, trips: int) -> Traffic:
    """What a computation moves, with its loops, calls and branches."""
    total, loops = Traffic(), []
    types: dict[str, str] = {}
    for each in computations[name]:
        types[each.name] = _SCRATCH.sub("", each.type)
        if body := _BODY.search(each.line):
            loop, known = _count(computations, body[1], 1), _TRIPS.search(each.line)
            if known:
                total += loop * int(known[1])
            else:
                loops.append(loop)
        elif each.operation == "call" and (called := _CALLED.search(each.line)):
            total += _count(computations, called[1], trips)
        elif each.operation == "conditional":
            branches = (_count(computations, branch, trips) for branch in _branches(each.line))
            total += max(branches, key=lambda branch: branch.memory)
        else:
            total += _moved(each, types, computations)
    loops.sort(key=lambda loop: loop.memory)
    for index, loop in enumerate(loops):
        total += loop * (trips if index == len(loops) - 1 else 1)
    return total


def _branches(line: str) -> list[str]:
    found = (several or one for several, one in _BRANCHES.findall(line))
    return [name for names in found for name in re.findall(r"[\w.\-]+", names)]


def _moved(
    each: _Instruction, types: dict[str, str], computations: dict[str, list[_Instruction]]
) -> Traffic:
    """What one operation moves that is no loop, call or branch."""
    is_reduction = each.operation in ("all-reduce", "all-reduce-start")
    reduced = sum(size for size, _ in _arrays(each.type)) if is_reduction else 0
    if each.operation in _FREE or "ConcatBitcast" in each.line:
        return Traffic(0, reduced, int(is_reduction))
    operands = [types.get(name, "") for name in each.operands]
    if each.operation in ("slice-done", "copy-done"):
        (size, fast), *_ = _arrays(each.type)
        spaces = {fast for _, fast in _arrays(operands[0])}
        return Traffic(size if len(spaces) > 1 else 0 if fast else 2 * size, operations=1)

    called = _CALLED.search(each.line) if each.operation == "fusion" else None
    fused = computations[called[1]] if called else _alone(each)
    read = sum(min(_slow(kind), _read(fused, index)) for index, kind in enumerate(operands))
    written = min(_slow(types[each.name]), _written(fused))
    return Traffic(int(read + written), reduced, int(is_reduction), operations=1)


def _alone(each: _Instruction) -> list[_Instruction]:
    """An operation as if it were a fusion of it alone, with parameters for its operands."""
    parameters = [
        _Instruction(f"parameter {index}", "", "parameter", (), f"parameter({index})", False)
        for index in range(len(each.operands))
    ]
    operands = tuple(parameter.name for parameter in parameters)
    return [*parameters, dataclasses.replace(each, operands=operands, is_root=True)]


def _read(fused: list[_Instruction], index: int) -> float:
    """Bytes that a fusion reads of a parameter of which it only takes slices; inf: of all of it."""
    name = next((x.name for x in fused if f"parameter({index})" in x.line), None)
    users = [x for x in fused if name in x.operands]
    total = 0
    for user in users:
        if user.operands[0] != name or name in user.operands[1:]:
            return math.inf
        if user.operation in _SLICES:
            total += _slow(user.type)
        elif user.operation != "dynamic-update-slice":  # which leaves the rest where it is
            return math.inf
    return total if users else math.inf


def _written(fused: list[_Instruction]) -> float:
    """Bytes that a fusion writes which only replaces a part of an array; inf: all of its result."""
    root = next((x for x in fused if x.is_root), None)
    if root is None or root.operation != "dynamic-update-slice":
        return math.inf
    update = next((x for x in fused if x.name == root.operands[1]), None)
    return _slow(update.type) if update and update.type else math.inf


def _slow(kind: str) -> int:
    """Bytes of a type's arrays that do not lie in fast memory."""
    return sum(size for size, fast in _arrays(kind) if not fast)


def _arrays(kind: str) -> list[tuple[int, bool]]:
    """(bytes, lies in fast memory) of every array in an instruction's type."""
    return [
        (
            _BYTES[dtype] * math.prod(map(int, filter(None, shape.split(",")))),
            bool(_FAST.search(layout)),
        )
        for dtype, shape, layout in _ARRAY.findall(kind)
    ]
