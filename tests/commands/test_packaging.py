"""The wheel: what is in it, and that `pip install` gives a program that trains, scores and translates anywhere."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

import transformer
from tests.conftest import ROOT
from tests.helpers.processes import data_flags, environment, write_data

OFFLINE = ["--quiet", "--no-index", "--no-deps"]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
TINY = {
    "model.num_layers": 1,
    "model.emb_dim": 16,
    "model.mlp_dim": 32,
    "data.name": "text",
    "data.vocab_size": 286,
    "data.num_buckets": 1,
    "optimizer.warmup_steps": 1,
    "train.num_steps": 2,
    "train.eval_every_steps": 2,
    "train.checkpoint_every_steps": 2,
    "train.batch_tokens": 256,
    "decode.beam_size": 1,
    "decode.max_extra_length": 2,
}


def run(folder, *command, stdin=""):
    """Stdout of a command that succeeds, in a folder that is not the repository."""
    settings = {name: value for name, value in environment(1).items() if name != "PYTHONPATH"}
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=folder, input=stdin, capture_output=True, text=True, env=settings, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from this checkout by the packages that are here, without network."""
    for package in ("hatchling", "pip"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test-all has it")
    folder = tmp_path_factory.mktemp("wheel")
    run(folder, sys.executable, "-m", "pip", "wheel", *OFFLINE, "--no-build-isolation", f"--wheel-dir={folder}", ROOT)
    (path,) = folder.glob("*.whl")
    return path


def environment_with(folder, *package):
    """The `bin` of a new environment that has this package, and the packages of ours to depend on."""
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in ours))
    python = folder / "bin" / "python"
    run(folder, sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, *package)
    return python.parent


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` of an environment with the wheel."""
    return environment_with(tmp_path_factory.mktemp("installed") / "venv", wheel)


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_beside_it(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in files} == {
        "transformer",
        f"transformer_jax-{transformer.__version__}.dist-info",
    }
    wanted = {f"transformer/{path.relative_to(ROOT / 'transformer')}" for path in (ROOT / "transformer").rglob("*.py")}
    wanted |= {"transformer/py.typed", "transformer/train.py", "transformer/eval.py"}
    wanted |= {f"transformer/configs/{name}.py" for name in CONFIGS}
    assert {name for name in files if name.startswith("transformer/")} == wanted


@pytest.mark.slow
def test_the_program_lists_its_commands_and_their_help(installed, tmp_path):
    listed = run(tmp_path, installed / "transformer")
    names = re.findall(r"^transformer (\w+) +\w", listed, re.MULTILINE)
    assert names[:2] == ["train", "eval"]
    assert {"translate", "prepare", "benchmark", "plan", "export"} < set(names)
    for name in ("train", "plan"):
        assert "--help" in run(tmp_path, installed / "transformer", name, "--help")
    others = """
import sys
from transformer import __main__
for name in sys.argv[1:]:
    __main__.main(["transformer", name, "--help"])
"""
    assert run(tmp_path, installed / "python", "-c", others, *names).count("usage: ") == len(names)
    modules = run(tmp_path, installed / "python", "-m", "transformer")
    assert re.findall(r"^python -m transformer\.(\w+) +\w", modules, re.MULTILINE) == names
    assert run(tmp_path, installed / "transformer", "--version") == f"{transformer.__version__}\n"


@pytest.mark.slow
def test_every_config_is_installed_with_those_that_it_imports(installed, tmp_path):
    arguments = {"wmt14": ":en_de_base", "paper": ":a-h1", "multi30k_families": ":recurrent"}
    program = """
import json, sys
from transformer import command_line
for name, given in json.loads(sys.argv[1]).items():
    command_line.config_flags(["train.py", f"--config={given}"], needs_data=False)
"""
    given = {name: f"{name}{arguments.get(name, '')}" for name in CONFIGS}
    run(tmp_path, installed / "python", "-c", program, json.dumps(given))


@pytest.mark.slow
def test_the_demo_is_trained_scored_and_used_from_an_empty_folder(installed, tmp_path):
    data = write_data(tmp_path / "data")
    folder = tmp_path / "empty"
    folder.mkdir()
    program = installed / "transformer"
    fields = [f"--config.{name}={value}" for name, value in TINY.items()]
    run(folder, program, "train", "--config=demo", "--workdir=run", *fields, *data_flags(data))
    assert [path.name for path in folder.iterdir()] == ["run"]
    assert json.loads((folder / "run" / "config.json").read_text())["optimizer"]["learning_rate"] == 3e-3  # the demo's
    scores = json.loads(run(folder, program, "eval", "--workdir=run").splitlines()[-1])
    assert (scores["step"], scores["sentences"]) == (2, 13)
    assert run(folder, program, "translate", "--workdir=run", stdin="a red cat\n\n").count("\n") == 2


@pytest.mark.slow
def test_an_editable_install_runs_the_checkout(wheel, tmp_path):
    folder = environment_with(tmp_path / "venv", "--no-build-isolation", "--editable", ROOT)
    place = run(tmp_path, folder / "python", "-c", "import transformer; print(transformer.__file__)")
    assert place == f"{ROOT}/transformer/__init__.py\n"
    assert run(tmp_path, folder / "transformer").startswith("transformer train ")
    assert run(tmp_path, folder / "python", "-m", "transformer").startswith("python train.py ")


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+", transformer.__version__)
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "transformer/__init__.py"
