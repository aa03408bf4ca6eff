"""Ring attention against the plain path on one device: values, gradients, dropout, memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.attention.test_blockwise import B, K, cases, draw, segments
from tests.conftest import slow
from transformer.attention import dispatch, dot_product
from transformer.attention.mask import AttentionMask
from transformer.attention.ring import ring_attention
from transformer.config import MeshConfig
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh

HEADS = ("batch", "length", "heads", "kv")


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**{"data": 1, **sizes}))


def on(mesh, function):
    """The function compiled on a mesh, of arguments and results that are whole on each device."""

    def traced(*arguments):
        with sharding.use_mesh(mesh):
            return function(*arguments)

    everywhere = sharding.replicated(mesh)
    return jax.jit(traced, in_shardings=everywhere, out_shardings=everywhere)


def compare(attend, plain, q, k, v, sees, mesh):
    """Where `sees`, values of both, and gradients through them."""
    weight = jnp.where(sees, draw(6, q.shape[1], v.shape[-1]), 0.0)

    def total(function):
        return lambda *qkv: ((function(*qkv) * weight).sum(), jnp.where(sees, function(*qkv), 0.0))

    wanted, wanted_value = jax.jit(jax.grad(total(plain), (0, 1, 2), has_aux=True))(q, k, v)
    got, value = on(mesh, jax.grad(total(attend), (0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(value, wanted_value, atol=1e-5)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("lengths", [slow((32, 32)), (12, 28)], ids=str)
@pytest.mark.parametrize("kind", [slow(kind) if kind != "causal segments" else kind for kind in cases(1, 4)])
def test_values_and_gradients_are_those_of_the_plain_path(kind, lengths):
    """In blocks that do not divide a device's part of the length."""
    queries, keys = lengths
    if "causal" in kind:
        keys = queries
    visible = cases(queries, keys)[kind]
    mask = jnp.broadcast_to(visible.materialize(queries, keys), (B, 1, queries, keys))
    real = 1 if visible.q_segment_ids_BT is None else visible.q_segment_ids_BT
    sees = (mask.any(-1)[:, 0] & (real != 0))[..., None, None]
    compare(
        lambda *qkv: ring_attention(*qkv, visible, block=3),
        lambda *qkv: dot_product.dot_product_attention(*qkv, mask),
        *(draw(3, queries), draw(4, keys), draw(5, keys, K + 2)),
        sees,
        mesh_of(tensor=2, sequence=4),
    )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"sequence": 4}, {"data": 2, "tensor": 2, "sequence": 2}], ids=str)
def test_dropout_draws_the_same_bits_on_any_path_and_mesh(sizes):
    visible, key = AttentionMask(segments(0, 16, 0), segments(0, 16, 0), causal=True), jax.random.key(5)
    mask = visible.materialize(16, 16)
    compare(
        lambda *qkv: ring_attention(*qkv, visible, 0.4, key, block=3),
        lambda *qkv: dot_product.dot_product_attention(*qkv, mask, 0.4, key),
        *(draw(seed, 16) for seed in range(3)),
        True,
        mesh_of(**sizes),
    )


def test_the_path_is_chosen_by_the_mesh():
    def chosen(path, sequence):
        result = []
        mesh = mesh_of(sequence=sequence)
        with sharding.use_mesh(mesh):
            result.append(dispatch.resolve(path, 8, 8))
        return result[0]

    assert [chosen(path, 2) for path in ("auto", "ring", "blockwise", "plain")] == [
        "ring",
        "ring",
        "blockwise",
        "plain",
    ]
    assert [chosen(path, 1) for path in ("auto", "ring", "blockwise")] == ["plain", "blockwise", "blockwise"]


def compiled_gradient(length, devices):
    """The gradient of causal attention, compiled for arrays that so many devices share."""
    mesh = mesh_of(sequence=devices)
    where = jax.sharding.NamedSharding(mesh, sharding.logical_to_mesh(HEADS))
    shape = jax.ShapeDtypeStruct((1, length, 1, K), jnp.float32)

    def gradient(*qkv):
        with sharding.use_mesh(mesh):
            return jax.grad(lambda *qkv: ring_attention(*qkv, AttentionMask(causal=True), block=64).sum(), (0, 1, 2))(
                *qkv
            )

    return jax.jit(gradient, in_shardings=where, out_shardings=where).lower(shape, shape, shape).compile()


def test_a_ring_sends_its_keys_round_and_gathers_nothing():
    text = compiled_gradient(512, 8).as_text()
    assert "collective-permute" in text
    assert not re.search("all-gather|all-to-all|all-reduce", text)


@pytest.mark.slow
def test_memory_is_divided_by_the_devices_and_linear_in_length():
    """Bytes of temporary arrays on each device; the blocks at work are the same for all."""
    used = {
        (length, devices): compiled_gradient(length, devices).memory_analysis().temp_size_in_bytes
        for length, devices in ((4096, 2), (4096, 8), (16384, 2), (16384, 8), (65536, 8))
    }
    of_blocks = 1e5
    for length in (4096, 16384):
        assert used[length, 8] - of_blocks < used[length, 2] / 4
        assert used[4 * length, 8] < 4.2 * used[length, 8]
    assert used[16384, 2] > 10 * of_blocks
