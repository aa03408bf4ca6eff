"""Reading a compiled program: its instructions, and how often each runs."""

import jax
import jax.numpy as jnp
import pytest

from transformer.planning.hlo import ArrayType, Program, parse_array_types

TPU_LOOP = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  ROOT %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) tuple(%i, %x)
}

%cond (q: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %q = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=DIRECTION, metadata={op_name="jit(f)/while/cond/lt"}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %start = s32[]{:T(128)} constant(2)
  %arg = f32[8,4]{1,0:T(8,128)S(1)} parameter(0)
  %given = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) tuple(%start, %arg)
  %loop = (s32[]{:T(128)}, /*index=1*/f32[8,4]{1,0:T(8,128)S(1)}) while(%given), condition=%cond, body=%body
  ROOT %out = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%loop), index=1
}
"""


def compiled(function, *shapes):
    return Program(jax.jit(function).lower(*(jnp.zeros(shape) for shape in shapes)).compile().as_text())


def dots(program):
    return [run.num_runs for run in program.iter_executed() if run.instruction.opcode == "dot"]


def scan(length, body):
    return lambda x: jax.lax.scan(lambda x, _: (body(x), None), x, None, length=length)[0]


def test_the_body_of_a_loop_runs_as_often_as_its_trips():
    program = compiled(scan(7, lambda x: x @ x), (4, 4))
    assert dots(program) == [7]
    assert program.unknown_loops == []


def test_loops_in_loops_multiply():
    assert sorted(dots(compiled(lambda x: scan(3, scan(5, lambda y: y @ y))(x) @ x, (4, 4)))) == [1, 15]


def test_a_loop_whose_trips_depend_on_data_counts_once_and_is_named():
    program = compiled(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x + 1, x), (4, 4))
    assert dots(program) == [1]
    assert len(program.unknown_loops) == 1


@pytest.mark.parametrize(("direction", "times", "unknown"), [("LT", 4, []), ("NE", 1, ["loop"])])
def test_where_no_trips_are_noted_the_counter_s_bounds_tell_them(direction, times, unknown):
    program = Program(TPU_LOOP.replace("DIRECTION", direction))
    (tuple_,) = [run for run in program.iter_executed() if run.instruction.name == "t"]
    assert (tuple_.num_runs, program.unknown_loops) == (times, unknown)


@pytest.mark.parametrize(("strides", "times"), [((1,), 4), ((2,), 2), ((3,), 2), ((1, 2), 2)])
def test_a_counter_may_grow_by_more_than_one_a_trip(strides, times):
    """From 2 to below 6."""
    lines, last = [], "i"
    for number, stride in enumerate(strides):
        lines += [f"  %by{number} = s32[] constant({stride})", f"  %n{number} = s32[] add(%{last}, %by{number})"]
        last = f"n{number}"
    text = TPU_LOOP.replace("DIRECTION", "LT").replace("tuple(%i, %x)", f"tuple(%{last}, %x)")
    program = Program(text.replace("  ROOT %t", "\n".join([*lines, "  ROOT %t"])))
    (tuple_,) = [run for run in program.iter_executed() if run.instruction.name == "t"]
    assert tuple_.num_runs == times


def test_both_branches_of_a_condition_count():
    program = compiled(lambda x: jax.lax.cond(x.sum() > 0, lambda: x @ x @ x, lambda: x @ x), (4, 4))
    assert len(dots(program)) in (2, 3)  # XLA may share the product that both have


def test_types_are_read_with_their_memory():
    assert parse_array_types("f32[2,3]{1,0:T(8,128)S(1)}") == [ArrayType("f32", (2, 3), 1)]
    nested = parse_array_types("((bf16[1024,16]{0,1:T(8,128)(2,1)}), /*index=1*/s32[]{:S(2)}, pred[8])")
    assert nested == [ArrayType("bf16", (1024, 16)), ArrayType("s32", (), 2), ArrayType("pred", (8,))]
    assert [array.size for array in nested] == [2 * 1024 * 16, 4, 8]
    assert [array.size for array in parse_array_types("s4[3] f8e4m3fn[5] c64[2] token[]")] == [2, 5, 16, 0]


def test_an_instruction_s_parts():
    program = Program(TPU_LOOP)
    loop = program.entry["loop"]
    assert (loop.opcode, loop.operands, loop.attribute("body"), loop.is_root) == ("while", ["given"], "%body", False)
    assert program.entry["out"].numbers("index") == [1]
    assert program.entry["out"].attribute("condition") == ""
    assert program.computations["cond"]["limit"].text == "6"
