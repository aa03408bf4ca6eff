"""The compare command: workdirs and files of any program, one page, one JSON object, and messages for people."""

import dataclasses
import json

import pytest

from tests.checkpoints.test_manager import make_parts
from tests.commands.test_translate import write
from tests.evaluation.test_significance import FAIR, GOOD, POOR, REFERENCES
from tests.helpers.clock import FakeClock
from transformer import compare
from transformer.config import MixtureEntry
from transformer.data import corpus
from transformer.evaluation import comparison, public_test_sets
from transformer.evaluation.datasets import EvalDataset
from transformer.evaluation.results import DATASETS_FILE
from transformer.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of translations and a set, and few samples."""
    for name, lines in {"good": GOOD, "fair": FAIR, "poor": POOR, "ref": REFERENCES, "src": REFERENCES}.items():
        write(tmp_path / name, lines)
    tests = comparison.paired_tests
    monkeypatch.setattr(comparison, "paired_tests", lambda *args, samples: tests(*args, samples=20))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments):
    compare.main(["compare", *map(str, arguments)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_files_of_any_program_are_compared(folder, capsys):
    fields = run(capsys, "poor", "good", "fair", "--reference=ref")
    assert [system["name"] for system in fields["systems"]] == ["poor", "good", "fair"]
    assert fields["page"] == str(folder / "comparison.html")
    page = (folder / "comparison.html").read_text()
    assert "<title>poor, good and fair compared</title>" in page
    assert "<dt>source</dt>" not in page
    fields = run(capsys, "poor", "good", "--reference=ref", "--source=src", "--output=deep/page.html")
    assert "bleu_by_source_length" in fields["systems"][0]
    assert "<dt>source</dt>" in (folder / "deep" / "page.html").read_text()
    fields = run(capsys, "poor", "good", "--reference=ref", "--frequency_corpus=src")
    assert set(fields["systems"][0]["f1_by_frequency"]) == {"10-99"}


def make_workdir(path, dataset, **translations):
    (path / "translations").mkdir(parents=True)
    (path / "config.json").write_text(make_parts()[0].to_json())
    for name, lines in translations.items():
        write(path / "translations" / f"{name.removeprefix('s')}.{dataset.name}.txt", lines)
    (path / "translations" / DATASETS_FILE).write_text(json.dumps({dataset.name: dataset.digest}))
    return path


def test_workdirs_are_compared_by_their_newest_translations(folder, capsys):
    dataset = EvalDataset("src", REFERENCES, [REFERENCES])
    one = make_workdir(folder / "a" / "demo", dataset, s9=POOR)
    other = make_workdir(folder / "b" / "demo", dataset, s9=POOR, s10=GOOD)
    fields = run(capsys, one, other, "fair", "--reference=ref", "--source=src")
    assert [system["name"] for system in fields["systems"]] == ["a/demo", "b/demo", "fair"]
    assert fields["systems"][1]["path"].endswith("b/demo/translations/10.src.txt")
    assert fields["systems"][1]["versus"]["bleu"]["difference"] > 0
    with pytest.raises(UserError, match="a/demo: its translations are found by their sources; add --source=FILE"):
        run(capsys, one, other, "--reference=ref")
    with pytest.raises(UserError, match=r"demo: expected translations of poor in translations/, found none"):
        run(capsys, one, other, "--reference=ref", "--source=poor")


def test_the_test_split_of_the_first_workdir_is_the_default(folder, capsys, monkeypatch):
    """And its training text that in which words are counted."""
    split = type("Split", (), {"name": "test", "sources": lambda _: REFERENCES, "targets": lambda _: REFERENCES})
    clock = FakeClock(monkeypatch)

    def training_pairs():
        clock.sleep(15)
        yield "x", REFERENCES[0]

    opened = type("Corpus", (), {"split": lambda _, name: split() if name == "test" else training_pairs()})
    monkeypatch.setattr(corpus, "open_corpus", lambda data: opened())
    dataset = EvalDataset("test", REFERENCES, [REFERENCES])
    one, other = (make_workdir(folder / name, dataset, s9=lines) for name, lines in (("a", POOR), ("b", GOOD)))
    compare.main(["compare", str(one), str(other)])
    printed = capsys.readouterr()
    assert "counting the words of the training text: 0 lines · 0:00:10 elapsed\n" in printed.err
    fields = json.loads(printed.out.splitlines()[-1])
    assert [system["name"] for system in fields["systems"]] == ["a", "b"]
    assert {"0", "1"} <= set(fields["systems"][0]["f1_by_frequency"])


def test_a_public_set_gives_sources_and_references(folder, capsys, monkeypatch):
    """To files of translations, and to the workdirs that were evaluated on it."""
    asked = []

    def load(name, languages):
        asked.append((name, languages))
        return REFERENCES, [REFERENCES]

    monkeypatch.setattr(public_test_sets, "load", load)
    fields = run(capsys, "poor", "good", "--test_set=wmt14/full", "--language_pair=en-fr")
    assert "bleu_by_source_length" in fields["systems"][0]
    assert "wmt14_full, 60 sentences" in (folder / "comparison.html").read_text()
    dataset = EvalDataset("wmt14_full", REFERENCES, [REFERENCES])
    workdir = make_workdir(folder / "run", dataset, s9=POOR)
    fields = run(capsys, workdir, "good", "--test_set=wmt14/full")
    assert fields["systems"][0]["path"].endswith("run/translations/9.wmt14_full.txt")
    assert asked == [("wmt14/full", ("en", "fr")), ("wmt14/full", ("en", "de"))]
    with pytest.raises(UserError, match=r"--language_pair is for files of translations: .*run translates en to de"):
        run(capsys, workdir, "good", "--test_set=wmt14/full", "--language_pair=en-de")


def test_a_model_of_several_directions_is_compared_with_one_of_one(folder, capsys, monkeypatch):
    """On the same sentences, whose set has another name there."""
    asked = []

    def load(name, languages):
        asked.append(languages)
        return REFERENCES, [REFERENCES]

    monkeypatch.setattr(public_test_sets, "load", load)
    of_one = EvalDataset("wmt14_full", REFERENCES, [REFERENCES])
    both = make_workdir(folder / "both", of_one._replace(name="wmt14_full.en-fr"), s9=POOR)
    entries = [
        MixtureEntry(dir="d", source_language="en", target_language=code, tag=f"<2{code}>") for code in ("de", "fr")
    ]
    config = make_parts()[0]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=tuple(entries)))
    (both / "config.json").write_text(config.to_json())
    one = make_workdir(folder / "one", of_one, s9=GOOD)
    fields = run(capsys, both, one, "--test_set=wmt14/full", "--target_language=fr")
    assert [system["path"].rpartition("/")[2] for system in fields["systems"]] == [
        "9.wmt14_full.en-fr.txt",
        "9.wmt14_full.txt",
    ]
    assert asked == [("en", "fr")]
    with pytest.raises(UserError, match="expected one direction, got en-de, en-fr"):
        run(capsys, both, one, "--test_set=wmt14/full")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good"], "expected two systems or more, got 1"),
        (["good", "poor"], "files of translations need --reference=FILE or --test_set=NAME, got none"),
        (["good", "poor", "--test_set=wmt14/ful"], "no such test set; did you mean wmt14/full"),
        (["good", "poor", "--test_set=wmt14/full"], "wmt14/full: has .*de-en.*; choose with --language_pair=cs-en"),
        (["good", "poor", "--test_set=wmt14/full", "--language_pair=de-fr"], "--language_pair=de-fr: wmt14/full has"),
        (["good", "poor", "--test_set=wmt14", "--reference=ref"], "--test_set replaces .*; leave out --reference"),
        (["good", "poor", "--test_set=wmt14", "--split=val"], "--test_set replaces .*; leave out --split"),
        (["good", "poor", "--reference=ref", "--language_pair=en-de"], "--language_pair goes with --test_set"),
        (["good", "poor", "--source=src"], "--source goes with --reference"),
        (["good", "poor", "--reference=ref", "--target_language=fr"], "choose a direction of a workdir, got none"),
        (
            ["good", "poor", "--reference=ref", "--split=test"],
            "expected --split, or files of --source and --reference, got both",
        ),
        (["good", "none", "--reference=ref"], "none: there is no such file"),
        (["good", "poor", "--reference=ref", "--frequency_corpus=none"], "none: there is no such file"),
        (
            ["good", "short", "--reference=ref"],
            "short: expected a translation of each of the 60 sentences of ref, got 1",
        ),
        (["good", "poor", "--reference=short", "--source=src"], "60 sentences and 1 lines in reference 1"),
        (["good", "poor", "--reference=ref", "--output=ref"], "would overwrite what is read"),
        (["good", "empty", "--reference=ref"], "empty: expected a workdir of train.py or a file of translations"),
    ],
)
def test_what_cannot_be_compared_is_one_message(folder, capsys, arguments, message):
    write(folder / "short", ["x"])
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        run(capsys, *arguments)
    assert "\n" not in str(caught.value)
