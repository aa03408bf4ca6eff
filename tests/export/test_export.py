"""What is exported computes what the model computes, and what cannot be exported is refused."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import transformer
from tests.commands.test_translate import save
from tests.conftest import slow
from tests.decoding.test_translator import LINES, WORDS, eager
from transformer.checkpoints.loading import load_checkpoint
from transformer.data import tokenizer
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.decoding.translator import Translator
from transformer.export import __main__ as export
from transformer.export import ctranslate2 as export_ctranslate2
from transformer.export import jax_export, verify
from transformer.runtime.errors import UserError

SHORT = [line for line in LINES if len(line.split()) < 4]
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "export.md"


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizer.train(LINES, 300, "bpe")


@pytest.fixture(scope="module")
def workdir(vocabulary, tmp_path_factory):
    return save(tmp_path_factory.mktemp("runs") / "one", vocabulary, norm="pre")


@pytest.fixture(scope="module")
def needs_ctranslate2():
    pytest.importorskip("ctranslate2", reason="the export extra is not installed")


def with_model(workdir, vocabulary, **model):
    return load_checkpoint(save(workdir, vocabulary, **model), "latest")


@pytest.mark.parametrize(
    "model",
    [
        slow({"norm": "post"}),
        {"norm": "pre", "positions": "learned", "share_embeddings": False, "num_layers": 2, "num_heads": 4},
        slow({"norm": "pre", "num_layers": 2, "scan_layers": True, "dtype": "bfloat16", "attention": "blockwise"}),
    ],
)
def test_ctranslate2_gives_the_log_probabilities_of_the_model(
    model, vocabulary, tmp_path, needs_ctranslate2, monkeypatch
):
    trained = with_model(tmp_path / "run", vocabulary, **model)
    (tmp_path / "out").mkdir()
    summary = verify.write(trained, tmp_path / "out", "ctranslate2")
    assert 0 < summary["largest_difference"] < 1e-4
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == summary
    (tmp_path / "int8").mkdir()
    precisions, reference = [], verify.reference_log_probs

    def noted(*args):
        precisions.append(jax.config.jax_default_matmul_precision)
        return reference(*args)

    monkeypatch.setattr(verify, "reference_log_probs", noted)
    assert 1e-4 < verify.write(trained, tmp_path / "int8", "ctranslate2", "int8")["mean_difference"] < 0.5
    assert precisions == ["highest", "highest"]  # an accelerator's default rounds more than the tolerance


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"length_penalty_form": "length"}, []),
        ({"length_penalty": 0.0}, []),
        ({}, ["length_penalty_form"]),
        ({"beam_size": 1, "min_length": 3, "no_repeat_ngram": 2}, []),
        ({"length_penalty": 0.0, "min_length": 3, "no_repeat_ngram": 2}, ["min_length", "no_repeat_ngram"]),
        ({"length_penalty": 0.0, "coverage_penalty": 0.2}, ["coverage_penalty"]),
        ({"method": "sample", "length_penalty": 0.0}, ["method"]),
    ],
)
def test_the_fields_that_ctranslate2_does_not_support_are_named_and_no_others(workdir, fields, named, capsys):
    decode = dataclasses.replace(load_checkpoint(workdir, "latest").config.decode, **fields)
    assert export_ctranslate2.options(decode)["beam_size"] == decode.beam_size
    assert re.findall(r"decode\.(\w+) =", capsys.readouterr().err) == named
    assert export_ctranslate2.options(decode)["patience"] == 3
    assert export_ctranslate2.options(dataclasses.replace(decode, early_stopping=True))["patience"] == 1


@pytest.fixture(scope="module")
def about_to_end(vocabulary, tmp_path_factory, needs_ctranslate2):
    """A model that likes nothing better than to end, and never says PAD or BOS, which CTranslate2 does not forbid."""
    folder = tmp_path_factory.mktemp("ctranslate2")
    trained = with_model(folder / "run", vocabulary)
    params = eager(jax.device_get(trained.params))
    table = np.array(params["embeddings"]["shared"]["table"])
    table[[PAD, BOS]] = -table[EOS]
    params["embeddings"]["shared"]["table"] = table
    norm = params["decoder"][0]["mlp_residual"]["norm"]
    norm["bias"] = 3 * norm["bias"]
    trained = dataclasses.replace(trained, params=params)
    (folder / "out").mkdir()
    verify.write(trained, folder / "out", "ctranslate2")
    return trained, folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"beam_size": 4, "length_penalty": 0.0}, {"beam_size": 1, "min_length": 3, "no_repeat_ngram": 1}]
)
def test_with_these_options_ctranslate2_finds_the_translations_of_this_search(fields, about_to_end):
    import ctranslate2

    trained, folder = about_to_end
    decode, words = trained.config.decode, export_ctranslate2.vocabulary(trained.tokenizer)
    decode = dataclasses.replace(decode, **fields)
    own = Translator([trained.model], trained.tokenizer, decode, trained.mesh).translate([trained.params], SHORT)
    program = ctranslate2.Translator(str(folder), device="cpu")
    sources = [[words[i] for i in ids[:-1]] for ids in trained.tokenizer.encode(SHORT)]
    result = program.translate_batch(sources, **export_ctranslate2.options(decode))
    assert [trained.tokenizer.decode(map(words.index, one.hypotheses[0])) for one in result] == own
    assert all(own) == bool(decode.min_length)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ctranslate2", "jax"])
@pytest.mark.parametrize("family", ["recurrent", "convolutional"])
def test_other_families_are_refused(form, family, workdir, tmp_path):
    trained = load_checkpoint(workdir, "latest")
    model = dataclasses.replace(trained.config.model, family=family)
    trained = dataclasses.replace(trained, config=dataclasses.replace(trained.config, model=model))
    with pytest.raises(UserError, match=rf"model\.family = {family}: expected attention"):
        verify.write(trained, tmp_path, form)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["qkv_dim", "value_dim"])
def test_widths_that_ctranslate2_cannot_express_are_refused(field, vocabulary, tmp_path, needs_ctranslate2):
    trained = with_model(tmp_path, vocabulary, **{field: 8})
    with pytest.raises(UserError, match=rf"model\.{field} = 8: .*model\.emb_dim = 16; use --format=jax"):
        verify.write(trained, tmp_path, "ctranslate2")


def test_a_vocabulary_that_writes_two_ids_alike_is_refused(vocabulary):
    class Odd:
        vocab_size = 6

        def pieces(self, ids):
            return ["a", "b", "c", "d", "e", "e"]

    with pytest.raises(UserError, match=r"writes several ids as \['e'\]"):
        export_ctranslate2.vocabulary(Odd())
    assert export_ctranslate2.vocabulary(vocabulary)[:5] == ["<pad>", "<s>", "</s>", "<unk>", "<0x00>"]


@pytest.mark.slow
@pytest.mark.reported
@pytest.mark.parametrize("form", ["ctranslate2", "jax"])
def test_a_small_mistake_is_found_under_the_tolerance_of_int8_and_bfloat16(form, vocabulary, tmp_path, monkeypatch):
    pytest.importorskip(verify.NEEDS[form], reason="the export extra is not installed")
    module = export_ctranslate2 if form == "ctranslate2" else jax_export
    encoding = module.sinusoidal_position_encoding
    monkeypatch.setattr(module, "sinusoidal_position_encoding", lambda *sizes: 0.95 * encoding(*sizes))
    workdir = save(tmp_path / "run", vocabulary, norm="pre", dtype="float32" if form == "ctranslate2" else "bfloat16")
    flags = ["export", f"--workdir={workdir}", f"--format={form}"]
    flags += ["--quantization=int8"] if form == "ctranslate2" else []
    with pytest.raises(UserError, match=r"gives other log-probabilities: expected differences of at most 0.001"):
        export.main([*flags, f"--output={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ctranslate2", "jax"])
def test_a_model_whose_export_differs_is_refused_and_leaves_no_files(form, workdir, tmp_path, monkeypatch):
    pytest.importorskip(verify.NEEDS[form], reason="the export extra is not installed")
    module = export_ctranslate2 if form == "ctranslate2" else jax_export
    zeros = lambda length, width: np.zeros((length, width), np.float32)  # noqa: E731
    monkeypatch.setattr(module, "sinusoidal_position_encoding", zeros)
    flags = ["export", f"--workdir={workdir}", f"--format={form}", f"--output={tmp_path}/out"]
    with pytest.raises(UserError, match="gives other log-probabilities: expected differences of at most"):
        export.main(flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, {"positions": "learned", "qkv_dim": 8, "scan_layers": True, "norm": "post"}])
def test_the_functions_for_jax_are_those_of_the_model(model, vocabulary, tmp_path):
    pytest.importorskip("flatbuffers", reason="the export extra is not installed")
    trained = with_model(tmp_path / "run", vocabulary, **model)
    (tmp_path / "out").mkdir()
    assert verify.write(trained, tmp_path / "out", "jax")["largest_difference"] < 1e-4


@pytest.mark.slow
def test_the_example_of_the_docs_runs_without_this_package(workdir, tmp_path, capsys):
    """It is run elsewhere, where `transformer` cannot be found, on other numbers of rows and other widths."""
    pytest.importorskip("flatbuffers", reason="the export extra is not installed")
    export.main(
        ["export", f"--workdir={workdir}", "--format=jax", f"--output={tmp_path}/exported", "--decode.beam_size=3"]
    )
    assert json.loads(capsys.readouterr().out)["decode"]["beam_size"] == 3
    (example,) = re.findall(r"```python\n(# JAX.*?)```", DOCS.read_text(), re.DOTALL)
    lines = [*SHORT[:3], " ".join(WORDS)]
    program = example.replace('["Good morning!", "See you at 8:15."]', repr(lines))
    assert program != example
    program += "\nimport sys\nassert 'transformer' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == transformer.load(workdir).translate(lines, beam_size=3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=jax", "--quantization=int8"], "--quantization goes with --format=ctranslate2"),
        (["--format=jax", "--decode.method=sample"], "the exported program searches by beam"),
        (["--format=jax", "--output=."], "expected a folder that does not exist yet"),
        (["--format=jax", "--checkpoint=7"], "checkpoint: expected latest"),
    ],
)
def test_what_cannot_be_exported_is_refused(flags, message, workdir, tmp_path):
    pytest.importorskip("flatbuffers", reason="the export extra is not installed")
    with pytest.raises(UserError, match=message):
        export.main(["export", f"--workdir={workdir}", f"--output={tmp_path}/out", *flags])
    assert list(tmp_path.iterdir()) == []


def test_an_address_is_no_folder_to_export_to(workdir, capsys):
    with pytest.raises(SystemExit, match="2"):
        export.main(["export", f"--workdir={workdir}", "--format=jax", "--output=gs://bucket/x"])
    assert "expected a folder on this machine, got gs://bucket/x" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "NEEDS", {"ctranslate2": "no_such_package", "jax": "flatbuffers"})
    with pytest.raises(UserError, match="needs the package no_such_package: pip install"):
        export.main(["export", f"--workdir={workdir}", "--format=ctranslate2", f"--output={tmp_path}/out"])
