"""Every field is read or refused, whatever the family and the method; switching either needs no other flag."""

import dataclasses
import functools
import itertools
import json
import re
import sys

import jax
import numpy as np
import pytest

from tests.conftest import small_config
from transformer import command_line
from transformer.config import schema, validation
from transformer.data import tokenizer
from transformer.data.batching import Batch
from transformer.decoding.translator import Translator
from transformer.distributed.mesh import make_mesh
from transformer.models import registry
from transformer.runtime.errors import UserError
from transformer.training import train_step, workdir

pytestmark = pytest.mark.reported

FAMILIES = ("attention", "recurrent", "convolutional")
METHODS = ("beam", "sample", "mbr")
FIELDS = [f"{section}.{field}" for section in schema.SECTIONS for field in schema.field_names(section)]
ANOTHER = {  # for fields of which twice the default, or one more, is no other possible value
    "model.emb_dim": 32,
    "model.kernel_width": 5,
    "model.qkv_init_gain": 0.5,
    "data.mixture": (schema.MixtureEntry(),),
    "data.source_language": "fr",
    "data.target_language": "fr",
    "data.tokenizer": "unigram",
    "optimizer.beta1": 0.5,
    "optimizer.beta2": 0.5,
    "train.spike_factor": 2.0,
    "train.init_checkpoint": "best",
    "decode.top_p": 0.5,
    "eval.metrics": "accuracy",
    "mesh.data": 2,
}


def flags(*given, file="configs/demo.py"):
    return command_line.config_flags(["train.py", f"--config={file}", *(f"--config.{flag}" for flag in given)])[0]


@pytest.fixture(autouse=True)
def _in_root(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.mark.parametrize("family", ["recurrent", "convolutional"])
def test_a_family_on_the_command_line_needs_no_other_flag(family, capsys):
    config = flags(f"model.family={family}")
    assert config.model == dataclasses.replace(
        schema.ModelConfig(), family=family, num_layers=2, emb_dim=128, qkv_dim=128, value_dim=128
    )
    assert "left out of configs/demo.py" in capsys.readouterr().err


FILE = """
from transformer.config import default_config
def get_config():
    config = default_config()
    for name, value in {fields}.items():
        section, field = name.split(".")
        config[section][field] = value
    return config
"""

TEXT = {"data.name": "text", "data.dir": "texts"}
SWITCHES = [  # what a file sets, the flag, and what is then left of it
    ({"model.positions": "learned", "model.max_positions": 600}, "model.positions=sinusoidal", {}),
    ({"model.attention": "blockwise", "mesh.sequence": 2, "mesh.tensor": 2}, "model.family=recurrent", {}),
    ({"model.family": "convolutional", "model.kernel_width": 5}, "model.family=attention", {"model.num_heads": 8}),
    ({"model.qkv_dim": 256}, "model.family=convolutional", {"model.qkv_dim": 512}),
    ({"model.norm_type": "rms", "model.encoder_layers": 3}, "model.family=recurrent", {"model.encoder_layers": 3}),
    ({"data.num_buckets": 3}, "data.batching=pack", {"data.batching": "pack"}),
    ({**TEXT, "data.valid": "", "data.vocab_size": 999}, "data.name=cldr", {"data.vocab_size": 999}),
    ({**TEXT}, "data.train=pairs.tsv", {"data.name": "text", "data.train": "pairs.tsv"}),
    ({"data.name": "wmt14_translate/de-en", "data.manual_dir": "mine"}, "data.name=cldr", {}),
    ({"data.tokenizer": "unigram"}, "train.init_from=runs/base", {"train.init_from": "runs/base"}),
    ({"optimizer.name": "adamw", "optimizer.weight_decay": 0.1}, "optimizer.name=adam", {}),
    ({"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.2}, "optimizer.schedule=linear", {}),
    (
        {"train.ema_decay": 0.9, "optimizer.schedule": "constant"},
        "optimizer.name=schedule_free_adamw",
        {"optimizer.schedule": "constant"},
    ),
    ({"train.spike_factor": 2.0, "train.max_skipped_updates": 3}, "train.spike_factor=0", {}),
    ({"train.consistency": "simcut", "train.cutoff_rate": 0.1}, "train.consistency=rdrop", {}),
    ({"train.init_from": "runs/base", "train.init_checkpoint": "best"}, "train.init_from=", {}),
    ({"decode.beam_size": 5, "decode.early_stopping": True}, "decode.method=mbr", {"decode.method": "mbr"}),
    ({"decode.method": "sample", "decode.top_k": 5}, "decode.method=beam", {"decode.method": "beam"}),
]


@pytest.mark.parametrize(("own", "flag", "left"), SWITCHES)
def test_a_selector_on_the_command_line_leaves_out_what_the_file_sets_for_other_choices(own, flag, left, tmp_path):
    (tmp_path / "own.py").write_text(FILE.format(fields=own))
    config = flags(flag, file=tmp_path / "own.py")
    name, _, value = flag.partition("=")
    for field in {*own, *left} - {name}:
        wanted = left.get(field, own[field] if field == "data.name" else validation.default_value(config, field))
        assert validation.get_field(config, field) == wanted, field
    assert str(validation.get_field(config, name)) in (value, f"{value}.0")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["model.family=recurrent", "model.num_heads=8"], "num_heads = 8: read only with family = attention"),
        (["model.family=recurrent", "model.attention=cudnn"], "attention = cudnn: read only with family = attention"),
        (["model.max_positions=1024"], "max_positions = 1024: read only with positions = learned"),
        (["data.batching=pack", "data.num_buckets=8"], "num_buckets = 8: read only with batching = bucket"),
        (["optimizer.weight_decay=0"], "weight_decay = 0.0: read only with name = adamw or"),
        (["decode.method=mbr", "decode.beam_size=4"], "beam_size = 4: read only with method = beam"),
    ],
)
def test_what_is_itself_given_and_not_read_is_refused_whatever_its_value(given, match):
    with pytest.raises(UserError, match=match):
        flags(*given)


def test_a_file_alone_is_still_held_to_what_is_read(tmp_path):
    (tmp_path / "own.py").write_text(FILE.format(fields={"model.family": "recurrent", "model.num_heads": 4}))
    with pytest.raises(UserError, match="num_heads = 4: read only with family = attention"):
        flags(file=tmp_path / "own.py")


def test_saved_configs_of_earlier_versions_stay_readable_and_resumable(tmp_path):
    kept = {"model": {"max_positions": 512}, "data": {"batching": "pack", "num_buckets": 3}}
    old = validation.from_json(json.dumps(kept), "config.json")
    new = validation.validate({"data": {"batching": "pack"}})
    assert workdir.check_resume_config(tmp_path, old, new) == [
        "model.max_positions: 512 → 1024",
        "data.num_buckets: 3 → 8",
    ]


def another(name, config):
    """A value of a field that differs from its own."""
    section, field = name.split(".")
    one_of = next(each for each in dataclasses.fields(schema.SECTIONS[section]) if each.name == field).metadata
    value = validation.get_field(config, name)
    if name in ANOTHER:
        return ANOTHER[name]
    if one_of["one_of"]:
        return next(choice for choice in one_of["one_of"] if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "another"
    return value / 2 + 0.1 if isinstance(value, float) else 2 * value or 1


def recorded(config, reads):
    """The config, which adds to `reads` what is read of it outside config and validation."""

    def section(name):
        kind = type(getattr(config, name))

        def get(self, field):
            code = sys._getframe(1).f_code
            in_property = isinstance(vars(kind).get(code.co_name), property)  # read through the schema
            in_config = code.co_filename.endswith(("dataclasses.py", "schema.py", "validation.py", ">"))
            if not field.startswith("_") and (in_property or not in_config):
                reads.add(f"{name}.{field}")
            return object.__getattribute__(self, field)

        recording = type(kind.__name__, (kind,), {"__getattribute__": get})
        return recording(**dataclasses.asdict(getattr(config, name)))

    return schema.Config(**{name: section(name) for name in schema.SECTIONS})


def config_of(family, method, **model):
    plain = {} if family == "attention" else {"num_heads": 8, "mlp_dim": 2048}
    decode = {} if method == "beam" else {"method": method, "beam_size": 4}
    return small_config(model={"family": family, "num_layers": 1, **plain, **model}, decode=decode)


@functools.cache
def reads_of_training(family, **model):
    reads = set()
    config = recorded(config_of(family, "beam", **model), reads)
    mesh = make_mesh(config.mesh)
    trained = registry.ModelDef(config.model, 300)
    batch = Batch(*(jax.ShapeDtypeStruct((8, width), np.int32) for width in (6, 7)))
    train_step.make_train_step(trained, config, mesh).trace(train_step.abstract_state(trained, config, mesh), batch)
    return reads


@functools.cache
def reads_of_decoding(method):
    reads = set()
    config = recorded(config_of("recurrent", method), reads)
    vocabulary = tokenizer.train(["a few words to translate"], 275, "bpe")
    model = registry.ModelDef(config.model, vocabulary.vocab_size)
    mesh = make_mesh(config.mesh)
    state = train_step.init_state(model, config, mesh)
    Translator([model], vocabulary, config.decode, mesh).translate([state.params], ["a few"])
    return reads


@functools.cache
def text_of_the_package(root):
    """All code but the schema and its checks, where a field that is read must be named."""
    paths = [path for path in (root / "transformer").rglob("*.py") if path.parent.name != "config"]
    return "\n".join(path.read_text() for path in paths)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_read_or_refused(family, root):
    """In each method. What training and decoding on the device do not read, the host must."""
    refused_count = 0
    for method, name in itertools.product(METHODS, FIELDS):
        config = config_of(family, method)
        value = another(name, config)
        assert value != validation.get_field(config, name), name
        changed = validation.replace_field(config, name, value)
        if name in validation.inapplicable_fields(config):
            with pytest.raises(UserError, match=name):
                validation.check_consistency(changed)
            refused_count += 1
        elif name.startswith(("model.", "optimizer.")):
            assert name in reads_of_training(family), f"{name} is neither read nor refused with {family}"
        elif name.startswith("decode."):
            assert name in reads_of_decoding(method), f"{name} is neither read nor refused with {method}"
        else:
            field = name.partition(".")[2]
            assert re.search(rf"\.{field}\b|_{field.partition('_')[2]}\"\)", text_of_the_package(root)), name
    assert refused_count > 30
    if family != "recurrent":
        assert "model.max_positions" in reads_of_training(family, positions="learned")
