"""WMT without TensorFlow: the pairs are those that TFDS's own code reads from the same archives."""

import dataclasses
import gzip
import io
import json
import pathlib
import sys
import tarfile
import zipfile

import pytest
import tensorflow_datasets as tfds

from tests.helpers import wmt_archives
from transformer.config import DataConfig, validation
from transformer.data import corpus, prepared, shards
from transformer.runtime.errors import UserError

SETS = ["wmt_t2t_translate/de-en", *(f"wmt14_translate/{language}-en" for language in wmt_archives.LANGUAGES)]
DEV = "http://data.statmt.org/wmt19/translation-task/dev.tgz"
NEWS = f"{wmt_archives.STATMT}/wmt14/training-parallel-nc-v9.tgz"


@pytest.fixture(scope="module")
def archives():
    """Archives by address; the one of two archives named wiki-titles.tgz is chosen by `of`."""
    return {**wmt_archives.published(), **wmt_archives.manual()}


def of(archives, name):
    """The archives that a data set may use: two of them have one name."""
    other = "wmt15/wiki-titles" if "hi-en" in name else "wmt14/wiki-titles"
    return {url: content for url, content in archives.items() if other not in url}


@pytest.fixture
def filled(tmp_path, monkeypatch, archives):
    """A function that makes a config of a set whose archives lie in the default manual folder, some replaced."""

    def fill(name, *, direction=-1, **replaced):
        content = {**of(archives, name), **{{"dev": DEV, "news": NEWS}[key]: value for key, value in replaced.items()}}
        wmt_archives.record(monkeypatch, {url: body for url, body in content.items() if url.startswith("http")})
        wmt_archives.fill(tmp_path / "data/downloads/manual", content)
        source, target = name.rpartition("/")[2].split("-")[::direction]
        return DataConfig(name=name, source_language=source, target_language=target, data_dir=str(tmp_path / "data"))

    return fill


def extracted(tmp_path, archives, name):
    """What TFDS's download manager would have extracted: for each corpus its folders or files."""
    builder = tfds.builder(name, data_dir=tmp_path / "theirs", file_format="array_record")
    language = builder.builder_config.language_pair[0]
    folders = {}
    for subset in {subset for subsets in builder.subsets.values() for subset in subsets}:
        source = sys.modules["tensorflow_datasets.translate.wmt"].DATASET_MAP[subset]
        names = source.get_manual_dl_files(language) or source.get_url(language)
        folders[subset] = [str(unpacked(tmp_path / "unpacked", file, archives[file])) for file in names]
    return builder, folders


def unpacked(folder, name, content):
    folder = folder / name.replace("/", "_").replace(":", "_")
    if folder.exists():
        return folder
    if name.endswith(".zip"):
        zipfile.ZipFile(io.BytesIO(content)).extractall(folder)
    elif name.endswith((".tgz", ".tar")):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(folder, filter="data")
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.write_bytes(gzip.decompress(content))
    return folder


def theirs(builder, folders):
    """The pairs of each split that TFDS reads, in its order of reading."""
    pairs = {}
    for split, subsets in builder.subsets.items():
        languages = builder.builder_config.language_pair
        examples = builder._generate_examples(subsets, folders)
        pairs[str(split)] = [tuple(example[code] for code in languages) for _, example in examples]
    return pairs


@pytest.mark.parametrize("name", SETS)
def test_every_split_holds_the_pairs_that_tfds_reads(tmp_path, filled, archives, name):
    opened = corpus.open_corpus(filled(name, direction=1))
    expected = theirs(*extracted(tmp_path, archives, name))
    assert opened.names == ["train", "validation", "test"] == list(expected)
    for split in ("validation", "test"):
        assert list(opened.split(split)) == expected[split]
    kept = [pair for pair in expected["train"] if all(side.strip() for side in pair)]
    assert list(opened.split("train")) == kept
    assert opened.dropped == len(expected["train"]) - len(kept)
    assert len(kept) > 10
    assert not list((tmp_path / "data").glob("**/*incomplete*"))


def test_the_folder_is_the_one_that_tfds_would_make(tmp_path, filled, archives, monkeypatch):
    """TFDS's own builder, which needs TensorFlow for unpacking alone, prepares the same archives elsewhere."""
    data = filled("wmt14_translate/de-en")
    ours = corpus.open_corpus(data)
    builder, folders = extracted(tmp_path, archives, data.name)
    monkeypatch.setattr(
        type(builder),
        "_split_generators",
        lambda self, _: {
            str(split): self._generate_examples(subsets, folders) for split, subsets in self.subsets.items()
        },
    )
    with prepared.silence_tfds():
        builder.download_and_prepare()
    place = pathlib.Path("wmt14_translate/de-en/1.0.0")
    made = [tmp_path / folder / place for folder in ("data", "theirs")]
    assert made[0].is_dir()
    assert made[1].is_dir()
    assert len({(folder / "features.json").read_text() for folder in made}) == 1
    facts = [json.loads((folder / "dataset_info.json").read_text()) for folder in made]
    for key in ("name", "version", "fileFormat", "configName", "citation", "supervisedKeys"):
        assert facts[0][key] == facts[1][key], key
    assert [{s["name"] for s in fact["splits"]} for fact in facts] == [{"train", "validation", "test"}] * 2
    # What TFDS made is opened as it is, with no archive in sight, and holds the same pairs.
    monkeypatch.setattr(corpus.wmt.WmtBuilder, "_parts_by_split", lambda _: pytest.fail("prepared again"))
    other = corpus.open_corpus(DataConfig(name=data.name, data_dir=str(tmp_path / "theirs")))
    for split in ours.names:
        assert sorted(other.split(split)) == sorted(ours.split(split))
    again = corpus.open_corpus(data)
    assert list(again.split("test")) == list(ours.split("test"))
    info = made[0] / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"another format than array_record.*move that folder away"):
        corpus.open_corpus(data)


def test_the_data_set_says_which_archives_it_was_made_of(tmp_path, filled):
    corpus.open_corpus(filled("wmt14_translate/ru-en"))
    (path,) = (tmp_path / "data").glob("wmt14_translate/ru-en/1.0.0/metadata.json")
    used = json.loads(path.read_text())["archives"]
    expected = "training-parallel-commoncrawl.tgz training-parallel-nc-v9.tgz 1mcorpus.zip wiki-titles.tgz dev.tgz"
    assert list(used) == expected.split()
    assert all(len(digest) == 64 for digest in used.values())


def test_many_shards_keep_the_order(tmp_path, filled, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 300)
    monkeypatch.setattr(shards, "default_workers", lambda: 1)
    opened = corpus.open_corpus(filled("wmt14_translate/fr-en"))
    assert len(list((tmp_path / "data").glob("**/*-train.array_record*"))) > 10
    rows = [source.split()[2] for source, _ in opened.split("train") if source.startswith("en giga")]
    assert rows == [str(row) for row in range(30)]


def sides(**sides):
    return wmt_archives.tgz({f"training/news-commentary-v9.de-en.{side}": text for side, text in sides.items()})


@pytest.mark.parametrize(
    ("news", "says"),
    [
        (wmt_archives.tgz({"training/other.de": b"x\n"}), "has no file training/news-commentary-v9.de-en"),
        (sides(de=b"a\nb\n", en=b"a\n"), "news-commentary-v9.de-en.de has 2 lines and training/news-commentary-v9"),
        (sides(de=b"a\n\xff\n", en=b"a\nb\n"), "news-commentary-v9.de-en.de, line 2: not UTF-8"),
        (sides(de=b"\n\n", en=b"a\nb\n"), "training-parallel-nc-v9.tgz: expected sentences in training/news"),
        (b"<html>gone</html>", "damaged, or not an archive"),
        (wmt_archives.tgz({"training/x": b"x" * 5000})[:-40], "damaged, or not an archive"),
    ],
)
def test_an_archive_of_other_content_is_refused(tmp_path, filled, news, says):
    with pytest.raises(UserError) as error:
        corpus.open_corpus(filled("wmt14_translate/de-en", news=news))
    assert says in str(error.value)
    assert not list((tmp_path / "data").glob("**/*record*"))


def test_an_archive_with_another_checksum_is_refused(tmp_path, filled):
    data = filled("wmt14_translate/de-en")
    path = tmp_path / "data/downloads/manual/training-parallel-nc-v9.tgz"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError) as error:
        corpus.open_corpus(data)
    assert f"{path}: not the archive {NEWS}, or truncated: expected {len(content):,} bytes" in str(error.value)
    assert f"got {len(content) - 1:,} bytes" in str(error.value)


def test_a_hostile_archive_writes_nothing_outside(tmp_path, filled, archives):
    members = {"../../evil": b"x", "/tmp/evil-wmt-member": b"x", **wmt_archives.both(
        "training/news-commentary-v9.{src}-en.{side}", "nc9", 5, ["de"])}  # fmt: skip
    corpus.open_corpus(filled("wmt14_translate/de-en", news=wmt_archives.tgz(members)))
    assert not pathlib.Path("/tmp/evil-wmt-member").exists()
    assert not list(tmp_path.glob("**/*evil*"))
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.reported
def test_the_cr_of_a_line_end_in_an_archive_is_no_part_of_a_sentence(tmp_path, filled):
    """TFDS keeps it in its records, and these are TFDS's; whoever made them, they are read without it."""
    members = {
        f"training/news-commentary-v9.de-en.{side}": "".join(f"{side} {row}\rx\r\n" for row in range(5)).encode()
        for side in ("de", "en")
    }
    opened = corpus.open_corpus(filled("wmt14_translate/de-en", news=wmt_archives.tgz(members)))
    assert ("en 3\rx", "de 3\rx") in list(opened.split("train"))
    assert not any(text.endswith("\r") for pair in opened.split("train") for text in pair)


def test_archives_that_cannot_be_had_are_all_named(tmp_path, filled, monkeypatch):
    data = filled("wmt14_translate/cs-en")
    for name in ("data-plaintext-format.3.tar", "data-plaintext-format.7.tar"):
        (tmp_path / "data/downloads/manual" / name).unlink()
    with pytest.raises(UserError) as error:
        corpus.open_corpus(data)
    says = str(error.value)
    assert "2 of 14 archives are missing" in says
    assert f"into {tmp_path}/data/downloads/manual (config.data.manual_dir)" in says
    for name in ("data-plaintext-format.3.tar", "data-plaintext-format.7.tar"):
        assert f"{name}  from http://ufal.mff.cuni.cz/czeng/czeng10  (has to be fetched by hand)" in says


def test_a_manual_folder_of_one_s_own(tmp_path, filled):
    data = filled("wmt_t2t_translate/de-en")
    (tmp_path / "data/downloads/manual").rename(tmp_path / "mine")
    opened = corpus.open_corpus(DataConfig(name=data.name, data_dir=data.data_dir, manual_dir=str(tmp_path / "mine")))
    assert len(opened.split("validation")) == 22


def test_a_manual_folder_that_is_not_there_or_not_asked_for_is_refused(tmp_path, filled):
    data = dataclasses.replace(filled("wmt_t2t_translate/de-en"), manual_dir=str(tmp_path / "none"))
    with pytest.raises(UserError, match="none: expected a local folder"):
        corpus.open_corpus(data)
    with pytest.raises(UserError, match=r"manual_dir = .*: read only with name = wmt14_translate or wmt_t2t_translate"):
        validation.validate({"data": {"name": "cldr", "manual_dir": str(tmp_path)}})


def test_other_languages_are_refused(filled):
    data = filled("wmt14_translate/de-en")
    with pytest.raises(UserError, match="has de, en; expected"):
        corpus.validate_source(
            DataConfig(name=data.name, source_language="en", target_language="fr", data_dir=data.data_dir)
        )
