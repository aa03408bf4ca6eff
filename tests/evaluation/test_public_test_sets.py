"""Test sets by sacreBLEU's names, from a cache that is planted: nothing is downloaded."""

import os
import subprocess
import sys
import urllib.request

import pytest
import sacrebleu

from tests.conftest import ROOT
from transformer.config import DataConfig
from transformer.evaluation import datasets, public_test_sets
from transformer.runtime.errors import UserError

SOURCES = ["one line", " another\u2028one ", ""]
REFERENCES = ["eine Zeile", "noch eine", "…"]


def plant(folder, name="wmt14/full", pair="en-de", **fields):
    """Writes files as sacreBLEU caches them."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    others = {field: [] for field in sacrebleu.DATASETS[name].fieldnames(pair)}  # such as docid
    for field, lines in {**others, "src": SOURCES, "ref": REFERENCES, **fields}.items():
        path = folder / name / f"{name.replace('/', '_')}.{pair}.{field}"
        path.write_bytes("".join(f"{line}\n" for line in lines).encode())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""

    def refuse(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(sacrebleu, "SACREBLEU_DIR", str(tmp_path))
    for name, dataset in sacrebleu.DATASETS.items():
        monkeypatch.setattr(dataset, "_outdir", str(tmp_path / name))
        monkeypatch.setattr(dataset, "_rawdir", str(tmp_path / name / "raw"))
    return tmp_path


def test_a_cached_set_is_read_in_the_direction_of_the_config(cache):
    plant(cache)
    plant(cache, pair="de-en", src=REFERENCES, ref=SOURCES)
    data = DataConfig(source_language="en", target_language="de")
    dataset = datasets.load_eval_dataset(data, None, None, [], "wmt14/full")
    assert dataset == ("wmt14_full", SOURCES, [REFERENCES])
    assert public_test_sets.load("wmt14/full", ("de", "en")) == (REFERENCES, [SOURCES])


def test_the_environment_names_the_cache(tmp_path):
    plant(tmp_path)
    code = "import sys; from transformer.evaluation import public_test_sets"
    code += "; print(ascii(public_test_sets.load('wmt14/full', ('en', 'de'))), 'jax' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "SACREBLEU": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.stdout == f"{(SOURCES, [REFERENCES])!a} False\n", result.stderr


def test_all_references_of_a_set_are_read(cache):
    plant(cache, "wmt20/tworefs", **{"ref-0": REFERENCES, "ref-1": SOURCES})
    assert public_test_sets.load("wmt20/tworefs", ("en", "de"))[1] == [REFERENCES, SOURCES]


def test_without_a_network_the_message_says_what_to_do(cache):
    for _ in range(2):  # what the first try leaves is not taken for the set
        with pytest.raises(UserError) as error:
            public_test_sets.load("wmt14/full", ("en", "de"))
        assert "cannot be downloaded (OSError: no network here)" in str(error.value)
        assert "sacrebleu --test-set wmt14/full --language-pair en-de --echo src" in str(error.value)
        assert f"copy its folder ~/.sacrebleu/wmt14/full to {cache}/wmt14/full" in str(error.value)


def test_sets_and_languages_that_are_not_there_are_named(cache):
    with pytest.raises(UserError, match="--test_set=wtm14: sacreBLEU has no such test set; did you mean wmt14"):
        public_test_sets.load("wtm14", ("en", "de"))
    with pytest.raises(UserError, match=r"wmt14/full: has .*en-de.*expected en-ja, .*Sets with en-ja: .*iwslt17"):
        public_test_sets.load("wmt14/full", ("en", "ja"))
    with pytest.raises(UserError, match="Sets with en-xx: none"):
        public_test_sets.load("wmt14/full", ("en", "xx"))


def test_a_set_that_is_not_whole_is_refused(cache):
    plant(cache, ref=REFERENCES[:2])
    with pytest.raises(UserError, match=r"expected equally many sentences of source and references, got 3, 2:"):
        public_test_sets.load("wmt14/full", ("en", "de"))
    plant(cache, src=[], ref=[])
    with pytest.raises(UserError, match="got 0, 0: the download was interrupted"):
        public_test_sets.load("wmt14/full", ("en", "de"))
