"""The mesh and the table: what is split by what, and messages where it cannot be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.conftest import small_config
from tests.helpers.compilation import CompileCounter
from transformer.config import MeshConfig
from transformer.data.batching import Batch, Bucket, BucketedSchedule
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh, mesh_shape
from transformer.models import registry
from transformer.runtime.errors import UserError
from transformer.training import train_step


@pytest.mark.parametrize(
    ("fields", "devices", "shape"),
    [
        ({}, 8, (8, 1, 1, 1)),
        ({"fsdp": 4}, 8, (2, 4, 1, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, 8, (1, 4, 2, 1)),
        ({"data": 2, "sequence": 3}, 6, (2, 1, 1, 3)),
        ({"data": 1}, 8, (1, 1, 1, 1)),
        ({"tensor": 8, "sequence": -1, "data": 1}, 8, (1, 1, 8, 1)),
    ],
)
def test_sizes_of_a_mesh(fields, devices, shape):
    assert mesh_shape(MeshConfig(**fields), devices) == shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": 9}, r"mesh\.data = 9 asks for 9 devices: found only 8 devices"),
        ({"data": 2, "fsdp": 8}, r"mesh\.data = 2, mesh\.fsdp = 8 asks for 16 devices: found only 8"),
        (
            {"tensor": 3},
            r"the 8 devices cannot be divided by 3 to fill mesh\.data; set mesh\.data to 2 to use 6 of them",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_an_error(fields, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**fields))


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU, as far as a mesh looks at it."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


TWO_SLICES = [Chip(16 * k + 4 * y + x, (x, y, 0), k, 4 * k + y) for k in (0, 1) for y in range(4) for x in range(4)]


@pytest.mark.parametrize(
    ("fields", "shape"), [({}, (32, 1, 1, 1)), ({"fsdp": 4, "tensor": 2}, (4, 4, 2, 1)), ({"fsdp": 16}, (2, 16, 1, 1))]
)
def test_data_alone_goes_across_slices_of_tpus(fields, shape):
    devices = make_mesh(MeshConfig(**fields), TWO_SLICES[::-1]).devices
    assert devices.shape == shape
    assert [{chip.slice_index for chip in half.flat} for half in np.split(devices, 2)] == [{0}, {1}]
    assert len({chip.id for chip in devices.flat}) == 32


def test_a_model_that_would_be_shared_among_slices_is_refused():
    message = r"mesh\.data = 1: the 32 TPUs are 2 slices, .* to a multiple of 2, or to -1 .* to a divisor of 16"
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(fsdp=32), TWO_SLICES)


def test_the_rows_of_an_activation_keep_its_width_whole():
    assert sharding.logical_to_mesh(("batch", "length", "embed")) == P(("data", "fsdp"), "sequence", None)
    assert sharding.logical_to_mesh(("vocab", "embed")) == P("tensor", "fsdp")
    assert sharding.logical_to_mesh(("embed", "heads", "kv")) == P("fsdp", "tensor", None)
    assert sharding.logical_to_mesh((None, "mlp")) == P(None, "tensor")


@pytest.mark.parametrize("axes", [None, ("embed",), ("width", "embed")])
def test_a_param_that_the_table_does_not_match_is_an_error(axes):
    abstract = nnx.State({"kernel": nnx.Param(jax.ShapeDtypeStruct((4, 4), jnp.float32), axes=axes)})
    with pytest.raises(ValueError, match=r"expected a name for each axis|no rule for the logical axis"):
        sharding.param_shardings(make_mesh(MeshConfig()), abstract)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 1, "fsdp": -1}, r"config\.mesh\.fsdp = 8 does not divide model\.emb_dim = 20; set mesh\.fsdp to 4"),
        ({"data": 2, "tensor": -1}, r"config\.mesh\.tensor = 4 does not divide model\.num_heads = 2"),
    ],
)
def test_a_model_that_the_mesh_does_not_divide_is_an_error_before_anything_compiles(mesh, message):
    config = small_config(model={"emb_dim": 20, "qkv_dim": 20, "value_dim": 20}, mesh=mesh)
    model = registry.ModelDef(config.model, 300)
    with pytest.raises(UserError, match=message):
        train_step.init_state(model, config, make_mesh(config.mesh))


def test_without_a_mesh_or_with_one_device_nothing_is_constrained():
    x = jnp.ones((2, 3, 4))
    axes = ("batch", "length", "embed")
    assert sharding.with_logical_constraint(x, axes) is x
    with sharding.use_mesh(make_mesh(MeshConfig(data=1))):
        assert sharding.with_logical_constraint(x, axes) is x
        assert sharding.all_gather_param(x, axes) is x
        assert sharding.num_shards("batch") == 1
    with sharding.use_mesh(make_mesh(MeshConfig(data=2, sequence=4))):
        assert (sharding.num_shards("batch"), sharding.num_shards("length"), sharding.num_shards("vocab")) == (2, 4, 1)


def test_a_param_is_whole_where_it_is_used_and_its_gradient_is_split():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    axes = ("embed", "mlp")
    stored = jax.sharding.NamedSharding(mesh, sharding.logical_to_mesh(axes))

    def used(param):
        with sharding.use_mesh(mesh):
            return sharding.all_gather_param(param, axes)

    param = jax.device_put(np.ones((8, 8), np.float32), stored)
    value, pull = jax.jit(used)(param), jax.jit(jax.grad(lambda param: jnp.square(used(param)).sum()))
    assert value.addressable_shards[0].data.shape == (8, 4)
    assert pull(param).addressable_shards[0].data.shape == (2, 4)


@pytest.mark.parametrize(("parts", "times"), [(1, ""), (14, ""), (16, "1.3"), (64, "5.3")])
def test_padding_for_devices_and_micro_batches_is_logged(parts, times):
    """Batches of 96 rows become 112, 128 or 512 on 8 devices."""
    lengths = np.full(960, 20)
    plan = BucketedSchedule(lengths, lengths, num_buckets=2, batch_tokens=20 * 96, max_length=20, seed=0)
    warning = sharding.padding_warning(make_mesh(MeshConfig()), plan, parts)
    assert (
        (f"steps = {parts} must divide the rows: padding makes them {times} times" in warning)
        if times
        else warning == ""
    )


def test_padding_of_rare_batches_is_little():
    lengths = np.append(np.full(960, 20), 480)
    plan = BucketedSchedule(lengths, lengths, num_buckets=2, batch_tokens=20 * 96, max_length=480, seed=0)
    assert [bucket.rows for bucket in plan.buckets] == [96, 4]
    assert sharding.padding_warning(make_mesh(MeshConfig()), plan, 1) == ""


def test_rows_and_widths_are_filled_up_to_divide():
    """So the plan of batches need not know the mesh."""
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    batch = Batch(np.ones((5, 7), np.int32), np.ones((5, 8), np.int32))
    placed = sharding.shard_batch(mesh, batch, num_micro_batches=2)
    assert (placed.source_BS.shape, placed.target_BT.shape) == ((8, 8), (8, 8))
    assert int(placed.source_BS.sum()) == 35
    ahead = sharding.abstract_batch(mesh, Bucket(7, 8, 5), num_micro_batches=2)
    for abstract, array in zip(ahead, placed, strict=True):
        assert (abstract.shape, abstract.dtype, abstract.sharding) == (array.shape, array.dtype, array.sharding)
    sentences = sharding.shard_batch(mesh, batch.source_BS, rows="decode_batch")
    assert sentences.shape == (8, 7)
    assert {shard.data.shape for shard in sentences.addressable_shards} == {(1, 7)}


def test_several_hosts_trace_the_gathering_of_params_once(monkeypatch):
    """Every validation gathers them."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    split = jax.device_put(np.arange(16.0, dtype=np.float32), sharding.NamedSharding(mesh, P("fsdp")))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with CompileCounter() as counter:
        for _ in range(3):
            whole = sharding.replicate(mesh, {"param": split})["param"]
    assert whole.sharding.is_fully_replicated
    np.testing.assert_array_equal(jax.device_get(whole), np.arange(16))
    assert counter.count == 1
