"""What the README and the pages of docs say of files, commands and fields is so."""

import inspect
import os
import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from transformer import command_line, tokenizer, translate, validation
from transformer import config as configs
from transformer.datasets import cldr

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}


def test_the_file_tree_is_the_real_one():
    (tree,) = [body for _, body in BLOCKS if body.startswith("train.py ")]
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_every_link_into_the_repository_leads_somewhere():
    for path, text in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
            assert (path.parent / target).exists(), (path.name, target)


def test_every_field_it_names_exists():
    for text in PAGES.values():
        for argument in re.findall(r"--config\.\w+\.\w+", text):
            configs.field_type(*argument.removeprefix("--config.").split("."))
        for field in re.findall(r"--decode\.([a-z]\w*)", text):
            configs.field_type("decode", field)
        for section, field in re.findall(r"`(data|model|train|mesh|decode|optimizer)\.(\w{3,})`", text):
            configs.field_type(section, field)


@pytest.mark.parametrize(
    "flags",
    [
        ["--config.data.dir=x"],
        ["--config.data.train_source=a", "--config.data.train_target=b"],
        ["--config.data.train=x.tsv.gz", "--config.data.valid=y.jsonl"],
        ["--config.data.name=wmt14_translate/de-en"],
        ["--config.data.name=cldr", "--config.data.target_language=fr"],
    ],
)
def test_every_layout_it_names_can_be_asked_for_with_the_text_config(flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    command_line.config_flags(["train.py", "--config=configs/text.py", *flags])


def test_its_python_is_a_config(tmp_path):
    _, body = [body for language, body in BLOCKS if language == "python"]
    (tmp_path / "mine.py").write_text(body)
    config, _ = command_line.config_flags(["train.py", f"--config={tmp_path}/mine.py"])
    assert (config.data.target_language, config.model.dropout_rate) == ("fr", 0.3)
    sentences = [sentence for pair in cldr.generate("fr", {"train": 5000})["train"] for sentence in pair]
    assert tokenizer.train(sentences, config.data.vocab_size, config.data.tokenizer).vocab_size == 2000


def test_its_python_translates(monkeypatch):
    """The calls of its example, to a model that knows what the API takes."""
    body, _ = [body for language, body in BLOCKS if language == "python"]
    calls = []

    class Model:
        def translate(self, sentences, **options):
            inspect.signature(translate.LoadedModel.translate).bind(self, sentences, **options)
            calls.append(options)
            return [[translate.Hypothesis("", 0.0, True)]] if "n_best" in options else [""]

    monkeypatch.setattr(translate, "load", lambda workdir, checkpoint, ensemble: Model())
    exec(compile(body, "README.md", "exec"), {})
    for options in calls:
        decode = {name: value for name, value in options.items() if name in configs.field_names("decode")}
        assert options.keys() - decode.keys() <= {"n_best", "prefixes", "constraints"}
        validation.resolve({"decode": decode})
    assert len(calls) == 4


def test_make_targets_it_names_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`?make ([a-z][a-z-]*)", README)) <= set(targets)


def test_make_clean_leaves_what_was_trained(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in (
        ".venv/bin",
        ".venv-plan",
        ".venv-gpu",
        ".pytest_cache/xla",
        "tests/__pycache__",
        "runs/demo/checkpoints",
    ):
        (tmp_path / folder).mkdir(parents=True)
    # Not with the variables of the make that runs the tests.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "VENV")}
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True, env=environment)
    assert {path.name for path in tmp_path.iterdir()} == {"Makefile", "tests", "runs"}
    assert list((tmp_path / "tests").iterdir()) == []
    assert (tmp_path / "runs" / "demo" / "checkpoints").exists()
