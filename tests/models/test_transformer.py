"""The Transformer: sizes of the paper, causality and padding by gradient, cached decoding, fields that must matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import small_config
from transformer.config import ModelConfig, default_config
from transformer.config.validation import validate
from transformer.data.batching import PAD_EXAMPLE, JaggedArray
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.models import base, layers
from transformer.models.base import shift_right
from transformer.models.registry import ModelDef
from transformer.models.transformer import Transformer

V = 50
SOURCE = jnp.asarray([[5, 6, 7, 8, EOS], [9, 10, EOS, PAD, PAD]], jnp.int32)
TARGET = jnp.asarray([[11, 12, 13, 14, 15, EOS], [16, 17, EOS, PAD, PAD, PAD]], jnp.int32)


def make(**fields) -> Transformer:
    config = dataclasses.replace(small_config().model, **fields)
    return Transformer(config, V, nnx.Rngs(params=0))


@functools.cache
def paper_params(**fields) -> float:
    return ModelDef(ModelConfig(**fields), 40_900).num_params() / 1e6


def test_base_has_the_paper_s_65_million_params():
    assert abs(paper_params() / 65 - 1) < 0.03


def test_big_has_the_paper_s_213_million_params():
    big = {"emb_dim": 1024, "qkv_dim": 1024, "value_dim": 1024, "mlp_dim": 4096, "num_heads": 16}
    assert abs(paper_params(**big) / 213 - 1) < 0.03


def test_narrow_keys_have_the_paper_s_58_million_params():
    """Table 3, row B, key width 16: the values keep theirs."""
    config = default_config()
    config.model.qkv_dim = 8 * 16
    assert abs(ModelDef(validate(config).model, 40_900).num_params() / 58e6 - 1) < 0.01


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_causality_by_gradient(norm):
    """d logits[t] / d embedding of input t' is exactly zero for t' > t, and not zero for t' ≤ t.

    Every input token occurs once, so that the gradient of its row of the table is that of its place.
    """
    inputs = shift_right(TARGET[:1])
    graphdef, params = nnx.split(make(norm=norm, share_embeddings=False))

    @jax.jit
    def reach(t):
        def objective(params):
            model = nnx.merge(graphdef, params)
            return jnp.square(model(SOURCE[:1], TARGET[:1])[0, t]).sum()

        return jnp.abs(jax.grad(objective)(params)["embeddings"]["target"]["table"][...][inputs[0]]).sum(-1)

    for t in range(TARGET.shape[1]):
        assert (reach(t)[t + 1 :] == 0).all()
        assert (reach(t)[: t + 1] > 0).all()


def test_dropout_is_on_the_embedded_input_and_differs_everywhere(monkeypatch):
    """Paper, section 5.4: on the sums of embeddings and positions, and on the output of each sublayer."""
    keys, drop = [], layers.dropout

    def noted(x, rate, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return drop(x, rate, key)

    for module in (layers, base):
        monkeypatch.setattr(module, "dropout", noted)
    model = make(dropout_rate=0.5, mlp_dropout_rate=0.5)
    ids = jnp.full((4, 64), 7, jnp.int32)
    plain, dropped = (make(dropout_rate=rate)._embed("source", ids, None, jax.random.key(0)) for rate in (0.0, 0.5))
    kept = np.asarray(dropped != 0)
    assert abs(kept.mean() - 0.5) < 0.05
    np.testing.assert_allclose(np.asarray(dropped)[kept], 2 * np.asarray(plain)[kept], rtol=1e-6)
    keys.clear()
    model(SOURCE, TARGET, jax.random.key(1))
    # Of two layers each: encoder 2 residuals and a feed-forward block, decoder 3 and one; and both inputs.
    assert len(set(keys)) == len(keys) == 2 * 3 + 2 * 4 + 2


def test_source_padding_cannot_be_seen():
    """More padding changes nothing but rounding; what stands in its states, not a bit."""
    model = make()
    wider = jnp.pad(SOURCE, ((0, 0), (0, 3)))
    np.testing.assert_allclose(model(wider, TARGET), model(SOURCE, TARGET), atol=1e-5)
    encoded = model.encode(SOURCE)
    rubbish = jnp.where((SOURCE == PAD)[..., None], 1e4, encoded)
    np.testing.assert_array_equal(model.decode(rubbish, SOURCE, TARGET), model.decode(encoded, SOURCE, TARGET))


def test_target_padding_cannot_be_seen():
    model = make()
    wider = jnp.pad(TARGET, ((0, 0), (0, 3)))
    np.testing.assert_allclose(model(SOURCE, wider)[:, :6], model(SOURCE, TARGET), atol=1e-5)


@pytest.mark.slow
def test_rows_do_not_see_each_other():
    model = make()
    alone = model(SOURCE[1:], TARGET[1:])
    np.testing.assert_allclose(model(SOURCE, TARGET)[1:], alone, atol=1e-5)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("value_dim", [16, 8])
def test_cached_decoding_equals_decoding_at_once(norm, positions, value_dim):
    model = make(norm=norm, positions=positions, max_positions=16, value_dim=value_dim)
    beams = 2
    inputs = shift_right(TARGET)
    want = model(SOURCE, TARGET)
    source, cache = model.init_decode(SOURCE, beams, TARGET.shape[1])
    # Beam 0 follows the target; beam 1 goes elsewhere and must not disturb it.
    other = jnp.where(inputs == BOS, BOS, 20)
    for t in range(TARGET.shape[1]):
        both = jnp.stack([inputs[:, t], other[:, t]], 1)
        logits, cache, _ = model.decode_step(source, cache, both, jnp.int32(t))
        np.testing.assert_allclose(logits[:, 0], want[:, t], atol=2e-5)


def test_shared_embeddings_are_one_matrix_and_separate_ones_three():
    shared, separate = (
        ModelDef(dataclasses.replace(small_config().model, share_embeddings=share), V).num_params()
        for share in (True, False)
    )
    assert separate - shared == 2 * V * 16


def outputs(**fields):
    model = make(**fields)
    return np.asarray(model(SOURCE, TARGET, jax.random.key(0)), np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 1),
        ("num_heads", 4),
        ("qkv_dim", 8),
        ("value_dim", 8),
        ("mlp_dim", 64),
        ("norm", "pre"),
        ("positions", "learned"),
        ("share_embeddings", False),
        ("dropout_rate", 0.3),
        ("attention_dropout_rate", 0.3),
        ("mlp_dropout_rate", 0.3),
        ("attention", "blockwise"),
        ("qkv_init_gain", 0.5),
        ("dtype", "bfloat16"),
    ],
)
def test_every_field_changes_the_output(field, value):
    assert not np.array_equal(outputs(), outputs(**{field: value}))


def test_the_gain_scales_queries_keys_and_values_alone():
    plain, half = make().decoder[0].cross, make(qkv_init_gain=0.5).decoder[0].cross
    for name, gain in (("query", 0.5), ("key", 0.5), ("value", 0.5), ("out", 1.0)):
        np.testing.assert_allclose(getattr(half, name)[...], gain * getattr(plain, name)[...], rtol=1e-6)


def test_learned_positions_have_as_many_rows_as_asked():
    model = make(positions="learned", max_positions=7)
    assert model.source_positions[...].shape == model.target_positions[...].shape == (7, 16)


@pytest.mark.slow
def test_padding_may_be_wider_than_the_table_of_positions():
    """Evaluation pads to a power of two; the sentence itself always fits."""
    model = make(positions="learned", max_positions=6)
    wide_source, wide_target = (jnp.pad(side, ((0, 0), (0, 10))) for side in (SOURCE, TARGET))
    np.testing.assert_allclose(model(wide_source, wide_target)[:, :6], model(SOURCE, TARGET), atol=1e-5)


def test_without_a_key_nothing_is_dropped():
    model = make(dropout_rate=0.5, attention_dropout_rate=0.5, mlp_dropout_rate=0.5)
    np.testing.assert_array_equal(model(SOURCE, TARGET), make(dropout_rate=0.0)(SOURCE, TARGET))


@pytest.mark.slow
def test_bfloat16_is_close_to_float32_and_its_logits_are_float32():
    wide, narrow = make()(SOURCE, TARGET), make(dtype="bfloat16")(SOURCE, TARGET)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.15)


def sentences(rng, count, most):
    """Random sentences without special ids, each with EOS at its end."""
    return [np.append(rng.integers(4, V, rng.integers(1, most)), EOS) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["plain", "blockwise"])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_sentences_in_a_packed_row_do_not_see_each_other(positions, path):
    """Logits of each sentence are those it gets alone."""
    rng = np.random.default_rng(0)
    model = make(positions=positions, attention=path)
    sources, targets = sentences(rng, 4, 7), sentences(rng, 4, 7)
    rows = np.array([[0, 1, 2], [3, PAD_EXAMPLE, PAD_EXAMPLE]])
    source, target = (JaggedArray.from_sequences(side).to_padded(rows, 24) for side in (sources, targets))
    packed = np.asarray(model(jnp.asarray(source), jnp.asarray(target), packed=True))
    place = [0, len(targets[0]), len(targets[0]) + len(targets[1]), 0]
    for i, row in enumerate([0, 0, 0, 1]):
        alone = model(jnp.asarray(sources[i][None], jnp.int32), jnp.asarray(targets[i][None], jnp.int32))
        np.testing.assert_allclose(packed[row, place[i] : place[i] + len(targets[i])], alone[0], atol=2e-5)


def test_long_sentences_are_attended_by_blocks():
    """`auto` must not make the quadratic array where it is large."""
    source = jnp.full((1, 600), 5, jnp.int32)
    target = jnp.full((1, 16), 5, jnp.int32)
    text = {path: str(jax.make_jaxpr(make(attention=path))(source, target)) for path in ("auto", "plain", "blockwise")}
    assert "600,600" in text["plain"]
    assert "600,600" not in text["auto"]
    assert "16,600" in text["auto"]  # few queries: the plain path
    assert "16,600" not in text["blockwise"]


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_weights_of_the_source_are_those_that_the_decoder_uses(norm):
    """Put in place of the attention they come from, they give the same logits."""
    model = make(norm=norm)
    weights_BLHTS = model.cross_attention(SOURCE, TARGET)
    assert weights_BLHTS.shape == (2, 2, 2, TARGET.shape[1], SOURCE.shape[1])
    np.testing.assert_allclose(weights_BLHTS.sum(-1), 1, rtol=1e-5)
    assert (weights_BLHTS[1, ..., 3:] == 0).all()  # padding
    logits = model(SOURCE, TARGET)
    for number, layer in enumerate(model.decoder):
        cross, given_BHTS = layer.cross, weights_BLHTS[:, number]

        def given(y, encoded, mask, key=None, weights=None, cross=cross, given_BHTS=given_BHTS):
            values_BSHK = cross.keys_values(encoded)[1]
            return cross.project(jnp.einsum("bhts,bshk->bthk", given_BHTS, values_BSHK))

        object.__setattr__(layer, "cross", given)
    np.testing.assert_allclose(model(SOURCE, TARGET), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_weights_of_self_attention_are_those_that_the_layers_use(norm):
    model = make(norm=norm)
    encoder_BLHSS, decoder_BLHTT = model.self_attention(SOURCE, TARGET)
    assert encoder_BLHSS.shape == (2, 2, 2, SOURCE.shape[1], SOURCE.shape[1])
    assert decoder_BLHTT.shape == (2, 2, 2, TARGET.shape[1], TARGET.shape[1])
    assert (encoder_BLHSS[1, ..., 3:] == 0).all()  # padding
    assert (np.triu(np.asarray(decoder_BLHTT), 1) == 0).all()  # causal
    logits = model(SOURCE, TARGET)
    for stack, weights in ((model.encoder, encoder_BLHSS), (model.decoder, decoder_BLHTT)):
        for number, layer in enumerate(stack):
            attention, given_BHTT = layer.attention, weights[:, number]

            def given(y, same, mask, key=None, rotation=None, weights=None, attention=attention, given_BHTT=given_BHTT):
                values_BTHK = attention.keys_values(y)[1]
                return attention.project(jnp.einsum("bhts,bshk->bthk", given_BHTT, values_BTHK))

            object.__setattr__(layer, "attention", given)
    is_token = np.asarray(TARGET != PAD)
    np.testing.assert_allclose(model(SOURCE, TARGET)[is_token], logits[is_token], rtol=1e-4, atol=1e-5)
