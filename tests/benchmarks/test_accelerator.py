"""The measuring command for accelerators: its phases at toy sizes on the CPU, and what becomes of one that fails."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest

from benchmarks import accelerator, findings, kernel_times
from benchmarks import accelerator_phases as phases
from benchmarks.kernel_times import KernelTime
from tests.conftest import ROOT
from tests.helpers.processes import environment, write_data
from transformer.data import input_pipeline
from transformer.data.input_pipeline import TokenIds
from transformer.runtime.errors import UserError
from transformer.training import train_step


def options(tmp_path, **more):
    given = {"only": "", "skip": "", "data": None, "smoke": True, "torch": sys.executable}
    return argparse.Namespace(**given, output=str(tmp_path / "out"), scratch=str(tmp_path / "scratch"), **more)


def run(tmp_path, *flags):
    """The command as people run it."""
    folders = [f"--output={tmp_path}/out", f"--scratch={tmp_path}/scratch"]
    command = [sys.executable, "-m", "benchmarks.accelerator", *folders, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(1), timeout=900)


@pytest.mark.slow
def test_one_phase_of_each_kind_is_measured(tmp_path):
    data = write_data(tmp_path / "data")
    for code in ("en", "de"):
        shutil.copy(data / f"test.{code}", data / f"test_2016_flickr.{code}")
    done = run(tmp_path, "--smoke", f"--data={data}")
    assert done.returncode == 0, done.stderr + (tmp_path / "out" / "log.txt").read_text()
    results = json.loads((tmp_path / "out" / "results.smoke.json").read_text())
    assert results.keys() == json.loads(done.stdout).keys()
    assert {accelerator.PHASES[name].run for name in results} == {phase.run for phase in accelerator.PHASES.values()}
    peer = results.pop("torch_big")
    assert {row["status"] for row in results.values()} == {"done"}
    assert peer["status"] == ("skipped" if "skipped" in peer else "done")
    assert results["probe"]["matmul_tflops"] > 0 < results["probe"]["products_tflops"]["64x32x48"]
    assert results["correct"]["update_under_transfer_guard"] == "passed"
    assert all(one["worst_relative_error"] < 0.05 for one in results["attention"]["attention"].values())
    row = results["base"]
    assert row["slots_per_s"] == pytest.approx(row["rows"] * 8 / row["step_ms"] * 1000, rel=0.01)
    assert 0.7 < row["target_tokens_per_s"] / row["slots_per_s"] < 1.05
    assert row["mfu_of_measured"] == pytest.approx(row["tflops"] / results["probe"]["matmul_tflops"], rel=0.05)
    assert row["profile"]["kernels"] > 0 < row["gb_moved"]
    assert json.loads((tmp_path / "out" / "kernels.json").read_text()).keys() == {"base", "beam_search"}
    assert results["multi30k"]["scores"]["steps"] == [6, 8]
    assert len(results["families"]["training"]) == 3
    again = run(tmp_path, "--smoke", f"--data={data}", "--budget=5")
    assert again.returncode == 0, again.stderr
    assert again.stderr.startswith("done before: probe, correct, attention, base, ")
    assert json.loads(again.stdout) == json.loads(done.stdout)


def test_a_phase_over_its_time_limit_is_ended_and_keeps_its_results(tmp_path):
    args = options(tmp_path)
    path = accelerator.scratch_path(args, "probe")
    path.parent.mkdir()
    with (tmp_path / "log").open("ab") as log:
        rows = accelerator.run_phase("probe", args, ["--smoke"], time.monotonic() + 0.1, log)
        assert next(rows)["status"] == "running"
        path.write_text('{"matmul_tflops": 7}')
        *_, last = rows
    assert last["status"] == "ended after 0 s"
    assert last["matmul_tflops"] == 7


@pytest.mark.slow
def test_a_phase_that_fails_is_named_and_costs_the_others_nothing(tmp_path):
    done = run(tmp_path, "--smoke", f"--data={tmp_path}/none", "--only=multi30k,torch_base", "--torch=false")
    assert done.returncode == 2
    assert "not done: multi30k; see" in done.stderr
    brief = json.loads(done.stdout)
    assert (brief["multi30k"]["status"], brief["torch_base"]["status"]) == ("failed, exit code 1", "skipped")
    assert "CalledProcessError" in (tmp_path / "out" / "log.txt").read_text()


def test_toy_figures_are_not_taken_for_measurements(tmp_path):
    args = options(tmp_path)
    toy = accelerator.results_path(args)
    args.smoke = False
    assert accelerator.results_path(args) != toy


def test_a_phase_without_time_does_not_begin(tmp_path):
    args = options(tmp_path)
    args.smoke = False
    (row,) = accelerator.run_phase("probe", args, [], time.monotonic() + 19, None)
    assert row["status"].startswith("not begun: 1")


def test_phases_are_chosen_by_name(tmp_path, capsys):
    args = options(tmp_path)
    assert accelerator.chosen(args) == [
        *("probe", "correct", "attention", "base", "torch_big", "beam_search", "families")
    ]
    assert "multi30k is left out: it needs --data=FOLDER" in capsys.readouterr().err
    args.only, args.skip = "big,probe", "probe"
    assert accelerator.chosen(args) == ["big"]
    args.skip = "warp"
    with pytest.raises(UserError, match=r"expected phases out of probe, .*, got 'warp'"):
        accelerator.chosen(args)
    accelerator.main(["accelerator", "--list"])
    assert capsys.readouterr().out.count(" s at least") == len(accelerator.PHASES)


def test_the_batch_of_a_training_step_is_of_the_width_that_is_asked_for():
    config = phases.config_of("en_de_base", {"data.num_buckets": 1, "data.length_multiple": 1, "data.max_length": 40})
    assert config.model.dtype == "bfloat16"
    ids = TokenIds(phases.random_ids(config, 2496, 37), phases.random_ids(config, 2496, 40))
    (bucket,) = input_pipeline.make_batch_schedule(config, ids).buckets
    assert bucket == (37, 40, 624)
    assert bucket.rows * bucket.target == phases.TOKENS


def test_shares_are_of_the_data_sheet_and_of_what_was_measured(tmp_path):
    result = findings.Findings("x", tmp_path / "x.json", options(tmp_path), ceiling=800e12)
    assert phases.shares(result, 400e12, "NVIDIA H200", 1) == {"tflops": 400, "mfu": 0.4044, "mfu_of_measured": 0.5}
    assert phases.shares(result, 400e12, "NVIDIA H200", 2) == {"tflops": 400, "mfu": 0.2022, "mfu_of_measured": 0.25}
    result.ceiling = 0
    assert phases.shares(result, 1e12, "cpu", 1) == {"tflops": 1}


@pytest.mark.slow
def test_the_peer_in_torch_has_the_params_of_our_model(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is no dependency")
    result = findings.Findings("torch_base", tmp_path / "x.json", options(tmp_path), ceiling=0)
    phases.torch_training(result, "en_de_base")
    config = phases.config_of("en_de_base", phases.TOY)
    assert result.row["params"] == train_step.ModelDef(config.model, config.data.vocab_size).num_params()


def test_kernels_are_summed_by_kind():
    times = [
        KernelTime("nvjet_tst_128x256", 2.0, 4),
        KernelTime("loop_add_fusion", 1.5, 3),
        KernelTime("cutlass_gemm", 1.0, 1),
        KernelTime("strange", 0.5, 1),
    ]
    assert kernel_times.by_kind(times) == {"product": 3.0, "elementwise": 1.5, "other": 0.5}
    summary = kernel_times.summary(times, most=1)
    assert (summary["busy_ms"], summary["kernels"], summary["top"]) == (5.0, 9, [["nvjet_tst_128x256", 2.0, 4]])


@pytest.mark.parametrize("name", ["Stream #14(Compute)", "XLA Ops"])
def test_only_kernels_of_a_device_are_counted(monkeypatch, tmp_path, name):
    def line(name, event):
        return SimpleNamespace(name=name, events=[SimpleNamespace(name=event, duration_ns=2e6)])

    lines = [line(name, "gemm"), *(line(other, "all of it") for other in ("Steps", "XLA Modules"))]
    profile = SimpleNamespace(planes=[SimpleNamespace(name="/device:X:0", lines=lines)])
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda path: profile)
    (tmp_path / "a.xplane.pb").write_bytes(b"")
    assert kernel_times.read(tmp_path, 1) == [KernelTime("gemm", 2.0, 1.0)]
