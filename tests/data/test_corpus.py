import dataclasses
import itertools
import pathlib
import pickle
import re
import subprocess
import sys
import time

import pytest
import tensorflow_datasets as tfds

from transformer import command_line
from transformer.config import DataConfig
from transformer.data import corpus, prepared, text_files, tfds_builders
from transformer.runtime import file_digests
from transformer.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
MULTI30K = ROOT / "../shared/data/multi30k"


class ToyTranslation(tfds.core.GeneratorBasedBuilder):
    """Three configs, one of them without validation and with a blank pair."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("fr-en", "de-en", "en_to_nl")]  # noqa: RUF012

    def _info(self):
        self.languages = self.builder_config.name.replace("_to_", "-").split("-")
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.Translation(languages=self.languages))

    def _split_generators(self, dl_manager):
        counts = {"train": 300, "validation": 20, "test": 10}
        if self.builder_config.name == "de-en":
            del counts["validation"]
        if self.builder_config.name == "en_to_nl":
            del counts["train"]
        return {split: self._generate_examples(split, count) for split, count in counts.items()}

    def _generate_examples(self, split, count):
        for row in range(count):
            yield row, {language: f"{language} {split} {row}" if row else " " for language in self.languages}


class ToyLabels(tfds.core.GeneratorBasedBuilder):
    """A data set that is no translation."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"en": tfds.features.Text(), "de": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {}

    def _generate_examples(self):
        yield from ()


def text_config(folder, languages=("en", "de"), **splits):
    """The config of a folder of text files with a split a keyword; a number makes so many pairs."""
    (folder / "text").mkdir(exist_ok=True)
    for stem, pairs in splits.items():
        if isinstance(pairs, int):
            pairs = [(f"en {stem} {row}", f"de {stem} {row}") for row in range(pairs)]
        for side, language in enumerate(("en", "de")):
            text = "".join(f"{pair[side]}\n" for pair in pairs)
            (folder / "text" / f"{stem}.{language}").write_bytes(text.encode())
    source, target = languages
    options = {"source_language": source, "target_language": target, "data_dir": str(folder / "data")}
    return DataConfig(name="text", dir=str(folder / "text"), **options)


def toy_config(data_dir, name="toy_translation", source="de", target="en"):
    return DataConfig(name=name, data_dir=str(data_dir), source_language=source, target_language=target)


def refusal_of(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    return str(error.value)


def test_text_becomes_splits_and_says_what_it_leaves_out(tmp_path, capfd):
    train = [("a", "A"), ("", "B"), ("c", " "), ("d\rd", "D\u2028")]
    data = text_config(tmp_path, train=train, val=[("", ""), ("x", "y")], test_2016=[("t", "T")])
    opened = corpus.open_corpus(data)
    assert (opened.source_language, opened.target_language) == ("en", "de")
    assert sorted(opened.names) == ["test_2016", "train", "validation"]
    assert list(opened.split("train")) == [("a", "A"), ("d\rd", "D\u2028")]
    assert list(opened.split("validation")) == [("", ""), ("x", "y")]
    assert list(opened.split("test")) == [("t", "T")]
    assert opened.split("test").name == "test_2016"
    assert opened.dropped == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "data: 2 of 4 training pairs have a blank side: left out\n" in err
    assert "held out" not in err


def test_the_direction_can_be_turned(tmp_path):
    forth = corpus.open_corpus(text_config(tmp_path, train=5, val=1))
    back = corpus.open_corpus(text_config(tmp_path, ("de", "en"), train=5, val=1))
    assert list(back.split("train")) == [pair[::-1] for pair in forth.split("train")]
    assert back.split("train").digest != forth.split("train").digest


def test_validation_is_held_out_of_training_and_logged(tmp_path, capfd):
    opened = corpus.open_corpus(text_config(tmp_path, train=[("", ""), *((f"e{i}", f"d{i}") for i in range(400))]))
    train, validation = opened.split("train"), opened.split("validation")
    assert (len(train), len(validation), opened.dropped) == (396, 4, 1)
    assert sorted([*train, *validation]) == sorted((f"e{i}", f"d{i}") for i in range(400))
    says = "data: no validation split: 4 of 401 training pairs are held out as one\n"
    assert says in capfd.readouterr().err
    again = corpus.open_corpus(text_config(tmp_path))
    assert says in capfd.readouterr().err
    assert list(again.split("validation")) == list(validation)
    assert again.digest == opened.digest


def test_digests_change_with_their_own_split_alone(tmp_path):
    def digests():
        opened = corpus.open_corpus(text_config(tmp_path))
        return {name: opened.split(name).digest for name in opened.names}, opened.digest

    text_config(tmp_path, train=200, val=5, test=5)
    before, whole = digests()
    assert (before, whole) == digests()
    text_config(tmp_path, val=[("en val", "changed")])
    after, other = digests()
    assert whole != other
    assert {name for name in before if before[name] != after[name]} == {"validation"}
    for language in ("en", "de"):
        (tmp_path / "text" / f"val.{language}").unlink()
    without, _ = digests()
    assert without["train"] != before["train"]
    assert without["test"] == before["test"]


def test_a_split_that_is_not_there_is_refused(tmp_path):
    opened = corpus.open_corpus(text_config(tmp_path, train=9, val=1, test_a=1, test_b=1, other=0))
    assert "several, test_a, test_b; name one" in refusal_of(opened.split, "test")
    assert opened.split("test_b").name == "test_b"
    assert "expected a split 'tset', found only" in refusal_of(opened.split, "tset")
    assert "found only test_a, test_b, train, validation, other" in refusal_of(opened.split, "tset")
    assert len(opened.split("other")) == 0
    assert list(opened.split("other")) == []


@pytest.mark.reported
@pytest.mark.parametrize("stem", ["val", "valid", "validation", "dev"])
def test_the_validation_split_goes_by_the_names_that_its_files_may_have(tmp_path, stem):
    opened = corpus.open_corpus(text_config(tmp_path, **{"train": 9, stem: 2}))
    for name in ("val", "valid", "validation", "dev"):
        assert opened.split(name).name == "validation"
        assert len(opened.split(name)) == 2


def test_an_empty_validation_file_is_kept_empty(tmp_path, capfd):
    opened = corpus.open_corpus(text_config(tmp_path, train=200, val=0))
    assert (len(opened.split("train")), len(opened.split("validation"))) == (200, 0)
    assert "held out" not in capfd.readouterr().err
    other = corpus.open_corpus(text_config(tmp_path, val=1))
    assert other.split("validation").digest != opened.split("validation").digest


def test_splits_can_be_pickled_and_read_in_another_process(tmp_path):
    split = corpus.open_corpus(text_config(tmp_path, train=200)).split("train")
    pairs = list(split)  # opens its files, which cannot be pickled
    code = "import pickle, sys; print(ascii(list(pickle.load(sys.stdin.buffer))))"
    result = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(split), capture_output=True, cwd=ROOT)
    assert result.stdout.decode() == f"{pairs!a}\n", result.stderr.decode()


def test_damaged_data_is_refused_when_its_split_is_opened(tmp_path):
    data = text_config(tmp_path, train=200, val=5)
    corpus.open_corpus(data)
    (path,) = tmp_path.glob("data/**/*-train.array_record*")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    opened = corpus.open_corpus(data)
    assert "changed since it was prepared" in refusal_of(opened.split, "train")
    assert len(opened.split("validation")) == 5


@pytest.mark.parametrize("broken", ["missing", "unequal", "utf8"])
def test_check_finds_what_costs_no_reading_and_opening_finds_the_rest(tmp_path, broken):
    data = text_config(tmp_path, train=3)
    path = tmp_path / "text" / "train.de"
    corpus.validate_source(data)
    if broken == "missing":
        path.unlink()
        assert "expected train.en and train.de" in refusal_of(corpus.validate_source, data)
        return
    path.write_bytes(b"a\nb\n\xff\n" if broken == "utf8" else b"a\n")
    corpus.validate_source(data)
    says = {"unequal": "has 3 lines", "utf8": "train.de, line 3: not UTF-8"}[broken]
    assert says in refusal_of(corpus.open_corpus, data)
    assert not list(tmp_path.glob("data/**/*record*"))


def test_any_translation_set_of_tfds_is_opened_in_either_direction(tmp_path, capfd):
    for name, languages in {"toy_translation": ("en", "fr"), "toy_translation/fr-en:1.0.0": ("fr", "en")}.items():
        opened = corpus.open_corpus(toy_config(tmp_path, name, *languages))
        out, err = capfd.readouterr()
        assert out == ""
        assert ("preparing toy_translation/fr-en/1.0.0" in err) == (name == "toy_translation")
        assert opened.names == ["train", "validation", "test"]
        assert opened.dropped == 1
        train = sorted(opened.split("train"))
        assert train == sorted(tuple(f"{language} train {row}" for language in languages) for row in range(1, 300))
        assert len(opened.split("validation")) == 20
        assert (" ", " ") in list(opened.split("test"))


def test_a_translation_set_without_validation_has_one_held_out(tmp_path):
    opened = corpus.open_corpus(toy_config(tmp_path))
    train, validation = opened.split("train"), opened.split("validation")
    assert opened.names == ["train", "test", "validation"]
    assert (len(train), len(validation), opened.dropped) == (297, 2, 1)
    assert not set(train) & set(validation)


def test_a_translation_set_without_training_is_refused(tmp_path):
    says = refusal_of(corpus.open_corpus, toy_config(tmp_path, "toy_translation", "nl", "en"))
    assert "expected a split 'train', got validation, test" in says


def test_a_prepared_folder_needs_no_code(tmp_path):
    with prepared.silence_tfds():
        ToyTranslation(data_dir=tmp_path, config="de-en", file_format="array_record").download_and_prepare()
    (tmp_path / "toy_translation").rename(tmp_path / "unheard_of")
    path = tmp_path / "unheard_of/de-en/1.0.0"
    for file in path.iterdir():
        file.rename(path / file.name.replace("toy_translation", "unheard_of"))
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace("toy_translation", "unheard_of"))
    for name in ("unheard_of", "unheard_of/de-en"):
        opened = corpus.open_corpus(toy_config(tmp_path, name))
        assert ("de test 3", "en test 3") in list(opened.split("test"))
    assert "has de, en; expected" in refusal_of(
        corpus.validate_source, toy_config(tmp_path, "unheard_of/de-en", "fr", "en")
    )
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert "another format than array_record" in refusal_of(
        corpus.open_corpus, toy_config(tmp_path, "unheard_of/de-en")
    )
    info.write_text("{")
    assert "unheard_of/de-en" in refusal_of(corpus.open_corpus, toy_config(tmp_path, "unheard_of/de-en"))


def test_the_builder_of_the_documentation_is_prepared_by_a_config_that_imports_it(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "data.md").read_text()
    (body,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_data.py").write_text(body)
    lines = ["import my_data", "from configs import text", "def get_config():", "    config = text.get_config()"]
    lines += ["    config.data.name = 'glossary'", "    return config"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    (tmp_path / "glossary.csv").write_text("".join(f'"{row}, please","{row}, bitte"\n' for row in range(200)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["train.py", "--config=mine.py", f"--config.data.data_dir={tmp_path}/data"]
    config, _ = command_line.config_flags(flags)
    opened = corpus.open_corpus(config.data)
    assert (len(opened.train), len(opened.split("validation"))) == (198, 2)
    assert {("7, please", "7, bitte"), ("8, please", "8, bitte")} <= {*opened.train, *opened.split("validation")}
    (tmp_path / "glossary.csv").write_text("one,eins,uno\n")
    moved = dataclasses.replace(config.data, data_dir=str(tmp_path / "other"))
    assert "too many values to unpack" in (says := refusal_of(corpus.open_corpus, moved))
    assert re.search(r"my_data\.py, line \d+: ValueError: .*; fix the cause and run again$", says)


@pytest.mark.parametrize(
    ("name", "languages", "says"),
    [
        ("toy_translation/de-en", ("fr", "en"), "toy_translation/de-en/1.0.0 has de, en; expected"),
        ("toy_translation", ("de", "ja"), "has en, fr; expected source_language = 'de' and target_language = 'ja'"),
        ("toy_translation", ("de", "ja"), "its configs: fr-en, de-en, en_to_nl"),
        ("toy_labels", ("en", "de"), "toy_labels/1.0.0 has en; expected"),
        ("toy_translation/xx", ("de", "en"), "TFDS cannot open 'toy_translation/xx'"),
        ("toy_translation:9.9.9", ("de", "en"), "TFDS cannot open 'toy_translation:9.9.9'"),
        ("toy_translatoin", ("de", "en"), "did you mean toy_translation"),
        ("cdlr", ("de", "en"), "did you mean cldr?"),
        ("zzz", ("de", "en"), "no data set 'zzz' in TFDS nor prepared in"),
        ("zzz", ("de", "en"), "for a builder of your own, import its module in the config file"),
        ("../x", ("de", "en"), "TFDS cannot open '../x'"),
        ("", ("de", "en"), "TFDS cannot open ''"),
        ("cldr", ("de", "fr"), "offered in en-de, en-fr, en-es"),
        ("cldr/de-en", ("de", "en"), "offered in en-de, en-fr, en-es"),
        ("cldr/en-fr", ("de", "en"), "cldr/en-fr/"),
    ],
)
def test_unknown_names_and_languages_are_refused(tmp_path, name, languages, says):
    data = toy_config(tmp_path, name, *languages)
    assert says in refusal_of(corpus.validate_source, data)
    assert says in refusal_of(corpus.open_corpus, data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "source", "target"), [("cldr", "en", "de"), ("cldr", "es", "en"), ("cldr/en-fr", "fr", "en")]
)
def test_cldr_serves_both_directions(tmp_path, name, source, target):
    corpus.validate_source(toy_config(tmp_path, name, source, target))


def test_a_set_that_needs_tensorflow_says_how_to_prepare_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_builders.importlib.util, "find_spec", lambda _: None)
    started = time.monotonic()
    says = refusal_of(corpus.validate_source, toy_config(tmp_path, "wmt16_translate", "en", "de"))
    assert time.monotonic() - started < 2
    assert "wmt16_translate/de-en/1.0.0 is not prepared in" in says
    assert "tfds.builder('wmt16_translate/de-en', file_format='array_record'" in says
    assert f"to {tmp_path}/wmt16_translate/de-en" in says


@pytest.mark.parametrize("way", ["field", "environment", "home"])
def test_the_data_folder(tmp_path, monkeypatch, way):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    expected = {"field": "field", "environment": "environment", "home": "home/tensorflow_datasets"}[way]
    if way != "home":
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "environment"))
    corpus.open_corpus(toy_config(tmp_path / "field" if way == "field" else "", "toy_translation", "fr", "en"))
    assert [path.relative_to(tmp_path) for path in tmp_path.glob("**/fr-en")] == [
        pathlib.Path(expected, "toy_translation/fr-en")
    ]


def test_neither_jax_nor_tensorflow_is_imported(tmp_path):
    text_config(tmp_path, train=200)
    code = f"""
import sys, time
from transformer import command_line
from transformer.config import DataConfig
from transformer.data import corpus
data = DataConfig(name="text", dir={str(tmp_path / "text")!r}, data_dir={str(tmp_path / "data")!r})
started = time.monotonic()
corpus.validate_source(data)
assert time.monotonic() - started < 0.5
corpus.open_corpus(data).split("validation")[0]
corpus.validate_source(DataConfig())
print([name for name in ("jax", "jaxlib", "tensorflow", "flax") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, cwd=ROOT, text=True)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.skipif(not MULTI30K.is_dir(), reason="needs Multi30k in ../shared/data/multi30k")
def test_multi30k_is_opened(tmp_path):
    opened = corpus.open_corpus(DataConfig(name="text", dir=str(MULTI30K), data_dir=str(tmp_path)))
    sizes = {name: len(opened.split(name)) for name in ("train", "validation", "test")}
    assert sizes == {"train": 29_000, "validation": 1_014, "test": 1_000}
    assert opened.dropped == 0
    assert opened.split("test")[0][1] == "Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt."


LF_DIGESTS = {
    "train": "4b99c5a3879540ac0bae8e764b630106b8f1ec50223e45973af0cb1706899599",
    "validation": "a40c4eff4794ccc44b7338b31314097e09a1fb9bb00fe0f5ec279def77254d9a",
}  # of version 0.1 before it knew CR LF: what its runs were trained on, and may be resumed with


def with_line_ends(folder, end):
    """The config of text files of that line end, all prepared in one folder."""
    (folder / end.hex()).mkdir()
    for split, language in itertools.product(("train", "val"), ("en", "de")):
        lines = [f"{language} {split} {row}\r{row}".encode() for row in range(9)]
        (folder / end.hex() / f"{split}.{language}").write_bytes(b"".join(line + end for line in lines))
    return DataConfig(name="text", dir=str(folder / end.hex()), data_dir=str(folder / "data"))


@pytest.mark.reported
def test_cr_lf_is_the_same_data_as_lf_and_lf_is_what_it_was(tmp_path):
    lf, crlf = (corpus.open_corpus(with_line_ends(tmp_path, end)) for end in (b"\n", b"\r\n"))
    for name, digest in LF_DIGESTS.items():
        assert list(crlf.split(name)) == list(lf.split(name))
        assert crlf.split(name).digest == lf.split(name).digest == digest
    assert crlf.split("train")[8] == ("en train 8\r8", "de train 8\r8")


@pytest.mark.reported
def test_data_prepared_with_its_crs_before_is_not_taken(tmp_path, monkeypatch):
    """What the version before prepared of CR LF files, with a CR at the end of each sentence."""
    data = with_line_ends(tmp_path, b"\r\n")
    with monkeypatch.context() as before:
        before.setattr(corpus.local_text.ParallelText, "VERSION", tfds.core.Version("1.0.0"))
        before.setattr(text_files, "decode_block", lambda block, *_: block.decode().split("\n")[:-1])
        old = corpus.open_corpus(data)
    assert old.split("train")[0] == ("en train 0\r0\r", "de train 0\r0\r")
    new = corpus.open_corpus(data)
    assert new.split("train")[0] == ("en train 0\r0", "de train 0\r0")
    assert new.split("train").digest == LF_DIGESTS["train"] != old.split("train").digest


class ToyParagraphs(tfds.core.GeneratorBasedBuilder):
    """A data set whose sentences have line breaks, as some of TFDS have."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.Translation(languages=("de", "en")))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split):
        for row in range(4):
            yield (
                row,
                {"de": f"de {row}\r\n" if row else "\r\n", "en": f"{split} {row} \r\n\nand on" if row < 3 else "a\rb"},
            )


@pytest.mark.reported
def test_line_breaks_in_sentences_of_tfds_are_spaces_and_counted(tmp_path, capfd):
    opened = corpus.open_corpus(toy_config(tmp_path, "toy_paragraphs"))
    expected = {("de 1", "train 1 and on"), ("de 2", "train 2 and on"), ("de 3", "a\rb")}
    assert set(opened.split("train")) == expected
    assert {opened.split("train")[row] for row in range(3)} == expected
    err = capfd.readouterr().err
    for split in ("train", "validation"):
        assert f"data: 4 of 4 pairs of {split} hold a line break: read as a space\n" in err
    assert opened.dropped == 1


def test_a_start_hashes_every_byte_once_and_the_next_none(tmp_path, monkeypatch):
    data, hashed = text_config(tmp_path, train=300, test=5), []
    hash_file = file_digests.hash_file
    monkeypatch.setattr(file_digests, "hash_file", lambda *args: hashed.append(args[0]) or hash_file(*args))
    text = {str(path) for path in (tmp_path / "text").iterdir()}

    def start():
        del hashed[:]
        opened = corpus.open_corpus(data)
        for name in opened.names:
            opened.split(name)
        return hashed

    assert len(set(start())) == len(hashed)
    assert start() == []
    for path in tmp_path.glob("data/**/.digests*.json"):
        path.unlink()
    shards = {str(path) for path in tmp_path.glob("data/**/*record*")}
    assert sorted(start()) == sorted(text | shards)
    assert start() == []
