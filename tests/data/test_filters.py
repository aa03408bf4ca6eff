"""Filters of training pairs: each against the obvious rule, the chain's counts, and that nothing else changes."""

import dataclasses
import random
import unicodedata

import numpy as np
import pytest

from transformer.config import Config, DataConfig, validation
from transformer.data import corpus, corpus_metadata, filters, input_pipeline, scripts, shards, tokenizer
from transformer.runtime.errors import UserError
from transformer.training import workdir

ALL = {
    "filter_min_length": 2,
    "filter_max_length": 9,
    "filter_max_ratio": 3.0,
    "filter_copies": True,
    "filter_controls": True,
    "filter_script": 0.5,
    "filter_duplicates": True,
}
BAD = {  # filter → pairs that it drops when those before it have gone
    "length": [("one", "ein Wort"), ("a b", "w " * 10)],
    "ratio": [("a b", "a b c d e f g")],
    "copies": [("the same text", "the same text "), ("1 2", "1 2")],
    "controls": [("a bell \x07 rings", "eine Glocke läutet"), ("a b", "c \ufffd")],
    "script": [("это не английский", "das ist deutsch"), ("this is English", "это по-русски")],
    "duplicates": [("a good pair", "ein gutes Paar"), ("a good pair", "ein gutes Paar")],
}
GOOD = [
    ("a good pair", "ein gutes Paar"),
    ("a good pair", "ein anderes Paar"),
    ("1 2 3", "4 5 6"),
    ("a\ttab here", "ein Tabulator"),
    ("the Москва river", "der Fluss Moskwa"),
]


def config_of(folder, train=(), languages=("en", "de"), **fields):
    """The config of text files; without `train` they are those that are there."""
    for side, code in enumerate(languages):
        if train:
            text = "".join(f"{pair[side]}\n" for pair in train)
            (folder / f"train.{code}").write_bytes(text.encode())
            (folder / f"val.{code}").write_bytes(text.encode())
    source, target = languages
    named = {"source_language": source, "target_language": target}
    return DataConfig(name="text", dir=str(folder), data_dir=str(folder / "data"), vocab_size=300, **named, **fields)


def chain_of(languages=("en", "de"), **fields):
    source, target = languages
    return filters.FilterChain.from_config(DataConfig(source_language=source, target_language=target, **fields))


def names_of(codes):
    return [filters.NAMES[code - 1] if code else "" for code in codes]


def test_each_filter_drops_its_pairs_and_counts_them(tmp_path, capfd):
    train = [*GOOD, *(pair for pairs in BAD.values() for pair in pairs)]
    data = config_of(tmp_path, train, **ALL)
    opened = corpus.open_corpus(data)
    assert list(opened.split("train")) == GOOD
    assert opened.filtered == {name: len(pairs) for name, pairs in BAD.items()}
    for name, pairs in BAD.items():
        assert opened.filtered_examples(name, 3) == [tuple(map(str, pair)) for pair in pairs], name
    assert list(opened.split("validation")) == train
    by_filter = ", ".join(f"{name} {len(pairs)}" for name, pairs in BAD.items())
    says = f"data: filters drop {len(train) - len(GOOD)} of {len(train)} training pairs: {by_filter}\n"
    assert says in capfd.readouterr().err
    again = corpus.open_corpus(data)
    assert (again.digest, again.filtered) == (opened.digest, opened.filtered)
    assert says in capfd.readouterr().err


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_filter_alone_changes_the_digest_of_training_alone(tmp_path, name):
    train = [*GOOD, *(pair for pairs in BAD.values() for pair in pairs)]
    plain = corpus.open_corpus(config_of(tmp_path, train))
    assert (plain.filters, plain.filtered) == (None, {})
    one = corpus.open_corpus(config_of(tmp_path, **{name: ALL[name]}))
    assert one.split("train").digest != plain.split("train").digest
    assert one.digest != plain.digest
    assert one.split("validation").digest == plain.split("validation").digest
    assert 0 < sum(one.filtered.values()) < len(train)
    assert len(one.split("train")) == len(train) - sum(one.filtered.values())


def test_filters_that_drop_nothing_change_nothing(tmp_path):
    plain = corpus.open_corpus(config_of(tmp_path, GOOD))
    assert corpus.open_corpus(config_of(tmp_path, **ALL)).digest == plain.digest


def test_held_out_and_blank_pairs_are_not_filtered(tmp_path):
    train = [(f"word {n}", f"Wort {n}") for n in range(300)] + [("same", "same"), ("same", "same"), ("", "")]
    data = config_of(tmp_path, train)
    for side in ("en", "de"):
        (tmp_path / f"val.{side}").unlink()
    plain = corpus.open_corpus(data)
    filtered = corpus.open_corpus(dataclasses.replace(data, filter_copies=True, filter_duplicates=True))
    assert list(filtered.split("validation")) == list(plain.split("validation"))
    assert filtered.dropped == 1
    assert filtered.filtered == {"copies": 2, "duplicates": 0}
    assert len(filtered.split("train")) == len(plain.split("train")) - 2


def test_lengths_count_words_or_characters():
    pairs = [("ab cd", "abc"), ("abcd", "a b c d"), ("日本語です", "ab")]
    assert names_of(chain_of(filter_min_length=2).find(pairs)) == ["length", "length", "length"]
    assert names_of(chain_of(filter_min_length=3, filter_unit="characters").find(pairs)) == ["", "", "length"]
    assert names_of(chain_of(filter_max_length=3).find(pairs)) == ["", "length", ""]
    assert names_of(chain_of(filter_max_ratio=2.4, filter_unit="characters").find(pairs)) == ["", "", "ratio"]
    assert names_of(chain_of(filter_max_ratio=2.0).find(pairs)) == ["", "ratio", ""]
    assert names_of(chain_of(filter_max_ratio=4.0).find(pairs)) == ["", "", ""]


SCRIPT_TEXTS = ["abc", "абв", "", "12 !", "Ａｂ漢", "ª µ x", "日本語ー々", "한국어 漢", "\U00020000a", "ß→Ж", "नमस्ते a"]


@pytest.mark.parametrize("script", ["Latn", "Cyrl", "Jpan", "Hans", "Kore", "Deva"])
def test_the_share_of_letters_is_that_of_counting_them_one_by_one(script):
    def share(text):
        names = [unicodedata.name(c).split() for c in text if unicodedata.category(c)[0] == "L"]
        names = [words[1] if words[0].endswith("WIDTH") else words[0] for words in names]
        names = [name for name in names if name not in ("FEMININE", "MICRO", "MODIFIER")]
        return sum(name in scripts.LETTER_NAMES[script] for name in names) / len(names) if names else 1.0

    np.testing.assert_array_equal(scripts.share_in_script(SCRIPT_TEXTS, script), list(map(share, SCRIPT_TEXTS)))


def test_the_script_is_checked_where_it_is_known():
    pairs = [("hello", "привет"), ("привет", "hello"), ("12", "34")]
    assert names_of(chain_of(("en", "ru"), filter_script=0.5).find(pairs)) == ["", "script", ""]
    assert names_of(chain_of(("en", "xx"), filter_script=0.5).find(pairs)) == ["", "script", ""]
    assert names_of(chain_of(("sr_Latn", "xx"), filter_script=0.5).find(pairs)) == ["", "script", ""]
    with pytest.raises(UserError, match="the script of neither xx nor yy is known"):
        chain_of(("xx", "yy"), filter_script=0.5)


@pytest.mark.parametrize("limit", [3, 50, 1 << 22])
def test_duplicates_are_those_of_a_set_in_any_number_of_passes(monkeypatch, limit):
    monkeypatch.setattr(filters, "MAX_HASHES", limit)
    rng = np.random.default_rng(limit)
    distinct = rng.integers(0, 1 << 64, 40, np.uint64)
    distinct[:2] = 0, (1 << 64) - 1
    hashes = rng.choice(distinct, 300)
    codes = (rng.random(300) < 0.2).astype(np.uint8)  # dropped by another filter
    seen, expected = set(), codes.copy()
    for row, value in enumerate(hashes):
        if not codes[row]:
            expected[row] = filters.NAMES.index("duplicates") + 1 if int(value) in seen else 0
            seen.add(int(value))
    read = 0

    def by_shard():
        nonlocal read
        read += 1
        return np.split(hashes, [0, 10, 11, 200])

    filters.mark_duplicates(codes, by_shard)
    np.testing.assert_array_equal(codes, expected)
    assert read == -(-300 // limit)


def test_the_result_does_not_depend_on_shards_workers_and_passes(tmp_path, monkeypatch):
    rng = random.Random(3)
    words = [*(["ba", "bo"] * 6), "\x01", "и"]
    train = [tuple(" ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(2)) for _ in range(400)]
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    whole = corpus.open_corpus(config_of(tmp_path / "one", train, **ALL))
    assert whole.filtered["duplicates"] > 20
    monkeypatch.setattr(shards, "SHARD_BYTES", 500)
    monkeypatch.setattr(filters, "MAX_HASHES", 60)
    data = config_of(tmp_path / "many", train, **ALL)
    once = tokenizer.train([side for pair in train for side in pair], 270, "bpe")
    once.save(tmp_path, "bpe.model")
    given = dataclasses.replace(data, tokenizer=str(tmp_path / "bpe.model"), vocab_size=once.vocab_size)
    many = corpus.open_corpus(given, tokenize=True, workers=1)
    assert (many.digest, many.filtered) == (whole.digest, whole.filtered)
    made = input_pipeline.token_ids(given, many, "train", once)  # in the pass that prepared
    for side, texts in zip(made, (many.split("train").sources(), many.split("train").targets()), strict=True):
        np.testing.assert_array_equal(side.flat, np.concatenate(once.encode(texts)))
    monkeypatch.setattr(corpus_metadata.FileStore, "array", lambda _, name, make, size: make())
    assert corpus.open_corpus(given, workers=1).filtered == whole.filtered  # from stored pairs


def test_a_run_is_not_resumed_with_other_filters(tmp_path):
    old = Config()
    for name, value in {**ALL, "filter_unit": "characters"}.items():
        with pytest.raises(UserError, match=rf"holds a run with another config: data\.{name}: \S+ → '?{value}'?\."):
            workdir.check_resume_config(tmp_path, old, validation.replace_field(old, f"data.{name}", value))


def test_filters_that_leave_nothing_are_refused(tmp_path):
    data = config_of(tmp_path, GOOD, filter_min_length=50)
    for _ in range(2):
        with pytest.raises(UserError, match=r"drop all 5 training pairs \(length 5\)"):
            corpus.open_corpus(data)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"filter_min_length": 5, "filter_max_length": 4}, "at least filter_min_length = 5, or 0 for no limit, got 4"),
        ({"filter_min_length": -1}, "filter_min_length: expected at least 0, got -1"),
        ({"filter_max_ratio": 0.5}, r"filter_max_ratio: expected 0 \(off\), or at least 1, such as 3.*got 0\.5"),
        ({"filter_max_ratio": float("nan")}, "filter_max_ratio: expected a finite number, got nan"),
        ({"filter_max_ratio": float("inf")}, "filter_max_ratio: expected a finite number, got inf"),
        ({"filter_script": 1.1}, "filter_script: expected at most 1, got 1.1"),
        ({"filter_script": float("nan")}, "filter_script: expected a finite number"),
        ({"filter_unit": "bytes"}, "filter_unit: expected one of words, characters"),
        ({"filter_unit": "characters"}, "filter_unit = characters: read only with filter_min_length"),
    ],
)
def test_values_that_cannot_be_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        validation.validate({"data": fields})


def test_shards_made_with_other_filters_are_made_again(tmp_path):
    """As they are after an interruption, if the filters have been changed since."""
    blocks = [shards.Block("train-00000", [shards.Texts(list(GOOD + BAD["copies"]))])]
    found = {}
    for name, chain in {
        "none": None,
        "copies": chain_of(filter_copies=True),
        "ratio": chain_of(filter_max_ratio=3.0),
    }.items():
        job = shards.ShardJob(str(tmp_path), ("en", "de"), scan=True, filters=chain)
        for is_new in (True, False):
            made = shards.run(job, "train", blocks, 1, lambda size: None)
            assert made.shards[0].is_new == is_new
        found[name] = sum(made.known("filter").tolist()) if chain else 0
    assert found == {"none": 0, "copies": 2 * (filters.NAMES.index("copies") + 1), "ratio": 0}
