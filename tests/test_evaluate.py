"""Scores are sacreBLEU's own, counts are checked first, and the loss covers every token once."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.conftest import small_config
from transformer import evaluate, sharding, tokenizer
from transformer.errors import UserError
from transformer.step import Model

HYPOTHESES = ["the cat sat on the mat", "Hello , World !", "it is 3 . 5 km away", "no match at all here"]
REFERENCES = ["the cat sat on a mat", "Hello, World!", "it is 3.5 km away", "something else entirely, really"]


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter"])
def test_scores_equal_the_sacrebleu_command_on_the_files(tmp_path, metric):
    (tmp_path / "ref").write_text("\n".join(REFERENCES) + "\n")
    (tmp_path / "hyp").write_text("\n".join(HYPOTHESES) + "\n")
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "ref"), "-i", str(tmp_path / "hyp"), "-m", metric]
    result = subprocess.run([*command, "-b", "-w", "12"], capture_output=True, text=True, check=True)
    got = evaluate.score(HYPOTHESES, [REFERENCES], [metric])[metric]
    assert got == pytest.approx(float(result.stdout), abs=1e-9)


def test_signatures_name_tokenizer_case_and_version():
    scores = evaluate.score(HYPOTHESES, [REFERENCES], ["bleu", "chrf", "ter"])
    assert "case:mixed" in scores["bleu_signature"]
    assert "tok:13a" in scores["bleu_signature"]
    assert all("version:" in str(scores[f"{name}_signature"]) for name in ("bleu", "chrf", "ter"))


def test_length_ratio_is_of_words():
    assert evaluate.score(["a b c"], [["a b c d e f"]], [])["length_ratio"] == 0.5


def test_several_references_can_only_help():
    one = evaluate.score(HYPOTHESES, [REFERENCES], ["bleu"])["bleu"]
    two = evaluate.score(HYPOTHESES, [REFERENCES, HYPOTHESES], ["bleu"])["bleu"]
    assert one < two == pytest.approx(100)


@pytest.mark.parametrize("references", [[REFERENCES[:3]], [[*REFERENCES, "one more"]], [REFERENCES, REFERENCES[1:]]])
def test_unequal_counts_are_an_error(references):
    with pytest.raises(UserError, match=r"expected one reference for each sentence, got 4 sentences and \d lines"):
        evaluate.score(HYPOTHESES, references, ["bleu"])


def test_no_sentences_score_zero():
    scores = evaluate.score([], [[]], ["bleu", "chrf", "ter"])
    assert (scores["bleu"], scores["chrf"], scores["length_ratio"]) == (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def evaluator():
    config = small_config(model={"num_layers": 1}, train={"batch_tokens": 64})
    vocabulary = tokenizer.train(HYPOTHESES + REFERENCES, 300, "bpe")
    model = Model(config.model, vocabulary.vocab_size)
    mesh = sharding.make_mesh(config.mesh)
    params = jax.device_put(model.init(0), sharding.replicated(mesh))
    return evaluate.Evaluator(model, vocabulary, config, mesh), params, model, vocabulary


def test_the_loss_is_the_mean_over_all_tokens(evaluator):
    """Against the sum over single sentences, so that no batch weighs more than its tokens."""
    room, params, model, vocabulary = evaluator
    sources, targets = HYPOTHESES * 5, REFERENCES * 5
    nll = count = 0.0
    logits = jax.jit(lambda source, target: model.bind(params)(source, target))
    for source, target in zip(HYPOTHESES, REFERENCES, strict=True):
        s, t = (np.pad(ids, (0, 64 - len(ids)))[None] for ids in vocabulary.encode([source, target]))
        log_p = jax.nn.log_softmax(logits(s, t))[0]
        t = t[:, : (t != 0).sum()]
        nll -= float(log_p[np.arange(t.shape[1]), t[0]].sum())
        count += t.shape[1]
    assert room.held_out_loss(params, sources, targets) == pytest.approx(nll / count, rel=1e-5)


def test_a_mesh_changes_nothing_but_rounding(evaluator):
    one, params, model, vocabulary = evaluator
    config = small_config(
        model={"num_layers": 1}, train={"batch_tokens": 64}, mesh={"fsdp": 2, "tensor": 2, "sequence": 2}
    )
    mesh = sharding.make_mesh(config.mesh)
    many = evaluate.Evaluator(model, vocabulary, config, mesh)
    split = jax.device_put(params, sharding.param_shardings(mesh, model.abstract_params))
    ours, theirs = (room.evaluate(held, HYPOTHESES, [REFERENCES]) for room, held in ((many, split), (one, params)))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.translations == theirs.translations


def test_the_report_holds_a_translation_for_each_sentence(evaluator):
    room, params, _, _ = evaluator
    done = []
    report = room.evaluate(params, [*HYPOTHESES, ""], [[*REFERENCES, ""]], progress=done.append)
    assert report.sentences == len(report.translations) == 5
    assert report.translations[-1] == ""
    assert sum(done) == 4  # a blank line costs no search
    assert set(report.scores) == {f"{m}{s}" for m in ("bleu", "chrf", "ter") for s in ("", "_signature")} | {
        "length_ratio"
    }


def test_an_empty_set_is_evaluated(evaluator):
    room, params, _, _ = evaluator
    report = room.evaluate(params, [], [[]])
    assert (report.sentences, report.loss, report.translations) == (0, 0.0, [])


def test_counts_are_checked_before_anything_is_translated(evaluator, monkeypatch):
    room, params, _, _ = evaluator
    monkeypatch.setattr(room.translator, "translate", lambda *_: pytest.fail("translated"))
    with pytest.raises(UserError, match="got 4 sentences and 3 lines in reference 1"):
        room.evaluate(params, HYPOTHESES, [REFERENCES[:3]])


def test_a_very_long_line_is_cut_not_dropped(evaluator):
    room, params, _, _ = evaluator
    assert np.isfinite(room.held_out_loss(params, ["cat " * 5000], ["mat " * 5000]))
