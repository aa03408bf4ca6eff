"""Tasks other than translation: the commands of docs/tasks.md, and a tiny model that is scored by accuracy."""

import json
import re
import sys

import pytest

import eval as eval_command
from benchmarks import task_data
from tests.conftest import ROOT
from tests.helpers.commands import run
from transformer import command_line
from transformer.checkpoints.manager import CheckpointManager

TINY = [
    "--config.model.num_layers=1",
    "--config.model.emb_dim=32",
    "--config.model.mlp_dim=64",
    "--config.data.vocab_size=340",
    "--config.data.num_buckets=1",
    "--config.data.max_length=200",
    "--config.train.batch_tokens=200",
    "--config.train.num_steps=40",
    "--config.train.eval_every_steps=40",
    "--config.optimizer.warmup_steps=10",
    "--config.decode.beam_size=1",
    "--config.mesh.data=1",
]


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the data and a workdir."""
    folder = tmp_path_factory.mktemp("sentiment")
    task_data.write(task_data.TASKS["sentiment"], folder, {"train": 400, "val": 10, "test": 40})
    data = [f"--config.data.dir={folder}", f"--config.data.data_dir={folder}/prepared"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run("train.py", "--config=configs/tasks.py:sentiment", f"--workdir={folder}/run", *TINY, *data)
    return folder, folder / "run"


def evaluate(workdir, *flags, code=0):
    return run("eval.py", f"--workdir={workdir}", *flags, code=code)


@pytest.mark.slow
def test_the_best_checkpoint_is_that_of_the_metric_of_the_task(trained):
    _, workdir = trained
    assert json.loads((workdir / "config.json").read_text())["train"]["best_metric"] == "accuracy"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (accuracy,) = [line["valid/accuracy"] for line in lines if "valid/accuracy" in line]
    manager = CheckpointManager(workdir)
    assert manager.metrics(40)["valid/accuracy"] == manager.metrics(40)["best"] == accuracy
    assert manager.steps_by_metric([40]) == [40]
    given = [f"--workdir={workdir}", "--config.eval.metrics=bleu"]
    assert b"best_metric: expected auto, loss, bleu, chrf" in run("train.py", *given, code=2).stderr


def test_a_missing_package_is_reported_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    given = ["--config=configs/demo.py", f"--workdir={tmp_path}", "--config.eval.metrics=rougeL"]
    assert b"pip install rouge-score" in run("train.py", *given, code=2).stderr
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_a_model_of_labels_is_scored_by_accuracy_alone(trained):
    """Against a count by hand, and against the baseline with a test of significance."""
    folder, workdir = trained
    result = evaluate(workdir, f"--versus={folder}/baseline.txt")
    fields = json.loads(result.stdout.splitlines()[-1])
    labels, baseline = ((folder / name).read_text().splitlines() for name in ("test.label", "baseline.txt"))
    (path,) = (workdir / "translations").glob("40.test.txt")
    for name, lines in (("ours", path.read_text().splitlines()), ("theirs", baseline)):
        right = sum(line == label for line, label in zip(lines, labels, strict=True))
        assert fields["versus"]["accuracy"][name] == 100 * right / 40
    assert fields["accuracy"] == fields["versus"]["accuracy"]["ours"]
    assert not [name for name in fields if name.startswith(("bleu", "chrf", "ter", "legacy"))]
    assert "BLEU" not in result.stderr.decode()
    page = (workdir / "report.html").read_text()
    assert "accuracy by source length" in page
    assert "equal lines, higher is better" in page


@pytest.mark.slow
def test_other_metrics_may_be_named_later(trained):
    _, workdir = trained
    fields = json.loads(evaluate(workdir, "--metrics=exact_match,chrf").stdout.splitlines()[-1])
    assert {"exact_match", "chrf", "chrfpp"} <= fields.keys()
    assert "accuracy" not in fields
    result = evaluate(workdir, "--metrics=rouge", code=2)
    assert b"config.eval.metrics: unknown name 'rouge'; did you mean 'rouge" in result.stderr
    assert b"--watch" in evaluate(workdir, "--metrics=bleu", "--watch", code=2).stderr


@pytest.mark.slow
def test_a_missing_package_is_reported_before_translating(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    result = evaluate(trained[1], "--metrics=rougeL", code=2)
    assert b"pip install rouge-score" in result.stderr
    assert b"source  " not in result.stderr


@pytest.mark.slow
def test_systems_are_compared_by_the_metrics_of_the_first_workdir(trained, tmp_path):
    folder, workdir = trained
    evaluate(workdir)
    flags = [f"--output={tmp_path}/page.html"]
    result = run("-m", "transformer.compare", workdir, folder / "baseline.txt", *flags)
    system = json.loads(result.stdout.splitlines()[-1])["systems"][1]
    assert set(system["versus"]) == {"name", "accuracy"}
    assert "accuracy_by_source_length" in system
    result = run("-m", "transformer.compare", workdir, folder / "baseline.txt", "--metrics=exact_match,ter", *flags)
    assert set(json.loads(result.stdout.splitlines()[-1])["systems"][1]["versus"]) == {"name", "exact_match", "ter"}


def test_the_commands_of_the_page_are_valid():
    """And of each task there are training and evaluation."""
    page = (ROOT / "docs" / "tasks.md").read_text()
    commands = re.sub(r"\\\n\s*", "", "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)))
    lines = [line.split("#")[0].split() for line in commands.splitlines() if not line.startswith("pip install ")]
    trained, evaluated = set(), set()
    for program, command, *flags in lines:
        assert program == "python"
        if command == "train.py":
            config, rest = command_line.config_flags([command, *flags])
            task = task_data.TASKS[flags[0].partition(":")[2]]
            assert (config.data.source_language, config.data.target_language) == (task.source, task.target)
            (workdir,) = rest
            trained.add(workdir)
        elif command == "eval.py":
            evaluated.add(flags[0])
            eval_command.parse(flags)
    assert len(trained) == len(task_data.TASKS)
    assert trained == evaluated
