"""Counts are checked first, every sentence is scored once, and the loss covers every token once."""

import math

import jax
import numpy as np
import pytest

from tests.conftest import small_config
from transformer.data import tokenizer
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.evaluation import evaluator as scoring
from transformer.models.registry import ModelDef
from transformer.runtime.errors import UserError

HYPOTHESES = ["the cat sat on the mat", "Hello , World !", "it is 3 . 5 km away", "no match at all here"]
REFERENCES = ["the cat sat on a mat", "Hello, World!", "it is 3.5 km away", "something else entirely, really"]


@pytest.fixture(scope="module")
def evaluator():
    config = small_config(model={"num_layers": 1}, train={"batch_tokens": 64})
    vocabulary = tokenizer.train(HYPOTHESES + REFERENCES, 300, "bpe")
    model = ModelDef(config.model, vocabulary.vocab_size)
    mesh = make_mesh(config.mesh)
    params = jax.device_put(model.init(0), sharding.replicated(mesh))
    return scoring.Evaluator(model, vocabulary, config, mesh), params, model, vocabulary


def test_the_loss_is_the_mean_over_all_tokens(evaluator):
    """Against the sum over single sentences, so that no batch weighs more than its tokens."""
    evaluator, params, model, vocabulary = evaluator
    sources, targets = HYPOTHESES * 5, REFERENCES * 5
    nll = count = 0.0
    logits = jax.jit(lambda source, target: model.bind(params)(source, target))
    for source, target in zip(HYPOTHESES, REFERENCES, strict=True):
        s, t = (np.pad(ids, (0, 64 - len(ids)))[None] for ids in vocabulary.encode([source, target]))
        log_p = jax.nn.log_softmax(logits(s, t))[0]
        t = t[:, : (t != 0).sum()]
        nll -= float(log_p[np.arange(t.shape[1]), t[0]].sum())
        count += t.shape[1]
    result = evaluator.teacher_forced_loss(params, sources, targets)
    assert result.mean == pytest.approx(nll / count, rel=1e-5)
    assert result.tokens == 5 * count
    words = sum(len(target.split()) + 1 for target in REFERENCES)
    assert result.words == 5 * words
    assert result.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert result.word_perplexity == pytest.approx(math.exp(nll / words), rel=1e-5)


@pytest.mark.slow
def test_a_mesh_changes_nothing_but_rounding(evaluator):
    one, params, model, vocabulary = evaluator
    config = small_config(
        model={"num_layers": 1}, train={"batch_tokens": 64}, mesh={"fsdp": 2, "tensor": 2, "sequence": 2}
    )
    mesh = make_mesh(config.mesh)
    many = scoring.Evaluator(model, vocabulary, config, mesh)
    split = jax.device_put(params, sharding.param_shardings(mesh, model.abstract_params))
    ours, theirs = (
        evaluator.evaluate(held, HYPOTHESES, [REFERENCES]) for evaluator, held in ((many, split), (one, params))
    )
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.translations == theirs.translations


def test_no_more_goes_through_the_model_at_once_than_in_training(evaluator, monkeypatch):
    one, params, model, vocabulary = evaluator
    config = small_config(model={"num_layers": 1}, train={"batch_tokens": 256, "accumulation_steps": 4})
    parts, slots = scoring.Evaluator(model, vocabulary, config, make_mesh(config.mesh)), []
    run = parts._eval_step
    monkeypatch.setattr(parts, "_eval_step", lambda p, batch: (slots.append(batch.target_BT.size), run(p, batch))[1])
    lines = HYPOTHESES * 2, REFERENCES * 2
    assert parts.teacher_forced_loss(params, *lines).mean == pytest.approx(
        one.teacher_forced_loss(params, *lines).mean, rel=1e-6
    )
    assert max(slots) == 64


def test_the_report_holds_a_translation_for_each_sentence(evaluator):
    evaluator, params, _, _ = evaluator
    done = []
    report = evaluator.evaluate(params, [*HYPOTHESES, ""], [[*REFERENCES, ""]], progress=done.append)
    assert report.sentences == len(report.translations) == 5
    assert report.translations[-1] == ""
    assert sum(done) == 4  # a blank line costs no search
    assert set(report.scores) == {f"{m}{s}" for m in ("bleu", "chrf", "ter") for s in ("", "_signature")} | {
        "length_ratio"
    }


def test_a_device_takes_no_more_than_fits_however_many_trained(evaluator, monkeypatch):
    """A model trained on 64 devices is evaluated on one."""
    one, _, model, vocabulary = evaluator
    config = small_config(model={"num_layers": 1}, train={"batch_tokens": 64 * 25_000})
    mesh = make_mesh(config.mesh)
    shards = sharding.num_shards("batch", mesh)
    assert scoring.Evaluator(model, vocabulary, config, mesh)._rows_of(64) == 256 * shards
    assert one._rows_of(64) == shards


def test_translations_are_handed_over_before_they_are_scored(evaluator, monkeypatch):
    evaluator, params, _, _ = evaluator
    taken = []

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluator.evaluate(params, HYPOTHESES, [REFERENCES], on_translated=taken.extend)
    assert len(taken) == len(HYPOTHESES)


def test_an_empty_set_is_evaluated(evaluator):
    evaluator, params, _, _ = evaluator
    report = evaluator.evaluate(params, [], [[]])
    assert (report.sentences, report.loss, report.translations) == (0, 0.0, [])


def test_counts_are_checked_before_anything_is_translated(evaluator, monkeypatch):
    evaluator, params, _, _ = evaluator
    monkeypatch.setattr(evaluator.translator, "translate", lambda *_: pytest.fail("translated"))
    with pytest.raises(UserError, match="got 4 sentences and 3 lines in reference 1"):
        evaluator.evaluate(params, HYPOTHESES, [REFERENCES[:3]])


def test_a_very_long_line_is_cut_not_dropped(evaluator):
    evaluator, params, _, _ = evaluator
    result = evaluator.teacher_forced_loss(params, ["cat " * 5000], ["mat " * 5000])
    assert np.isfinite(result.mean)
    assert result.words <= result.tokens == 74  # of the 5,001 words those in the first 74 tokens


def test_a_loss_beyond_all_bounds_is_an_infinite_perplexity():
    assert scoring.CrossEntropy(1000.0, 10, 5).perplexity == math.inf
    assert math.isnan(scoring.CrossEntropy(math.nan, 10, 5).word_perplexity)
