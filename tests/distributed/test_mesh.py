"""One config, any mesh: the same loss, gradients and updates; what each device stores, and what is sent."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import numpy as np
import optax
import pytest

from tests.conftest import small_config
from tests.training.test_train_step import draw_batch
from transformer.config import MeshConfig, OptimizerConfig
from transformer.data.batching import Batch
from transformer.data.tokenizer import EOS
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models import registry
from transformer.models.loss import cross_entropy
from transformer.planning import aot, hlo_cost
from transformer.planning.hardware import parse_topology
from transformer.planning.hlo import Program
from transformer.runtime.errors import UserError
from transformer.training import train_step

V = 40
AXES = ("data", "fsdp", "tensor", "sequence")
# One axis alone, and each pair of axes twice.
MESHES = [
    sizes for largest in (8, 2) for sizes in itertools.product((1, largest), repeat=len(AXES)) if math.prod(sizes) == 8
]
MODEL = {"num_layers": 1, "num_heads": 8, "emb_dim": 16, "mlp_dim": 16, "qkv_dim": 16, "value_dim": 16}
STEPS = 5


def config_of(sizes=(1, 1, 1, 1), train=(), **model):
    mesh = dict(zip(AXES, sizes, strict=True))
    return small_config(model={**MODEL, **model}, data={"vocab_size": V}, mesh=mesh, train=dict(train))


def batches():
    """Lengths that the sequence axis does not divide."""
    return [draw_batch(8, 7, 10, seed=seed) for seed in range(STEPS)]


def gradient_of(config):
    """(params, batch) → loss and gradients of its mean, with dropout, on a mesh."""
    mesh, model = make_mesh(config.mesh), registry.ModelDef(config.model, V)

    def objective(params, batch):
        with sharding.use_mesh(mesh):
            logits = model.bind(params)(*batch, jax.random.key(3), config.data.batching == "pack")
            sums = cross_entropy(logits, batch.target_BT, 0.1)
            return sums.smoothed_nll / sums.tokens

    params = registry.sharded_param_shapes(model, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    everywhere = sharding.replicated(mesh)
    return jax.jit(
        jax.value_and_grad(objective),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(everywhere, shardings),
    )


def losses_of(config):
    """The losses of some updates, and the optimizer's state after the first."""
    mesh, model = make_mesh(config.mesh), registry.ModelDef(config.model, V)
    state = train_step.init_state(model, config, mesh)
    update, losses, first = train_step.make_train_step(model, config, mesh), [], None
    for batch in batches():
        state, metrics = update(state, sharding.shard_batch(mesh, batch, config.train.accumulation_steps))
        losses.append(float(metrics.loss.nll / metrics.loss.tokens))
        first = first or jax.device_get(state.opt_state)
    return losses, first


def results(config):
    """Loss and gradients at the start, and the losses of some updates, all of one compiled program."""
    losses, state = losses_of(config)  # Adam's first moment, zero before, is then (1 - beta1) times the gradient
    return optax.tree.get(state, "mu"), losses


@functools.cache
def on_one_device():
    return results(config_of())


def check(sizes):
    (grads, losses), (wanted_grads, wanted_losses) = results(config_of(sizes)), on_one_device()
    np.testing.assert_allclose(losses[0], wanted_losses[0], rtol=1e-5)
    difference = jax.tree.map(np.subtract, grads, wanted_grads)
    assert optax.tree.norm(difference) < 1e-5 * optax.tree.norm(wanted_grads)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_of_8_trains_like_one_device(sizes):
    check(sizes)


@pytest.mark.slow
def test_fewer_devices_train_like_one_too():
    check((1, 2, 1, 2))


def test_every_axis_is_tried_alone_and_with_each_other():
    assert tuple(f.name for f in dataclasses.fields(MeshConfig)) == AXES
    tried = [{axis for axis, size in zip(AXES, sizes, strict=True) if size > 1} for sizes in MESHES]
    for two in itertools.combinations_with_replacement(AXES, 2):
        assert any(set(two) <= one for one in tried)
    assert [{axis} in tried for axis in AXES] == [True] * 4


WIDE = {"emb_dim": 64, "mlp_dim": 256, "qkv_dim": 64, "value_dim": 64}


def bytes_by_device(tree):
    """What each device stores of some arrays."""
    stored = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            stored[shard.device] = stored.get(shard.device, 0) + shard.data.nbytes
    return stored


@pytest.mark.slow
def test_fsdp_stores_an_eighth_on_each_device():
    """Params, both moments and the moving average, when made and after an update."""
    config = config_of((1, 8, 1, 1), {"ema_decay": 0.9}, **WIDE, scan_layers=True, num_layers=2)
    mesh, model = make_mesh(config.mesh), registry.ModelDef(config.model, V)
    state = train_step.init_state(model, config, mesh)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert whole > 4 * 4 * model.num_params()
    after, _ = train_step.make_train_step(model, config, mesh)(jax.tree.map(jax.numpy.copy, state), place(mesh))
    for made in (state, after):
        stored = bytes_by_device(made)
        assert len(stored) == 8
        assert max(stored.values()) <= whole / 8 + 0.02 * whole


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 2, 2)], ids=str)
def test_params_drawn_on_a_mesh_are_those_that_tests_share(sizes, fresh_programs):
    """Tests draw them once for each model, outside of the program that makes a state."""
    config = config_of(sizes, {"seed": 3})
    model = registry.ModelDef(config.model, V)
    drawn = train_step.init_state(model, config, make_mesh(config.mesh)).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), drawn, model.init(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "schedule_free_adamw"])
def test_other_optimizers_train_on_shards_like_on_one_device(name):
    """The losses of some updates, of which all but the first depend on the state."""
    optimizer = {"name": name, "schedule": "constant", "learning_rate": 0.01}
    losses = []
    for sizes in ((1, 1, 1, 1), (1, 4, 2, 1)):
        config = dataclasses.replace(config_of(sizes, num_layers=1), optimizer=OptimizerConfig(**optimizer))
        losses.append(losses_of(config)[0])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][0] != losses[0][-1]


def place(mesh):
    return sharding.shard_batch(mesh, batches()[0])


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def collectives(config):
    """(what, shape, bytes) of each array that devices exchange in a compiled update of a config."""
    mesh, model = make_mesh(config.mesh), registry.ModelDef(config.model, V)
    state = train_step.abstract_state(model, config, mesh)
    return exchanged(train_step.make_train_step(model, config, mesh).lower(state, place(mesh)).compile().as_text())


def exchanged(text):
    """The same of a compiled program."""
    result = []
    for shapes, what in COLLECTIVE.findall(text):
        for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes):
            shape = tuple(int(size) for size in dims.split(",") if size)
            width = 1 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8
            result.append((what, shape, width * math.prod(shape)))
    assert result
    return result


def param_sizes(config):
    """Numbers in each param, and in all params of one layer with the embedding."""
    params = registry.ModelDef(config.model, V).init(0)
    layer = sum(leaf.size for leaf in jax.tree.leaves(params["decoder"][0]))
    return {leaf.size for leaf in jax.tree.leaves(params)}, layer + params["embeddings"]["shared"]["table"].size


@pytest.mark.slow
def test_data_parallel_devices_exchange_gradients_and_nothing_else():
    config = config_of((8, 1, 1, 1), **WIDE)
    sizes, _ = param_sizes(config)
    large = [result for result in collectives(config) if result[2] > 1024]
    assert {what for what, _, _ in large} == {"all-reduce"}
    assert {math.prod(shape) for _, shape, _ in large} <= sizes


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_fsdp_devices_gather_params_and_exchange_gradients(scan):
    sizes, most = param_sizes(config_of(**WIDE))
    config = config_of((1, 8, 1, 1), **WIDE, num_layers=3, scan_layers=scan)
    large = [result for result in collectives(config) if result[2] > 1024]
    assert {what for what, _, _ in large} == {"all-gather", "all-reduce"}
    assert {math.prod(shape) for what, shape, _ in large} <= sizes
    gathers = [size for what, _, size in large if what == "all-gather"]
    assert max(gathers) <= 4 * most
    if not scan:  # where a layer's params are used, and again in its backward pass
        params = registry.ModelDef(config.model, V).init(0)
        matrices = [leaf for leaf in jax.tree.leaves((params["encoder"], params["decoder"])) if leaf.ndim > 1]
        assert len(gathers) >= 2 * len(matrices)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"scan_layers": True, "num_layers": 2},
        {"remat": "dots", "train": {"accumulation_steps": 2}},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_other_programs_run_on_a_mesh(fields):
    """Against the same program on one device."""
    losses = [results(config_of(sizes, **fields))[1] for sizes in ((1, 1, 1, 1), (1, 2, 2, 2))]
    np.testing.assert_allclose(*losses, rtol=1e-2 if "dtype" in fields else 1e-4)


@pytest.mark.slow
def test_packed_sentences_stay_separate_on_a_mesh():
    rng = np.random.default_rng(0)
    side = rng.integers(4, V, (8, 12)).astype(np.int32)
    side[:, [4, 7, 11]] = EOS
    grads = []
    for sizes in ((1, 1, 1, 1), (2, 1, 1, 4)):
        config = config_of(sizes)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, batching="pack"))
        mesh = make_mesh(config.mesh)
        params = train_step.init_state(registry.ModelDef(config.model, V), config, mesh).params
        grads.append(jax.device_get(gradient_of(config)(params, sharding.shard_batch(mesh, Batch(side, side)))))
    np.testing.assert_allclose(grads[1][0], grads[0][0], rtol=1e-5)
    difference = jax.tree.map(np.subtract, grads[1][1], grads[0][1])
    assert optax.tree.norm(difference) < 1e-5 * optax.tree.norm(grads[0][1])


@pytest.mark.tpu
def test_fsdp_on_tpus_scatters_the_sums_of_gradients():
    """Slices of 128 numbers, a row of the chip's registers: sums of narrower ones may reach every chip whole."""
    fields = {"num_layers": 1, "emb_dim": 512, "num_heads": 8, "mlp_dim": 512}
    config = small_config(model=fields, data={"vocab_size": 320}, mesh={"data": 1, "fsdp": 4})
    mesh = make_mesh(config.mesh, aot.topology_devices(parse_topology("v5e:2x2")))
    text = aot.compile_step(config, mesh, 16, 32, -1.0).text
    leaves = jax.tree.leaves(registry.ModelDef(config.model, 320).abstract_params)
    matrices = sum(4 * leaf.size for leaf in leaves if leaf.ndim > 1)
    vectors = sum(4 * leaf.size for leaf in leaves if leaf.ndim == 1)
    sent = {one.kind: one.bytes for one in hlo_cost.collectives(Program(text), dict(mesh.shape))}
    assert sent.keys() <= {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    assert matrices - 4 * 320 * 512 <= sent["reduce-scatter"] <= matrices
    assert sent["all-reduce"] <= vectors + 1024
    # The gradient of looked-up embeddings: states change places, and each chip then adds up its part of the width.
    assert sent.get("all-to-all", 0) <= 2 * 4 * 16 * 32 * 512 // 4
    gathers = [size for what, _, size in exchanged(text) if what == "all-gather"]
    layer = sum(4 * leaf.size for leaf in jax.tree.leaves(registry.ModelDef(config.model, 320).init(0)["decoder"][0]))
    assert max(gathers) <= layer + 4 * 320 * 512


def test_one_host_of_a_tpu_slice_alone_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="JAX finds the devices of 4 processes, and this command runs in 1: "):
        make_mesh(MeshConfig())
