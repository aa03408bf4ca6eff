"""Rows D: text that is not text, files that do not belong together, lines of any length, data that has changed."""

import gzip
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest

from tests.faults.damage import flip
from tests.faults.table import Tally, row
from tests.faults.world import Command, Heard, World, data_fields, files_of, write_pairs
from transformer import inference, translate
from transformer.checkpoints import loading
from transformer.config import DataConfig
from transformer.data import corpus as corpora
from transformer.data import input_pipeline, parallel_formats, subword_nmt, text_files, tokenizer
from transformer.evaluation import datasets, systems
from transformer.evaluation.evaluator import Evaluator
from transformer.runtime.errors import UserError

ERROR, CONTENT, BLANK = "an error", "content", "a blank line"
BYTES = {
    "a byte that is never UTF-8": (b"a \xff b", ERROR),
    "a character cut short": (b"caf\xc3", ERROR),
    "an overlong form": (b"a\xc0\xaf", ERROR),
    "half a surrogate pair": (b"a\xed\xa0\x80b", ERROR),
    "beyond Unicode": (b"\xf4\x90\x80\x80", ERROR),
    "Latin-1": (b"caf\xe9 noir", ERROR),
    "UTF-16": ("a b".encode("utf-16-le"), ERROR),
    "NUL": (b"a\0b", ERROR),
    "NUL alone": (b"\0", ERROR),
    "a BOM inside": ("a\ufeffb".encode(), CONTENT),
    "a lone CR": (b"a\rb", CONTENT),
    "CR at the start": (b"\ra b", CONTENT),
    "U+2028": ("a\u2028b".encode(), CONTENT),
    "U+0085": ("a\u0085b".encode(), CONTENT),
    "VT, FF and FS": (b"a\x0bb\x0cc\x1cd", CONTENT),
    "U+FFFD": ("a\ufffdb".encode(), CONTENT),
    "a character beyond 16 bits": ("😀 é".encode(), CONTENT),
    "nothing": (b"", BLANK),
    "blanks of all kinds": (" \t\r\u3000\u2028".encode(), BLANK),
}
LINE = 7  # where it stands


def with_line(path: pathlib.Path, line: bytes) -> None:
    """Puts the bytes in place of line LINE."""
    lines = path.read_bytes().split(b"\n")
    lines[LINE - 1] = line
    path.write_bytes(b"\n".join(lines))


def open_corpus(folder: pathlib.Path) -> corpora.Corpus:
    """The corpus of a folder, prepared in it."""
    return corpora.open_corpus(DataConfig(**data_fields(folder, folder / "prepared")))


@row("D1", "19 classes of bytes on either side, in training and in evaluation", full=76, quick=76)
def bytes_of_all_kinds(world: World, tally: Tally) -> None:
    for (name, (line, kind)), side in itertools.product(BYTES.items(), ("en", "de")):
        folder = world.new_folder()
        write_pairs(folder, train=40)
        for split in ("train", "test"):
            with_line(folder / f"{split}.{side}", line)
        with tally.one(f"{name}, {side}, train"), Heard() as heard:
            if kind == ERROR:
                (folder / f"test.{side}").write_bytes(b"a\n" * 8)
                refused(lambda: open_corpus(folder), f"train.{side}, line {LINE}: ")  # noqa: B023
                with_line(folder / f"test.{side}", line)
            else:
                corpus = open_corpus(folder)
                assert len(corpus.split("train")) == 40 - (kind == BLANK)
                assert ("1 of 40 training pairs have a blank side: left out" in heard.getvalue()) == (kind == BLANK)
                if kind == CONTENT:
                    assert corpus.split("train")[LINE - 1][side == "de"].encode() == line
        with tally.one(f"{name}, {side}, evaluation"):
            paths = folder / "test.en", folder / "test.de"
            read = lambda: datasets.load_eval_dataset(DataConfig(), None, str(paths[0]), [str(paths[1])])  # noqa: B023, E731
            if kind == ERROR:
                refused(read, f"test.{side}, line {LINE}: ")
            else:
                result = read()
                lines = (result.sources, result.references[0])[side == "de"]
                assert len(result.sources) == len(result.references[0]) == 8
                assert lines[LINE - 1].encode() == line


def refused(read, words: str) -> None:
    """By a message with these words, and exit code 2."""
    with Heard(), pytest.raises(UserError) as error:
        read()
    assert words in str(error.value), str(error.value)
    assert error.value.exit_code == 2


@row("D2", "counts of lines that differ, empty files", full=14, quick=14)
def counts_differ(world: World, tally: Tally) -> None:
    changes = {
        "one less": lambda lines: lines[:-1],
        "one more": lambda lines: [*lines, "more"],
        "empty": lambda lines: [],
    }
    for (name, change), side in itertools.product(changes.items(), ("en", "de")):
        folder = world.new_folder()
        write_pairs(folder, train=40)
        for split, count in (("train", 40), ("test", 8)):
            path = folder / f"{split}.{side}"
            lines = change(path.read_text().splitlines())
            path.write_text("".join(f"{line}\n" for line in lines))
            paths = folder / f"{split}.en", folder / f"{split}.de"
            with tally.one(f"{name}, {side}, {split}"):
                for read in (
                    lambda: open_corpus(folder),  # noqa: B023
                    lambda: datasets.load_eval_dataset(DataConfig(), None, str(paths[0]), [str(paths[1])]),  # noqa: B023
                ):
                    with Heard(), pytest.raises(UserError) as error:
                        read()
                    assert str(count) in str(error.value), str(error.value)
                    assert str(len(lines)) in str(error.value), str(error.value)
            shutil.rmtree(folder / "prepared", ignore_errors=True)
            if split == "train":
                write_pairs(folder, train=40)
    for split in ("train", "test"):
        with tally.one(f"both empty, {split}"):
            folder = world.new_folder()
            write_pairs(folder, train=40)
            for side in ("en", "de"):
                (folder / f"{split}.{side}").write_bytes(b"")
            if split == "train":
                refused(lambda: open_corpus(folder), "no pairs")  # noqa: B023
            else:
                assert (
                    datasets.load_eval_dataset(DataConfig(), None, f"{folder}/test.en", [f"{folder}/test.de"]).sources
                    == []
                )


LONG = "red house " * 60_000
WITH_PEAK = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, *sys.argv[1:]]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, file=sys.stderr)  # MiB
sys.exit(code)
"""


@row("D3", "lines of no tokens and of over 100,000", full=4, quick=2)
def lines_of_any_length(world: World, tally: Tally) -> None:
    run = loading.load_checkpoint(world.talker(), "latest")
    assert len(run.tokenizer.encode([LONG])[0]) > 100_000
    with tally.one("training: dropped and counted"):
        folder = world.new_folder()
        write_pairs(folder, train=40)
        with_line(folder / "train.en", LONG.encode())
        config = world.config(data=data_fields(folder, folder / "prepared"))
        with Heard():
            corpus = open_corpus(folder)
            ids = input_pipeline.token_ids(config.data, corpus, "train", run.tokenizer)
        plan = input_pipeline.make_batch_schedule(config, ids)
        assert (plan.kept, plan.dropped) == (39, 1)
        used = {example for done in range(plan.steps_per_epoch) for example in plan.batch(done).examples_B.tolist()}
        assert LINE - 1 not in used
    with tally.one("evaluation: one hypothesis a line"), Heard() as heard:
        sources = ["red house", "", LONG, " ", "\u2028", "old tree"]
        references = ["", LONG, "a", "b", "", "c"]
        result = Evaluator(run.model, run.tokenizer, run.config, run.mesh).evaluate(run.params, sources, [references])
        assert (len(result.translations), result.sentences) == (6, 6)
        assert all(result.translations[i] for i in (0, 2, 5))
        assert result.translations[1] == result.translations[3] == result.translations[4] == ""
        assert "1 sources are longer than decode.max_source_tokens" in heard.getvalue()
        assert "1 references have over" in heard.getvalue()
    if not tally.quick:
        command = ["-m", "transformer.translate", f"--workdir={world.talker()}"]
        peaks = []
        for name, lines in (("short", "old tree"), ("long", LONG * 4)):
            with tally.one(f"memory of translating {name} lines"):
                done = Command("-c", WITH_PEAK, *command, stdin=f"red house\n{lines}\n\nold\n".encode()).expect(0)
                assert done.stdout.count(b"\n") == 4
                peaks.append(int(done.stderr.splitlines()[-1]))
                assert peaks[-1] - peaks[0] < 300, f"{peaks} MiB"
        tally.note(f"{peaks[1] - peaks[0]:.0f} MiB more for a line of {len(LONG) * 4 / 1e6:.1f} MB")


@row("D4", "vocabulary missing, different, flipped, of a run that has a checkpoint", full=6, quick=3)
def vocabulary_changed(world: World, tally: Tally) -> None:
    rng = np.random.default_rng(0)
    different = tokenizer.train(["a b c"] * 9, 264, "unigram")
    harms = {
        "missing": lambda path: path.unlink(),
        "different": lambda path: different.save(path.parent),
        "flipped": lambda path: flip(path, rng),
    }
    for name, harm in harms.items():
        with tally.one(f"in the workdir, {name}"):
            run = world.three_checkpoints()
            path = run / "tokenizer" / tokenizer.FILE_NAME
            harm(path)
            before = path.read_bytes() if path.exists() else None
            process = world.trained(run)
            assert (process.code, process.trace()) == (2, {}), process.stderr()
            assert "expected the digest" in process.stderr()
            assert "training a" not in process.stderr()
            assert (path.read_bytes() if path.exists() else None) == before
        if not tally.quick:
            with tally.one(f"in the newest checkpoint, {name}"):
                run = world.three_checkpoints()
                harm(run / "checkpoints" / "15" / "tokenizer" / tokenizer.FILE_NAME)
                process = world.trained(run)
                assert "checkpoint 15 is damaged" in process.stderr()
                world.assert_as_whole(run)


@row("D5", "prepared data and token ids truncated, flipped, missing", full=12, quick=12)
def data_damaged(world: World, tally: Tally) -> None:
    rng = np.random.default_rng(0)
    harms = {
        "missing": lambda path: path.unlink(),
        "flipped": lambda path: flip(path, rng),
        "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    }
    folder = world.new_folder()
    write_pairs(folder, train=40)
    with Heard():
        corpus = open_corpus(folder)
    for (name, harm), split in itertools.product(harms.items(), ("train", "validation")):
        with tally.one(f"shard of {split}, {name}"):
            (path,) = (path for path in files_of(folder / "prepared") if f"-{split}.array_record" in path.name)
            whole = path.read_bytes()
            harm(path)
            refused(lambda: (open_corpus(folder).split("train"), open_corpus(folder).split("validation")), path.name)
            path.write_bytes(whole)
    data = DataConfig(**data_fields(folder, folder / "prepared"))
    words = tokenizer.load(world.whole().workdir / "tokenizer")
    with Heard():
        wanted = input_pipeline.token_ids(data, corpus, "train", words)
    for (name, harm), file in itertools.product(harms.items(), ("source.ids", "target.offsets.npy")):
        with tally.one(f"token ids, {file} {name}"), Heard() as heard:
            (path,) = (path for path in files_of(folder / "prepared" / "token_ids") if path.name == file)
            harm(path)
            result = input_pipeline.token_ids(data, corpus, "train", words)
            assert "damaged" in heard.getvalue()
            for ours, theirs in zip(result, wanted, strict=True):
                assert np.array_equal(ours.flat, theirs.flat)
                assert np.array_equal(ours.offsets, theirs.offsets)


LINES = ["red house", "old\rtree", "", "new cat"]


def one_file(extension: str) -> str:
    """Three pairs in a format of one file, with LF line ends and a sentence over two lines where it has such."""
    pairs = [("red house", "rot haus"), ("old\rtree", "alt baum"), ("new cat", "neu katze")]
    if extension == ".tsv":
        return "".join(f"{source}\t{target}\n" for source, target in pairs)
    if extension == ".jsonl":
        return "".join(json.dumps({"en": source, "de": target}) + "\n" for source, target in pairs)
    if extension == ".tmx":
        seg = "".join(
            f'<tu>\n<tuv xml:lang="en"><seg>{source.replace(chr(13), "&#13;")}\n  more</seg></tuv>\n'
            f'<tuv xml:lang="de"><seg>{target}</seg></tuv></tu>\n'
            for source, target in pairs
        )
        return f"<tmx><body>\n{seg}</body></tmx>\n"
    return "".join(f'msgid ""\n"{source}"\nmsgstr "{target}"\n\n' for source, target in pairs).replace("\r", "\\r")


@row("D6", "CR LF in every kind of input, on one side or both", full=24, quick=24)
def cr_lf_everywhere(world: World, tally: Tally) -> None:
    folder = world.new_folder()
    write_pairs(folder / "lf", train=40)
    with_line(folder / "lf" / "train.en", b"a lone\rCR")
    with Heard():
        wanted = open_corpus(folder / "lf")
    for number, sides in enumerate((("en",), ("de",), ("en", "de"))):
        for pack in (False, True):
            with tally.one(f"text files, {' and '.join(sides)}{', compressed' * pack}"), Heard():
                crlf = pathlib.Path(shutil.copytree(folder / "lf", folder / f"crlf{number}{pack}"))
                shutil.rmtree(crlf / "prepared")
                for split, side in itertools.product(("train", "val", "test"), sides):
                    path = crlf / f"{split}.{side}"
                    content = path.read_bytes().replace(b"\n", b"\r\n")
                    path.with_suffix(path.suffix + ".gz" * pack).write_bytes(
                        gzip.compress(content) if pack else content
                    )
                    if pack:
                        path.unlink()
                assert open_corpus(crlf).digest == wanted.digest
                assert open_corpus(crlf).split("train")[LINE - 1][0] == "a lone\rCR"
    one_file_formats(folder, tally)
    command_and_api(world, folder, tally)


def one_file_formats(folder: pathlib.Path, tally: Tally) -> None:
    """TSV, JSONL, TMX and PO with CR LF hold the pairs that they hold with LF."""
    for extension in (each for each in parallel_formats.PAIR_FORMATS if each != ".parquet"):  # which has no lines
        with tally.one(extension):
            path = folder / f"pairs{extension}"
            result = []
            for end in (b"\n", b"\r\n"):
                path.write_bytes(one_file(extension).encode().replace(b"\n", end))
                result.append(list(parallel_formats.read_pairs(path, ("en", "de"))))
            assert result[0] == result[1]
            assert [source.removesuffix(" more") for source, _ in result[1]] == ["red house", "old\rtree", "new cat"]
            assert [target for _, target in result[1]] == ["rot haus", "alt baum", "neu katze"]
    with tally.one("JSONL, within a sentence: refused by its line"):
        path = folder / "within.jsonl"
        path.write_text(json.dumps({"en": "a", "de": "b"}) + "\n" + json.dumps({"en": "a\r\nb", "de": "b"}) + "\n")
        refused(
            lambda: list(parallel_formats.read_pairs(path, ("en", "de"))),
            "line 2: the text under 'en' holds a line break",
        )


def command_and_api(world: World, folder: pathlib.Path, tally: Tally) -> None:
    """Test sets, other translations, stdin, prefixes, phrases and texts of the API."""
    files = {name: folder / f"{name}.lines" for name in ("lf", "crlf")}
    for name, end in (("lf", "\n"), ("crlf", "\r\n")):
        files[name].write_bytes("".join(line + end for line in LINES).encode())
    for source, reference in (("crlf", "lf"), ("lf", "crlf"), ("crlf", "crlf")):
        with tally.one(f"evaluation, source {source}, reference {reference}"):
            result = datasets.load_eval_dataset(DataConfig(), None, str(files[source]), [str(files[reference])])
            assert result.sources == result.references[0] == LINES
    with tally.one("translations to compare with"):
        chosen = datasets.EvalDataset("set", LINES, [LINES])
        assert systems.baseline_system(files["crlf"], "latest", chosen, ("en", "de")).translations == LINES
    with tally.one("stdin"), files["crlf"].open("rb") as stream:
        assert list(text_files.decode_lines(stream, "stdin")) == LINES
    with tally.one("prefixes and phrases"):
        (folder / "phrases").write_bytes(b"red\thouse\r\n\r\n\r\ncat\r\n")
        read = list(translate.read_aligned_lines(iter(LINES), files["crlf"], folder / "phrases"))
        assert [one.prefix for one in read] == LINES
        assert [one.phrases for one in read] == [["red", "house"], [], [], ["cat"]]
    with tally.one("codes of subword-nmt"):
        codes = "#version: 0.2\nr e\nre d</w>\n"
        assert subword_nmt.parse(codes.replace("\n", "\r\n"), "") == subword_nmt.parse(codes, "")
    model = inference.load(world.talker())
    plain = model.translate(LINES, prefixes=["red", "", "", "old"])
    for name, sentences, prefixes in (
        ("sentences", [f"{line}\r\n" for line in LINES], ["red", "", "", "old"]),
        ("prefixes", LINES, ["red\r\n", "\r\n", "", "old\r\n"]),
    ):
        with tally.one(f"{name} of the API"):
            assert model.translate(sentences, prefixes=prefixes) == plain
    with tally.one("phrases of the API"):
        assert model.translate(["red house"], constraints=[["cat\r\n"]]) == model.translate(
            ["red house"], constraints=[["cat"]]
        )
    with tally.one("within a text of the API: counted"), Heard() as heard:
        assert model.translate(["red\r\nhouse"]) == model.translate(["red house"])
        assert "warning: 1 sources hold line breaks, read as spaces" in heard.getvalue()
    with tally.one("within a prefix: refused"):
        refused(lambda: model.translate(["red"], prefixes=["a\r\nb"]), "it cannot hold 'a\\r\\nb'")
    with tally.one("output"):
        words = model.primary.tokenizer
        spelled = [4 + byte for byte in b"red\r\nhouse\r"]
        assert words.decode(spelled) == "red house"
        assert not any("\r\n" in text or text.endswith("\r") for text in plain)
