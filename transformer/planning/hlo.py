"""Parses a compiled program (optimized HLO text) into instructions and the number of times that each runs.

XLA's own cost analysis counts the body of a loop once. Here the trip count of a loop is XLA's annotation or, on TPU,
which has none, the constant that the loop counter is compared with. A program looks like this:

    %body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
      %p = (s32[], f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      ...
      ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i.next, %x)
    }

    ENTRY %main (x: f32[8,4]) -> f32[8,4] {
      %arg = f32[8,4]{1,0} parameter(0)
      %loop = (s32[], f32[8,4]{1,0}) while(%init), condition=%cond, body=%body
      ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
    }
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")  # f32[8,4]{1,0:T(8,128)S(1)}
_HEAD = re.compile(r"\s*(ROOT )?%?([\w.-]+) = ")  # ROOT %out =
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")  # ENTRY %main (x: f32[8,4]) -> f32[8,4] {
_REFERENCE = re.compile(r"%([\w.-]+)")
_BRACKET = re.compile(r"[()]")
_SEPARATOR = re.compile(r"[][(){},]")
_TRIP_COUNT = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')  # backend_config={"known_trip_count":{"n":"7"}}


class ArrayType(NamedTuple):
    """The type of an array. Memory `space` 0 is HBM; others are on the chip, such as VMEM."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Bytes, excluding the padding of tiles."""
        if self.dtype in ("token", "opaque"):
            return 0
        digits = re.search(r"\d+", self.dtype)
        bits = int(digits[0]) if digits else 8  # pred
        return -(-math.prod(self.shape) * bits // 8)


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name, opcode: of the instruction.
      result: the types of the result's arrays; nested tuples are flattened.
      operands: names of instructions.
      rest: the text of the attributes.
      text: the text between the brackets of the opcode.
      is_root: whether its result is that of the computation.
    """

    name: str
    opcode: str
    result: list[ArrayType]
    operands: list[str]
    rest: str
    text: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """The text of an attribute, up to the next comma outside of brackets; "" if missing."""
        match = re.search(rf"(?<![\w]){name}=", self.rest)
        if not match:
            return ""
        depth = 0
        for separator in _SEPARATOR.finditer(self.rest, match.end()):
            depth += (separator[0] in "{[(") - (separator[0] in "}])")
            if separator[0] == "," and not depth:
                return self.rest[match.end() : separator.start()]
        return self.rest[match.end() :]

    def numbers(self, name: str) -> list[int]:
        """The integers of an attribute such as lhs_contracting_dims={1,2}."""
        return [int(number) for number in re.findall(r"\d+", self.attribute(name))]


Computation = dict[str, Instruction]


class InstructionRun(NamedTuple):
    """An instruction that runs.

    Attributes:
      computation: that contains it.
      num_runs: in one run of the program.
      is_fused: whether it is part of a fusion, so that its operands need not be in memory.
    """

    instruction: Instruction
    computation: Computation
    num_runs: int
    is_fused: bool


class Program:
    """A compiled program.

    Attributes:
      computations: name → instructions by name, in order.
      entry: the main computation.
      unknown_loops: names of loops with unknown trip counts, taken as 1.
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
            elif instruction := _parse_instruction(line):
                current[instruction.name] = instruction

    def iter_executed(self) -> Iterator[InstructionRun]:
        """All instructions that run, including those of loops, calls and fusions."""
        self.unknown_loops = []
        yield from self._iter_executed(self.entry, 1, False)

    def _iter_executed(self, computation: Computation, num_runs: int, is_fused: bool) -> Iterator[InstructionRun]:
        for instruction in computation.values():
            yield InstructionRun(instruction, computation, num_runs, is_fused)
            opcode = instruction.opcode
            inner_runs = num_runs * (self._trip_count(instruction, computation) if opcode == "while" else 1)
            for name in _called_computations(instruction):
                called = self.computations.get(name, {})
                yield from self._iter_executed(called, inner_runs, is_fused or opcode == "fusion")

    def _trip_count(self, loop: Instruction, computation: Computation) -> int:
        """The trip count of a loop: XLA's annotation, or ⌈(limit - start) / stride⌉ of its counter.

        Without an annotation the condition must compare one counter with one constant:

            %cond (q: (s32[], f32[8,4])) -> pred[] {
              %limit = s32[] constant(6)
              %j = s32[] get-tuple-element(%q), index=0
              ROOT %lt = pred[] compare(%j, %limit), direction=LT
            }
        """
        annotation = _TRIP_COUNT.search(loop.rest)
        if annotation:
            return int(annotation[1])
        condition = self.computations.get(loop.attribute("condition").lstrip("%"), {})
        instructions = [run.instruction for run in self._iter_executed(condition, 1, False)]
        limits = [instruction for instruction in instructions if instruction.opcode == "constant"]
        compares = [instruction for instruction in instructions if instruction.opcode == "compare"]
        if len(limits) != 1 or len(compares) != 1 or compares[0].attribute("direction") != "LT":
            self.unknown_loops.append(loop.name)
            return 1
        limit = int(limits[0].text)
        counter = condition.get(compares[0].operands[0])
        if counter is None or counter.opcode != "get-tuple-element":
            return max(limit, 0)
        index = counter.numbers("index")[0]
        distance = limit - _counter_start(loop, computation, index)
        return max(-(-distance // self._stride(loop, index)), 0)

    def _stride(self, loop: Instruction, index: int) -> int:
        """The increment of element `index` of the loop's tuple, the counter: above 1 if the body is unrolled.

        Follows the counter backwards from the root of the body; here the stride is 2:

            %one = s32[] constant(1)
            %n0 = s32[] add(%i, %one)
            %n1 = s32[] add(%n0, %one)
            ROOT %t = (s32[], f32[8,4]) tuple(%n1, %x)
        """
        body = self.computations.get(loop.attribute("body").lstrip("%"), {})
        root = next((inst for inst in body.values() if inst.is_root and inst.opcode == "tuple"), None)
        counter, stride = root and body.get(root.operands[index]), 0
        while counter and counter.opcode in ("add", "copy", "bitcast"):
            operands = [body[name] for name in counter.operands if name in body]
            stride += sum(int(operand.text) for operand in operands if operand.opcode == "constant")
            counter = next((operand for operand in operands if operand.opcode != "constant"), None)
        return max(stride, 1)


def _counter_start(loop: Instruction, outer: Computation, index: int) -> int:
    """The initial value of element `index` of the loop's tuple, if it is a constant; else 0.

    %start = s32[] constant(2)
    %init = (s32[], f32[8,4]) tuple(%start, %arg)
    %loop = (s32[], f32[8,4]) while(%init), condition=%cond, body=%body
    """
    init = outer.get(loop.operands[0])
    value = outer.get(init.operands[index]) if init and init.opcode == "tuple" else None
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = outer.get(value.operands[0])
    return int(value.text) if value is not None and value.opcode == "constant" else 0


def _called_computations(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs, except those of single numbers, such as the sum of a reduction.

    while(%init), condition=%cond, body=%body
    fusion(%a, %b), kind=kLoop, calls=%fused_computation
    conditional(%p, %a, %b), true_computation=%then, false_computation=%else
    """
    if instruction.opcode == "while":
        return [instruction.attribute("body").lstrip("%")]
    if instruction.opcode in ("fusion", "async-start"):
        return [instruction.attribute("calls").lstrip("%")]
    if instruction.opcode == "call":
        return [instruction.attribute("to_apply").lstrip("%")]
    if instruction.opcode == "conditional":
        branches = instruction.attribute("branch_computations")
        branches += " ".join(instruction.attribute(f"{branch}_computation") for branch in ("true", "false"))
        return _REFERENCE.findall(branches)
    return []


def _parse_instruction(line: str) -> Instruction | None:
    """Parses a line; None if it is not an instruction.

    ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=LT
    head       types           opcode  operands     rest
    """
    head = _HEAD.match(line)
    if not head:
        return None
    start = head.end()
    end = _closing_bracket(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    if end <= start:
        return None
    opening = line.find("(", end)
    closing = _closing_bracket(line, opening)
    inside = line[opening + 1 : closing]
    opcode = line[end:opening].strip()
    operands = [] if opcode in ("constant", "parameter") else _operand_names(inside)
    return Instruction(
        head[2], opcode, parse_array_types(line[start:end]), operands, line[closing + 1 :], inside, bool(head[1])
    )


def _operand_names(inside: str) -> list[str]:
    """The names in "%j, %limit", or in "f32[] j, f32[] limit", as XLA prints them without %."""
    return _REFERENCE.findall(inside) or [part.split()[-1] for part in inside.split(", ") if part.strip()]


def _closing_bracket(line: str, opening: int) -> int:
    """The index of the bracket that closes the one at `opening`; the end of the line if it is missing."""
    depth = 0
    for bracket in _BRACKET.finditer(line, opening):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    return len(line)


def parse_array_types(text: str) -> list[ArrayType]:
    """The arrays of a printed type, such as (s32[], /*index=1*/f32[8,4]{1,0:T(8,128)S(1)}), nested or not."""
    types = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(dim.removeprefix("<=")) for dim in dims.split(",") if dim)
        types.append(ArrayType(dtype, shape, int(space[1]) if space else 0))
    return types
