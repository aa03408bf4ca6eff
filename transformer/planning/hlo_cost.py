"""The cost of one run of a compiled program per chip: FLOPs, HBM traffic and communication.

FLOPs are those of matrix products, two a multiply-add, as in `models.flops`. HBM traffic is what fusions and other
scheduled instructions read and write: each operand once, or the slice if the operand is only sliced.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from transformer.planning.hlo import ArrayType, Computation, Instruction, InstructionRun, Program

Groups = frozenset[frozenset[int]]

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "iota", "opt-barrier", "domain", "add-dependency", "async-start", "async-update"),
}
_SLICE_OPCODES = ("dynamic-slice", "slice", "gather")
_UPDATE_OPCODES = ("dynamic-update-slice", "scatter")


class Collective(NamedTuple):
    """All communication of one kind over the same mesh axes in one run of the program.

    Attributes:
      kind: such as all-reduce.
      axes: mesh axes that it spans; empty if the groups match no axes.
      chips: in a group.
      num_runs: of such operations, including those of loops.
      bytes: of the whole arrays that are summed, gathered or scattered, or that one chip passes on.
    """

    kind: str
    axes: tuple[str, ...]
    chips: int
    num_runs: int
    bytes: int


class KernelCost(NamedTuple):
    """The cost of one run of an instruction, with what is fused into it, and the number of runs."""

    num_runs: int
    flops: int
    hbm_bytes: int


def kernel_costs(program: Program) -> list[KernelCost]:
    """The costs of all that one chip executes, one after the other."""
    costs: list[KernelCost] = []
    for run in program.iter_executed():
        flops = _instruction_flops(run)
        if run.is_fused:  # part of the last instruction that is not
            costs[-1] = costs[-1]._replace(flops=costs[-1].flops + flops)
        else:
            costs.append(KernelCost(run.num_runs, flops, _instruction_hbm_bytes(run, program)))
    return [cost for cost in costs if cost.flops or cost.hbm_bytes]


def count_flops(program: Program) -> int:
    """FLOPs of all matrix products on one chip."""
    return sum(cost.num_runs * cost.flops for cost in kernel_costs(program))


def _instruction_flops(run: InstructionRun) -> int:
    """FLOPs of a matrix product: 2 × size of the result × contracted size.

    %dot = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    """
    instruction = run.instruction
    if instruction.opcode == "dot":
        left = _operand_array(run, 0).shape
        contracted = math.prod(left[axis] for axis in instruction.numbers("lhs_contracting_dims"))
        return 2 * math.prod(instruction.result[0].shape) * contracted
    if instruction.opcode == "custom-call":
        return _cublas_flops(run) if _is_cublas(instruction) else _kernel_flops(run)
    return _convolution_flops(run) if instruction.opcode == "convolution" else 0


def _is_cublas(instruction: Instruction) -> bool:
    """Whether the instruction is a matrix product by cuBLAS or cuBLASLt."""
    return instruction.attribute("custom_call_target").strip('"') in _CUBLAS


_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")


def _cublas_flops(run: InstructionRun) -> int:
    """FLOPs of a cuBLAS product, whose result comes with a workspace:

    %both = (bf16[3,5,11]{2,1,0}, s8[4194304]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm",
      backend_config={"gemm_backend_config":{…"lhs_contracting_dimensions":["1"],…}}
    """
    contracting = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', run.instruction.rest)
    if not contracting:
        raise ValueError(f"cannot read the dimensions of {run.instruction.name}: {run.instruction.rest[:120]!r}")
    left = _operand_array(run, 0).shape
    contracted = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracting[1]))
    return 2 * math.prod(run.instruction.result[0].shape) * contracted


class _AttentionKernel(NamedTuple):
    """A fused attention kernel.

    The forward pass multiplies queries by keys and weights by values. The backward pass recomputes the weights and
    their gradients, and multiplies for each of the gradients of queries, keys and values.

    Attributes:
      name: prefix of the instruction's name, or its custom_call_target.
      length_axis: of the keys.
      key_products, value_products: the number of products with the width of keys, and of values.
    """

    name: str
    length_axis: int
    key_products: int
    value_products: int


_ATTENTION_KERNELS = (
    _AttentionKernel("splash_mha_fwd", -2, 1, 1),
    _AttentionKernel("splash_mha_dq", -2, 2, 1),
    _AttentionKernel("splash_mha_dkv", -2, 2, 2),
    _AttentionKernel('"__cudnn$fmhaSoftmaxBackward"', 1, 3, 2),
    _AttentionKernel('"__cudnn$fmhaSoftmax"', 1, 1, 1),
)


def _kernel_flops(run: InstructionRun) -> int:
    """FLOPs of an attention kernel over all pairs of query and key, masked ones included, as in `models.flops`.

    %splash_mha_fwd.1 = f32[…] custom-call(%q, %k, %v, …), custom_call_target="tpu_custom_call"
    %fmha = (bf16[…], u8[0]) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax"
    """
    name, target = run.instruction.name, run.instruction.attribute("custom_call_target")
    for kernel in _ATTENTION_KERNELS:
        if name.startswith(kernel.name) or target == kernel.name:
            q, k, v = [array.shape for array in _operands(run) if array.dtype in ("bf16", "f16", "f32")][:3]
            widths = kernel.key_products * q[-1] + kernel.value_products * v[-1]
            return 2 * math.prod(q[:-1]) * k[kernel.length_axis] * widths
    return 0


def _convolution_flops(run: InstructionRun) -> int:
    """FLOPs of a convolution without those of padding, strides and dilation.

    The TPU compiler writes matrix products as convolutions, and batch axes as dilated windows. This is bhtk,bhsk->bhts
    with b = h = 16: each output sees one position of the window of 16 x 16.

        %c = f32[16,16,256,256] convolution(%x, %y), window={size=16x16 stride=15x15 lhs_dilate=16x16},
          dim_labels=0b1f_0o1i->01bf
    """
    instruction = run.instruction
    left, right, out = (_operand_array(run, 0).shape, _operand_array(run, 1).shape, instruction.result[0].shape)
    labels = re.split("_|->", instruction.attribute("dim_labels"))
    window = dict(part.split("=") for part in instruction.attribute("window").strip("{}").split())
    products = 1
    for label in (letter for letter in labels[0] if letter.isdigit()):
        size = left[labels[0].index(label)], right[labels[1].index(label)], out[labels[2].index(label)]
        products *= _num_real_products(
            *size, **{name: _window_value(window, name, int(label)) for name in _WINDOW_DEFAULTS}
        )
    groups = max(instruction.numbers("batch_group_count") or [1])
    batch = -(-left[labels[0].index("b")] // groups)
    return 2 * products * batch * right[labels[1].index("i")] * right[labels[1].index("o")]


_WINDOW_DEFAULTS = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}


def _window_value(window: Mapping[str, str], name: str, index: int) -> int:
    """The value of a window's attribute for one dimension: 3 of stride=2x3; of pad=1_0x2_0 the low padding, 2."""
    return int(window[name].split("x")[index].split("_")[0]) if name in window else _WINDOW_DEFAULTS[name]


def _num_real_products(
    left: int, kernel: int, out: int, *, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """The number of (output, kernel) positions whose input is an element, neither padding nor a hole of dilation."""
    position = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilate - pad
    return int(((position >= 0) & (position % lhs_dilate == 0) & (position // lhs_dilate < left)).sum())


def hbm_bytes(program: Program) -> int:
    """Bytes that one chip reads from and writes to HBM."""
    return sum(cost.num_runs * cost.hbm_bytes for cost in kernel_costs(program))


def _instruction_hbm_bytes(run: InstructionRun, program: Program) -> int:
    """Bytes that one instruction reads from and writes to HBM; S(1) marks arrays in VMEM.

    %sum = f32[8,4]{1,0} add(%x, %in_vmem)
    %start = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:4]}
    """
    instruction = run.instruction
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
        return 0
    operands = _operands(run)
    if opcode in ("copy-start", "slice-start"):
        # The result is a tuple of source, destination and a flag, in some order: the smallest array is what moves.
        moved = min(array.size for array in instruction.result if array.shape)
        spaces = {array.space for array in instruction.result if array.shape}
        return 2 * moved if spaces == {0} else moved * (0 in spaces)
    if opcode in _SLICE_OPCODES:
        return _hbm_size([instruction.result[0]]) + (0 if operands[0].space else instruction.result[0].size)
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _hbm_size(operands[-1:] if opcode == "scatter" else operands[1:2])
    if opcode == "fusion":
        return _fusion_hbm_bytes(run, program)
    if _is_cublas(instruction):
        return _hbm_size(operands) + _hbm_size(instruction.result[:1])  # without the workspace
    return _hbm_size(operands) + _hbm_size(instruction.result)


def _fusion_hbm_bytes(run: InstructionRun, program: Program) -> int:
    """HBM traffic of a fusion: of an operand that it only slices, the slice; of a result updated in place, the update.

    A gather is a slice, and a scatter an update.

    This fusion of a loop reads a row of %stack and writes a row of %out, not the arrays of 64 rows:

        %fused (stack: f32[64,1024], out: f32[64,1024], i: s32[]) -> f32[64,1024] {
          %row = f32[1,1024] dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,1024}
          %double = f32[1,1024] multiply(%row, %two)
          ROOT %update = f32[64,1024] dynamic-update-slice(%out, %double, %i, %zero)
        }
    """
    inside = program.computations.get(run.instruction.attribute("calls").lstrip("%"), {})
    read = 0
    updated = {}  # parameter that is updated in place → size of the whole
    update_bytes = 0
    for inner in inside.values():
        if inner.opcode in _UPDATE_OPCODES:
            whole = _resolve_alias(inside, inner.operands[0])
            while whole.opcode in _UPDATE_OPCODES:  # of several one after the other
                whole = _resolve_alias(inside, whole.operands[0])
            if whole.opcode == "parameter":
                updated[whole.name] = _hbm_size(inner.result)
                update_bytes += inside[inner.operands[-1 if inner.opcode == "scatter" else 1]].result[0].size
    for inner in inside.values():
        if inner.opcode != "parameter" or not _hbm_size(inner.result) or inner.name in updated:
            continue
        uses = list(_uses(inside, inner.name))
        if uses and all(user.opcode in _SLICE_OPCODES and user.operands[0] == name for user, name in uses):
            read += sum(user.result[0].size for user, _ in uses)
        else:
            read += _hbm_size(inner.result)
    written = max(_hbm_size(run.instruction.result) - sum(updated.values()), 0)
    return read + 2 * update_bytes + written


def _uses(computation: Computation, name: str) -> Iterator[tuple[Instruction, str]]:
    """The instructions that use a value, and the name by which they do: its own, or that of a bitcast."""
    for user in computation.values():
        if name in user.operands:
            yield from _uses(computation, user.name) if user.opcode == "bitcast" else [(user, name)]


def _resolve_alias(computation: Computation, name: str) -> Instruction:
    """The instruction behind bitcasts, copies and conversions."""
    instruction = computation[name]
    while instruction.opcode in ("bitcast", "copy", "convert") and instruction.operands[0] in computation:
        instruction = computation[instruction.operands[0]]
    return instruction


def _hbm_size(arrays: list[ArrayType]) -> int:
    return sum(array.size for array in arrays if not array.space)


def _operands(run: InstructionRun) -> list[ArrayType]:
    """The arrays of all operands; tuples are flattened."""
    sources = (run.computation.get(name) for name in run.instruction.operands)
    return [array for source in sources if source for array in source.result]


def _operand_array(run: InstructionRun, index: int) -> ArrayType:
    return run.computation[run.instruction.operands[index]].result[0]


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """All communication of one run, by kind and mesh axes.

    Args:
      program: for one chip.
      mesh: axis names and sizes; devices are numbered along the mesh, its last axis fastest.
    """
    axes_of = _axes_by_groups(mesh)
    totals: dict[tuple, Collective] = {}
    counted_channels: set[str] = set()
    for run in program.iter_executed():
        kind = run.instruction.opcode.removesuffix("-start")
        channel = run.instruction.attribute("channel_id")
        if run.is_fused and _is_reduce_scatter(run):
            kind = "reduce-scatter"
        elif kind not in COLLECTIVES or (run.is_fused and channel in counted_channels):
            continue  # a transfer that overlaps with several fusions has a copy in each of them
        elif run.is_fused:
            counted_channels.add(channel)
        groups = _parse_groups(run.instruction, math.prod(mesh.values()))
        axes = _permuted_axes(groups, mesh) if kind == "collective-permute" else axes_of.get(groups, ())
        chips = max((len(group) for group in groups), default=1)
        size = run.num_runs * sum(array.size for array in _operands(run)) * (chips if kind == "all-gather" else 1)
        total = totals.get((kind, axes, chips), Collective(kind, axes, chips, 0, 0))
        totals[kind, axes, chips] = total._replace(num_runs=total.num_runs + run.num_runs, bytes=total.bytes + size)
    return sorted(totals.values(), key=lambda total: -total.bytes)


_REDUCE_SCATTER_OPCODES = {
    *("all-reduce", "dynamic-slice", "get-tuple-element", "tuple", "bitcast", "reshape", "copy"),
    *("parameter", "constant", "partition-id", "replica-id", "add", "multiply", "divide", "remainder", "convert"),
}


def _is_reduce_scatter(run: InstructionRun) -> bool:
    """Whether an all-reduce is in a fusion that keeps only slices of the sums, as a reduce-scatter is written on TPU:

    %sum-and-slice (p: f32[16]) -> f32[2] {
      %p = f32[16]{0} parameter(0)
      %sum = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
      %id = u32[] partition-id()
      ROOT %mine = f32[2]{0} dynamic-slice(%sum, %id), dynamic_slice_sizes={2}
    }
    """
    inside = run.computation.values()
    if run.instruction.opcode != "all-reduce" or any(inner.opcode not in _REDUCE_SCATTER_OPCODES for inner in inside):
        return False
    has_slice = any(inner.opcode == "dynamic-slice" for inner in inside)
    to_follow = [run.instruction.name]  # values that contain a whole sum
    while to_follow:
        users = [inner for inner in inside if to_follow[0] in inner.operands]
        to_follow = to_follow[1:] + [user.name for user in users if user.opcode != "dynamic-slice"]
        if not users:
            return False  # a whole sum is a result of the fusion
    return has_slice


def _axes_by_groups(mesh: Mapping[str, int]) -> dict[Groups, tuple[str, ...]]:
    """Groups of devices → the mesh axes that they span, for all sets of axes longer than 1.

    Example: data=2, fsdp=4 gives {0123, 4567} → fsdp, {04, 15, 26, 37} → data, {01234567} → data, fsdp.
    """
    grid = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    long_axes = [axis for axis, name in enumerate(mesh) if mesh[name] > 1]
    axes_of: dict[Groups, tuple[str, ...]] = {}
    for length in range(1, len(long_axes) + 1):
        for axes in itertools.combinations(long_axes, length):
            size = math.prod(grid.shape[axis] for axis in axes)
            rows = np.moveaxis(grid, axes, range(-length, 0)).reshape(-1, size)
            axes_of[_to_groups(rows)] = tuple(list(mesh)[axis] for axis in axes)
    return axes_of


def _permuted_axes(pairs: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of any pair differ."""
    coordinates = [np.array(np.unravel_index(sorted(pair), tuple(mesh.values()))) for pair in pairs if len(pair) == 2]
    return tuple(name for axis, name in enumerate(mesh) if any(ends[axis, 0] != ends[axis, 1] for ends in coordinates))


def _parse_groups(instruction: Instruction, num_devices: int) -> Groups:
    """The groups of devices that communicate, in each of XLA's notations:

    replica_groups={{0,1},{2,3}}                       listed; {} is one group of all devices
    source_target_pairs={{0,1},{1,2},{2,0}}            the pairs of a permutation
    replica_groups=[4,2]<=[2,4]T(1,0)                  arange(8).reshape(2, 4).transpose(1, 0).reshape(4, 2)
    replica_groups=mesh['a'=2,'b'=4] {'b'}             see `_parse_mesh_groups`
    """
    text = instruction.attribute("replica_groups") or instruction.attribute("source_target_pairs")
    if text.startswith("mesh["):
        # `attribute` stops at the first comma outside of brackets.
        start = instruction.rest.index("replica_groups=")
        return _parse_mesh_groups(instruction.rest[start:])
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims, order = ([int(n) for n in part.split(",")] if part else [] for part in iota.groups())
        return _to_groups(_iota(dims, order).reshape(shape))
    groups = [[int(n) for n in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", text)]
    return _to_groups(groups or [list(range(num_devices))])


def _parse_mesh_groups(text: str) -> Groups:
    """The groups along some axes of a mesh, or along parts of axes:

    replica_groups=mesh['a'=2,'b'=4] {'b'}                                  {0123, 4567}
    replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}        {04, 15, 26, 37}
    replica_groups=mesh['a'=8] {'a':(2)4}         the inner 4 of a split into 2 × 4: {0123, 4567}
    replica_groups=mesh['a'=8] {'a':(1)2}         the outer 2 of a split into 2 × 4: {04, 15, 26, 37}
    """
    match = re.match(
        r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", text
    )
    if not match:
        raise ValueError(f"cannot read {text[:120]!r}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    total = math.prod(sizes.values())
    dims, order = ([int(n) for n in part.split(",")] if part else [] for part in match.group(2, 3))
    axis_parts = {
        name: (int(before), int(size)) for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", match[4])
    }
    group_names = set(re.findall(r"'([^']+)'", match[4]))
    # Each axis becomes three: before the part, the part (by default the whole axis), and after it.
    shape: list[int] = []
    group_axes: list[int] = []
    for name, size in sizes.items():
        before, part = axis_parts.get(name, (1, size))
        if name in group_names:
            group_axes.append(len(shape) + 1)
        shape += [before, part, size // before // part]
    grid = _iota(dims or [total], order).reshape(shape)
    rows = np.moveaxis(grid, group_axes, range(-len(group_axes), 0))
    return _to_groups(rows.reshape(-1, math.prod(grid.shape[axis] for axis in group_axes)))


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
    grid = np.arange(math.prod(dims)).reshape(dims)
    return grid.transpose(order) if order else grid


def _to_groups(rows: np.ndarray | list[list[int]]) -> Groups:
    return frozenset(frozenset(int(device) for device in row) for row in rows)
