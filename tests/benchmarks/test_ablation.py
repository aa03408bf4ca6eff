"""An ablation: what is refused, what is trained and what is not trained twice, equal FLOPs, and the table."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from xml.etree import ElementTree

import pytest
from etils import epath

from benchmarks import ablation, ablation_plan, ablation_table, plots
from benchmarks.ablation_plan import Change, Variant
from benchmarks.ablation_table import Row
from benchmarks.changes import families, table3
from configs.paper import ROWS
from tests.config.test_paper_configs import config_of
from tests.conftest import ROOT, small_config
from tests.helpers.processes import TINY, data_flags, environment, write_data
from transformer import command_line
from transformer.config import Config, validation
from transformer.data import input_pipeline, mixture_corpus, vocabulary
from transformer.evaluation.significance import PairedTestResult
from transformer.models import flops
from transformer.models.registry import ModelDef
from transformer.runtime.errors import StoppedError, UserError
from transformer.training import workdir as workdirs

CHANGES = """
def get_changes(base):
    return {
        "base": {"train.num_steps": 40},
        "rms": {"model.norm_type": "rms", "comment": "a source"},
        "wide": {"model.mlp_dim": 2 * base.model.mlp_dim, "model.norm": "pre"},
    }
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small corpus, prepared."""
    return write_data(tmp_path_factory.mktemp("ablation") / "corpus")


@pytest.fixture
def command(data, tmp_path, monkeypatch):
    """The command with flags; train.py and eval.py are functions, and train.py fails for CHANGE/seedN in `broken`."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "changes.py").write_text(CHANGES)
    (tmp_path / "broken").write_text("")

    def call(command: list[str], log: epath.Path, tick) -> str:
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in command[1:])
        workdir = pathlib.Path(flags["workdir"])
        if command[0] == ablation.EVAL:
            return evaluate(flags, workdir, data)
        train(flags, workdir)
        tick()
        if f"{workdir.parent.name}/{workdir.name}" in (tmp_path / "broken").read_text():
            raise ablation.RunFailedError("the loss of update 7 is | nan")
        return ""

    monkeypatch.setattr(ablation, "call", call)
    monkeypatch.setattr(ablation_plan, "num_params", lambda config, vocab_size: config.model.mlp_dim)
    return ["ablation", *TINY, *data_flags(data), f"--changes={tmp_path}/changes.py", f"--output={tmp_path}/out"]


def train(flags: dict[str, str], workdir: pathlib.Path) -> None:
    """Stands for train.py: writes metrics, and the name and seed to the file `trained`."""
    seed = validation.load(flags["config"]).train.seed
    assert workdir.name == f"seed{seed}"
    with (workdir.parent.parent / "trained").open("a") as record:
        record.write(f"{workdir.parent.name} {seed}\n")
    costs = {"train/tokens": 100.0, "train/hours": 0.5, "train/flops": 1e9}
    rows = [{"step": step, "train/target_tokens_per_s": step + 30.0} for step in (20, 40)]
    rows.append({"step": 40, "valid/bleu": 4.0, "valid/loss": 2.0, **costs})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(flags: dict[str, str], workdir: pathlib.Path, data: pathlib.Path) -> str:
    """Stands for eval.py: `wide` translates without a mistake, the others have half of the sentences right."""
    assert (flags["checkpoint"], flags["split"]) == ("latest", "test")
    name, seed = workdir.parent.name, int(workdir.name.removeprefix("seed"))
    lines = (data / "test.de").read_text().splitlines()
    lines = [line if i % 2 or name == "wide" else line[::-1] for i, line in enumerate(lines)]
    pathlib.Path(flags["output"]).write_text("".join(f"{line}\n" for line in lines))
    figures = {"step": 40, "bleu": {"base": 50.0, "rms": 51.0, "wide": 90.0}[name] + seed, "bleu_signature": "nrefs:1"}
    return json.dumps({**figures, "perplexity": 2.0, "train_hours": 0.5, "train_flops": 1e9}) + "\n"


def trained(tmp_path: pathlib.Path) -> list[str]:
    """What was trained since the last call, in order."""
    path = tmp_path / "out" / "trained"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{'a': {'model.nrom': 'pre'}}", "a: config.model: unknown field 'nrom'; did you mean 'norm'"),
        ("{'a': {'modle.norm': 'pre'}}", "a: config: unknown field 'modle'; did you mean 'model'"),
        ("{'a': {'model.norm': 'before'}}", "a: config.model.norm: expected one of post, pre, got 'before'"),
        ("{'a': {'model.num_heads': 3}}", "a: config.model: num_heads = 3 does not divide qkv_dim = 16"),
        ("{'a': {'optimizer.decay_fraction': 0.2}}", "a: config.optimizer.decay_fraction = 0.2: read only with"),
        ("{'a': {'model.norm': 'post'}}", "a: changes nothing: the base has these values; leave it out"),
        ("{'a': {'train.seed': 3}}", "a: train.seed: the flag --seeds sets it"),
        ("{'a': {'data.tokenized': True}}", "a: config.data.tokenized: decides what is scored"),
        ("{'a': {'model.norm': None}}", "a: model.norm: expected a number, a text, True or False, got None"),
        ("{'a': {'comment': 'c'}}", r"a: expected fields such as {'model.norm': 'pre'}, got none"),
        (
            "{'a': {'model.norm': 'pre', 'published': 27}}",
            "a: expected published scores such as {'bleu': 27.3}, got 27",
        ),
        ("{'../a': {'model.norm': 'pre'}}", "../a: expected a name of letters, digits"),
        ("{'base': {'model.norm': 'pre'}}", "expected name → fields of at least one change"),
        ("{'base': {'model.norm': 'per'}, 'a': {'model.norm': 'pre'}}", "base: config.model.norm: expected one of"),
        ("1 / 0", "line 1: ZeroDivisionError"),
    ],
)
def test_a_change_that_cannot_be_is_refused(entries, message, command, tmp_path):
    (tmp_path / "changes.py").write_text(f"def get_changes(base): return {entries}\n")
    with pytest.raises(UserError) as refused:
        ablation.main([*command, "--check"])
    assert message in str(refused.value)


def test_a_change_of_the_training_text_is_refused_where_validation_is_a_part_of_it(tmp_path):
    for name in ("a.tsv", "b.tsv", "valid.tsv"):
        (tmp_path / name).write_text("one\teins\ntwo\tzwei\n")
    flags = ["--config=configs/text.py", f"--config.data.train={tmp_path}/a.tsv"]
    changes = {"base": Change({}, "", {}), "b": Change({"data.train": f"{tmp_path}/b.tsv"}, "", {})}
    with pytest.raises(UserError, match=r"b: config\.data\.train: decides what is scored"):
        ablation_plan.resolve(flags, changes)
    flags.append(f"--config.data.valid={tmp_path}/valid.tsv")
    assert len(ablation_plan.resolve(flags, changes)) == 2
    changes["b"] = Change({"data.columns": "2,1"}, "", {})  # of the validation file too
    with pytest.raises(UserError, match=r"b: config\.data\.columns: decides what is scored"):
        ablation_plan.resolve(flags, changes)


def test_every_change_that_cannot_be_is_named_before_jax_is_imported(data, tmp_path):
    (tmp_path / "changes.py").write_text(
        "def get_changes(base):\n"
        "    return {'a': {'model.norm': 'x'}, 'b': {'model.norm': 'pre'}, 'c': {'model.mlp_dim': 0}}\n"
    )
    flags = [*TINY, *data_flags(data), f"--changes={tmp_path}/changes.py", f"--output={tmp_path}/out", "--check"]
    program = (
        "import sys; from benchmarks import ablation; from transformer.runtime.errors import UserError\n"
        f"try: ablation.main(['ablation', *{flags!r}])\n"
        "except UserError as error: print(error, 'jax' in sys.modules, sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    first, second, is_imported = done.stdout.splitlines()
    assert first.startswith("a: config.model.norm: expected one of")
    assert second.startswith("c: config.model.mlp_dim: expected at least 1")
    assert is_imported == "False"
    assert not (tmp_path / "out").exists()


def test_a_missing_file_names_those_that_there_are(command):
    with pytest.raises(UserError, match=r"--changes=x\.py: no such file; .*benchmarks/changes/demo\.py"):
        ablation.main([*command, "--changes=x.py"])


def test_a_split_that_there_is_not_is_refused_before_anything_is_trained(command, tmp_path):
    with pytest.raises(UserError, match="expected a split 'tset', found only test, train"):
        ablation.main([*command, "--split=tset"])
    assert trained(tmp_path) == []


def test_the_plan_has_params_flops_and_updates(command, capsys, tmp_path):
    ablation.main([*command, "--check"])
    *table, last = capsys.readouterr().out.splitlines()
    plan = json.loads(last)
    assert {name: row["updates"] for name, row in plan.items()} == {"base": 40, "rms": 40, "wide": 40}
    assert table[2].startswith("| base | train.num_steps=40 | 32 | ")
    assert table[4].startswith("| wide | model.mlp_dim=64, model.norm=pre | 64 | ")
    assert plan["rms"]["flops_per_update"] == plan["base"]["flops_per_update"] < plan["wide"]["flops_per_update"]
    assert trained(tmp_path) == []


def test_flags_override_what_the_changes_file_sets_in_the_base(command, capsys):
    ablation.main([*command, "--check", "--config.train.num_steps=60"])
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["updates"] for row in plan.values()} == {60}
    assert plan["base"]["fields"] == {}


def test_at_equal_flops_a_costlier_change_has_fewer_updates(command, capsys, tmp_path):
    ablation.main([*command, "--check", "--equal=flops", "--config.train.num_steps=1000"])
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["base"]["updates"] == plan["rms"]["updates"] == 1000 > plan["wide"]["updates"]
    totals = [row["updates"] * row["flops_per_update"] for row in plan.values()]
    assert max(totals) / min(totals) == pytest.approx(1, abs=0.001)
    (tmp_path / "changes.py").write_text("def get_changes(base): return {'long': {'train.num_steps': 90}}\n")
    with pytest.raises(UserError, match=r"long: train\.num_steps follows from --equal=flops"):
        ablation.main([*command, "--check", "--equal=flops"])


def test_equal_steps():
    costs = {"base": 2.0, "twice": 4.0, "less": 1.9, "huge": 1e6}
    assert ablation_plan.equal_steps(300, costs) == {"base": 300, "twice": 150, "less": 316, "huge": 1}


def mixed(data, **other):
    """A mixture of one corpus with itself, the second time with other fields."""
    entry = {"dir": str(data), "source_language": "en", "target_language": "de"}
    return (entry, {**entry, **other})


@pytest.mark.parametrize(
    "fields", [{"batching": "bucket"}, {"batching": "pack"}, {"subword_dropout": 0.3}, {"mixture": True}]
)
def test_the_cost_of_an_update_is_the_mean_of_an_epoch(data, fields):
    where = {"mixture": mixed(data, weight=2)} if "mixture" in fields else {"name": "text", "dir": str(data), **fields}
    sizes = {"data_dir": f"{data}/prepared", "vocab_size": 286, "num_buckets": 8}
    config = small_config(data={**where, **sizes}, train={"consistency": "rdrop"})
    cost, vocab_size = ablation_plan.update_cost(config)
    opened = mixture_corpus.open_sources(config.data)
    tokenizer = vocabulary.get_or_train_tokenizer(config.data, opened)
    ids = input_pipeline.token_ids(config.data, opened, "train", tokenizer)
    ids = input_pipeline.with_subword_dropout(config, ids, tokenizer)
    schedule = input_pipeline.make_batch_schedule(config, ids)
    steps = schedule.steps_per_epoch
    batches = input_pipeline.train_iterator(schedule, ids, start=0, num_steps=steps)
    total = sum(flops.batch_flops(config.model, vocab_size, batch, passes=2) for batch in batches)
    assert steps > 1
    assert cost == pytest.approx(total / steps)


def test_params_are_those_of_the_model():
    config = small_config()
    assert ablation_plan.num_params(config, 300) == ModelDef(config.model, 300).num_params()


def test_runs_are_trained_once_and_seeds_are_added(command, capsys, tmp_path):
    ablation.main(command)
    assert trained(tmp_path) == ["base 0", "rms 0", "wide 0"]
    out = capsys.readouterr().out
    ablation.main(command)
    assert trained(tmp_path) == []
    assert capsys.readouterr().out == out
    for name in ("base", "rms", "wide"):
        shutil.rmtree(tmp_path / "out" / name / "seed0")  # the results beside the workdirs suffice
    ablation.main([*command, "--seeds=2"])
    assert trained(tmp_path) == ["base 1", "rms 1", "wide 1"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert results["rms"]["bleu"] == 51.5
    assert results["rms"]["runs"]["1"]["target_tokens_per_s"] == 60.0
    assert results["rms"]["runs"]["1"]["curve"][0]["minutes"] == 30.0
    assert results["wide"]["versus"]["bleu"]["ours"] == pytest.approx(100)
    assert results["wide"]["versus"]["bleu"]["significant"]
    assert results["rms"]["versus"]["bleu"]["bootstrap_p"] == 1.0
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {
        *("ablation.svg", "curves_by_flops.svg", "curves_by_minutes.svg")
    }
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert "| wide | 64 |" in table
    assert table.endswith("- Equal updates; split test; checkpoint latest.\n")


def test_only_some_are_trained_and_all_finished_ones_are_in_the_table(command, capsys, tmp_path):
    ablation.main([*command, "--only=base", "--seeds=2"])
    ablation.main([*command, "--only=wide", "--config.train.seed=1"])
    assert trained(tmp_path) == ["base 0", "base 1", "wide 1"]
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [list(row["runs"]) for row in results.values()] == [["0", "1"], [], ["1"]]
    with pytest.raises(UserError, match="--only: expected some of base, rms, wide, got 'norm'"):
        ablation.main([*command, "--only=norm"])


def test_a_mixture_of_one_direction_is_scored_on_its_test_set(command, data, capsys, tmp_path):
    flags = [flag for flag in command if not flag.startswith("--config.data.dir=")]
    ablation.main([*flags, f"--config.data.mixture={json.dumps(mixed(data, weight=2))}", "--only=base,wide"])
    assert trained(tmp_path) == ["base 0", "wide 0"]
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["wide"]["versus"]["bleu"]["ours"] == pytest.approx(100)
    both = mixed(data, source_language="de", target_language="en")
    with pytest.raises(UserError, match=r"base: config\.data\.mixture: .* one direction, got en-de, de-en"):
        ablation.main([*flags, f"--config.data.mixture={json.dumps(both)}"])


def test_a_result_of_another_config_is_refused(command, tmp_path):
    ablation.main([*command, "--only=base"])
    with pytest.raises(UserError, match=r"seed0.*: has another config: train.num_steps: 40 → 50. Choose another"):
        ablation.main([*command, "--only=base", "--config.train.num_steps=50"])


def test_a_result_from_where_the_data_lay_elsewhere_counts(command, data, tmp_path):
    ablation.main([*command, "--only=base"])
    assert trained(tmp_path) == ["base 0"]
    shutil.copytree(data, tmp_path / "elsewhere")
    ablation.main([*(flag.replace(str(data), str(tmp_path / "elsewhere")) for flag in command), "--only=base"])
    assert trained(tmp_path) == []


def test_a_run_that_fails_is_a_row_and_is_tried_again(command, capsys, tmp_path):
    (tmp_path / "broken").write_text("rms/seed1")
    with pytest.raises(SystemExit) as ended:
        ablation.main([*command, "--seeds=2"])
    assert ended.value.code == 1
    assert trained(tmp_path) == ["base 0", "rms 0", "wide 0", "base 1", "rms 1", "wide 1"]
    captured = capsys.readouterr()
    assert "failed: rms seed 1; " in captured.err
    table = (tmp_path / "out" / "ablation.md").read_text().splitlines()
    (row,) = [line for line in table if line.startswith("| rms, seed 1 |")]
    assert row.endswith("| failed: the loss of update 7 is / nan |")
    assert row.count("|") == table[0].count("|")
    results = json.loads(captured.out.splitlines()[-1])
    assert (list(results["rms"]["runs"]), list(results["rms"]["failed"])) == (["0"], ["1"])
    (tmp_path / "broken").write_text("")
    ablation.main([*command, "--seeds=2"])
    assert trained(tmp_path) == ["rms 1"]
    assert "failed" not in (tmp_path / "out" / "ablation.md").read_text()


def test_a_stop_signal_reaches_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "POLL_S", 0.02)
    script, log = tmp_path / "sleep.py", epath.Path(tmp_path / "log")
    script.write_text("import sys, time\nprint('ready', file=sys.stderr, flush=True)\ntime.sleep(60)\n")

    def stop() -> None:
        if log.read_text() == "ready\n":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError) as stopped:
        ablation.call([str(script)], log, stop)
    assert stopped.value.exit_code == 143


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; print('warning', file=sys.stderr); sys.exit('die.py: too bad')", "die.py, exit code 1: too bad"),
        ("raise SystemExit(3)", "die.py, exit code 3: before"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "die.py was ended by SIGKILL"),
    ],
)
def test_a_command_that_fails_says_why(program, message, tmp_path):
    script, log = tmp_path / "die.py", epath.Path(tmp_path / "log")
    script.write_text(program)
    log.write_text("before\n")
    with pytest.raises(ablation.RunFailedError) as failed:
        ablation.call([str(script)], log, lambda: None)
    assert str(failed.value) == message


def test_another_process_in_the_workdir_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "POLL_S", 0.02)
    lock = workdirs.acquire_lock(epath.Path(tmp_path))
    released = []

    def release() -> None:
        time.sleep(0.1)
        released.append(True)
        lock.close()

    thread = threading.Thread(target=release)
    thread.start()
    ablation.wait_for_lock(epath.Path(tmp_path))
    assert released
    thread.join()


def figures(bleu: float, perplexity: float = 2.0) -> dict:
    """Of one run."""
    costs = {"train_flops": 2e12, "train_hours": 0.05, "target_tokens_per_s": 12_345.0}
    curve = [{"minutes": 1.0, "flops": 1e12, "score": bleu / 2}, {"minutes": 3.0, "flops": 2e12, "score": bleu}]
    scores = {"bleu": bleu, "bleu_signature": "nrefs:1", "perplexity": perplexity, "word_perplexity": 7.0}
    return {"step": 300, **scores, "curve": curve, **costs}


def row(name: str, bleus: list[float], test=None, failed=(), fields=None, **published: float) -> Row:
    """A row with a run for each BLEU."""
    change = Change(fields or {}, "as in a paper", published)
    runs = {seed: figures(bleu) for seed, bleu in enumerate(bleus)}
    return Row(name, Variant(change, Config(), 1_234_567, 6.6e9), runs, dict(failed), test)


TEST = PairedTestResult("bleu", 24.0, 20.0, 0.001, 0.0312, 1.0, 1.0, ("bootstrap:1", "trials:2"), (1000, 10_000))


def test_perplexities_of_different_vocabularies_are_per_word():
    base, other = row("base", [20.0], perplexity=5.0), row("larger", [21.0], perplexity=6.0)
    config = validation.replace_field(Config(), "data.vocab_size", 50_000)
    other = other._replace(variant=other.variant._replace(config=config))
    lines = ablation_table.table([base, other], "bleu").splitlines()
    assert lines[0].split(" | ")[6:8] == ["word perplexity", "BLEU"]
    assert lines[2].split(" | ")[6:8] == ["7.000", "20.00"]
    assert "published" not in lines[0]
    assert "| published perplexity |" in ablation_table.table([base], "bleu")


def test_the_table_has_means_intervals_and_significance():
    rows = [row("base", [19.0, 20.0, 21.0]), row("rms", [24.0], TEST, fields={"model.norm_type": "rms"})]
    lines = ablation_table.table([*rows, row("muon", [], failed={0: "a | b"})], "bleu").splitlines()
    assert lines[0].split(" | ")[5:9] == ["tokens/s", "perplexity", "BLEU", "difference"]
    same = "1,234,567 | 300 | 2.00e+12 | 3.0 | 12,345"
    assert lines[2] == f"| base | {same} | 2.000 ± 0.000 | 20.00 ± 2.48 |  |  |  |  |"
    assert lines[3] == f"| rms | {same} | 2.000 | 24.00 | +4.00 | ≤ 0.001 | 0.0312 | better |"
    assert lines[4].split("|")[1:3] == [" muon ", " 1,234,567 "]
    assert lines[5].endswith(" | failed: a / b |")
    assert {line.count("|") for line in lines[:6]} == {13}
    assert "- **rms**: model.norm_type=rms. as in a paper." in lines
    assert any("95% interval of the mean by Student's t" in line for line in lines)
    assert any("bootstrap:1; trials:2" in line for line in lines)


def test_intervals_are_those_of_student_s_t():
    """t(0.975) is 12.706 with one degree of freedom, 4.303 with two and 2.776 with four."""
    assert row("a", [1.0, 3.0]).interval("bleu") == pytest.approx(12.706, abs=0.001)
    assert row("a", [1.0, 2.0, 3.0]).interval("bleu") == pytest.approx(4.3027 / 3**0.5, abs=0.001)
    assert row("a", [1.0, 2.0, 3.0, 4.0, 5.0]).interval("bleu") == pytest.approx(2.7764 * (2.5 / 5) ** 0.5, abs=0.001)
    assert row("a", [1.0]).interval("bleu") is None


def test_the_median_of_an_even_number_is_the_lower_of_the_middle_two():
    for bleus, want in (([3.0], 0), ([3.0, 2.0], 1), ([3.0, 1.0, 2.0], 2), ([4.0, 1.0, 3.0, 2.0], 3)):
        assert ablation_table.median_seed(row("a", bleus).runs, "bleu") == want


def test_a_change_is_on_the_side_of_the_base_that_was_published():
    base = row("base", [19.0, 20.0, 21.0], bleu=25.0)
    for bleu, published, want in (
        *((23.0, {"bleu": 26.0}, "yes"), (23.0, {"bleu": 24.0}, "no"), (22.0, {"bleu": 26.0}, "chance")),
        *((20.0, {"bleu": 26.0}, ""), (23.0, {"bleu": 25.0}, ""), (23.0, {}, "")),
    ):
        assert ablation_table.agrees(row("a", [bleu], **published), base, "bleu") == want
    head, _, *lines = ablation_table.table([base, row("a", [23.0], bleu=26.0)], "bleu").splitlines()
    assert head.endswith("| verdict | published BLEU | agrees |")
    assert lines[1].endswith("| 26.0 | yes |")


def test_the_plot_has_seeds_means_and_intervals(tmp_path):
    rows = [row("base", [19.0, 20.0, 21.0]), row("rms", [24.0]), row("muon", [])]
    ablation_table.draw(epath.Path(tmp_path), rows, "bleu")
    root = ElementTree.fromstring((tmp_path / "ablation.svg").read_text())
    classes = [element.get("class") for element in root.iter()]
    assert (classes.count("seed"), classes.count("dot s1"), classes.count("interval")) == (4, 2, 1)
    centers = [float(element.get("cx")) for element in root.iter() if element.get("class") == "seed"]
    assert centers == sorted(centers)
    assert "muon" not in (tmp_path / "ablation.svg").read_text()
    assert "<circle" in (tmp_path / "curves_by_minutes.svg").read_text()
    assert (tmp_path / "curves_by_flops.svg").exists()


def test_names_of_many_lines_have_rows_of_their_own(tmp_path):
    plots.write(tmp_path / "plot.svg", "t", "x", {f"long line{i}": [(1, i + 1), (2, 3)] for i in range(7)}, log=False)
    root = ElementTree.fromstring((tmp_path / "plot.svg").read_text())
    keys = [element for element in root.iter() if (element.get("class") or "").startswith("key")]
    assert len({(key.get("x"), key.get("y")) for key in keys}) == 7
    assert len({key.get("y") for key in keys}) == 2
    plots.write(
        tmp_path / "long.svg", "t", "x", {f"{i} {'name' * 9}": [(1, i), (2, 3)] for i in range(1, 5)}, log=False
    )
    long = [e for e in ElementTree.parse(tmp_path / "long.svg").iter() if (e.get("class") or "").startswith("key")]
    assert len({key.get("y") for key in long}) == 4
    assert {key.get("class") for key in keys} == {f"key s{i}" for i in range(1, 7)}
    assert [key.text for key in keys][-2:] == ["— long line5", "- - long line6"]
    assert [line.get("class") for line in root.iter() if "line " in (line.get("class") or "")][-1] == "line s1 faint"


def test_an_interval_of_two_seeds_does_not_flatten_the_plot(tmp_path):
    plots.write_intervals(tmp_path / "plot.svg", "t", "x", {"base": ([40, 44], 127.0), "rms": ([41, 42], 0.5)})
    drawing = ElementTree.parse(tmp_path / "plot.svg").getroot()
    lines, dots = ([e for e in drawing.iter() if e.get("class") == name] for name in ("interval", "seed"))
    wide, narrow = (float(line.get("x2")) - float(line.get("x1")) for line in lines)
    low, high = (float(dot.get("cx")) for dot in dots[:2])
    assert wide == pytest.approx(3 * (high - low), abs=0.2)
    assert narrow == pytest.approx((high - low) / 4, abs=0.2)


@pytest.mark.parametrize(
    ("config", "changes", "flags"),
    [
        ("demo.py", "demo", []),
        ("demo.py", "learning_rate", []),
        ("paper_cldr.py", "table3", []),
        ("multi30k_families.py", "families", ["--config.data.dir={data}"]),
        ("multi30k.py", "modern", ["--config.data.dir={data}"]),
        ("multi30k.py", "modern_full_length", ["--config.data.dir={data}"]),
        ("multi30k_tok.py:{data}", "modern_tok", []),
    ],
)
def test_shipped_changes_can_be_trained(config, changes, flags, data, monkeypatch):
    (data / "bpe.codes").write_text("#version: 0.2\na b\n")
    monkeypatch.chdir(ROOT)
    given = [flag.format(data=data) for flag in (f"--config=configs/{config}", *flags)]
    base, _ = command_line.config_flags(["ablation", *given])
    loaded = ablation_plan.load_changes(f"benchmarks/changes/{changes}.py", base)
    assert ablation_plan.resolve(given, loaded).keys() == loaded.keys()


def test_families_are_those_of_the_config(data, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, flag = "--config=configs/multi30k_families.py", f"--config.data.dir={data}"
    base, _ = command_line.config_flags(["ablation", config, flag])
    changes = ablation_plan.load_changes("benchmarks/changes/families.py", base)
    resolved = ablation_plan.resolve([config, flag], changes)
    for family in families.SIZES:
        expected, _ = command_line.config_flags(["ablation", f"{config}:{family}", flag])
        assert resolved["base" if family == "attention" else family] == expected
    counts = [ModelDef(each.model, each.data.vocab_size).num_params() for each in resolved.values()]
    assert max(counts) / min(counts) < 1.02


def test_rows_of_table_3_change_by_the_paper_s_factors_and_rates_to_its_values():
    base = small_config(model={"num_layers": 3, "emb_dim": 32, "num_heads": 8, "mlp_dim": 64})
    for name, fields in {
        "a-h1": {"model.num_heads": 1},
        "b-dk16": {"model.qkv_dim": 8},
        "c-n8": {"model.num_layers": 4},
        "c-d256": {"model.emb_dim": 16, "model.qkv_dim": 16, "model.value_dim": 16},
        "d-drop0.2": {"model.dropout_rate": 0.2},
        "e-learned": {"model.positions": "learned"},
    }.items():
        assert table3.scale(ROWS[name].fields, base) == fields
    assert table3.scale(ROWS["big"].fields, base)["train.num_steps"] == 3 * base.train.num_steps
    with pytest.raises(ValueError, match="num_layers = 3: a row needs 5 / 6 of it"):
        table3.scale({"model.num_layers": 5}, base)


@pytest.mark.parametrize("name", ["a-h1", "b-dk16", "c-d256", "d-ls0.2", "big"])
def test_the_paper_s_own_base_gives_the_paper_s_rows(name):
    values = dataclasses.asdict(config_of("base"))
    for field, value in table3.scale(ROWS[name].fields, config_of("base")).items():
        section, _, key = field.partition(".")
        values[section][key] = value
    assert validation.validate(values) == config_of(name)


@pytest.mark.slow
def test_a_change_is_trained_scored_and_compared(data, tmp_path):
    text = "".join(line for line in CHANGES.splitlines(keepends=True) if "rms" not in line)
    (tmp_path / "changes.py").write_text(text.replace("40", "4"))
    flags = [*data_flags(data), "--config.optimizer.warmup_steps=2", f"--changes={tmp_path}/changes.py"]
    command = [sys.executable, "-m", "benchmarks.ablation", *TINY, *flags, f"--output={tmp_path}/out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(1), timeout=900)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert [len(row["runs"]) for row in results.values()] == [1, 1]
    for row in results.values():
        run = row["runs"]["0"]
        assert run["step"] == row["updates"] == 4
        assert run["train_flops"] == pytest.approx(4 * row["flops_per_update"], rel=0.2)
        assert run["target_tokens_per_s"] > 0
        assert run["curve"][-1]["step"] == 4
    assert results["wide"]["params"] > results["base"]["params"]
    assert 0 <= results["wide"]["versus"]["bleu"]["bootstrap_p"] <= 1
    assert (tmp_path / "out" / "ablation.svg").exists()
