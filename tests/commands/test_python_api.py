"""The package from Python: training, and messages that name no flag of a command."""

import ast
import re

import pytest

import transformer
from tests.conftest import ROOT
from tests.training.test_trainer import config_of, data, final_params, lines_of  # noqa: F401 (a fixture)
from transformer import command_line

pytestmark = pytest.mark.reported


def config_dict(config):
    """A validated config as a ConfigDict that sets its fields in the defaults."""
    given = transformer.default_config()
    for section in ("model", "data", "optimizer", "train", "decode", "mesh"):
        given[section].update(vars(getattr(config, section)))
    return given


def test_a_config_dict_trains_and_resumes_and_the_model_says_what_it_is(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    config = config_dict(config_of(data, train={"num_steps": 3}))
    result = transformer.train(config, "run")
    assert (result.workdir, result.step) == (str(tmp_path / "run"), 3)
    logged = {name: value for line in lines_of(tmp_path / "run") for name, value in line.items() if name != "step"}
    assert result.metrics == logged
    assert {"train/loss", "valid/loss", "valid/bleu"} <= logged.keys()
    config.train.num_steps = 6
    assert transformer.train(config, tmp_path / "run").step == 6
    again = transformer.train(config, tmp_path / "run")  # with nothing left to do
    assert again.step == 6
    assert again.metrics["valid/bleu"] == lines_of(tmp_path / "run")[-1]["valid/bleu"]
    assert [line["step"] for line in lines_of(tmp_path / "run") if "train/loss" in line] == [3, 5, 6]
    model = transformer.load("run")
    params = model.primary.model.num_params()
    assert repr(model) == f"TranslationModel(attention, {params:,} params, en to de, checkpoint 6)"
    both = transformer.load("run", checkpoint=3, ensemble=["run"])
    assert repr(both).count("checkpoint 3") == 2


def test_a_validated_config_trains_as_its_config_file_does(data, tmp_path):  # noqa: F811
    config = config_of(data, train={"num_steps": 2})
    (tmp_path / "config.json").write_text(config.to_json())
    parsed, _ = command_line.config_flags(["train.py", f"--config={tmp_path}/config.json"])
    transformer.train(parsed, tmp_path / "run")
    assert final_params(tmp_path / "run", 2)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"train": {"num_steps": 0}}, r"config\.train\.num_steps: expected at least 1, got 0"),
        ({"train": {"seed": "a"}}, r"config\.train\.seed: expected int, got 'a'"),
        ({"model": {"kernel_width": 5}}, "kernel_width = 5: read only with family = convolutional"),
        ({"data": {"name": "no_such_set"}}, "no data set 'no_such_set'"),
        ({"data": {"name": "text", "dir": "/none"}}, "cannot list the folder /none"),
    ],
)
def test_what_is_invalid_is_refused_before_there_is_a_workdir(tmp_path, fields, match):
    config = transformer.default_config().unlock()
    for section, values in fields.items():
        with config.ignore_type():
            config[section].update(values)
    with pytest.raises(transformer.UserError, match=match) as refused:
        transformer.train(config, tmp_path / "run")
    assert "--" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workdir", ["", " ", "s4://bucket/run"])
def test_a_workdir_that_cannot_be_is_refused(workdir):
    with pytest.raises(transformer.UserError, match=r"^workdir: "):
        transformer.train(transformer.default_config(), workdir)


def test_messages_of_python_calls_name_no_flags(data, tmp_path):  # noqa: F811
    with pytest.raises(transformer.UserError, match=r"/none: expected a folder that train\.py wrote, found none$"):
        transformer.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(transformer.UserError, match=r"found no checkpoint; train first, or name another workdir$"):
        transformer.load(tmp_path / "empty")
    transformer.train(config_of(data, train={"num_steps": 1, "eval_every_steps": 99}), tmp_path / "run")
    with pytest.raises(transformer.UserError, match=r"^checkpoint: expected latest, best, .* got 'newest'$"):
        transformer.load(tmp_path / "run", checkpoint="newest")
    with pytest.raises(transformer.UserError, match="another config: ") as refused:
        transformer.train(config_of(data, train={"seed": 5}), tmp_path / "run")
    assert "--" not in str(refused.value)


CALLED = ("inference.py", "checkpoints", "config", "data", "decoding", "models", "training")
ALLOWED = ("msgfmt --check", "--character_coverage", "tensorboard --logdir")  # flags of other programs
OF_COMMANDS = ("schema.py", "config_files.py")  # texts of --help, and messages on the file of --config


def strings_of(path):
    """The string literals of a module, without docstrings."""
    tree = ast.parse(path.read_text())
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if node.body and isinstance(node.body[0], ast.Expr)
    }
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [node.value for node in constants if id(node) not in documented]


def test_modules_that_python_calls_reach_have_no_flags_in_their_texts():
    roots = [ROOT / "transformer" / name for name in CALLED]
    paths = [path for root in roots for path in (root.rglob("*.py") if root.is_dir() else [root])]
    assert len(paths) > 50
    texts = [(path.name, text) for path in paths if path.name not in OF_COMMANDS for text in strings_of(path)]
    named = [each for each in texts if re.search(r"--[a-z]", each[1]) and not any(name in each[1] for name in ALLOWED)]
    assert named == []
