"""What the devices do: golden numbers, uneven rows, meshes, donation, resume, no recompilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import slow, small_config
from tests.helpers.compilation import CompileCounter
from transformer.config import MeshConfig
from transformer.data.batching import Batch
from transformer.data.tokenizer import EOS, PAD
from transformer.distributed import platform as platforms
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.evaluation import evaluator
from transformer.models import registry
from transformer.models.loss import cross_entropy
from transformer.training import train_step
from transformer.training.optimizer import make_schedule

V = 40


def draw_batch(rows=8, source=6, target=7, seed=0) -> Batch:
    """Rows of uneven lengths."""
    rng = np.random.default_rng(seed)

    def side(width):
        ids = rng.integers(4, V, (rows, width)).astype(np.int32)
        for row, length in enumerate(rng.integers(2, width + 1, rows)):
            ids[row, length - 1] = EOS
            ids[row, length:] = PAD
        return ids

    return Batch(side(source), side(target))


@functools.cache
def setup(data: int = 1, **model):
    config = small_config(model={"num_layers": 1, "dropout_rate": 0.0, **model}, mesh={"data": data})
    mesh = make_mesh(config.mesh)
    built = registry.ModelDef(config.model, V)
    return config, mesh, built, train_step.make_train_step(built, config, mesh)


def run(num_steps=1, data=1, batches=None, **model):
    config, mesh, built, update = setup(data, **model)
    state = train_step.init_state(built, config, mesh)
    history = []
    for i in range(num_steps):
        batch = batches[i] if batches else draw_batch(seed=i)
        state, metrics = update(state, sharding.shard_batch(mesh, batch))
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


def test_golden_one_step():
    """Update these numbers when the model, its initialisation or the optimizer change on purpose, and say so."""
    state, (metrics,) = run()
    query = np.asarray(state.params["encoder"][0]["attention"]["query"])
    assert metrics.loss.tokens == 41
    np.testing.assert_allclose(metrics.loss.nll / metrics.loss.tokens, 4.063321, rtol=1e-4)
    np.testing.assert_allclose(metrics.grad_norm, 1.767131, rtol=1e-4)
    np.testing.assert_allclose(metrics.learning_rate, make_schedule(setup()[0])(0), rtol=1e-6)
    np.testing.assert_allclose(np.abs(query).sum(), 55.44878, rtol=1e-4)


def test_an_update_that_is_not_finite_changes_nothing():
    config, mesh, model, update = setup()
    state, _ = update(train_step.init_state(model, config, mesh), sharding.shard_batch(mesh, draw_batch()))
    poisoned = jax.tree.map(lambda leaf: leaf, state.params)
    poisoned["decoder"][0]["mlp"]["bias_in"] = poisoned["decoder"][0]["mlp"]["bias_in"].at[0].set(jnp.nan)
    state = state._replace(params=poisoned)
    before = jax.device_get(state)
    after, metrics = update(state, sharding.shard_batch(mesh, draw_batch(seed=1)))
    assert not np.isfinite(metrics.loss.objective)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)


def test_the_loss_falls_on_one_batch_and_goes_on_falling():
    batch = draw_batch()
    _, history = run(60, batches=[batch] * 60)
    losses = [m.loss.nll / m.loss.tokens for m in history]
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] < losses[30]


def test_operations_of_an_accelerator_give_the_same_updates(fresh_programs, monkeypatch):
    """Those of `platforms`: LayerNorm's residuals, the target's logits, dropout's masks."""

    def losses(platform):
        monkeypatch.setattr(platforms, "current", lambda: platform)
        config = small_config(model={"num_layers": 1, "dropout_rate": 0.1}, optimizer={"label_smoothing": 0.1})
        mesh = make_mesh(config.mesh)
        model = registry.ModelDef(config.model, V)
        update = train_step.make_train_step(model, config, mesh)
        state = train_step.init_state(model, config, mesh)
        lowered = update.lower(state, sharding.shard_batch(mesh, draw_batch())).as_text()
        history = []
        for seed in range(5):
            state, metrics = update(state, sharding.shard_batch(mesh, draw_batch(seed=seed)))
            history.append(jax.device_get(metrics))
        return history, lowered

    (on_cpu, cpu_text), (on_gpu, gpu_text) = losses("cpu"), losses("gpu")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5), on_gpu, on_cpu)
    assert cpu_text.count("optimization_barrier") != gpu_text.count("optimization_barrier")


@pytest.mark.slow
def test_rows_over_devices_give_the_same_update():
    """Loss and gradients are of the global batch, whatever device has how many real tokens of it."""
    one, (metrics,) = run()
    many, (sharded,) = run(data=4)
    np.testing.assert_allclose(sharded.loss[:4], metrics.loss[:4], rtol=1e-5)
    np.testing.assert_allclose(sharded.grad_norm, metrics.grad_norm, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.params, many.params)
    assert max(jax.tree.leaves(moved)) < 1e-4


@pytest.mark.slow
def test_uneven_rows_are_one_batch():
    """The gradient of a batch is the token-weighted mean of those of its rows, not the mean of their means."""
    config, _, built, _ = setup()
    batch = draw_batch()
    params = built.init(0)

    def objective(params, batch):
        logits = built.bind(params)(batch.source_BS, batch.target_BT)
        sums = cross_entropy(logits, batch.target_BT, config.optimizer.label_smoothing)
        return sums.smoothed_nll, sums.tokens

    @jax.jit
    def grad(batch):
        (value, tokens), gradient = jax.value_and_grad(objective, has_aux=True)(params, batch)
        return value, gradient, tokens

    whole, whole_grad, tokens = grad(batch)
    rows = [grad(Batch(batch.source_BS[i : i + 1], batch.target_BT[i : i + 1])) for i in range(8)]
    np.testing.assert_allclose(sum(r[0] for r in rows), whole, rtol=1e-5)
    assert sum(float(r[2]) for r in rows) == float(tokens)
    summed = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), [r[1] for r in rows])
    difference = jax.tree.map(lambda a, b: a - b, summed, whole_grad)
    assert optax.tree.norm(difference) < 1e-5 * optax.tree.norm(whole_grad)


@pytest.mark.parametrize(("parts", "data"), [slow(2, 1), slow(4, 1), (2, 4)])
def test_parts_one_after_the_other_are_one_batch(parts, data):
    """Rows of uneven lengths, and a count of them that the parts do not divide."""
    batch = draw_batch(rows=7)
    one, (whole,) = run(batches=[batch])
    config, mesh, built, _ = setup(data)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=parts))
    update = train_step.make_train_step(built, config, mesh)
    state, metrics = update(train_step.init_state(built, config, mesh), sharding.shard_batch(mesh, batch, parts))
    np.testing.assert_allclose(metrics.loss[:4], whole.loss[:4], rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, whole.grad_norm, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(state.params), one.params)
    assert max(jax.tree.leaves(moved)) < 1e-4


@pytest.mark.slow
def test_parts_drop_different_units():
    """With the same rows in both parts and one key for both, the parts' losses would be equal."""
    built = setup(dropout_rate=0.5)[2]
    batch = draw_batch(rows=1)
    twice = Batch(*(np.repeat(side, 2, 0) for side in batch))

    def objective(params, batch, key):
        sums = cross_entropy(built.bind(params)(batch.source_BS, batch.target_BT, key), batch.target_BT, 0.0)
        return sums.smoothed_nll, sums

    sums = jax.jit(
        lambda b, parts: train_step.accumulate_gradients(objective, built.init(0), b, jax.random.key(3), parts)[1],
        static_argnums=1,
    )
    keys = jax.random.split(jax.random.key(3), 2)
    alone = [jax.jit(objective)(built.init(0), batch, key)[0] for key in keys]
    np.testing.assert_allclose(sums(twice, 2).smoothed_nll, sum(alone), rtol=1e-5)
    assert abs(float(alone[0] - alone[1])) > 1e-3


def test_padding_rows_change_nothing():
    batch = draw_batch()
    wider = Batch(*(np.pad(side, ((0, 8), (0, 0))) for side in batch))
    _, (metrics,) = run(batches=[batch])
    _, (padded,) = run(batches=[wider])
    np.testing.assert_allclose(padded.loss[:4], metrics.loss[:4], rtol=1e-6)
    np.testing.assert_allclose(padded.grad_norm, metrics.grad_norm, rtol=1e-5)


@pytest.mark.slow
def test_a_batch_of_padding_alone_is_no_nan():
    _, (metrics,) = run(batches=[Batch(np.zeros((8, 4), np.int32), np.zeros((8, 4), np.int32))])
    assert metrics.loss.tokens == 0
    assert np.isfinite(metrics.grad_norm)


def test_rows_that_do_not_divide_are_filled_up(one_device):
    _, mesh, *_ = setup(8)
    placed = sharding.shard_batch(mesh, draw_batch(rows=5))
    assert placed.target_BT.shape == (8, 7)
    assert (np.asarray(placed.target_BT)[5:] == PAD).all()
    assert sharding.shard_batch(one_device, draw_batch(rows=5)).target_BT.shape == (5, 7)


@pytest.mark.slow
def test_dropout_differs_from_step_to_step_and_is_repeatable():
    batch = draw_batch()
    config, mesh, built, update = setup(dropout_rate=0.5)
    losses = []
    for done in (0, 0, 1):
        state = train_step.init_state(built, config, mesh)._replace(step=jax.device_put(np.int32(done)))
        losses.append(float(update(state, sharding.shard_batch(mesh, batch))[1].loss.nll))
    assert losses[0] == losses[1] != losses[2]


def test_the_seed_changes_params_and_dropout():
    config, mesh, built, _ = setup(dropout_rate=0.5)
    one, other = built.init(0), built.init(1)
    assert not np.array_equal(one["embeddings"]["shared"]["table"], other["embeddings"]["shared"]["table"])
    losses = []
    for seed in (0, 0, 1):
        seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        state = train_step.init_state(built, config, mesh)
        update = train_step.make_train_step(built, seeded, mesh)
        losses.append(float(update(state, sharding.shard_batch(mesh, draw_batch()))[1].loss.nll))
    assert losses[0] == losses[1] != losses[2]


def with_ema(config, decay):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, ema_decay=decay))


def run_with_ema(decay, num_steps=3, data=1):
    """The states after each update, on the host."""
    config, mesh, built, _ = setup(data)
    config = with_ema(config, decay)
    update = train_step.make_train_step(built, config, mesh)
    state = train_step.init_state(built, config, mesh)
    states = [jax.device_get(state)]
    for i in range(num_steps):
        state, _ = update(state, sharding.shard_batch(mesh, draw_batch(seed=i)))
        states.append(jax.device_get(state))
    return states, state


@pytest.mark.parametrize("decay", [0.15, slow(0.999)])
def test_the_moving_average_is_that_of_the_params(decay):
    """Decays of 1/10, 2/11 and 3/12 in the first three updates, unless the config's is smaller."""
    states, _ = run_with_ema(decay)
    wanted = states[0].params
    for done, state in enumerate(states[1:]):
        weight = min(decay, (1 + done) / (10 + done))
        wanted = jax.tree.map(lambda old, new, w=weight: w * old + (1 - w) * new, wanted, state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema, wanted)
    assert states[-1].eval_params is states[-1].ema


@pytest.mark.slow
def test_a_moving_average_changes_nothing_else():
    state, _ = run(3)
    averaged, _ = run_with_ema(0.99)
    assert state.ema is None
    assert state.eval_params is state.params
    equal = functools.partial(np.testing.assert_allclose, atol=1e-6)  # two programs may round in different ways
    jax.tree.map(equal, averaged[-1]._replace(ema=None), state)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), averaged[-1].ema, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-5


@pytest.mark.slow
def test_the_moving_average_lives_where_its_params_do():
    _, state = run_with_ema(0.99, num_steps=1, data=8)
    config, mesh, built, _ = setup(8)
    abstract = train_step.abstract_state(built, with_ema(config, 0.99), mesh)
    for tree in (state.ema, abstract.ema):
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), tree, state.params)
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(tree))
    assert train_step.abstract_state(built, config, mesh).ema is None


def test_params_that_are_no_numbers_are_seen():
    params = setup()[2].init(0)
    assert train_step.all_finite(params)
    for bad in (np.nan, np.inf):
        params["decoder"][0]["mlp"]["bias_in"] = params["decoder"][0]["mlp"]["bias_in"].at[3].set(bad)
        assert not train_step.all_finite(params)


def test_the_state_is_donated():
    config, mesh, built, update = setup()
    state = train_step.init_state(built, config, mesh)
    update(state, sharding.shard_batch(mesh, draw_batch()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_nothing_recompiles_once_each_shape_was_seen():
    config, mesh, built, update = setup(mlp_dim=24)
    state = train_step.init_state(built, config, mesh)
    shapes = [(8, 6, 7), (4, 9, 9), (8, 6, 7), (4, 9, 9), (8, 6, 7)]
    counter, counts = CompileCounter(), []
    for seed, shape in enumerate(shapes):
        batch = sharding.shard_batch(mesh, draw_batch(*shape, seed=seed))
        with counter:
            state, _ = update(state, batch)
        counts.append(counter.count)
    assert counts == [1, 2, 2, 2, 2]


def test_evaluation_has_neither_dropout_nor_smoothing():
    config, mesh, built, _ = setup(dropout_rate=0.5)
    batch = sharding.shard_batch(mesh, draw_batch())
    params = train_step.init_state(built, config, mesh).params
    sums = evaluator.make_eval_step(built, mesh)(params, batch)
    assert sums.smoothed_nll == sums.nll
    again = evaluator.make_eval_step(built, mesh)(params, batch)
    assert sums.nll == again.nll


def test_optimizer_state_lives_where_its_params_do():
    config, mesh, built, _ = setup(8)
    state = train_step.init_state(built, config, mesh)
    wanted = train_step.state_shardings(built, config, mesh)
    jax.tree.map(lambda leaf, where: np.testing.assert_equal(leaf.sharding, where), state, wanted)
    abstract = train_step.abstract_state(built, config, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), state, abstract)


def test_a_logical_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule for the logical axis 'width'"):
        sharding.logical_to_mesh(("width",))


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(Exception, match=r"mesh\.data = 9 asks for 9 devices: found only 8 devices"):
        make_mesh(MeshConfig(data=9))
