"""The embedded data set: grammar checked by hand, and what a split must and must not hold."""

import hashlib
import itertools
import random
import re
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from transformer.data.cldr import generator, grammar, lexicon
from transformer.runtime.errors import UserError

SMALL = {"train": 300, "validation": 30, "test": 60}

# Digests of the first 500 pairs. They change with the frames, the word tables, Babel's CLDR or num2words:
# if that change is meant, raise the builder's VERSION, say so in RELEASE_NOTES, and put the new digests here.
GOLDEN = {"de": "6e5294af03a05137", "fr": "644d9a26d722a838", "es": "eedf8850e773c9d2"}


@pytest.fixture(scope="module")
def german():
    return generator.generate("de")


@pytest.mark.parametrize("language", generator.TARGETS)
def test_same_pairs_everywhere(language):
    pairs = itertools.islice(generator.candidates(language, seed=0), 500)
    digest = hashlib.blake2b("\n".join("\t".join(pair) for pair in pairs).encode(), digest_size=8).hexdigest()
    assert digest == GOLDEN[language], "see the comment on GOLDEN for when to update it"


def test_generate_is_a_function_of_its_seed():
    assert generator.generate("fr", SMALL) == generator.generate("fr", SMALL)
    assert generator.generate("fr", SMALL)["train"] != generator.generate("fr", SMALL, seed=1)["train"]


def test_unknown_language():
    with pytest.raises(UserError, match="expected a target language of de, fr, es, got 'it'"):
        generator.generate("it", SMALL)


def check_splits(splits):
    """The sizes asked for, at least 50,000 to train on, and no sentence of either side twice anywhere."""
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 60_000, "validation": 500, "test": 1_000}
    for side in (0, 1):
        sentences = [pair[side] for pairs in splits.values() for pair in pairs]
        assert len(set(sentences)) == len(sentences)


def test_full_splits(german):
    check_splits(german)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["fr", "es"])
def test_full_splits_of_the_others(language):
    check_splits(generator.generate(language))


def test_a_sentence_has_its_split_in_every_language():
    doubled = {name: 2 * size for name, size in SMALL.items()}
    first, second = generator.generate("de", SMALL), generator.generate("es", doubled)
    for name, pairs in first.items():
        # The first stream is the beginning of the second, so nearly all its sentences come again.
        again = {english for english, _ in pairs} & {english for english, _ in second[name]}
        assert len(again) > 0.9 * len(pairs)
        for other in SMALL.keys() - {name}:
            assert {english for english, _ in pairs}.isdisjoint(english for english, _ in second[other])


@pytest.mark.parametrize("language", generator.TARGETS)
def test_one_english_sentence_has_one_translation(language, monkeypatch):
    def pick(rng, options):
        wide = options is generator._SLOTS
        return options[int(rng.random() * (len(options) if wide else min(3, len(options))))]

    # With three choices for everything but the frame, many sentences come again, in every way that they can.
    monkeypatch.setattr(generator, "choice", pick)
    translations: dict[str, str] = {}
    for english, translation in itertools.islice(generator.candidates(language, seed=3), 5_000):
        assert translations.setdefault(english, translation) == translation
    assert len(translations) < 4_500


@pytest.mark.parametrize("language", lexicon.LANGUAGES)
def test_every_slot_stands_in_every_language(language):
    for frame in generator.TEMPLATES:
        slots = set(re.findall(r"\{(\w+)", getattr(frame, language)))
        assert slots == set(re.findall(r"\{(\w+)", frame.en)), frame


def test_frames_are_many_and_different():
    assert len(generator.TEMPLATES) >= 60
    for sentences in zip(*generator.TEMPLATES, strict=True):
        assert len(set(sentences)) == len(sentences)


def frames_used(pairs):
    shapes = [".+".join(map(re.escape, re.split(r"\{[^}]*\}", frame.en))) for frame in generator.TEMPLATES]
    return {shape for shape in shapes for english, _ in pairs if re.fullmatch(shape, english, re.IGNORECASE)}


def test_every_split_holds_every_frame(german):
    assert len(frames_used(german["test"])) == len(generator.TEMPLATES)
    assert len(frames_used(german["validation"])) > 0.95 * len(generator.TEMPLATES)


@pytest.mark.parametrize("language", generator.TARGETS)
def test_text_is_clean(language):
    uncontracted = {
        "de": r"\b(in dem|an dem|zu de[mr]|in das) ",
        "fr": r"\b([àd]e? les? |[ldnq]u?[ea] [aeioué])",
        "es": r"\b(a|de) el ",
    }[language]
    for pair in itertools.islice(generator.candidates(language, seed=5), 6_000):
        for sentence in pair:
            assert re.fullmatch(r"¿?[A-ZÀÁÉÜÄÖ][^{}\n]*[.?]", sentence), sentence
            assert sentence.isprintable(), sentence
            assert not re.search(r"[^\S ]|  ", sentence), sentence
        assert not re.search(uncontracted, pair[1]), pair[1]


def test_no_two_slots_of_a_sentence_name_the_same():
    rng = random.Random("distinct")
    for _ in range(500):
        values = generator.sample_values(["who", "one", "city", "city2", "city3", "weekday", "weekday2"], rng)
        assert len({values["city"], values["city2"], values["city3"]}) == 3
        assert values["weekday"] != values["weekday2"]
        assert not {*values["who"][1:]} & {*values["one"][1:]} - set(grammar.POSSESSORS)


def test_lengths(german):
    lengths = [len(translation.split()) for _, translation in german["train"]]
    assert 10 <= sum(lengths) / len(lengths) <= 20
    assert max(lengths) <= 30


class SmallCldr(generator.Cldr):
    """The builder with splits that a test can afford."""

    split_sizes = SMALL


@pytest.mark.parametrize("language", generator.TARGETS)
def test_prepared_by_tfds(language, tmp_path):
    builder = SmallCldr(config=f"en-{language}", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    expected = generator.generate(language, SMALL)
    for split, pairs in expected.items():
        rows = builder.as_data_source(split=split)
        read = sorted((row["en"].decode(), row[language].decode()) for row in rows)
        assert read == sorted(pairs)
    assert list(tmp_path.rglob("*.array_record*"))
    assert "tensorflow" not in sys.modules


def test_registered_with_tfds(tmp_path):
    builder = tfds.builder("cldr/en-es", data_dir=tmp_path, file_format="array_record")
    assert isinstance(builder, generator.Cldr)
    assert builder.info.supervised_keys == ("en", "es")
    assert "Unicode License" in builder.info.description


def test_imports_neither_jax_nor_tensorflow(root):
    check = "import sys, transformer.data.cldr.generator; sys.exit(bool({'jax', 'tensorflow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], cwd=root, check=True)
