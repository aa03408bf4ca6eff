"""The report that a person opens: everything is in it, nothing is fetched, and a browser shows it."""

import dataclasses
import json
import re
import shutil
import subprocess

import jax
import pytest

from tests.conftest import small_config
from transformer.checkpoints.loading import RestoredModel
from transformer.config import schema
from transformer.data import tokenizer
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.evaluation import comparison as comparisons
from transformer.evaluation import continuous, evaluator, metrics, report, results, systems
from transformer.evaluation.datasets import EvalDataset
from transformer.models.flops import TrainingCost, format_count
from transformer.models.registry import ModelDef

WORDS = ["red", "green", "blue", "old", "new", "house", "tree", "cat", "dog", "sees", "has"]
EVIL = "</script><script>document.title = 'broken'</script> & <b>bold</b> cat sees house"
SOURCES = [EVIL, *(" ".join(WORDS[i % 7 : i % 7 + 2 + i % 4]) for i in range(30)), ""]
DATASET = EvalDataset("mine", SOURCES, [[source.upper() for source in SOURCES]])
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0"]


@pytest.fixture(scope="module")
def evaluation():
    """A model, a data set and the result of its evaluation."""
    config = small_config()
    vocabulary = tokenizer.train([*SOURCES[1:-1], EVIL], 290, "bpe")
    model = ModelDef(config.model, vocabulary.vocab_size)
    mesh = make_mesh(config.mesh)
    params = jax.device_put(model.init(5), sharding.replicated(mesh))
    trained = RestoredModel("latest", [20], {}, config, vocabulary, model, params, mesh)
    return trained, DATASET, evaluator.CheckpointEvaluator(DATASET).evaluate(trained)


@pytest.fixture(scope="module")
def workdir(evaluation, tmp_path_factory):
    """With metrics, of which the last line is being written, and two steps that --watch has scored."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdir.mkdir()
    lines = [{"step": i, "train/loss": 8 / i, "train/learning_rate": i / 1e4} for i in range(1, 20)]
    lines += [{"step": 10, "valid/loss": 3.0, "valid/bleu": 11.0}, {"step": 20, "valid/loss": 2.0, "valid/bleu": 17.5}]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 3')
    for step, bleu in ((20, 16.0), (10, 12.25)):
        for digest, score in ((DATASET.digest, bleu), ("another", 99.0)):  # a file of the same name
            entry = {"step": step, "name": "mine", "set": digest, "bleu": score, "loss": 2.5}
            continuous.append_evaluation(workdir, entry)
    translations = evaluation[2].translations
    baseline = [*DATASET.references[0][:9], *translations[9:]]
    other = systems.System("other", "the other", baseline)
    this = systems.evaluated(workdir, evaluation[0], translations)
    comparison = comparisons.compare([other, this], SOURCES, DATASET.references, "13a", samples=50)
    report.write(workdir, "20.mine", *evaluation, comparison)
    return workdir


def section_of(page, name):
    return page[page.index(f'<section id="{name}">') :].split("\n<section id=")[0]


def test_the_scores_have_their_signatures(workdir, evaluation):
    scores = section_of((workdir / "report.html").read_text(), "scores")
    for name in ("BLEU", "chrF2", "TER", "chrF2++", "perplexity", "length ratio", "legacy BLEU"):
        assert f">{name}</td>" in scores
    assert scores.count("version:") >= 4
    assert f">{evaluation[2].scores['chrf']:.2f}</td>" in scores


def test_the_curves_are_those_of_the_files(workdir):
    curves = section_of((workdir / "report.html").read_text(), "curves")
    assert "validation, step 20: 17.5" in curves
    assert curves.index("mine, step 10: 12.25") < curves.index("mine, step 20: 16<")
    assert len(re.findall("training, step", curves)) == 19
    assert "learning rate, step 19: 0.0019" in curves


def test_sentences_are_ranked_and_shown_once(evaluation, workdir):
    page = (workdir / "report.html").read_text()
    ranked = report.rank_sentences(DATASET, evaluation[2].translations, "chrf")
    assert ranked == sorted(ranked)
    assert len(ranked) == len(SOURCES)
    worst = report.worst_sentences(DATASET, ranked)
    assert worst == ranked[: report.NUM_SENTENCES]
    good = report.best_sentences(DATASET, ranked, worst)
    assert [score for score, _ in good] == sorted((score for score, _ in good), reverse=True)
    assert not set(worst) & set(good)
    assert section_of(page, "worst").count('<article class="sentence">') == report.NUM_SENTENCES
    assert '<mark class="odd">' in section_of(page, "worst")


def test_sentences_that_are_shown_differ_in_words_and_length():
    """Eight short ones that are nearly equal leave places for others, though these are not as good."""
    short = [f"the cat sees the dog {i}" for i in range(8)]
    others = [
        " ".join(f"{kind}{i}" for i in range(length)) for kind, length in (("a", 4), ("b", 15), ("c", 25), ("d", 60))
    ]
    sources = [*short, *others]
    dataset = EvalDataset("s", sources, [sources])
    ranked = [(100.0 - i, i) for i in range(len(sources))]
    shown = [sources[i] for _, i in report.varied_sentences(dataset, ranked)]
    assert set(others) < set(shown)
    assert shown[0] == short[0]
    assert len(shown) == report.NUM_SENTENCES  # repeats fill up the rest
    perfect = [(100.0, i) for i in range(len(sources))]
    assert report.worst_sentences(dataset, [(50.0, 3), *perfect[:3], *perfect[4:]]) == [(50.0, 3)]


def test_large_sets_are_ranked_in_part(evaluation, monkeypatch):
    monkeypatch.setattr(report, "MAX_RANKED", 10)
    assert 5 <= len(report.rank_sentences(DATASET, evaluation[2].translations, "chrf")) <= 10


def test_a_task_is_reported_by_its_own_metric(evaluation, tmp_path):
    """Its curve, the order of its sentences, and the title; a run validated by BLEU alone shows that."""
    trained, dataset, result = evaluation
    task = schema.EvalConfig(metrics="exact_match,rougeL")
    trained = dataclasses.replace(trained, config=dataclasses.replace(trained.config, eval=task))
    translations = [*dataset.references[0][:20], *result.translations[20:]]
    scores = metrics.score(translations, dataset.references, task.metric_names)
    result = dataclasses.replace(result, translations=translations, scores=scores)
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 10, "valid/bleu": 1.5}\n')
    empty = EvalDataset("empty", [], [[]])
    page = report.build(tmp_path, trained, empty, evaluator.CheckpointEvaluator(empty).evaluate(trained))
    assert "<figcaption>BLEU<" in section_of(page, "curves")
    log.write_text('{"step": 10, "valid/bleu": 1.5, "valid/exact_match": 35.5}\n')
    other = systems.System("other", "the other", dataset.sources)
    this = systems.evaluated(tmp_path, trained, translations)
    compared = comparisons.compare(
        [other, this], SOURCES, dataset.references, "13a", samples=20, metrics=task.metric_names
    )
    page = report.build(tmp_path, trained, dataset, result, compared)
    assert f"<title>{tmp_path.name}: evaluation report</title>" in page
    assert re.findall("<figcaption>(.*?)<", section_of(page, "curves")) == ["exact match"]
    assert "validation, step 10: 35.5" in section_of(page, "curves")
    assert "By exact match, of different lengths" in section_of(page, "worst")
    assert set(re.findall("exact match ([0-9.]+)<", section_of(page, "worst"))) == {"0.0"}
    assert set(re.findall("exact match ([0-9.]+)<", section_of(page, "best"))) == {"100.0"}
    assert "chrF2" not in section_of(page, "attention")
    assert "difference in exact match" in section_of(page, "breakdowns")
    assert "chrF2" not in section_of(page, "sentences") + comparisons.format_examples(compared)


KINDS = ("translation to source", "source to itself", "translation to what precedes it")


def test_attention_has_a_map_for_each_layer_and_head(workdir):
    """Of cross-attention, and of the self-attention of encoder and decoder."""
    attention = section_of((workdir / "report.html").read_text(), "attention")
    sentences = attention.count("<h3>sentence")
    assert 1 <= sentences <= 3
    assert re.findall("<h4>(.*?)</h4>", attention) == [*KINDS] * sentences
    assert attention.count('class="map"') == sentences * 3 * 2 * (1 + 2)
    assert attention.count(">&lt;s&gt;<") == sentences  # what the decoder reads first


@pytest.mark.reported
def test_attention_opens_on_the_layer_that_aligns(workdir):
    attention = section_of((workdir / "report.html").read_text(), "attention")
    sentences = attention.count('<section class="attention">')
    assert attention.count('<p class="shown">layer 2, mean of heads</p>') == sentences


def test_the_other_system_is_compared(workdir):
    page = (workdir / "report.html").read_text()
    assert "Compared with other" in section_of(page, "versus")
    assert '<td class="">run</td>' in section_of(page, "versus")
    browsed = section_of(page, "sentences")
    assert browsed.count('<article class="sentence"') == len(SOURCES)
    assert "<dt>other</dt>" in browsed
    assert "<dt>run</dt>" in browsed


def test_curves_of_two_runs_are_named_by_run(evaluation, workdir, tmp_path):
    trained, _, result = evaluation
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10, "valid/bleu": 8.5, "train/loss": 3.0}) + "\n")
    pair = systems.label_pair(
        systems.evaluated(tmp_path, trained, SOURCES),
        tmp_path,
        systems.evaluated(workdir, trained, result.translations),
    )
    comparison = comparisons.compare(pair, SOURCES, DATASET.references, "13a", samples=20)
    page = report.build(workdir, trained, DATASET, result, comparison)
    curves = section_of(page, "curves")
    assert f"{tmp_path.name}, validation, step 10: 8.5" in curves
    assert "run, validation, step 20: 17.5" in curves
    assert "run, mine, step 10: 12.25" in curves
    assert re.findall(r'<td class="">checkpoint 20</td><td class="number">(.*?)</td>', page)[0] == (
        format_count(trained.model.num_params())
    )


def test_the_header_has_the_size_and_cost_of_the_model(evaluation, tmp_path):
    trained, dataset, result = evaluation
    costs = TrainingCost(2.5e13, 2.8e6, 2e6, 5400).metrics()
    page = report.build(tmp_path, dataclasses.replace(trained, metrics=costs), dataset, result)
    header = page[: page.index('<section id="scores">')]
    for cell in ("2.8 M", "2.5e+13", "1.50"):
        assert f'<td class="number">{cell}</td>' in header
    assert '<section id="length">' in page
    assert 'class="interval"' in section_of(page, "length")


def test_an_empty_set_and_a_bare_workdir_make_a_page(evaluation, tmp_path):
    trained, empty = evaluation[0], EvalDataset("empty", [], [[]])
    page = report.build(tmp_path, trained, empty, evaluator.CheckpointEvaluator(empty).evaluate(trained))
    assert "empty, 0 sentences" in page
    assert 'id="attention"' not in page
    assert 'id="curves"' not in page


@pytest.mark.reported
def test_each_set_keeps_its_page_and_the_newest_is_on_top(evaluation, workdir, tmp_path, monkeypatch):
    """Two sets of one file name, and one of them against another system and decoded otherwise."""

    def name(*arguments):
        return results.result_name(tmp_path, trained, *arguments)

    monkeypatch.setattr(report, "build", lambda workdir, restored, dataset, *_: f"page of {dataset.digest}")
    (tmp_path / "translations").mkdir()
    trained, _, result = evaluation
    other = DATASET._replace(references=[SOURCES])
    digest = other.digest
    report.write(tmp_path, name(DATASET), *evaluation)
    report.write(tmp_path, name(other), trained, other, result)
    other = systems.System("b", "runs/a b, checkpoint 3", [])
    comparison = comparisons.Comparison([other], [], [[]], [], [], [], [])
    report.write(tmp_path, name(DATASET, {"beam_size": 1}), *evaluation, comparison)
    kept = {path.name: path.read_text() for path in (tmp_path / "reports").iterdir()}
    assert kept == {
        "20.mine.html": f"page of {DATASET.digest}",
        f"20.mine-{digest[:8]}.html": f"page of {digest}",
        "20.mine.beam_size=1.versus-runs-a-b-checkpoint-3.html": f"page of {DATASET.digest}",
    }
    assert (tmp_path / "report.html").read_text() == f"page of {DATASET.digest}"
    assert (workdir / "reports" / "20.mine.versus-the-other.html").read_text() == (workdir / "report.html").read_text()


def test_a_page_that_cannot_be_written_costs_no_scores(evaluation, tmp_path, capsys):
    report.write(tmp_path / "none", "20.mine", *evaluation)
    assert "warning: no report" in capsys.readouterr().err


def browse(page, tmp_path, *flags):
    command = [CHROMIUM, *BROWSER, f"--user-data-dir={tmp_path}/profile", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with; install Debian's package chromium")
def test_a_browser_shows_it(workdir, tmp_path):
    """The script works, no sentence became markup, and the page breaks none of its own rules."""
    press = "<script>document.querySelectorAll('.map')[2].click()</script></body>"
    page = tmp_path / "report.html"
    page.write_text((workdir / "report.html").read_text().replace("</body>", press))
    shown = browse(page, tmp_path, "--dump-dom")
    assert "<title>run: translation report</title>" in shown.stdout  # the sentence that would change it did not
    for name in (
        "scores",
        "curves",
        "versus",
        "breakdowns",
        "ngrams",
        "sentences",
        "worst",
        "best",
        "attention",
        "config",
    ):
        assert f'<section id="{name}">' in shown.stdout
    assert '<p class="shown">layer 1, head 2</p>' in shown.stdout
    assert len(re.findall('aria-pressed="true"', shown.stdout)) == shown.stdout.count('<section class="attention">')
    assert "CONSOLE" not in shown.stderr
