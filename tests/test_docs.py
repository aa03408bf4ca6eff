"""Checks of README.md, docs/ and CONTRIBUTING.md: links, fields, commands, examples and plain English."""

import ast
import importlib.util
import inspect
import io
import os
import re
import shutil
import subprocess
import tokenize
import tomllib
from collections.abc import Iterator

import numpy as np
import pytest
import yaml

import transformer
from tests.commands.test_translate import save
from tests.conftest import ROOT
from tests.decoding.test_translator import LINES
from transformer import command_line, inference
from transformer.config import schema, validation
from transformer.data import tokenizer
from transformer.data.cldr import generator
from transformer.decoding.scorer import TargetScore
from transformer.decoding.translator import Hypothesis

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *(ROOT / "docs").glob("*.md")]
}
every_page = pytest.mark.parametrize("page", PAGES)
# Private words that pages used to have, as patterns over prose, each with the term of the field.
PRIVATE_PHRASES = {
    r"\brooms?\b": "module, space",
    r"\bsittings?\b": "session",
    r"\bwish(es)?\b": "constraint",
    r"\blead (process|host)\b|\bhost 0\b": "primary process",
    r"\bpieces?\b": "subword token",
    r"\bslots?\b": "token position",
    r"\bsubword-nmt codes\b": "BPE merges",
    r"\bplain path\b": "reference implementation, plain attention",
    r"\b(is|are|newest) sound\b|\bsound (checkpoint|one)s?\b": "valid",
    r"\bput aside\b": "quarantined",
    r"\b(held|holds?) [^.]{0,40}\bagainst\b": "compared with",
    r"\btests? (holds?|held)\b|\bheld by (a )?tests?\b": "a test checks",
    r"\b(is|are) told\b|\bsays so\b|\ba line says\b": "is logged",
    r"\banew\b": "restarts, resets",
    r"\bgiv(es?|ing) way to\b": "falls back to",
    r"\bmatrix of faults\b": "fault-injection suite",
    r"\btries of\b": "trials of",
    r"\bgo(es)? on\b": "resumes, continues",
    r"\bis no number\b|\b(what|that|which) (is|are) no (?!longer)": "non-finite, invalid",
    r"\blook(s|ed|ing)? at the source\b": "attends to the source",
    r"\bfalls? silent\b|\bin silence\b": "stops responding, silently",
    r"\bheed(s|ed)?\b|\bmend(s|ed)?\b": "handled, fixed",
    r"\bcome home\b|\bmeetings?\b": "rotate",
    r"\bundisturbed\b|\bnothing disturbed\b": "uninterrupted",
}


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def prose(text: str) -> str:
    """The text without code blocks, code spans and targets of links, each paragraph on one line."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "`code`", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def anchors(text: str) -> set[str]:
    """What `#…` may name in a page: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_folder_order_lists_every_folder():
    section = PAGES["CONTRIBUTING.md"].split("\n## Folder order\n")[1].split("\n## ")[0]
    folders = {path.parent.name for path in (ROOT / "transformer").glob("*/__init__.py")}
    assert set(re.findall(r"`(\w+)/`", "\n".join(re.findall(r"^\| (.*?) \|", section, re.MULTILINE)))) == folders


def test_readme_is_short():
    assert len(PAGES["README.md"].split()) <= 900


def test_index_lists_every_page():
    listed = set(re.findall(r"\]\((\w+\.md)\)", PAGES["docs/index.md"]))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}


@every_page
def test_internal_links_and_anchors_exist(page):
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)(?:#([^)]*))?\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text()), f"{target}#{anchor}"


@every_page
def test_pages_have_no_private_phrases(page):
    text = prose(PAGES[page])
    for pattern, term in PRIVATE_PHRASES.items():
        match = re.search(rf"(?i).{{0,40}}(?:{pattern}).{{0,40}}", text)
        assert match is None, f"{match and match[0]!r}: say {term}"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("A room of its own.", r"\brooms?\b"),
        ("A value that is\nheld\nagainst another.", r"\b(held|holds?) [^.]{0,40}\bagainst\b"),
    ],
)
def test_private_phrases_are_found_across_lines(text, pattern):
    assert pattern in PRIVATE_PHRASES
    assert re.search(pattern, prose(text))


def test_private_phrases_in_code_are_not_prose():
    assert not re.search(r"room|sitting", prose("Run `room`:\n\n```sh\nsitting\n```\n"))


@every_page
def test_table_cells_are_short(page):
    for line in re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL).splitlines():
        for cell in re.split(r"(?<!\\)\|", line) if line.startswith("|") else []:
            assert len(cell.split()) <= 20, cell


@every_page
def test_modules_of_commands_exist(page):
    for module in re.findall(r"-m ((?:transformer|benchmarks)(?:\.\w+)*)", PAGES[page]):
        assert module == "transformer.NAME" or importlib.util.find_spec(module), module


@every_page
def test_configs_exist(page):
    for config in re.findall(r"\bconfigs/\w+\.py", PAGES[page]):
        assert config == "configs/mine.py" or (ROOT / config).exists(), config


@pytest.mark.parametrize("page", ["docs/extending.md", "CONTRIBUTING.md"])
def test_source_files_exist(page):
    for path in re.findall(r"`((?:transformer|tests|docs)/[\w/.]+)`", PAGES[page]):
        assert path.endswith("/NAME.py") or (ROOT / path).exists(), path


@every_page
def test_config_fields_exist(page):
    text = PAGES[page]
    for section, field in re.findall(r"--config\.(\w+)\.(\w+)", text):
        assert field in schema.field_names(section), (section, field)
    for field in re.findall(r"--decode\.([a-z]\w*)", text):
        assert field in schema.field_names("decode"), field
    for section, field in re.findall(r"`(data|model|train|mesh|decode|optimizer|eval)\.(\w{3,})\b", text):
        assert field in schema.field_names(section), (section, field)


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
def test_text_config_accepts_every_layout(flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    command_line.config_flags(["train.py", "--config=configs/text.py", *flags])


def test_config_example_is_a_config(tmp_path):
    (body,) = blocks("docs/configuration.md", "python")
    (tmp_path / "mine.py").write_text(body)
    config, _ = command_line.config_flags(["train.py", f"--config={tmp_path}/mine.py"])
    assert (config.data.target_language, config.model.dropout_rate) == ("fr", 0.3)
    sentences = [sentence for pair in generator.generate("fr", {"train": 5000})["train"] for sentence in pair]
    assert tokenizer.train(sentences, config.data.vocab_size, config.data.tokenizer).vocab_size == 2000


def test_readme_example_translates(monkeypatch):
    """Runs the calls of the example with a model that checks their arguments."""
    (body,) = blocks("README.md", "python")
    calls = []

    class Model:
        def translate(self, sentences, **options):
            inspect.signature(inference.TranslationModel.translate).bind(self, sentences, **options)
            calls.append(options)
            return [[Hypothesis("", 0.0, True)]] if "n_best" in options else [""]

        def score(self, sources, targets):
            inspect.signature(inference.TranslationModel.score).bind(self, sources, targets)
            calls.append({})
            return [TargetScore(0.0, [], [])]

    monkeypatch.setattr(inference, "load", lambda workdir, checkpoint, ensemble: Model())
    exec(compile(body, "README.md", "exec"), {})
    for options in calls:
        decode = {name: value for name, value in options.items() if name in schema.field_names("decode")}
        assert options.keys() - decode.keys() <= {"n_best", "prefixes", "constraints"}
        validation.validate({"decode": decode})
    assert len(calls) == 5


def test_the_examples_of_the_python_page_run(tmp_path, monkeypatch):
    save(tmp_path / "runs" / "mine", tokenizer.train(LINES, 290, "bpe"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for body in blocks("docs/python.md", "python"):
        exec(compile(body, "docs/python.md", "exec"), names)
    weights = names["attention"].weights_LHTS
    assert weights.shape[2:] == (len(names["target_tokens"]), len(names["source_tokens"]))
    np.testing.assert_allclose(names["out_BTHK"], names["same_BTHK"], atol=1e-5)
    assert names["logits_BTV"].shape == (2, 3, 20)
    assert names["best"].tokens_BNT.shape == (1, 3, 5)
    assert names["translations"].tokens_BNT.shape == (2, 3, 5)


TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@every_page
def test_make_targets_exist(page):
    code = " ".join([*re.findall(r"`([^`\n]+)`", PAGES[page]), *blocks(page, "sh")])
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) <= TARGETS


def test_ci_workflow_calls_make_targets():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["make"]
    matrix = job["strategy"]["matrix"]
    assert set(matrix["target"]) == {"lint", "test", "test-all"} <= TARGETS
    assert job["steps"][-1]["run"] == "make ${{ matrix.target }}"
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert oldest == f">={matrix['python'][0]}"


def test_citation_and_changelog_have_the_version_of_the_package():
    version = transformer.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## \[([\d.]+)\]", PAGES["CHANGELOG.md"], re.MULTILINE)[1] == version


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


CODE_TERMS = {r"\bslots?\b", r"\bpieces?\b", r"\blead (process|host)\b|\bhost 0\b"}  # terms of APIs and of formats
SOURCES = sorted(path for folder in ("transformer", "benchmarks", "configs") for path in (ROOT / folder).rglob("*.py"))
WITH_SENTENCES = ("lexicon.py", "templates.py", "task_data.py")  # of the data
SOURCES = [path for path in SOURCES if path.name not in WITH_SENTENCES]


def texts_of(source: str) -> Iterator[str]:
    """Docstrings, messages and comments of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


@pytest.mark.parametrize("path", [ROOT / "train.py", ROOT / "eval.py", *SOURCES], ids=lambda path: path.name)
def test_code_and_messages_have_no_private_phrases(path):
    for text in texts_of(path.read_text()):
        for pattern in PRIVATE_PHRASES.keys() - CODE_TERMS:
            match = re.search(rf"(?i).{{0,40}}(?:{pattern}).{{0,40}}", prose(text))
            assert match is None, f"{match and match[0]!r}: say {PRIVATE_PHRASES[pattern]}"


def test_a_private_phrase_in_a_message_is_found():
    assert list(texts_of('f(f"{x}: put aside")  # a room of its own\n')) == [": put aside", "# a room of its own"]
