"""Nothing is read back from an accelerator but by `jax.device_get`: neither while it trains nor by a compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.attention.test_fused import stand_in_for_cudnn
from tests.conftest import slow, small_config
from tests.helpers import transfers
from tests.training.test_train_step import V, draw_batch
from tests.training.test_trainer import config_of, data  # noqa: F401 (a fixture)
from train import train as fit
from transformer.attention import fused
from transformer.checkpoints import loading
from transformer.config import MeshConfig
from transformer.decoding.alignment import Aligner
from transformer.decoding.translator import Translator
from transformer.distributed import multihost, sharding
from transformer.distributed.mesh import make_mesh, warm_up_collectives
from transformer.export import verify
from transformer.models import registry
from transformer.models.flops import TrainingCost
from transformer.training import train_step, trainer

READS = {
    "_value": lambda x: x._value,
    "float": float,
    "bool": bool,
    "asarray": lambda x: np.asarray(x),
    "array": lambda x: np.array(x),
}


@pytest.fixture
def guarded(fresh_programs):
    with transfers.guarded_reads():
        yield


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_guard_refuses_implicit_reads_alone(guarded, read):
    x = jax.device_put(np.float32(1))
    assert read(x) == 1
    with jax.transfer_guard("disallow"):
        with pytest.raises(RuntimeError, match="Disallowed device-to-host transfer"):
            read(x)
        assert jax.device_get(jax.device_put(np.float32(1))) == 1
    assert read(x) == 1


def test_a_constant_is_found_however_deep_it_is():
    constant = jnp.arange(3.0)

    @jax.custom_vjp
    def inner(x):
        return x + constant

    inner.defvjp(lambda x: (inner(x), None), lambda _, grad: (grad,))
    uses = {
        "top": lambda x: x * constant,
        "jit": jax.jit(lambda x: x * constant),
        "scan": lambda x: jax.lax.scan(lambda x, _: (x * constant, None), x, length=2)[0],
        "cond": lambda x: jax.lax.cond(x[0] > 0, lambda: x * constant, lambda: x),
        "custom_vjp": jax.jit(jax.checkpoint(inner)),
    }
    for name, function in uses.items():
        jaxpr = jax.jit(function).trace(jax.ShapeDtypeStruct((3,), jnp.float32)).jaxpr
        assert [value is constant for value in transfers.array_constants(jaxpr)] == [True], name
    assert not transfers.array_constants(jax.jit(lambda x: x * np.arange(3.0, dtype=np.float32)).trace(constant).jaxpr)


# Every family with each remat and each batching that it has; with each family, any EMA decay and accumulation steps.
ALL = [
    ("attention", "none", "bucket", 0.9, 2, "adam"),
    slow("attention", "dots", "pack", 0.0, 2, "adam"),
    slow("attention", "full", "bucket", 0.9, 1, "adam"),
    slow("recurrent", "none", "bucket", 0.9, 2, "adam"),
    slow("recurrent", "none", "pack", 0.0, 1, "adam"),
    slow("convolutional", "none", "pack", 0.9, 2, "adam"),
    slow("convolutional", "dots", "bucket", 0.0, 1, "adam"),
    slow("convolutional", "full", "pack", 0.9, 1, "adam"),
    slow("attention", "none", "bucket", 0.0, 1, "muon"),
    slow("attention", "none", "bucket", 0.0, 1, "schedule_free_adamw"),
]


@pytest.mark.parametrize(("family", "remat", "batching", "ema", "parts", "optimizer"), ALL)
def test_training_reads_nothing_but_metrics(guarded, family, remat, batching, ema, parts, optimizer):
    sizes = {"num_heads": 2, "mlp_dim": 32} if family == "attention" else {"num_heads": 8, "mlp_dim": 2048}
    config = small_config(
        model={"family": family, "num_layers": 1, "remat": remat, **sizes},
        data={"batching": batching, "num_buckets": 8},
        optimizer={} if optimizer == "adam" else {"name": optimizer, "schedule": "constant"},
        train={"ema_decay": ema, "accumulation_steps": parts},
    )
    mesh = make_mesh(config.mesh)
    model = registry.ModelDef(config.model, V)
    update, state = train_step.make_train_step(model, config, mesh), train_step.init_state(model, config, mesh)
    place = functools.partial(sharding.shard_batch, mesh, num_micro_batches=parts)
    updates = trainer.StepPipeline(update, state, map(draw_batch, [8] * 3), place, lambda _: 0.0, TrainingCost(), 1)
    for step in (1, 2, 3):
        updates.dispatch(step)
    updates.flush()
    assert int(jax.device_get(updates.state.step)) == updates.meter.updates == 3


@pytest.mark.slow
def test_no_program_of_the_package_has_an_array_among_its_constants(
    root,
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
    fresh_programs,
):
    """Such an array lies on the device, and lowering reads it back; nor do the programs' calls read anything."""
    with transfers.recorded_jits() as result:
        train = {"num_steps": 2, "eval_every_steps": 2, "checkpoint_every_steps": 1, "ema_decay": 0.5}
        fit(config_of(data, train=train), tmp_path / "run")
        warm = {"num_steps": 1, "init_from": str(tmp_path / "run"), "eval_every_steps": 1}
        fit(config_of(data, train=warm), tmp_path / "warm")
        loaded = loading.load_checkpoint(tmp_path / "run", "average:2")
        (tmp_path / "exported").mkdir()
        verify.write(loaded, tmp_path / "exported", "jax")
        for fields in ({"beam_size": 2, "coverage_penalty": 0.1}, {"method": "sample"}, {"method": "mbr"}):
            decode = dataclasses.replace(loaded.config.decode, **fields)
            Translator([loaded.model], loaded.tokenizer, decode, loaded.mesh).translate([loaded.params], ["red cat"])
        aligner = Aligner(loaded.model, loaded.tokenizer, loaded.config.decode, loaded.mesh)
        list(aligner.attention(loaded.params, ["red cat"], ["tac der"]))
        result["transformer.training.train_step.all_finite"] = transfers.array_constants(
            train_step.all_finite.trace(loaded.params).jaxpr  # was compiled when the module was read
        )
        with monkeypatch.context() as one_device:
            one_device.setattr(jax, "local_devices", lambda: [jax.devices()[0]])
            stand_in_for_cudnn(one_device, 1.0)
            assert fused.try_cudnn(8) == ""
        mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
        with monkeypatch.context() as several:
            several.setattr(
                sharding, "make_all_gather", sharding.make_all_gather.__wrapped__
            )  # another test may have made it
            several.setattr(multihost, "process_count", lambda: 2)
            several.setattr(multihost, "barrier", lambda name: None)
            warm_up_collectives(mesh)
            sharding.allgather_to_devices(mesh, np.zeros(1, np.int32))
            several.setattr(jax, "process_count", lambda: 2)
            sharding.replicate(loaded.mesh, loaded.params)
    assert set(result) == transfers.jit_uses(root), "a use of jax.jit that this test does not run"
    assert not {where: values for where, values in result.items() if values}
