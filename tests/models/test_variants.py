"""Each variant of the paper's block, and all at once: equal to a slow model, and whole in every part of the program."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.commands.test_plan import planned
from tests.commands.test_translate import save
from tests.conftest import slow, small_config
from tests.decoding.test_translator import LINES
from tests.distributed import test_mesh
from tests.helpers import reference_model
from tests.models import test_families
from tests.models.test_flops import dot_flops, of_family, traced
from tests.models.test_stack import stack
from tests.models.test_transformer import SOURCE, TARGET, V, sentences
from tests.training.test_train_step import draw_batch
from transformer.checkpoints.loading import load_checkpoint
from transformer.config import schema, validation
from transformer.data import tokenizer
from transformer.data.batching import PAD_EXAMPLE, JaggedArray
from transformer.data.tokenizer import BOS, PAD
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.export import verify
from transformer.models import flops
from transformer.models.base import shift_right
from transformer.models.registry import ModelDef
from transformer.runtime.errors import UserError
from transformer.training import train_step

# Fields of the paper's block, and of how it is computed, which have tests of their own.
PAPER_FIELDS = {
    *("family", "num_layers", "emb_dim", "num_heads", "qkv_dim", "value_dim", "mlp_dim", "norm", "max_positions"),
    *("share_embeddings", "dropout_rate", "attention_dropout_rate", "mlp_dropout_rate", "attention", "qkv_init_gain"),
    *("attention_score", "kernel_width", "remat", "scan_layers", "dtype"),
}
VARIANTS = {  # few, as most tests compile a program for each
    "deep encoder, no biases": {"encoder_layers": 2, "decoder_layers": 1, "use_bias": False},
    "rms, gelu": {"norm_type": "rms", "activation": "gelu"},
    "silu, large epsilon, learned": {"activation": "silu", "norm_epsilon": 0.05, "positions": "learned"},
    "swiglu, rotary": {"activation": "swiglu", "positions": "rotary"},
    "geglu, normalized queries": {"activation": "geglu", "qk_norm": True},
}
VARIANTS["all"] = {
    "norm": "pre",
    **{name: value for fields in VARIANTS.values() for name, value in fields.items()},
    "activation": "swiglu",
}
FEW = {"num_layers": 1, "dropout_rate": 0.0}  # compiles in half the time
every_variant = pytest.mark.parametrize("variant", [*(slow(name) for name in VARIANTS if name != "all"), "all"])


def test_no_field_or_choice_is_left_out():
    """Add a new field of the model to VARIANTS, or to PAPER_FIELDS with tests of its own."""
    varied = {name for fields in VARIANTS.values() for name in fields} - PAPER_FIELDS
    assert {*schema.field_names("model")} == PAPER_FIELDS | varied
    for field in dataclasses.fields(schema.ModelConfig):
        if field.name in varied:
            tried = {fields[field.name] for fields in VARIANTS.values() if field.name in fields}
            assert {*field.metadata["one_of"]} <= {field.default, *tried}, field.name


drawn = functools.partial(test_families.drawn, scale=0.3)


@functools.cache
def model_of(variant, **fields):
    return ModelDef(small_config(model={**VARIANTS[variant], **fields}).model, V)


@functools.cache
def module(variant, **fields):
    model = model_of(variant, **fields)
    return model.bind(drawn(model))


@functools.cache
def logits_of(variant):
    return np.asarray(jax.jit(module(variant).__call__)(SOURCE, TARGET))


@every_variant
def test_it_equals_the_slow_model(variant):
    """Logits and all attention weights, of each sentence pair alone."""
    model, params = module(variant), jax.device_get(drawn(model_of(variant)))
    cross = jax.jit(model.cross_attention)(SOURCE, TARGET)
    encoder, decoder = jax.jit(model.self_attention)(SOURCE, TARGET)
    for row, (source, target) in enumerate(zip(np.asarray(SOURCE), np.asarray(TARGET), strict=True)):
        source, target = source[source != PAD], target[target != PAD]
        want = reference_model.forward(params, model.config, source, target)
        S, T = len(source), len(target)
        np.testing.assert_allclose(logits_of(variant)[row, :T], want.logits_TV, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(encoder[row, :, :, :S, :S], want.encoder_LHSS, atol=1e-5)
        np.testing.assert_allclose(decoder[row, :, :, :T, :T], want.decoder_LHTT, atol=1e-5)
        np.testing.assert_allclose(cross[row, :, :, :T, :S], want.cross_LHTS, atol=1e-5)


@every_variant
def test_cached_decoding_equals_scoring(variant):
    """The hypothesis that follows the target goes from beam to beam, and its past with it."""
    model, inputs = module(variant), shift_right(TARGET)
    step = jax.jit(functools.partial(model.decode_step, return_attention=True))
    source, cache = jax.jit(lambda ids: model.init_decode(ids, 2, TARGET.shape[1]))(SOURCE)
    other, swap = jnp.where(inputs == BOS, BOS, 20), jnp.asarray([[1, 0], [1, 0]], jnp.int32)
    for t in range(TARGET.shape[1]):
        both = [inputs[:, t], other[:, t]]
        logits, cache, _ = step(source, cache, jnp.stack(both[::-1] if t % 2 else both, 1), jnp.int32(t))
        np.testing.assert_allclose(logits[:, t % 2], logits_of(variant)[:, t], rtol=1e-4, atol=1e-4)
        cache = cache.reorder(swap)


# Packing, meshes and recomputation treat all fields alike, so that "all" stands for each.
@pytest.mark.slow
@pytest.mark.parametrize("attention", ["blockwise", "plain"])
def test_packed_sentences_get_the_logits_that_they_get_alone(attention):
    """Positions start again with each sentence."""
    rng = np.random.default_rng(0)
    model = module("all", attention=attention)
    sources, targets = sentences(rng, 4, 7), sentences(rng, 4, 7)
    rows = np.array([[0, 1, 2], [3, PAD_EXAMPLE, PAD_EXAMPLE]])
    source, target = (JaggedArray.from_sequences(side).to_padded(rows, 24) for side in (sources, targets))
    packed = np.asarray(jax.jit(functools.partial(model.__class__.__call__, model, packed=True))(source, target))
    place = [0, len(targets[0]), len(targets[0]) + len(targets[1]), 0]
    for i, row in enumerate([0, 0, 0, 1]):
        alone = [JaggedArray.from_sequences([side[i]]).to_padded(np.array([0]), 8) for side in (sources, targets)]
        want = jax.jit(module("all").__call__)(*alone)[0, : len(targets[i])]
        np.testing.assert_allclose(packed[row, place[i] : place[i] + len(targets[i])], want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "batching"), [("all", "pack"), ("rms, gelu", "bucket")])
def test_two_updates_change_every_param_and_lower_the_loss(variant, batching):
    data = {"batching": batching, **({"num_buckets": 8} if batching == "pack" else {})}
    optimizer = {"schedule": "constant", "learning_rate": 3e-3, "warmup_steps": 0}
    config = small_config(model={**FEW, **VARIANTS[variant]}, data=data, optimizer=optimizer)
    mesh, model = make_mesh(config.mesh), ModelDef(config.model, V)
    update, state = train_step.make_train_step(model, config, mesh), train_step.init_state(model, config, mesh)
    before, batch, losses = jax.device_get(state.params), sharding.shard_batch(mesh, draw_batch()), []
    for _ in range(2):
        state, metrics = update(state, batch)
        losses.append(float(metrics.loss.nll / metrics.loss.tokens))
    assert losses[1] < losses[0] < 1.5 * np.log(V)
    moved = jax.tree.map(lambda old, new: np.any(old != new), before, jax.device_get(state.params))
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.slow
def test_a_mesh_trains_like_one_device():
    """Params stored in parts, heads and lengths split, and so ring attention."""
    (grads, losses), (wanted_grads, wanted) = (
        test_mesh.results(test_mesh.config_of(sizes, num_heads=2, dropout_rate=0.0, **VARIANTS["all"]))
        for sizes in ((1, 2, 2, 2), (1, 1, 1, 1))
    )
    np.testing.assert_allclose(losses[0], wanted[0], rtol=1e-5)
    difference = jax.tree.map(np.subtract, grads, wanted_grads)
    assert optax.tree.norm(difference) < 2e-5 * optax.tree.norm(wanted_grads)
    np.testing.assert_allclose(losses, wanted, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("scan", "remat"), [(True, "full"), (True, "none"), (False, "dots")])
def test_scanned_and_recomputed_layers_give_the_same(scan, remat):
    def loss_and_gradient(model, params):
        def objective(params):
            return jnp.square(model.bind(params)(SOURCE, TARGET)).mean()

        return jax.jit(jax.value_and_grad(objective))(params)

    plain, other = model_of("all"), model_of("all", scan_layers=scan, remat=remat)
    wanted, wanted_grads = loss_and_gradient(plain, drawn(plain))
    if scan:
        value, grads = loss_and_gradient(other, stack(drawn(plain)))
        wanted_grads = stack(wanted_grads)
    else:
        value, grads = loss_and_gradient(other, drawn(plain))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, wanted_grads)


@every_variant
def test_flops_are_every_matrix_product_of_the_training_step(variant):
    config, program = traced(8, 6, 7, V, model=VARIANTS[variant])
    assert flops.training_flops(config.model, V, 8, 6, 7) == dot_flops(program.jaxpr)


@pytest.mark.slow
def test_a_plan_counts_the_products_of_the_compiled_program():
    row = planned(model={**FEW, **VARIANTS["all"]}, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    assert row["fits"]
    assert row["flops_per_step"] == row["flops_closed_form"]


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizer.train(LINES, 300, "bpe")


@pytest.mark.parametrize(("variant", "form"), [*(slow(name, "ctranslate2") for name in VARIANTS), slow("all", "jax")])
def test_it_is_exported_or_refused(variant, form, vocabulary, tmp_path):
    pytest.importorskip(verify.NEEDS[form], reason="the export extra is not installed")
    trained = load_checkpoint(save(tmp_path / "run", vocabulary, **VARIANTS[variant]), "latest")
    trained = dataclasses.replace(trained, params=drawn(trained.model))
    (tmp_path / "out").mkdir()
    if form == "ctranslate2" and VARIANTS[variant].get("qk_norm"):
        with pytest.raises(UserError, match=r"model\.qk_norm = True: CTranslate2 .* use --format=jax"):
            verify.write(trained, tmp_path / "out", form)
    else:
        assert verify.write(trained, tmp_path / "out", form)["largest_difference"] < 2e-4


@pytest.mark.slow
def test_what_ctranslate2_supports_works_together(vocabulary, tmp_path):
    pytest.importorskip("ctranslate2", reason="the export extra is not installed")
    fields = {**VARIANTS["all"], "qk_norm": False, "scan_layers": True}
    trained = load_checkpoint(save(tmp_path / "run", vocabulary, **fields), "latest")
    trained = dataclasses.replace(trained, params=drawn(trained.model))
    (tmp_path / "out").mkdir()
    assert 0 < verify.write(trained, tmp_path / "out", "ctranslate2")["largest_difference"] < 2e-4


def test_a_gated_block_of_two_thirds_of_the_width_has_the_params_and_flops_of_a_plain_one():
    plain, gated = (
        small_config(model=fields).model for fields in ({"mlp_dim": 48}, {"mlp_dim": 32, "activation": "geglu"})
    )
    assert flops.training_flops(plain, V, 8, 6, 7) == flops.training_flops(gated, V, 8, 6, 7)
    no_biases = (ModelDef(dataclasses.replace(config, use_bias=False), V) for config in (plain, gated))
    assert len({model.num_params() for model in no_biases}) == 1


def test_products_of_rotated_queries_and_keys_depend_on_their_distance_alone():
    from transformer.attention.rotary import rotate, rotation_at

    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 2, 8)) for i in range(2))

    def product(m, n):
        turned = (rotate(x, rotation_at(jnp.asarray([[at]], jnp.int32), 8)) for x, at in ((q, m), (k, n)))
        return jnp.einsum("bthk,bthk->h", *turned)

    np.testing.assert_allclose(product(3, 5), product(40, 42), rtol=1e-4)
    np.testing.assert_allclose(product(0, 0), jnp.einsum("bthk,bthk->h", q, k), rtol=1e-5)
    assert not np.allclose(product(3, 5), product(5, 3), rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["recurrent", "convolutional"])
def test_encoder_and_decoder_of_other_families_have_their_own_depths(family):
    """As many params as two models of each depth say, and every product counted."""
    fields = of_family(family, encoder_layers=3, decoder_layers=1)
    counts = {
        depth: ModelDef(small_config(model=of_family(family, num_layers=depth)).model, V).num_params()
        for depth in (1, 3)
    }
    config, program = traced(8, 6, 7, V, model=fields)
    assert counts[1] < ModelDef(config.model, V).num_params() < counts[3]
    assert flops.training_flops(config.model, V, 8, 6, 7) == dot_flops(program.jaxpr)
    model = ModelDef(config.model, V)
    bound, inputs = model.bind(drawn(model)), shift_right(TARGET)
    want = jax.jit(bound.__call__)(SOURCE, TARGET)
    source, cache = bound.init_decode(SOURCE, 1, TARGET.shape[1])
    for t in range(TARGET.shape[1]):
        logits, cache, _ = jax.jit(bound.decode_step)(source, cache, inputs[:, t, None], jnp.int32(t))
        np.testing.assert_allclose(logits[:, 0], want[:, t], atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "rotary", "emb_dim": 12, "num_heads": 4}, r"even width per head, got .*num_heads = 3; change"),
        ({"positions": "rotary", "qkv_dim": 10}, r"even width per head, got model\.qkv_dim / num_heads = 5; change"),
        ({"norm_epsilon": 0.0}, r"norm_epsilon: expected above 0, got 0\.0"),
        ({"norm_type": "batch"}, r"norm_type: expected one of layer, rms, got 'batch'"),
        ({"activation": "tanh"}, r"activation: expected one of relu, gelu, silu, swiglu, geglu, got 'tanh'"),
        ({"encoder_layers": -1}, r"encoder_layers: expected at least 0, got -1"),
        (of_family("convolutional", positions="rotary"), r"which family = convolutional does not have"),
        (of_family("recurrent", positions="rotary"), r"positions = rotary: read only with family = attention or conv"),
        (of_family("recurrent", norm_type="rms"), r"norm_type = rms: read only with family = attention"),
        (of_family("convolutional", norm_epsilon=0.1), r"norm_epsilon = 0\.1: read only with family = attention"),
        (of_family("convolutional", activation="gelu"), r"activation = gelu: read only with family = attention"),
        (of_family("recurrent", use_bias=False), r"use_bias = False: read only with family = attention"),
        (of_family("convolutional", qk_norm=True), r"qk_norm = True: read only with family = attention"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    fields = {**fields, **({"qkv_dim": 12, "value_dim": 12} if fields.get("emb_dim") else {})}
    with pytest.raises(UserError, match=re.compile(message)):
        small_config(model=fields)


def test_a_config_without_these_fields_is_the_paper_s_model():
    new = {"encoder_layers", "decoder_layers", "activation", "use_bias", "norm_type", "norm_epsilon", "qk_norm"}
    saved = dataclasses.asdict(schema.Config())
    saved["model"] = {name: value for name, value in saved["model"].items() if name not in new}
    assert validation.validate(saved, strict=False) == schema.Config()
