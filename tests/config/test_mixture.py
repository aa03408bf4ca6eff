"""What a mixture may be, and what it means: directions, tags, shares, stages; every refusal is before JAX."""

import dataclasses
import json
import subprocess
import sys

import pytest

from transformer import command_line
from transformer.config import Config, default_config, mixture, schema, validation
from transformer.config.validation import validate
from transformer.data import mixture_corpus
from transformer.runtime.errors import UserError
from transformer.training import workdir


def entry(target="de", source="en", **fields):
    return {"name": "cldr", "source_language": source, "target_language": target, "tag": f"<2{target}>", **fields}


def config_of(*entries, **data):
    return {"data": {"mixture": entries, **data}, "train": {"num_steps": 100}}


def test_a_mixture_survives_json_and_a_config_file_and_the_command_line(root, monkeypatch):
    monkeypatch.chdir(root)
    config = default_config()
    config.data.mixture = [entry("de", weight=2), entry("fr", weight=0.5)]
    checked = validate(config)
    assert [each.weight for each in checked.data.mixture] == [2.0, 0.5]
    assert validation.from_json(checked.to_json(), "config.json") == checked == validate(dataclasses.asdict(checked))
    text = json.dumps([entry("de", weight=2), entry("fr", weight=0.5)])
    flags = ["train.py", "--config=configs/demo.py", f"--config.data.mixture={text}"]
    assert command_line.config_flags(flags)[0].data.mixture == checked.data.mixture


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([entry(weight=0)], "entry 1, weight: expected above 0, got 0.0"),
        ([entry(), entry("fr", weight=-1)], "entry 2, weight: expected above 0, got -1.0"),
        ([entry(weight=float("nan"))], "entry 1, weight: expected a finite number, got nan"),
        ([entry(), entry("fr", tag="<2de>")], "entries 1 and 2 translate to de and fr, with one tag for two languages"),
        ([entry(tag=""), entry("fr", tag="")], "with no tag with the same source, en; set a tag for each"),
        ([entry(), entry(tag="<bt>")], "both translate en to de: expected one tag, .* is an origin_tag"),
        ([entry(), entry("fr", origin_tag="<2de>")], "entry 2: origin_tag = <2de> is the tag of a language"),
        ([entry(tag="2de")], "entry 1: expected a tag such as <2de>, got '2de'"),
        ([entry(tag="<unk>")], "expected a tag such as <2de>, got '<unk>'"),
        ([entry(until_step=10), entry("fr", from_step=20)], "of train.num_steps = 100 updates, got none .* 11 to 20;"),
        ([entry(from_step=20)], "got none for updates 1 to 20;"),
        ([entry(until_step=90)], "got none for updates 91 to 100;"),
        ([entry(), entry("fr", from_step=100)], "entry 2: expected from_step below train.num_steps = 100, .* got 100"),
        ([entry(from_step=20, until_step=10)], "expected until_step above from_step = 20, or 0 for no end, got 10"),
        ([entry(wieght=1)], "entry 1: unknown field 'wieght'; did you mean 'weight'?"),
        ([entry(), 5], "entry 2: expected a dict of fields such as weight, got 5"),
        ("de", "expected a list of entries, got 'de'"),
        ([entry("en")], "entry 1, en to en: .*are both 'en'"),
        ([entry(name="text")], "entry 1, en to de: .* set exactly one of dir"),
    ],
)
def test_what_cannot_be_is_one_message(entries, match):
    with pytest.raises(UserError, match=match):
        validate({"data": {"mixture": entries}, "train": {"num_steps": 100}})


@pytest.mark.parametrize("name", ["name", "source_language", "target_language", "dir", "train", "columns"])
def test_fields_of_a_single_source_are_refused_with_a_mixture(name):
    with pytest.raises(UserError, match=rf"data.{name} = other: read only without mixture, got mixture = 1 entries"):
        validate(config_of(entry(), **{name: "other"}))


@pytest.mark.parametrize("name", ["dir", "train", "valid", "columns"])
def test_files_of_an_entry_that_reads_none_are_refused(name):
    with pytest.raises(UserError, match=rf"entry 1, .*data.{name}: read only with name = 'text', got name = 'cldr'"):
        validate(config_of({"name": "cldr", "source_language": "en", "target_language": "de", name: "1,2"}))


def test_a_mixture_is_batched_by_bucket():
    with pytest.raises(UserError, match=r"data.batching = pack: a mixture makes rows of one sentence"):
        validate(config_of(entry(), batching="pack"))
    with pytest.raises(UserError, match=r"data.subword_dropout = 0.1: not supported with a mixture"):
        validate(config_of(entry(), subword_dropout=0.1))


def test_a_temperature_is_zero_or_not_too_low():
    with pytest.raises(UserError, match=r"expected 0 \(by weight alone\), or at least 0.1, got 0.01"):
        validate(config_of(entry(), mixture_temperature=0.01))


def test_a_temperature_needs_a_mixture():
    with pytest.raises(UserError, match=r"mixture_temperature = 2.0: read only with mixture"):
        validate({"data": {"mixture_temperature": 2.0}})


@pytest.mark.parametrize(
    ("temperature", "wanted"),
    [(0, [0.25, 0.75]), (1, [0.75, 0.25]), (2, [0.5, 0.5]), (0.1, [1.0, 0.0])],
)
def test_shares_are_by_weight_and_pairs_to_the_power_of_one_over_temperature(temperature, wanted):
    """Weights 1 and 3, pairs 9 and 1: 1 x 9^(1/T) against 3 x 1."""
    data = validate(config_of(entry(), entry("fr", weight=3), mixture_temperature=temperature)).data
    assert mixture.shares(data, [900, 100]) == pytest.approx(wanted, abs=1e-6)
    assert mixture.shares(data, [900, 100], [1]) == [0.0, 1.0]


def test_stages_begin_where_an_entry_joins_or_leaves():
    data = validate(config_of(entry(until_step=50), entry("fr", from_step=20), entry("es", from_step=20))).data
    assert mixture.stages(data) == [(0, [0]), (20, [0, 1, 2]), (50, [1, 2])]


def test_a_direction_has_the_data_of_its_first_entry_that_is_no_other_origin():
    back = entry(origin_tag="<bt>", weight=3)
    data = validate(config_of(back, entry(), entry("fr"), entry("en", "de"))).data
    found = mixture.directions(data)
    assert [(each.name, each.tag, each.entry) for each in found] == [
        ("en-de", "<2de>", 1),
        ("en-fr", "<2fr>", 2),
        ("de-en", "<2en>", 3),
    ]
    assert found[0].data == dataclasses.replace(Config().data, mixture=())
    assert mixture.tags(data) == ["<2de>", "<bt>", "<2fr>", "<2en>"]
    assert mixture.find_tag(data, None, "de") == "<2de>"
    with pytest.raises(UserError, match="translates en-de, en-fr, de-en: expected target_language to choose one"):
        mixture.find_tag(data, None, None)
    with pytest.raises(UserError, match="no direction any to es: this model translates en-de, en-fr, de-en"):
        mixture.find_tag(data, None, "es")
    with pytest.raises(UserError, match="expected one direction, got en-de, en-fr"):
        mixture.find_direction(data, "en", None)


def test_both_directions_without_tags_need_no_choice():
    data = validate(config_of(entry(tag=""), entry("en", "de", tag=""))).data
    assert mixture.find_tag(data, None, None) == ""


def test_without_a_mixture_there_is_one_direction():
    data = Config().data
    assert mixture.directions(data) == [mixture.Direction(data)]
    assert mixture.find_tag(data, None, "de") == ""
    with pytest.raises(UserError, match="no direction any to fr: this model translates en-de"):
        mixture.find_tag(data, None, "fr")


def files(folder, **texts):
    for name, text in texts.items():
        (folder / name).write_text(text)


def test_an_empty_source_is_refused_before_it_is_prepared(tmp_path):
    files(tmp_path, good="a\tb\n", none="", blank="\ta\nb\t\n \t \n", a="x\n", b="\n")
    for name in ("good", "none", "blank"):
        (tmp_path / name).rename(tmp_path / f"{name}.tsv")
    good = {"name": "text", "train": f"{tmp_path}/good.tsv"}
    for own in (
        {"train": f"{tmp_path}/none.tsv"},
        {"train": f"{tmp_path}/blank.tsv"},
        {"train_source": f"{tmp_path}/a", "train_target": f"{tmp_path}/b"},
    ):
        config = validate(config_of(entry(**good), entry("fr", name="text", **own)))
        with pytest.raises(UserError, match=r"entry 2, en to fr: .*expected pairs of sentences to train on, got none"):
            mixture_corpus.validate_sources(config.data)
    mixture_corpus.validate_sources(validate(config_of(entry(**good))).data)


def test_two_directions_of_one_tsv_file_need_other_columns(tmp_path):
    (tmp_path / "x.tsv").write_text("a\tb\n")
    both = [entry(name="text", train=f"{tmp_path}/x.tsv"), entry("en", "de", name="text", train=f"{tmp_path}/x.tsv")]
    with pytest.raises(UserError, match="entries 1 and 2 are two directions with the same columns"):
        mixture_corpus.validate_sources(validate(config_of(*both)).data)
    both[1]["columns"] = "2,1"
    mixture_corpus.validate_sources(validate(config_of(*both)).data)
    (tmp_path / "x.jsonl").write_text('{"a": "x", "b": "y"}\n')
    for each in both:
        each.update(train=f"{tmp_path}/x.jsonl", columns="a,b")
    with pytest.raises(UserError, match=r"the same columns of .*; set columns='b,a' in the one"):
        mixture_corpus.validate_sources(validate(config_of(*both)).data)
    (tmp_path / "x.jsonl").write_text('{"en": "x", "de": "y"}\n')
    for each in both:
        each.update(columns="1,2", valid=f"{tmp_path}/x.tsv")  # of the TSV; keys are the languages
    mixture_corpus.validate_sources(validate(config_of(*both)).data)


def test_files_may_move_and_weights_may_not(tmp_path):
    old = validate(config_of(entry(name="text", dir="a")))
    moved, other = (validate(config_of(entry(name="text", **own))) for own in ({"dir": "b"}, {"dir": "a", "weight": 2}))
    assert len(workdir.check_resume_config(tmp_path, old, moved)) == 1
    with pytest.raises(UserError, match=r"data.mixture: "):
        workdir.check_resume_config(tmp_path, old, other)


def test_paths_of_entries_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = schema.with_absolute_paths(validate(config_of(entry(name="text", dir="a"))))
    assert config.data.mixture[0].dir == str(tmp_path / "a")


def test_jax_is_not_imported(root):
    program = (
        "import sys, transformer.data.mixture_corpus, transformer.data.mixture_schedule, transformer.training.session\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


def test_a_resumed_run_is_told_which_entry_differs():
    old = validate(config_of(entry(), entry("fr", weight=2.0)))
    new = validate(config_of(entry(), entry("fr", weight=3.0, origin_tag="<bt>")))
    assert [str(change) for change in schema.diff(old, new)] == [
        "data.mixture: entry 2, weight: 2.0 → 3.0, entry 2, origin_tag: '' → '<bt>'"
    ]
    assert [str(change) for change in schema.diff(validate(config_of(entry())), old)] == ["data.mixture: 1 entries → 2"]
