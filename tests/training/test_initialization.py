"""A run may start from params that another has trained: those, its vocabulary, and nothing else of it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest

from tests.checkpoints.test_manager import flip, make_parts, save, save_three
from tests.conftest import small_config
from transformer import command_line
from transformer.checkpoints.manager import CheckpointManager
from transformer.config import MixtureEntry, schema, validation, warm_start
from transformer.data import tokenizer
from transformer.distributed.mesh import make_mesh
from transformer.models import registry
from transformer.runtime.errors import UserError, WorkdirError
from transformer.training import initialization, workdir


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir whose checkpoint N holds the params of `make_parts` plus N."""
    workdir = save_three(tmp_path_factory.mktemp("saved"))
    make_parts()[1].save(workdir / "tokenizer")
    return workdir


def config_of(saved, model=None, optimizer=None, **train):
    return small_config(
        optimizer=optimizer or {},
        model={"num_layers": 1, **(model or {})},
        data={"vocab_size": 280},
        mesh={"data": 4},
        train={"seed": 7, "init_from": str(saved), **train},
    )


def first_state(config):
    model, mesh = registry.ModelDef(config.model, config.data.vocab_size), make_mesh(config.mesh)
    return initialization.initial_state(initialization.resolve_warm_start(config), model, config, mesh)


def test_a_tag_that_the_base_has_not_is_warned_of():
    def data(tag, language="fr"):
        entry = MixtureEntry(dir="d", source_language="en", target_language=language, tag=tag)
        return dataclasses.replace(small_config().data, mixture=(entry,))

    plain = dataclasses.replace(small_config().data, source_language="en", target_language="fr")
    assert initialization.tag_warning(data("<2fr>"), data("<2fr>")) == ""
    assert initialization.tag_warning(data("<2fr>"), data("<2de>", "de")) == ""
    assert initialization.tag_warning(plain, plain) == ""
    missing = "sources of en-fr have <2fr> before them there, no tag here"
    assert missing in initialization.tag_warning(data("<2fr>"), plain)
    assert "no tag before them there, <2fr> here" in initialization.tag_warning(plain, data("<2fr>"))


@pytest.mark.slow
@pytest.mark.parametrize(("which", "added"), [("latest", 100), ("best", 9), ("10", 10), ("average:2", 55)])
def test_params_are_those_of_the_checkpoint_and_all_else_is_new(saved, which, added, capsys):
    state = first_state(config_of(saved, init_checkpoint=which, ema_decay=0.9, num_steps=50))
    wanted = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(added), make_parts()[4].params)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, 1e-6), state.params, wanted)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    assert int(state.step) == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    assert {leaf.sharding.mesh.size for leaf in jax.tree.leaves(state.params)} == {4}
    assert "starting from the params of" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("which", "added"), [("latest", 3), ("average:1", 0)])
def test_of_a_base_with_a_moving_average_that_is_what_a_checkpoint_means(tmp_path, which, added):
    config, vocabulary, _, _, state = make_parts()
    config = validation.replace_field(config, "train.ema_decay", 0.9)
    moved = jax.tree.map(lambda leaf: leaf + np.float32(3), state.params)
    CheckpointManager(tmp_path).save(state._replace(ema=moved), config, vocabulary, {}, {})
    vocabulary.save(tmp_path / "tokenizer")
    got = first_state(config_of(tmp_path, init_checkpoint=which)).params
    jax.tree.map(lambda new, old: np.testing.assert_allclose(new, np.asarray(old) + added, 1e-6), got, state.params)


def test_the_average_is_updated_apart_from_the_params(saved):
    state = first_state(config_of(saved, ema_decay=0.9))
    assert all(leaf is not twin for leaf, twin in zip(*map(jax.tree.leaves, (state.params, state.ema)), strict=True))


@pytest.mark.slow
def test_schedule_free_begins_with_the_params_of_the_other_run(saved):
    """Both of its sequences."""
    state = first_state(config_of(saved, optimizer={"name": "schedule_free_adamw", "schedule": "constant"}))
    jax.tree.map(np.testing.assert_array_equal, optax.tree.get(state.opt_state, "z"), state.params)
    wanted = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(100), make_parts()[4].params)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, 1e-6), state.params, wanted)


def test_what_is_only_for_training_may_differ_and_the_model_may_not(saved):
    other = {"dropout_rate": 0.3, "attention_dropout_rate": 0.1, "remat": "full"}
    config = config_of(saved, other)
    kept = dataclasses.replace(config, model=dataclasses.replace(config.model, max_positions=99))  # no longer possible
    assert initialization.resolve_warm_start(kept).steps == [100]
    with pytest.raises(
        UserError, match=r"its model differs: model\.mlp_dim: 32 → 64; model\.norm: 'post' → 'pre'\. Set"
    ):
        initialization.resolve_warm_start(config_of(saved, {"norm": "pre", "mlp_dim": 64}))


def test_another_vocabulary_than_the_checkpoint_s_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    tokenizer.train(["quite another text of no such trees"], 280, "bpe").save(tmp_path / "run" / "tokenizer")
    with pytest.raises(UserError, match="not the vocabulary that checkpoint 100 was trained with"):
        initialization.resolve_warm_start(config_of(tmp_path / "run"))


def test_a_checkpoint_that_is_not_there_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"init_checkpoint = 11: .*one of \[9, 10, 100\], got '11'"):
        initialization.resolve_warm_start(config_of(saved, init_checkpoint="11"))
    make_parts()[1].save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="found no checkpoint"):
        initialization.resolve_warm_start(config_of(tmp_path))
    save(tmp_path, make_parts(), 5)
    flip(tmp_path / "checkpoints" / "5" / "config.json")
    with pytest.raises(WorkdirError, match=r"none of the checkpoints \[5\] is valid"):
        initialization.resolve_warm_start(config_of(tmp_path))


def test_without_init_from_there_is_no_warm_start():
    assert initialization.resolve_warm_start(small_config()) is None


def test_the_vocabulary_is_that_of_the_other_run(saved, tmp_path):
    named = tokenizer.inherit_tokenizer(config_of(saved))
    assert tokenizer.load_configured(named).digest == make_parts()[1].digest
    assert dataclasses.replace(named, tokenizer="bpe") == config_of(saved).data
    with pytest.raises(UserError, match=r"vocab_size = 300, but .* has 280 tokens; set data\.vocab_size = 280"):
        tokenizer.load_configured(tokenizer.inherit_tokenizer(small_config(train={"init_from": str(saved)})))
    with pytest.raises(UserError, match=r"expected a workdir that train\.py wrote, but tokenizer"):
        tokenizer.inherit_tokenizer(config_of(tmp_path))
    with pytest.raises(UserError, match=r"train\.init_from = http://host/run: expected a local path"):
        tokenizer.inherit_tokenizer(config_of("http://host/run"))
    with pytest.raises(UserError, match=r"tokenizer = mine\.model: read only without train\.init_from"):
        small_config(data={"tokenizer": "mine.model"}, train={"init_from": "runs/base"})
    with pytest.raises(UserError, match="init_checkpoint = best: read only with init_from"):
        small_config(train={"init_checkpoint": "best"})


def test_its_path_means_the_same_wherever_it_is_read_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = schema.with_absolute_paths(small_config(train={"init_from": "runs/base"}))
    assert config.train.init_from == str(tmp_path / "runs" / "base")


def resolved(saved, flags=(), workdir="", **sections):
    """What train.py makes of a config file that leaves the model open."""
    sections = {"train": {"init_from": str(saved), **sections.pop("train", {})}, **sections}
    return validation.to_dataclasses(warm_start.inherit_sizes(sections, flags, str(workdir)))


@pytest.mark.reported
def test_sizes_that_the_config_leaves_open_are_those_of_the_base(saved):
    base = make_parts()[0].model
    config = resolved(saved, model={"dropout_rate": 0.3})
    assert config.model == dataclasses.replace(
        base, dropout_rate=0.3, attention_dropout_rate=0, mlp_dropout_rate=0, qkv_init_gain=1
    )
    assert config.data.vocab_size == small_config().data.vocab_size
    assert initialization.resolve_warm_start(dataclasses.replace(config, data=config_of(saved).data)).steps == [100]


@pytest.mark.reported
def test_a_config_file_may_leave_sizes_open_and_a_flag_does_not(saved, tmp_path):
    path = tmp_path / "open.py"
    path.write_text(
        "from transformer.config import default_config\n\n\ndef get_config():\n    return default_config()\n"
    )
    flags = ["train.py", f"--config={path}", f"--config.train.init_from={saved}", f"--workdir={tmp_path / 'run'}"]
    parser = command_line.config_parser("train.py", "")
    parser.add_argument("--workdir")
    result, _ = command_line.parse_with_config(parser, flags)
    assert (result.model.emb_dim, result.model.qkv_dim, result.model.num_layers) == (16, 16, 1)
    given, _ = command_line.parse_with_config(parser, [*flags, "--config.model.mlp_dim=2048"])
    assert (given.model.emb_dim, given.model.mlp_dim) == (16, 2048)
    with pytest.raises(
        UserError, match=r"its model differs: model\.mlp_dim: 32 → 2048\. Set these fields as there or leave"
    ):
        initialization.resolve_warm_start(dataclasses.replace(given, data=config_of(saved).data))


def test_a_saved_config_leaves_no_size_open(saved, tmp_path):
    """Else an ablation would train another model than its plan says."""
    planned = small_config(model={"norm": "post", "mlp_dim": 2048}, train={"init_from": str(saved)})
    (tmp_path / "config.json").write_text(planned.to_json())
    config, _ = command_line.config_flags(["train.py", f"--config={tmp_path}/config.json"], needs_data=False)
    assert config == planned


@pytest.mark.reported
def test_a_run_that_has_begun_keeps_its_sizes_when_the_base_is_gone(saved, tmp_path):
    save(tmp_path / "run", make_parts(), 5)
    assert resolved(tmp_path / "gone", workdir=tmp_path / "run").model.emb_dim == 16
    assert resolved(tmp_path / "gone").model.emb_dim == 512


@pytest.mark.parametrize("content", [None, "{", "[]", "\xff"])
def test_a_base_without_a_readable_config_leaves_sizes_at_their_defaults(tmp_path, content):
    if content is not None:
        (tmp_path / "checkpoints" / "5").mkdir(parents=True)
        (tmp_path / "checkpoints" / "5" / "config.json").write_bytes(content.encode("latin-1"))
    assert resolved(tmp_path).model.emb_dim == 512


@pytest.mark.reported
def test_a_moved_base_is_no_other_base(saved, tmp_path):
    (tmp_path / "moved").symlink_to(saved)
    old, config = config_of(saved), config_of(tmp_path / "moved")
    assert workdir.check_resume_config(tmp_path, old, config) == [
        f"train.init_from: '{saved}' → '{tmp_path / 'moved'}'"
    ]
    initialization.check_base_unchanged(old, config, "", make_parts()[1])


@pytest.mark.reported
def test_another_base_is_refused_by_its_run_id_or_vocabulary(saved, tmp_path):
    save(tmp_path / "other", make_parts(), 5, run_id="b" * 32)
    old, other = config_of(saved), config_of(tmp_path / "other")
    initialization.check_base_unchanged(old, other, "b" * 32, make_parts()[1])
    with pytest.raises(UserError, match="is not the run that this one has started from"):
        initialization.check_base_unchanged(old, other, "a" * 32, make_parts()[1])
    vocabulary = tokenizer.train(["quite another text of no such trees"], 280, "bpe")
    with pytest.raises(UserError, match="is not the run that this one has started from"):
        initialization.check_base_unchanged(old, other, "", vocabulary)
    with pytest.raises(UserError, match="found no checkpoint there; leave it at the old path"):
        initialization.check_base_unchanged(old, config_of(tmp_path / "gone"), "", make_parts()[1])
    initialization.check_base_unchanged(config_of(tmp_path / "gone"), config_of(tmp_path / "gone"), "", make_parts()[1])


def test_a_size_that_the_base_kept_and_nothing_reads_is_left_out(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "base")
    for path in (tmp_path / "base" / "checkpoints").glob("*/config.json"):
        kept = json.loads(path.read_text())
        kept["model"]["max_positions"] = 512  # of sinusoidal positions: accepted once
        path.write_text(json.dumps(kept))
    config = resolved(tmp_path / "base")
    assert config.model.max_positions == small_config().model.max_positions != 512
    assert config.model.emb_dim == 16
    validation.check_consistency(config, needs_data=False)
