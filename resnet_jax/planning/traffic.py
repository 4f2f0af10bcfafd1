"""Memory traffic and all-reduces of a compiled program, counted in its text.

XLA's own counts are of no use here. On a TPU they include operands and results that lie in the
chip's fast memory, while only what crosses the bus to HBM costs time. On a GPU there are none.
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
# Memory spaces other than HBM: S(1) is VMEM, S(3) CMEM of v4, others hold scalars.
_FAST_MEMORY = re.compile(r"S\([1-9]")
_BODY = re.compile(r"\bbody=%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([\w.\-]+))"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# The result type of a cuDNN or cuBLAS call includes its scratch memory, which is not traffic.
_SCRATCH = re.compile(r", u8\[\d+\]\{0\}(?=\)$)")
# Operations that move nothing: aliases, and starts whose traffic is counted at their "-done".
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant"}
_FREE |= {"slice-start", "copy-start", "all-reduce-start"}
# Operations that read only as much of their first operand as they return.
_SLICES = {"slice", "dynamic-slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one execution of a program moves on one device."""

    memory: int = 0  # bytes between the chip and its memory
    all_reduced: int = 0  # bytes that all-reduces sum
    all_reduces: int = 0  # number of them
    launches: int = 0  # operations started one after another; on a GPU kernels and copies

    def __add__(self, other: Traffic) -> Traffic:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return Traffic(*(a + b for a, b in pairs))

    def __mul__(self, times: int) -> Traffic:
        return Traffic(*(value * times for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One line of a computation: `%name = type operation(%operands), ...`."""

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    line: str
    is_root: bool


_Computations = dict[str, list[_Instruction]]


def count_traffic(program: str, trips: int = 1) -> Traffic:
    """Counts what a program moves, from `compiled.as_text()`.

    Operands and results in the device's main memory count in full, or only the part that is read
    or written; copies between it and fast memory count once. Caches of a GPU are ignored. `trips`
    is how often the largest loop without a known trip count runs; other such loops count once.

    Example:
      >>> count_traffic('''
      ... ENTRY %main (x: f32[256]) -> f32[256] {
      ...   %x = f32[256]{0} parameter(0)
      ...   ROOT %y = f32[256]{0:S(1)} negate(%x)
      ... }''').memory
      1024
    """
    computations, entry = _parse(program)
    return _computation_traffic(computations, entry, trips)


def _parse(program: str) -> tuple[_Computations, str]:
    """The instructions of each computation, and the name of the entry computation."""
    computations: _Computations = {}
    entry = ""
    instructions: list[_Instruction] = []
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            instructions = computations[match[1]] = []
            entry = match[1] if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            root, name, kind, operation, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            instructions.append(_Instruction(name, kind, operation, operands, line, bool(root)))
    return computations, entry


def _computation_traffic(computations: _Computations, name: str, trips: int) -> Traffic:
    total, loops = Traffic(), []
    types: dict[str, str] = {}
    for each in computations[name]:
        types[each.name] = _SCRATCH.sub("", each.type)
        if body := _BODY.search(each.line):
            loop = _computation_traffic(computations, body[1], 1)
            if known := _TRIP_COUNT.search(each.line):
                total += loop * int(known[1])
            else:
                loops.append(loop)
        elif each.operation == "call" and (called := _CALLED.search(each.line)):
            total += _computation_traffic(computations, called[1], trips)
        elif each.operation == "conditional":
            branches = [
                _computation_traffic(computations, branch, trips) for branch in _branches(each.line)
            ]
            total += max(branches, key=lambda branch: branch.memory)
        else:
            total += _operation_traffic(each, types, computations)
    loops.sort(key=lambda loop: loop.memory)
    for loop in loops[:-1]:
        total += loop
    return total + loops[-1] * trips if loops else total


def _branches(line: str) -> list[str]:
    found = (several or one for several, one in _BRANCHES.findall(line))
    return [name for names in found for name in re.findall(r"[\w.\-]+", names)]


def _operation_traffic(
    each: _Instruction, types: dict[str, str], computations: _Computations
) -> Traffic:
    """What an operation moves that is not a loop, a call or a conditional."""
    is_all_reduce = each.operation in ("all-reduce", "all-reduce-start")
    reduced = sum(size for size, _ in _arrays(each.type)) if is_all_reduce else 0
    if each.operation in _FREE or "ConcatBitcast" in each.line:
        return Traffic(0, reduced, int(is_all_reduce))
    operands = [types.get(name, "") for name in each.operands]
    if each.operation in ("slice-done", "copy-done"):
        (size, fast), *_ = _arrays(each.type)
        crosses = len({fast for _, fast in _arrays(operands[0])}) > 1
        return Traffic(size if crosses else 0 if fast else 2 * size, launches=1)

    called = _CALLED.search(each.line) if each.operation == "fusion" else None
    fused = computations[called[1]] if called else _as_fusion(each)
    read = sum(
        min(_main_memory_bytes(kind), _bytes_read(fused, index))
        for index, kind in enumerate(operands)
    )
    written = min(_main_memory_bytes(types[each.name]), _bytes_written(fused))
    return Traffic(int(read + written), reduced, int(is_all_reduce), launches=1)


def _as_fusion(each: _Instruction) -> list[_Instruction]:
    """An operation as a fused computation of it alone, with parameters for its operands."""
    parameters = [
        _Instruction(f"parameter {index}", "", "parameter", (), f"parameter({index})", False)
        for index in range(len(each.operands))
    ]
    operands = tuple(parameter.name for parameter in parameters)
    return [*parameters, dataclasses.replace(each, operands=operands, is_root=True)]


def _bytes_read(fused: list[_Instruction], index: int) -> float:
    """Bytes that a fusion reads of a parameter it takes slices of; inf if it reads all of it."""
    name = next((x.name for x in fused if f"parameter({index})" in x.line), None)
    users = [x for x in fused if name in x.operands]
    total = 0
    for user in users:
        if user.operands[0] != name or name in user.operands[1:]:
            return math.inf
        if user.operation in _SLICES:
            total += _main_memory_bytes(user.type)
        elif user.operation != "dynamic-update-slice":  # which updates its operand in place
            return math.inf
    return total if users else math.inf


def _bytes_written(fused: list[_Instruction]) -> float:
    """Bytes that a fusion writes if it updates a slice of an array; inf if it writes all of it."""
    root = next((x for x in fused if x.is_root), None)
    if root is None or root.operation != "dynamic-update-slice":
        return math.inf
    update = next((x for x in fused if x.name == root.operands[1]), None)
    return _main_memory_bytes(update.type) if update and update.type else math.inf


def _main_memory_bytes(kind: str) -> int:
    """Bytes of the arrays of a type that are not in fast memory."""
    return sum(size for size, fast in _arrays(kind) if not fast)


def _arrays(kind: str) -> list[tuple[int, bool]]:
    """(bytes, whether it is in fast memory) of each array of a type."""
    arrays = []
    for dtype, shape, layout in _ARRAY.findall(kind):
        elements = math.prod(map(int, filter(None, shape.split(","))))
        arrays.append((_BYTES[dtype] * elements, bool(_FAST_MEMORY.search(layout))))
    return arrays
