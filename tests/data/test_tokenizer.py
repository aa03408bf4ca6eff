"""The vocabulary: special ids, round trips, foreign models, and what must never happen in silence."""

import io
import os
import pickle

import numpy as np
import pytest
import sentencepiece

from transformer.data import tokenizer
from transformer.data.tokenizer import BOS, EOS, PAD, UNK
from transformer.runtime.errors import UserError

LINES = [f"the {a} {b} sees a {c}" for a in ("old", "new") for b in ("house", "tree", "river") for c in ("dog", "cat")]


@pytest.fixture(scope="module")
def small():
    return tokenizer.train(LINES, 300, "bpe")


def foreign(**options) -> bytes:
    """A model as people train it elsewhere: unk 0, bos 1, eos 2 and no pad, unless said otherwise."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2, **options
    )
    return model.getvalue()


def test_special_ids_are_the_first_four_and_explicit(small):
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    assert small.pieces(range(4)) == ["<pad>", "<s>", "</s>", "<unk>"]
    assert small.vocab_size == 300


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "line", ["the old dog", "ünknown 漢字 😀", "tab\there", "lone\rreturn", "\u2028", "<s> </s> <pad>"]
)
def test_text_comes_back_as_it_was(model_type, line):
    trained = tokenizer.train(LINES, 277, model_type)
    (ids,) = trained.encode([line])
    assert trained.decode(ids) == line
    assert ids[-1] == EOS
    assert not set(ids[:-1].tolist()) & {PAD, BOS, EOS, UNK}


def test_a_blank_line_is_eos_alone(small):
    assert [ids.tolist() for ids in small.encode(["", "  "])] == [[EOS], [EOS]]
    assert small.decode([EOS]) == ""


def test_decoding_stops_at_the_first_eos_and_skips_pad(small):
    (ids,) = small.encode(["the cat"])
    assert small.decode([*ids.tolist(), *ids.tolist()]) == "the cat"
    assert small.decode([BOS, *ids.tolist()[:-1], PAD, PAD]) == "the cat"


@pytest.mark.reported
@pytest.mark.parametrize(
    ("spelled", "text"), [("a\r\nb", "a b"), ("a\rb\r", "a\rb"), ("a\r\r\n", "a\r "), ("\r\r", "")]
)
def test_no_line_end_is_spelled(small, spelled, text):
    """Written with a line break after it, a CR at the end would be read back as part of the line's end."""
    assert small.decode([4 + ord(letter) for letter in spelled]) == text


def test_a_line_break_spelled_in_bytes_cannot_break_the_line(small):
    newline = next(i for i in range(300) if small.pieces([i]) == ["<0x0A>"])
    null = next(i for i in range(300) if small.pieces([i]) == ["<0x00>"])
    (ids,) = small.encode(["cat"])
    assert small.decode([*ids[:-1], newline, null, *ids[:-1]]).splitlines() == ["cat   cat"]


def test_bytes_that_are_no_text_become_a_replacement_character(small):
    lone = next(i for i in range(300) if small.pieces([i]) == ["<0xFF>"])
    assert small.decode([lone]) == "\ufffd"


@pytest.mark.parametrize(
    "options", [{}, {"pad_id": 3}, {"pad_id": 0, "unk_id": 3, "bos_id": 1, "eos_id": 2}, {"bos_id": -1}]
)
def test_a_foreign_model_is_renumbered(options):
    model = foreign(**options)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = tokenizer.Tokenizer(model)
    (ids,) = ours.encode(["the old house @"])
    assert ours.pieces(ids[:-1]) == [theirs.id_to_piece(i) for i in theirs.encode("the old house @")]
    assert ids[-1] == EOS
    assert UNK in ids  # @ was never seen, and this model has no bytes
    assert PAD not in ids
    known = [i for i in range(theirs.vocab_size()) if not theirs.is_control(i) and not theirs.is_unknown(i)]
    assert ours.vocab_size == len(known) + 4
    assert ours.decode(ours.encode(["the old house"])[0]) == "the old house"


def test_training_again_gives_the_same_model(small):
    assert tokenizer.train(LINES, 300, "bpe").digest == small.digest
    assert tokenizer.train(LINES[:6], 290, "bpe").digest != small.digest


def test_stored_and_loaded_it_is_the_same(small, tmp_path):
    small.save(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer", tmp_path / "tokenizer" / tokenizer.FILE_NAME):
        assert tokenizer.load(path).digest == small.digest
    assert sorted(p.name for p in (tmp_path / "tokenizer").iterdir()) == [tokenizer.FILE_NAME]


def test_it_can_be_pickled(small):
    copy = pickle.loads(pickle.dumps(small))
    np.testing.assert_array_equal(copy.encode(LINES[:1])[0], small.encode(LINES[:1])[0])


def test_a_missing_model_is_an_error_not_a_new_one(tmp_path):
    with pytest.raises(UserError, match="the file is missing"):
        tokenizer.load(tmp_path / "none.model")
    os.mkfifo(tmp_path / "pipe.model")
    with pytest.raises(UserError, match=r"pipe.model: expected a file, .* got a pipe or device"):
        tokenizer.load(tmp_path / "pipe.model")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "odd.model").write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.model: expected a SentencePiece model"):
        tokenizer.load(tmp_path / "odd.model")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_vocabulary_too_large_for_the_data_says_how_large_it_may_be(model_type):
    with pytest.raises(UserError, match=r"vocab_size = 5000.*<= \d+"):
        tokenizer.train(LINES, 5000, model_type)


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocab_size = 100"):
        tokenizer.train(LINES, 100, "bpe")


def test_scripts_of_thousands_of_characters_fit_with_rare_ones_in_bytes():
    rng = np.random.default_rng(0)
    common = "".join(chr(0x4E00 + i) for i in range(300))
    lines = ["".join(rng.choice(list(common), 30)) for _ in range(2000)]
    rare = [chr(0x5E00 + i) for i in range(700)]
    trained = tokenizer.train([*lines, *rare], 1000, "bpe")
    assert trained.decode(trained.encode([rare[5]])[0]) == rare[5]
    with pytest.raises(UserError, match=r"smaller than required_chars\. .* Raise data\.vocab_size\."):
        tokenizer.train([*lines, *rare], 400, "bpe")


def test_truncation_keeps_eos_last_and_tells_which_lines_were_longer(small):
    whole = small.encode(["the old dog", "the", ""])
    ids, is_longer = small.encode_truncated(["the old dog", "the", ""], len(whole[1]))
    assert ids[0].tolist() == [*whole[0][: len(whole[1]) - 1], EOS]
    assert [one.tolist() for one in ids[1:]] == [one.tolist() for one in whole[1:]]
    assert is_longer == [True, False, False]


def test_words_are_what_spaces_separate():
    trained = tokenizer.train(["the cat sees a dog", "cats and dogs, dogs and cats"] * 20, 290, "bpe")
    for line in ["cats and dogs", "  the  cats ", "a", "", "漢字 cat漢", "a\tb c", "\u2028 x", "😀", "dogs\u00a0x y"]:
        ids = trained.encode([line])[0].tolist()
        words = trained.word_ids(ids)
        assert len(words) == len(ids)
        assert words[-1] == -1
        wanted = [word for word in line.split(" ") if word]
        assert sorted(set(words[:-1])) == list(range(len(wanted)))
        assert words[:-1] == sorted(words[:-1])
        for number, word in enumerate(wanted):
            assert trained.decode([i for i, n in zip(ids, words, strict=True) if n == number]) == word


@pytest.mark.reported
def test_a_line_over_sentencepiece_s_usual_limit_is_trained_on(capsys):
    """A document a line, which alone has these words."""
    long = "Привет мир " * 400
    assert len(long.encode()) > 4192
    assert "▁Привет" in tokenizer.train([*LINES, long, long], 310, "bpe").pieces(range(310))
    assert capsys.readouterr().err == ""


@pytest.mark.reported
def test_lines_that_are_left_out_are_counted(capsys):
    long = "Привет мир " * 4000
    trained = tokenizer.train([*LINES, long, long], 300, "bpe")
    assert "▁Привет" not in trained.pieces(range(300))
    assert "warning: 2 of 14 lines of training text have over 65,536 bytes: the" in capsys.readouterr().err


@pytest.mark.reported
def test_a_line_with_the_character_that_sentencepiece_reserves_is_trained_on():
    trained = tokenizer.train([*LINES, *["Привет ▅ Привет"] * 4], 310, "bpe")
    assert "▁Привет" in trained.pieces(range(310))
    assert trained.decode(trained.encode(["a ▅ b"])[0]) == "a ▅ b"


@pytest.mark.reported
@pytest.mark.parametrize("lines", [[], ["", "  "], ["слово " * 20_000]])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_what_cannot_be_trained_on_says_why(lines, model_type):
    with pytest.raises(UserError, match=rf"expected training text, but all {len(lines)} lines are blank"):
        tokenizer.train(lines, 300, model_type)


@pytest.mark.reported
def test_an_alphabet_is_counted_all_over_the_text(monkeypatch):
    """WMT14 is sorted by corpus: its first lines are no sample of it."""
    monkeypatch.setattr(tokenizer, "MAX_COUNTED_LINES", 10)
    lines = [*["ab"] * 45, *["cd"] * 45, "xy"]
    counted = tokenizer._inspect(lines).characters
    assert counted == tokenizer._inspect(lines).characters
    assert (counted["a"], counted["c"], counted["x"]) == (5, 5, 0)
    assert tokenizer._inspect(lines[40:50]).characters == {"a": 5, "b": 5, "c": 5, "d": 5}


@pytest.mark.reported
def test_an_alphabet_that_only_late_lines_show_still_fits(monkeypatch):
    """Were the first lines all that is looked at, each of the 60 rarer characters would have to be a piece."""
    monkeypatch.setattr(tokenizer, "MAX_COUNTED_LINES", 200)
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(list("abcdefgh"), 80)) for _ in range(400)]
    rarer = [chr(0x5E00 + i) for i in range(60)]
    late = [" ".join([line, *rng.choice(rarer, 3)]) for line in lines[200:]]
    assert tokenizer.train(lines[:200] + late, 300, "bpe").vocab_size == 300


@pytest.mark.reported
def test_a_vocabulary_of_few_short_lines_is_byte_for_byte_what_it_was(small):
    before = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=before,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        pad_id=PAD,
        bos_id=BOS,
        eos_id=EOS,
        unk_id=UNK,
        input_sentence_size=2_000_000,
        shuffle_input_sentence=True,
        num_threads=1,
        minloglevel=2,
    )
    assert small.digest == tokenizer.Tokenizer(before.getvalue()).digest
