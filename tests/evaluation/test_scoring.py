"""A set is opened with all its references, and a model is scored on it."""

import dataclasses
import os
import types

import jax
import pytest

from tests.checkpoints.test_manager import make_parts
from transformer.checkpoints.loading import RestoredModel
from transformer.distributed import sharding
from transformer.evaluation import evaluator as scoring
from transformer.evaluation import results
from transformer.evaluation.datasets import EvalDataset, load_eval_dataset
from transformer.evaluation.evaluator import CrossEntropy
from transformer.runtime.errors import DivergedError, UserError

SOURCES = ["the old house", "a new tree", ""]
DATASET = EvalDataset("mine", SOURCES, [["das alte Haus", "ein neuer Baum", ""]])


def make_trained():
    config, vocabulary, model, mesh, state = make_parts()
    params = jax.device_put(state.params, sharding.replicated(mesh))
    return RestoredModel("latest", [7], {}, config, vocabulary, model, params, mesh)


@pytest.fixture(scope="module")
def result():
    return scoring.CheckpointEvaluator(DATASET).evaluate(make_trained())


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_files_are_a_set_of_their_own_with_several_references(tmp_path):
    source = write(tmp_path / "in.en", SOURCES)
    references = [write(tmp_path / f"r{i}", [f"{line} {i}" for line in SOURCES]) for i in range(2)]
    actual = load_eval_dataset(make_parts()[0].data, None, source, references)
    assert (actual.name, actual.sources) == ("in.en", SOURCES)
    assert actual.references == [[f"{line} {i}" for line in SOURCES] for i in range(2)]


def test_missing_references_and_unequal_counts_are_refused(tmp_path):
    source, short = write(tmp_path / "in.en", SOURCES), write(tmp_path / "short", SOURCES[1:])
    data = make_parts()[0].data
    with pytest.raises(UserError, match="none: there is no such file"):
        load_eval_dataset(data, None, source, [f"{tmp_path}/none"])
    with pytest.raises(UserError, match="3 sentences and 2 lines in reference 2"):
        load_eval_dataset(data, None, source, [source, short])


def test_a_model_is_scored_and_its_translations_written(result, tmp_path):
    assert (result.sentences, result.translations[2]) == (3, "")
    assert {"bleu", "chrf", "ter", "length_ratio"} < result.scores.keys()
    assert {"chrfpp", "bleu_by_source_length", "legacy_tokenized_bleu"} < result.scores.keys()
    assert "moses:de" in result.scores["legacy_signature"]
    trained = make_trained()
    name = results.result_name(tmp_path, trained, DATASET)
    other = results.result_name(tmp_path, trained, DATASET, {"top_k": 3, "method": "sample"})
    assert other == f"{name}.method=sample.top_k=3"
    path = results.translations_path(tmp_path, name)
    results.write_translations(result.translations, path)
    assert path == tmp_path / "translations" / "7.mine.txt"
    assert path.read_text() == "".join(f"{line}\n" for line in result.translations)
    assert {each.name for each in path.parent.iterdir()} == {path.name, results.DATASETS_FILE}


@pytest.mark.reported
def test_two_sets_of_one_name_have_files_of_their_own(tmp_path):
    """The first has the plain name, others their digest in it, whatever is evaluated in between."""
    other = DATASET._replace(references=[["the", "second", "set"]])
    third = EvalDataset("another", *DATASET[1:])
    trained = make_trained()
    for _ in range(2):
        names = [results.result_name(tmp_path, trained, each) for each in (DATASET, other, third)]
        assert names == ["7.mine", f"7.mine-{other.digest[:8]}", "7.another"]
    (tmp_path / "translations" / results.DATASETS_FILE).write_text("[damaged")
    assert results.result_name(tmp_path, trained, DATASET) == "7.mine"


def test_a_set_may_come_from_pipes_which_are_read_once(tmp_path):
    pipes = [os.pipe() for _ in range(2)]
    for _, sender in pipes:
        os.write(sender, "".join(f"{line}\n" for line in SOURCES).encode())
        os.close(sender)
    source, reference = (f"/dev/fd/{reader}" for reader, _ in pipes)
    actual = load_eval_dataset(make_parts()[0].data, None, source, [reference])
    assert (actual.sources, actual.references) == (SOURCES, [SOURCES])


@pytest.mark.parametrize(
    ("change", "signature", "legacy"),
    [
        ({"tokenized": True}, "case:lc|eff:no|tok:none|smooth:none", "multi-bleu|as it is"),
        ({"bleu_tokenizer": "none"}, "case:mixed|eff:no|tok:none|smooth:exp", "multi-bleu|as it is"),
        ({"target_language": "zh-CN"}, "case:mixed|eff:no|tok:zh|smooth:exp", "multi-bleu|moses:zh-CN"),
    ],
)
def test_text_is_scored_as_the_config_says_it_is(change, signature, legacy):
    trained = make_trained()
    data = dataclasses.replace(trained.config.data, **change)
    other = dataclasses.replace(trained, config=dataclasses.replace(trained.config, data=data))
    actual = scoring.CheckpointEvaluator(DATASET).evaluate(other)
    assert signature in actual.scores["bleu_signature"]
    assert actual.scores["legacy_signature"].startswith(legacy)


def test_compiled_shapes_are_kept_while_config_and_vocabulary_stay(monkeypatch):
    made = []

    def evaluator(*args):
        made.append(args)
        result = scoring.EvalResult(3, 1.0, 2.7, 3.0, {}, ["", "", ""], 0.1)
        return types.SimpleNamespace(evaluate=lambda *args, **_: result)

    monkeypatch.setattr(scoring, "Evaluator", evaluator)
    scorer, trained = scoring.CheckpointEvaluator(DATASET), make_trained()
    scorer.evaluate(trained)
    scorer.evaluate(trained)
    assert len(made) == 1
    other = dataclasses.replace(trained.config, decode=dataclasses.replace(trained.config.decode, beam_size=3))
    scorer.evaluate(dataclasses.replace(trained, config=other))
    assert len(made) == 2


def test_a_loss_that_is_no_number_is_no_result(monkeypatch):
    monkeypatch.setattr(scoring.Evaluator, "teacher_forced_loss", lambda *args: CrossEntropy(float("nan"), 1, 1))
    with pytest.raises(DivergedError, match="checkpoint 7: its loss is nan"):
        scoring.CheckpointEvaluator(DATASET).evaluate(make_trained())
