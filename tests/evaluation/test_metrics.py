"""Scores are sacreBLEU's own, and what only older papers compare with is named so."""

import os
import re
import subprocess
import sys
import types

import pytest

from tests.conftest import ROOT
from transformer.config import schema
from transformer.evaluation import metrics, significance, summary
from transformer.evaluation.bleu_tokenizer import PUBLISHED
from transformer.runtime.errors import UserError

HYPOTHESES = ["the cat sat on the mat", "Hello , World !", "it is 3 . 5 km away", "no match at all here"]
REFERENCES = ["the cat sat on a mat", "Hello, World!", "it is 3.5 km away", "something else entirely, really"]
SACREBLEU_METRICS = ("bleu", "chrf", "ter", "chrfpp")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("names", "flags"), [(["bleu", "chrf", "ter"], "bleu chrf ter"), (["chrfpp"], "chrf --chrf-word-order 2")]
)
def test_scores_equal_the_sacrebleu_command_on_the_files(tmp_path, names, flags, count):
    references = [REFERENCES, REFERENCES[1:] + REFERENCES[:1]][:count]
    for name, lines in (("hyp", HYPOTHESES), *((f"ref{i}", lines) for i, lines in enumerate(references))):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    paths = [tmp_path / f"ref{i}" for i in range(count)]
    command = [sys.executable, "-m", "sacrebleu", *map(str, paths), "-i", str(tmp_path / "hyp"), "-b", "-w", "12"]
    result = subprocess.run([*command, "-m", *flags.split()], capture_output=True, text=True, check=True)
    printed = [float(number) for number in re.findall(r"[\d.]+", result.stdout)]
    for name, wanted in zip(names, printed, strict=True):
        got = metrics.score(HYPOTHESES, references, [name])
        assert got[name] == pytest.approx(wanted, abs=1e-9)
        assert f"nrefs:{count}" in got[f"{name}_signature"]


def test_signatures_name_tokenizer_case_and_version():
    found = metrics.score(HYPOTHESES, [REFERENCES], SACREBLEU_METRICS)
    assert "case:mixed" in found["bleu_signature"]
    assert "tok:13a" in found["bleu_signature"]
    assert "nw:0" in found["chrf_signature"]
    assert "nw:2" in found["chrfpp_signature"]
    assert all("version:" in found[f"{name}_signature"] for name in SACREBLEU_METRICS)


def test_every_metric_that_a_config_may_name_is_defined():
    assert tuple(metrics.METRICS) == schema.METRIC_NAMES


def test_every_metric_is_documented():
    rows = [line for line in (ROOT / "docs" / "evaluation.md").read_text().splitlines() if line.startswith("| `")]
    assert [name for name in schema.METRIC_NAMES if not any(f"`{name}`" in row.split("|")[1] for row in rows)] == []


@pytest.mark.parametrize("name", schema.METRIC_NAMES)
def test_a_perfect_translation_has_the_better_score(name):
    if name.startswith("rouge"):
        pytest.importorskip("rouge_score")
    perfect, poor = (metrics.score(lines, [REFERENCES], [name])[name] for lines in (REFERENCES, REFERENCES[::-1]))
    assert (perfect < poor) == schema.LOWER_IS_BETTER[name]
    assert perfect != poor


@pytest.mark.parametrize(
    ("hypothesis", "reference", "accuracy", "exact_match"),
    [
        ("positive", "positive", 100, 100),
        (" positive ", "positive", 100, 100),  # spaces around a label
        ("Positive", "positive", 0, 100),
        ("The Eiffel Tower!", "eiffel  tower", 0, 100),
        ("an apple a day", "apple day", 0, 100),
        ("another", "other", 0, 0),  # an article within a word stays
        ("U.S.", "us", 0, 100),
        ("7:30 AM", "7:31 AM", 0, 0),
        ("", "the", 0, 100),
        ("", "x", 0, 0),
    ],
)
def test_accuracy_is_of_equal_lines_and_exact_match_of_normalized_ones(hypothesis, reference, accuracy, exact_match):
    found = metrics.score([hypothesis], [[reference]], ["accuracy", "exact_match"])
    assert (found["accuracy"], found["exact_match"]) == (accuracy, exact_match)


def test_scores_of_sentences_are_means_of_the_best_references():
    references = [["a", "b", "x y"], ["c", "b", "Y."]]
    found = metrics.score(["c", "a", "the y"], references, ["accuracy", "exact_match"])
    assert found["accuracy"] == pytest.approx(100 / 3)
    assert found["exact_match"] == pytest.approx(200 / 3)
    assert found["accuracy_signature"] == "nrefs:2|normalization:strip"
    assert metrics.score([], [[]], ["accuracy"])["accuracy"] == 0.0


def test_rouge_by_hand():
    """Three words, all of them among the six of the reference; of its five pairs two; three in its order."""
    pytest.importorskip("rouge_score")
    names = ["rouge1", "rouge2", "rougeL"]
    found = metrics.score(["The cat sat."], [["the cat sat on the mat"]], names)
    assert [found[name] for name in names] == pytest.approx([200 * 1 * 0.5 / 1.5, 200 * 1 * 0.4 / 1.4, 200 / 3])
    found = metrics.score(["sat cat the"], [["the cat sat on the mat"]], names)  # two in order
    assert [found[name] for name in names] == pytest.approx([200 / 3, 0, 400 / 9])


@pytest.mark.parametrize("count", [1, 2])
def test_rouge_is_the_mean_of_the_library_s(count):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    references = [REFERENCES, REFERENCES[1:] + REFERENCES[:1]][:count]
    rows = [scorer.score_multi(lines, line) for line, *lines in zip(HYPOTHESES, *references, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        found = metrics.score(HYPOTHESES, references, [name])
        assert found[name] == pytest.approx(100 * sum(row[name].fmeasure for row in rows) / len(rows))
        assert found[f"{name}_signature"].startswith(f"nrefs:{count}|stem:no|rouge-score:")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"rougeL needs the package rouge-score.*pip install rouge-score"):
        metrics.score(["a"], [["a"]], ["rougeL"])


def test_what_belongs_to_other_metrics_is_not_computed():
    lines = (HYPOTHESES, [REFERENCES])
    assert metrics.extended_scores(HYPOTHESES, *lines, "label", metrics=["accuracy"]) == {}
    assert set(metrics.extended_scores(HYPOTHESES, *lines, "de", metrics=["chrf"])) == {"chrfpp", "chrfpp_signature"}
    assert "chrfpp" not in metrics.extended_scores(HYPOTHESES, *lines, "de", metrics=["bleu"])


def test_length_ratio_is_of_words():
    assert metrics.score(["a b c"], [["a b c d e f"]], [])["length_ratio"] == 0.5


def test_several_references_can_only_help():
    one = metrics.score(HYPOTHESES, [REFERENCES], ["bleu"])["bleu"]
    two = metrics.score(HYPOTHESES, [REFERENCES, HYPOTHESES], ["bleu"])["bleu"]
    assert one < two == pytest.approx(100)


@pytest.mark.parametrize("references", [[REFERENCES[:3]], [[*REFERENCES, "one more"]], [REFERENCES, REFERENCES[1:]]])
def test_unequal_counts_are_an_error(references):
    with pytest.raises(UserError, match=r"expected one reference for each sentence, got 4 sentences and \d lines"):
        metrics.score(HYPOTHESES, references, ["bleu"])


def test_no_sentences_score_zero():
    actual = metrics.score([], [[]], ["bleu", "chrf", "ter"])
    assert (actual["bleu"], actual["chrf"], actual["length_ratio"]) == (0.0, 0.0, 0.0)
    further = metrics.extended_scores([], [], [[]], "de")
    assert (further["chrfpp"], further["legacy_tokenized_bleu"], further["bleu_by_source_length"]) == (0.0, 0.0, {})


def test_bleu_by_length_is_that_of_each_group_alone():
    sources = ["w " * 10, "w " * 11, "w " * 51, ""]
    groups = metrics.bleu_by_source_length(sources, HYPOTHESES, [REFERENCES])
    assert {words: group["sentences"] for words, group in groups.items()} == {"0-10": 2, "11-20": 1, "over 50": 1}
    assert list(groups) == ["0-10", "11-20", "over 50"]
    short = metrics.score([HYPOTHESES[0], HYPOTHESES[3]], [[REFERENCES[0], REFERENCES[3]]], ["bleu"])["bleu"]
    assert groups["0-10"]["bleu"] == pytest.approx(short)


# What tokenizer.perl -l de of Moses makes of them.
MOSES = {
    'Das ist z.B. ein "Test", d.h. 3,5 km & mehr.': "Das ist z.B. ein &quot; Test &quot; , d.h. 3,5 km &amp; mehr .",
    "Am 3. Mai (Montag) kam er... nicht!": "Am 3. Mai ( Montag ) kam er ... nicht !",
    "E-Mail-Text, Straße [so] | drei-mal.": "E-Mail-Text , Straße &#91; so &#93; &#124; drei-mal .",
    "Geht's? Der Hund ,der bellt": "Geht &apos; s ? Der Hund , der bellt",
}


@pytest.mark.parametrize("line", MOSES)
def test_tokens_are_those_of_moses(line):
    assert metrics.moses_tokenizer("de")[0](line) == MOSES[line]


def test_prefixes_that_keep_their_full_stop_are_those_of_the_language():
    assert metrics.moses_tokenizer("en")[0]("Mr. Smith isn't here.") == "Mr. Smith isn &apos;t here ."
    assert metrics.moses_tokenizer("de")[0]("Mr. Smith isn't here.") == "Mr. Smith isn &apos; t here ."
    assert metrics.moses_tokenizer("tlh")[0]("Mr. Worf yes.") == "Mr. Worf yes ."  # no list of its own: that of English


def test_compounds_are_split_as_perl_does_it():
    """perl -ple 's{(\\S)-(\\S)}{$1 ##AT##-##AT## $2}g': matches do not overlap."""
    assert metrics.split_compounds("E-Mail - 5-6") == "E ##AT##-##AT## Mail - 5 ##AT##-##AT## 6"
    assert metrics.split_compounds("a-b-c") == "a ##AT##-##AT## b-c"
    assert metrics.split_compounds("aa-bb-cc") == "aa ##AT##-##AT## bb ##AT##-##AT## cc"


def test_legacy_bleu_is_multi_bleu_on_those_tokens():
    """Counted by hand: of "der rot-grüne Hund bellt ." against "der rot-blaue Hund bellt ." ."""
    actual = metrics.tokenized_bleu(["der rot-grüne Hund bellt."], [["der rot-blaue Hund bellt."]], "de")
    # Split: der rot ##AT##-##AT## grüne Hund bellt . against the same with blaue.
    assert actual["legacy_compound_split_bleu"] == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 0 / 4) ** 0.25)
    longer = [["der rot-blaue Hund bellt laut und oft."], ["der rot-grüne Hund bellt laut und oft."]]
    actual = metrics.tokenized_bleu(longer[0], [longer[1]], "de")
    assert actual["legacy_tokenized_bleu"] == pytest.approx(100 * (7 / 8 * 5 / 7 * 4 / 6 * 3 / 5) ** 0.25)
    assert actual["legacy_compound_split_bleu"] == pytest.approx(100 * (9 / 10 * 7 / 9 * 5 / 8 * 3 / 7) ** 0.25)
    assert actual["legacy_signature"].startswith("multi-bleu|moses:de|sacremoses:")


def test_legacy_bleu_takes_several_references():
    actual = metrics.tokenized_bleu(HYPOTHESES, [REFERENCES, HYPOTHESES], "en")
    assert actual["legacy_tokenized_bleu"] == pytest.approx(100)


def test_bleu_of_tokenized_text_is_the_sacrebleu_command_with_its_options(tmp_path):
    hypotheses = ["ein Hund , der 3.5 Jahre schläft", "zwei hunde"]
    references = ["ein hund , der 3.5 jahre ruht", "zwei"]
    for name, lines in (("hyp", hypotheses), ("ref", references)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "ref"), "-i", str(tmp_path / "hyp"), "-b", "-w", "6"]
    done = subprocess.run([*command, *"-tok none -lc -s none".split()], capture_output=True, text=True, check=True)
    actual = metrics.score(hypotheses, [references], ["bleu", "chrf"], PUBLISHED)
    assert actual["bleu"] == pytest.approx(float(done.stdout), abs=1e-6)
    assert actual["bleu_signature"].startswith("nrefs:1|case:lc|eff:no|tok:none|smooth:none|")
    assert actual["bleu"] != pytest.approx(metrics.score(hypotheses, [references], ["bleu"])["bleu"], abs=0.1)
    assert actual["chrf"] == metrics.score(hypotheses, [references], ["chrf"])["chrf"]


# Two sentences that are nearly right, of one word each to 13a.
CHINESE = (
    ["我们今天去北京的大学看朋友。", "他昨天买了三本新书。"],
    [["我们今天去上海的大学看朋友。", "他昨天买了两本新书。"]],
)


@pytest.mark.parametrize("tokenizer", ["zh", "char", "intl", "13a"])
def test_bleu_is_of_the_tokenizer_that_is_named(tokenizer):
    actual = metrics.score(*CHINESE, ["bleu", "chrf", "ter"], tokenizer)
    wanted = metrics.BLEU(tokenize=tokenizer)
    assert actual["bleu"] == wanted.corpus_score(*CHINESE).score
    assert actual["bleu_signature"] == str(wanted.get_signature())
    assert (actual["bleu"] > 60) == (tokenizer in ("zh", "char"))
    further = metrics.extended_scores(CHINESE[0], *CHINESE, "zh", tokenizer)
    assert further["bleu_by_source_length"]["0-10"]["bleu"] == pytest.approx(actual["bleu"])
    (versus,) = significance.paired_tests(CHINESE[0], CHINESE[0], CHINESE[1], tokenizer, ["bleu"], samples=9)
    assert versus.score == actual["bleu"]


def test_tokenized_text_is_not_tokenized_again():
    lines = (["er sagt &apos; ja &apos; ."], [["er sagt &apos; ja &apos; !"]])
    actual = metrics.extended_scores(lines[0], *lines, "de", PUBLISHED)
    assert actual["legacy_tokenized_bleu"] == metrics.score(*lines, ["bleu"], PUBLISHED)["bleu"]
    assert actual["bleu_by_source_length"]["0-10"]["bleu"] == actual["legacy_tokenized_bleu"]
    assert actual["legacy_signature"] == "multi-bleu|as it is"


def test_without_comet_there_is_no_comet(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    assert metrics.comet_score(["a"], ["b"], [["c"]]) == {}


@pytest.fixture
def comet(monkeypatch):
    """Stands in for the package, whose weights are two gigabytes."""
    loaded = []

    class Model:
        def predict(self, rows, batch_size, gpus, progress_bar):
            return types.SimpleNamespace(system_score=sum(row["mt"] == row["ref"] for row in rows) / len(rows))

    package = types.ModuleType("comet")
    package.load_from_checkpoint = lambda path: loaded.append(path) or Model()
    hub = types.ModuleType("huggingface_hub")
    hub.try_to_load_from_cache = lambda model, file: hub.cached
    hub.cached = None
    monkeypatch.setitem(sys.modules, "comet", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: package)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("COMET_CHECKPOINT", raising=False)
    return types.SimpleNamespace(hub=hub, loaded=loaded)


def test_comet_is_read_from_the_cache_and_never_fetched(comet):
    assert metrics.comet_score(["a", "b"], ["x", "y"], [["x", "z"]]) == {}
    comet.hub.cached = "/cache/model.ckpt"
    assert metrics.comet_score(["a", "b"], ["x", "y"], [["x", "z"]]) == {
        "comet": 0.5,
        "comet_signature": "comet|model.ckpt",
    }
    assert comet.loaded == ["/cache/model.ckpt"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_cache_is_read_by_a_package_that_was_imported_offline(comet, monkeypatch):
    """`huggingface_hub` reads the variable once, when it is imported."""
    import_module = metrics.importlib.import_module
    imported = []

    def noted(name):
        imported.append((name, os.environ["HF_HUB_OFFLINE"]))
        return import_module(name)

    monkeypatch.setattr(metrics.importlib, "import_module", noted)
    comet.hub.cached = "/cache/model.ckpt"
    metrics.comet_score(["a"], ["x"], [["x"]])
    assert imported == [("huggingface_hub", "1"), ("comet", "1")]


def test_a_comet_that_fails_leaves_the_other_scores(comet, capsys):
    comet.hub.cached = "/cache/model.ckpt"

    def fails(path):
        raise RuntimeError("no weights")

    sys.modules["comet"].load_from_checkpoint = fails
    assert metrics.comet_score(["a"], ["x"], [["x"]]) == {}
    assert "warning: no COMET, which failed with RuntimeError: no weights" in capsys.readouterr().err


def test_comet_s_weights_may_be_a_file(comet, monkeypatch, tmp_path):
    monkeypatch.setenv("COMET_CHECKPOINT", str(tmp_path / "mine.ckpt"))
    with pytest.raises(UserError, match=r"COMET_CHECKPOINT=.*mine\.ckpt: expected a file"):
        metrics.comet_score(["a"], ["b"], [["c"]])
    (tmp_path / "mine.ckpt").write_bytes(b"")
    assert metrics.comet_score(["a"], ["b"], [["c"]])["comet_signature"] == "comet|mine.ckpt"


def test_signatures_of_directions_that_differ_are_named_and_empty_ones_left_out():
    def evaluated(signature):
        return summary.Evaluated(None, None, types.SimpleNamespace(scores={"bleu_signature": signature}))

    equal = {"en-de": evaluated("tok:13a"), "en-fr": evaluated("tok:13a"), "en-xx": evaluated("")}
    assert summary.signatures(equal, ["bleu"]) == ["BLEU tok:13a"]
    differing = {"en-de": evaluated("tok:13a"), "en-fr": evaluated("tok:13a"), "en-zh": evaluated("tok:zh")}
    assert summary.signatures(differing, ["bleu"]) == ["BLEU of en-de, en-fr tok:13a", "BLEU of en-zh tok:zh"]
    assert summary.signatures({"en-xx": evaluated("")}, ["bleu"]) == []
