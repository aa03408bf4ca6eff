"""Alignments of words, read off attention whose right answer is known, and the files they go to."""

import argparse
import contextlib
import types

import jax
import numpy as np
import pytest

from tests.conftest import small_config
from transformer import translate
from transformer.data import tokenizer
from transformer.data.batching import Batch, JaggedArray
from transformer.data.tokenizer import EOS
from transformer.decoding import alignment
from transformer.decoding.alignment import Aligner, Attention
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models.registry import ModelDef
from transformer.runtime.errors import UserError
from transformer.training import train_step

WORDS = ["red", "green", "blue", "old", "new", "house", "tree", "cat", "dog", "sees", "has"]
LINES = [" ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 9)) for i in range(20)]


@pytest.fixture(scope="module")
def parts():
    config = small_config()
    vocabulary = tokenizer.train(LINES, 290, "bpe")
    model = ModelDef(config.model, vocabulary.vocab_size)
    mesh = make_mesh(config.mesh)
    params = jax.device_put(model.init(1), sharding.replicated(mesh))
    fields = {"config": config, "tokenizer": vocabulary, "model": model, "mesh": mesh, "params": params}
    return types.SimpleNamespace(**fields, source_tag="")


def make(parts, layer=None):
    return Aligner(parts.model, parts.tokenizer, parts.config.decode, parts.mesh, layer)


def align(aligner, params, sources, targets):
    """The alignment of each pair; empty if a side is blank."""
    attention = dict(aligner.attention(params, sources, targets))
    return [aligner.word_alignment(attention[i]) if i in attention else [] for i in range(len(sources))]


def attend(parts, source, target, pairs, layer=1):
    """Attention of two layers; in one of them word j looks at word i for each of the pairs, all else evenly around."""
    ids = [parts.tokenizer.encode([line])[0] for line in (source, target)]
    words = [np.array(parts.tokenizer.word_ids(side.tolist())) for side in ids]
    weights = np.full((2, 2, len(ids[1]), len(ids[0])), 1e-3, np.float32)
    weights[..., -1] = 5.0  # most of it goes to EOS, which is no word
    for i, j in pairs:
        weights[layer - 1, 1][np.ix_(words[1] == j, words[0] == i)] = 1.0
    return Attention(weights / weights.sum(-1, keepdims=True), *ids)


def test_each_word_is_aligned_with_the_one_it_attends_to(parts):
    source, target = "old house greenhouse sees", "dog newhouse a"
    attention = attend(parts, source, target, [(2, 0), (0, 1), (3, 2)])
    assert len(attention.source) > 5  # some words are of several pieces
    assert make(parts, 1).word_alignment(attention) == [(0, 1), (2, 0), (3, 2)]
    assert make(parts, 2).word_alignment(attention) != [(0, 1), (2, 0), (3, 2)]
    assert alignment.to_pharaoh([(0, 1), (2, 0)]) == "0-1 2-0"


def test_weights_are_summed_over_the_pieces_of_a_source_word_and_averaged_over_heads(parts):
    vocabulary = parts.tokenizer
    whole = next(word for word in WORDS if len(vocabulary.encode([word])[0]) == 2)  # one piece, and EOS
    source, target = (vocabulary.encode([line])[0] for line in (f"qzq {whole}", "dog"))
    words = np.array(vocabulary.word_ids(source.tolist()))
    pieces = (words == 0).sum()
    assert pieces >= 3 > 1 == (words == 1).sum()
    weights = np.zeros((1, 2, len(target), len(source)), np.float32)  # of each head, mean 0.45 against 0.4
    weights[0, 0][:, words == 0], weights[0, 0][:, words == 1] = 0.9 / pieces, 0.6
    weights[0, 1][:, words == 1] = 0.2
    aligner = make(parts)
    aligner.layer = 1
    assert aligner.word_alignment(Attention(weights, source, target)) == [(0, 0)]


def test_self_attention_is_that_of_the_model_too(parts):
    sources, targets = ["old house", ""], ["dog cat sees", "dog"]
    aligner = Aligner(parts.model, parts.tokenizer, parts.config.decode, parts.mesh, self_attention=True)
    ((index, attention),) = aligner.attention(parts.params, sources, targets)
    assert index == 0
    ids = [parts.tokenizer.encode([side[0]])[0][None] for side in (sources, targets)]
    wanted = jax.jit(lambda source, target: parts.model.bind(parts.params).self_attention(source, target))(*ids)
    np.testing.assert_allclose(attention.encoder_LHSS, wanted[0][0], atol=1e-5)
    np.testing.assert_allclose(attention.decoder_LHTT, wanted[1][0], atol=1e-5)
    assert dict(make(parts).attention(parts.params, sources, targets))[0].encoder_LHSS is None


def test_a_line_of_what_the_tokenizer_takes_for_a_space_has_no_words(parts):
    assert align(make(parts), parts.params, ["\u2581", "old house"], ["old house", "\u2581"]) == [[], []]


@pytest.mark.reported
def test_the_layer_is_the_last_of_up_to_three_else_the_last_but_one_unless_it_is_named(parts):
    assert [alignment.default_layer(count) for count in (1, 2, 3, 4, 6)] == [1, 2, 3, 3, 5]
    assert make(parts).layer == 2
    assert make(parts, 1).layer == 1
    for layer in (0, 3):
        with pytest.raises(UserError, match=f"layer from 1 to 2, got {layer}"):
            make(parts, layer)


def test_attention_is_that_of_the_model_for_each_pair_alone(parts):
    """Neither neighbours nor padding change it; a pair with a blank side has none."""
    sources, targets = [*LINES[:6], "", "cat"], [*LINES[6:12], "dog", " "]
    result = dict(make(parts).attention(parts.params, sources, targets))
    assert sorted(result) == list(range(6))
    alone = jax.jit(lambda source, target: parts.model.bind(parts.params).cross_attention(source, target))
    for i in (0, 5):
        source, target = (parts.tokenizer.encode([side[i]])[0] for side in (sources, targets))
        np.testing.assert_array_equal(result[i].source, source)
        np.testing.assert_array_equal(result[i].target, target)
        padded = [np.pad(ids, (0, 32 - len(ids)))[None] for ids in (source, target)]
        wanted = alone(*padded)[0, :, :, : len(target), : len(source)]
        np.testing.assert_allclose(result[i].weights_LHTS, wanted, atol=1e-6)


def test_every_word_of_the_translation_gets_one_link(parts):
    links = align(make(parts), parts.params, [*LINES[:5], ""], [*LINES[5:10], ""])
    for each, source, target in zip(links, LINES, LINES[5:10], strict=False):
        assert sorted(j for _, j in each) == list(range(len(target.split())))
        assert all(0 <= i < len(source.split()) for i, _ in each)
    assert links[5] == []


def test_long_sentences_are_cut_as_decoding_cuts_them(parts):
    ((_, attention),) = make(parts).attention(parts.params, ["cat " * 400], ["dog " * 400])
    assert attention.weights_LHTS.shape[2:] == (74, 64)
    assert attention.source[-1] == attention.target[-1] == EOS


def flags(*arguments):
    parser = argparse.ArgumentParser()
    translate.add_alignment_flags(parser)
    return parser.parse_args(list(map(str, arguments)))


def test_what_is_recorded_beside_translation(parts, tmp_path):
    args = flags(f"--alignments={tmp_path}/a", f"--attention={tmp_path}/b.npz", "--alignment_layer=2")
    upper = {line: line[::-1] for line in LINES}
    with translate.alignment_writer(args, parts) as note:
        note(LINES[:3], [upper[line] for line in LINES[:3]])
        note(["", LINES[4]], ["", upper[LINES[4]]])
        assert not (tmp_path / "a").exists()
    lines = (tmp_path / "a").read_text().split("\n")
    assert len(lines) == 6
    assert lines[3] == lines[5] == ""
    assert len(lines[4].split()) == len(LINES[4].split())
    with np.load(tmp_path / "b.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == sorted(f"{name}_{i}" for name in ("weights", "source", "target") for i in (0, 1, 2, 4))
        weights, source, target = (arrays[f"{name}_4"] for name in ("weights", "source", "target"))
    assert weights.shape == (2, 2, len(target), len(source))
    assert weights.dtype == np.float32
    assert "".join(source[:-1]).replace("▁", " ").strip() == LINES[4]


def test_what_fails_leaves_no_file(parts, tmp_path):
    args = flags(f"--alignments={tmp_path}/a", f"--attention={tmp_path}/b.npz")
    with pytest.raises(UserError, match="bad line"), translate.alignment_writer(args, parts) as note:  # noqa: PT012
        note(LINES[:3], LINES[:3])
        raise UserError("bad line")
    assert list(tmp_path.iterdir()) == []


def test_links_are_made_if_they_are_wanted(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(Aligner, "word_alignment", lambda *args: pytest.fail("nobody asked"))
    with translate.alignment_writer(flags(f"--attention={tmp_path}/b.npz"), parts) as note:
        note(LINES[:3], LINES[:3])
    with np.load(tmp_path / "b.npz") as arrays:
        assert len(arrays.files) == 9


def test_without_flags_nothing_is_noted(parts):
    with translate.alignment_writer(flags(), parts) as note:
        note(LINES[:3], ["no", "such", "count", "of", "lines"])


def test_bad_flags_are_refused(parts, tmp_path):
    for given, message in (
        (["--alignment_layer=2"], "goes with --alignments"),
        (["--alignment_layer=2", f"--attention={tmp_path}/b"], "goes with --alignments"),
        ([f"--alignments={tmp_path}/a", f"--attention={tmp_path}/../{tmp_path.name}/a"], "are both .*; name two files"),
    ):
        with pytest.raises(UserError, match=message):
            translate.check_alignment_flags(flags(*given))
    for path, message in ((f"{tmp_path}/none/a", "none/a"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=message), translate.alignment_writer(flags(f"--alignments={path}"), parts):
            pass
    with (
        pytest.raises(UserError, match="from 1 to 2, got 9"),
        translate.alignment_writer(flags(f"--alignments={tmp_path}/a", "--alignment_layer=9"), parts),
    ):
        pass


ENGLISH = "red green blue old new house tree cat dog sees has big".split()
GERMAN = "rot blau alt neu haus baum katze hund sieht hat gross gut".split()


def backwards(rng):
    """A sentence, its translation word by word in reverse order, and the links between the two."""
    count = rng.integers(3, 8)
    chosen = rng.choice(len(ENGLISH), count, replace=False)
    source, target = " ".join(ENGLISH[i] for i in chosen), " ".join(GERMAN[i] for i in chosen[::-1])
    return source, target, [(count - 1 - word, word) for word in range(count)][::-1]


@pytest.mark.slow
@pytest.mark.reported
def test_alignments_of_a_model_of_two_layers_are_right():
    """Trained to translate word by word, backwards; its first layer gets about half of the links right."""
    rng, rows, steps = np.random.default_rng(0), 48, 500
    vocabulary = tokenizer.train([text for _ in range(300) for text in backwards(rng)[:2]], 380, "bpe")
    config = small_config(
        model={"emb_dim": 32, "qkv_dim": 32, "value_dim": 32, "mlp_dim": 64, "dropout_rate": 0.0},
        optimizer={"learning_rate": 0.004, "schedule": "linear", "warmup_steps": 30},
        train={"num_steps": steps},
    )
    mesh, model = make_mesh(config.mesh), ModelDef(config.model, vocabulary.vocab_size)
    state, update = train_step.init_state(model, config, mesh), train_step.make_train_step(model, config, mesh)
    for _ in range(steps):
        pairs = [backwards(rng) for _ in range(rows)]
        sides = [JaggedArray.from_sequences(vocabulary.encode([pair[side] for pair in pairs])) for side in (0, 1)]
        batch = Batch(*(side.to_padded(np.arange(rows), 8) for side in sides))
        state, _ = update(state, sharding.shard_batch(mesh, batch))
    sources, targets, wanted = zip(*(backwards(rng) for _ in range(50)), strict=True)
    result = align(Aligner(model, vocabulary, config.decode, mesh), state.params, sources, targets)
    right = sum(len(set(ours) & set(theirs)) for ours, theirs in zip(result, wanted, strict=True))
    assert right >= 0.95 * sum(map(len, wanted))


@pytest.mark.reported
def test_alignments_that_cannot_be_written_are_a_message():
    with pytest.raises(UserError, match="/dev/full: No space left on device"), contextlib.ExitStack() as stack:
        translate._open(stack, "/dev/full").write(b"0-0\n")
