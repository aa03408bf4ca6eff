"""Log-probabilities of given translations: those of the search and of validation, in the order of the pairs."""

import jax
import numpy as np
import pytest

from tests.conftest import slow, small_config
from tests.decoding.test_translator import LINES
from transformer.data import tokenizer
from transformer.data.tokenizer import EOS
from transformer.decoding import decode
from transformer.decoding.scorer import Scorer
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.evaluation.evaluator import Evaluator
from transformer.models.registry import ModelDef
from transformer.runtime.errors import UserError

VOCABULARY = tokenizer.train(LINES, 300, "bpe")
SOURCES = [*LINES, "", "red cat"]
TARGETS = [*LINES[::-1], "red", ""]
FAMILIES = ["attention", slow("recurrent"), slow("convolutional")]


def make(family="attention", seed=0, **sections):
    """Model, params and config; the recurrent and convolutional families take no fields of attention."""
    others = {"num_heads": 8, "mlp_dim": 2048} if family != "attention" else {}  # the defaults of fields not read
    config = small_config(model={"family": family, "num_layers": 1, **others}, **sections)
    model = ModelDef(config.model, VOCABULARY.vocab_size)
    mesh = make_mesh(config.mesh)
    return model, jax.device_put(model.init(seed), sharding.replicated(mesh)), config, mesh


@pytest.fixture(scope="module")
def parts():
    return make()


@pytest.fixture(scope="module")
def scores(parts):
    model, params, config, mesh = parts
    return Scorer([model], VOCABULARY, mesh).score([params], SOURCES, TARGETS, config.decode)


def test_a_sentence_is_the_sum_of_its_tokens_the_end_included(scores):
    for score, target in zip(scores, TARGETS, strict=True):
        assert score.tokens == VOCABULARY.pieces(VOCABULARY.encode([target])[0])
        assert len(score.token_log_probs) == len(score.tokens)
        assert score.log_prob == pytest.approx(sum(score.token_log_probs), abs=1e-6)
        assert score.tokens[-1] == "</s>"
        assert max(score.token_log_probs) <= 0


def test_each_pair_has_the_score_it_has_alone(parts, scores):
    model, params, config, mesh = parts
    scorer = Scorer([model], VOCABULARY, mesh)
    order = np.random.default_rng(0).permutation(len(SOURCES))
    shuffled = scorer.score([params], [SOURCES[i] for i in order], [TARGETS[i] for i in order], config.decode)
    assert [shuffled[i].token_log_probs for i in np.argsort(order)] == [each.token_log_probs for each in scores]
    (alone,) = scorer.score([params], SOURCES[3:4], TARGETS[3:4], config.decode)
    assert alone == scores[3]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_is_the_loss_of_validation(family):
    """Which has no label smoothing, whatever the config trains with."""
    model, params, config, mesh = make(family, optimizer={"label_smoothing": 0.1})
    scores = Scorer([model], VOCABULARY, mesh).score([params], SOURCES, TARGETS, config.decode)
    loss = Evaluator(model, VOCABULARY, config, mesh).teacher_forced_loss(params, SOURCES, TARGETS)
    assert sum(len(each.tokens) for each in scores) == loss.tokens
    assert -sum(each.log_prob for each in scores) / loss.tokens == pytest.approx(loss.mean, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_translations_have_the_score_that_beam_search_gave_them(family):
    """Without length penalty; of one model and of an ensemble of two. A truncated hypothesis has no end."""
    model, params, config, mesh = make(family, decode={"length_penalty": 0.0})
    other = make(family, seed=1)[1]
    sources = VOCABULARY.encode(LINES[:8])
    source_BS = np.stack([np.pad(ids, (0, 64 - len(ids))) for ids in sources])
    for members in ([params], [params, other]):
        models = [model] * len(members)
        result = jax.jit(
            lambda params, source_BS, models=models: decode.decode(
                models, config.decode, 2, params, decode.DecodeInputs(source_BS)
            )
        )(tuple(members), source_BS)
        best = [ids[:length] for ids, length in zip(result.tokens_BNT[:, 0], result.lengths_BN[:, 0], strict=True)]
        targets = [np.asarray(ids) for ids in best]
        log_probs = Scorer(models, VOCABULARY, mesh).log_probs(members, sources, targets, config.decode)
        np.testing.assert_allclose([each.sum() for each in log_probs], result.scores_BN[:, 0], rtol=1e-4, atol=1e-4)
        assert [ids[-1] == EOS for ids in targets] == result.finished_BN[:, 0].tolist()


def test_the_device_sees_few_shapes_and_long_sides_are_cut_and_counted(parts, capsys):
    model, params, config, mesh = parts
    scorer = Scorer([model], VOCABULARY, mesh)
    shapes, program = [], scorer._log_probs
    scorer._log_probs = lambda params, batch: (shapes.append(batch.target_BT.shape), program(params, batch))[1]
    result = scorer.score([params], ["cat " * 500, *SOURCES], ["red " * 500, *TARGETS], config.decode)
    assert len(result[0].tokens) == 64 + 10
    assert result[0].tokens[-1] == "</s>"
    assert {rows for rows, _ in shapes} == {8}
    assert {width for _, width in shapes} <= {16, 32, 64, 128}
    scorer.log_warnings(config.decode)
    scorer.log_warnings(config.decode)
    logged = capsys.readouterr().err
    assert logged.count("warning: 1 sources are longer than decode.max_source_tokens = 64; scored as if") == 1
    assert "warning: 1 targets are longer than decode.max_source_tokens = 64 and 10 more" in logged
    assert f"warning: {sum(not (a and b) for a, b in zip(SOURCES, TARGETS, strict=True))} pairs have a blank" in logged


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        (["a"], ["b", "c"], "expected a target for each source, got 1 sources, 2 targets"),
        ("a", ["b"], "sources: expected a list of texts, got one text, 'a'"),
        (["a"], [3], "target 1: expected str, got int: 3"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused(parts, sources, targets, message):
    model, params, config, mesh = parts
    with pytest.raises(UserError, match=message):
        Scorer([model], VOCABULARY, mesh).score([params], sources, targets, config.decode)
