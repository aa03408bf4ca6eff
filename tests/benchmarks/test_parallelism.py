"""The paper's Table 1 by compiled programs and gradients, at small lengths; nothing is trained here but one step."""

import json
import math

import jax
import numpy as np
import pytest

from benchmarks import flag_lists, one_layer, parallelism, plots
from transformer.distributed import sharding
from transformer.runtime.errors import UserError

LENGTHS = (32, 64, 128)
WIDTH = 32

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def layers():
    return {family: parallelism.layer_figures(family, WIDTH, LENGTHS) for family in one_layer.FAMILIES}


def test_attention_takes_one_step_at_any_length_and_recurrence_one_a_position(layers):
    assert layers["attention"]["depth"] == layers["convolutional"]["depth"] == [1, 1, 1]
    assert layers["recurrent"]["depth"] == list(LENGTHS)
    assert layers["recurrent"]["depth_exponent"] == pytest.approx(1, abs=0.05)


def test_scores_and_values_grow_with_the_square_and_recurrence_with_the_length(layers):
    assert layers["attention"]["core_flops_exponent"] == pytest.approx(2, abs=0.05)
    assert layers["recurrent"]["core_flops_exponent"] == pytest.approx(1, abs=0.05)
    assert layers["convolutional"]["core_flops_exponent"] == pytest.approx(1, abs=0.05)
    for i, n in enumerate(LENGTHS):
        assert layers["attention"]["core_flops"][i] == 2 * 2 * n * n * WIDTH
        assert layers["attention"]["flops"][i] == 2 * 2 * n * n * WIDTH + 2 * n * 12 * WIDTH**2
        assert layers["recurrent"]["core_flops"][i] == 2 * n * 4 * WIDTH**2
        assert layers["recurrent"]["flops"][i] == 2 * n * 8 * WIDTH**2
        assert layers["convolutional"]["flops"][i] == 2 * n * 6 * WIDTH**2


def test_a_signal_passes_one_operation_of_attention_and_all_of_a_recurrence(layers):
    assert layers["attention"]["path"] == [1] * len(parallelism.PATH_LENGTHS)
    assert layers["recurrent"]["path"] == list(parallelism.PATH_LENGTHS)
    assert layers["convolutional"]["path"] == [n - 1 for n in parallelism.PATH_LENGTHS]  # layers of width 3


def test_a_layer_of_recurrence_joins_each_position_with_those_before_it():
    joins = one_layer.dependencies(lambda x: one_layer.make_layer("recurrent", 8)(x[None])[0], 8, 12)
    assert (joins == np.tri(12, dtype=bool)).all()


def test_a_program_without_products_is_refused():
    with pytest.raises(ValueError, match="expected matrix products"):
        one_layer.flops(one_layer.compiled(lambda x: x + 1, np.zeros(3, np.float32)))


def test_what_memory_does_not_hold_is_left_out(monkeypatch):
    def measure(config, rows, length):
        if config.model.family == "attention":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return {"step_ms": 1.0}

    monkeypatch.setattr(parallelism, "measure", measure)
    configs = {family: parallelism.family_config(family, 16) for family in ("attention", "recurrent")}
    assert [row["family"] for row in parallelism.measure_families(configs, 8, 16)] == ["recurrent"]


def test_a_gradient_of_zero_is_no_path():
    assert not one_layer.dependencies(lambda x: x, 4, 5)[~np.eye(5, dtype=bool)].any()


def test_exponents_are_those_of_powers():
    assert parallelism.exponent([2, 4, 8], [3 * n**1.5 for n in (2, 4, 8)]) == pytest.approx(1.5)


def test_families_have_about_as_many_params():
    result = {f: parallelism.params(parallelism.equal_config(f, 64)) for f in one_layer.FAMILIES}
    assert max(result.values()) / min(result.values()) < 1.1


def test_the_command_writes_its_tables_and_plots(tmp_path, capsys, monkeypatch, layers):
    def measure(config, rows, length):
        return {"target_tokens_per_s": rows, "step_ms": 1.5, "temporary_mb": length, "compile_s": 0.1}

    monkeypatch.setattr(parallelism, "layer_figures", lambda family, *_: layers[family])
    monkeypatch.setattr(parallelism, "measure", measure)
    lengths = ",".join(map(str, LENGTHS))
    parallelism.main(["parallelism", f"--lengths={lengths}", "--tokens=64,128", "--width=16", f"--output={tmp_path}"])
    streams = capsys.readouterr()
    result = json.loads(streams.out.splitlines()[-1])
    assert result == json.loads((tmp_path / "parallelism.json").read_text())
    shapes = [(tokens, length) for tokens in (64, 128) for length in LENGTHS if length <= tokens]
    assert [(row["tokens"], row["length"]) for row in result["training"][::3]] == shapes
    assert [row["target_tokens_per_s"] for row in result["training"][::3]] == [t // n for t, n in shapes]
    assert "| attention | O(n² · d) |" in streams.err
    assert {"depth.svg", "path.svg", "temporary_mb.length.svg", "target_tokens_per_s.tokens.svg"} < {
        path.name for path in tmp_path.iterdir()
    }


def test_a_step_is_really_trained(monkeypatch):
    made, place = [], sharding.shard_batch
    monkeypatch.setattr(parallelism, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(
        sharding, "shard_batch", lambda mesh, batch, *rest: made.append(batch) or place(mesh, batch, *rest)
    )
    ready = []
    monkeypatch.setattr(jax, "block_until_ready", lambda metrics: ready.append(float(metrics.loss.objective)))
    result = parallelism.measure(parallelism.family_config("recurrent", 16), 2, 8)
    assert made[0].target_BT.shape == (2, 8)
    assert len(set(ready)) == len(ready) == 4  # one to warm up and three that count; each changes the loss
    assert result["target_tokens_per_s"] == pytest.approx(2 * 8 / result["step_ms"] * 1000, rel=0.1)
    assert min(result.values()) > 0


def test_an_unknown_family_is_refused():
    with pytest.raises(UserError, match="--families: expected some of attention, recurrent"):
        parallelism.main(["parallelism", "--families=attention,lstm"])


@pytest.mark.parametrize("tokens", ["", "a", "64,64", "0"])
def test_batches_without_a_number_are_refused(tokens):
    with pytest.raises(UserError, match="--tokens: expected different numbers"):
        flag_lists.distinct_numbers("--tokens", tokens)


def test_a_plot_is_a_file_that_shows_itself(tmp_path):
    plots.write(tmp_path / "a.svg", "A < B", "length", {"one": [(1, 2), (4, 8)]})
    text = (tmp_path / "a.svg").read_text()
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "A &lt; B" in text
    assert text.count("<circle") == 2
    plots.write(tmp_path / "b.svg", "nothing", "length", {"one": [(1, math.nan)]})
    assert not (tmp_path / "b.svg").exists()
