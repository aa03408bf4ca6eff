"""The folder of a synthetic corpus: shards that appear whole, claims, fixed settings, and two equal sides."""

import gzip
import hashlib
import itertools
import json
import lzma

import pytest

from transformer.data import synthetic_corpus
from transformer.data.synthetic_corpus import SyntheticCorpus
from transformer.runtime.errors import StoppedError, UserError

LINES = ["one", "", "three\r", "four", "fünf\u2028", " ", "seven"]


@pytest.fixture
def text(tmp_path):
    """Three files, of which two are compressed; one ends without a line feed."""
    (tmp_path / "a.de").write_bytes("\ufeffone\n\nthree\r\r\n".encode())
    (tmp_path / "b.de.gz").write_bytes(gzip.compress("four\nfünf\u2028\n".encode()))
    (tmp_path / "c.de.xz").write_bytes(lzma.compress(b" \nseven"))
    return synthetic_corpus.scan([str(tmp_path / name) for name in ("a.de", "b.de.gz", "c.de.xz")])


def make(folder, text, side="target", shard_lines=3, **settings):
    corpus = SyntheticCorpus(folder, text, ("de", "en"), side, shard_lines, {"tag": "", **settings}, {"input": []})
    corpus.open()
    return corpus


def translate(corpus, shards=None):
    """Each line in upper case."""
    for shard in corpus.read(corpus.missing() if shards is None else shards):
        corpus.write(shard.number, [line.upper() for line in shard.lines])


def test_lines_of_all_files_are_counted_and_cut_into_shards(text, tmp_path):
    assert list(text.lines()) == LINES
    assert text[1:] == (7, hashlib.sha256("".join(f"{line}\n" for line in LINES).encode()).hexdigest())
    corpus = make(tmp_path / "out", text)
    assert corpus.num_shards == 3
    assert [shard.lines for shard in corpus.read(range(3))] == [LINES[:3], LINES[3:6], LINES[6:]]
    assert [shard.number for shard in corpus.read([2, 0])] == [0, 2]
    assert [corpus.num_lines(shards) for shards in ([0, 1, 2], [2], [0, 2], [])] == [7, 1, 4, 0]
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="empty: expected lines to translate, found none"):
        synthetic_corpus.scan([str(tmp_path / "empty")])


@pytest.mark.parametrize("side", ["source", "target"])
def test_both_sides_have_a_file_with_equally_many_lines(text, tmp_path, side):
    corpus = make(tmp_path / "out", text, side)
    translate(corpus)
    assert corpus.missing() == []
    assert not corpus.is_complete()
    corpus.join()
    assert corpus.is_complete()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock", "manifest.json", "train.de", "train.en",
    ]  # fmt: skip
    assert (tmp_path / "out" / "train.de").read_bytes().decode() == "".join(f"{line}\n" for line in LINES)
    assert (tmp_path / "out" / "train.en").read_bytes().decode() == "".join(f"{line.upper()}\n" for line in LINES)
    names = ["train.de", "train.en"]
    assert [path.name for path in corpus.paths] == (names if side == "source" else names[::-1])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["complete"], manifest["source"], manifest["target"]) == (True, *(p.name for p in corpus.paths))
    again = make(tmp_path / "out", text, side)
    assert again.missing() == []
    again.join()


def test_a_shard_that_another_holds_or_that_is_there_is_not_claimed(text, tmp_path):
    one, other = make(tmp_path / "out", text), make(tmp_path / "out", text)
    with one.claim(0) as first, other.claim(0) as second, other.claim(1) as third:
        assert (first, second, third) == (True, False, True)
        translate(one, [0])
    with other.claim(0) as there, other.claim(1) as free:
        assert (there, free) == (False, True)
    assert other.missing() == [1, 2]
    translate(one)
    one.join()
    with other.claim(2) as claimed:  # whose folder is gone
        assert not claimed
    assert other.missing() == []
    assert not (tmp_path / "out" / "shards").exists()


def test_without_locks_a_warning_says_what_to_do(text, tmp_path, monkeypatch, capsys):
    corpus = make(tmp_path / "out", text)

    def refuse(*_):
        raise OSError("no locks")

    monkeypatch.setattr(synthetic_corpus.fcntl, "flock", refuse)
    for index in range(3):
        with corpus.claim(index) as claimed:
            assert claimed
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be locked (no locks): if several commands work on it, give each a part of its own" in line


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tag": "<bt>"}, 'tag: "" → "<bt>"'),
        ({"shard_lines": 4}, "shard_lines: 3 → 4"),
        ({"side": "source"}, 'input_side: "target" → "source"'),
        ({"decode": {"beam_size": 2}}, "decode.beam_size: null → 2"),
    ],
)
def test_another_setting_is_refused_by_its_name(text, tmp_path, changed, message):
    make(tmp_path / "out", text)
    make(tmp_path / "out", text)
    with pytest.raises(UserError) as error:
        make(tmp_path / "out", text, **changed)
    assert f"holds a corpus made with other settings: {message}. Give the same ones" in str(error.value)


def test_other_text_is_refused(text, tmp_path):
    make(tmp_path / "out", text)
    (tmp_path / "b.de.gz").write_bytes(gzip.compress(b"four\nfive\n"))
    with pytest.raises(UserError, match=r'other settings: input_sha256: "[0-9a-f]{15}… → "[0-9a-f]{15}…\. Give'):
        make(tmp_path / "out", synthetic_corpus.scan(text.paths))
    corpus = make(tmp_path / "again", text)  # as if it changed while it is translated
    translate(corpus)
    with pytest.raises(UserError, match="changed while they were translated"):
        corpus.join()
    assert not corpus.is_complete()
    assert not list((tmp_path / "again").glob("train.*"))


@pytest.mark.parametrize("name", ["train.de", "train.en.xz", "shards"])
def test_files_of_others_are_not_overwritten(text, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()
    with pytest.raises(UserError, match=f"out: holds {name}, but no manifest.json"):
        make(tmp_path / "out", text)


def test_a_manifest_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "out").mkdir()
    for content in ("[]", "{", "\xff"):
        (tmp_path / "out" / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest\.json: expected the manifest of a corpus"):
            make(tmp_path / "out", text)


def test_a_damaged_shard_is_named(text, tmp_path):
    corpus = make(tmp_path / "out", text)
    translate(corpus)
    (tmp_path / "out" / "shards" / "00001").write_text("short\n")
    with pytest.raises(
        UserError, match="shards/00001: expected 3 lines, got 1: it is damaged; delete it and run again"
    ):
        corpus.join()
    (tmp_path / "out" / "shards" / "00001").unlink()
    assert corpus.missing() == [1]
    translate(corpus)
    corpus.join()
    assert corpus.is_complete()


def test_a_signal_while_shards_are_joined_leaves_nothing_partial(text, tmp_path):
    corpus = make(tmp_path / "out", text)
    translate(corpus)
    count = itertools.count()

    def stop():
        if next(count) == 1:
            raise StoppedError(15, "")

    with pytest.raises(StoppedError):
        corpus.join(stop)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "manifest.json", "shards"]
    corpus.join(stop)
    assert corpus.is_complete()
