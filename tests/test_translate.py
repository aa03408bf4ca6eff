"""Sentences in, sentences out: order, neighbours, blank and long lines, and what decoding fields do."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import small_config
from transformer import batching, search, sharding, tokenizer, translate
from transformer.batching import Ragged
from transformer.errors import UserError
from transformer.model import reorder
from transformer.step import Model
from transformer.tokenizer import PAD
from transformer.translate import Translator

WORDS = ["red", "green", "blue", "old", "new", "house", "tree", "cat", "dog", "sees", "has"]
LINES = [" ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 9)) for i in range(40)]


@pytest.fixture(scope="module")
def parts():
    config = small_config(model={"num_layers": 1})
    vocabulary = tokenizer.train(LINES, 300, "bpe")
    model = Model(config.model, vocabulary.vocab_size)
    return config, vocabulary, model, model.init(3)


def make(parts, devices=1, **fields):
    config, vocabulary, model, params = parts
    mesh = sharding.make_mesh(dataclasses.replace(config.mesh, data=devices))
    decode = dataclasses.replace(config.decode, **fields)
    translator = Translator(model, vocabulary, decode, mesh)
    return translator, jax.device_put(params, sharding.replicated(mesh))


@pytest.fixture(scope="module")
def usual(parts):
    translator, params = make(parts)
    return translator.translate(params, LINES)


def test_translations_are_varied_enough_to_tell_lines_apart(usual):
    assert len(set(usual)) > 10


@pytest.mark.parametrize("size", [1, 7, 40])
def test_grouping_changes_nothing(parts, usual, size):
    translator, params = make(parts)
    got = []
    for group in translate.chunks(LINES, size):
        got += translator.translate(params, group)
    assert got == usual


def test_order_changes_nothing_but_the_order(parts, usual):
    translator, params = make(parts)
    order = np.random.default_rng(0).permutation(len(LINES))
    got = translator.translate(params, [LINES[i] for i in order])
    assert got == [usual[i] for i in order]


def test_devices_change_nothing(parts, usual):
    translator, params = make(parts, devices=8)
    assert translator.translate(params, LINES) == usual


def test_a_mesh_that_splits_params_changes_nothing(parts, usual):
    config, vocabulary, model, params = parts
    mesh = sharding.make_mesh(dataclasses.replace(config.mesh, fsdp=2, tensor=2, sequence=2))
    split = jax.device_put(params, sharding.param_shardings(mesh, model.abstract_params))
    assert Translator(model, vocabulary, config.decode, mesh).translate(split, LINES) == usual


def test_rows_are_filled_up_to_the_devices(parts, usual):
    translator, params = make(parts, devices=8, batch_rows=3)
    assert translator.translate(params, LINES[:3]) == usual[:3]


def test_each_shape_is_compiled_once(parts):
    translator, params = make(parts)
    widths = {batching.ladder(len(ids)) for ids in parts[1].encode(LINES)}
    for lines in (LINES, LINES[::-1], LINES[:9]):
        translator.translate(params, lines)
    assert translator._search._cache_size() == len(widths) > 1


@pytest.mark.parametrize("lines", [[], [""], ["", "  ", "\t"], ["", LINES[3], " ", LINES[4]]])
def test_blank_lines_have_blank_translations_in_their_place(parts, usual, lines):
    translator, params = make(parts)
    got = translator.translate(params, lines)
    assert got == [usual[LINES.index(line)] if line in LINES else "" for line in lines]


@pytest.mark.parametrize(
    "odd", ["\r", "a\rb", "\u2028", "a\u2028b", "\u0085", "\ufeffa", "\ufffd", "x" * 5000, "漢" * 40, "<s>"]
)
def test_every_line_gives_exactly_one_line(parts, odd):
    translator, params = make(parts)
    out = io.BytesIO()
    translate.translate_stream(lambda group: translator.translate(params, group), [LINES[0], odd, LINES[1]], out, 2)
    assert out.getvalue().count(b"\n") == 3
    assert out.getvalue().endswith(b"\n")


def test_a_long_source_is_cut_and_counted(parts, capsys):
    translator, params = make(parts, max_source_tokens=8)
    head = " ".join(WORDS)
    got = translator.translate(params, [f"{head} has a cat", LINES[0], f"{head} sees"])
    assert got[0] == got[2] != got[1]
    assert translator.truncated == 2
    translator.say_truncated()
    assert "2 sources are longer than decode.max_source_tokens = 8" in capsys.readouterr().err


def test_extra_length_bounds_the_output(parts):
    """An untrained model rarely ends by itself, so the limit shows: source tokens + extra."""
    config, vocabulary, model, params = parts
    sources = Ragged.from_sequences(vocabulary.encode(LINES[:8]))
    for extra in (1, 10):
        decode = dataclasses.replace(config.decode, max_extra_length=extra)
        search = jax.jit(functools.partial(translate.best_translations, model, decode))
        tokens = np.asarray(search(params, sources.rectangle(np.arange(8), 16)))
        assert tokens.shape == (8, 16 + extra)
        lengths = (tokens != PAD).sum(1)
        assert (lengths <= sources.lengths + extra).all()
        assert (lengths == sources.lengths + extra).any()


def test_a_wider_beam_finds_other_translations(parts, usual):
    greedy, params = make(parts, beam_size=1)
    assert greedy.translate(params, LINES) != usual


@pytest.mark.parametrize("beam_size", [1, 4])
def test_scores_are_what_the_model_gives_to_the_whole_hypothesis(parts, beam_size):
    """Beams cross and cross again; decoding at once must agree with what each then remembers."""
    _, vocabulary, model, params = parts
    source = Ragged.from_sequences(vocabulary.encode(LINES[:8])).rectangle(np.arange(8), 16)

    @jax.jit
    def both(params):
        module = model.bind(params)
        memory, cache = module.start(source, beam_size, 12)
        found = search.beam_search(
            functools.partial(module.step, memory),
            cache,
            batch_size=8,
            beam_size=beam_size,
            max_length=12,
            max_lengths_B=np.full(8, 12, np.int32),
            length_penalty=0.6,
            bos_id=tokenizer.BOS,
            eos_id=tokenizer.EOS,
            pad_id=PAD,
            reorder=reorder,
        )
        targets = found.tokens_BNT.reshape(8 * beam_size, 12)
        logits = module(np.repeat(source, beam_size, 0), targets)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return found, jnp.where(targets != PAD, picked, 0.0).sum(-1).reshape(8, beam_size)

    found, log_probs = both(params)
    want = log_probs / ((5 + found.lengths_BN.astype(jnp.float32)) / 6) ** 0.6
    np.testing.assert_allclose(found.scores_BN, want, rtol=1e-5)
    assert len(np.unique(np.asarray(found.tokens_BNT[0]), axis=0)) == beam_size


def test_the_length_penalty_is_the_config_s(parts):
    """A model that likes to end ends early, unless long hypotheses are made up to."""
    params = jax.tree.map(lambda leaf: leaf, parts[3])
    end_V = params["embeddings"]["shared"]["table"][tokenizer.EOS]
    params["decoder"][0]["mlp_residual"]["norm"]["bias"] = 2 * end_V / jnp.linalg.norm(end_V)
    lengths = [
        sum(map(len, make(parts, beam_size=4, length_penalty=alpha)[0].translate(params, LINES)))
        for alpha in (0.0, 3.0)
    ]
    assert 3 * lengths[0] < lengths[1]


def test_lines_before_one_that_is_no_text_are_translated_still():
    def lines():
        yield "a"
        raise UserError("line 2: not UTF-8")

    out = io.BytesIO()
    with pytest.raises(UserError, match="line 2"):
        translate.translate_stream(lambda group: group, lines(), out, 10)
    assert out.getvalue() == b"a\n"


def test_the_stream_is_flushed_group_by_group():
    written = []

    class Out(io.BytesIO):
        def flush(self):
            written.append(self.getvalue())

    translate.translate_stream(lambda group: [line.upper() for line in group], iter(["a", "b", "c"]), Out(), 2)
    assert written == [b"A\nB\n", b"A\nB\nC\n"]
