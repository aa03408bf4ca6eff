"""Folders may have any name: glob's own characters in a path lose nothing, and what cannot work is refused first."""

import contextlib
import io

import jax
import numpy as np
import pytest
from etils import epath

from tests.checkpoints.test_manager import make_parts, save
from tests.conftest import slow, small_config
from tests.faults.world import write_pairs
from train import train as fit
from transformer.checkpoints import loading
from transformer.checkpoints.manager import CheckpointManager
from transformer.data import corpus as corpora
from transformer.data import vocabulary
from transformer.runtime import files, object_storage
from transformer.runtime.errors import UserError

reported = pytest.mark.reported
NAMES = [*(pytest.param(name, marks=reported) for name in ("[a]", "**")), "a?", "ä"]
NAMES += [pytest.param("[!a]", marks=[reported, pytest.mark.slow]), *map(slow, ("a*", "a]", "a b"))]


def assert_restores(workdir, done):
    """The params of `save` come back from the checkpoint."""
    restored = loading.load_checkpoint(workdir, "latest")
    wanted = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(done), make_parts()[4].params)
    assert restored.step == done
    jax.tree.map(np.testing.assert_array_equal, restored.params, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_workdir_of_any_name_is_read_as_it_was_written(name, tmp_path):
    (tmp_path / "a").mkdir()  # which "[a]", "a*" and "**" match
    workdir = tmp_path / name / "run"
    save(workdir, make_parts(), 5)
    assert_restores(workdir, 5)
    assert CheckpointManager(workdir).latest_valid_step() == 5


@reported
def test_a_working_directory_of_any_name_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "[a]").mkdir()
    monkeypatch.chdir(tmp_path / "[a]")
    save("run", make_parts(), 5)
    assert_restores("run", 5)


@pytest.mark.parametrize("name", NAMES)
def test_a_vocabulary_is_trained_once_whatever_the_data_folder_is_called(name, tmp_path):
    write_pairs(tmp_path / "text", train=40)
    tokenizers = []
    for _ in range(2):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            data = {"name": "text", "dir": str(tmp_path / "text"), "vocab_size": 285}
            config = small_config(data={**data, "data_dir": str(tmp_path / name / "prepared")})
            corpus = corpora.open_corpus(config.data)
            tokenizers.append(vocabulary.get_or_train_tokenizer(config.data, corpus).digest)
    assert len(set(tokenizers)) == 1
    assert "training a bpe vocabulary" not in stderr.getvalue()
    assert "preparing" not in stderr.getvalue()


@reported
def test_a_vocabulary_of_a_folder_that_the_name_matches_is_not_taken(tmp_path):
    """`a?` as a pattern finds the data of `a1`."""
    write_pairs(tmp_path / "text", train=40)
    result = {}
    for name, size in (("a1", 285), ("a?", 285)):
        data = {"name": "text", "dir": str(tmp_path / "text"), "vocab_size": size, "data_dir": str(tmp_path / name)}
        config = small_config(data=data)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            vocabulary.get_or_train_tokenizer(config.data, corpora.open_corpus(config.data))
        result[name] = stderr.getvalue().count("training a bpe vocabulary")
    assert result == {"a1": 1, "a?": 1}


@reported
@pytest.mark.parametrize("name", ["a\\b", "a\\[", "b\udcff"])
def test_a_path_that_no_checkpoint_can_be_written_to_is_refused_before_anything_is_done(name, tmp_path):
    with pytest.raises(UserError, match="checkpoints need a path in UTF-8 without backslashes"):
        fit(small_config(), tmp_path / name)
    with pytest.raises(UserError, match="checkpoints need a path in UTF-8"):
        save(tmp_path / name, make_parts(), 5)
    assert list(tmp_path.iterdir()) == []


@reported
@pytest.mark.parametrize("address", ["gs://bucket/[a]/run", "s3://bucket/a*", "gs://bucket/a?"])
def test_an_address_with_wildcards_is_refused(address):
    assert "without the wildcards" in object_storage.unsupported_reason(address)


@reported
def test_a_checkpoint_that_its_reader_cannot_open_is_not_acknowledged(tmp_path, monkeypatch):
    """As it was before: Orbax finds nothing to merge below `[a]`, and says so only in its log."""
    monkeypatch.setattr(type(epath.Path()), "glob", getattr(files, "_glob_unescaped", type(epath.Path()).glob))
    with pytest.raises(UserError, match=r"cannot be read again, so it does not count: params/: expected .* found 0"):
        save(tmp_path / "[a]", make_parts(), 5)
    assert CheckpointManager(tmp_path / "[a]").steps() == []
    monkeypatch.undo()
    save(tmp_path / "[a]", make_parts(), 10)
    CheckpointManager(tmp_path / "[a]").clean_up(10)
    assert_restores(tmp_path / "[a]", 10)


@reported
def test_a_manifest_that_reads_otherwise_is_not_acknowledged(tmp_path, monkeypatch):
    from transformer.checkpoints import manager

    def emptied(path, content):
        files.write_atomic(path, "" if path.name == manager.MANIFEST else content)

    monkeypatch.setattr(manager, "write_atomic", emptied)
    with pytest.raises(UserError, match=r"does not count: manifest\.json cannot be read"):
        save(tmp_path, make_parts(), 5)
    assert CheckpointManager(tmp_path).steps() == []
