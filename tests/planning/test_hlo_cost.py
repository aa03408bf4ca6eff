"""FLOPs, memory traffic and collectives of compiled programs, against what they must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transformer.planning import hlo_cost
from transformer.planning.hlo import Program
from transformer.planning.hlo_cost import Collective

MESH = {"data": 2, "fsdp": 4}


def program_of(function, *shapes, shardings=None, out=None):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    given = {} if shardings is None else {"in_shardings": shardings, "out_shardings": out}
    return Program(jax.jit(function, **given).lower(*arguments).compile().as_text())


def on_mesh(*axes):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, P(*axes))


def entry(*lines):
    return Program("\n".join(["ENTRY %main (a: f32[]) -> f32[] {", *lines, "}"]))


def test_matrix_products_of_a_scan_are_counted_by_its_trips():
    def function(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert hlo_cost.count_flops(program_of(function, (8, 16), (5, 16, 16))) == 5 * 2 * 8 * 16 * 16


def test_batched_products():
    product = program_of(lambda x, y: jnp.einsum("bth,bsh->bts", x, y), (3, 5, 7), (3, 11, 7))
    assert hlo_cost.count_flops(product) == 2 * 3 * 5 * 11 * 7


@pytest.mark.parametrize(
    ("padding", "stride", "expected"),
    # 1-d: taps that fall on an element, by hand.
    [
        ("VALID", 1, 2 * 4 * 2 * 3 * (8 * 3)),
        ("SAME", 1, 2 * 4 * 2 * 3 * (10 * 3 - 2)),
        ("VALID", 2, 2 * 4 * 2 * 3 * 12),
    ],
)
def test_convolutions_count_real_products_alone(padding, stride, expected):
    def function(x, w):
        return jax.lax.conv_general_dilated(x, w, (stride,), padding, dimension_numbers=("NWC", "WIO", "NWC"))

    assert hlo_cost.count_flops(program_of(function, (4, 10, 2), (3, 2, 3))) == expected


def test_a_batched_product_as_the_tpu_compiler_writes_it():
    """bhtk,bhsk->bhts with b=16, h=16, t=s=256, k=64: each batch sees one position of a window of 16 x 16."""
    program = entry(
        "  %x = bf16[16,256,16,64]{1,3,2,0:T(8,128)(2,1)} parameter(0)",
        "  %y = bf16[16,256,16,64]{1,3,2,0:T(8,128)(2,1)} parameter(1)",
        "  ROOT %c = f32[16,16,256,256]{2,3,1,0:T(8,128)} convolution(%x, %y), window={size=16x16 stride=15x15 "
        "lhs_dilate=16x16}, dim_labels=0b1f_0o1i->01bf",
    )
    assert hlo_cost.count_flops(program) == 2 * 16 * 16 * 256 * 256 * 64


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul"])
def test_products_that_xla_leaves_to_cublas(target):
    """bik,bkj->bij with b=3, and k=7 second of the left side; the workspace is no traffic."""
    dimensions = '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]'
    program = entry(
        "  %x = bf16[3,7,5]{2,1,0} parameter(0)",
        "  %y = bf16[3,7,11]{2,1,0} parameter(1)",
        f'  %both = (bf16[3,5,11]{{2,1,0}}, s8[4194304]{{0}}) custom-call(%x, %y), custom_call_target="{target}", '
        f'backend_config={{"gemm_backend_config":{{"beta":0,"dot_dimension_numbers":{{{dimensions}}}}}}}',
        "  ROOT %product = bf16[3,5,11]{2,1,0} get-tuple-element(%both), index=0",
    )
    assert hlo_cost.count_flops(program) == 2 * 3 * 5 * 11 * 7
    assert hlo_cost.hbm_bytes(program) == 2 * 3 * (7 * 5 + 7 * 11 + 5 * 11)


def test_traffic_is_operands_and_results_of_main_memory():
    program = entry(
        "  %x = f32[8,4]{1,0:T(8,128)} parameter(0)",
        "  %near = f32[8,4]{1,0:T(8,128)S(1)} parameter(1)",
        "  %start = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:4]}",
        "  %done = f32[2,4]{1,0:S(1)} slice-done(%start)",
        "  ROOT %sum = f32[8,4]{1,0} add(%x, %near)",
    )
    assert hlo_cost.hbm_bytes(program) == 2 * 4 * 4 + 2 * 8 * 4 * 4


def test_a_loop_reads_the_slices_of_its_stack_and_not_the_stack():
    def function(x, w):
        return jax.lax.scan(lambda x, w: (jnp.sin(x) * w, w * 2), x, w)

    moved = hlo_cost.hbm_bytes(program_of(function, (1024,), (64, 1024)))
    row = 1024 * 4
    assert 4 * 64 * row <= moved <= 9 * 64 * row  # x and w in, x and 2w out; the stack each time would be 64 times that


FUSED_UPDATES = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%scattered (logits: f32[24,1000], ids: s32[24,2]) -> f32[24,1000] {
  %logits = f32[24,1000]{1,0} parameter(0)
  %ids = s32[24,2]{1,0} parameter(1)
  %one = f32[] constant(1)
  %ones = f32[24,1,1]{2,1,0} broadcast(%one), dimensions={}
  ROOT %scatter = f32[24,1000]{1,0} scatter(%logits, %ids, %ones), update_window_dims={1,2}, to_apply=%add
}

%gathered (logits: f32[24,1000], ids: s32[24,2]) -> f32[24] {
  %logits = f32[24,1000]{1,0} parameter(0)
  %rows = f32[4,6,1000]{2,1,0} bitcast(%logits)
  %ids = s32[24,2]{1,0} parameter(1)
  %gather = f32[24,1,1]{2,1,0} gather(%rows, %ids), offset_dims={1,2}, slice_sizes={1,1,1}
  ROOT %flat = f32[24]{0} bitcast(%gather)
}

ENTRY %main (x: f32[24,1000], ids: s32[24,2]) -> f32[24] {
  %x = f32[24,1000]{1,0} parameter(0)
  %ids = s32[24,2]{1,0} parameter(1)
  %updated = f32[24,1000]{1,0} fusion(%x, %ids), kind=kInput, calls=%scattered
  ROOT %picked = f32[24]{0} fusion(%updated, %ids), kind=kLoop, calls=%gathered
}
"""


def test_a_scatter_in_place_moves_its_updates_and_a_gather_what_it_picks():
    ids = 24 * 2 * 4
    assert hlo_cost.hbm_bytes(Program(FUSED_UPDATES)) == (ids + 2 * 24 * 4) + (ids + 24 * 4 + 24 * 4)


def test_the_products_of_a_fusion_belong_to_its_kernel():
    program = program_of(lambda x, w: jnp.tanh(x @ w) @ w, (16, 32), (32, 32))
    kernels = hlo_cost.kernel_costs(program)
    assert (
        sum(kernel.num_runs * kernel.flops for kernel in kernels) == hlo_cost.count_flops(program) == 4 * 16 * 32 * 32
    )
    assert all(kernel.hbm_bytes for kernel in kernels if kernel.flops)


def test_a_gradient_over_the_data_axes_is_one_reduction():
    def gradient(w, x):
        return jax.grad(lambda w: (x @ w).sum())(w)

    rows, whole = on_mesh(("data", "fsdp")), on_mesh()
    result = hlo_cost.collectives(program_of(gradient, (16, 32), (64, 16), shardings=(whole, rows), out=whole), MESH)
    # w's gradient is the same in every column, which XLA knows.
    assert [(one.kind, one.axes, one.chips, one.num_runs) for one in result] == [("all-reduce", ("data", "fsdp"), 8, 1)]
    assert result[0].bytes in (16 * 4, 16 * 32 * 4)


@pytest.mark.parametrize(("axis", "chips"), [("data", 2), ("fsdp", 4)])
def test_gathering_along_one_axis(axis, chips):
    program = program_of(lambda x: x * 2, (16, 32), shardings=(on_mesh(axis),), out=on_mesh())
    assert hlo_cost.collectives(program, MESH) == [Collective("all-gather", (axis,), chips, 1, 16 * 32 * 4)]


def test_permutations_in_a_loop_count_by_its_trips():
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def function(x):
        return jax.lax.scan(lambda x, _: (jax.lax.ppermute(x, "fsdp", ring) + 1, None), x, None, length=3)[0]

    where = on_mesh(None, "fsdp")
    mapped = jax.shard_map(function, mesh=where.mesh, in_specs=where.spec, out_specs=where.spec)
    (result,) = hlo_cost.collectives(program_of(mapped, (8, 16), shardings=(where,), out=where), MESH)
    assert result[:4] == ("collective-permute", ("fsdp",), 2, 3)
    assert result.bytes == 3 * 8 * 16 * 4 // 4


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("[2,4]<=[8]", ("fsdp",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[1,8]<=[8]", ("data", "fsdp")),
        ("{}", ("data", "fsdp")),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0','axis_1'}", ("data", "fsdp")),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp",)),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ("data",)),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", ("fsdp",)),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", ("data",)),
        ("{{0,1},{2,3},{4,5},{6,7}}", ()),
    ],
)
def test_groups_of_devices_in_every_notation_are_axes_of_the_mesh(groups, axes):
    program = entry(
        "  %x = f32[16]{0} parameter(0)",
        f"  ROOT %r = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true, "
        "to_apply=%add",
    )
    (result,) = hlo_cost.collectives(program, MESH)
    assert (result.axes, result.bytes) == (axes, 64)


def test_groups_that_cannot_be_read_are_an_error():
    program = entry("  %x = f32[16]{0} parameter(0)", "  ROOT %r = f32[16]{0} all-reduce(%x), replica_groups=mesh[?")
    with pytest.raises(ValueError, match="cannot read"):
        hlo_cost.collectives(program, MESH)


SCATTER = """%sum-and-slice (p: f32[16], q: f32[8,8]) -> (f32[2], f32[1,8]) {
  %p = f32[16]{0} parameter(0)
  %q = f32[8,8]{1,0} parameter(1)
  %sums = (f32[16]{0}, f32[8,8]{1,0}) all-reduce(%p, %q), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %one = f32[16]{0} get-tuple-element(%sums), index=0
  %id = u32[] partition-id()
  %mine = f32[2]{0} dynamic-slice(%one, %id), dynamic_slice_sizes={2}
  %other = f32[8,8]{1,0} get-tuple-element(%sums), index=1
  %row = f32[1,8]{1,0} dynamic-slice(%other, %id, %id), dynamic_slice_sizes={1,8}
  ROOT %both = (f32[2]{0}, f32[1,8]{1,0}) tuple(%mine, %row)
}

ENTRY %main (a: f32[16], b: f32[8,8]) -> f32[2] {
  %a = f32[16]{0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %once = (f32[2]{0}, f32[1,8]{1,0}) fusion(%a, %b), kind=kCustom, calls=%sum-and-slice
  ROOT %again = (f32[2]{0}, f32[1,8]{1,0}) fusion(%a, %b), kind=kCustom, calls=%sum-and-slice
}
"""


def test_sums_of_which_slices_are_kept_are_a_reduce_scatter_and_share_a_channel():
    result = hlo_cost.collectives(Program(SCATTER), MESH)
    assert result == [Collective("reduce-scatter", ("data", "fsdp"), 8, 2, 2 * (64 + 256))]


def test_a_sum_that_is_kept_whole_is_not_a_reduce_scatter():
    whole = SCATTER.replace("tuple(%mine, %row)", "tuple(%one, %row)").replace("dynamic-slice(%one", "negate(%id")
    (result,) = hlo_cost.collectives(Program(whole), MESH)
    assert result.kind == "all-reduce"


GATHER = """%begin (p: f32[2]) -> f32[16] {
  %p = f32[2]{0} parameter(0)
  ROOT %first = f32[16]{0} all-gather(%p), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
}

%go-on (q: f32[2], r: f32[4]) -> f32[4] {
  %q = f32[2]{0} parameter(0)
  %r = f32[4]{0} parameter(1)
  %second = f32[16]{0} all-gather(%q), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %meanwhile = f32[4]{0} negate(%r)
}

ENTRY %main (a: f32[2], b: f32[4]) -> f32[4] {
  %a = f32[2]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %c = f32[16]{0} fusion(%a), kind=kCustom, calls=%begin
  ROOT %d = f32[4]{0} fusion(%a, %b), kind=kCustom, calls=%go-on
}
"""


def test_a_transfer_that_goes_on_during_several_fusions_counts_once():
    assert hlo_cost.collectives(Program(GATHER), MESH) == [Collective("all-gather", ("data", "fsdp"), 8, 1, 64)]
