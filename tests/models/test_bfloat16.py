"""With bfloat16 a training step multiplies nothing in float32, and sums nothing in bfloat16: gradients stay right."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import small_config
from tests.models.test_families import KINDS, family_config
from tests.training.test_train_step import V, draw_batch
from transformer.attention.dot_product import einsum_f32
from transformer.data.batching import Batch
from transformer.data.tokenizer import EOS
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models import registry
from transformer.models.loss import cross_entropy
from transformer.training import train_step

TENSOR = r"tensor<(?:\d+x)*(\w+)>"
OPERANDS = re.compile(rf"stablehlo\.(?:dot_general|convolution)\b.* : \({TENSOR}, {TENSOR}\)")
NARROW = r"\(tensor<(?:\d+x)*bf16>"
SUMS = [  # along axes, and into the rows of a table
    re.compile(rf"stablehlo\.reduce\(.* applies stablehlo\.add .*{NARROW}"),
    re.compile(rf'"stablehlo\.scatter"(?s:.*?)\}}\) : {NARROW}'),
]
FEW = {"num_layers": 1, "dtype": "bfloat16"}
ROTARY = {"positions": "rotary", "norm_type": "rms", "activation": "swiglu", "qk_norm": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        small_config(
            model={**FEW, "attention": "plain", "positions": "learned"}, data={"batching": "pack", "num_buckets": 8}
        ),
        small_config(model={**FEW, "attention": "blockwise", "remat": "dots"}),
        small_config(model={**FEW, **ROTARY}),
        *(family_config(**KINDS[kind], **FEW) for kind in ("recurrent", "additive", "wide convolutional")),
    ],
    ids=["plain", "blockwise", "rotary", "recurrent", "additive", "convolutional"],
)
def test_a_bfloat16_training_step_multiplies_nothing_in_float32_and_sums_nothing_in_bfloat16(config):
    mesh, model = make_mesh(config.mesh), registry.ModelDef(config.model, V)
    where = sharding.batch_sharding(mesh)
    batch = jax.tree.map(lambda ids: jax.ShapeDtypeStruct(ids.shape, ids.dtype, sharding=where), draw_batch())
    state = train_step.abstract_state(model, config, mesh)
    program = train_step.make_train_step(model, config, mesh).lower(state, batch).as_text()
    operands = OPERANDS.findall(program)
    assert len(operands) > 10
    assert set(operands) == {("bf16", "bf16")}
    assert [total.findall(program) for total in SUMS] == [[], []]


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
    jax.tree.map(np.testing.assert_array_equal, gradients(lambda *both: einsum_f32(how, *both), *operands), wanted)


@pytest.mark.parametrize("how", HOW)
def test_of_bfloat16_its_value_is_float32_and_its_gradients_are_right_to_rounding(how):
    operands = operands_of(how, jnp.bfloat16)
    value, grads = gradients(lambda *both: einsum_f32(how, *both), *operands)
    wide = [operand.astype(jnp.float32) for operand in operands]
    wanted, wanted_grads = gradients(lambda *both: jnp.einsum(how, *both), *wide)
    assert einsum_f32(how, *operands).dtype == jnp.float32
    np.testing.assert_allclose(value, wanted, rtol=1e-5)  # sums of products that float32 holds exactly
    for grad, right in zip(grads, wanted_grads, strict=True):
        assert grad.dtype == jnp.bfloat16
        np.testing.assert_allclose(grad.astype(jnp.float32), right, atol=0.02 * float(jnp.abs(right).max()))


LEARNED = {"positions": "learned"}
FULL_BATCHES = {  # model fields, and whether rows are packed
    "attention, packed": (LEARNED, True),
    "attention": ({}, False),
    "attention, pre-norm, scanned": ({"norm": "pre", "scan_layers": True, **LEARNED}, False),
    "attention, rotary": (ROTARY, False),
    "recurrent": ({"family": "recurrent", "num_layers": 2}, False),
    "recurrent, additive": ({"family": "recurrent", "attention_score": "additive"}, False),
    "convolutional, additive": ({"family": "convolutional", "attention_score": "additive", **LEARNED}, False),
    "convolutional, packed": ({"family": "convolutional", **LEARNED}, True),
}


@pytest.mark.parametrize(
    ("fields", "packed"),
    [
        pytest.param(*FULL_BATCHES[name], id=name, marks=() if name == "attention, packed" else pytest.mark.slow)
        for name in FULL_BATCHES
    ],
)
def test_every_gradient_of_a_full_batch_is_that_of_float32(fields, packed):
    """Of 24,576 tokens: a sum over all of them in bfloat16, as of a bias, would be wrong by 6% to 46%."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, V, (2, 768, 32)).astype(np.int32)
    ids[:, :, [15, 31] if packed else [31]] = EOS
    fields = {"num_layers": 1, "dropout_rate": 0.0, **fields}
    config = (family_config(**fields) if "family" in fields else small_config(model=fields)).model
    params, result = registry.ModelDef(config, V).init(0), {}
    for dtype in ("float32", "bfloat16"):
        model = registry.ModelDef(dataclasses.replace(config, dtype=dtype), V)

        def objective(params, batch, model=model):
            return cross_entropy(model.bind(params)(*batch, None, packed), batch.target_BT, 0.1).smoothed_nll

        result[dtype] = jax.device_get(jax.jit(jax.grad(objective))(params, Batch(*ids)))
    for (path, wide), narrow in zip(
        jax.tree.leaves_with_path(result["float32"]), jax.tree.leaves(result["bfloat16"]), strict=True
    ):
        assert np.linalg.norm(narrow - wide) < 0.02 * np.linalg.norm(wide), jax.tree_util.keystr(path)
