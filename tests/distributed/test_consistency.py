"""What all hosts must have in common."""

import jax
import pytest
from etils import epath

from tests.conftest import small_config
from transformer.distributed import consistency, multihost
from transformer.runtime import environment
from transformer.runtime.errors import UserError


@pytest.fixture
def others(monkeypatch):
    """Answers of host 1, by what is asked; host 0 is this one."""
    answers = {}

    def gather(what, mine):
        return [mine, answers.get(what, mine)]

    monkeypatch.setattr(multihost, "allgather", gather)
    monkeypatch.setattr(multihost, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "process_name", lambda host: f"host {host}")
    return answers


def test_hosts_that_agree_go_on(others, tmp_path):
    consistency.assert_same_code()
    consistency.assert_same_config(small_config())
    consistency.assert_same_data("abc", "def")
    consistency.assert_shared_workdir(epath.Path(tmp_path))


@pytest.mark.parametrize("sees", ["True", "False"])
def test_programs_are_kept_where_all_hosts_see_the_folder(others, tmp_path, monkeypatch, capsys, sees):
    others["compilation cache"] = sees
    monkeypatch.setattr(environment, "enable_compilation_cache", lambda: str(tmp_path / "cache"))
    was = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        consistency.enable_compilation_cache()
        assert jax.config.jax_enable_compilation_cache == (sees == "True")
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
    assert ("not all hosts see" in capsys.readouterr().err) == (sees == "False")
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_config_is_named_field_by_field(others):
    others["config"] = small_config(train={"seed": 4, "batch_tokens": 99}).to_json()
    with pytest.raises(UserError, match=r"host 0 → host 1: train\.batch_tokens: 256 → 99; train\.seed: 0 → 4; give"):
        consistency.assert_same_config(small_config())


def mixed(folder="/a", file="/b.tsv", weight=1.0):
    entry = {"source_language": "en", "target_language": "de", "weight": weight}
    return {"mixture": ({**entry, "dir": folder}, {**entry, "train": file, "valid": "/c.tsv"})}


@pytest.mark.parametrize(("here", "there"), [({}, {"data_dir": "/elsewhere"}), (mixed(), mixed("/x", "/y.tsv"))])
def test_data_may_lie_elsewhere(others, here, there):
    others["config"] = small_config(data=there).to_json()
    consistency.assert_same_config(small_config(data=here))


def test_a_mixture_of_other_shares_is_refused(others):
    others["config"] = small_config(data=mixed(weight=2.0)).to_json()
    with pytest.raises(UserError, match=r"data\.mixture: entry 1, weight: 1\.0 → 2\.0"):
        consistency.assert_same_config(small_config(data=mixed()))


def test_other_code_data_or_vocabulary_is_refused(others):
    others["the code"] = "version 123"
    with pytest.raises(UserError, match=r"the code differs between hosts: version .* on host 0, version 123 on host 1"):
        consistency.assert_same_code()
    others["the data"] = "digest 9, vocabulary 8"
    with pytest.raises(UserError, match="digest abc, vocabulary def on host 0, digest 9, vocabulary 8 on host 1"):
        consistency.assert_same_data("abc", "def")


def test_the_version_of_the_code_is_that_of_its_files(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("one")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "runtime" / "environment.py"))
    before = consistency.code_version()
    assert "jax " in before
    assert before == consistency.code_version()
    (tmp_path / "a.py").write_text("two")
    assert consistency.code_version() != before


def test_a_workdir_that_another_host_does_not_see_is_refused(others, tmp_path):
    others["workdir"] = "False"
    with pytest.raises(UserError, match="host 1 cannot see what host 0 writes there; it must be a folder that all"):
        consistency.assert_shared_workdir(epath.Path(tmp_path))


def test_a_host_that_sees_another_folder_knows(others, tmp_path, monkeypatch):
    """Here this process is host 1, and the lead's mark is not in its folder."""
    monkeypatch.setattr(consistency, "VISIBILITY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(multihost, "broadcast_from_primary", lambda what, make: "the mark of the lead")
    with pytest.raises(UserError, match="cannot see"):
        consistency.assert_shared_workdir(epath.Path(tmp_path))
