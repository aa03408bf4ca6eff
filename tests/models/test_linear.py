"""Products with a kernel: the einsum's values and gradients, as one product of matrices where that is faster."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.attention.dot_product import einsum_f32
from transformer.config import MeshConfig
from transformer.distributed import platform as platforms
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models.linear import linear

SHAPES = {
    "...d,df->...f": ((2, 3, 4), (4, 5)),
    "...d,dhk->...hk": ((2, 3, 4), (4, 2, 3)),
    "...hk,hkd->...d": ((2, 3, 2, 4), (2, 4, 5)),
    "...d,vd->...v": ((3, 4), (7, 4)),
    "...d,de->...e": ((2, 3, 5, 4), (4, 6)),
}


def operands(subscripts):
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(SHAPES[subscripts])]


@pytest.mark.parametrize("subscripts", SHAPES)
@pytest.mark.parametrize("einsum", [jnp.einsum, einsum_f32], ids=["einsum", "einsum_f32"])
def test_values_and_gradients_are_those_of_the_einsum(subscripts, einsum, program_platform):
    x, kernel = operands(subscripts)

    def value(product):
        return lambda x, kernel: (jnp.sin(product(x, kernel)).sum(), product(x, kernel))

    got, wanted = (
        jax.value_and_grad(value(product), argnums=(0, 1), has_aux=True)(x, kernel)
        for product in (
            lambda x, kernel: linear(subscripts, x, kernel, einsum),
            lambda x, kernel: jnp.einsum(subscripts, x, kernel),
        )
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)


def summed_axes(subscripts, mesh=None):
    """The most axes over which a product sums, forward or in the gradient of the kernel."""
    x, kernel = operands(subscripts)

    def loss(kernel):
        with sharding.use_mesh(mesh or make_mesh(MeshConfig(data=1))):
            return jnp.sin(linear(subscripts, x, kernel)).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(kernel)
    dots = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert len(dots) == 2
    return max(len(dot.params["dimension_numbers"][0][0]) for dot in dots)


@pytest.mark.parametrize("subscripts", ["...d,df->...f", "...d,dhk->...hk"])
def test_a_kernel_s_gradient_sums_over_one_axis_on_a_cpu(subscripts):
    assert summed_axes(subscripts) == 1


def test_axes_stay_on_accelerators_and_where_they_are_sharded(monkeypatch):
    subscripts = "...d,df->...f"
    for axis in ("data", "fsdp", "sequence"):
        assert summed_axes(subscripts, make_mesh(MeshConfig(**{"data": 1, axis: 2}))) == 2
    monkeypatch.setattr(platforms, "current", lambda: "gpu")
    assert summed_axes(subscripts) == 2
