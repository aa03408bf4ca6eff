"""Folders, function length, imports at start-up, and what no module of the package does; `make lint` has the rest."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "transformer"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
SOURCES = sorted(path for folder in (PACKAGE, ROOT / "benchmarks", ROOT / "configs") for path in folder.rglob("*.py"))
SOURCES += [ROOT / "train.py", ROOT / "eval.py"]
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/*.py"))


@pytest.mark.parametrize("folder", sorted(set(FOLDERS)))
def test_every_folder_is_in_the_import_contract(folder):
    (contract,) = [one for one in PYPROJECT["importlinter"]["contracts"] if one.get("containers") == ["transformer"]]
    assert folder in {name for layer in contract["layers"] for name in layer.split(" | ")}
    assert (PACKAGE / folder / "__init__.py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_stay_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


@pytest.mark.parametrize("module", MODULES)
def test_no_module_has_a_name_that_says_nothing(module):
    assert module.split(".")[-1] not in {"utils", "common", "helpers", "misc", "train", "eval"}


def imported_by(modules: list[str], package: str) -> str:
    """Whether a fresh interpreter has imported a package after these modules: "True" or "False"."""
    program = "; ".join(
        [*(f"import {module}" for module in modules), "import sys", f"print({package!r} in sys.modules)"]
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_configs_and_data_import_no_jax():
    """So that a bad flag costs a moment, and preparing data no device."""
    without = ["transformer.command_line", "transformer.distributed.multihost", "transformer.distributed.consistency"]
    without += ["train", "transformer.training.session"]
    without += [module for module in MODULES if module.split(".")[1:2] in (["config"], ["data"])]
    assert imported_by([*without, "transformer.models.flops"], "jax") == "False\n"


def test_public_names_are_imported_at_first_use():
    program = """if True:
        import sys, transformer
        assert transformer.default_config() and transformer.Config and transformer.UserError and transformer.train
        assert "jax" not in sys.modules
        assert transformer.TranslationModel.translate and "jax" in sys.modules
        assert set(transformer.__all__) <= set(dir(transformer)) | set(transformer._LAZY)
    """
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_no_module_imports_tensorflow():
    commands = [module for module in MODULES if not module.endswith("__main__")]
    assert imported_by(commands, "tensorflow") == "False\n"


FORBIDDEN = (
    r"\bpickle\.loads?\(|(?<![\w.])eval\(|(?<![\w.])exec\(|yaml\.load\(|allow_pickle=True|shell=True|extractall\("
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_executes_what_it_reads(path):
    assert not re.findall(FORBIDDEN, path.read_text())


def test_only_sharding_names_a_mesh_axis():
    named = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if re.search(r"[\"'](fsdp|tensor|sequence)[\"']", path.read_text())
    ]
    assert named == ["distributed/mesh.py", "distributed/sharding.py"]
