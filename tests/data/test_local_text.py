import gzip
import json
import lzma
import os
import pathlib
import re
from typing import Any

import pytest
import zstandard

from tests.helpers.clock import FakeClock
from transformer.config import DataConfig
from transformer.data import local_text, prepared, shards, text_files
from transformer.data.corpus import Split
from transformer.runtime.errors import UserError

LANGUAGES = ("en", "de")
NASTY = [
    "a\rb",
    "a\u2028b",
    "a\u0085b",
    "\ufeffb",
    "a\ufffdb",
    "",
    " \u3000",
    "x" * 100_000,
    "\rCR",
    "a\tb",
    '"😀é',
    "a",
]
MULTI30K = pathlib.Path(__file__).parents[2] / "../shared/data/multi30k"
TATOEBA = pathlib.Path(__file__).parents[2] / "../shared/data/tatoeba"


def write(folder, **texts):
    """Writes files named after the keyword, its "__" a dot, with one line an item."""
    folder.mkdir(exist_ok=True)
    for name, lines in texts.items():
        (folder / name.replace("__", ".")).write_bytes("".join(f"{line}\n" for line in lines).encode())


def config(**fields):
    texts: dict[str, Any] = {key: str(value) for key, value in fields.items()}
    return DataConfig(name="text", **texts)


def names_of(splits):
    return {split: [pathlib.Path(path).name for path in files.paths] for split, files in splits.items()}


def refusal_of(data):
    with pytest.raises(UserError) as error:
        local_text.find_splits(data)
    return str(error.value)


@pytest.mark.reported
@pytest.mark.parametrize("field", ["train_source", "train", "dir"])
def test_a_pipe_is_refused_as_data_before_it_blocks(tmp_path, field):
    write(tmp_path / "data", train__en=["a"], train__de=["b"])
    pipe = tmp_path / "data" / {"train_source": "pipe", "train": "pipe.tsv", "dir": "val.en"}[field]
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # so that opening it does not wait for one
    if field == "dir":
        write(tmp_path / "data", val__de=["b"])
        data = config(dir=tmp_path / "data")
    elif field == "train":
        data = config(train=pipe)
    else:
        data = config(train_source=pipe, train_target=tmp_path / "data" / "train.de")
    message = refusal_of(data)
    os.close(writer)
    assert message.startswith(f"{pipe}: expected a file, which can be read more than once, got a pipe or device")


def build(data, data_dir):
    files = local_text.find_splits(data)
    return prepared.prepare(lambda: local_text.ParallelText(files, data_dir), owned=True)


def pairs_of(opened, split):
    return list(Split(split, "", LANGUAGES, opened.records(split), None))


@pytest.mark.parametrize("stem", ["val", "valid", "validation", "dev"])
def test_a_folder_names_its_splits(tmp_path, stem):
    for name in ("train", stem, "test_2016_flickr", "a.b-c"):
        write(tmp_path, **{f"{name}__en": ["x"], f"{name}__de": ["y"]})
    write(
        tmp_path, test_2016_flickr__fr=["z"], bpe__codes=["e n"], mono__en=["x"], __hidden__en=["x"], __hidden__de=["x"]
    )
    splits = local_text.find_splits(config(dir=tmp_path))
    assert names_of(splits) == {
        "train": ["train.en", "train.de"],
        "validation": [f"{stem}.en", f"{stem}.de"],
        "test_2016_flickr": ["test_2016_flickr.en", "test_2016_flickr.de"],
        "a.b-c": ["a.b-c.en", "a.b-c.de"],
    }


def test_a_folder_may_be_compressed_and_serves_both_directions(tmp_path):
    (tmp_path / "train.en.gz").write_bytes(gzip.compress(b"x\n"))
    (tmp_path / "train.de.zst").write_bytes(zstandard.ZstdCompressor().compress(b"y\n"))
    data = config(dir=tmp_path, source_language="de", target_language="en")
    splits = local_text.find_splits(data)
    assert names_of(splits) == {"train": ["train.de.zst", "train.en.gz"]}
    assert [pair for part in splits["train"].parts() for pair in part.pairs()] == [("y", "x")]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "expected train.en and train.de"),
        (["train.en", "test.en", "test.de"], "expected train.en and train.de"),
        (["train.en", "train.de", "val.de"], "expected val.en and val.de"),
        (
            ["train.en", "train.de", "val.en", "val.de", "dev.en", "dev.de"],
            "several sets of validation files, val, dev",
        ),
        (["train.en", "train.de", "train.de.xz"], "has both train.de and train.de.xz"),
    ],
)
def test_a_folder_that_lacks_files_or_has_too_many_is_refused(tmp_path, names, says):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert says in refusal_of(config(dir=tmp_path))


@pytest.mark.reported
def test_a_folder_of_files_with_both_languages_gets_a_hint(tmp_path):
    for name in ("notes.po", "train.en-de.tsv.xz", "val.en-de.tsv.xz"):
        (tmp_path / name).write_bytes(lzma.compress(b"a\tb\n"))
    said = refusal_of(config(dir=tmp_path))
    assert said.startswith(f"{tmp_path}: expected train.en and train.de")
    assert "found neither. train.en-de.tsv.xz has both languages in one file" in said
    assert f"set data.train={tmp_path}/train.en-de.tsv.xz in place of data.dir" in said
    hinted = config(train=tmp_path / "train.en-de.tsv.xz", valid=tmp_path / "val.en-de.tsv.xz")
    assert set(local_text.find_splits(hinted)) == {"train", "validation"}


def test_missing_files_are_refused(tmp_path):
    write(tmp_path, train__en=["x"], train__de=["y"])
    pair = {"train_source": tmp_path / "train.en", "train_target": tmp_path / "train.de"}
    assert "cannot list the folder" in refusal_of(config(dir=tmp_path / "none"))
    assert "cannot list the folder" in refusal_of(config(dir=tmp_path / "train.en"))
    assert "benchmarks" not in refusal_of(config(dir=tmp_path / "none"))
    assert "run python -m benchmarks.task_data first" in refusal_of(config(dir="runs/tasks/none"))
    assert "run python -m benchmarks.task_data first" in refusal_of(config(dir=tmp_path / "runs" / "tasks" / "none"))
    assert "no such file" in refusal_of(config(**{**pair, "train_target": tmp_path / "none"}))
    assert "expected a file" in refusal_of(config(**{**pair, "train_target": tmp_path}))
    assert "no such file" in refusal_of(config(**pair, valid_source=tmp_path / "a", valid_target=tmp_path / "b"))
    assert "no such file" in refusal_of(config(train=tmp_path / "a.tsv"))
    assert "unknown format '.en'" in refusal_of(config(train=tmp_path / "train.en"))


def test_parquet_files_become_splits(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, rows in {"a": [("x", "y"), ("", "z")], "b": [("u", "v")], "valid": [("s", "t")]}.items():
        table = {"id": range(len(rows)), "target": [row[1] for row in rows], "source": [row[0] for row in rows]}
        parquet.write_table(arrow.table(table), tmp_path / f"{name}.parquet")
    named = {"train": tmp_path / "[ab].parquet", "valid": tmp_path / "valid.parquet", "columns": "source,target"}
    splits = local_text.find_splits(config(**named))
    pairs = {name: [pair for part in files.parts() for pair in part.pairs()] for name, files in splits.items()}
    assert pairs == {"train": [("x", "y"), ("", "z"), ("u", "v")], "validation": [("s", "t")]}
    assert "expected names or numbers" in refusal_of(config(**{**named, "columns": "source"}))


def test_columns_without_tsv_are_refused(tmp_path):
    for name in ("a.jsonl", "a.tsv", "a.po"):
        (tmp_path / name).write_bytes(b"")
    assert "picks columns of .tsv, .parquet or .jsonl" in refusal_of(config(train=tmp_path / "a.po", columns="1,2"))
    assert "expected two keys of .jsonl" in refusal_of(config(train=tmp_path / "a.jsonl", columns="1,2"))
    assert "expected two keys of .jsonl" in refusal_of(config(train=tmp_path / "a.jsonl", columns="source"))
    assert "expected two columns" in refusal_of(config(train=tmp_path / "a.tsv", columns="1"))
    assert "expected two columns" in refusal_of(config(train=tmp_path / "a.tsv", columns="source,target"))
    assert local_text.find_splits(config(train=tmp_path / "a.tsv", columns="2,1"))["train"].columns == "2,1"


def test_sentences_and_their_order_come_back_as_they_were(tmp_path):
    write(tmp_path / "text", train__en=NASTY, train__de=NASTY[::-1], val__en=["", "x"], val__de=["y", " "])
    opened = build(config(dir=tmp_path / "text"), tmp_path / "data")
    assert pairs_of(opened, "train") == list(zip(NASTY, NASTY[::-1], strict=True))
    assert pairs_of(opened, "validation") == [("", "y"), ("x", " ")]


def test_one_file_formats_are_prepared(tmp_path):
    (tmp_path / "train.tsv.xz").write_bytes(lzma.compress(b"n\ty\tx\n" * 3))
    (tmp_path / "valid.jsonl").write_text(json.dumps({"en": "x", "de": "y"}))
    data = config(train=tmp_path / "train.tsv.xz", valid=tmp_path / "valid.jsonl", columns="3,2")
    opened = build(data, tmp_path / "data")
    assert pairs_of(opened, "train") == [("x", "y")] * 3
    assert pairs_of(opened, "validation") == [("x", "y")]


def test_wildcards_match_several_files_in_the_order_of_their_names(tmp_path):
    parts = {"b": ["3", "4"], "a": ["1", "2"], "c": [], "d": ["5"]}
    write(tmp_path / "text", **{f"{name}__{side}": lines for name, lines in parts.items() for side in LANGUAGES})
    (tmp_path / "text" / "a.en").write_bytes(b"\xef\xbb\xbf1\n2")  # no end of the last line
    write(tmp_path / "valid", x__tsv=["6\t6"], y__tsv=["7\t7"])
    pattern = tmp_path / "text" / "[a-d]"
    data = config(train_source=f"{pattern}.en", train_target=f"{pattern}.de", valid=tmp_path / "valid" / "*.tsv")
    opened = build(data, tmp_path / "data")
    assert pairs_of(opened, "train") == [(digit, digit) for digit in "12345"]
    assert pairs_of(opened, "validation") == [("6", "6"), ("7", "7")]
    write(tmp_path / "text", b__de=["3"])
    with pytest.raises(
        UserError, match=r"b\.en has 2 lines and .*b\.de has 1: .* line 2 of .*b\.en has no counterpart"
    ):
        build(data, tmp_path / "data")
    (tmp_path / "text" / "b.de").unlink()
    assert "data.train_source 4, data.train_target 3" in refusal_of(data)
    data = config(train=tmp_path / "*.tsv")
    assert refusal_of(data).startswith("config.data.train: expected files that match")


def test_a_path_with_a_bracket_that_exists_is_that_path(tmp_path):
    write(tmp_path, **{"train[1]__tsv": ["a\tb"], "train1__tsv": ["c\td"]})
    assert names_of(local_text.find_splits(config(train=tmp_path / "train[1].tsv"))) == {"train": ["train[1].tsv"]}


def test_many_shards_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    lines = [f"line {number}" for number in range(99)]
    write(tmp_path / "text", train__en=lines, train__de=lines)
    opened = build(config(dir=tmp_path / "text"), tmp_path / "data")
    assert len(list(opened.folder.glob("*array_record*"))) > 10
    assert pairs_of(opened, "train") == [(line, line) for line in lines]


@pytest.mark.parametrize("stem", ["a-b", "x.y", "all", "train[1]", "sp ace", "ünï%", "a,b=3", "x+y", "a{SPLIT}b"])
def test_a_stem_may_look_like_a_slice(tmp_path, stem):
    for name in ("train", stem):
        write(tmp_path / "text", **{f"{name}__en": [name], f"{name}__de": ["x"]})
    assert pairs_of(build(config(dir=tmp_path / "text"), tmp_path / "data"), stem) == [(stem, "x")]


def test_an_empty_split_has_no_pairs_but_training_must_have_some(tmp_path):
    write(tmp_path / "text", train__en=["x"], train__de=["y"], test__en=[], test__de=[])
    for _ in range(2):
        opened = build(config(dir=tmp_path / "text"), tmp_path / "data")
        assert opened.names == ["train", "test"]
        assert pairs_of(opened, "test") == []
    write(tmp_path / "text", train__en=[], train__de=[])
    with pytest.raises(UserError, match=r"train\.en and .*train\.de: no pairs of sentences to train on"):
        build(config(dir=tmp_path / "text"), tmp_path / "data")


def test_changed_files_are_prepared_anew_and_unchanged_ones_are_not(tmp_path, capfd):
    def prepare(**fields):
        opened = build(config(dir=tmp_path / "text", **fields), tmp_path / "data")
        return opened.folder, "preparing" in capfd.readouterr().err

    write(tmp_path / "text", train__en=["a"], train__de=["b"])
    first, made = prepare()
    assert made
    assert prepare() == (first, False)
    write(tmp_path / "text", train__de=["c"])
    second, made = prepare()
    assert made
    write(tmp_path / "text", test__en=["a"], test__de=["c"])
    third, made = prepare()
    assert made
    fourth, made = prepare(source_language="de", target_language="en")
    assert made
    assert len({first, second, third, fourth}) == 4
    write(tmp_path / "text", train__de=["b"])
    (tmp_path / "text" / "test.en").unlink()
    assert prepare() == (first, False)


def test_columns_and_formats_are_part_of_the_folder_but_names_are_not(tmp_path):
    content = b'{"en": "a", "de": "b"}\t{"en": "c", "de": "d"}\n'
    for name in ("a.tsv", "b.tsv", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
    folders = [
        local_text.ParallelText(
            local_text.find_splits(config(train=tmp_path / name, columns=columns)), tmp_path
        ).data_path
        for name, columns in [("a.tsv", ""), ("b.tsv", ""), ("a.tsv", "1,2"), ("a.tsv", "2,1"), ("a.jsonl", "")]
    ]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 4


@pytest.mark.parametrize(
    ("train", "says"),
    [({"en": ["a", "b"], "de": ["c"]}, "has 2 lines"), ({"en": ["a\0"], "de": ["b"]}, "line 1: holds a NUL")],
)
def test_bad_text_leaves_nothing_behind(tmp_path, train, says):
    write(tmp_path / "text", train__en=train["en"], train__de=train["de"])
    with pytest.raises(UserError, match=says):
        build(config(dir=tmp_path / "text"), tmp_path / "data")
    assert not list((tmp_path / "data").glob("**/*record*"))
    assert not list((tmp_path / "data").glob("**/incomplete*"))


def test_files_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "text", train__en=["a"], train__de=["b"])
    make = local_text.ParallelText._make_shards

    def change(self):
        write(tmp_path / "text", train__de=["c"])
        return make(self)

    monkeypatch.setattr(local_text.ParallelText, "_make_shards", change)
    with pytest.raises(UserError, match="changed while they were being read"):
        build(config(dir=tmp_path / "text"), tmp_path / "data")
    assert not list((tmp_path / "data").glob("**/*record*"))


def test_long_work_reports_its_progress(tmp_path, monkeypatch, capfd):
    clock, decode = FakeClock(monkeypatch), text_files.decode_block
    monkeypatch.setattr(text_files, "decode_block", lambda *args: clock.sleep(1) or decode(*args))
    monkeypatch.setattr(shards, "SHARD_BYTES", 160)
    monkeypatch.setattr(shards, "default_workers", lambda: 1)
    monkeypatch.setattr(prepared, "_MB", 1)
    write(tmp_path / "text", train__en=["a"] * 150, train__de=["b"] * 150)
    build(config(dir=tmp_path / "text"), tmp_path / "data")
    out, err = capfd.readouterr()
    assert out == ""
    assert "data: sentence pairs: train 150\n" in err
    shown = r"data: preparing: 1[0-9]{2}/600 MB · train · 0:00:[0-9]{2} elapsed · 0:0[0-9]:[0-9]{2} left\n"
    assert re.search(shown, err)


@pytest.mark.skipif(not MULTI30K.is_dir(), reason="needs Multi30k in ../shared/data/multi30k")
def test_multi30k_comes_back_as_it_was(tmp_path):
    opened = build(config(dir=MULTI30K), tmp_path)
    assert set(opened.names) == {"train", "validation", "test_2016_flickr"}
    for split, stem in {"train": "train", "validation": "val", "test_2016_flickr": "test_2016_flickr"}.items():
        sides = [(MULTI30K / f"{stem}.{language}").read_bytes().decode() for language in LANGUAGES]
        pairs = pairs_of(opened, split)
        assert ["".join(f"{pair[side]}\n" for pair in pairs) for side in (0, 1)] == sides


@pytest.mark.skipif(not TATOEBA.is_dir(), reason="needs Tatoeba in ../shared/data/tatoeba")
def test_tatoeba_is_read(tmp_path):
    data = config(train=TATOEBA / "valid.en-de.tsv.xz", valid=TATOEBA / "valid.en-nl.tsv.xz")
    opened = build(data, tmp_path)
    lines = lzma.decompress((TATOEBA / "valid.en-de.tsv.xz").read_bytes()).decode().split("\n")[:-1]
    assert ["\t".join(pair) for pair in pairs_of(opened, "train")] == lines
    assert len(lines) == 2658


@pytest.mark.parametrize(
    ("first", "columns", "is_header"),
    [
        ("en\tde", "", True),
        ("\ufeffEN\tDe ", "", True),
        ("de\ten", "", True),
        ("id\tSource\tTarget", "2,3", True),
        ("source\ttarget\tid", "2,3", False),
        ("en\ten", "", False),
        ("the source\tdie Quelle", "", False),
    ],
)
def test_a_header_of_tsv_is_read_with_one_warning(tmp_path, capfd, first, columns, is_header):
    rest = "\tx" * (first.count("\t") - 1)
    (tmp_path / "a.tsv").write_text(f"{first}\na\tb{rest}\n")
    data = config(train=tmp_path / "a.tsv", columns=columns)
    opened = [build(data, tmp_path / "data") for _ in range(2)]
    assert [len(each.records("train")) for each in opened] == [2, 2]
    warnings = [line for line in capfd.readouterr().err.splitlines() if "looks like a header" in line]
    assert len(warnings) == is_header
    assert all(f"warning: {tmp_path}/a.tsv: " in line and "sed 1d" in line for line in warnings)
