"""What attention replaced keeps the promises of the Transformer: causality, padding, packing, decoding by steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import slow, small_config
from tests.models.test_transformer import SOURCE, TARGET, V, sentences
from transformer.config import default_config
from transformer.config.validation import validate
from transformer.data.batching import PAD_EXAMPLE, Batch, JaggedArray
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.decoding import decode as decoding
from transformer.decoding.decode import DecodeInputs
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models import flops
from transformer.models.base import shift_right
from transformer.models.registry import ModelDef
from transformer.planning import hlo, hlo_cost
from transformer.runtime.errors import UserError
from transformer.training import train_step

KINDS = {
    "recurrent": {"family": "recurrent"},
    "additive": {"family": "recurrent", "attention_score": "additive"},
    "one recurrent layer": {"family": "recurrent", "num_layers": 1},
    "convolutional": {"family": "convolutional"},
    "wide convolutional": {"family": "convolutional", "kernel_width": 5, "positions": "learned"},
}
FAST = {"schedule": "constant", "learning_rate": 3e-3, "warmup_steps": 0, "label_smoothing": 0.0}
FAMILIES = ("recurrent", "convolutional")
every_kind = pytest.mark.parametrize(
    "kind", ["one recurrent layer", "convolutional", *map(slow, ("recurrent", "additive", "wide convolutional"))]
)


def family_config(**fields):
    """As small_config, without the sizes that only attention has."""
    plain = {"num_heads": 8, "mlp_dim": 2048}
    return small_config(model={**plain, **fields})


def drawn(model, scale=0.25):
    """Params of the model's shapes, drawn by NumPy: initialisation takes longer to compile than all else."""
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(model.abstract_params)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32), shapes)


@functools.cache
def module(kind, **fields):
    model = ModelDef(family_config(**KINDS[kind], **fields).model, V)
    return model.bind(drawn(model))


@functools.cache
def compiled(kind, packed=False):
    """One program for each shape: faster than operation by operation."""
    return jax.jit(functools.partial(module(kind).__class__.__call__, module(kind), packed=packed))


@every_kind
def test_causality_by_gradient(kind):
    """The logits of a place depend on the tokens before it, and on no other."""
    model = module(kind)
    table = model._embedding("target")

    @jax.jit
    def gradients(noise_BTD):
        def logits(noise_BTD):
            plain = type(table).__call__
            try:
                type(table).__call__ = lambda self, ids, dtype: (
                    plain(self, ids, dtype) + (noise_BTD if ids.shape == TARGET.shape else 0.0)
                )
                return model(SOURCE, TARGET)[0].sum(-1)
            finally:
                type(table).__call__ = plain

        return jax.jacrev(logits)(noise_BTD)[:, 0]

    jacobian = gradients(jnp.zeros((*TARGET.shape, 16)))  # [T, T, D]
    reached = np.abs(np.asarray(jacobian)).max(-1) > 0
    T = TARGET.shape[1]
    assert (reached <= np.tri(T, dtype=bool)).all()
    assert reached[np.arange(T), np.arange(T)].all()
    assert reached[1:, 0].any()


@every_kind
def test_padding_cannot_be_seen(kind):
    """Wider rows, and other rows beside it, change no logits of a sentence; without them padding would be seen."""
    model = compiled(kind)
    logits = np.asarray(model(SOURCE, TARGET))
    wide = model(jnp.pad(SOURCE, ((0, 0), (0, 4))), jnp.pad(TARGET, ((0, 0), (0, 3))))
    np.testing.assert_allclose(wide[:, :6], logits, atol=2e-5)
    np.testing.assert_allclose(model(SOURCE[1:, :3], TARGET[1:, :3])[0], logits[1, :3], atol=2e-5)
    other = model(SOURCE.at[1, 0].set(30), TARGET)
    assert np.abs(other[1] - logits[1]).max() > 1e-3


@every_kind
def test_every_source_token_reaches_every_logit(kind):
    model = compiled(kind)
    logits = model(SOURCE, TARGET)
    for place in range(3):
        other = model(SOURCE.at[1, place].set(40), TARGET)
        assert (np.abs(other[1, :3] - logits[1, :3]).max(-1) > 0).all()


@every_kind
def test_cached_decoding_equals_decoding_at_once(kind):
    model, want, inputs = module(kind), compiled(kind)(SOURCE, TARGET), shift_right(TARGET)
    decode_step = jax.jit(functools.partial(model.decode_step, return_attention=True))
    source, cache = model.init_decode(SOURCE, 2, TARGET.shape[1])
    other = jnp.where(inputs == BOS, BOS, 20)
    swap = jnp.asarray([[1, 0], [1, 0]], jnp.int32)
    weights = jax.jit(model.cross_attention)(SOURCE, TARGET).mean(2)[:, -1]
    for t in range(TARGET.shape[1]):
        # The hypothesis that follows the target goes from beam to beam, and its past with it.
        mine = t % 2
        both = jnp.stack([inputs[:, t], other[:, t]] if not mine else [other[:, t], inputs[:, t]], 1)
        logits, cache, attended = decode_step(source, cache, both, jnp.int32(t))
        np.testing.assert_allclose(logits[:, mine], want[:, t], atol=2e-5)
        np.testing.assert_allclose(attended[:, mine], weights[:, t], atol=2e-5)
        cache = cache.reorder(swap)


@every_kind
def test_sentences_in_a_packed_row_do_not_see_each_other(kind):
    rng = np.random.default_rng(0)
    sources, targets = sentences(rng, 4, 7), sentences(rng, 4, 7)
    rows = np.array([[0, 1, 2], [3, PAD_EXAMPLE, PAD_EXAMPLE]])
    source, target = (JaggedArray.from_sequences(side).to_padded(rows, 24) for side in (sources, targets))
    packed = np.asarray(compiled(kind, packed=True)(source, target))
    place = [0, len(targets[0]), len(targets[0]) + len(targets[1]), 0]
    for i, row in enumerate([0, 0, 0, 1]):
        one = [JaggedArray.from_sequences([side[i]]).to_padded(np.array([0]), 8) for side in (sources, targets)]
        alone = compiled(kind)(*one)[0, : len(targets[i])]
        np.testing.assert_allclose(packed[row, place[i] : place[i] + len(targets[i])], alone, atol=2e-5)


@pytest.mark.slow
@every_kind
def test_the_attention_is_a_distribution_over_the_source(kind):
    model = module(kind)
    weights_BLHTS = jax.jit(model.cross_attention)(SOURCE, TARGET)
    assert weights_BLHTS.shape == (2, model.config.num_cross_attention_layers, 1, TARGET.shape[1], SOURCE.shape[1])
    np.testing.assert_allclose(weights_BLHTS.sum(-1), 1, rtol=1e-5)
    assert (weights_BLHTS[1, ..., 3:] == 0).all()  # padding


def test_params_are_as_many_as_the_layers_say():
    D, L, table = 16, 2, V * 16
    lstm = {"both directions": 2 * (D + D // 2 + 1) * 2 * D, "plain": (2 * D + 1) * 4 * D, "above": (3 * D + 1) * 4 * D}
    recurrent = lstm["both directions"] + 2 * lstm["plain"] + lstm["above"] + 2 * D * D + 2 * D * D
    layer = 3 * D * 2 * D + 2 * D
    convolutional = L * (2 * layer + 3 * D * D)
    for family, count in (("recurrent", recurrent), ("convolutional", convolutional)):
        assert ModelDef(family_config(family=family).model, V).num_params() == table + count
    assert ModelDef(family_config(**KINDS["additive"]).model, V).num_params() == table + recurrent + D


@functools.cache
def outputs(family, **fields):
    model = ModelDef(family_config(family=family, **fields).model, V)
    run = jax.jit(lambda params, key: model.bind(params)(SOURCE, TARGET, key))
    return np.asarray(run(drawn(model), jax.random.key(0)), np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("recurrent", "attention_score", "additive"),
        ("recurrent", "dropout_rate", 0.3),
        ("convolutional", "attention_score", "additive"),
        ("convolutional", "kernel_width", 5),
        ("convolutional", "positions", "learned"),
        ("convolutional", "dropout_rate", 0.3),
    ],
)
def test_every_field_that_it_reads_changes_the_output(family, field, value):
    assert not np.array_equal(outputs(family), outputs(family, **{field: value}))


@pytest.mark.slow
def test_recomputed_convolutions_are_the_same():
    np.testing.assert_allclose(outputs("convolutional", remat="full"), outputs("convolutional"), atol=2e-5)


def test_stacked_convolutions_are_the_same():
    """The same layers, as a list and as one program over stacked params."""
    listed, stacked = (ModelDef(family_config(family="convolutional", scan_layers=s).model, V) for s in (False, True))
    params = drawn(listed)
    together = {
        name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name][i] for i in range(2)))
        for name in ("encoder", "decoder")
    }
    one, other = (
        jax.jit(lambda params, model=model: model.bind(params)(SOURCE, TARGET))(held)
        for model, held in ((listed, params), (stacked, {**params, **together}))
    )
    np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_and_its_logits_are_float32(family):
    wide, narrow = (jax.jit(module(family, dtype=dtype).__call__)(SOURCE, TARGET) for dtype in ("float32", "bfloat16"))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.2)


@pytest.mark.parametrize(
    ("family", "section", "fields", "message"),
    [
        ("recurrent", "model", {"norm": "pre"}, "norm = pre: read only with family = attention, got family = recurr"),
        ("recurrent", "model", {"num_heads": 4}, "num_heads = 4: read only with family = attention"),
        ("recurrent", "model", {"positions": "learned"}, "read only with family = attention or convolutional"),
        ("recurrent", "model", {"remat": "full"}, "leave remat out .default: none., or change the family"),
        ("recurrent", "model", {"kernel_width": 5}, "read only with family = convolutional"),
        ("recurrent", "model", {"emb_dim": 15}, "expected an even width, split by two directions; got 15"),
        ("convolutional", "model", {"qkv_dim": 8}, "qkv_dim = 8: read only with family = attention"),
        ("convolutional", "model", {"kernel_width": 4}, "expected an odd number, got 4"),
        ("attention", "model", {"attention_score": "additive"}, "read only with family = recurrent or convolutional"),
        ("convolutional", "mesh", {"tensor": 2}, r"mesh\.tensor = 2: read only with model\.family = attention"),
        ("recurrent", "mesh", {"sequence": 2}, r"mesh\.sequence = 2: read only with model\.family = attention"),
    ],
)
def test_what_a_family_does_not_read_is_refused(family, section, fields, message):
    config = default_config()
    config.model.family = family
    config[section].update(fields)
    with pytest.raises(UserError, match=message):
        validate(config)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mesh_changes_nothing_but_rounding_and_shares_the_work(family):
    """One update on rows and stored params that eight devices share is that of one device."""
    rng = np.random.default_rng(0)
    rows = [JaggedArray.from_sequences(sentences(rng, 8, 7)).to_padded(np.arange(8), 8) for _ in range(2)]
    result = []
    for mesh in ({"data": 1}, {"data": 2, "fsdp": 4}):
        config = dataclasses.replace(family_config(family=family), mesh=small_config(mesh=mesh).mesh)
        grid, model = make_mesh(config.mesh), ModelDef(config.model, V)
        state = train_step.init_state(model, config, grid)
        batch = sharding.shard_batch(grid, Batch(*rows))
        update = train_step.make_train_step(model, config, grid).lower(state, batch).compile()
        each = hlo_cost.count_flops(hlo.Program(update.as_text()))
        assert each == flops.batch_flops(config.model, V, batch) / grid.size
        state, metrics = update(state, batch)
        result.append((float(metrics.loss.nll), jax.device_get(state.params)))
    assert result[0][0] == pytest.approx(result[1][0], rel=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-4), result[0][1], result[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_to_copy_and_beam_search_finds_the_copy(family):
    """Five tokens in any order: what only a decoder that looks at the source can say."""
    config = family_config(family=family, emb_dim=32, dropout_rate=0.0)
    model = ModelDef(config.model, 16)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **FAST))
    grid = make_mesh(config.mesh)
    update, state = train_step.make_train_step(model, config, grid), train_step.init_state(model, config, grid)
    rng = np.random.default_rng(0)

    def batch(rows):
        return np.pad(rng.integers(4, 16, (rows, 5), np.int32), ((0, 0), (0, 1)), constant_values=EOS)

    for _ in range(150):
        ids = batch(64)
        state, _ = update(state, Batch(ids, ids))
    source, params = batch(64), state.params
    decode = dataclasses.replace(config.decode, beam_size=3, max_extra_length=2, coverage_penalty=0.1)
    run = jax.jit(functools.partial(decoding.decode, (model,), decode, 1))
    result = np.asarray(run((params,), DecodeInputs(jnp.asarray(source))).tokens_BNT[:, 0, :6])
    assert (result == source).all(1).mean() > 0.9
    assert PAD not in result[:, :5]
