"""Sentences in, sentences out: order, neighbours, blank and long lines, and what decoding fields and constraints do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import slow, small_config
from tests.helpers.compilation import CompileCounter
from transformer.data import batching, tokenizer
from transformer.decoding import translator as translators
from transformer.decoding.base import Hypotheses
from transformer.decoding.mbr import expected_chrf
from transformer.decoding.translator import Translator
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models.registry import ModelDef
from transformer.runtime.errors import UserError

WORDS = ["red", "green", "blue", "old", "new", "house", "tree", "cat", "dog", "sees", "has"]
LINES = [" ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 9)) for i in range(40)]
SHORT = LINES[:4]  # of one width: one program


@pytest.fixture(scope="module")
def parts():
    config = small_config(model={"num_layers": 1})
    vocabulary = tokenizer.train(LINES, 300, "bpe")
    model = ModelDef(config.model, vocabulary.vocab_size)
    return config, vocabulary, model, model.init(3)


def make(parts, devices=1, **fields):
    config, vocabulary, model, params = parts
    mesh = make_mesh(dataclasses.replace(config.mesh, data=devices))
    decode = dataclasses.replace(config.decode, **fields)
    translator = Translator([model], vocabulary, decode, mesh)
    return translator, [jax.device_put(params, sharding.replicated(mesh))]


@pytest.fixture(scope="module")
def usual(parts):
    translator, params = make(parts)
    return translator.translate(params, LINES)


def eager(params):
    """The params of a model that likes to end."""
    params = jax.tree.map(lambda leaf: leaf, params)
    end_V = params["embeddings"]["shared"]["table"][tokenizer.EOS]
    params["decoder"][0]["mlp_residual"]["norm"]["bias"] = 2 * end_V / jnp.linalg.norm(end_V)
    return params


def test_translations_are_varied_enough_to_tell_lines_apart(usual):
    assert len(set(usual)) > 10


@pytest.mark.parametrize("size", [1, 7, 40])
def test_grouping_changes_nothing(parts, usual, size):
    translator, params = make(parts)
    got = []
    for start in range(0, len(LINES), size):
        got += translator.translate(params, LINES[start : start + size])
    assert got == usual


def test_order_changes_nothing_but_the_order(parts, usual):
    translator, params = make(parts)
    order = np.random.default_rng(0).permutation(len(LINES))
    got = translator.translate(params, [LINES[i] for i in order])
    assert got == [usual[i] for i in order]


@pytest.mark.slow
def test_devices_change_nothing(parts, usual):
    translator, params = make(parts, devices=8)
    spread = translator.translate_nbest(params, LINES)
    assert [result[0].text for result in spread] == usual
    alone, params = make(parts)
    for (one,), (other,) in zip(spread, alone.translate_nbest(params, LINES), strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-5)


@pytest.mark.slow
def test_a_mesh_that_splits_params_changes_nothing(parts, usual):
    config, vocabulary, model, params = parts
    mesh = make_mesh(dataclasses.replace(config.mesh, fsdp=2, tensor=2, sequence=2))
    split = jax.device_put(params, sharding.param_shardings(mesh, model.abstract_params))
    assert Translator([model], vocabulary, config.decode, mesh).translate([split], LINES) == usual


def test_rows_are_filled_up_to_the_devices(parts, usual):
    translator, params = make(parts, devices=8, batch_rows=3)
    assert translator.translate(params, LINES[:3]) == usual[:3]


def test_wide_batches_have_fewer_rows(parts, usual, monkeypatch):
    """Their caches grow with the width: a device that holds 256 rows of 128 tokens may not hold 256 of 512."""
    monkeypatch.setattr(translators, "MAX_SOURCE_TOKENS", 32)
    translator, params = make(parts, batch_rows=4)
    shapes, execute = [], translator._execute
    monkeypatch.setattr(
        translator, "_execute", lambda *args: (shapes.append(args[-1].source_BS.shape), execute(*args))[1]
    )
    assert translator.translate(params, LINES) == usual
    assert {width: rows for rows, width in shapes} == {width: min(4, 32 // width) for _, width in shapes}
    assert len({rows for rows, _ in shapes}) > 1


@pytest.mark.slow
def test_by_default_a_cpu_decodes_16_rows_at_once(parts, usual, fresh_programs):
    """The same programs as of a run that has 16 in its config, as earlier versions wrote it: the same bytes."""
    translator, params = make(parts, batch_rows=0)
    sixteen, _ = make(parts, batch_rows=16)
    with CompileCounter() as counter:
        result = translator.translate_nbest(params, SHORT)
    assert counter.count == 1
    assert result == sixteen.translate_nbest(params, SHORT)
    for (one,), text in zip((translator.translate_nbest(params, [line])[0] for line in SHORT), usual[:4], strict=True):
        assert one.text == text


def test_each_shape_is_compiled_once(parts, fresh_programs):
    translator, params = make(parts)
    widths = {batching.round_up_to_power_of_two(len(ids)) for ids in parts[1].encode(LINES)}
    with CompileCounter() as counter:
        for lines in (LINES, LINES[::-1], LINES[:9]):
            translator.translate(params, lines)
    assert counter.count == len(widths) > 1


@pytest.mark.parametrize("lines", [[], [""], ["", "  ", "\t"], ["", LINES[3], " ", LINES[4]]])
def test_blank_lines_have_blank_translations_at_their_position(parts, usual, lines):
    translator, params = make(parts)
    got = translator.translate(params, lines)
    assert got == [usual[LINES.index(line)] if line in LINES else "" for line in lines]


def test_a_long_source_is_cut_and_counted(parts, capsys):
    translator, params = make(parts, max_source_tokens=8)
    head = " ".join(WORDS)
    got = translator.translate(params, [f"{head} has a cat", LINES[0], f"{head} sees"])
    assert got[0] == got[2] != got[1]
    translator.log_warnings()
    assert "2 sources are longer than decode.max_source_tokens = 8" in capsys.readouterr().err
    translator.log_warnings()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_wider_beam_finds_other_translations(parts, usual):
    greedy, params = make(parts, beam_size=1)
    assert greedy.translate(params, LINES) != usual


@pytest.mark.slow
def test_the_length_penalty_is_the_config_s(parts):
    """A model that likes to end ends early, unless long hypotheses are made up to."""
    params = [eager(parts[3])]
    lengths = [
        sum(map(len, make(parts, beam_size=4, length_penalty=alpha)[0].translate(params, LINES)))
        for alpha in (0.0, 3.0)
    ]
    assert 3 * lengths[0] < lengths[1]


def best(parts, **fields):
    translator, _ = make(parts, **fields)
    return [result[0] for result in translator.translate_nbest([eager(parts[3])], SHORT)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "others"),
    [
        ({}, {"length_penalty_form": "length"}),
        ({}, {"coverage_penalty": 5.0, "beam_size": 4}),
        ({"beam_size": 4}, {"early_stopping": True}),
        ({}, {"min_length": 20}),
        ({}, {"no_repeat_ngram": 2}),
        ({}, {"method": "sample"}),
        ({"method": "sample"}, {"temperature": 0.3}),
        ({"method": "sample"}, {"top_k": 3}),
        ({"method": "sample"}, {"top_p": 0.5}),
        ({"method": "sample"}, {"seed": 1}),
        ({"method": "sample"}, {"method": "mbr", "mbr_samples": 4}),
        ({"method": "mbr", "mbr_samples": 4}, {"mbr_samples": 8}),
    ],
)
def test_every_field_changes_what_comes_out(parts, fields, others):
    assert best(parts, **fields) != best(parts, **{**fields, **others})


@pytest.mark.parametrize("method", ["beam", slow("sample"), slow("mbr")])
def test_n_best_goes_on_from_the_best(parts, method):
    fields = {"method": method, "beam_size": 4, "mbr_samples": 6}
    if method != "mbr":
        del fields["mbr_samples"]
    translator, params = make(parts, **fields)
    several = translator.translate_nbest(params, SHORT, n_best=4)
    single = translator.translate(params, SHORT)
    assert [result[0].text for result in several] == single
    assert all(len(result) == 4 for result in several)
    assert any(len({one.text for one in result}) > 1 for result in several)
    if method == "beam":
        assert all(len({one.text for one in result}) == 4 for result in several)
        assert all(result == sorted(result, key=lambda one: (-one.finished, -one.score)) for result in several)


@pytest.mark.slow
def test_mbr_takes_the_sample_most_like_the_others(parts):
    sampler, params = make(parts, method="sample", top_k=20)
    samples = sampler.translate_nbest(params, SHORT, n_best=8)
    chosen = make(parts, method="mbr", mbr_samples=8, top_k=20)[0].translate_nbest(params, SHORT, n_best=8)
    for drawn, ranked in zip(samples, chosen, strict=True):
        utilities = expected_chrf([one.text for one in drawn])
        assert ranked[0].text == drawn[int(np.argmax(utilities))].text
        assert [one.score for one in ranked] == sorted(utilities, reverse=True)


@pytest.mark.parametrize("method", ["sample", slow("mbr")])
@pytest.mark.parametrize(("size", "count"), [slow(1, 12), (7, len(LINES))])
def test_samples_do_not_depend_on_grouping_or_order(parts, method, size, count):
    translator, params = make(parts, method=method)
    usual = translator.translate_nbest(params, LINES, n_best=2)
    order = np.random.default_rng(0).permutation(count)
    got = {}
    for start in range(0, len(order), size):
        group = order[start : start + size]
        got.update(zip(group, translator.translate_nbest(params, [LINES[i] for i in group], n_best=2), strict=True))
    assert [got[i] for i in range(count)] == usual[:count]


def test_a_seed_given_to_the_call_is_that_of_the_config(parts):
    translator, params = make(parts, method="sample")
    seeded, _ = make(parts, method="sample", seed=5)
    assert translator.translate_nbest(params, SHORT, seed=5) == seeded.translate_nbest(params, SHORT)


PREFIXES = ["the old", "", "blue trees have", "  ", "x", "the cat sees a"]
PHRASES = [["tree"], [], ["a house", "old cats"], ["red"], ["house", "tree", "cat"], ["dog sees"]]


@pytest.mark.slow
def test_translations_begin_and_hold_as_asked_whatever_the_grouping(parts):
    translator, params = make(parts, beam_size=3, max_extra_length=25)
    lines = [line for line in LINES if len(line.split()) < 4]
    rng = np.random.default_rng(1)
    prefixes = [PREFIXES[i] for i in rng.integers(0, 6, len(lines))]
    phrases = [PHRASES[i] for i in rng.integers(0, 6, len(lines))]

    def run(chosen):
        asked = {"prefixes": [prefixes[i] for i in chosen], "constraints": [phrases[i] for i in chosen]}
        return translator.translate_nbest(params, [lines[i] for i in chosen], n_best=2, **asked)

    together = run(range(len(lines)))
    for result, prefix, several in zip(together, prefixes, phrases, strict=True):
        for one in result:
            assert one.text.startswith(prefix.strip())
            assert all(phrase in one.text for phrase in several)
        assert result[0].finished or not several
    order = rng.permutation(len(lines))
    assert [run([i])[0] for i in order] == [together[i] for i in order]
    assert run(order) == [together[i] for i in order]


@pytest.mark.slow
def test_sentences_without_constraints_are_unchanged_by_those_of_others(parts, usual):
    translator, params = make(parts)
    constraints = [["tree"] if i % 3 == 0 else [] for i in range(len(LINES))]
    got = translator.translate_nbest(params, LINES, constraints=constraints)
    assert [result[0].text for i, result in enumerate(got) if i % 3] == [line for i, line in enumerate(usual) if i % 3]
    assert got[0][0].text != usual[0]


@pytest.mark.slow
def test_samples_may_have_a_prefix(parts):
    translator, params = make(parts, method="sample")
    result = translator.translate_nbest(params, LINES[:4], n_best=5, prefixes=["the old"] * 4)
    texts = [one.text for several in result for one in several]
    assert all(text.startswith("the old") for text in texts)
    assert len(set(texts)) > 10


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"n_best": 3}, r"n_best = 3: expected at most decode\.beam_size = 2"),
        ({}, {"n_best": 0}, "n_best: expected at least 1, got 0"),
        ({"method": "mbr", "mbr_samples": 4}, {"n_best": 5}, r"at most decode\.mbr_samples = 4"),
        ({"method": "sample"}, {"constraints": [["a"], []]}, r"constraints need decode\.method = beam, got sample"),
        ({"no_repeat_ngram": 2}, {"constraints": [["a"], []]}, "may contradict each other"),
        ({}, {"constraints": [["a"]]}, "constraints: expected one for each of 2 sentences, got 1"),
        ({}, {"prefixes": ["a", "b", "c"]}, "prefixes: expected one for each of 2 sentences, got 3"),
        ({}, {"constraints": [["a"], ["b", " "]]}, "sentence 2: expected phrases that are not empty"),
        ({}, {"prefixes": "ab"}, "prefixes: expected a list with an item for each sentence, got one text, 'ab'"),
        ({}, {"constraints": "ab"}, "constraints: expected a list with an item for each sentence, got one text"),
        ({}, {"constraints": [["a"], [None]]}, "sentence 2: expected phrases that are not empty"),
        ({}, {"constraints": ["a", ""]}, "sentence 1: expected a list of phrases, got one text, 'a'"),
        ({}, {"constraints": [[], ["tree " * 20]], "first": 11}, "sentence 12: its prefix and phrases take 60 tokens"),
        ({}, {"prefixes": ["tree " * 20, ""]}, "sentence 1: its prefix and phrases take 60 tokens and an end, but"),
    ],
)
def test_what_cannot_be_is_refused(parts, fields, options, message):
    translator, params = make(parts, **fields)
    with pytest.raises(UserError, match=message) as caught:
        translator.translate_nbest(params, LINES[:2], **options)
    assert "\n" not in str(caught.value)


def test_nothing_can_be_asked_of_a_blank_source(parts):
    translator, params = make(parts)
    with pytest.raises(UserError, match="sentence 2: a blank source has no translation"):
        translator.translate_nbest(params, ["a", " "], prefixes=["", "a"])
    for nothing in ({"prefixes": [" "], "constraints": [[]]}, {"prefixes": [None], "constraints": [None]}):
        assert translator.translate_nbest(params, [" "], **nothing)[0][0].text == ""


@pytest.mark.slow
def test_models_of_an_ensemble_decide_together(parts):
    config, vocabulary, model, params = parts
    mesh = make_mesh(config.mesh)
    other_config = small_config(model={"num_layers": 2, "emb_dim": 24, "norm": "pre"})
    other = ModelDef(other_config.model, vocabulary.vocab_size)
    everything = (params, other.init(4))
    both = Translator((model, other), vocabulary, config.decode, mesh).translate(everything, LINES)
    alone = [
        Translator([one], vocabulary, config.decode, mesh).translate([own], LINES)
        for one, own in zip((model, other), everything, strict=True)
    ]
    assert both != alone[0]
    assert both != alone[1]
    turned = Translator((other, model), vocabulary, config.decode, mesh).translate(everything[::-1], LINES)
    assert turned == both


@pytest.mark.slow
def test_a_model_and_itself_are_the_model(parts, usual):
    config, vocabulary, model, params = parts
    twice = Translator((model, model), vocabulary, config.decode, make_mesh(config.mesh))
    assert twice.translate((params, params), LINES) == usual


def answering(parts, tokens, lengths, scores, finished, **fields):
    """A translator whose device gives these hypotheses, [N, T] and [N], for each sentence."""
    translator, params = make(parts, **fields)
    rows = translator.rows
    batch = Hypotheses(*(np.stack([np.array(values)] * rows) for values in (tokens, lengths, scores, finished)))
    translator._execute = lambda *_: batch
    return translator, params


@pytest.mark.reported
def test_equal_texts_of_beam_search_are_one_hypothesis(parts):
    """Different tokens may spell the same text: here a word, and the same word byte by byte."""
    cat = parts[1].encode(["cat"])[0].tolist()
    spelled = [*parts[1].encode(["c"])[0][:-1].tolist(), *(4 + ord(letter) for letter in "at"), tokenizer.EOS]
    dog = parts[1].encode(["dog"])[0].tolist()
    assert [parts[1].decode(ids) for ids in (cat, spelled, dog)] == ["cat", "cat", "dog"]
    width = max(map(len, (cat, spelled, dog)))
    tokens = [ids + [tokenizer.PAD] * (width - len(ids)) for ids in (cat, spelled, dog)]
    device = tokens, list(map(len, (cat, spelled, dog))), [-1.0, -2.0, -3.0], [True] * 3
    translator, params = answering(parts, *device, beam_size=3)
    assert translator.translate_nbest(params, ["a"], n_best=3) == [[("cat", -1.0, True), ("dog", -3.0, True)]]
    drawn, params = answering(parts, *device, method="sample")
    assert [one.text for one in drawn.translate_nbest(params, ["a"], n_best=3)[0]] == ["cat", "cat", "dog"]


@pytest.mark.reported
def test_translations_cut_at_their_limit_and_with_unk_are_counted(parts, capsys):
    cat = parts[1].encode(["cat cat"])[0].tolist()[:2]
    translator, params = answering(parts, [[*cat, 0], [tokenizer.UNK, cat[0], 2]], [2, 3], [-1.0, -2.0], [False, True])
    translator.translate(params, [*SHORT[:3], ""])
    translator.log_warnings()
    err = capsys.readouterr().err
    assert err == "warning: 3 translations are cut at source tokens + decode.max_extra_length = 10\n"
    translator.translate_nbest(params, SHORT[:2], n_best=2)
    translator.log_warnings()
    err = capsys.readouterr().err
    assert "warning: 2 translations are cut at" in err
    assert "warning: 2 translations hold the unknown token, unk\n" in err
    translator.log_warnings()
    assert capsys.readouterr().err == ""


def test_warnings_may_name_the_model(parts, capsys):
    translator, params = answering(parts, [[tokenizer.UNK, 2]], [2], [-1.0], [True])
    translator.translate(params, SHORT[:2])
    translator.log_warnings("other, checkpoint 4")
    assert capsys.readouterr().err == "warning: other, checkpoint 4: 2 translations hold the unknown token, unk\n"


def test_each_program_is_shown_while_it_is_compiled(parts, monkeypatch):
    translator, params = make(parts)
    shown, show = [], translators.phase
    monkeypatch.setattr(translators, "phase", lambda name: (shown.append(name), show(name))[1])
    widths = {batching.round_up_to_power_of_two(len(ids)) for ids in parts[1].encode(LINES)}
    translator.translate(params, LINES)
    translator.translate(params, LINES)
    assert sorted(shown) == sorted(f"compiling, sources of {width} tokens" for width in widths)


@pytest.mark.reported
def test_a_model_that_never_ends_says_so(parts, capsys):
    translator, params = make(parts)
    result = translator.translate_nbest(params, LINES)
    count = sum(not one.finished for (one,) in result)
    translator.log_warnings()
    assert count > 10
    assert f"warning: {count} translations are cut at source tokens" in capsys.readouterr().err
