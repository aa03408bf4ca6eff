"""Doors open one way, rooms stay small, and nothing is imported before it is needed."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "transformer"

# Each room may import only rooms above it.
ORDER = """
errors remote files config device_limits validation command_line progress heartbeat hosts agreement
datasets/text_files datasets/pair_files
datasets/cldr_words datasets/cldr_grammar datasets/cldr_locale datasets/cldr_slots
datasets/cldr_frames_time datasets/cldr_frames_life datasets/cldr
datasets/pair_shards datasets/parallel_text datasets/prepared
datasets/archives datasets/members datasets/wmt
datasets/split datasets/contents datasets/corpus
subword_codes tokenizer batching packing cost pipeline data_report
device_grid sharding consensus segments dropout attention blockwise ring kernels layers stack hypotheses
text_model model source_attention recurrence recurrent convolutional families
loss guard optimizer step fingerprint compilation manifest checkpoint trained fine_tuning
restrictions constraints continuations search sampling decoding
wishes reranking translator alignments translate scores significance evaluate
workdir run_log divergence stop_signals loop
scoring summary watch
reporting/charts reporting/attention_maps reporting/report_page reporting/report
planning/chips planning/hlo planning/program_cost planning/roofline planning/fit planning/ahead plan
benchmark prepare export_jax export_ctranslate2 export
""".split()

ROOMS = sorted(str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py"))
SOURCES = [
    *PACKAGE.rglob("*.py"),
    *(ROOT / "benchmarks").glob("*.py"),
    *(ROOT / "configs").glob("*.py"),
    ROOT / "train.py",
    ROOT / "eval.py",
]


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("transformer.")]
        for name in names:
            parts = name.split(".")[1:]
            for end in range(len(parts), 0, -1):
                if "/".join(parts[:end]) in ROOMS:
                    yield "/".join(parts[:end])
                    break


def test_every_room_has_its_place():
    assert sorted(ORDER) == [room for room in ROOMS if not room.endswith("__init__")]


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_rooms_above_it(room):
    above = ORDER[: ORDER.index(room)]
    below = [other for other in imported_rooms(PACKAGE / f"{room}.py") if other not in above]
    assert not below


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 320
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


def test_every_folder_of_rooms_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    assert sorted(listed) == sorted(str(folder).replace("/", ".") for folder in folders)


def test_no_room_is_named_for_nothing():
    assert not {pathlib.Path(room).name for room in ROOMS} & {"utils", "common", "helpers", "misc", "train", "eval"}


def test_the_data_rooms_and_the_config_import_no_jax():
    rooms = [room.replace("/", ".") for room in ORDER[: ORDER.index("pipeline")]]
    program = "; ".join(
        [*(f"import transformer.{room}" for room in rooms), "import sys", "print('jax' in sys.modules)"]
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "False\n"


def test_no_room_imports_tensorflow():
    program = "; ".join([*(f"import transformer.{room.replace('/', '.')}" for room in ORDER), "import sys"])
    program += "; print('tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "False\n"


FORBIDDEN = (
    r"\bpickle\.loads?\(|(?<![\w.])eval\(|(?<![\w.])exec\(|yaml\.load\(|allow_pickle=True|shell=True|extractall\("
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_executes_what_it_reads(path):
    assert not re.findall(FORBIDDEN, path.read_text())


def test_only_sharding_names_a_mesh_axis():
    named = [
        room for room in ORDER if re.search(r"[\"'](fsdp|tensor|sequence)[\"']", (PACKAGE / f"{room}.py").read_text())
    ]
    assert named == ["sharding"]
