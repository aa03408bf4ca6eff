"""What the device does with a batch: limits, scores of one model and of several, attention to the source."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import slow, small_config
from tests.decoding.test_translator import LINES
from tests.models.test_families import family_config
from transformer.config import DecodeConfig
from transformer.data import tokenizer
from transformer.data.batching import JaggedArray
from transformer.data.tokenizer import PAD
from transformer.decoding import base, beam_search
from transformer.decoding import decode as decoding
from transformer.decoding.decode import DecodeInputs
from transformer.distributed.mesh import MESH_AXES
from transformer.models.registry import ModelDef
from transformer.models.transformer import KVCache


@pytest.fixture(scope="module")
def parts():
    config = small_config(model={"num_layers": 1})
    vocabulary = tokenizer.train(LINES, 300, "bpe")
    model = ModelDef(config.model, vocabulary.vocab_size)
    return config, vocabulary, model, model.init(3)


@pytest.mark.slow
def test_extra_length_bounds_the_output(parts):
    """An untrained model rarely ends by itself, so the limit shows: source tokens + extra."""
    config, vocabulary, model, params = parts
    sources = JaggedArray.from_sequences(vocabulary.encode(LINES[:8]))
    for extra in (1, 10):
        decode = dataclasses.replace(config.decode, max_extra_length=extra)
        run = jax.jit(functools.partial(decoding.decode, (model,), decode, 1))
        tokens = np.asarray(run((params,), DecodeInputs(sources.to_padded(np.arange(8), 16))).tokens_BNT[:, 0])
        assert tokens.shape == (8, 16 + extra)
        lengths = (tokens != PAD).sum(1)
        assert (lengths <= sources.lengths + extra).all()
        assert (lengths == sources.lengths + extra).any()


@pytest.mark.parametrize("beam_size", [slow(1), 4])
def test_scores_are_what_the_model_gives_to_the_whole_hypothesis(parts, beam_size):
    """Beams cross and cross again; decoding at once must agree with what each then remembers."""
    _, vocabulary, model, params = parts
    source = JaggedArray.from_sequences(vocabulary.encode(LINES[:8])).to_padded(np.arange(8), 16)

    @jax.jit
    def both(params):
        module = model.bind(params)
        encoded, cache = module.init_decode(source, beam_size, 12)
        result = beam_search.beam_search(
            functools.partial(module.decode_step, encoded),
            cache,
            np.full(8, 12, np.int32),
            beam_search.SearchConfig(beam_size, 12, decoding.SPECIAL_IDS, length_penalty=0.6),
            reorder=KVCache.reorder,
        )
        targets = result.tokens_BNT.reshape(8 * beam_size, 12)
        logits = module(np.repeat(source, beam_size, 0), targets)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return result, jnp.where(targets != PAD, picked, 0.0).sum(-1).reshape(8, beam_size)

    result, log_probs = both(params)
    want = log_probs / ((5 + result.lengths_BN.astype(jnp.float32)) / 6) ** 0.6
    np.testing.assert_allclose(result.scores_BN, want, rtol=1e-5)
    assert len(np.unique(np.asarray(result.tokens_BNT[0]), axis=0)) == beam_size


@pytest.mark.slow
def test_the_attention_of_a_step_is_that_of_decoding_at_once(parts):
    _, vocabulary, _, _ = parts
    model = ModelDef(small_config(model={"num_layers": 2}).model, vocabulary.vocab_size)
    params = model.init(1)
    source = jnp.asarray(JaggedArray.from_sequences(vocabulary.encode(LINES[:4])).to_padded(np.arange(4), 16))
    inputs = jnp.asarray(np.random.default_rng(0).integers(4, 300, (4, 6)), jnp.int32).at[:, 0].set(tokenizer.BOS)
    module = model.bind(params)
    encoded, cache = module.init_decode(source, 1, 6)
    steps = []
    for t in range(6):
        _, cache, attended = module.decode_step(encoded, cache, inputs[:, t : t + 1], jnp.int32(t), True)
        steps.append(attended[:, 0])
    got = np.stack(steps, axis=1)
    target = jnp.pad(inputs[:, 1:], ((0, 0), (0, 1)), constant_values=tokenizer.EOS)
    at_once = module.cross_attention(source, target)[:, -1].mean(1)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)
    assert (got[np.broadcast_to((source == PAD)[:, None, :], got.shape)] == 0).all()
    np.testing.assert_allclose(got, at_once, rtol=1e-4, atol=1e-6)


def test_samples_that_attend_within_their_beams_are_those_of_a_mask(parts):
    config, vocabulary, model, params = parts
    source = JaggedArray.from_sequences(vocabulary.encode(LINES[:2])).to_padded(np.arange(2), 16)
    keys = np.arange(4, dtype=np.uint32).reshape(2, 2)
    decode = dataclasses.replace(config.decode, method="sample", max_extra_length=10)
    few, many = decoding.MIN_SEPARATE_SAMPLES - 1, decoding.MIN_SEPARATE_SAMPLES
    runs = [jax.jit(functools.partial(decoding.decode, (model,), decode, count)) for count in (few, many)]
    masked, within = (jax.tree.map(np.asarray, run((params,), DecodeInputs(source, keys))) for run in runs)
    np.testing.assert_array_equal(within.tokens_BNT[:, :few], masked.tokens_BNT)
    np.testing.assert_allclose(within.scores_BN[:, :few], masked.scores_BN, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["beam", "sample"])
def test_a_cache_that_grows_holds_what_one_of_full_length_holds(parts, method, monkeypatch):
    config, vocabulary, model, params = parts
    source = JaggedArray.from_sequences(vocabulary.encode(LINES[:8])).to_padded(np.arange(8), 16)
    decode = dataclasses.replace(config.decode, method=method, beam_size=3, max_extra_length=30)
    keys = np.arange(16, dtype=np.uint32).reshape(8, 2) if method == "sample" else None
    result = []
    for first_room in (2, 64):
        monkeypatch.setattr(base, "INITIAL_CACHE_LENGTH", first_room)
        assert base.cache_lengths(46) == ([2, 4, 8, 16, 32, 46] if first_room == 2 else [46])
        run = jax.jit(functools.partial(decoding.decode, (model,), decode, 3))
        result.append(jax.tree.map(np.asarray, run((params,), DecodeInputs(source, keys))))
    grown, whole = result
    np.testing.assert_array_equal(grown.tokens_BNT, whole.tokens_BNT)
    np.testing.assert_allclose(grown.scores_BN, whole.scores_BN, rtol=1e-5)
    assert grown.lengths_BN.max() == 46


@pytest.mark.slow
def test_an_ensemble_scores_by_the_mean_probability(parts):
    config, vocabulary, model, params = parts
    other = ModelDef(small_config(model={"num_layers": 2, "emb_dim": 24}).model, vocabulary.vocab_size)
    models, both = (model, other), (params, other.init(4))
    source = JaggedArray.from_sequences(vocabulary.encode(LINES[:8])).to_padded(np.arange(8), 16)
    decode = dataclasses.replace(config.decode, beam_size=3)

    @jax.jit
    def run(both):
        result = decoding.decode(models, decode, 3, both, DecodeInputs(source))
        targets = result.tokens_BNT.reshape(24, -1)
        logits = [one.bind(own)(np.repeat(source, 3, 0), targets) for one, own in zip(models, both, strict=True)]
        mean = jnp.log(sum(jax.nn.softmax(one) for one in logits) / 2)
        picked = jnp.take_along_axis(mean, targets[..., None], -1)[..., 0]
        return result, jnp.where(targets != PAD, picked, 0.0).sum(-1).reshape(8, 3)

    result, log_probs = run(both)
    want = log_probs / ((5 + result.lengths_BN.astype(jnp.float32)) / 6) ** 0.6
    np.testing.assert_allclose(result.scores_BN, want, rtol=1e-5)


def test_the_mean_is_of_probabilities_and_not_of_logarithms():
    sure, unsure = jnp.log(jnp.array([0.98, 0.02])), jnp.log(jnp.array([0.5, 0.5]))
    got = jnp.exp(decoding.ensemble_log_probs([sure + 3.0, unsure]))
    np.testing.assert_allclose(got, [0.74, 0.26], rtol=1e-5)
    assert decoding.ensemble_log_probs([sure]) is sure


@pytest.mark.slow
def test_default_fields_add_nothing_to_the_program(parts):
    """The four selections of a plain beam search, no more of them for n-best, and no sort but of the blocks found."""
    config, vocabulary, model, params = parts
    source = JaggedArray.from_sequences(vocabulary.encode(LINES[:8])).to_padded(np.arange(8), 16)
    for count in (1, 2):
        run = jax.jit(functools.partial(decoding.decode, (model,), config.decode, count))
        program = run.lower((params,), DecodeInputs(source)).compile().as_text()
        assert program.count('custom_call_target="TopK"') == 4
        assert set(re.findall(r"(\S+)\{1,0\} sort\(", program)) == {"s32[8,3]"}
        assert program.count(" sort(") == 1


def converted_in_loops(jaxpr, in_loop=False):
    """Shapes of the float32 arrays that loops convert to bfloat16."""
    for equation in jaxpr.eqns:
        if in_loop and equation.primitive.name == "convert_element_type":
            given, made = equation.invars[0].aval, equation.outvars[0].aval
            if (given.dtype, made.dtype) == (jnp.float32, jnp.bfloat16):
                yield given.shape
        is_loop = in_loop or equation.primitive.name == "while"
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns"):
                yield from converted_in_loops(inner, is_loop)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["beam", "sample", "mbr"])
@pytest.mark.parametrize(
    "config",
    [
        small_config(model={"positions": "learned", "norm": "pre", "dtype": "bfloat16"}),
        small_config(model={"scan_layers": True, "share_embeddings": False, "dtype": "bfloat16"}),
        family_config(family="recurrent", attention_score="additive", dtype="bfloat16"),
        family_config(family="convolutional", positions="learned", dtype="bfloat16"),
    ],
    ids=["attention", "scanned", "recurrent", "convolutional"],
)
def test_a_search_in_bfloat16_converts_its_params_before_the_first_step(config, method):
    model = ModelDef(config.model, 300)
    params = nnx.to_pure_dict(model.abstract_params)
    decode = dataclasses.replace(config.decode, method=method)
    keys_B2 = None if method == "beam" else jax.ShapeDtypeStruct((5, 2), jnp.uint32)
    request = DecodeInputs(jax.ShapeDtypeStruct((5, 7), jnp.int32), keys_B2)
    run = jax.jit(functools.partial(decoding.decode, (model,), decode, 2))
    converted = set(converted_in_loops(run.trace((params,), request).jaxpr))
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if len(leaf.shape) > 1}
    assert converted  # of activations
    assert not converted & (shapes | {shape[1:] for shape in shapes if len(shape) > 2})


def test_params_of_a_float32_model_are_used_as_they_are(parts):
    _, _, model, params = parts
    assert model.in_compute_dtype(params) is params


@pytest.mark.parametrize(("platform", "rows"), [("cpu", 16), ("gpu", 256), ("tpu", 256)])
def test_the_platform_says_how_many_rows_unless_the_config_does(platform, rows):
    device = types.SimpleNamespace(platform=platform)

    def mesh(devices):
        shape = dict.fromkeys(MESH_AXES, 1) | {"data": devices}
        return types.SimpleNamespace(devices=np.array([device] * devices), shape=shape, size=devices)

    assert decoding.batch_rows(DecodeConfig(), mesh(1)) == rows
    assert decoding.batch_rows(DecodeConfig(), mesh(3)) == (18 if platform == "cpu" else 3 * rows)
    assert decoding.batch_rows(DecodeConfig(batch_rows=20), mesh(1)) == 20
