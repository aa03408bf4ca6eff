"""Reads a compiled program's text: its instructions, and how often each of them runs.

XLA's own cost analysis counts the body of a loop once. Here a loop's trips come from what XLA notes
beside it or, on TPU where it notes nothing, from the constant that the loop's counter is compared with.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"\s*(ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_REFERENCE = re.compile(r"%([\w.-]+)")
_BRACKET = re.compile(r"[()]")
_MARK = re.compile(r"[][(){},]")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


class Array(NamedTuple):
    """Type of one array. `space` 0 is the chip's main memory; others are nearer to its arithmetic."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Bytes, without the padding of tiles."""
        if self.dtype in ("token", "opaque"):
            return 0
        digits = re.search(r"\d+", self.dtype)
        bits = int(digits[0]) if digits else 8  # pred
        return -(-math.prod(self.shape) * bits // 8)


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      result: type of the result; a tuple's, nested or not, as a flat list.
      operands: names of instructions.
      rest: attributes as they stand.
    """

    name: str
    opcode: str
    result: list[Array]
    operands: list[str]
    rest: str
    text: str
    root: bool

    def attribute(self, name: str) -> str:
        """The text of an attribute up to the next comma outside of its brackets; empty where there is none."""
        start = re.search(rf"(?<![\w]){name}=", self.rest)
        if not start:
            return ""
        depth = 0
        for mark in _MARK.finditer(self.rest, start.end()):
            depth += (mark[0] in "{[(") - (mark[0] in "}])")
            if mark[0] == "," and not depth:
                return self.rest[start.end() : mark.start()]
        return self.rest[start.end() :]

    def numbers(self, name: str) -> list[int]:
        """The integers of an attribute such as lhs_contracting_dims={1,2}."""
        return [int(number) for number in re.findall(r"\d+", self.attribute(name))]


Computation = dict[str, Instruction]


class Visit(NamedTuple):
    """An instruction in its place.

    Attributes:
      times: how often it runs in one run of the program.
      fused: whether it is part of a fusion, so that its operands need not be in memory.
    """

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool


class Program:
    """A compiled program.

    Attributes:
      computations: their instructions by name, in order.
      entry: the computation that runs.
      unknown_loops: names of loops whose trips could not be told; they count as one.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry: Computation = {}
        self.unknown_loops: list[str] = []
        current: Computation = {}
        for line in text.splitlines():
            head = _COMPUTATION.match(line) if line.endswith("{") else None
            if head:
                current = self.computations[head[2]] = {}
                if head[1]:
                    self.entry = current
            elif instruction := _parse(line):
                current[instruction.name] = instruction

    def visits(self) -> Iterator[Visit]:
        """Every instruction that runs, those of loops, calls and fusions too."""
        self.unknown_loops = []
        yield from self._visit(self.entry, 1, False)

    def _visit(self, computation: Computation, times: int, fused: bool) -> Iterator[Visit]:
        for instruction in computation.values():
            yield Visit(instruction, computation, times, fused)
            opcode = instruction.opcode
            inner = times * (self._trips(instruction, computation) if opcode == "while" else 1)
            for name in _called(instruction):
                yield from self._visit(self.computations.get(name, {}), inner, fused or opcode == "fusion")

    def _trips(self, loop: Instruction, computation: Computation) -> int:
        noted = _TRIPS.search(loop.rest)
        if noted:
            return int(noted[1])
        condition = self.computations.get(loop.attribute("condition").lstrip("%"), {})
        limits = [i for visit in self._visit(condition, 1, False) if (i := visit.instruction).opcode == "constant"]
        compared = [v.instruction for v in self._visit(condition, 1, False) if v.instruction.opcode == "compare"]
        if len(limits) != 1 or len(compared) != 1 or compared[0].attribute("direction") != "LT":
            self.unknown_loops.append(loop.name)
            return 1
        counter = condition.get(compared[0].operands[0])
        if counter is None or counter.opcode != "get-tuple-element":
            return max(int(limits[0].text), 0)
        index = counter.numbers("index")[0]
        distance = int(limits[0].text) - _start(loop, computation, index)
        return max(-(-distance // self._stride(loop, index)), 0)

    def _stride(self, loop: Instruction, index: int) -> int:
        """What a loop's counter grows by: more than 1 where its body is several turns written out."""
        body = self.computations.get(loop.attribute("body").lstrip("%"), {})
        root = next((one for one in body.values() if one.root and one.opcode == "tuple"), None)
        at, stride = root and body.get(root.operands[index]), 0
        while at and at.opcode in ("add", "copy", "bitcast"):
            operands = [body[name] for name in at.operands if name in body]
            stride += sum(int(one.text) for one in operands if one.opcode == "constant")
            at = next((one for one in operands if one.opcode != "constant"), None)
        return max(stride, 1)


def _start(loop: Instruction, outer: Computation, index: int) -> int:
    """What a loop's counter begins with: a constant of the tuple given to the loop, or else 0."""
    given = outer.get(loop.operands[0])
    first = outer.get(given.operands[index]) if given and given.opcode == "tuple" else None
    while first is not None and first.opcode in ("copy", "bitcast"):
        first = outer.get(first.operands[0])
    return int(first.text) if first is not None and first.opcode == "constant" else 0


def _called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs; not those that merely say how to add or compare two numbers."""
    if instruction.opcode == "while":
        return [instruction.attribute("body").lstrip("%")]
    if instruction.opcode in ("fusion", "async-start"):
        return [instruction.attribute("calls").lstrip("%")]
    if instruction.opcode == "call":
        return [instruction.attribute("to_apply").lstrip("%")]
    if instruction.opcode == "conditional":
        branches = instruction.attribute("branch_computations")
        branches += " ".join(instruction.attribute(f"{which}_computation") for which in ("true", "false"))
        return _REFERENCE.findall(branches)
    return []


def _parse(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if not head:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    if end <= start:
        return None
    opening = line.find("(", end)
    closing = _closing(line, opening)
    inside = line[opening + 1 : closing]
    opcode = line[end:opening].strip()
    operands = [] if opcode in ("constant", "parameter") else _operands(inside)
    return Instruction(head[2], opcode, arrays(line[start:end]), operands, line[closing + 1 :], inside, bool(head[1]))


def _operands(inside: str) -> list[str]:
    named = _REFERENCE.findall(inside)
    return named or [part.split()[-1] for part in inside.split(", ") if part.strip()]


def _closing(line: str, opening: int) -> int:
    """Where the bracket that opens here closes; the line's end where it does not."""
    depth = 0
    for bracket in _BRACKET.finditer(line, opening):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    return len(line)


def arrays(text: str) -> list[Array]:
    """The arrays of a type as it is printed."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(dim.removeprefix("<=")) for dim in dims.split(",") if dim)
        found.append(Array(dtype, shape, int(space[1]) if space else 0))
    return found
