"""What one run of a compiled program costs a chip: FLOPs, bytes of main memory, and what is sent to other chips.

FLOPs are those of matrix products, two a multiply-add, as in `cost`. Bytes of memory are what fusions and
other scheduled instructions read and write, each operand once; of an operand that is only sliced, the slice.
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from transformer.planning.hlo import Array, Computation, Instruction, Program, Visit

Groups = frozenset[frozenset[int]]

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "iota", "opt-barrier", "domain", "add-dependency", "async-start", "async-update"),
}
_SLICES = ("dynamic-slice", "slice", "gather")


class Collective(NamedTuple):
    """One kind of communication over the same axes of the mesh, all of it in one run of the program.

    Attributes:
      kind: such as all-reduce.
      axes: mesh axes that it spans; empty where it matches none.
      chips: that take part in each.
      number: how many, those of loops as often as they run.
      bytes: of the whole array that is summed, gathered or scattered, or that one chip passes on.
    """

    kind: str
    axes: tuple[str, ...]
    chips: int
    number: int
    bytes: int


def flops(program: Program) -> int:
    """FLOPs of all matrix products that one chip computes."""
    return sum(visit.times * _flops(visit) for visit in program.visits())


def _flops(visit: Visit) -> int:
    instruction = visit.instruction
    if instruction.opcode == "dot":
        left = _operand(visit, 0).shape
        contracted = math.prod(left[axis] for axis in instruction.numbers("lhs_contracting_dims"))
        return 2 * math.prod(instruction.result[0].shape) * contracted
    if instruction.opcode == "custom-call":
        return _cublas_flops(visit) if _is_cublas(instruction) else _kernel_flops(visit)
    return _convolution_flops(visit) if instruction.opcode == "convolution" else 0


def _is_cublas(instruction: Instruction) -> bool:
    """Whether it is a matrix product that XLA leaves to cuBLAS or cuBLASLt."""
    return instruction.attribute("custom_call_target").strip('"') in _CUBLAS


_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")


def _cublas_flops(visit: Visit) -> int:
    contracting = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', visit.instruction.rest)
    if not contracting:
        raise ValueError(f"cannot read the dimensions of {visit.instruction.name}: {visit.instruction.rest[:120]!r}")
    left = _operand(visit, 0).shape
    contracted = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracting[1]))
    return 2 * math.prod(visit.instruction.result[0].shape) * contracted


class _Kernel(NamedTuple):
    """An attention kernel: what it is called, which axis of its keys is their length, and its products of each width.

    Every one multiplies queries by keys: forward also weights by values; the backward pass computes the weights and
    their gradients anew, and each of three gradients is a product.
    """

    name: str
    length: int
    of_keys: int
    of_values: int


_KERNELS = (
    _Kernel("splash_mha_fwd", -2, 1, 1),
    _Kernel("splash_mha_dq", -2, 2, 1),
    _Kernel("splash_mha_dkv", -2, 2, 2),
    _Kernel('"__cudnn$fmhaSoftmaxBackward"', 1, 3, 2),
    _Kernel('"__cudnn$fmhaSoftmax"', 1, 1, 1),
)


def _kernel_flops(visit: Visit) -> int:
    """Products of an attention kernel over all queries and keys, what a causal mask hides too, as in `cost`."""
    name, target = visit.instruction.name, visit.instruction.attribute("custom_call_target")
    for kernel in _KERNELS:
        if name.startswith(kernel.name) or target == kernel.name:
            operands = [array for index in range(len(visit.instruction.operands)) for array in _operands(visit, index)]
            q, k, v = [array.shape for array in operands if array.dtype in ("bf16", "f16", "f32")][:3]
            widths = kernel.of_keys * q[-1] + kernel.of_values * v[-1]
            return 2 * math.prod(q[:-1]) * k[kernel.length] * widths
    return 0


def _convolution_flops(visit: Visit) -> int:
    """The TPU compiler writes matrix products as convolutions, batches as dilated windows: only real products count."""
    instruction = visit.instruction
    left, right, out = (_operand(visit, 0).shape, _operand(visit, 1).shape, instruction.result[0].shape)
    labels = re.split("_|->", instruction.attribute("dim_labels"))
    window = dict(part.split("=") for part in instruction.attribute("window").strip("{}").split())
    products = 1
    for label in (letter for letter in labels[0] if letter.isdigit()):
        size = left[labels[0].index(label)], right[labels[1].index(label)], out[labels[2].index(label)]
        products *= _real_products(*size, **{name: _of(window, name, int(label)) for name in _WINDOW})
    groups = max(instruction.numbers("batch_group_count") or [1])
    batch = -(-left[labels[0].index("b")] // groups)
    return 2 * products * batch * right[labels[1].index("i")] * right[labels[1].index("o")]


_WINDOW = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}


def _of(window: Mapping[str, str], name: str, index: int) -> int:
    """A window's number of one dimension; of padding, that before the first element."""
    return int(window[name].split("x")[index].split("_")[0]) if name in window else int(_WINDOW[name].split("_")[0])


def _real_products(left: int, kernel: int, out: int, *, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of an output and a kernel position that fall on an element, neither on padding nor between elements."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilate - pad
    return int(((at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < left)).sum())


def memory_bytes(program: Program) -> int:
    """Bytes that one chip reads from and writes to its main memory."""
    return sum(visit.times * _traffic(visit, program) for visit in program.visits() if not visit.fused)


def _traffic(visit: Visit, program: Program) -> int:
    instruction = visit.instruction
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
        return 0
    operands = [array for index in range(len(instruction.operands)) for array in _operands(visit, index)]
    if opcode in ("copy-start", "slice-start"):
        # The result is a tuple of source, destination and a flag, in some order: what moves is the smallest.
        moved = min(array.size for array in instruction.result if array.shape)
        places = {array.space for array in instruction.result if array.shape}
        return 2 * moved if places == {0} else moved * (0 in places)
    if opcode in _SLICES:
        return _main([instruction.result[0]]) + (0 if operands[0].space else instruction.result[0].size)
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _main(operands[-1:] if opcode == "scatter" else operands[1:2])
    if opcode == "fusion":
        return _fusion_traffic(visit, program)
    if _is_cublas(instruction):
        return _main(operands) + _main(instruction.result[:1])  # without what it may use to work in
    return _main(operands) + _main(instruction.result)


def _fusion_traffic(visit: Visit, program: Program) -> int:
    """Operands that the fusion only slices count as the slices; a result updated in place counts as the update."""
    inside = program.computations.get(visit.instruction.attribute("calls").lstrip("%"), {})
    total = 0
    updated = {}
    for inner in inside.values():
        if inner.opcode == "dynamic-update-slice":
            updated[_through(inside, inner.operands[0]).name] = inside[inner.operands[1]].result[0].size
    for inner in inside.values():
        if inner.opcode != "parameter" or not _main(inner.result):
            continue
        users = [user for user in inside.values() if inner.name in user.operands]
        if inner.name in updated:
            continue
        if users and all(user.opcode in _SLICES and user.operands[0] == inner.name for user in users):
            total += sum(user.result[0].size for user in users)
        else:
            total += _main(inner.result)
    if updated:
        return total + 2 * sum(updated.values())
    return total + _main(visit.instruction.result)


def _through(computation: Computation, name: str) -> Instruction:
    """The instruction behind those that only change the type."""
    instruction = computation[name]
    while instruction.opcode in ("bitcast", "copy", "convert") and instruction.operands[0] in computation:
        instruction = computation[instruction.operands[0]]
    return instruction


def _main(arrays: list[Array]) -> int:
    return sum(array.size for array in arrays if not array.space)


def _operands(visit: Visit, index: int) -> list[Array]:
    source = visit.computation.get(visit.instruction.operands[index])
    return source.result if source else []


def _operand(visit: Visit, index: int) -> Array:
    return _operands(visit, index)[0]


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """All communication of one run, by kind and mesh axes.

    Args:
      mesh: axis names and sizes; devices are numbered along the mesh, its last axis fastest.
    """
    names = _axes_by_groups(mesh)
    found: dict[tuple, Collective] = {}
    split: set[str] = set()
    for visit in program.visits():
        kind = visit.instruction.opcode.removesuffix("-start")
        channel = visit.instruction.attribute("channel_id")
        if visit.fused and _is_scatter(visit):
            kind = "reduce-scatter"
        elif kind not in COLLECTIVES or (visit.fused and channel in split):
            continue  # where a transfer goes on during several fusions, each of them holds a copy of it
        elif visit.fused:
            split.add(channel)
        groups = _groups(visit.instruction, math.prod(mesh.values()))
        axes = _permuted_axes(groups, mesh) if kind == "collective-permute" else names.get(groups, ())
        chips = max((len(group) for group in groups), default=1)
        sent = sum(array.size for index in range(len(visit.instruction.operands)) for array in _operands(visit, index))
        size = visit.times * sent * (chips if kind == "all-gather" else 1)
        old = found.get((kind, axes, chips), Collective(kind, axes, chips, 0, 0))
        found[kind, axes, chips] = old._replace(number=old.number + visit.times, bytes=old.bytes + size)
    return sorted(found.values(), key=lambda one: -one.bytes)


_SLICING = {
    *("all-reduce", "dynamic-slice", "get-tuple-element", "tuple", "bitcast", "reshape", "copy"),
    *("parameter", "constant", "partition-id", "replica-id", "add", "multiply", "divide", "remainder", "convert"),
}


def _is_scatter(visit: Visit) -> bool:
    """On TPU a reduce-scatter is a fusion of an all-reduce, of several arrays even, with the slices a chip keeps."""
    inside = visit.computation.values()
    if visit.instruction.opcode != "all-reduce" or any(one.opcode not in _SLICING for one in inside):
        return False
    sums, waiting = [one for one in inside if one.opcode == "dynamic-slice"], [visit.instruction.name]
    while waiting:
        users = [one for one in inside if waiting[0] in one.operands]
        waiting = waiting[1:] + [one.name for one in users if one.opcode != "dynamic-slice"]
        if not users:
            return False  # a whole sum leaves the fusion
    return bool(sums)


def _axes_by_groups(mesh: Mapping[str, int]) -> dict[Groups, tuple[str, ...]]:
    """Which axes a partition of the devices spans, for every choice among axes longer than 1."""
    grid = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    long = [axis for axis, name in enumerate(mesh) if mesh[name] > 1]
    table: dict[Groups, tuple[str, ...]] = {}
    for length in range(1, len(long) + 1):
        for chosen in itertools.combinations(long, length):
            size = math.prod(grid.shape[axis] for axis in chosen)
            rows = np.moveaxis(grid, chosen, range(-length, 0)).reshape(-1, size)
            table[_frozen(rows)] = tuple(list(mesh)[axis] for axis in chosen)
    return table


def _permuted_axes(pairs: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes along which the two ends of any pair differ."""
    apart = [np.array(np.unravel_index(sorted(pair), tuple(mesh.values()))) for pair in pairs if len(pair) == 2]
    return tuple(name for axis, name in enumerate(mesh) if any(ends[axis, 0] != ends[axis, 1] for ends in apart))


def _groups(instruction: Instruction, devices: int) -> Groups:
    """The devices that communicate with each other, in any of the ways in which XLA prints them."""
    text = instruction.attribute("replica_groups") or instruction.attribute("source_target_pairs")
    if text.startswith("mesh["):
        # The attribute's own text stops at the first comma outside of brackets.
        start = instruction.rest.index("replica_groups=")
        return _mesh_groups(instruction.rest[start:])
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims, order = ([int(n) for n in part.split(",")] if part else [] for part in iota.groups())
        return _frozen(_iota(dims, order).reshape(shape))
    listed = [[int(n) for n in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", text)]
    return _frozen(listed or [list(range(devices))])


def _mesh_groups(text: str) -> Groups:
    """Groups such as mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b'}: those along b; 'b':(2)4 is a part of b."""
    parts = re.match(
        r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", text
    )
    if not parts:
        raise ValueError(f"cannot read {text[:120]!r}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", parts[1])}
    total = math.prod(sizes.values())
    dims, order = ([int(n) for n in part.split(",")] if part else [] for part in parts.group(2, 3))
    shape: list[int] = []
    chosen: list[int] = []
    pieces = {
        name: (int(before), int(size)) for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", parts[4])
    }
    whole = set(re.findall(r"'([^']+)'", parts[4]))
    for name, size in sizes.items():
        before, middle = pieces.get(name, (1, size))
        if name in whole:
            chosen.append(len(shape) + 1)
        shape += [before, middle, size // before // middle]
    grid = _iota(dims or [total], order).reshape(shape)
    rows = np.moveaxis(grid, chosen, range(-len(chosen), 0))
    return _frozen(rows.reshape(-1, math.prod(grid.shape[axis] for axis in chosen)))


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
    grid = np.arange(math.prod(dims)).reshape(dims)
    return grid.transpose(order) if order else grid


def _frozen(rows: np.ndarray | list[list[int]]) -> Groups:
    return frozenset(frozenset(int(device) for device in row) for row in rows)
