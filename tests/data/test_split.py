import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from transformer.config import DataConfig
from transformer.data import corpus
from transformer.data import tokenizer as tokenizers
from transformer.data.corpus import Split
from transformer.data.corpus_metadata import RowsExcept
from transformer.data.prepared import RecordReader
from transformer.data.vocabulary import VocabularyText
from transformer.runtime.errors import UserError


class ListRecords(RecordReader):
    """Records that lie in a list, with a count of how many were read."""

    def __init__(self, records):
        super().__init__([], [len(records)])
        self._records = records
        self.count = 0

    def read(self, first, last):
        self.count += last - first
        return self._records[first:last]


def example(**texts):
    message = tf_example_pb2.Example()
    for key, text in texts.items():
        message.features.feature[key].bytes_list.value.append(text)
    return message.SerializeToString()


def make(count=10, rows=None, languages=("en", "de")):
    records = ListRecords([example(en=f"e{i}".encode(), de=f"d{i}".encode(), fr=b"f") for i in range(count)])
    return Split("train", "digest", languages, records, np.array(rows) if isinstance(rows, list) else rows)


@pytest.mark.parametrize("rows", [None, [0, 1, 2, 3], [2, 5, 9], [9], list(range(0, 10, 2))])
def test_pairs_by_number_and_in_turn_are_the_same(monkeypatch, rows):
    monkeypatch.setattr(corpus, "_CHUNK_PAIRS", 4)
    split = make(rows=rows)
    expected = [(f"e{i}", f"d{i}") for i in (range(10) if rows is None else rows)]
    assert len(split) == len(expected)
    assert [split[i] for i in range(len(split))] == expected
    assert list(split) == expected
    assert split.sources() == [source for source, _ in expected]
    assert split.targets() == [target for _, target in expected]


@pytest.mark.parametrize("rows", [None, [2, 5, 9], RowsExcept(10, [0, 3])])
def test_some_pairs_are_selected_perhaps_several_times(rows):
    split = make(rows=rows)
    assert list(split.select(np.array([0, 2, 2]))) == [split[0], split[2], split[2]]


@pytest.mark.parametrize(("tokenizer", "most", "numbers"), [
    ("bpe", 20, range(10)), ("bpe", 6, [0, 3, 6]), ("unigram", 2, [0]), ("my.codes", 6, range(10)),
])  # fmt: skip
def test_the_vocabulary_is_trained_on_a_sample_of_a_large_corpus(monkeypatch, capsys, tokenizer, most, numbers):
    monkeypatch.setitem(tokenizers.MAX_TRAINING_LINES, tokenizer, most)
    text = VocabularyText(DataConfig(tokenizer=tokenizer), SimpleNamespace(train=make()))
    assert list(text) == [line for number in numbers for line in (f"e{number}", f"d{number}")]
    assert len(text) == len(list(text))
    assert ("the vocabulary is trained on" in capsys.readouterr().err) == (len(text) < 20)


def test_the_languages_choose_the_direction():
    assert make(languages=("fr", "en"))[3] == ("f", "e3")


def test_numbers_out_of_range_are_refused():
    for index in (-1, 10):
        with pytest.raises(IndexError, match="expected 0 ≤ index < 10"):
            make()[index]
    with pytest.raises(TypeError):
        make()["0"]
    assert make()[np.int64(9)] == ("e9", "d9")


def test_a_split_can_be_pickled():
    split = pickle.loads(pickle.dumps(make(rows=[1, 2])))
    assert (split.name, split.digest, list(split)) == ("train", "digest", [("e1", "d1"), ("e2", "d2")])


def test_rows_far_apart_are_not_read_with_all_between():
    split = make(10_000, rows=[0, 5000, 9999])
    assert len(list(split)) == 3
    assert split._records.count == 3


def test_a_split_of_no_pairs():
    split = Split("test", "", ("en", "de"), RecordReader([], []), None)
    assert len(split) == 0
    assert list(split) == split.sources() == []
    with pytest.raises(IndexError):
        split[0]


@pytest.mark.parametrize(
    "record",
    [b"\xff", example(en=b"a"), example(en=b"a", de=b"\xff"), b""],
    ids=["no example", "one side", "not UTF-8", "empty"],
)
def test_records_that_are_no_pair_are_refused(record):
    split = Split("train", "", ("en", "de"), ListRecords([record]), None)
    for read in (list, lambda split: split[0]):
        with pytest.raises(UserError, match="the prepared data of split 'train' cannot be read"):
            read(split)


def test_threads_may_share_a_split():
    split = make(100)
    wrong: list[int] = []

    def work():
        wrong.extend(i for i in range(100) if split[i] != (f"e{i}", f"d{i}"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.reported
def test_line_ends_and_line_breaks_are_no_part_of_a_sentence():
    texts = ["a\r\n", "a\r\nb", "a \r\n\r\n b\n", "a\rb", "a\r", "\n"]
    records = ListRecords([example(en=text.encode(), de=b"d\r") for text in texts])
    split = Split("train", "", ("en", "de"), records, None)
    assert split.sources() == ["a", "a b", "a b", "a\rb", "a\r", ""]
    assert split[1] == ("a b", "d\r")
    assert [source for source, _ in split.raw_pairs()] == texts
    of_lines = Split("train", "", ("en", "de"), records, None, strip_cr=True)
    assert of_lines[4] == ("a", "d")
    assert of_lines.sources()[3] == "a\rb"
