"""Rows of Table 3 scaled to a base model: sizes by factors, a row is done once, and what agrees is told."""

import dataclasses
import json

import pytest

from benchmarks import sweep
from configs.paper import ROWS, Row
from tests.conftest import small_config
from transformer.config import Config
from transformer.runtime.errors import DivergedError, UserError

UNREAD = {name: getattr(Config().model, name) for name in ("num_heads", "mlp_dim")}  # by other families
BASE = {"num_layers": 3, "emb_dim": 32, "num_heads": 8, "mlp_dim": 64}


def test_sizes_change_by_the_paper_s_factors_and_rates_to_its_values():
    base = small_config(model=BASE)
    for name, fields in {
        "base": {},
        "a-h1": {"num_heads": 1},
        "a-h32": {"num_heads": 32},
        "b-dk16": {"qkv_dim": 8},
        "c-n2": {"num_layers": 1},
        "c-n8": {"num_layers": 4},
        "c-d256": {"emb_dim": 16, "qkv_dim": 16, "value_dim": 16},
        "c-ff4096": {"mlp_dim": 128},
        "d-drop0.2": {"dropout_rate": 0.2},
        "e-learned": {"positions": "learned"},
    }.items():
        want = {**base.model.__dict__, **fields}
        assert sweep.row_config(base, name).model.__dict__ == want, name
    assert sweep.row_config(base, "d-ls0").optimizer.label_smoothing == 0.0
    assert sweep.row_config(base, "big").train.num_steps == 3 * base.train.num_steps


def test_the_paper_s_own_base_gives_the_paper_s_rows():
    from tests.config.test_paper_configs import config_of

    base = config_of("base")
    for name in set(ROWS) - {"e-learned"}:
        assert sweep.row_config(base, name) == config_of(name), name
    learned, paper = sweep.row_config(base, "e-learned").model, config_of("e-learned").model
    assert learned == dataclasses.replace(paper, max_positions=learned.max_positions)  # a size of its own table alone


def test_a_size_that_is_no_whole_number_is_refused():
    with pytest.raises(UserError, match=r"config\.model\.num_layers = 2: row c-n2 needs 2 / 6 of it"):
        sweep.row_config(small_config(model={**BASE, "num_layers": 2}), "c-n2")


def test_a_row_is_on_the_side_of_the_base_model_that_the_paper_says():
    actual = {"base": {"perplexity": 5.0, "bleu": 20.0}, "c-n2": {"perplexity": 6.0, "bleu": 21.0}}
    actual["e-learned"] = {"perplexity": 7.0, "bleu": 20.0}
    assert [sweep.agrees(actual, "c-n2", key) for key in ("perplexity", "bleu")] == ["yes", "no"]
    assert [sweep.agrees(actual, "e-learned", key) for key in ("perplexity", "bleu")] == ["", ""]
    assert sweep.agrees(actual, "base", "bleu") == ""
    actual["base"]["spread"] = {"perplexity": 0.9, "bleu": 1.0}
    assert [sweep.agrees(actual, "c-n2", key) for key in ("perplexity", "bleu")] == ["yes", "chance"]


def test_seeds_of_the_base_model_tell_what_is_chance(tmp_path, monkeypatch, capsys):
    figures = {"base": (5.0, 30.0), "base-seed4": (5.2, 29.0), "base-seed5": (5.1, 30.5), "a-h4": (5.1, 20.0)}

    def result(config: Config, workdir, split):
        assert workdir.name in ("base", "a-h4") or workdir.name == f"base-seed{config.train.seed}"
        perplexity, bleu = figures[workdir.name]
        return {"params": 1, "perplexity": perplexity, "bleu": bleu}

    monkeypatch.setattr(sweep, "result", result)
    flags = ["--config.model.num_heads=8", "--config.train.seed=3", "--rows=base,a-h4", f"--output={tmp_path}"]
    sweep.main(["sweep", "--config=configs/demo.py", "--seeds=3", *flags])
    lines = (tmp_path / "table3.md").read_text().splitlines()
    assert lines[3] == "| a-h4 | 0.00 |  | 5.100 | 5.00 | chance | 20.0 | 25.5 | yes |"
    assert lines[5] == (
        "Chance: at most the range over 3 seeds of the base model, 0.200 of perplexity and 1.5 of BLEU."
    )


def test_rows_are_trained_once_and_the_table_is_written(tmp_path, monkeypatch, capsys):
    asked = []

    def result(config: Config, workdir, split):
        asked.append((workdir.name, config.model.num_heads, split))
        return {"params": 1_234_567, "perplexity": 5.0 + len(asked), "bleu": 30.0 - len(asked)}

    monkeypatch.setattr(sweep, "result", result)
    flags = ["--config=configs/demo.py", "--config.model.num_heads=8", "--rows=base,a-h4", f"--output={tmp_path}"]
    sweep.main(["sweep", "--table=3", *flags])
    assert asked == [("base", 8, "validation"), ("a-h4", 4, "validation")]
    lines = (tmp_path / "table3.md").read_text().splitlines()
    assert lines[3] == "| a-h4 | 1.23 |  | 7.000 | 5.00 | yes | 28.0 | 25.5 | yes |"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() == {"base", "a-h4"}
    assert (tmp_path / "table3.svg").exists()
    with pytest.raises(UserError, match=r"expected some of base, .* got 'c-n3'"):
        sweep.main(["sweep", "--config=configs/demo.py", "--rows=c-n3"])


def test_a_row_that_diverges_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def result(config: Config, workdir, split):
        if workdir.name == "a-h4":
            raise DivergedError("the loss of update 7 is nan")
        return {"params": 1, "perplexity": 5.0, "bleu": 30.0}

    monkeypatch.setattr(sweep, "result", result)
    flags = ["--config=configs/demo.py", "--config.model.num_heads=8", "--rows=base,a-h4,a-h16", f"--output={tmp_path}"]
    sweep.main(["sweep", *flags])
    captured = capsys.readouterr()
    assert "row a-h4 diverged; continuing with the others: the loss of update 7 is nan" in captured.err
    actual = json.loads(captured.out.splitlines()[-1])
    assert actual == json.loads((tmp_path / "table3.json").read_text())
    assert actual["a-h4"] == {"diverged": "the loss of update 7 is nan"}
    lines = (tmp_path / "table3.md").read_text().splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ["base", "a-h16"]
    assert lines[-1] == "Diverged: a-h4."


def test_rows_that_were_done_before_stay_in_the_table(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    sweep.result_path(tmp_path / "base", "validation").write_text("{}")
    monkeypatch.setattr(sweep, "result", lambda *_: {"params": 1, "perplexity": 5.0, "bleu": 30.0})
    flags = ["--config=configs/demo.py", "--config.model.num_heads=8", "--rows=a-h4", f"--output={tmp_path}"]
    sweep.main(["sweep", *flags])
    assert json.loads((tmp_path / "table3.json").read_text()).keys() == {"base", "a-h4"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["attention", "recurrent", "convolutional"])
def test_what_is_done_is_read_and_what_is_not_is_trained_and_scored(family, tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, count in (("train", 60), ("val", 4)):
        for code in ("en", "de"):
            lines = [f"a {i} {'b c d e f g'[: i % 9]}" for i in range(count)]
            (folder / f"{split}.{code}").write_text("\n".join(lines) + "\n")
    data = {"name": "text", "dir": str(folder), "data_dir": str(tmp_path / "prepared"), "vocab_size": 280}
    data["num_buckets"] = 1
    model = {"num_layers": 1, "family": family, **({} if family == "attention" else UNREAD)}
    config = small_config(data=data, model=model, train={"num_steps": 2}, decode={"beam_size": 1})
    from etils import epath

    actual = sweep.result(config, epath.Path(tmp_path / "base"), "validation")
    assert actual["step"] == 2
    assert actual["perplexity"] > 1
    assert actual.keys() > {"params", "bleu", "signature"}
    monkeypatch.setattr(sweep, "log_info", lambda text: pytest.fail("trained again"))
    assert sweep.result(config, epath.Path(tmp_path / "base"), "validation") == actual
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=3))
    with pytest.raises(UserError, match=r"has another config: train.num_steps: 2 → 3"):
        sweep.result(other, epath.Path(tmp_path / "base"), "validation")


def test_every_row_has_results():
    assert all(isinstance(row, Row) and 4 < row.perplexity < 7 and 23 < row.bleu < 27 for row in ROWS.values())
