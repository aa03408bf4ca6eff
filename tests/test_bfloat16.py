"""With bfloat16 a training step multiplies nothing in float32; products of float32 result, and their gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import small_config
from tests.test_families import KINDS, family_config
from tests.test_step import V, draw_batch
from transformer import sharding, step
from transformer.attention import float32_product

TENSOR = r"tensor<(?:\d+x)*(\w+)>"
OPERANDS = re.compile(rf"stablehlo\.(?:dot_general|convolution)\b.* : \({TENSOR}, {TENSOR}\)")
FEW = {"num_layers": 1, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    "config",
    [
        small_config(model={**FEW, "attention": "plain"}, data={"batching": "pack", "num_buckets": 8}),
        small_config(model={**FEW, "attention": "blockwise", "remat": "dots"}),
        *(family_config(**KINDS[kind], **FEW) for kind in ("recurrent", "additive", "convolutional")),
    ],
    ids=["plain", "blockwise", "recurrent", "additive", "convolutional"],
)
def test_a_bfloat16_training_step_multiplies_nothing_in_float32(config):
    mesh, model = sharding.make_mesh(config.mesh), step.Model(config.model, V)
    where = sharding.batch_sharding(mesh)
    batch = jax.tree.map(lambda ids: jax.ShapeDtypeStruct(ids.shape, ids.dtype, sharding=where), draw_batch())
    state = step.abstract_state(model, config, mesh)
    operands = OPERANDS.findall(step.make_train_step(model, config, mesh).lower(state, batch).as_text())
    assert len(operands) > 10
    assert set(operands) == {("bf16", "bf16")}


HOW = ["...d,vd->...v", "btsd,d->bts", "bthk,bshk->bhts"]


def operands_of(how, dtype):
    sizes = dict(zip("btshkdv", (2, 3, 4, 2, 5, 6, 7), strict=True))
    shapes = ([sizes[axis] for axis in axes] for axes in how.replace("...", "bt").split("->")[0].split(","))
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def gradients(multiply, *operands):
    return jax.jit(jax.value_and_grad(lambda *both: jnp.sin(multiply(*both)).sum(), (0, 1)))(*operands)


@pytest.mark.parametrize("how", HOW)
def test_of_float32_it_is_the_einsum_to_the_last_bit(how):
    operands = operands_of(how, jnp.float32)
    wanted = gradients(lambda *both: jnp.einsum(how, *both), *operands)
    jax.tree.map(np.testing.assert_array_equal, gradients(lambda *both: float32_product(how, *both), *operands), wanted)


@pytest.mark.parametrize("how", HOW)
def test_of_bfloat16_its_value_is_float32_and_its_gradients_are_right_to_rounding(how):
    operands = operands_of(how, jnp.bfloat16)
    value, grads = gradients(lambda *both: float32_product(how, *both), *operands)
    wide = [operand.astype(jnp.float32) for operand in operands]
    wanted, wanted_grads = gradients(lambda *both: jnp.einsum(how, *both), *wide)
    assert float32_product(how, *operands).dtype == jnp.float32
    np.testing.assert_allclose(value, wanted, rtol=1e-5)  # sums of products that float32 holds exactly
    for grad, right in zip(grads, wanted_grads, strict=True):
        assert grad.dtype == jnp.bfloat16
        np.testing.assert_allclose(grad.astype(jnp.float32), right, atol=0.02 * float(jnp.abs(right).max()))
