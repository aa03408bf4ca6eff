"""R-Drop and SimCut: against two separate passes, over micro-batches and meshes; cutoff; what they send and cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import slow, small_config
from tests.distributed.test_mesh import exchanged
from tests.helpers.compilation import CompileCounter
from tests.training.test_train_step import draw_batch
from transformer.data.batching import Batch, Bucket
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models import flops, registry
from transformer.models.base import CUT, cut_tokens, shift_right
from transformer.planning import hlo_cost
from transformer.planning.hlo import Program
from transformer.training import objective, train_step
from transformer.training.divergence import kl_of_neighbours

V = 40
OBJECTIVES = {
    "rdrop": {"consistency": "rdrop", "consistency_weight": 5.0},
    "simcut": {"consistency": "simcut", "consistency_weight": 3.0, "cutoff_rate": 0.3},
}
KEY = jax.random.key(7)


def config_of(name, train=(), data=(), mesh=(), **model):
    fields = {"num_layers": 1, "dropout_rate": 0.2, **model}
    if fields.get("family", "attention") != "attention":
        fields |= {"num_heads": 8, "mlp_dim": 2048}
    return small_config(
        model=fields,
        data={"vocab_size": V, **dict(data)},
        train={**OBJECTIVES.get(name, {}), **dict(train)},
        mesh={"data": 1, **dict(mesh)},
    )


def build(config):
    mesh, model = make_mesh(config.mesh), registry.ModelDef(config.model, V)
    return model, mesh, objective.make_objective(model, config, mesh)


def packed_batch():
    """Rows of several sentences, of which some end in padding."""
    rng = np.random.default_rng(1)
    source, target = (rng.integers(4, V, (4, width)).astype(np.int32) for width in (10, 12))
    for side, ends in ((source, [2, 6, 9]), (target, [3, 5, 10])):
        side[:, ends] = EOS
    target[:, 11] = PAD
    source[2:, 7:], target[2:, 6:] = PAD, PAD  # two sentences
    return Batch(source, target)


def slow_objective(config, params, batch, key):
    """The papers' definitions from two forward passes, one for each prediction, over a vocabulary with a zero row.

    Each pass has its rows where the batch of twice the rows has them, as dropout goes by the row, and none elsewhere.
    """
    train, packed = config.train, config.data.batching == "pack"
    model = registry.ModelDef(config.model, V + 1)  # id V: embedding zero
    embeddings = jax.tree.map(lambda table_VD: jnp.pad(table_VD, ((0, 1), (0, 0))), params["embeddings"])
    module = model.bind({**params, "embeddings": embeddings})

    def log_probs(source_BS, target_BT, pass_number, key):
        source, target = (
            jnp.zeros((2 * len(ids), ids.shape[1]), jnp.int32).at[pass_number::2].set(ids)
            for ids in (source_BS, target_BT)
        )
        logits = module(source, target, key, packed)[pass_number::2, :, :V]
        return jax.nn.log_softmax(logits)

    target_BT = jnp.asarray(batch.target_BT)
    mask_BT = (target_BT != PAD).astype(jnp.float32)

    def smoothed_nll(log_p_BTV):
        smoothing = config.optimizer.label_smoothing
        wanted_BTV = (1 - smoothing) * jax.nn.one_hot(target_BT, V) + smoothing / V
        return -(mask_BT[..., None] * wanted_BTV * log_p_BTV).sum()

    def kl(log_p_BTV, log_q_BTV):
        return (mask_BT[..., None] * jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV)).sum()

    if train.consistency == "rdrop":
        p, q = log_probs(*batch, 0, key), log_probs(*batch, 1, key)
        return smoothed_nll(p) + smoothed_nll(q) + train.consistency_weight * (kl(p, q) + kl(q, p)) / 2
    key, *cutoff_keys = jax.random.split(key, 3)
    cut = [cut_tokens(jnp.asarray(ids), train.cutoff_rate, one) for ids, one in zip(batch, cutoff_keys, strict=True)]
    p = log_probs(*batch, 0, key)
    q = log_probs(*(jnp.where(ids == CUT, V, ids) for ids in cut), 1, key)
    return smoothed_nll(p) + train.consistency_weight * kl(p, q)


VARIANTS = {
    "plain": {"num_layers": 1},
    "dropouts": {"attention_dropout_rate": 0.1, "mlp_dropout_rate": 0.1, "share_embeddings": False},
    "scan": {"scan_layers": True, "num_layers": 2, "remat": "full", "norm": "pre"},
    "rotary": {"positions": "rotary", "norm_type": "rms", "remat": "dots"},
    "learned": {"positions": "learned", "max_positions": 128},
    "recurrent": {"family": "recurrent"},
    "convolutional": {"family": "convolutional"},
}
COMBINED = [
    ("simcut", "plain", "bucket"),
    slow("simcut", "dropouts", "pack"),
    slow("rdrop", "scan", "pack"),
    slow("simcut", "rotary", "bucket"),
    slow("simcut", "learned", "bucket"),
    slow("simcut", "recurrent", "bucket"),
    slow("rdrop", "convolutional", "pack"),
]


@pytest.mark.parametrize(("name", "variant", "batching"), COMBINED)
def test_loss_and_gradient_are_those_of_two_separate_passes(name, variant, batching):
    data = {"batching": batching, "num_buckets": 8} if batching == "pack" else {}
    config = config_of(name, data=data, **VARIANTS[variant])
    model, _, fast = build(config)
    params, batch = model.init(0), packed_batch() if batching == "pack" else draw_batch(4)
    (value, sums), grads = jax.jit(jax.value_and_grad(fast, has_aux=True))(params, batch, KEY)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(functools.partial(slow_objective, config)))(params, batch, KEY)
    np.testing.assert_allclose(value, wanted, rtol=2e-6)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, grads, wanted_grads))
    assert difference < 2e-5 * optax.tree.norm(wanted_grads)
    assert int(sums.tokens) == np.count_nonzero(batch.target_BT)
    assert 0 < float(sums.consistency) < float(value)


def test_the_divergence_is_that_of_the_definition_in_float64():
    logits = np.random.default_rng(0).normal(size=(4, 3, 7)) * 4
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = (np.exp(log_p) * (log_p - log_p[[1, 0, 3, 2]])).sum(-1)
    np.testing.assert_allclose(kl_of_neighbours(jnp.asarray(logits, jnp.float32)), wanted, rtol=1e-5)


def test_the_gradient_of_the_divergence_reaches_both_predictions():
    """Against autodiff, with another weight for each position."""
    rng = np.random.default_rng(0)
    logits, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 3, 7), (4, 3)))

    def plain(logits):
        log_p = jax.nn.log_softmax(logits)
        return (weights * (jnp.exp(log_p) * (log_p - log_p[jnp.array([1, 0, 3, 2])])).sum(-1)).sum()

    got = jax.grad(lambda logits: (weights * kl_of_neighbours(logits)).sum())(logits)
    np.testing.assert_allclose(got, jax.grad(plain)(logits), rtol=1e-4, atol=1e-6)
    assert np.abs(got).max(-1).min() > 0
    one = jax.grad(lambda logits: kl_of_neighbours(logits)[0].sum())(logits)
    assert np.abs(one[1]).min() > 0
    assert np.abs(one[2:]).max() == 0


def test_huge_logits_stay_finite():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 7)) * 1e30, jnp.float32)
    assert np.isfinite(jax.grad(lambda logits: kl_of_neighbours(logits).sum())(logits)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_micro_batches_add_up(name):
    """Each with its own dropout and cutoff."""
    model, _, fast = build(config_of(name))
    params, batch = model.init(0), draw_batch(4)
    grads, sums = jax.jit(lambda *args: train_step.accumulate_gradients(fast, *args, 2))(params, batch, KEY)
    gradient = jax.jit(jax.grad(fast, has_aux=True))
    parts = [
        gradient(params, Batch(*(ids[i::2] for ids in batch)), key) for i, key in enumerate(jax.random.split(KEY, 2))
    ]
    wanted, wanted_sums = jax.tree.map(jnp.add, *parts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), sums, wanted_sums)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, grads, wanted))
    assert difference < 1e-5 * optax.tree.norm(wanted)


def test_without_consistency_the_objective_is_the_smoothed_cross_entropy():
    config = config_of("none")
    model, _, alone = build(config)
    _, sums = jax.eval_shape(alone, model.init(0), draw_batch(4), KEY)
    assert sums.consistency is None
    assert config.train.passes == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_reported_loss_is_that_of_whole_inputs(name):
    """Almost without dropout it is that of training without consistency, and counts each token once."""
    batch = draw_batch(4)
    model, _, fast = build(config_of(name, dropout_rate=1e-9))
    _, sums = jax.jit(fast)(model.init(0), batch, KEY)
    plain = jax.jit(build(config_of("none", dropout_rate=0.0))[2])(model.init(0), batch, KEY)[1]
    np.testing.assert_allclose(sums[1:4], plain[1:4], rtol=1e-5)


def test_tokens_are_cut_off_at_the_rate_and_never_eos_bos_or_padding():
    rng = np.random.default_rng(0)
    ids = rng.integers(4, V, (512, 64)).astype(np.int32)
    ids[:, 20], ids[:, 50], ids[:, 51:] = EOS, EOS, PAD
    cut = np.asarray(cut_tokens(jnp.asarray(ids), 0.05, KEY))
    is_word = (ids != EOS) & (ids != PAD)
    share = (cut[is_word] == CUT).mean()
    assert abs(share - 0.05) < 4 * (0.05 * 0.95 / is_word.sum()) ** 0.5
    np.testing.assert_array_equal(cut[~is_word], ids[~is_word])
    inputs, whole = shift_right(cut), shift_right(ids)
    assert (inputs[whole == BOS] == BOS).all()
    assert (inputs[:, 1:][cut[:, :-1] == CUT] == CUT).all()
    wider = cut_tokens(jnp.pad(jnp.asarray(ids[:100]), ((0, 0), (0, 8))), 0.05, KEY)
    np.testing.assert_array_equal(wider[:, :64], cut[:100])
    assert (np.asarray(cut_tokens(jnp.asarray(ids), 0.05, jax.random.key(8))) != cut).any()


def test_tags_are_never_cut_off():
    ids = jnp.full((64, 9), 7, jnp.int32)
    cut = cut_tokens(ids, 0.5, KEY, num_tags=2)
    assert (cut[:, :2] == 7).all()
    np.testing.assert_array_equal(cut[:, 2:], cut_tokens(ids, 0.5, KEY)[:, 2:])
    languages = {"source_language": "en", "train": "a.tsv"}
    mixture = tuple({**languages, "target_language": code, "tag": f"<2{code}>"} for code in ("de", "fr"))
    config = config_of("simcut", data={"mixture": mixture}, train={"cutoff_rate": 0.9})
    model, _, simcut = build(config)
    source = np.full((4, 6), 9, np.int32)
    source[:, -1] = EOS
    tagged = source.copy()
    tagged[:, 0] = 5
    seen = []
    embed = model.bind(model.init(0)).__class__._embed

    def spy(self, side, ids, *args, **kwargs):
        seen.append((side, ids))
        return embed(self, side, ids, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformer.models.base.Seq2SeqModel._embed", spy)
        simcut(model.init(0), Batch(tagged, source), KEY)
    (ids,) = [ids for side, ids in seen if side == "source"]
    assert (np.asarray(ids)[:, 0] == 5).all()
    assert (np.asarray(ids)[1::2, 1:-1] == CUT).mean() > 0.5


def update_on(name, sizes, batch, train=()):
    axes = ("data", "fsdp", "tensor", "sequence")
    config = config_of(name, train=train, mesh=dict(zip(axes, sizes, strict=True)))
    mesh, model = make_mesh(config.mesh), registry.ModelDef(config.model, V)
    placed = sharding.shard_batch(mesh, batch, config.train.accumulation_steps)
    update = train_step.make_train_step(model, config, mesh)
    return jax.device_get(update(train_step.init_state(model, config, mesh), placed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "parts"),
    [
        ("simcut", (2, 2, 2, 1), 1),
        ("rdrop", (1, 2, 1, 4), 2),
    ],
)
def test_any_mesh_trains_like_one_device(name, sizes, parts):
    """With dropout and cutoff, at lengths that the sequence axis does not divide."""
    batch, train = draw_batch(8, 7, 10), {"accumulation_steps": parts, "ema_decay": 0.9}
    one, metrics = update_on(name, (1, 1, 1, 1), batch, train)
    many, sharded = update_on(name, sizes, batch, train)
    np.testing.assert_allclose(sharded.loss[:4], metrics.loss[:4], rtol=1e-5)
    np.testing.assert_allclose(
        [sharded.loss.consistency, sharded.grad_norm], [metrics.loss.consistency, metrics.grad_norm], rtol=1e-4
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.ema, many.ema)
    assert max(jax.tree.leaves(moved)) < 1e-4


def compiled(name, rows, mesh):
    config = config_of(name, mesh=mesh)
    grid, model = make_mesh(config.mesh), registry.ModelDef(config.model, V)
    batch = sharding.abstract_batch(grid, Bucket(6, 7, rows))
    update = train_step.make_train_step(model, config, grid)
    return update.lower(train_step.abstract_state(model, config, grid), batch).compile().as_text(), batch, config


@pytest.mark.slow
def test_no_logits_travel_between_devices():
    """Beyond what a batch of twice the rows sends: the ids and sums of one number for each token."""
    plain, got = (
        exchanged(compiled(each, rows, {"data": 4, "fsdp": 2})[0]) for each, rows in (("none", 32), ("simcut", 16))
    )
    large = [sorted(one for one in each if one[2] > 1024) for each in (plain, got)]
    assert large[0] == large[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_flops_are_those_of_twice_the_rows(name):
    text, batch, config = compiled(name, 8, {})
    counted = flops.batch_flops(config.model, V, batch, config.train.passes)
    assert counted == flops.training_flops(config.model, V, 16, 6, 7)
    assert hlo_cost.count_flops(Program(text)) == counted


@pytest.mark.slow
def test_the_loss_falls_and_nothing_recompiles_once_each_shape_was_seen():
    config = config_of("simcut", mlp_dim=24)
    mesh, model = make_mesh(config.mesh), registry.ModelDef(config.model, V)
    update, state = train_step.make_train_step(model, config, mesh), train_step.init_state(model, config, mesh)
    counter, counts, losses = CompileCounter(), [], []
    for step in range(30):
        shape = (8, 6, 7) if step % 2 else (4, 9, 9)
        batch = sharding.shard_batch(mesh, draw_batch(*shape))
        with counter:
            state, metrics = update(state, batch)
        counts.append(counter.count)
        losses.append(float(metrics.loss.nll / metrics.loss.tokens))
    assert counts == [1] + [2] * 29
    assert max(losses[-2:]) < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("field", ["consistency_weight", "cutoff_rate"])
def test_the_weight_and_the_rate_change_the_loss(field):
    batch, values = draw_batch(4), []
    for value in (0.1, 0.6):
        model, _, fast = build(config_of("simcut", train={field: value}))
        values.append(float(jax.jit(fast)(model.init(0), batch, KEY)[0]))
    assert values[1] > values[0] * 1.001
