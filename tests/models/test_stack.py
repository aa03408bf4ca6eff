"""Layers scanned or written out, recomputed or kept: the same numbers from other programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import small_config
from tests.models.test_transformer import SOURCE, TARGET, V
from transformer.models.registry import ModelDef
from transformer.runtime.errors import UserError

LAYERS = 2


def model_of(**fields):
    return ModelDef(small_config(model={"num_layers": LAYERS, **fields}).model, V)


def loss_of(model, key=None):
    return lambda params: jnp.square(model.bind(params)(SOURCE, TARGET, key)).mean()


def stack(params):
    """The params of a model of written-out layers as those of a scanned one."""
    return {
        name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *value.values())
        if name in ("encoder", "decoder")
        else value
        for name, value in params.items()
    }


def test_stacked_params_are_those_of_each_layer():
    """Drawn for each layer by itself, so that their scale is that of one layer."""
    scanned, written = model_of(scan_layers=True).init(0), model_of().init(0)
    jax.tree.map(np.testing.assert_array_equal, scanned, stack(written))
    assert scanned["encoder"]["mlp"]["kernel_in"].shape == (LAYERS, 16, 32)


def test_stacked_params_have_an_axis_for_the_layers():
    params = nnx.to_flat_state(model_of(scan_layers=True).abstract_params)
    axes = {path: param.get_metadata()["axes"] for path, param in params}
    assert axes["decoder", "cross", "query"] == ("layers", "embed", "heads", "kv")
    assert axes["embeddings", "shared", "table"] == ("vocab", "embed")


@functools.cache
def written_out():
    """Params of layers one after the other, their loss with dropout and its gradient."""
    plain = model_of()
    params = plain.init(0)
    return params, *jax.jit(jax.value_and_grad(loss_of(plain, jax.random.key(1))))(params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scan", "remat"), [(False, "dots"), (False, "full"), (True, "none"), (True, "dots"), (True, "full")]
)
def test_values_and_gradients_are_the_same(scan, remat):
    """With dropout; tests/models/test_variants.py has none."""
    other = model_of(scan_layers=scan, remat=remat)
    params, wanted, wanted_grads = written_out()
    if scan:
        params, wanted_grads = stack(params), stack(wanted_grads)
    value, grads = jax.jit(jax.value_and_grad(loss_of(other, jax.random.key(1))))(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, wanted_grads)


@pytest.mark.slow
def test_scanned_layers_decode_the_same():
    plain, scanned = model_of(), model_of(scan_layers=True)
    params = plain.init(0)
    for t, inputs in enumerate([2, 7, 9]):
        logits = []
        for model, held in ((plain, params), (scanned, stack(params))):
            module = model.bind(held)
            source, cache = module.init_decode(SOURCE, 1, 4)
            logits.append(module.decode_step(source, cache, jnp.full((2, 1), inputs, jnp.int32), jnp.int32(t))[0])
        np.testing.assert_allclose(*logits, atol=1e-6)


def products(**fields):
    """Matrix products in the program of a gradient."""
    model = model_of(**fields)
    return jax.jit(jax.grad(loss_of(model))).lower(model.init(0)).as_text().count("stablehlo.dot_general")


@pytest.mark.slow
def test_what_is_not_kept_is_computed_again():
    """dots: scores and weighted values alone, of one attention in the encoder and two in the decoder."""
    kept, dots, full = (products(remat=remat) for remat in ("none", "dots", "full"))
    assert dots == kept + LAYERS * 3 * 2 or kept < dots < kept + LAYERS * 3 * 2
    assert full > dots


@pytest.mark.slow
def test_a_scanned_program_is_as_long_for_any_number_of_layers():
    assert products(scan_layers=True) == products(scan_layers=True, num_layers=3) < products()


@pytest.mark.slow
def test_decay_spares_stacked_vectors():
    from transformer.training.optimizer import make_optimizer

    config = small_config(
        model={"num_layers": LAYERS, "scan_layers": True}, optimizer={"name": "adamw", "weight_decay": 0.5}
    )
    params = jax.tree.map(jnp.ones_like, ModelDef(config.model, V).init(0))
    optimizer = make_optimizer(config)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    layer = updates["encoder"]
    assert (layer["mlp"]["bias_in"] == 0).all()
    assert (layer["mlp_residual"]["norm"]["scale"] == 0).all()
    assert (layer["mlp"]["kernel_in"] != 0).all()
    assert (updates["embeddings"]["shared"]["table"] != 0).all()


def test_a_run_of_scanned_layers_is_not_resumed_written_out(tmp_path):
    from etils import epath

    from transformer.training import workdir

    folder, old = epath.Path(tmp_path), small_config()
    assert workdir.check_resume_config(folder, old, small_config(model={"remat": "full", "attention": "ring"}))
    with pytest.raises(UserError, match=r"model\.scan_layers: False → True"):
        workdir.check_resume_config(folder, old, small_config(model={"scan_layers": True}))
