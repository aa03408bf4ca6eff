import gzip
import importlib.util
import json
import lzma

import pytest
import zstandard

from transformer.data import parallel_formats
from transformer.runtime.errors import UserError

LANGUAGES = ("en", "de")
TMX = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE tmx SYSTEM "tmx14.dtd">
<tmx version="1.4"><header srclang="en"><prop type="x">not a seg</prop></header><body>{}</body></tmx>
"""
PO = """# a comment
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

"""


def pairs_of(path, content, columns=""):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(parallel_formats.read_pairs(path, LANGUAGES, columns))


def refusal_of(path, content, columns=""):
    with pytest.raises(UserError) as error:
        pairs_of(path, content, columns)
    return str(error.value)


def unit(**texts):
    return "<tu>" + "".join(f'<tuv xml:lang="{k}"><seg>{v}</seg></tuv>' for k, v in texts.items()) + "</tu>"


def test_tsv_is_source_tab_target_without_quoting(tmp_path):
    content = '"a\tb"\n\t\nc\u2028c\td\re\n" \'\ttail'
    expected = [('"a', 'b"'), ("", ""), ("c\u2028c", "d\re"), ("\" '", "tail")]
    assert pairs_of(tmp_path / "a.tsv", content) == expected


@pytest.mark.reported
@pytest.mark.parametrize("tail", ["\r\n", ""])
def test_cr_lf_ends_lines_of_tsv(tmp_path, tail):
    result = pairs_of(tmp_path / "a.tsv", f"a\tb\r\n\t\r\nc\r\td\r\r\ne\tf{tail}")
    assert result == [("a", "b"), ("", ""), ("c\r", "d\r"), ("e", "f")]


@pytest.mark.parametrize(
    ("extension", "pack"),
    [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.ZstdCompressor().compress)],
)
def test_a_compressed_file_is_of_the_format_before_its_compression(tmp_path, extension, pack):
    assert pairs_of(tmp_path / f"a.TSV{extension}", pack(b"a\tb\n")) == [("a", "b")]


@pytest.mark.parametrize(("content", "got"), [("a\tb\nc\n", 1), ("a\tb\nc\td\te\n", 3), ("a\tb\n\nc\td\n", 1)])
def test_tsv_lines_of_another_width_are_refused(tmp_path, content, got):
    message = refusal_of(tmp_path / "a.tsv", content)
    assert "a.tsv, line 2: expected two columns" in message
    assert f"got {got};" in message


@pytest.mark.parametrize(("columns", "pair"), [("1,2", ("a", "b")), (" 3 , 1 ", ("c", "a"))])
def test_columns_picks_two(tmp_path, columns, pair):
    assert pairs_of(tmp_path / "a.tsv", "a\tb\tc\n", columns) == [pair]


def test_columns_beyond_the_line_are_refused(tmp_path):
    message = refusal_of(tmp_path / "a.tsv", "a\tb\tc\na\tb\n", "1,3")
    assert "a.tsv, line 2: config.data.columns picks column 3, the line has 2" in message


@pytest.mark.parametrize("columns", ["1", "1,2,3", "0,1", "-1,2", "a,b", "1;2", "1,1", ",", "1,²"])
def test_columns_that_are_not_two_are_refused(tmp_path, columns):
    assert refusal_of(tmp_path / "a.tsv", "a\tb\n", columns).startswith("config.data.columns: ")


def test_jsonl_takes_the_keys_of_the_two_languages(tmp_path):
    records = [{"en": "a\u2028\r\t", "de": "b", "fr": 3}, {"de": "", "en": "\ufeff😀"}]
    content = "".join(json.dumps(record, ensure_ascii=index == 0) + "\n" for index, record in enumerate(records))
    assert pairs_of(tmp_path / "a.jsonl", content) == [("a\u2028\r\t", "b"), ("\ufeff😀", "")]


@pytest.mark.parametrize("columns", ["source,target", " source , target "])
def test_columns_names_the_keys_of_jsonl(tmp_path, columns):
    content = '{"source": "a", "target": "b", "en": "x"}\n{"translation": {"target": "d", "source": "c"}}\n'
    assert pairs_of(tmp_path / "a.jsonl", content, columns) == [("a", "b"), ("c", "d")]
    assert pairs_of(tmp_path / "b.jsonl", '{"en": "a", "de": "b", "2": "c"}\n', "2,3") == [("a", "b")]  # of a TSV file
    assert "line 1: expected the key 'target', got 'source'" in refusal_of(
        tmp_path / "c.jsonl", '{"source": ""}', columns
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a", "b"]', "expected an object with the keys en and de"),
        ('{"en": "a"}', "expected the key 'de', got 'en'; name two with config.data.columns, as in 'source,target'"),
        ("{}", "expected the key 'en', got none"),
        ('{"en": "a", "de": 3}', "expected text under 'de', got 3"),
        ('{"en": null, "de": "a"}', "expected text under 'en', got None"),
        ('{"en": "a\\nb", "de": "a"}', "holds a line break"),
        ('{"en": "a\\u0000b", "de": "a"}', "holds a NUL character"),
        ('{"en": "a\\ud800b", "de": "a"}', "half a surrogate pair"),
    ],
)
def test_jsonl_records_that_are_no_pair_are_refused(tmp_path, line, says):
    whole = '{"en": "a", "de": "b"}'
    message = refusal_of(tmp_path / "a.jsonl", f"{whole}\n{line}\n{whole}\n")
    assert "a.jsonl, line 2: " in message
    assert says in message


@pytest.mark.reported
@pytest.mark.parametrize("end", ["\n", "\n\n \n", "\n\r\n"])
def test_blank_last_lines_are_no_records(tmp_path, end):
    assert pairs_of(tmp_path / "a.tsv", f"a\tb\nc\td\n{end}") == [("a", "b"), ("c", "d")]
    assert pairs_of(tmp_path / "b.tsv", f"a\tb\tc\n{end}", "1,3") == [("a", "c")]
    assert pairs_of(tmp_path / "a.jsonl", f'{{"en": "a", "de": "b"}}\n{end}') == [("a", "b")]


def test_blank_lines_before_others_are_still_refused_by_number(tmp_path):
    assert "a.tsv, line 2: expected two columns" in refusal_of(tmp_path / "a.tsv", "a\tb\n\n\nc\td\n\n")


@pytest.mark.reported
def test_jsonl_of_hugging_face_is_read(tmp_path):
    content = '{"id": "0", "translation": {"en": "a", "de": "b"}}\n{"translation": {"de": "d", "en": "c", "fr": ""}}\n'
    assert pairs_of(tmp_path / "a.jsonl", content) == [("a", "b"), ("c", "d")]
    message = refusal_of(tmp_path / "b.jsonl", '{"translation": {"en": "a", "fr": "b"}}\n')
    assert "b.jsonl, line 1: expected the key 'de', got 'en', 'fr'" in message
    message = refusal_of(tmp_path / "c.jsonl", '{"translation": "a"}\n')
    assert "c.jsonl, line 1: expected the key 'en', got 'translation'" in message


def test_tmx_takes_the_units_with_both_languages(tmp_path):
    body = unit(en="a", de="b") + unit(en="only") + unit(de="d", fr="f", en="e &lt; &#233;\u2028") + unit(en="", de="")
    assert pairs_of(tmp_path / "a.tmx", TMX.format(body)) == [("a", "b"), ("e < é\u2028", "d"), ("", "")]


def test_tmx_prefers_the_very_language_to_its_variants(tmp_path):
    body = unit(**{"EN-us": "color", "DE_at": "Farbe"}) + unit(**{"en-US": "color", "EN": "hue", "de": "Farbton"})
    assert pairs_of(tmp_path / "a.tmx", TMX.format(body)) == [("color", "Farbe"), ("hue", "Farbton")]


def test_tmx_leaves_out_inline_codes_and_keeps_highlighted_text(tmp_path):
    seg = 'Click <bpt i="1">&lt;b&gt;</bpt><hi>here</hi><ept i="1">x</ept><ph>p<sub>note</sub>q</ph> now<it>z</it>.'
    assert pairs_of(tmp_path / "a.tmx", TMX.format(unit(en=seg, de="x"))) == [("Click herenote now.", "x")]


def test_tmx_line_breaks_are_layout(tmp_path):
    assert pairs_of(tmp_path / "a.tmx", TMX.format(unit(en="\n  a\n   b \n", de=" c "))) == [("a b", " c ")]


def test_tmx_larger_than_a_chunk_is_read_whole(tmp_path):
    body = "".join(unit(en=f"é {i}", de="x" * 50) for i in range(5000))
    pairs = pairs_of(tmp_path / "a.tmx", TMX.format(body))
    assert [source for source, _ in pairs] == [f"é {i}" for i in range(5000)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (TMX.format("<tu>"), "a.tmx, line 3: not well-formed XML"),
        ("", "a.tmx, line 1: not well-formed XML"),
        (TMX.format(unit(en="a", fr="b")), "no unit has both en and de; languages in it: en, fr"),
        ('<!DOCTYPE tmx [<!ENTITY a "aaaa">]><tmx>&a;</tmx>', "declares the XML entity 'a'"),
        ('<!DOCTYPE tmx [<!ENTITY % p SYSTEM "/etc/passwd">]><tmx/>', "declares the XML entity 'p'"),
        ('<!DOCTYPE tmx [<!ENTITY x SYSTEM "file:///etc/passwd">]><tmx>&x;</tmx>', "declares the XML entity 'x'"),
    ],
)
def test_tmx_that_cannot_be_taken_is_refused(tmp_path, content, says):
    assert says in refusal_of(tmp_path / "a.tmx", content)


@pytest.mark.parametrize("text", ["caf&eacute;", "a <it>&eacute;</it>"])
def test_tmx_with_an_entity_of_a_dtd_is_refused_and_not_left_out(tmp_path, text):
    message = refusal_of(tmp_path / "a.tmx", TMX.format(unit(en="a", de="b") + "\n" + unit(en=text, de="b")))
    assert message == f"{tmp_path}/a.tmx, line 4: the entity &eacute; is not defined; write its text out"
    assert pairs_of(tmp_path / "b.tmx", TMX.format(unit(en="&amp;&#233;", de="b"))) == [("&é", "b")]


@pytest.mark.parametrize("encoding", ["gb2312", "shift_jis", "big5", "klingon"])
def test_tmx_in_an_encoding_that_expat_lacks_is_refused(tmp_path, encoding):
    message = refusal_of(tmp_path / "a.tmx", TMX.replace("UTF-8", encoding).format(unit(en="a", de="b")))
    assert message.endswith(f"a.tmx: the encoding {encoding} cannot be read; convert the file to UTF-8")


@pytest.mark.parametrize(
    ("languages", "codes", "pair"),
    [
        (("pt-BR", "pt-PT"), ("pt-br", "en"), None),
        (("pt-BR", "pt-PT"), ("pt",), None),
        (("pt-BR", "pt-PT"), ("pt-PT", "pt"), ("pt", "pt-PT")),
        (("pt_BR", "pt"), ("pt-br", "pt-pt"), ("pt-br", "pt-pt")),
        (("zh", "zh-TW"), ("zh-TW", "zh-CN"), ("zh-CN", "zh-TW")),
        (("en", "de"), ("de-AT", "en-US", "de"), ("en-US", "de")),
    ],
)
def test_no_text_of_a_tmx_unit_is_its_own_translation(languages, codes, pair):
    assert parallel_formats._tmx_pair({code.lower(): code for code in codes}, languages) == pair


def test_tmx_of_no_units_is_empty(tmp_path):
    assert pairs_of(tmp_path / "a.tmx", TMX.format("")) == []


def test_po_takes_translated_entries(tmp_path):
    content = (
        PO + 'msgid "Open"\nmsgstr "Öffnen"\n\n#, fuzzy\nmsgid "Close"\nmsgstr "Auf"\n\nmsgid "Save"\nmsgstr ""\n\n'
        'msgctxt "menu"\nmsgid "Open"\nmsgstr "Auf"\n\nmsgid "%d file"\nmsgid_plural "%d files"\n'
        'msgstr[0] "%d Datei"\nmsgstr[1] "%d Dateien"\n\n#~ msgid "Old"\n#~ msgstr "Alt"\n'
    )
    assert pairs_of(tmp_path / "a.po", content) == [("Open", "Öffnen"), ("Open", "Auf")]


@pytest.mark.parametrize("language", ["en", "en_US"])
def test_po_into_the_source_language_is_refused(tmp_path, language):
    content = PO.replace('UTF-8\\n"', f'UTF-8\\n"\n"Language: {language}\\n"') + 'msgid "Open"\nmsgstr "Öffnen"\n'
    assert f"translates into {language}, the source language" in refusal_of(tmp_path / "a.po", content)
    for other in ("de", "de_AT", ""):
        assert pairs_of(tmp_path / "a.po", content.replace(f"Language: {language}", f"Language: {other}"))


def test_po_line_breaks_become_spaces_and_other_separators_stay(tmp_path):
    content = PO + 'msgid ""\n"one\\n"\n"two\\n"\nmsgstr "eins\\n\\n zwei\u2028\u0085\\tdrei\\n"\n'
    assert pairs_of(tmp_path / "a.po", content) == [("one two", "eins zwei\u2028\u0085\tdrei")]


def test_po_that_cannot_be_parsed_is_refused_by_line(tmp_path):
    assert "a.po, line 6: invalid PO file" in refusal_of(tmp_path / "a.po", PO + 'msgid "a"\nnonsense\n')


def test_bytes_that_are_not_text_are_refused_in_every_format(tmp_path):
    for extension, line in {
        ".tsv": b"a\tb\xff\n",
        ".jsonl": b'{"en": "\xff", "de": ""}\n',
        ".po": b'msgid "\xff"\n',
    }.items():
        assert f"a{extension}, line 1: not UTF-8" in refusal_of(tmp_path / f"a{extension}", line)
    assert "not well-formed XML" in refusal_of(tmp_path / "a.tmx", TMX.format("<tu>").encode() + b"\xff")


@pytest.mark.parametrize("extension", [".tsv", ".jsonl", ".po"])
def test_a_file_of_no_bytes_has_no_pairs(tmp_path, extension):
    assert pairs_of(tmp_path / f"a{extension}", b"") == []


@pytest.mark.parametrize("name", ["a.txt", "a", "a.gz", "a.csv.gz", "train.en"])
def test_an_unknown_extension_is_refused_with_the_known_ones(tmp_path, name):
    message = refusal_of(tmp_path / name, b"a\tb\n")
    assert name in message
    assert ".tsv, .jsonl, .parquet, .tmx, .po" in message


@pytest.mark.parametrize(
    ("extension", "content"),
    [
        (".tsv", "x\ty\n" * 1000),
        (".jsonl", '{"en": "x", "de": "y"}\n' * 1000),
        (".tmx", TMX.format(unit(en="x", de="y") * 1000)),
        (".po", PO + 'msgid "x"\nmsgstr "y"\n\n' * 1000),
    ],
)
def test_a_truncated_archive_is_refused_in_every_format(tmp_path, extension, content):
    packed = lzma.compress(content.encode())
    assert len(pairs_of(tmp_path / f"a{extension}.xz", packed)) == 1000
    assert "damaged or truncated archive" in refusal_of(tmp_path / f"a{extension}.xz", packed[:-20])


PAIRS = [("one", "eins"), ("", "  two\u2028"), ("three\rthree", "drei")]


def parquet_of(path, table, **options):
    """Writes a table, or the columns of one."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(table) if isinstance(table, dict) else table, path, **options)
    return path


def parquet_refusal(path, columns=""):
    with pytest.raises(UserError) as error:
        list(parallel_formats.read_pairs(path, LANGUAGES, columns))
    return str(error.value)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("id", "en", "de"), ""),
        (("id", "source", "target"), "source, target"),
        (("id", "source", "target"), "2,3"),
        (("1", "3", "2"), "3,2"),  # names come before numbers
    ],
)
def test_parquet_columns_are_picked_by_language_name_or_number(tmp_path, names, columns):
    table = dict(zip(names, [range(3), *([pair[side] for pair in PAIRS] for side in (0, 1))], strict=True))
    path = parquet_of(tmp_path / "a.parquet", table, row_group_size=2)
    assert list(parallel_formats.read_pairs(path, LANGUAGES, columns)) == PAIRS


def test_parquet_may_have_the_layout_of_hugging_face_and_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_formats, "_PARQUET_ROWS", 2)
    texts = [{"de": target, "en": source, "fr": "x"} for source, target in PAIRS * 5]
    path = parquet_of(tmp_path / "a.parquet", {"translation": texts, "n": range(15)}, compression="zstd")
    assert list(parallel_formats.read_pairs(path, LANGUAGES)) == PAIRS * 5
    path = parquet_of(tmp_path / "b.parquet", {"translation": [{"en": "a", "fr": "b"}]})
    assert "expected 'de' in the column 'translation', got en, fr" in parquet_refusal(path)


def test_parquet_of_dictionaries_and_no_rows(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    text = arrow.array(["a", "b", "a"]).dictionary_encode()
    path = parquet_of(tmp_path / "a.parquet", {"en": text, "de": arrow.array(["x", "y", "z"], arrow.large_string())})
    assert list(parallel_formats.read_pairs(path, LANGUAGES)) == [("a", "x"), ("b", "y"), ("a", "z")]
    path = parquet_of(tmp_path / "b.parquet", {"en": arrow.array([], "string"), "de": arrow.array([], "string")})
    assert list(parallel_formats.read_pairs(path, LANGUAGES)) == []


def test_what_is_no_text_in_parquet_is_refused_with_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_formats, "_PARQUET_ROWS", 2)
    for value, says in [(None, "expected text under 'de', got None"), ("a\nb", "a line break"), ("\0", "a NUL")]:
        path = parquet_of(tmp_path / "a.parquet", {"en": ["a"] * 4, "de": ["b", "b", "b", value]})
        assert parquet_refusal(path).startswith(f"{path}, row 4: ")
        assert says in parquet_refusal(path)
    path = parquet_of(tmp_path / "a.parquet", {"en": [1], "de": ["b"]})
    assert "row 1: expected text under 'en', got 1" in parquet_refusal(path)
    arrow = pytest.importorskip("pyarrow")
    damaged = arrow.array([b"\xff"], arrow.binary()).view(arrow.string())
    path = parquet_of(tmp_path / "a.parquet", {"en": damaged, "de": ["b"]})
    assert "damaged, or no Parquet file ('utf-8' codec" in parquet_refusal(path)


def test_parquet_columns_that_are_not_there_are_refused(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", {"en": ["a"], "x": ["b"]})
    assert "expected the column 'de', got 'en', 'x'; pick two with config.data.columns" in parquet_refusal(path)
    assert "expected the column '3', got 'en', 'x'" in parquet_refusal(path, "1,3")
    assert "picks the column 'en' for source and target" in parquet_refusal(path, "1,en")
    for columns in ("x", "x,", "x,y,z"):
        assert "expected names or numbers of two columns" in parquet_refusal(path, columns)
    assert "the same column" in parquet_refusal(path, "x,x")


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    whole = parquet_of(tmp_path / "a.parquet", {"en": ["a"] * 999, "de": ["b"] * 999}).read_bytes()
    for content in (b"", b"a\tb\n", whole[:-20], whole[:4] + bytes(60) + whole[64:]):
        (tmp_path / "a.parquet").write_bytes(content)
        assert parquet_refusal(tmp_path / "a.parquet").startswith(f"{tmp_path}/a.parquet")
    assert "Parquet compresses its columns itself" in parquet_refusal(tmp_path / "a.parquet.gz")
    assert "no such file" in parquet_refusal(tmp_path / "none.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert parquet_refusal(tmp_path / "a.parquet").endswith("which is not installed; pip install pyarrow")
