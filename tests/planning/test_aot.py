"""The training step of the big model of WMT14, in bfloat16, compiled for accelerators that are not here.

Of one layer of six: they are alike. make test-gpu and make test-tpu compile all widths, make test-all too where it
finds the compiler.
"""

import jax
import pytest

from configs import wmt14
from transformer.config.validation import validate
from transformer.distributed.mesh import make_mesh
from transformer.models import flops as cost
from transformer.planning import aot, hlo_cost
from transformer.planning.hardware import parse_topology
from transformer.planning.hlo import Program

ODD_AND_EVEN = [35, *(pytest.param(width, marks=pytest.mark.slow) for width in (38, 40, 640))]


def compiled(topology, attention, width):
    """The program for a batch of this width, its FLOPs and those of the closed form."""
    fields = wmt14.get_config("en_de_big")
    fields.model.update({"num_layers": 1, "dtype": "bfloat16", "attention": attention})
    fields.data.max_length = max(width, fields.data.max_length)
    config = validate(fields)
    mesh = make_mesh(config.mesh, aot.topology_devices(parse_topology(topology)))
    rows = aot.batch_rows(config, mesh, width)
    text = aot.compile_step(config, mesh, rows, width, -1.0).text
    closed = cost.training_flops(config.model, config.data.vocab_size, rows, width, width)
    return text, hlo_cost.count_flops(Program(text)) * mesh.size, closed


@pytest.mark.gpu
@pytest.mark.parametrize("width", ODD_AND_EVEN)
def test_the_big_model_compiles_for_an_h100(width):
    text, flops, closed = compiled("h100:1", "plain", width)
    assert '"__cublas$lt$matmul"' in text
    assert flops == pytest.approx(closed, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("width", ODD_AND_EVEN)
def test_the_big_model_compiles_for_an_h100_with_cudnn(width):
    text, flops, closed = compiled("h100:1", "cudnn", width)
    assert text.count('"__cudnn$fmhaSoftmax"') == text.count('"__cudnn$fmhaSoftmaxBackward"') == 3
    assert flops == pytest.approx(closed, rel=0.05)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("variant", "traffic", "temporaries"), [("base", 80e9, 13e9), ("big", 132e9, 19e9)])
def test_a_step_of_25000_tokens_on_an_h200_moves_few_bytes(variant, traffic, temporaries):
    """By cuDNN at length 40, which auto takes there; plain attention and a gathered loss moved 103 and 183 GB."""
    fields = wmt14.get_config(f"en_de_{variant}")
    fields.model.dtype = "bfloat16"
    config = validate(fields)
    mesh = make_mesh(config.mesh, aot.topology_devices(parse_topology("h200:1")))
    step = aot.compile_step(config, mesh, 624, 40, 0.0)
    assert hlo_cost.hbm_bytes(Program(step.text)) < traffic
    assert step.temporaries < temporaries


@pytest.mark.tpu
@pytest.mark.parametrize("width", ODD_AND_EVEN)
def test_the_big_model_compiles_for_a_tpu(width):
    _, flops, closed = compiled("v5e:2x2", "plain", width)
    assert flops == pytest.approx(closed, rel=0.02)


@pytest.mark.tpu
@pytest.mark.parametrize("width", ODD_AND_EVEN)
def test_the_big_model_compiles_for_a_tpu_with_splash(width):
    """Which fills lengths up to 128."""
    text, flops, closed = compiled("v5e:2x2", "splash", width)
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert text.count(f"%{kernel}") >= 3
    assert flops > 0.98 * closed


HOST_TRANSFERS = ("infeed", "outfeed", "send", "recv")


def check_products_and_transfers(text):
    """All matrix products are of bfloat16, and nothing leaves the chip while the step runs."""
    program = Program(text)
    runs = list(program.iter_executed())
    products = [run for run in runs if hlo_cost._instruction_flops(run)]
    assert len(products) > 30
    dtypes = {hlo_cost._operand_array(run, side).dtype for run in products for side in (0, 1)}
    assert dtypes == {"bf16"}
    assert not [run.instruction.name for run in runs if run.instruction.opcode.removesuffix("-done") in HOST_TRANSFERS]
    assert "host_compute" not in text


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", pytest.param("v6e:2x2", marks=pytest.mark.slow)])
def test_a_step_on_a_tpu_multiplies_bfloat16_and_transfers_nothing(topology):
    check_products_and_transfers(compiled(topology, "auto", 40)[0])


@pytest.mark.gpu
def test_a_step_on_a_gpu_multiplies_bfloat16_and_transfers_nothing():
    check_products_and_transfers(compiled("h200:1", "auto", 40)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("topology", ["h200:1", "b200:1"])
def test_other_gpus_are_described_well_enough_to_compile_for(topology):
    (device,) = aot.topology_devices(parse_topology(topology))
    assert device.device_kind == f"NVIDIA {topology[:4].upper()}"
    one = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((64, 64), "bfloat16", sharding=one)
    options = aot.compiler_options("cuda", -1.0)
    lowered = jax.jit(lambda x: x @ x).trace(x).lower(lowering_platforms=("cuda",))
    assert "__cublas" in lowered.compile(compiler_options=options).as_text()
