"""The closed form against the program that the devices run, and the sums of a run."""

import itertools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from tests.conftest import small_config
from transformer.config import ModelConfig, schema, validation
from transformer.data.batching import Batch
from transformer.distributed.mesh import make_mesh
from transformer.models import flops as cost
from transformer.models import registry
from transformer.models.flops import TrainingCost
from transformer.training import train_step

V = 40


def dot_flops(jaxpr):
    """FLOPs of all matrix products of a program, those inside a loop as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        assert equation.primitive.name not in ("while", "cond", "conv_general_dilated", "pallas_call")
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            total += times * dot_flops(inner) if hasattr(inner, "eqns") else 0
    return total


def traced(rows, source, target, vocab_size, **sections):
    """The training step of a config, traced for one batch shape."""
    config = small_config(**sections)
    mesh = make_mesh(config.mesh)
    model = registry.ModelDef(config.model, vocab_size)
    batch = Batch(*(jax.ShapeDtypeStruct((rows, width), np.int32) for width in (source, target)))
    update = train_step.make_train_step(model, config, mesh)
    return config, update.trace(train_step.abstract_state(model, config, mesh), batch)


def of_family(family, **fields):
    """Fields of a small model; those that its family does not read are at their defaults."""
    unread = () if family == "attention" else ("num_heads", "mlp_dim")
    return {**{name: schema.field_default("model", name) for name in unread}, "family": family, **fields}


MODELS = {
    "small": {},
    "pre-norm": {"norm": "pre", "positions": "learned", "max_positions": 100},
    "three layers": {"num_layers": 3, "attention_dropout_rate": 0.1, "mlp_dropout_rate": 0.1},
    "narrow keys": {"qkv_dim": 8, "value_dim": 24},
    "wide heads": {"qkv_dim": 64, "value_dim": 32, "mlp_dim": 20},
    "three tables": {"share_embeddings": False},
    "bfloat16": {"dtype": "bfloat16"},
    "recurrent": of_family("recurrent"),
    "recurrent, additive": of_family("recurrent", attention_score="additive"),
    "one recurrent layer": of_family("recurrent", num_layers=1, emb_dim=10),
    "convolutional": of_family("convolutional"),
    "wide convolutions": of_family("convolutional", kernel_width=5),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_closed_form_is_every_matrix_product_of_the_training_step(model):
    config, program = traced(8, 6, 7, V, model=MODELS[model])
    assert cost.training_flops(config.model, V, 8, 6, 7) == dot_flops(program.jaxpr)


SIZES = {  # the fields that change products, where the family reads them
    "num_layers": (1, 3),
    "emb_dim": (10, 16),
    "qkv_dim": (8, 16),
    "value_dim": (16, 24),
    "mlp_dim": (20, 32),
    "kernel_width": (3, 5),
    "attention_score": ("dot", "additive"),
}


@pytest.mark.slow
@pytest.mark.reported
@pytest.mark.parametrize("family", ["attention", "recurrent", "convolutional"])
def test_the_closed_form_is_every_product_for_every_combination_of_sizes(family):
    inapplicable = validation.inapplicable_fields(small_config(model=of_family(family)))
    names = [name for name in SIZES if f"model.{name}" not in inapplicable]
    ids = [jax.ShapeDtypeStruct((4, width), np.int32) for width in (6, 9)]
    for values in itertools.product(*(SIZES[name] for name in names)):
        sizes = dict(zip(names, values, strict=True))
        config = small_config(model=of_family(family, **sizes)).model
        model = registry.ModelDef(config, V)
        params = nnx.to_pure_dict(model.abstract_params)
        program = jax.make_jaxpr(lambda params, *ids, model=model: model.bind(params)(*ids))(params, *ids)
        assert cost.forward_flops(config, V, 4, 6, 9) == dot_flops(program.jaxpr), sizes


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_one_after_the_other_cost_as_much_as_at_once(parts):
    config, program = traced(8, 6, 7, V, train={"accumulation_steps": parts})
    assert cost.training_flops(config.model, V, 8, 6, 7) == dot_flops(program.jaxpr)


def test_the_forward_pass_is_a_third():
    config = small_config()
    model = registry.ModelDef(config.model, V)
    ids = [jax.ShapeDtypeStruct((8, width), np.int32) for width in (6, 7)]
    forward = jax.make_jaxpr(lambda params, *ids: model.bind(params)(*ids))(model.init(0), *ids)
    assert cost.forward_flops(config.model, V, 8, 6, 7) == dot_flops(forward.jaxpr)


@pytest.mark.slow
def test_the_compiled_program_counts_little_more():
    """XLA counts elementwise work too, which these widths keep below 5%."""
    sizes = {"num_layers": 1, "emb_dim": 128, "qkv_dim": 128, "value_dim": 128, "mlp_dim": 512, "dropout_rate": 0.0}
    config, program = traced(16, 24, 32, 1000, model=sizes)
    compiled = program.lower().compile().cost_analysis()["flops"]
    assert 1.0 <= compiled / cost.training_flops(config.model, 1000, 16, 24, 32) < 1.05


def test_a_batch_costs_what_its_rectangles_do():
    batch = Batch(np.zeros((4, 6), np.int32), np.zeros((4, 9), np.int32))
    model = ModelConfig()
    assert cost.batch_flops(model, V, batch) == cost.training_flops(model, V, 4, 6, 9)
    assert cost.batch_flops(model, V, batch, passes=2) == cost.training_flops(model, V, 8, 6, 9)


def test_the_paper_s_base_model_makes_fair_use_of_the_paper_s_hardware():
    """Table 2 says 3.3e18, which is what 8 GPUs could do in the time of its 100,000 steps of 25,000 tokens a side."""
    flops = 100_000 * cost.training_flops(ModelConfig(), 37_000, 1000, 25, 25)
    assert 0.2 < flops / 3.3e18 < 0.5


def test_what_was_spent_survives_a_checkpoint():
    spent = TrainingCost(flops=1.5e18, tokens=28_800_000, source_tokens=2e7, seconds=2556.0)
    assert TrainingCost.from_metrics(spent.metrics()) == spent
    assert TrainingCost.from_metrics({"valid/bleu": 30.0}) is None
    assert spent.metrics()["train/hours"] == 0.71


@pytest.mark.parametrize(
    ("spent", "text"),
    [
        (TrainingCost(1.24e15, 28_800_000, 0, 2556), "28.8 M target tokens, 1.2e+15 FLOPs, 0.71 hours"),
        (TrainingCost(3.3e18, 5_230_000_000, 0, 43_200), "5.2 G target tokens, 3.3e+18 FLOPs, 12.00 hours"),
        (TrainingCost(2e6, 999, 0, 1), "999 target tokens, 2.0e+06 FLOPs, 0.00 hours"),
    ],
)
def test_it_is_shown_in_few_digits(spent, text):
    assert str(spent) == text
