"""The schedule by the paper's formula, each optimizer by its own; every field changes something."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from tests.conftest import small_config
from tests.training.test_train_step import V, draw_batch
from transformer.checkpoints.manager import CheckpointManager
from transformer.checkpoints.state import TrainState
from transformer.config import OptimizerConfig
from transformer.config.optimizers import OPTIMIZER_TRAITS, SCHEDULE_TRAITS
from transformer.data import tokenizer
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.evaluation import evaluator
from transformer.models.registry import MODELS, ModelDef
from transformer.training import optimizer as optimizer_lib
from transformer.training import train_step
from transformer.training.optimizer import make_optimizer, make_schedule

NAMES = tuple(optimizer_lib.OPTIMIZERS)
DECAYED = [name for name, traits in OPTIMIZER_TRAITS.items() if traits.decays_weights]


def schedule(**fields):
    config = small_config(optimizer={"warmup_steps": 4000, **fields}, train={"num_steps": 10_000})
    return make_schedule(config), config


def test_every_choice_of_the_schema_is_implemented():
    assert optimizer_lib.OPTIMIZERS.keys() == OPTIMIZER_TRAITS.keys() == set(choices("name"))
    assert optimizer_lib.SCHEDULES.keys() == SCHEDULE_TRAITS.keys() == set(choices("schedule"))


def choices(field):
    fields = {field.name: field for field in dataclasses.fields(OptimizerConfig)}
    return fields[field].metadata["one_of"]


@pytest.mark.parametrize("name", SCHEDULE_TRAITS)
def test_the_traits_of_a_schedule_are_true_of_it(name):
    function, _ = schedule(schedule=name)
    assert (float(function(10_000)) == pytest.approx(0, abs=1e-7)) == SCHEDULE_TRAITS[name].ends_at_zero


@pytest.mark.parametrize("step", [1, 10, 3999, 4000, 4001, 100_000])
def test_paper_schedule_is_equation_3(step):
    function, config = schedule(learning_rate=2.0)
    want = 2.0 * config.model.emb_dim**-0.5 * min(step**-0.5, step * 4000**-1.5)
    np.testing.assert_allclose(function(step - 1), want, rtol=1e-5)


@pytest.mark.parametrize("name", ["inverse_sqrt", "cosine", "linear", "constant"])
def test_other_schedules_rise_to_the_peak(name):
    function, _ = schedule(schedule=name, learning_rate=0.3)
    np.testing.assert_allclose(function(1999), 0.15, rtol=1e-3)
    np.testing.assert_allclose(function(3999), 0.3, rtol=1e-3)
    after = {"inverse_sqrt": 0.3 * (4000 / 7000) ** 0.5, "cosine": 0.15, "linear": 0.15, "constant": 0.3}
    np.testing.assert_allclose(function(6999), after[name], rtol=2e-3)
    end = {"inverse_sqrt": 0.3 * 0.4**0.5, "cosine": 0.0, "linear": 0.0, "constant": 0.3}
    np.testing.assert_allclose(function(9999), end[name], atol=1e-4)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_wsd_is_stable_until_its_last_part_falls_linearly_to_zero(fraction):
    function, _ = schedule(schedule="wsd", learning_rate=0.3, decay_fraction=fraction)
    begin = round(10_000 * (1 - fraction))
    steps = [1999, 3999, (4000 + begin) // 2, begin, (begin + 10_000) // 2, 9999, 10_000]
    np.testing.assert_allclose([function(step) for step in steps[:-2]], [0.15, 0.3, 0.3, 0.3, 0.15], rtol=1e-3)
    np.testing.assert_allclose(function(9999), 0.3 / (10_000 * fraction), rtol=1e-3)
    assert function(10_000) == 0


def test_wsd_without_a_stable_part_is_linear():
    linear, wsd = schedule(schedule="linear")[0], schedule(schedule="wsd", decay_fraction=0.6)[0]
    for step in (0, 3999, 4000, 5555, 9999):
        np.testing.assert_allclose(wsd(step), linear(step), rtol=1e-5, atol=1e-6)


def test_a_schedule_without_warm_up_starts_at_its_peak():
    function, _ = schedule(schedule="constant", warmup_steps=0, learning_rate=0.3)
    assert float(function(0)) == pytest.approx(0.3)


@pytest.mark.parametrize("name", SCHEDULE_TRAITS)
@pytest.mark.parametrize("warmup_steps", [1, 7, 30])
def test_the_peak_is_the_highest_rate(name, warmup_steps):
    if SCHEDULE_TRAITS[name].ends_at_zero:
        warmup_steps = min(warmup_steps, 18)
    optimizer = {"schedule": name, "warmup_steps": warmup_steps, "decay_fraction": 0.1}
    config = small_config(optimizer=optimizer, train={"num_steps": 20})
    rates = [float(make_schedule(config)(count)) for count in range(20)]
    assert optimizer_lib.peak_learning_rate(config) == max(rates)


PARAMS = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 2.0)}
GRADS = {"kernel": jnp.asarray([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.zeros((2,))}


def update(grads=None, params=PARAMS, **fields):
    """The last of some updates, all from the same params."""
    config = small_config(optimizer={"schedule": "constant", "warmup_steps": 0, "learning_rate": 0.1, **fields})
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in grads or (GRADS, jax.tree.map(lambda g: g * 0.5, GRADS)):
            updates, state = optimizer.update(gradient, state, params)
    return updates


def test_adam_is_its_own_formula():
    got = update(beta1=0.9, beta2=0.98, epsilon=1e-9)
    g1, g2 = np.asarray(GRADS["kernel"]), 0.5 * np.asarray(GRADS["kernel"])
    m = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
    v = (0.98 * 0.02 * g1**2 + 0.02 * g2**2) / (1 - 0.98**2)
    np.testing.assert_allclose(got["kernel"], -0.1 * m / (np.sqrt(v) + 1e-9), rtol=1e-5)


def test_nadamw_looks_ahead_by_one_update():
    got = update(name="nadamw", beta1=0.9, beta2=0.98, epsilon=1e-9)
    g1, g2 = np.asarray(GRADS["kernel"]), 0.5 * np.asarray(GRADS["kernel"])
    m = 0.9 * (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**3) + 0.1 * g2 / (1 - 0.9**2)
    v = (0.98 * 0.02 * g1**2 + 0.02 * g2**2) / (1 - 0.98**2)
    np.testing.assert_allclose(got["kernel"], -0.1 * m / (np.sqrt(v) + 1e-9), rtol=1e-5)


@pytest.mark.parametrize("name", DECAYED)
def test_weight_decay_is_decoupled_and_spares_biases(name):
    plain, decayed = (update(grads=[GRADS], name=name, weight_decay=decay) for decay in (0.0, 0.5))
    np.testing.assert_allclose(decayed["kernel"], plain["kernel"] - 0.1 * 0.5 * 2.0, rtol=2e-6)
    np.testing.assert_array_equal(decayed["bias"], plain["bias"])


def test_adamw_without_decay_is_adam():
    jax.tree.map(np.testing.assert_array_equal, update(name="adamw"), update(name="adam"))


@pytest.mark.parametrize("name", NAMES)
def test_clipping_is_by_the_global_norm(name):
    """Adam forgets a common scale, so two steps are taken of which clipping shrinks the first alone."""
    update = functools.partial(globals()["update"], name=name)
    small = jax.tree.map(lambda g: g * 0.5, GRADS)  # norm 2.5, under the bound; the first has norm 5
    scaled = jax.tree.map(lambda g: g * (3.5 / 5), GRADS)
    jax.tree.map(np.testing.assert_allclose, update(clip_norm=3.5), update(grads=(scaled, small)))
    jax.tree.map(np.testing.assert_array_equal, update(clip_norm=100.0), update())
    assert not np.allclose(update(clip_norm=3.5)["kernel"], update()["kernel"])


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_update_of_any_optimizer_changes_nothing_but_its_count(name):
    config = small_config(optimizer={"name": name, "schedule": "constant"}, train={"spike_factor": 2.0})
    optimizer = make_optimizer(config)
    state = optimizer.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        updates, before = optimizer.update(GRADS, state, PARAMS, value=jnp.float32(1.0))
        skipped, after = optimizer.update(GRADS, before, PARAMS, value=jnp.float32(3.0))
    assert np.any(updates["kernel"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(skipped))
    jax.tree.map(np.testing.assert_array_equal, before.inner, after.inner)
    assert int(optimizer_lib.num_skipped(after)) == 1


@pytest.mark.parametrize(("field", "value"), [("beta1", 0.5), ("beta2", 0.5), ("epsilon", 1.0), ("learning_rate", 0.2)])
def test_every_field_changes_the_update(field, value):
    assert not np.allclose(update(**{field: value})["kernel"], update()["kernel"])


@pytest.mark.parametrize(("field", "value"), [("beta1", 0.5), ("beta2", 0.5), ("epsilon", 1.0), ("learning_rate", 0.2)])
def test_every_field_changes_the_update_of_schedule_free_too(field, value):
    name = {"name": "schedule_free_adamw", "weight_decay": 0.5}  # of y, on which beta1 bears
    params = jax.tree.map(lambda leaf: leaf + 1.0, PARAMS)
    assert not np.allclose(
        update(params=params, **name, **{field: value})["kernel"], update(params=params, **name)["kernel"]
    )


def params_of(family, **model):
    """Shapes by name of a model with the embeddings and positions that a family can have."""
    sizes = {"attention": {"num_heads": 2, "mlp_dim": 32, "qkv_dim": 20, "value_dim": 20}}.get(
        family, {"num_heads": 8, "mlp_dim": 2048}
    )
    config = small_config(model={"family": family, **sizes, **model}).model
    params = nnx.to_pure_dict(ModelDef(config, V).abstract_params)
    return config, params


MODERN = {"activation": "swiglu", "qk_norm": True, "norm_type": "rms", "positions": "rotary", "encoder_layers": 1}
BLOCKS = [
    ("attention", {"share_embeddings": False, "positions": "learned"}),
    ("attention", {"norm": "pre", "scan_layers": True}),
    ("attention", {"norm": "pre", **MODERN}),
    ("attention", {"scan_layers": True, **MODERN, "use_bias": False}),
    ("recurrent", {}),
    ("recurrent", {"attention_score": "additive", "share_embeddings": False}),
    ("convolutional", {"positions": "learned"}),
    ("convolutional", {"scan_layers": True, "attention_score": "additive"}),
]
BY_MUON = {
    "attention": {"query", "key", "value", "out", "kernel_in", "kernel_gate", "kernel_out"},
    "recurrent": {"kernel_in", "kernel_state", "query", "key", "out"},
    "convolutional": {"kernel", "query", "key", "out"},
}
BY_ADAM = {
    *("table", "source_positions", "target_positions", "scale"),
    *("bias", "bias_in", "bias_gate", "bias_out", "weigh"),
}


MATRICES = {  # rows and columns
    "attention": {
        **dict.fromkeys(("query", "key", "value"), (16, 20)),
        "out": (20, 16),
        "kernel_in": (16, 32),
        "kernel_gate": (16, 32),
        "kernel_out": (32, 16),
    },
    "recurrent": {"query": (16, 16), "key": (16, 16)},
    "convolutional": {"kernel": (48, 32), "query": (16, 16), "key": (16, 16), "out": (16, 16)},
}


def test_muon_knows_every_family():
    assert optimizer_lib.MUON_PARAMS.keys() == BY_MUON.keys() == MODELS.keys() == {family for family, _ in BLOCKS}


@pytest.mark.parametrize(("family", "model"), BLOCKS)
def test_muon_gets_matrices_of_hidden_layers_and_adam_all_else(family, model):
    """Add the name of a new param to one of the two, and to `MUON_PARAMS` if it is a matrix of a hidden layer."""
    config, params = params_of(family, **model)
    labels = optimizer_lib.muon_labels(config, params)
    dimensions = optimizer_lib.muon_dimension_numbers(config, params)
    for path, param in jax.tree_util.tree_leaves_with_path(params):
        name, label = path[-1].key, functools.reduce(lambda tree, part: tree[getattr(part, "key", None)], path, labels)
        assert name in BY_MUON[family] | BY_ADAM, name
        assert label == ("muon" if name in BY_MUON[family] else "adam"), path
        if label == "adam":
            continue
        axes = functools.reduce(lambda tree, part: tree[part.key], path, dimensions)
        rows, columns = ((each,) if isinstance(each, int) else each for each in axes)
        assert sorted(axis % param.ndim for axis in (*rows, *columns)) == list(
            range(int(config.scan_layers), param.ndim)
        )
        sizes = tuple(math.prod(param.shape[axis] for axis in each) for each in (rows, columns))
        assert sizes == MATRICES[family].get(name, sizes), path


def test_muon_updates_are_orthogonal_matrices_of_equal_mean_square():
    """Of an attention matrix with its heads, alone and stacked: close to the nearest orthogonal one, 0.2 in size."""
    rng = np.random.default_rng(0)
    shapes = {"query": (2, 16, 2, 4), "out": (2, 2, 4, 16), "kernel_in": (2, 16, 64)}
    grads = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    layer = jax.tree.map(lambda leaf: leaf[1], grads)

    @jax.jit
    def updated(gradient):
        return update(grads=[gradient], params=gradient, name="muon", learning_rate=1.0)

    stacked, alone = updated({"encoder": grads})["encoder"], updated({"encoder": [layer]})["encoder"][0]
    jax.tree.map(lambda leaf, one: np.testing.assert_allclose(leaf[1], one, rtol=1e-4, atol=1e-6), stacked, alone)
    for name, (rows, columns) in {"query": (16, 8), "out": (8, 16), "kernel_in": (16, 64)}.items():
        u, _, vh = np.linalg.svd(np.asarray(layer[name]).reshape(rows, columns), full_matrices=False)
        inside = u.T @ -np.asarray(alone[name]).reshape(rows, columns) @ vh.T / (0.2 * max(rows, columns) ** 0.5)
        assert np.abs(inside - np.diag(np.diag(inside))).max() < 1e-3
        assert (np.diag(inside) > 0.6).all()
        assert (np.diag(inside) < 1.3).all()
        assert 0.1 < np.sqrt(np.mean(np.square(alone[name]))) < 0.25


def test_muon_gives_other_params_what_adamw_does():
    params = {"decoder": {"kernel_in": PARAMS["kernel"]}, "embeddings": {"table": PARAMS["kernel"]}}
    grads = [{"decoder": {"kernel_in": GRADS["kernel"]}, "embeddings": {"table": GRADS["kernel"]}}]
    muon, adamw = (update(grads, params, name=name, weight_decay=0.5) for name in ("muon", "adamw"))
    np.testing.assert_array_equal(muon["embeddings"]["table"], adamw["embeddings"]["table"])
    assert not np.allclose(muon["decoder"]["kernel_in"], adamw["decoder"]["kernel_in"])


def test_schedule_free_is_the_formula_of_its_paper():
    """Algorithm 1 of Defazio et al. 2024, with AdamW's decay at y; each gradient depends on y."""
    fields = {"name": "schedule_free_adamw", "schedule": "constant", "learning_rate": 0.1, "warmup_steps": 3}
    config = small_config(optimizer={**fields, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3, "weight_decay": 0.5})
    optimizer, params, target = make_optimizer(config), PARAMS["kernel"], np.asarray(GRADS["kernel"])
    state = optimizer.init({"kernel": params})
    x = z = np.asarray(params, np.float64)
    v, weights = np.zeros_like(x), 0.0
    for t in range(1, 7):
        y = optimizer_lib.gradient_params(config.optimizer, {"kernel": params}, state)["kernel"]
        y_wanted = 0.2 * z + 0.8 * x
        np.testing.assert_allclose(y, y_wanted, rtol=1e-5)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update({"kernel": 2 * (y - target)}, state, {"kernel": params})
        params = params + updates["kernel"]
        rate, grad = 0.1 * min(t / 3, 1.0), 2 * (y_wanted - target)
        v = 0.9 * v + 0.1 * grad**2
        z = z - rate * (grad / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + 0.5 * y_wanted)
        weights += rate**2
        x = x + rate**2 / weights * (z - x)
        np.testing.assert_allclose(params, x, rtol=1e-5)
    assert not np.allclose(x, z)


def test_gradients_of_others_are_taken_at_the_params():
    for name in [name for name, traits in OPTIMIZER_TRAITS.items() if not traits.is_schedule_free]:
        config = small_config(optimizer={"name": name})
        assert optimizer_lib.gradient_params(config.optimizer, PARAMS, make_optimizer(config).init(PARAMS)) is PARAMS


def config_for(name, **sections):
    fields = {"name": name, "schedule": "constant", "learning_rate": 0.01, "clip_norm": 1.0}
    sections = {"model": {"num_layers": 1}, "train": {"spike_factor": 3.0}, **sections}
    return small_config(optimizer=fields, **sections)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_fsdp_shards_the_state_of_every_optimizer(name, scan):
    """Its big arrays have the shardings of their params; of what they take, each device stores an eighth."""
    wide = {"emb_dim": 64, "mlp_dim": 256, "qkv_dim": 64, "value_dim": 64, "num_layers": 1, "scan_layers": scan}
    config = config_for(name, model=wide, mesh={"data": 1, "fsdp": 8})
    model = ModelDef(config.model, V)
    state = train_step.abstract_state(model, config, make_mesh(config.mesh))
    by_shape = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(state.params)}
    big = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 1000]
    assert all(leaf.sharding == by_shape[leaf.shape] for leaf in big)
    numbers = sum(leaf.size for leaf in big)
    vectors = sum(leaf.size for leaf in jax.tree.leaves(state.params) if leaf.size <= 1000)
    embeddings = state.params["embeddings"]["shared"]["table"].size
    by_muon = model.num_params() - vectors - embeddings if name == "muon" else 0
    # Of a param that Muon updates one moment, of another two; schedule_free_adamw: z and the second moment.
    assert numbers == 2 * (model.num_params() - vectors) - by_muon
    stored = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in big)
    assert stored == numbers / 8


VOCABULARY = tokenizer.train(["a few words to translate"], 275, "bpe")


def run(config, state, steps):
    mesh = make_mesh(config.mesh)
    update = train_step.make_train_step(ModelDef(config.model, V), config, mesh)
    for step in steps:
        state, _ = update(state, sharding.shard_batch(mesh, draw_batch(seed=step)))
    return state


def restored_and_evaluated(folder, config, state, abstract):
    """What comes back of a saved state, and the params that are evaluated, averaged, exported and translated with."""
    with CheckpointManager(folder) as checkpoints:
        checkpoints.save(state, config, VOCABULARY, {}, {})
        step = int(state.step)
        return checkpoints.restore(step, abstract), ocp.load(checkpoints.folder / f"{step}" / "params", abstract.params)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_every_optimizer_comes_back_and_goes_on_exactly(name, tmp_path, one_device):
    """A quadratic loss of two params, compiled as a whole; of Schedule-Free, x is saved as the params."""
    config, optimizer = config_for(name), make_optimizer(config_for(name))

    @jax.jit
    def step(state):
        y = optimizer_lib.gradient_params(config.optimizer, state.params, state.opt_state)
        grads = jax.tree.map(
            lambda leaf, target: leaf - target, y, {"kernel_in": GRADS["kernel"], "bias": GRADS["bias"]}
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=jnp.float32(1.0))
        params = jax.tree.map(jnp.add, state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state)

    params = {"kernel_in": PARAMS["kernel"], "bias": PARAMS["bias"]}
    first = jax.device_put(
        TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)), sharding.replicated(one_device)
    )
    half = step(step(first))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), half)
    restored, evaluated = restored_and_evaluated(tmp_path, config, half, abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, half)
    jax.tree.map(np.testing.assert_array_equal, evaluated, half.eval_params)
    jax.tree.map(np.testing.assert_array_equal, step(step(restored)), step(step(half)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "schedule_free_adamw"])  # the others' state is Adam's, as of test_trainer
def test_two_updates_and_two_more_after_a_restore_are_four(name, tmp_path):
    config = config_for(name)
    model, mesh = ModelDef(config.model, V), make_mesh(config.mesh)
    whole = jax.device_get(run(config, train_step.init_state(model, config, mesh), range(4)))
    half = run(config, train_step.init_state(model, config, mesh), range(2))
    abstract = train_step.abstract_state(model, config, mesh)
    restored, evaluated = restored_and_evaluated(tmp_path, config, half, abstract)
    jax.tree.map(np.testing.assert_array_equal, evaluated, half.eval_params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run(config, restored, range(2, 4))), whole)


@pytest.mark.slow
def test_the_loss_of_schedule_free_is_that_of_y(one_device):
    """And what is evaluated is x, whose loss is another."""
    config = config_for("schedule_free_adamw", model={"num_layers": 1, "dropout_rate": 0.0})
    model, batch = ModelDef(config.model, V), draw_batch(seed=3)
    state = run(config, train_step.init_state(model, config, one_device), range(3))
    evaluate = evaluator.make_eval_step(model, one_device)
    placed = sharding.shard_batch(one_device, batch)
    y = optimizer_lib.gradient_params(config.optimizer, state.params, state.opt_state)
    of_y, of_x = (float(jnp.sum(evaluate(params, placed).nll)) for params in (y, state.eval_params))
    _, metrics = train_step.make_train_step(model, config, one_device)(state, placed)
    np.testing.assert_allclose(metrics.loss.nll, of_y, rtol=1e-5)
    assert abs(of_x - of_y) > 1e-3
