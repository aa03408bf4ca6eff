"""The measuring commands: that they measure what they say, not what comes out."""

import json
import statistics
import sys
from xml.etree import ElementTree

import pytest

from benchmarks import ab_compare, attention_memory, checkpoint_hashing, decoding, flag_lists, plots, recurrence_speed
from tests.commands.test_translate import save
from tests.conftest import ROOT
from tests.decoding.test_translator import LINES
from tests.helpers.commands import run
from transformer.checkpoints import manifest
from transformer.data import subword_nmt, tokenizer
from transformer.export import verify
from transformer.planning.hardware import parse_topology
from transformer.runtime.errors import UserError


def test_pairs_quote_the_median_of_ratios(capsys, monkeypatch):
    figures = iter([30, 10, 90, 10, 40, 10])
    monkeypatch.setattr(ab_compare, "figure", lambda command, key: next(figures))
    ab_compare.main(["ab_compare", "--ours=a", "--other=b", "--key=speed", "--pairs=3"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row == {"key": "speed", "ours": [30, 90, 40], "other": [10, 10, 10], "median_ratio": 4.0}


def test_a_figure_is_read_from_the_last_line(tmp_path):
    script = tmp_path / "speak.py"
    script.write_text("print('warming up')\nprint('{\"speed\": 12.5}')\n")
    assert ab_compare.figure(f"{sys.executable} {script}", "speed") == 12.5


@pytest.mark.parametrize("body", ["print('no json')", "print('{}')", "raise SystemExit(3)", ""])
def test_a_command_without_a_figure_is_refused(tmp_path, body):
    script = tmp_path / "speak.py"
    script.write_text(body)
    with pytest.raises(UserError, match="expected a JSON object"):
        ab_compare.figure(f"{sys.executable} {script}", "speed")


@pytest.mark.parametrize("command", ["there-is-no-such-program", "'no end", ""])
def test_a_command_that_cannot_be_run_is_refused(command):
    with pytest.raises(UserError, match="cannot be run"):
        ab_compare.figure(command, "speed")


def test_a_figure_that_cannot_be_compared_is_refused(tmp_path):
    script = tmp_path / "speak.py"
    script.write_text("print('{\"speed\": 0}')")
    with pytest.raises(UserError, match="expected speed above 0, got 0"):
        ab_compare.figure(f"{sys.executable} {script}", "speed")


@pytest.mark.parametrize("lengths", ["512", "512,512", "a,b", "512,", "0,512", "-1,512"])
def test_lengths_without_growth_are_refused(lengths):
    with pytest.raises(UserError, match="at least two different numbers"):
        flag_lists.distinct_numbers("--lengths", lengths, least=2)


@pytest.mark.slow
def test_the_compiled_step_grows_with_the_length_by_blocks_and_with_its_square_without():
    used = {
        (path, length): attention_memory.temporary_mb(path, length, parse_topology("cpu:8"))
        for path, length in [
            ("plain", 1024),
            ("plain", 4096),
            ("blockwise", 4096),
            ("blockwise", 16384),
            ("ring:4", 16384),
        ]
    }
    assert attention_memory.exponent([1024, 4096], [used["plain", 1024], used["plain", 4096]]) > 1.9
    assert attention_memory.exponent([4096, 16384], [used["blockwise", 4096], used["blockwise", 16384]]) < 1.1
    assert used["blockwise", 4096] < used["plain", 4096] / 20
    assert used["ring:4", 16384] == pytest.approx(used["blockwise", 4096], rel=0.3)


@pytest.mark.tpu
def test_the_compiled_step_of_a_tpu_grows_with_the_length_by_splash():
    topology = parse_topology("v5e:2x2")
    used = [attention_memory.temporary_mb("splash", length, topology) for length in (1024, 4096)]
    assert attention_memory.exponent([1024, 4096], used) < 1.1


@pytest.mark.parametrize("path", ["ring:0", "ring:two", "plain:2", "fast"])
def test_an_unknown_attention_implementation_is_refused(path):
    with pytest.raises(UserError, match=r"ring:2, say|expected one of auto, plain"):
        attention_memory.small_model(path)


def test_the_plot_has_a_line_for_each_implementation_with_its_exponent_as_slope(tmp_path):
    sizes = {"plain": [1.0, 100.0, 10_000.0], "blockwise": [1.0, 10.0, 100.0]}  # at ticks, so little is rounded
    lines = {name: zip((1, 10, 100), row, strict=True) for name, row in sizes.items()}
    plots.write(tmp_path / "plot.svg", "t", "x", lines)
    root = ElementTree.fromstring((tmp_path / "plot.svg").read_text())
    rises = []
    for line in root.iter("{http://www.w3.org/2000/svg}polyline"):
        ys = [float(point.split(",")[1]) for point in line.get("points").split()]
        rises.append([ys[0] - ys[1], ys[1] - ys[2]])
    assert rises[0] == pytest.approx([2 * rise for rise in rises[1]], abs=0.2)


@pytest.mark.slow
def test_a_save_is_held_against_one_without_digests(capsys, monkeypatch):
    digested = []
    sha256 = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: (digested.append(path.name), sha256(path))[1])
    checkpoint_hashing.main(["checkpoint_hashing", "--megabytes=60", "--rounds=2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["megabytes"] == pytest.approx(50, abs=11)
    assert result["share"] == 1 - result["without_s"] / result["save_s"]
    assert result["pause_share"] == result["pause_s"] / result["save_s"]
    assert digested.count("config.json") == 4  # of six saves

    with pytest.raises(SystemExit):
        checkpoint_hashing.main(["checkpoint_hashing", "--rounds=0"])


def test_a_python_without_torch_is_refused(monkeypatch):
    monkeypatch.setattr(recurrence_speed, "TORCH", "import there_is_no_torch")
    with pytest.raises(UserError, match="expected a Python that has PyTorch, got: ModuleNotFoundError"):
        recurrence_speed.torch_ms(sys.executable, [2, 2, 2])


def test_both_layers_are_timed_in_turn(monkeypatch, capsys):
    monkeypatch.setattr(recurrence_speed, "torch_ms", lambda python, sizes: 1000.0)
    recurrence_speed.main(["recurrence_speed", "--batch=2", "--length=3", "--width=4"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["ours_ms"]) == len(result["torch_ms"]) == 3
    assert result["speed"] == round(statistics.median(1000.0 / ours for ours in result["ours_ms"]), 2) > 0


SOURCES = {path.stem: path.read_text() for path in sorted((ROOT / "benchmarks").glob("*.py"))}
COMMANDS = [name for name, text in SOURCES.items() if "__main__" in text and "\nimport torch\n" not in text]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name):
    assert f"benchmarks.{name}" in run("-m", f"benchmarks.{name}", "--help").stdout.decode()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ours", "ctranslate2"])
def test_decoding_is_measured_in_tokens_of_the_translations(engine, tmp_path, capsys):
    if engine == "ctranslate2":
        pytest.importorskip("ctranslate2", reason="the export extra is not installed")
    codes = subword_nmt.build_vocabulary((("c", "a"), ("o", "g</w>")), LINES)
    words = tokenizer.train(LINES, 300, "bpe") if engine == "ours" else tokenizer.Tokenizer(codes)
    workdir = save(tmp_path / "run", words)
    source = tmp_path / "source"
    source.write_text("a cat\n\na dog\n")
    decoding.main(
        [
            "decoding",
            f"--workdir={workdir}",
            f"--source={source}",
            f"--engine={engine}",
            "--repeats=2",
            "--decode.beam_size=3",
        ]
    )
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["engine"], row["sentences"], row["decode"], len(row["seconds"])) == (engine, 3, {"beam_size": 3}, 2)
    assert row["output_tokens"] >= 3
    assert row["output_tokens_per_s"] == pytest.approx(row["output_tokens"] / (sum(row["seconds"]) / 2), rel=0.3)


def test_decoding_by_a_package_that_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "NEEDS", {"ctranslate2": "no_such_package"})
    with pytest.raises(UserError, match="--engine=ctranslate2 needs the package no_such_package: pip install"):
        decoding.main(["decoding", f"--workdir={tmp_path}", "--source=x", "--engine=ctranslate2"])
