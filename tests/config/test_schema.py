"""What a config may be: every refusal names the field, what was expected and what was got."""

import dataclasses
import json
import math

import pytest

from transformer.config import Config, default_config, schema, validation
from transformer.config.validation import validate
from transformer.runtime.errors import UserError

NUMBERS = [
    (section, field.name, field)
    for section, kind in schema.SECTIONS.items()
    for field in dataclasses.fields(kind)
    if field.type in (int, float)
]
FLOATS = [(section, name) for section, name, field in NUMBERS if field.type is float]
SCHEDULE_FREE = {"name": "schedule_free_adamw", "schedule": "constant"}
ACCURACY = {"eval": {"metrics": "accuracy"}}
INTS = [(section, name) for section, name, field in NUMBERS if field.type is int]


def refused(match, **sections):
    values = dataclasses.asdict(Config())
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields} if isinstance(fields, dict) else fields
    with pytest.raises(UserError, match=match):
        validate(values)


def test_the_defaults_are_valid_and_survive_json():
    config = validate(default_config())
    assert config == Config() == validation.from_json(config.to_json(), "config.json")


def test_a_saved_config_without_a_section_has_its_defaults():
    """As an earlier version wrote it."""
    values = json.loads(Config().to_json())
    assert values.pop("eval")["metrics"] == "bleu,chrf,ter"
    assert validation.from_json(json.dumps(values), "config.json") == Config()


def test_metrics_are_named_once():
    assert validate({"eval": {"metrics": "rougeL,bleu,rougeL"}}).eval.metric_names == ("rougeL", "bleu")


def test_every_field_is_documented_and_has_a_default_of_its_type():
    for section, kind in schema.SECTIONS.items():
        for field in dataclasses.fields(kind):
            assert len(field.metadata["doc"]) > 8, f"{section}.{field.name}"
            assert type(field.default) is field.type


def test_key_and_value_widths_follow_the_model_width_until_they_are_set():
    config = default_config()
    config.model.emb_dim = 64
    assert validate(config).model.qkv_dim == validate(config).model.value_dim == 64
    direct = schema.ModelConfig(emb_dim=64)
    assert (direct.qkv_dim, direct.value_dim) == (64, 64)
    assert schema.ModelConfig(emb_dim=64, qkv_dim=32) == schema.ModelConfig(emb_dim=64, qkv_dim=32, value_dim=64)
    assert validate({"model": {"emb_dim": 64}}) == validate(config)
    config.model.qkv_dim = 32
    assert (validate(config).model.qkv_dim, validate(config).model.value_dim) == (32, 64)
    config.model.value_dim = 128
    assert (validate(config).model.qkv_dim, validate(config).model.value_dim) == (32, 128)


def test_paths_become_absolute_and_addresses_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = {"name": "text", "dir": "corpus", "data_dir": "gs://bucket/data", "tokenizer": "a.model"}
    got = schema.with_absolute_paths(validate({"data": data})).data
    assert (got.dir, got.data_dir) == (str(tmp_path / "corpus"), "gs://bucket/data")
    assert (got.tokenizer, got.train) == (str(tmp_path / "a.model"), "")
    assert schema.with_absolute_paths(Config()) == Config()


def test_a_config_file_cannot_invent_fields():
    with pytest.raises(AttributeError):
        default_config().model.dropuot_rate = 0.1


@pytest.mark.parametrize(("section", "name"), FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "0.1", True, None])
def test_no_number_is_not_a_number(section, name, value):
    refused(rf"config\.{section}\.{name}: expected", **{section: {name: value}})


@pytest.mark.parametrize(("section", "name"), INTS)
@pytest.mark.parametrize("value", [-2, 2**31, 1.5, "2", True, None])
def test_no_count_is_not_a_count(section, name, value):
    refused(rf"config\.{section}\.{name}: expected", **{section: {name: value}})


ZERO_IS_FINE = {
    ("model", "encoder_layers"),
    ("model", "decoder_layers"),
    ("model", "qkv_dim"),
    ("model", "value_dim"),
    ("train", "seed"),
    ("train", "keep_best"),
    ("train", "early_stopping_patience"),
    ("data", "filter_min_length"),
    ("data", "filter_max_length"),
    ("optimizer", "warmup_steps"),
    ("eval", "validation_sentences"),
    ("eval", "validation_beam_size"),
    ("decode", "min_length"),
    ("decode", "no_repeat_ngram"),
    ("decode", "top_k"),
    ("decode", "batch_rows"),
    ("decode", "seed"),
}


@pytest.mark.parametrize(("section", "name"), [pair for pair in INTS if pair not in ZERO_IS_FINE])
def test_zero_is_refused_where_something_is_needed(section, name):
    refused(rf"config\.{section}\.{name}: expected", **{section: {name: 0}})


IMPOSSIBLE = [
    (r"config: unknown field 'modle'; did you mean 'model'", {"modle": {}}),
    (r"config\.model: unknown field 'num_layer'; did you mean 'num_layers'", {"model": {"num_layer": 3}}),
    (r"config\.eval\.metrics: unknown name 'acuracy'; did you mean 'accuracy'", {"eval": {"metrics": "bleu,acuracy"}}),
    (r"config\.eval\.metrics: unknown name ''; known: bleu, chrf", {"eval": {"metrics": ""}}),
    (r"config\.train: unknown field 'zzz'; known: num_steps", {"train": {"zzz": 3}}),
    (r"config\.model: expected a section of fields, got 3", {"model": 3}),
    (r"num_heads = 7 does not divide qkv_dim = 512", {"model": {"num_heads": 7}}),
    (r"num_heads = 8 does not divide value_dim = 100", {"model": {"value_dim": 100}}),
    (r"expected an even width, required by sinusoidal positions; got 33", {"model": {"emb_dim": 33}}),
    (
        r"rotary: expected an even width per head, got model\.qkv_dim / num_heads = 5; change qkv_dim or num_heads",
        {"model": {"positions": "rotary", "qkv_dim": 40}},
    ),
    (r"norm: expected one of post, pre, got 'middle'", {"model": {"norm": "middle"}}),
    (r"dtype: expected one of float32, bfloat16, got 'float16'", {"model": {"dtype": "float16"}}),
    (r"dropout_rate: expected at most 0.99, got 1.0", {"model": {"dropout_rate": 1.0}}),
    (r"max_positions: learned positions must cover", {"model": {"positions": "learned", "max_positions": 100}}),
    (r"share_embeddings: expected bool, got 1 of type int", {"model": {"share_embeddings": 1}}),
    (r"vocab_size: expected at least 8, got 0", {"data": {"vocab_size": 0}}),
    (r"both 'de'", {"data": {"source_language": "de"}}),
    (r"source_language: expected a language code", {"data": {"source_language": "../en"}}),
    (r"source_language: expected a language code", {"data": {"source_language": ""}}),
    (r"tokenizer: expected bpe, unigram or the path", {"data": {"tokenizer": "wordpiece"}}),
    (r"train_source = a: read only with name = text, got name = cldr", {"data": {"train_source": "a"}}),
    (r"set exactly one of dir.*got none", {"data": {"name": "text"}}),
    (r"set exactly one of dir.*got dir, train", {"data": {"name": "text", "dir": "x", "train": "y.tsv"}}),
    (r"train_source and train_target go together", {"data": {"name": "text", "train_source": "x"}}),
    (
        r"valid_source and valid_target go together",
        {"data": {"name": "text", "train": "x.tsv", "valid_target": "y"}},
    ),
    (r"batch_tokens: expected at least one sentence", {"train": {"batch_tokens": 100}}),
    (
        r"batch_tokens: expected at least one sentence of data\.max_length rounded up to data\.length_multiple = 104",
        {"data": {"max_length": 100, "length_multiple": 8}, "train": {"batch_tokens": 100}},
    ),
    (
        r"max_positions: .* 1032 = max\(data\.max_length rounded up to data\.length_multiple, .*got 1028",
        {"data": {"max_length": 1028, "length_multiple": 8}, "model": {"positions": "learned", "max_positions": 1028}},
    ),
    (r"length_multiple: expected at least 1, got 0", {"data": {"length_multiple": 0}}),
    (r"subword_dropout: expected at most 0.999999, got 1", {"data": {"subword_dropout": 1}}),
    (r"subword_dropout: expected at least 0, got -0.1", {"data": {"subword_dropout": -0.1}}),
    (
        r"subword_dropout = 0.1: .*: expected data\.tokenizer = bpe, .*, got unigram; change it, or set",
        {"data": {"subword_dropout": 0.1, "tokenizer": "unigram"}},
    ),
    (r"subword_dropout = 0.1: .* got my\.codes;", {"data": {"subword_dropout": 0.1, "tokenizer": "my.codes"}}),
    (
        r"weight_decay = 0.1: read only with name = adamw or nadamw or .*, got name = adam;",
        {"optimizer": {"weight_decay": 0.1}},
    ),
    (
        r"schedule: schedule_free_adamw averages .*: expected constant, .* got paper; set schedule to constant",
        {"optimizer": {"name": "schedule_free_adamw"}},
    ),
    (r"schedule_free_adamw averages .* got wsd", {"optimizer": {"name": "schedule_free_adamw", "schedule": "wsd"}}),
    (r"beta1: .* schedule_free_adamw: expected above 0", {"optimizer": {**SCHEDULE_FREE, "beta1": 0.0}}),
    (
        r"ema_decay = 0.9: read only with optimizer.name = adam or adamw or nadamw or muon, got .*_free_adamw; leave",
        {"optimizer": SCHEDULE_FREE, "train": {"ema_decay": 0.9}},
    ),
    (r"decay_fraction = 0.2: read only with schedule = wsd, got", {"optimizer": {"decay_fraction": 0.2}}),
    (r"decay_fraction: expected at most 1", {"optimizer": {"schedule": "wsd", "decay_fraction": 1.5}}),
    (
        r"decay_fraction = 0.5: the last 50 of train\.num_steps = 100 overlap with optimizer\.warmup_steps = 60; lower",
        {"optimizer": {"schedule": "wsd", "decay_fraction": 0.5, "warmup_steps": 60}, "train": {"num_steps": 100}},
    ),
    (
        r"the wsd schedule falls .* to 0 at train\.num_steps = 100",
        {"optimizer": {"schedule": "wsd", "warmup_steps": 100}, "train": {"num_steps": 100}},
    ),
    (r"warmup_steps: the paper schedule needs at least 1", {"optimizer": {"warmup_steps": 0}}),
    (
        r"warmup_steps: the cosine schedule falls .* to 0 at train\.num_steps = 100: expected fewer steps, got 100",
        {"optimizer": {"schedule": "cosine", "warmup_steps": 100}, "train": {"num_steps": 100}},
    ),
    (
        r"the linear schedule falls .* train\.num_steps = 300: expected fewer steps, got 4000; change either. A quick "
        r"trial needs both lowered, such as optimizer\.warmup_steps = 30$",
        {"optimizer": {"schedule": "linear"}, "train": {"num_steps": 300}},
    ),
    (
        r"best_metric: expected auto, loss, bleu, chrf or one of eval\.metrics = bleu,chrf,ter, got accuracy; add it",
        {"train": {"best_metric": "accuracy"}},
    ),
    (r"best_metric: expected .* eval\.metrics = accuracy, got ter", {**ACCURACY, "train": {"best_metric": "ter"}}),
    (r"best_metric: expected one of auto, loss, bleu, .*, got 'f1'", {"train": {"best_metric": "f1"}}),
    (
        r"num_buckets = 3: read only with batching = bucket, got batching = pack; leave num_buckets out",
        {"data": {"num_buckets": 3, "batching": "pack"}},
    ),
    (r"schedule: expected one of", {"optimizer": {"schedule": "step"}}),
    (r"epsilon: expected above 0, got 0", {"optimizer": {"epsilon": 0.0}}),
    (r"config\.mesh\.data: expected -1", {"mesh": {"data": 0}}),
    (r"config\.mesh\.tensor: expected at least -1, got -2", {"mesh": {"tensor": -2}}),
    (r"-1 in at most one field, got it in data and fsdp; set mesh\.data to", {"mesh": {"fsdp": -1}}),
    (r"mesh\.tensor = 3 does not divide model\.num_heads = 8; set mesh\.tensor to 1", {"mesh": {"tensor": 3}}),
    (
        r"mesh\.fsdp = 3 does not divide model\.emb_dim = 512; set mesh\.fsdp to 1$",
        {"mesh": {"fsdp": 3}},
    ),
    (
        r"mesh\.tensor = 8 does not divide data\.vocab_size = 4001; set mesh\.tensor to 1, or .* vocabulary of 4008",
        {"mesh": {"tensor": 8}, "data": {"vocab_size": 4001}},
    ),
    (r"remat: expected one of none, dots, full", {"model": {"remat": "some"}}),
    (r"spike_factor: expected 0 \(off\), or above 1, such as 2, got 1", {"train": {"spike_factor": 1.0}}),
    (r"max_skipped_updates = 3: read only with spike_factor", {"train": {"max_skipped_updates": 3}}),
    (r"consistency: expected one of none, rdrop, simcut", {"train": {"consistency": "r-drop"}}),
    (r"consistency_weight = 5.0: read only with consistency = rdrop or simcut", {"train": {"consistency_weight": 5.0}}),
    (
        r"cutoff_rate = 0.1: read only with consistency = simcut, got consistency = rdrop",
        {"train": {"consistency": "rdrop", "cutoff_rate": 0.1}},
    ),
    (r"consistency_weight: expected at least 0, got -1", {"train": {"consistency": "rdrop", "consistency_weight": -1}}),
    (r"cutoff_rate: expected above 0, got 0", {"train": {"consistency": "simcut", "cutoff_rate": 0}}),
    (r"cutoff_rate: expected at most 0.999999, got 1", {"train": {"consistency": "simcut", "cutoff_rate": 1}}),
    (
        r"rdrop: .* expected model\.dropout_rate or model\.attention_dropout_rate or .* above 0, got 0; set it, or",
        {"train": {"consistency": "rdrop"}, "model": {"dropout_rate": 0.0}},
    ),
    (
        r"rdrop: .* expected model\.dropout_rate above 0, got 0; set it, or consistency to simcut or none",
        {"train": {"consistency": "rdrop"}, "model": {"dropout_rate": 0.0, "family": "recurrent"}},
    ),
]


@pytest.mark.parametrize(("match", "sections"), IMPOSSIBLE)
def test_what_cannot_be_is_refused_with_a_message(match, sections):
    refused(match, **sections)


def test_any_dropout_serves_rdrop_and_simcut_needs_none():
    for name in ("attention_dropout_rate", "mlp_dropout_rate"):
        validate({"train": {"consistency": "rdrop"}, "model": {"dropout_rate": 0.0, name: 0.1}})
    validate({"train": {"consistency": "simcut"}, "model": {"dropout_rate": 0.0}})


def test_a_whole_number_is_a_float_but_not_the_other_way_round():
    assert validate({"optimizer": {"clip_norm": 5}}).optimizer.clip_norm == 5.0
    refused("expected int, got 5.0", train={"num_steps": 5.0})


@pytest.mark.parametrize("values", [None, 3, [], "model"])
def test_what_is_no_config_is_refused(values):
    with pytest.raises(UserError, match="expected sections"):
        validate(values)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"num_layers": "six"}}'])
def test_a_damaged_config_file_is_refused(text):
    with pytest.raises(UserError):
        validation.from_json(text, "config.json")


def test_saved_configs_of_earlier_versions_stay_readable():
    kept = {
        "data": {"batching": "pack", "num_buckets": 4},
        "decode": {"method": "mbr", "beam_size": 1},
        "optimizer": {"schedule": "cosine", "warmup_steps": 4000},
        "train": {"num_steps": 2000},
    }
    for section, field in (("data", "num_buckets"), ("decode", "beam_size"), ("optimizer", "warmup_steps")):
        refused(field, **{section: kept[section]}, train=kept["train"])
    read = validation.from_json(json.dumps(kept), "config.json")
    assert (read.data.num_buckets, read.decode.beam_size, read.optimizer.warmup_steps) == (4, 1, 4000)
    assert validation.override_decode(read, {"method": "beam"}).decode.beam_size == 1
    with pytest.raises(UserError, match="beam_size = 2: read only with method = beam"):
        validation.override_decode(read, {"beam_size": 2})


def test_differences_name_field_old_and_new():
    old, new = validate({}), validate({"train": {"seed": 3}, "model": {"norm": "pre"}})
    assert list(map(str, schema.diff(old, new))) == ["model.norm: 'post' → 'pre'", "train.seed: 0 → 3"]


def test_other_decode_fields_are_checked_with_the_whole():
    config = validate({"model": {"positions": "learned", "max_positions": 562}})
    changed = validation.override_decode(config, {"beam_size": 7, "length_penalty": 1})
    assert changed == dataclasses.replace(
        config, decode=dataclasses.replace(config.decode, beam_size=7, length_penalty=1.0)
    )
    with pytest.raises(UserError, match="learned positions must cover the longest sequence, 563"):
        validation.override_decode(config, {"max_extra_length": 51})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"top_k": 5},
            r"top_k = 5: read only with method = sample or mbr, got method = beam; leave top_k out .default: 0",
        ),
        ({"temperature": 0.5}, "temperature = 0.5: read only with"),
        ({"top_p": 0.5}, "top_p = 0.5: read only with"),
        ({"seed": 1}, "seed = 1: read only with"),
        ({"mbr_samples": 5, "method": "sample"}, "mbr_samples = 5: read only with method = mbr"),
        ({"coverage_penalty": 0.2, "method": "mbr"}, "coverage_penalty = 0.2: read only with method = beam"),
        ({"early_stopping": True, "method": "mbr"}, "early_stopping = True: read only with method = beam"),
        ({"beam_size": 8, "method": "sample"}, "beam_size = 8: read only with method = beam"),
        ({"length_penalty": 2.0, "method": "mbr"}, "length_penalty = 2.0: read only with method = beam or sample"),
        ({"length_penalty_form": "length", "method": "mbr"}, "length_penalty_form = length: read only with"),
    ],
)
def test_no_decode_field_is_set_where_nothing_reads_it(fields, match):
    refused(match, decode=fields)
    with pytest.raises(UserError, match=match):
        validation.override_decode(validate({}), fields)


@pytest.mark.parametrize(
    ("own", "fields", "left"),
    [
        (
            {"early_stopping": True, "coverage_penalty": 0.2, "beam_size": 5, "length_penalty": 1.0, "min_length": 3},
            {"method": "sample", "top_k": 5},
            {"length_penalty": 1.0, "min_length": 3},
        ),
        ({"early_stopping": True, "length_penalty_form": "length"}, {"method": "mbr"}, {}),
        ({"method": "sample", "temperature": 0.7, "top_k": 5}, {"method": "beam"}, {}),
        ({"method": "sample", "temperature": 0.7}, {"method": "mbr"}, {"temperature": 0.7}),
        ({"beam_size": 5, "early_stopping": True}, {"min_length": 3}, {"beam_size": 5, "early_stopping": True}),
    ],
)
def test_another_method_leaves_behind_what_it_does_not_read(own, fields, left):
    changed = validation.override_decode(validate({"decode": own}), fields)
    assert changed.decode == dataclasses.replace(schema.DecodeConfig(), **{**left, **fields})


def test_what_is_given_is_read_whatever_its_value():
    """A default that is asked for by name is no less ignored."""
    for own, fields in (({}, {"method": "sample", "beam_size": 4}), ({"method": "mbr"}, {"length_penalty": 0.6})):
        with pytest.raises(UserError, match=r"read only with .*; leave \w+ out"):
            validation.override_decode(validate({"decode": own}), fields)


def test_methods_read_their_fields():
    validate({"decode": {"method": "sample", "top_k": 5, "top_p": 0.5, "temperature": 0.5, "seed": 1}})
    validate({"decode": {"method": "mbr", "mbr_samples": 5}})
    validate({"decode": {"coverage_penalty": 0.2}})


def test_the_best_metric_is_one_that_validation_computes():
    """A saved config with another one is still read."""
    for metric in ("auto", "loss", "bleu", "chrf", "accuracy"):
        assert validate({**ACCURACY, "train": {"best_metric": metric}}).train.best_metric == metric
    saved = {"train": {"best_metric": "accuracy"}}
    assert validate(saved, strict=False).train.best_metric == "accuracy"
    changed = validation.to_dataclasses(saved)
    with pytest.raises(UserError, match="best_metric: expected auto"):
        validation.check_consistency(changed, strict=False, given={"eval.metrics"})


def test_the_last_update_of_a_schedule_may_be_its_peak():
    for fields in ({"schedule": "linear"}, {"schedule": "wsd", "decay_fraction": 0.01}):
        validate({"optimizer": {**fields, "warmup_steps": 99}, "train": {"num_steps": 100}})
