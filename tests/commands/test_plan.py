"""The plan of the real training step: keys, figures, and what it says of what cannot be."""

import functools
import json
import os
import subprocess
import sys

import jax
import pytest
from flax import nnx

from tests.conftest import ROOT, small_config
from tests.helpers.commands import run
from transformer import plan
from transformer.distributed.mesh import make_mesh
from transformer.models import flops, registry
from transformer.planning import aot
from transformer.planning.hardware import parse_topology
from transformer.runtime.errors import UserError

KEYS = ["topology", "chips", "bytes_per_chip", "bytes_available", "fits", "flops_per_step", "collectives"]
SMALL = [
    *("model.num_layers=1", "model.emb_dim=16", "model.mlp_dim=16", "model.num_heads=2", "data.vocab_size=300"),
    *("data.max_length=16", "train.batch_tokens=1024"),
]


def command(*flags, config="configs/demo.py", fields=SMALL, **environment):
    fields = [f"--config.{field}" for field in fields]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | environment
    return subprocess.run(
        [sys.executable, "-m", "transformer.plan", f"--config={config}", *fields, *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def planned(topology="cpu:8", *, find_largest=False, **sections):
    config = small_config(**{"mesh": {"data": -1}, "model": {"num_layers": 1}, **sections})
    return plan.plan(config, parse_topology(topology), config.data.max_length, 0.0, find_largest=find_largest)


@functools.cache
def plain():
    """Of eight devices that share the rows, 32 of 32 tokens."""
    return planned(train={"batch_tokens": 1024})


def test_the_command_prints_a_table_and_its_last_line_is_json():
    """Of a config that leaves open where its text is: none is read."""
    result = command("--topology=cpu:4", "--json", "--scaling", config="configs/text.py")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert {*KEYS, "tokens_per_s_bound"} <= row.keys()
    assert (row["topology"], row["chips"], row["fits"]) == ("cpu:4", 4, True)
    assert "memory of a chip" in result.stdout
    assert sum(line.startswith("| ") for line in result.stdout.splitlines()) == 1 + 2 * 8
    first = row["scaling"][0]
    assert (len(row["scaling"]), first["chips"], first["parameters"]) == (2 * 8, 8, "data-parallel")
    assert f"| {first['communication_ms']:.1f} | {first['efficiency_overlapped']:.1%} |" in result.stdout


@pytest.mark.slow
def test_flops_are_those_of_the_closed_form():
    row = plain()
    assert row["rows"] == 32
    expected = flops.training_flops(small_config(model={"num_layers": 1}).model, 300, 32, 32, 32)
    assert row["flops_per_step"] == row["flops_closed_form"] == expected


@pytest.mark.slow
def test_a_length_that_the_mesh_does_not_divide_is_padded_as_in_training():
    row = planned(mesh={"data": 1, "sequence": 8}, data={"max_length": 20}, train={"batch_tokens": 40})
    assert (row["rows"], row["length"]) == (2, 20)
    assert row["flops_closed_form"] == flops.training_flops(small_config(model={"num_layers": 1}).model, 300, 2, 24, 24)
    assert row["flops_per_step"] > row["flops_closed_form"]  # a ring computes logits again in the backward pass


@pytest.mark.slow
def test_consistency_computes_each_row_twice():
    twice = planned(train={"batch_tokens": 1024, "consistency": "simcut"})
    assert twice["flops_per_step"] == twice["flops_closed_form"] == 2 * plain()["flops_per_step"]


@pytest.mark.slow
def test_the_parts_of_a_step_are_a_loop_that_is_counted_by_its_trips():
    row = planned(train={"batch_tokens": 1024, "accumulation_steps": 4})
    assert row["flops_per_step"] == row["flops_closed_form"]


@pytest.mark.slow
def test_arguments_are_the_state_and_the_batch_and_results_take_their_place():
    row = planned(train={"batch_tokens": 1024, "ema_decay": 0.9})
    params = registry.ModelDef(small_config(model={"num_layers": 1}).model, 300).num_params()
    batch = 2 * 4 * 32 * 32 // 8
    assert 0 <= row["arguments_bytes"] - (4 * 4 * params + batch) < 100
    assert row["outputs_bytes"] < 10_000
    assert row["bytes_per_chip"] >= row["arguments_bytes"] + row["temporaries_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "copies"), [("muon", 2), ("schedule_free_adamw", 3)])
def test_the_state_of_other_optimizers_is_counted(name, copies):
    """Of Muon's matrices one moment; params, z and second moment of Schedule-Free; embeddings and vectors as Adam's."""
    row = planned(train={"batch_tokens": 1024}, optimizer={"name": name, "schedule": "constant"})
    params = nnx.to_pure_dict(registry.ModelDef(small_config(model={"num_layers": 1}).model, 300).abstract_params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    by_adam = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 1) + 300 * 16 if name == "muon" else 0
    batch = 2 * 4 * 32 * 32 // 8
    assert 0 <= row["arguments_bytes"] - (4 * (copies * size + by_adam) + batch) < 100


@pytest.mark.slow
def test_a_data_parallel_step_sends_its_gradients_and_nothing_else():
    row = plain()
    params = registry.ModelDef(small_config(model={"num_layers": 1}).model, 300).num_params()
    assert list(row["collectives"]) == ["all-reduce"]
    assert list(row["collectives"]["all-reduce"]["axes"]) == ["data"]
    # Embedding, its two uses and the logits may each send their own part of its gradient.
    assert 4 * params <= row["collectives"]["all-reduce"]["bytes"] < 4 * (params + 2 * 300 * 16) + 1024


@pytest.mark.slow
def test_one_device_sends_nothing():
    assert planned("cpu:1")["collectives"] == {}


@pytest.mark.slow
def test_rows_divide_over_the_chips_but_only_planned_tokens_count():
    row = planned(train={"batch_tokens": 96})
    assert row["rows"] == 8  # 3 rows of 32 tokens, over 8 chips
    for memory, speed in (("memory_ms", "tokens_per_s_as_compiled"), ("state_ms", "tokens_per_s_bound")):
        slowest = max(row["compute_ms"], row[memory], row["communication_ms"]) / 1000
        assert row[speed] == pytest.approx(96 / slowest, rel=0.05)
    assert row["state_ms"] <= row["memory_ms"]


@pytest.mark.slow
def test_the_largest_batch_that_fits_does_and_a_larger_one_does_not():
    topology = parse_topology("cpu:8")
    config = small_config(model={"num_layers": 1}, mesh={"data": -1}, train={"batch_tokens": 1024})
    at_first = plan.plan(config, topology, 32, 0.0, find_largest=False)
    tight = topology._replace(chip=topology.chip._replace(memory=2 * at_first["bytes_per_chip"]))
    row = plan.plan(config, tight, 32, 0.0, find_largest=True)
    assert row["fit_tokens_per_chip"] * 8 == row["fit_batch_tokens"] > 1024

    def needed(tokens):
        mesh = make_mesh(config.mesh, aot.topology_devices(tight))
        return aot.compile_step(config, mesh, tokens // 32, 32).needed

    actual = row["fit_batch_tokens"]
    assert needed(actual) <= tight.chip.memory < needed(max(actual + 256, int(1.05 * actual)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v9:4x4"], "unknown kind of chip 'v9'; known: v5e:NxN"),
        (["--topology=h100:16"], "at most 8 chips"),
        (["--topology=cpu:8", "--length=4096"], "expected at most config"),
        (["--topology=cpu:8", "--config.mesh.data=16"], "found only 8 devices"),
        (["--topology=cpu:8", "--config.mesh.fsdp=2", "--scaling"], "expected mesh.data alone, got mesh.fsdp = 2"),
    ],
)
def test_what_cannot_be_is_one_message(flags, message, root, monkeypatch):
    monkeypatch.chdir(root)
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):  # else the command sets them, also for later tests
        monkeypatch.setenv(name, "3")
    fields = [f"--config.{field}" for field in SMALL]
    result = run("-m", "transformer.plan", "--config=configs/demo.py", *fields, *flags, code=2)
    assert message in result.stderr.decode()


@pytest.mark.slow
def test_too_few_simulated_devices_of_xla_flags_are_named():
    result = command("--topology=cpu:8", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert result.returncode == 2
    assert "expected 8 simulated devices, JAX has 4; raise --xla_force_host_platform_device_count in XLA_FLAGS" in (
        result.stderr
    )


def test_mistakes_are_reported_before_jax_is_imported():
    program = "import sys; from transformer import plan\n"
    program += "try: plan.main(['plan', '--config=configs/demo.py', '--topology=v9:1'])\n"
    program += "except Exception as error: print(type(error).__name__, 'jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "UserError False\n"


def test_without_the_tpu_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"TPU compiler: run `make plan`, or pip install 'jax\[tpu\]=="):
        aot.topology_devices(parse_topology("v5e:4x4"))
    with pytest.raises(UserError, match=r"GPU compiler: pip install 'jax\[cuda13\]=="):
        aot.topology_devices(parse_topology("h100:8"))


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.48G) "
            "exceeds available HBM (15.75G).",
            33.48,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (3.42T) "
            "exceeds available HBM (15.75G).",
            3.42 * 1024,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.",
            20.5,
        ),
    ],
)
def test_what_a_program_too_large_would_need_is_read_from_the_compiler_s_message(message, gib):
    assert aot.required_bytes(message) == int(gib * 2**30)


def test_other_errors_of_the_compiler_stay_errors():
    with pytest.raises(RuntimeError, match="INTERNAL"):
        aot.required_bytes("INTERNAL: something else")


def test_a_program_too_large_has_a_row_all_the_same(monkeypatch):
    monkeypatch.setattr(aot, "compile_step", lambda *_: aot.Compiled(0, 0, 0, 0, 0, 2**40, ""))
    row = planned(find_largest=True)
    assert (row["fits"], row["bytes_per_chip"], row["tokens_per_s_bound"]) == (False, 2**40, None)
    assert [name for name in row if name.endswith("_bytes")] == []  # none was measured
    memory, largest = plan.format_report(row)[1:]
    assert memory.endswith(": does not fit")
    assert largest == "  largest that fits  none: the smallest batch does not fit"
    assert "too much" in "\n".join(plan.summary_table([row, row]))
    row["scaling"] = plan.scaling(small_config(), parse_topology("cpu:8"), row)
    assert "too large to compile" in plan.scaling_table(parse_topology("cpu:8"), row)[0]


@pytest.mark.tpu
def test_a_tpu_program_has_about_the_closed_form_s_flops_and_sends_gradients_alone():
    result = command("--topology=v5e:2x2,v6e:2x2", "--json")
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines()[-2:]:
        row = json.loads(line)
        assert row["fits"]
        assert row["flops_per_step"] == pytest.approx(row["flops_closed_form"], rel=0.02)
        assert list(row["collectives"]) == ["all-reduce"]


@pytest.mark.tpu
def test_the_tpu_compiler_says_how_much_too_large_a_program_is():
    """2,000 rows of 256 need 16.4 GiB a chip: a little more than there is."""
    model = {"num_layers": 1, "emb_dim": 128, "mlp_dim": 256}
    config = small_config(model=model, data={"vocab_size": 32000, "max_length": 256}, mesh={"data": -1})
    topology = parse_topology("v5e:2x2")
    mesh = make_mesh(config.mesh, aot.topology_devices(topology))
    actual = aot.compile_step(config, mesh, 2000, 256, -1.0)
    assert not actual.text
    assert topology.chip.memory < actual.needed < 1.2 * topology.chip.memory


@pytest.mark.gpu
def test_a_gpu_program_too_without_a_gpu():
    result = command("--topology=h100:8", "--json")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert row["flops_per_step"] == row["flops_closed_form"]
    assert list(row["collectives"]) == ["all-reduce"]


@pytest.mark.tpu
def test_an_arrangement_that_no_tpu_has_is_refused():
    result = command("--topology=v5e:3x3")
    assert result.returncode == 2
    assert "compiler refuses it" in result.stderr
