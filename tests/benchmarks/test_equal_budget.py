"""Three families, one budget: their configs agree in all but the model, and the figures are those of the runs."""

import json

import pytest

from benchmarks import equal_budget, sweep
from tests.conftest import ROOT
from transformer import command_line
from transformer.models.registry import ModelDef
from transformer.runtime.errors import UserError

CONFIG = f"{ROOT}/configs/multi30k_families.py"
LINES = [
    {"step": 5, "train/loss": 3.0, "train/tokens": 50.0},
    {"step": 10, "valid/bleu": 4.0, "valid/loss": 2.0, "train/tokens": 100.0, "train/hours": 0.5, "train/flops": 1e9},
    {"step": 20, "valid/bleu": 6.0, "valid/loss": 1.5, "train/tokens": 7200.0, "train/hours": 1.0, "train/flops": 2e9},
]


def test_the_families_differ_in_the_model_alone_and_have_as_many_params():
    configs = {
        family: command_line.config_flags(["train.py", f"--config={CONFIG}:{family}", "--config.data.dir=x"])[0]
        for family in equal_budget.FAMILIES
    }
    assert {family: config.model.family for family, config in configs.items()} == {f: f for f in configs}
    assert len({(config.data, config.optimizer, config.train, config.decode) for config in configs.values()}) == 1
    counts = [ModelDef(config.model, config.data.vocab_size).num_params() for config in configs.values()]
    assert max(counts) / min(counts) < 1.02


def test_validations_are_read_with_what_they_cost():
    got = equal_budget.curve("\n".join(map(json.dumps, LINES)) + "\n")
    assert [(row["step"], row["bleu"], row["minutes"]) for row in got] == [(10, 4.0, 30.0), (20, 6.0, 60.0)]


def test_each_family_is_trained_in_its_own_folder_and_drawn(tmp_path, monkeypatch, capsys):
    def result(config, workdir, split):
        workdir.mkdir()
        (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n")
        return {"params": 1_000_000, "bleu": 5.0 + len(config.model.family), "perplexity": 4.0, "split": split}

    monkeypatch.setattr(sweep, "result", result)
    families = ["--families=attention,recurrent", "--config", CONFIG, "--config.data.dir", "x"]
    equal_budget.main(["equal_budget", *families, f"--output={tmp_path}"])
    actual = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert actual["recurrent"]["split"] == "test_2016_flickr"
    table = (tmp_path / "equal_budget.md").read_text().splitlines()
    assert table[2] == "| attention | 1,000,000 | 14.0 | 4.00 | 7,200 | 2.0e+09 | 60.0 | 2 |"
    assert "<circle" in (tmp_path / "bleu_by_minutes.svg").read_text()
    assert (tmp_path / "bleu_by_tokens.svg").exists()


@pytest.mark.parametrize(("flag", "error"), [("--families=attention,lstm", UserError), ("--conf=x", SystemExit)])
def test_what_is_not_known_is_refused(flag, error, capsys):
    with pytest.raises(error) as refused:
        equal_budget.main(["equal_budget", flag])
    message = f"{refused.value} {capsys.readouterr().err}"
    assert (
        "expected some of attention, recurrent, convolutional, got 'lstm'" in message
        or "arguments: --conf=x" in message
    )
