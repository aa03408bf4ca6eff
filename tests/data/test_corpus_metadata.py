import collections
import hashlib

import numpy as np
import pytest

from transformer.config import DataConfig
from transformer.data import corpus_metadata, local_text, prepared, shards
from transformer.runtime.errors import UserError

LANGUAGES = ("en", "de")


def open_text(folder, train, **others):
    (folder / "text").mkdir(exist_ok=True)
    for stem, pairs in {"train": train, **others}.items():
        for side, language in enumerate(LANGUAGES):
            text = "".join(f"{pair[side]}\n" for pair in pairs)
            (folder / "text" / f"{stem}.{language}").write_bytes(text.encode())
    files = local_text.find_splits(DataConfig(name="text", dir=str(folder / "text")))
    return prepared.prepare(lambda: local_text.ParallelText(files, folder / "data"), owned=True)


def pairs(count):
    return [(f"en {row}", f"de {row}") for row in range(count)]


def test_blank_pairs_of_training_are_found(tmp_path):
    train = [("a", "b"), ("", "b"), ("a", ""), (" \t\r\u2028\u3000", "b"), ("\ufeff", "\ufffd"), ("", "")]
    facts = corpus_metadata.load_or_compute_metadata(open_text(tmp_path, train, val=[("", ""), ("a", "b")]), LANGUAGES)
    assert facts.blank == [1, 2, 3, 5]
    assert facts.held_out == []
    assert facts.pairs == {"train": 6, "validation": 2}


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (99, 1), (250, 2), (1000, 10)])
def test_about_a_hundredth_is_held_out(tmp_path, count, held_out):
    facts = corpus_metadata.load_or_compute_metadata(open_text(tmp_path, [("", ""), *pairs(count)]), LANGUAGES)
    assert len(facts.held_out) == held_out
    assert facts.held_out == sorted(set(facts.held_out) - {0})


def test_no_more_than_the_most_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_metadata, "MAX_VALIDATION_PAIRS", 3)
    assert len(corpus_metadata.load_or_compute_metadata(open_text(tmp_path, pairs(1000)), LANGUAGES).held_out) == 3


def test_the_held_out_pairs_follow_the_sentence_and_not_its_position(tmp_path):
    chosen = []
    for name, train in {"one": pairs(500), "other": [("new", "x"), *pairs(500)[::-1]]}.items():
        (tmp_path / name).mkdir()
        facts = corpus_metadata.load_or_compute_metadata(open_text(tmp_path / name, train), LANGUAGES)
        chosen.append({train[row][0] for row in facts.held_out})
    assert chosen[0] == chosen[1]
    keys = [hashlib.blake2b(source.encode(), digest_size=8).digest()[::-1] for source, _ in pairs(500)]
    assert chosen[0] == {f"en {row}" for row in np.argsort(keys)[:5]}


def test_equal_sources_fall_on_the_same_side(tmp_path):
    train = [(f"en {row % 100}", f"de {row}") for row in range(400)]
    facts = corpus_metadata.load_or_compute_metadata(open_text(tmp_path, train), LANGUAGES)
    counts = collections.Counter(train[row][0] for row in facts.held_out)
    assert list(counts.values()) == [4]


def test_a_frequent_sentence_does_not_fill_or_stop_the_choice():
    keys = np.array([1] * 50 + list(range(2, 952)), np.uint64)
    assert np.flatnonzero(corpus_metadata._select_validation(keys)).tolist() == list(range(50, 60))
    keys = np.array([1, 1, 1, 2, 2, 3, 3, 3], np.uint64)
    assert np.flatnonzero(corpus_metadata._select_validation(keys)).tolist() == [3, 4]


def select_by_sorting(hashes):
    """The choice by sorting all hashes."""
    values, counts = np.unique(hashes, return_counts=True)
    remaining, selected = min(max(len(hashes) // 100, 1), corpus_metadata.MAX_VALIDATION_PAIRS), []
    for value, count in zip(values, counts, strict=True):
        if count <= remaining:
            selected.append(value)
            remaining -= count
    return np.isin(hashes, selected or values[np.argmin(counts)])


@pytest.mark.parametrize("distinct", [2, 5, 40, 3000])
@pytest.mark.parametrize("size", [2, 99, 1000, 5000])
def test_the_choice_without_sorting_all_is_that_of_sorting(monkeypatch, distinct, size):
    monkeypatch.setattr(corpus_metadata, "_CANDIDATES", 4)
    rng = np.random.default_rng(distinct * size)
    hashes = np.concatenate([[0, 1], rng.zipf(1.3, size) * 977 % distinct]).astype(np.uint64)
    np.testing.assert_array_equal(corpus_metadata._select_validation(hashes), select_by_sorting(hashes))


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ([("", "b"), ("a", " ")], "all 2 training pairs have a blank side"),
        ([("a", "b"), ("a", "c")], "one distinct source sentence"),
        ([("a", "b")], "one distinct source sentence"),
    ],
)
def test_nothing_left_to_train_on_is_refused(tmp_path, train, says):
    opened = open_text(tmp_path, train)
    for _ in range(2):
        with pytest.raises(UserError, match=says):
            corpus_metadata.load_or_compute_metadata(opened, LANGUAGES)


def test_digests_are_of_the_pairs_and_their_order_alone(tmp_path, monkeypatch):
    digests = []
    changed = [*pairs(20)[:-1], ("en 19", "de 1x")]
    shifted = [*pairs(20)[:-1], ("en 19d", "e 19")]
    for number, train in enumerate([pairs(20), pairs(20), changed, shifted, pairs(20)[::-1], pairs(19)]):
        monkeypatch.setattr(shards, "SHARD_BYTES", 40 if number == 1 else 1 << 20)
        (tmp_path / str(number)).mkdir()
        facts = corpus_metadata.load_or_compute_metadata(
            open_text(tmp_path / str(number), train, test=pairs(3)), LANGUAGES
        )
        digests.append(facts.digests)
    assert digests[0] == digests[1]
    assert len({digest["train"] for digest in digests}) == 5
    assert len({digest["test"] for digest in digests}) == 1


def test_each_direction_has_its_own_facts(tmp_path):
    opened = open_text(tmp_path, [(f"en {row}", f"de {row // 2}") for row in range(400)])
    forth, back = (
        corpus_metadata.load_or_compute_metadata(opened, languages) for languages in (LANGUAGES, LANGUAGES[::-1])
    )
    assert forth.digests["train"] != back.digests["train"]
    assert forth.held_out != back.held_out
    assert corpus_metadata.load_or_compute_metadata(opened, LANGUAGES) == forth


def test_cached_split_metadata_is_read_again_unless_damaged(tmp_path, monkeypatch):
    opened = open_text(tmp_path, [("", ""), *pairs(200)])
    facts = corpus_metadata.load_or_compute_metadata(opened, LANGUAGES)
    path = opened.folder / "contents.en-de.json"
    read = corpus_metadata._scan
    monkeypatch.setattr(corpus_metadata, "_scan", lambda *_: pytest.fail("read again"))
    assert corpus_metadata.load_or_compute_metadata(opened, LANGUAGES) == facts
    monkeypatch.setattr(corpus_metadata, "_scan", read)
    content = path.read_text()
    for damaged in (
        "",
        "x",
        content[:-9],
        content.replace('"blank": [0]', '"blank": [1]'),
        content + "x",
        content + "é",
    ):
        path.write_bytes(damaged.encode("latin-1"))  # é alone is no UTF-8
        assert corpus_metadata.load_or_compute_metadata(opened, LANGUAGES) == facts
        assert path.read_text() == content
    kept_of_other_files = open_text(tmp_path, pairs(200))
    (kept_of_other_files.folder / "contents.en-de.json").write_text(content)
    assert corpus_metadata.load_or_compute_metadata(kept_of_other_files, LANGUAGES).blank == []


def test_rows_without_some_are_those_of_the_array():
    for total, excluded in ((5, [1, 3]), (6, [0, 5, 1]), (4, []), (3, [0, 1, 2]), (1000, range(3, 1000, 7))):
        rows, wanted = corpus_metadata.RowsExcept(total, excluded), np.setdiff1d(np.arange(total), list(excluded))
        assert len(rows) == len(wanted)
        assert [int(rows[i]) for i in range(len(rows))] == wanted.tolist()
        for start in range(0, len(rows), 3):
            np.testing.assert_array_equal(rows[start : start + 5], wanted[start : start + 5])
        digest = hashlib.sha256(b"abc" + wanted.astype("<i8").tobytes()).hexdigest()
        assert corpus_metadata.split_digest("abc", rows) == digest
