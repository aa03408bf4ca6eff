"""Flags into a checked config, and commands that end with one message and the documented exit code."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import commands
from transformer import command_line
from transformer.config import MeshConfig, schema, validation
from transformer.runtime import logging
from transformer.runtime.errors import DivergedError, StoppedError, UserError, WorkdirError

DEMO = "--config=configs/demo.py"


@pytest.fixture(autouse=True)
def _in_root(root, monkeypatch):
    monkeypatch.chdir(root)


def parse(*arguments):
    return command_line.config_flags(["train.py", *arguments])


def test_overrides_change_fields_whatever_their_order():
    for arguments in (
        [DEMO, "--config.train.seed=5"],
        ["--config.train.seed=5", DEMO],
        [DEMO, "--config.train.seed", "5"],
    ):
        config, rest = parse(*arguments, "--workdir=x")
        assert config.train.seed == 5
        assert rest == ["--workdir=x"]


def test_decode_flags_are_fields_of_their_section_alone():
    arguments = ["eval.py", "--decode.beam_size=1e1", "--workdir=x", "--decode.top_p", "0.5", "--decode.method=sample"]
    fields, rest = command_line.decode_flags(arguments)
    assert fields == {"beam_size": 10, "top_p": 0.5, "method": "sample"}
    assert rest == ["--workdir=x"]
    for argument, match in (
        ("--decode.bean_size=3", "config.decode: unknown field 'bean_size'; did you mean 'beam_size'"),
        ("--decode.beam_size=x", "--decode.beam_size: expected int, got 'x'"),
        ("--decode.beam_size", "expected a value"),
        ("--decode=x", "expected --decode.FIELD=VALUE"),
    ):
        with pytest.raises(UserError, match=match):
            command_line.decode_flags(["eval.py", argument])


def test_widths_follow_an_override_of_the_model_width(tmp_path):
    """A field that follows another in the config file goes on following it on the command line."""
    (tmp_path / "plain.py").write_text("def get_config():\n    return {'model': {'num_layers': 2}}\n")
    for path in ("configs/demo.py", tmp_path / "plain.py"):
        model = parse(f"--config={path}", "--config.model.emb_dim=64")[0].model
        assert (model.emb_dim, model.qkv_dim, model.value_dim, model.num_layers) == (64, 64, 64, 2)


def test_a_whole_number_of_a_config_file_may_become_a_part(tmp_path):
    (tmp_path / "plain.py").write_text("def get_config():\n    return {'optimizer': {'clip_norm': 1}}\n")
    (tmp_path / "own.py").write_text(
        "from ml_collections import config_dict\n"
        "def get_config():\n    return config_dict.ConfigDict({'optimizer': {'clip_norm': 1}})\n"
    )
    (tmp_path / "frozen.py").write_text((tmp_path / "own.py").read_text().replace(".ConfigDict", ".FrozenConfigDict"))
    for name in ("plain", "own", "frozen"):
        config = parse(f"--config={tmp_path}/{name}.py", "--config.optimizer.clip_norm=0.5")[0]
        assert config.optimizer.clip_norm == 0.5


def test_whole_numbers_may_be_written_as_people_do():
    assert parse(DEMO, "--config.train.num_steps=1e5")[0].train.num_steps == 100_000


def test_a_config_file_may_take_a_name(tmp_path):
    path = tmp_path / "named.py"
    path.write_text(
        "from transformer.config import default_config\ndef get_config(name='a'):\n    c = default_config()\n"
        "    c.train.seed = {'a': 1, 'b': 2}[name]\n    return c\n"
    )
    assert [parse(f"--config={path}{name}")[0].train.seed for name in ("", ":a", ":b")] == [1, 1, 2]
    with pytest.raises(UserError, match="line 4: KeyError: 'c'"):
        parse(f"--config={path}:c")


def test_a_path_is_made_absolute_and_never_empty(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert command_line.absolute_path("~/run") == "/home/me/run"
    assert command_line.absolute_path("run") == os.path.join(os.getcwd(), "run")
    assert command_line.absolute_path("gs://bucket/run") == "gs://bucket/run"
    with pytest.raises(argparse.ArgumentTypeError, match="empty"):
        command_line.absolute_path(" ")


PATH_FLAGS = {
    "eval": ["workdir", "source", "reference", "output", "versus"],
    "transformer.translate": ["workdir", "ensemble", "prefix_file", "constraint_file", "alignments", "attention"],
    "transformer.translate_corpus": ["workdir", "ensemble", "input", "output"],
    "transformer.score": ["workdir", "ensemble", "source", "target", "output"],
    "transformer.export": ["workdir", "output"],
}


@pytest.mark.parametrize("command", PATH_FLAGS)
def test_every_flag_that_is_a_path_is_read_as_one(command, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    module = importlib.import_module(command + ".__main__" * (command == "transformer.export"))
    parse = module.parse if command == "eval" else module._parse
    required = {"transformer.export": "--format=jax", "transformer.translate_corpus": "--input_side=target"}
    others = [required[command]] if command in required else []
    flags = {name: f"--{name}=~/{name}" for name in PATH_FLAGS[command]}
    args = parse([*flags.values(), *others])
    for name in flags:
        given = getattr(args, name)
        assert (given[0] if name in ("ensemble", "reference", "input") else given) == f"/home/me/{name}"
    monkeypatch.setattr(command_line.object_storage.importlib.util, "find_spec", lambda name: None)
    for name in set(flags) - {"output" if command == "transformer.export" else ""}:
        with pytest.raises(SystemExit, match="2"):
            parse([*{**flags, name: f"--{name}=gs://b/x"}.values(), *others])
        assert f"--{name}: gs:// needs the package gcsfs: pip install gcsfs" in capsys.readouterr().err


@pytest.mark.reported
def test_commas_in_paths_stay_where_only_so_there_are_files(tmp_path):
    for name in ("a,b", "a,b.txt", "c", "d"):
        (tmp_path / name).touch()
    (tmp_path / "a").mkdir()
    for names in (["a,b.txt"], ["c", "a,b", "d"], ["c", "d"], ["c", "none"]):
        paths = [f"{tmp_path}/{name}" for name in names]
        assert command_line.absolute_paths(",".join(paths)) == paths
    args = importlib.import_module("eval").parse(
        ["--workdir=x", f"--source={tmp_path}/c", f"--reference={tmp_path}/a,b.txt,{tmp_path}/d"]
    )
    assert args.reference == [f"{tmp_path}/a,b.txt", f"{tmp_path}/d"]
    assert command_line.absolute_paths("gs://b/x,gs://b/y") == ["gs://b/x", "gs://b/y"]


def test_a_link_to_what_is_read_is_no_output(tmp_path):
    (tmp_path / "link").symlink_to("theirs")
    with pytest.raises(UserError, match="would overwrite what is read"):
        importlib.import_module("eval").parse(
            ["--workdir=x", f"--versus={tmp_path}/theirs", f"--output={tmp_path}/link"]
        )


def test_a_config_may_be_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "plain.py").write_text("def get_config():\n    return {'model': {'num_layers': 2}}\n")
    assert parse("--config=~/plain.py")[0].model.num_layers == 2


@pytest.mark.parametrize("command", [["train.py", DEMO], ["eval.py"], ["-m", "transformer.translate"]])
def test_an_empty_workdir_is_refused(command):
    assert b"got an empty name" in commands.run(*command, "--workdir=", code=2).stderr


def test_evaluation_says_what_it_loads_before_it_does(tmp_path):
    first, second = commands.run("eval.py", f"--workdir={tmp_path}", code=2).stderr.decode().splitlines()
    assert first == f"{tmp_path}: loading JAX …"
    assert "found no checkpoint" in second


def failing(error):
    """A command that raises it."""

    def command(argv):
        raise error

    return command


def test_want_of_memory_is_a_message_with_advice(capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.run(failing(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")))
    (line,) = capsys.readouterr().err.splitlines()
    assert "set model.remat=full, also when resuming, or in a new workdir raise train.accumulation_steps" in line


@pytest.mark.reported
def test_a_full_disk_is_one_too(capsys):
    with pytest.raises(OSError, match="No space left on device") as error, open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    assert logging.report_error(error.value) == 2
    assert "out of memory or disk: [Errno 28] No space left on device; " in capsys.readouterr().err


def test_want_of_the_host_s_memory_is_one_too(capsys):
    assert logging.report_error(MemoryError()) == 2
    assert "out of memory or disk: MemoryError; in training set model.remat=full" in capsys.readouterr().err
    with pytest.raises(MemoryError) as error:
        np.zeros(1 << 60, np.int8)
    assert logging.report_error(error.value) == 2
    assert "Unable to allocate 1.00 EiB" in capsys.readouterr().err


def test_a_boolean_and_a_float_and_a_string():
    config, _ = parse(
        DEMO, "--config.model.share_embeddings=false", "--config.optimizer.clip_norm=2", "--config.model.norm=pre"
    )
    assert (config.model.share_embeddings, config.optimizer.clip_norm, config.model.norm) == (False, 2.0, "pre")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], r"expected one --config=FILE"),
        ([DEMO, DEMO], r"expected one --config=FILE.*got 2"),
        (["--config=configs/none.py"], r"configs/none\.py: no such file"),
        ([DEMO, "--config.model.num_layer=3"], r"config\.model: unknown field 'num_layer'; did you mean 'num_layers'"),
        ([DEMO, "--config.modle.num_layers=3"], r"config: unknown field 'modle'; did you mean 'model'"),
        ([DEMO, "--config.model=3"], r"expected --config\.SECTION\.FIELD=VALUE"),
        ([DEMO, "--config.model.num_layers.x=3"], r"expected --config\.SECTION\.FIELD=VALUE"),
        ([DEMO, "--config.model.num_layers=two"], r"num_layers: expected int, got 'two'"),
        ([DEMO, "--config.model.num_layers=1.5"], r"num_layers: expected int, got '1\.5'"),
        ([DEMO, "--config.model.num_layers=inf"], r"num_layers: expected int, got 'inf'"),
        ([DEMO, "--config.model.num_layers"], r"expected a value"),
        ([DEMO, "--config.model.num_layers=0"], r"num_layers: expected at least 1, got 0"),
        ([DEMO, "--config.model.dropout_rate=nan"], r"dropout_rate: expected a finite number, got nan"),
        ([DEMO, "--config.model.share_embeddings=3"], r"share_embeddings: expected bool, got '3'"),
    ],
)
def test_bad_flags_are_refused_with_a_message(arguments, match):
    with pytest.raises(UserError, match=match):
        parse(*arguments)


@pytest.mark.parametrize("name", ["demo", "configs/demo.py", "demo.py", "paper_cldr"])
def test_a_name_that_is_no_file_here_is_a_config_of_the_project(tmp_path, monkeypatch, name):
    wanted, _ = parse("--config=configs/paper_cldr.py" if name == "paper_cldr" else DEMO)
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(f"--config={name}")[0] == wanted
    assert parse("--config=wmt14:en_fr_big", "--config.data.data_dir=x")[0].data.target_language == "fr"
    with pytest.raises(UserError, match=r"--config=dome: no such file; .*: demo, multi30k, "):
        parse("--config=dome")


def test_a_file_here_comes_before_a_config_of_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.py").write_text("def get_config():\n    return {'train': {'seed': 7}}\n")
    assert parse(DEMO)[0].train.seed == 7


def test_a_config_may_change_fields_of_another_beside_it(tmp_path):
    """Each its own neighbour, wherever it lies; what it imports leaves nothing behind."""
    for number, folder in enumerate([tmp_path / "one", tmp_path / "other"], 1):
        folder.mkdir()
        (folder / "base.py").write_text(f"def get_config():\n    return {{'train': {{'seed': {number}}}}}\n")
        (folder / "mine.py").write_text("def get_config():\n    from . import base\n    return base.get_config()\n")
        assert parse(f"--config={folder}/mine.py")[0].train.seed == number
    assert not [name for name in sys.modules if "_config_files" in name]
    (folder / "mine.py").write_text("from . import missing\n")
    with pytest.raises(UserError, match="line 1: ImportError: cannot import name 'missing'"):
        parse(f"--config={folder}/mine.py")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("x = \n", "SyntaxError"),
        ("x = 3\n", "get_config"),
        (
            "from transformer.config import default_config\ndef get_config():\n    c = default_config()\n"
            "    c.model.layers = 3\n    return c\n",
            "line 4: unknown field 'layers'; did you mean 'num_layers'",
        ),
        ("def get_config():\n    return 3\n", "expected get_config to return a ConfigDict, got int"),
        ("def get_config():\n    raise KeyError('boo')\n", "line 2: KeyError: 'boo'"),
        ("def get_config():\n    return {'modle': {}}\n", "unknown field 'modle'; did you mean 'model'"),
        (
            "from transformer.config import default_config\ndef get_config():\n    c = default_config()\n"
            "    c.model.dropout_rate = 'high'\n    return c\n",
            "line 4: TypeError",
        ),
    ],
)
def test_an_error_inside_a_config_file_says_where(tmp_path, body, match):
    path = tmp_path / "odd.py"
    path.write_text(body)
    with pytest.raises(UserError, match=match):
        parse(f"--config={path}")


def run(*command, **options):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60, **options)


NO_JAX = """
import contextlib, io, json, os, runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "flax", "optax", "orbax"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
for sys.argv in json.loads(sys.argv[1]):
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, stderr.getvalue(), os.path.exists("x")]))
"""
CORPUS = ["transformer/translate_corpus.py", "--workdir=x", "--input_side=target", "--output=x"]


def mixture(**fields):
    entry = {"name": "cldr", "source_language": "en", "target_language": "de", **fields}
    return f"--config.data.mixture={json.dumps([entry])}"


MISTAKES = [
    (["train.py"], "expected one --config=FILE"),
    (["train.py", DEMO, "--workdir=x", "--config.train.seed=-1"], "config.train.seed: expected at least 0, got -1"),
    (["train.py", DEMO, "--workdir=x", "--config.model.num_heads=3"], "num_heads = 3 does not divide"),
    (["train.py", DEMO, "--workdir=x", "--config.data.name=no_such_set"], "no_such_set"),
    (["train.py", DEMO, "--workdir=x", "--config.data.filter_max_ratio=0.5"], "expected 0 (off), or at least 1"),
    (["train.py", DEMO, "--workdir=x", "--config.data.filter_max_ratio=nan"], "expected a finite number, got nan"),
    (["train.py", DEMO, "--workdir=x", mixture(weight=0)], "entry 1, weight: expected above 0, got 0.0"),
    (["train.py", DEMO, "--workdir=x", mixture(weight=-1)], "entry 1, weight: expected above 0, got -1.0"),
    (["train.py", DEMO, "--workdir=x", mixture(weight=float("nan"))], "weight: expected a finite number, got nan"),
    (["train.py", DEMO, "--workdir=x", mixture(name="text", train="/dev/null.tsv")], "/dev/null.tsv"),
    (["train.py", DEMO, "--workdir=x", mixture(from_step=9)], "got none for updates 1 to 9"),
    (["train.py", DEMO, "--workdir=x", mixture(name="no_such_set")], "config.data.mixture, entry 1, en to de:"),
    (["train.py", DEMO, "--workdir=x", "--config.data.mixture=de"], "expected a list in JSON, got 'de'"),
    (["train.py", DEMO], "--workdir"),
    (["train.py", DEMO, "--workdir=x", "--wrokdir=y"], "--wrokdir"),
    (["train.py", DEMO, "--workdir=x", "--config.data.tokenizer=no.model"], "no.model: expected a SentencePiece"),
    (["eval.py"], "--workdir"),
    (["eval.py", "--workdir=x", "--source=a"], "--source and --reference go together"),
    (["eval.py", "--workdir=x", "--test_set=wmt14/fall"], "sacreBLEU has no such test set; did you mean wmt14/full"),
    (["eval.py", "--workdir=x", "--test_set="], "sacreBLEU has no such test set"),
    (["eval.py", "--workdir=x", "--test_set=wmt14/full", "--split=val"], "leave out --split"),
    (["eval.py", "--workdir=x", "--test_set=wmt14", "--source=a", "--reference=b"], "leave out --source"),
    (["eval.py", "--workdir=x", "--decode.bean_size=3"], "unknown field 'bean_size'; did you mean 'beam_size'"),
    (["eval.py", "--workdir=x"], "x: expected a folder that train.py wrote, found none"),
    ([*CORPUS, "--input=README.md"], "x: expected a folder that train.py wrote, found none"),
    ([*CORPUS, "--input=none/*"], "--input: expected files that match "),
    ([*CORPUS, "--input=README.md", "--tag=a b"], "--tag='a b': expected one word without spaces"),
]


@pytest.fixture(scope="module")
def mistakes(root):
    """What became of each of MISTAKES, all made in one process that cannot import JAX."""
    arguments = json.dumps([argv for argv, _ in MISTAKES])
    # Set, so that training does not start itself anew.
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    result = run("-c", NO_JAX, arguments, cwd=root, env=environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda i: " ".join(MISTAKES[i][0]))
def test_mistakes_cost_one_message_and_no_jax(mistakes, number):
    code, stderr, wrote = mistakes[number]
    assert code == 2, stderr
    assert MISTAKES[number][1] in stderr
    assert "Traceback" not in stderr
    assert not wrote


@pytest.mark.reported
def test_a_platform_that_is_not_here_is_a_message(root):
    program = (
        "from transformer import command_line, config\nfrom transformer.distributed import mesh\n"
        "command_line.run(lambda argv: mesh.make_mesh(config.MeshConfig()))"
    )
    result = run("-c", program, env={**os.environ, "JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "JAX_PLATFORMS=cuda: expected devices of that platform, found none" in result.stderr
    assert "set JAX_PLATFORMS=cpu" in result.stderr


@pytest.mark.reported
def test_a_config_in_a_pipe_is_distinguished_from_no_config(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(UserError, match=r"pipe\.py: expected a file that ends in \.py, got a folder, pipe or device"):
        parse(f"--config={tmp_path}/pipe.py")


def test_a_failure_inside_is_exit_code_1_with_a_traceback(capsys):
    with pytest.raises(SystemExit, match="1"):
        command_line.run(lambda argv: 1 / 0)
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("no"), 2), (DivergedError("no"), 3), (WorkdirError("no"), 4), (StoppedError(15, "no"), 143)],
)
def test_exit_codes_are_those_documented(error, code, capsys):
    with pytest.raises(SystemExit) as end:
        command_line.run(failing(error))
    assert end.value.code == code
    assert capsys.readouterr().err.strip().endswith(": no")


def test_a_reader_that_goes_away_is_no_traceback():
    program = "from transformer import command_line\ndef f(a):\n  for i in range(100000): print(i)\ncommand_line.run(f)"
    result = subprocess.run(f"{sys.executable} -c '{program}' | head -1", shell=True, capture_output=True, text=True)
    assert result.stdout == "0\n"
    assert result.stderr == ""


@pytest.mark.parametrize("command", [["train.py"], ["eval.py"], ["-m", "transformer.translate"]])
def test_help_is_to_be_had(command):
    assert b"--workdir" in commands.run(*command, "--help").stdout


def test_help_of_a_command_that_takes_a_config_needs_none(capsys):
    parser = command_line.config_parser("make.py", "Makes it.\n\nMore.", "--workdir=DIR")
    with pytest.raises(SystemExit, match="0"):
        command_line.parse_with_config(parser, ["make.py", "--help"])
    shown = capsys.readouterr().out
    assert "make.py --config=FILE --workdir=DIR" in shown
    assert "Makes it." in shown
    assert "More." not in shown


@pytest.mark.reported
def test_usage_of_training_shows_that_a_workdir_alone_resumes():
    shown = " ".join(commands.run("train.py", "--help").stdout.decode().split())
    assert "usage: train.py [--config=FILE] --workdir=DIR [--config.SECTION.FIELD=VALUE ...] [options]" in shown
    assert "Not needed to resume the run of --workdir." in shown


@pytest.mark.reported
@pytest.mark.parametrize(("program", "ends"), [("train.py", True), ("eval.py", True), ("other.py", False), ("", False)])
def test_ctrl_c_ends_a_command_while_it_imports_and_leaves_other_programs_alone(program, ends, root):
    argv = str(root / program) if program else ""
    code = (
        f"import sys; sys.argv = [{argv!r}]; import transformer, signal; print(repr(signal.getsignal(signal.SIGINT)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ("default_int_handler" not in done.stdout) == ends
    assert ("SIG_DFL" in done.stdout) == ends


def test_ctrl_c_of_a_module_that_imports_the_package_is_left_alone(tmp_path, root):
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text("import transformer\n")
    (tmp_path / "server" / "app.py").write_text("import signal\nprint(signal.getsignal(signal.SIGINT))\n")
    command, paths = [sys.executable, "-m", "server.app"], {"PYTHONPATH": str(root)}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True, check=True
    )
    assert "default_int_handler" in done.stdout


def test_help_lists_every_field_with_default_meaning_and_bounds(capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.parse_with_config(command_line.config_parser("make.py", ""), ["make.py", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for section, kind in schema.SECTIONS.items():
        for field in dataclasses.fields(kind):
            assert f"--config.{section}.{field.name}={field.default} {field.metadata['doc']}" in shown
    assert "layers of the encoder and of the decoder each; at least 1 " in shown
    assert "after its activation; at least 0, at most 0.99 " in shown
    assert "one of sinusoidal, learned, rotary" in shown
    assert "2147483647" not in shown


def test_the_whole_config_is_printed_as_json(capsys):
    parser = command_line.config_parser("make.py", "")
    with pytest.raises(SystemExit, match="0"):
        command_line.parse_with_config(parser, ["make.py", DEMO, "--config.train.seed=5", "--print_config"])
    assert capsys.readouterr().out == parse(DEMO, "--config.train.seed=5")[0].to_json()


def test_a_printed_config_needs_no_workdir_and_no_data(tmp_path):
    """With the workdir of a run and no other config it is the one that is kept there."""
    printed = commands.run("train.py", "--config=configs/text.py", "--print_config").stdout.decode()
    config = validation.to_dataclasses(json.loads(printed))
    assert config.data.name == "text"
    kept = parse(DEMO)[0]
    (tmp_path / "config.json").write_text(dataclasses.replace(kept, mesh=MeshConfig(data=2)).to_json(run_id="1"))
    printed = commands.run("train.py", f"--workdir={tmp_path}", "--print_config").stdout.decode()
    assert json.loads(printed)["mesh"]["data"] == 2


def test_a_workdir_keeps_its_config(tmp_path, capsys):
    config = parse(DEMO, "--config.train.seed=5", "--config.model.emb_dim=64")[0]
    parser = command_line.config_parser("train.py", "", "--workdir=DIR")
    parser.add_argument("--workdir")
    (tmp_path / "config.json").write_text(config.to_json(run_id="1234"))
    for flags in ([f"--workdir={tmp_path}"], [f"--config={tmp_path}/config.json"]):
        assert command_line.parse_with_config(parser, ["train.py", *flags])[0] == config
        changed = command_line.parse_with_config(parser, ["train.py", *flags, "--config.train.keep_last=7"])[0]
        assert changed == dataclasses.replace(config, train=dataclasses.replace(config.train, keep_last=7))
    other = command_line.parse_with_config(parser, ["train.py", DEMO, f"--workdir={tmp_path}"])[0]
    assert other == parse(DEMO)[0]


def test_steps_to_profile_that_a_saved_config_never_makes_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(parse(DEMO, "--config.train.num_steps=2000")[0].to_json())
    with pytest.raises(UserError, match=r"the run ends at train\.num_steps = 2000"):
        parse(f"--config={tmp_path}/config.json", "--config.train.profile_steps=3000:3010")


def test_an_error_of_object_storage_is_a_message(capsys):
    refused = type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})
    with pytest.raises(SystemExit, match="2"):
        command_line.run(failing(refused("Unable to locate credentials")))
    assert "object storage: Unable to locate credentials; check the address" in capsys.readouterr().err


def test_widths_of_a_saved_config_follow_another_emb_dim(tmp_path):
    narrow = "--config.model.emb_dim=64"
    (tmp_path / "config.json").write_text(parse(DEMO)[0].to_json())
    assert parse(f"--config={tmp_path}/config.json", narrow)[0].model == parse(DEMO, narrow)[0].model
    (tmp_path / "config.json").write_text(parse(DEMO, "--config.model.qkv_dim=64")[0].to_json())
    model = parse(f"--config={tmp_path}/config.json", "--config.model.emb_dim=32")[0].model
    assert (model.qkv_dim, model.value_dim) == (64, 32)


def test_a_saved_config_takes_no_fewer_steps_than_its_schedule_needs(tmp_path):
    (tmp_path / "config.json").write_text(parse(DEMO, "--config.optimizer.schedule=cosine")[0].to_json())
    with pytest.raises(UserError, match="the cosine schedule falls from its peak to 0"):
        parse(f"--config={tmp_path}/config.json", "--config.train.num_steps=20")


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--workdir=no_such_folder"], "got 0; no_such_folder holds no run to resume"),
        (["--workdir=x", "--config=no_such_folder/config.json"], "no_such_folder/config.json"),
        ([DEMO, "--workdir=x", "--train.num_steps=10"], r"did you mean --config\.train\.num_steps=10\?"),
        ([DEMO, "--workdir=x", "--num_steps=10"], r"did you mean --config\.train\.num_steps\?"),
    ],
)
def test_a_config_that_cannot_be_read_and_a_flag_without_its_prefix_are_refused(flags, match):
    parser = command_line.config_parser("train.py", "", "--workdir=DIR")
    parser.add_argument("--workdir")
    with pytest.raises(UserError, match=match):
        command_line.parse_with_config(parser, ["train.py", *flags])


def test_malloc_is_set_once_and_keeps_memory_where_only_a_cpu_computes(monkeypatch):
    program = (
        "import os\nfrom transformer import command_line\ncommand_line.reexec_with_malloc_settings()\n"
        "print(os.environ['GLIBC_TUNABLES'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    settings = run("-c", program, env={**environment, "JAX_PLATFORMS": "cpu"}).stdout
    assert settings == f"glibc.malloc.hugetlb=1:{command_line.KEEP_MEMORY}\n"
    assert run("-c", program, env={**environment, "GLIBC_TUNABLES": "mine"}).stdout == "mine\n"
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ["cuda13"] * (group == "jax_plugins"))
    assert command_line._may_have_accelerator()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not command_line._may_have_accelerator()
