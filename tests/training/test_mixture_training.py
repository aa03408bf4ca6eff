"""A run on a mixture of two directions: from files to BLEU of each direction, resumed, translated and reported."""

import dataclasses
import io
import json
import shutil
import sys

import jax
import numpy as np
import pytest

import eval as evaluation
import transformer
from tests.conftest import small_config
from train import train as fit
from transformer import compare, prepare, score, translate, translate_corpus
from transformer.checkpoints.loading import load_checkpoint
from transformer.checkpoints.manager import CheckpointManager
from transformer.config import mixture
from transformer.data import input_pipeline, mixture_corpus
from transformer.data import tokenizer as tokenizers
from transformer.data.tokenizer import PAD
from transformer.data.vocabulary import VocabularyText, get_or_train_tokenizer
from transformer.evaluation import continuous, datasets, evaluator, report, systems
from transformer.evaluation.evaluator import EvalResult
from transformer.runtime.errors import UserError
from transformer.training import trainer

WORDS = ["red", "green", "blue", "old", "new", "house", "tree", "cat", "dog", "sees"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """English to "German", spelled backwards, in two plain files; and to "French", with hyphens, in a TSV."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 120), ("valid", 8)):
        lines = [" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(count)]
        (folder / f"{split}.en").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"{split}.de").write_text("".join(f"{line[::-1]}\n" for line in lines))
        (folder / f"{split}.tsv").write_text(
            "".join(f"{line}\t{line.replace(' ', '-')}\n" for line in lines[: count // 2])
        )
    return folder


def entries_of(folder):
    sides = {f"{split}_{side}": f"{folder}/{split}.{code}"
             for split in ("train", "valid") for side, code in (("source", "en"), ("target", "de"))}  # fmt: skip
    return (
        {**sides, "source_language": "en", "target_language": "de", "tag": "<2de>"},
        {
            "train": f"{folder}/train.tsv",
            "valid": f"{folder}/valid.tsv",
            "source_language": "en",
            "target_language": "fr",
            "tag": "<2fr>",
            "origin_tag": "<bt>",
            "weight": 0.5,
        },
    )


def config_of(folder, entries=None, **sections):
    data = {
        "mixture": entries or entries_of(folder),
        "data_dir": str(folder / "prepared"),
        "vocab_size": 285,
        "num_buckets": 1,
    }
    train = {"num_steps": 4, "eval_every_steps": 2, "checkpoint_every_steps": 2, **sections.pop("train", {})}
    return small_config(data={**data, **sections.pop("data", {})}, model={"num_layers": 1}, train=train, **sections)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    fit(config_of(folder), workdir)
    return workdir


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_validation_scores_each_direction_and_their_mean(whole):
    validated = [line for line in metrics_of(whole) if "valid/bleu" in line]
    assert [line["step"] for line in validated] == [2, 4]
    for line in validated:
        for name in ("bleu", "chrf", "loss"):
            each = [line[f"valid/{direction}/{name}"] for direction in ("en-de", "en-fr")]
            assert line[f"valid/{name}"] == pytest.approx(sum(each) / 2)
    assert CheckpointManager(whole).metrics(4)["valid/en-fr/bleu"] == validated[-1]["valid/en-fr/bleu"]


def test_one_direction_has_the_keys_of_old():
    result = EvalResult(3, 2.5, 12.0, 13.0, {"bleu": 7.0, "chrf": 8.0}, [], 1.0)
    scores = trainer.validation_scores({"en-de": result}, ["bleu", "chrf"])
    assert scores == {"valid/loss": 2.5, "valid/bleu": 7.0, "valid/chrf": 8.0}


@pytest.mark.slow
def test_resume_is_exact(folder, whole, tmp_path):
    fit(config_of(folder, train={"num_steps": 2}), tmp_path / "run")
    fit(config_of(folder), tmp_path / "run")
    states = [load_checkpoint(workdir, "4").params for workdir in (tmp_path / "run", whole)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_tags_are_tokens_before_the_sources(folder, whole):
    config = config_of(folder)
    corpus = mixture_corpus.open_sources(config.data)
    vocabulary = get_or_train_tokenizer(config.data, corpus)
    assert vocabulary.digest == tokenizers.load(whole / "tokenizer").digest
    assert vocabulary.vocab_size == 285
    tags = [vocabulary.tag_id(tag) for tag in ("<2de>", "<2fr>", "<bt>")]
    assert len({*tags}) == 3
    assert vocabulary.pieces(tags) == ["<2de>", "<2fr>", "<bt>"]
    for text in ("<2de> cat", "<bt>"):  # text never gives a tag, and a tag no text
        ids = vocabulary.encode([text])[0]
        assert not {*tags} & {*ids.tolist()}
        assert vocabulary.decode([*tags, *ids]) == text
    (tagged,), (plain,) = vocabulary.encode(["cat"], "<2fr>"), vocabulary.encode(["cat"])
    assert tagged.tolist() == [tags[1], *plain]
    assert vocabulary.word_ids(tagged.tolist())[0] == -1
    ids = input_pipeline.token_ids(config.data, corpus, "train", vocabulary)
    source_BS = ids.source.to_padded(np.array([0, 120]), 40)
    assert source_BS[0, 0] == tags[0] != source_BS[0, 1]
    assert source_BS[1, :2].tolist() == tags[1:]
    texts = [vocabulary.decode(row[row != PAD].tolist()) for row in source_BS]
    split = corpus.train
    assert texts == [split[0][0], split[120][0]] == [split[0][0], split.splits[1][0][0]]
    assert len(split) == len(ids.source) == len(ids.source.lengths) == 180
    schedule = input_pipeline.make_batch_schedule(config, ids)
    batch = next(input_pipeline.train_iterator(schedule, ids, start=0, num_steps=1))
    assert {*batch.source_BS[:, 0].tolist()} <= {tags[0], tags[1], PAD}


def test_the_vocabulary_is_trained_on_text_by_the_shares(folder):
    data = config_of(folder).data
    corpus = mixture_corpus.open_sources(data)
    text = VocabularyText(data, corpus)
    lines = list(text)
    assert len(lines) == len(text) == 360
    assert sum("-" in line for line in lines) == 60  # a third of the pairs, as weights 1 and 0.5 say
    sampled = VocabularyText(dataclasses.replace(data, mixture_temperature=1.0), corpus)
    assert sum("-" in line for line in sampled) == 36  # 0.5 x 60 against 1 x 120 of 180 pairs


def test_merges_of_subword_nmt_have_tags_too(folder, tmp_path):
    (tmp_path / "bpe.codes").write_text("#version: 0.2\nc a\nca t</w>\nd e\n")
    config = config_of(folder, data={"tokenizer": f"{tmp_path}/bpe.codes"})
    corpus = mixture_corpus.open_sources(config.data)
    with pytest.raises(UserError, match=r"set data.vocab_size = (\d+)") as refused:
        get_or_train_tokenizer(config.data, corpus)
    config = config_of(
        folder, data={"tokenizer": config.data.tokenizer, "vocab_size": int(str(refused.value).split()[-1])}
    )
    vocabulary = get_or_train_tokenizer(config.data, corpus)
    (ids,) = vocabulary.encode(["cat sees"], "<2de>")
    assert vocabulary.pieces(ids[:2]) == ["<2de>", "cat"]
    assert vocabulary.decode(ids.tolist()) == "cat sees"
    vocabulary.save(tmp_path / "saved")
    assert tokenizers.load(tmp_path / "saved").encode(["cat sees"], "<2de>")[0].tolist() == ids.tolist()


def test_a_vocabulary_without_the_tags_is_refused(folder, whole):
    other = (*entries_of(folder)[:1], {**entries_of(folder)[1], "tag": "<2xx>"})
    config = config_of(folder, other, data={"tokenizer": f"{whole}/tokenizer/sentencepiece.model"})
    with pytest.raises(UserError, match="the tag <2xx> is not a control symbol of this vocabulary"):
        tokenizers.load_configured(config.data)


def test_the_direction_of_a_translation_is_chosen(whole):
    model = transformer.load(whole)
    assert "en-de <2de>, en-fr <2fr>" in repr(model)
    with pytest.raises(UserError, match="translates en-de, en-fr: expected target_language to choose one, got none"):
        model.translate(["cat sees dog"])
    with pytest.raises(UserError, match="no direction any to es"):
        model.translate(["cat sees dog"], target_language="es")
    german, french = (model.score(["cat"], ["tac"], target_language=code)[0].log_prob for code in ("de", "fr"))
    assert german != french
    (translation,) = model.translate(["cat sees dog"], target_language="fr", n_best=1)
    tagged = model.primary.tokenizer.encode(["cat sees dog"], "<2fr>")
    assert len(tagged[0]) == len(model.primary.tokenizer.encode(["cat sees dog"])[0]) + 1
    assert translation


def test_a_corpus_is_translated_in_the_direction_that_is_chosen(folder, whole, tmp_path):
    flags = [f"--workdir={whole}", f"--input={folder}/valid.en", "--input_side=source", f"--output={tmp_path}/out"]
    with pytest.raises(UserError, match="expected one direction, got en-de, en-fr; choose it by source_language"):
        translate_corpus.main(["translate_corpus", *flags])
    translate_corpus.main(["translate_corpus", *flags, "--target_language=fr"])
    lines = (folder / "valid.en").read_text().splitlines()
    expected = transformer.load(whole).translate(lines, target_language="fr")
    assert (tmp_path / "out" / "train.fr").read_bytes().decode().split("\n")[:-1] == expected


def test_attention_and_alignments_are_of_the_direction(whole, tmp_path, monkeypatch):
    model = transformer.load(whole)
    vocabulary, tags = model.tokenizer, []
    for language in ("de", "fr"):
        (attention,) = model.attention(["red cat"], ["x"], target_language=language)
        tags.append(vocabulary.pieces(attention.source[:1])[0])
        assert attention.weights_LHTS.shape[3] == len(attention.source) == 1 + len(vocabulary.encode(["red cat"])[0])
    assert tags == ["<2de>", "<2fr>"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"red cat\n")))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    path = tmp_path / "align"
    translate.main(["translate", f"--workdir={whole}", "--target_language=fr", f"--alignments={path}"])
    assert {int(link.split("-")[0]) for link in path.read_text().split()} <= {0, 1}  # the tag is no word


def test_evaluation_reports_all_directions_in_one_table(whole, capsys):
    rows = "--decode.batch_rows=4"  # another than the config's, which is no other decoding
    evaluation.main(["eval.py", f"--workdir={whole}", "--split=val", rows])
    out, err = capsys.readouterr()
    scores = json.loads(out.splitlines()[-1])
    assert list(scores["directions"]) == ["en-de", "en-fr"]
    assert scores["sentences"] == 12
    assert scores["bleu"] == pytest.approx(sum(each["bleu"] for each in scores["directions"].values()) / 2)
    assert [line.split()[0] for line in err.splitlines() if line.startswith(("  en-", "  mean"))] == [
        "en-de",
        "en-fr",
        "mean",
    ]
    page = (whole / "report.html").read_text()
    table = page.split('id="directions"')[1].split("</table>")[0]
    for name in ("en-de", "en-fr"):
        assert name in table
        assert f"{scores['directions'][name]['bleu']:.2f}" in table
    assert "Worst sentences, en-fr" in page
    assert (whole / "reports" / "4.validation.html").read_text() == page
    names = {path.name for path in (whole / "translations").glob("*.txt")}
    assert {"4.validation.en-de.txt", "4.validation.en-fr.txt"} <= names
    with pytest.raises(
        UserError, match="--versus applies to one direction, got en-de, en-fr: choose one by --source_lang"
    ):
        evaluation.main(["eval.py", f"--workdir={whole}", "--split=val", f"--versus={whole}"])
    with pytest.raises(UserError, match=r"--versus=.*: no direction en to es: this model translates en-de, en-fr"):
        systems.baseline_system(whole, "latest", None, ("en", "es"))


def test_a_missing_set_of_a_later_direction_is_found_before_the_first_is_translated(whole, monkeypatch):
    load = datasets.load_eval_dataset

    def load_german(*arguments, direction=None, **flags):
        if direction and direction.name == "en-fr":
            raise UserError("there is no such set")
        return load(*arguments, direction=direction, **flags)

    monkeypatch.setattr(datasets, "load_eval_dataset", load_german)
    monkeypatch.setattr(evaluator.CheckpointEvaluator, "evaluate", lambda *_: pytest.fail("translates"))
    with pytest.raises(UserError, match="there is no such set"):
        evaluation.main(["eval.py", f"--workdir={whole}", "--split=val"])


def test_lines_are_translated_and_scored_in_the_direction_of_the_flag(folder, whole, monkeypatch, capsysbinary):
    def run(*flags):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"cat sees dog\nred house\n")))
        translate.main(["translate", f"--workdir={whole}", *flags])
        return capsysbinary.readouterr().out.decode().splitlines()

    model = transformer.load(whole)
    for language in ("de", "fr"):
        assert run(f"--target_language={language}") == model.translate(
            ["cat sees dog", "red house"], target_language=language
        )
    with pytest.raises(UserError, match="expected target_language to choose one"):
        run()
    score.main(["score", f"--workdir={whole}", f"--source={folder}/valid.en", f"--target={folder}/valid.de",
                "--target_language=de"])  # fmt: skip
    sources, targets = ((folder / f"valid.{code}").read_text().splitlines() for code in ("en", "de"))
    wanted = [each.log_prob for each in model.score(sources, targets, target_language="de")]
    assert list(map(float, capsysbinary.readouterr().out.split())) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_one_direction_is_watched_and_compared(whole, tmp_path, capsys):
    for copy in ("a", "b"):
        shutil.copytree(whole, tmp_path / copy)
        evaluation.main(["eval.py", f"--workdir={tmp_path}/{copy}", "--split=val"])
    compare.main(["compare", f"{tmp_path}/a", f"{tmp_path}/b", "--split=val", "--target_language=fr",
                  f"--output={tmp_path}/page.html"])  # fmt: skip
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sentences"] == 4
    with pytest.raises(UserError, match="expected one direction, got en-de, en-fr"):
        compare.main(["compare", f"{tmp_path}/a", f"{tmp_path}/b", "--split=val", f"--output={tmp_path}/page.html"])
    watched = []
    watcher = continuous.CheckpointWatcher(
        tmp_path / "a",
        lambda config: datasets.load_eval_dataset(
            config.data, "val", None, None, direction=mixture.find_direction(config.data, None, "fr")
        ),
        watched.append,
        (None, "fr"),
    )
    while watcher.poll():
        pass
    assert [entry["step"] for entry in watched] == [2, 4]
    assert {entry["name"] for entry in watched} == {"validation.en-fr"}
    assert watched[-1]["bleu"] == pytest.approx(metrics_of(whole)[-1]["valid/en-fr/bleu"])
    evaluation.main(["eval.py", f"--workdir={tmp_path}/a", "--split=val", "--target_language=fr",
                     f"--versus={tmp_path}/b"])  # fmt: skip
    versus = json.loads(capsys.readouterr().out.splitlines()[-1])["versus"]
    assert versus["bleu"]["difference"] == 0


@pytest.mark.slow
def test_evaluation_of_one_direction_is_that_of_a_model_of_one(whole, capsys):
    evaluation.main(["eval.py", f"--workdir={whole}", "--split=val", "--target_language=fr"])
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "directions" not in scores
    assert scores["sentences"] == 4
    assert (whole / "reports" / "4.validation.en-fr.html").exists()
    (shown,) = report.in_direction(metrics_of(whole)[-1:], "en-fr")
    assert shown["valid/loss"] == metrics_of(whole)[-1]["valid/en-fr/loss"] != metrics_of(whole)[-1]["valid/loss"]
    last = metrics_of(whole)[-1]
    assert scores["bleu"] == pytest.approx(last["valid/en-fr/bleu"])
    assert scores["loss"] == pytest.approx(last["valid/en-fr/loss"], rel=1e-5)


def test_preparing_reports_the_entries(folder, capsys):
    prepare.prepare(config_of(folder), report=True)
    out, err = capsys.readouterr()
    assert "en-fr" in out
    assert "<2fr> <bt>" in out
    assert "33.3%" in out
    assert "mixture from update 1 on: en-de 66.7% of 120 pairs, <2de>" in err


@pytest.mark.slow
def test_both_directions_of_one_corpus_and_then_one(folder, tmp_path):
    """The two runs of Bi-SimCut, on the same files, swapped."""
    german = {name: value for name, value in entries_of(folder)[0].items() if name != "tag"}
    swapped = {**german, "source_language": "de", "target_language": "en"}
    for split in ("train", "valid"):
        swapped |= {f"{split}_source": german[f"{split}_target"], f"{split}_target": german[f"{split}_source"]}
    train = {"num_steps": 1, "consistency": "simcut", "eval_every_steps": 1}
    fit(config_of(folder, (german, swapped), train=train), tmp_path / "both")
    assert {"valid/en-de/bleu", "valid/de-en/bleu"} < metrics_of(tmp_path / "both")[-1].keys()
    one = config_of(folder, (german,), train={**train, "init_from": str(tmp_path / "both")})
    fit(one, tmp_path / "one")
    assert "valid/en-de/bleu" not in metrics_of(tmp_path / "one")[-1]
    assert [each.name for each in mixture.directions(load_checkpoint(tmp_path / "one", "1").config.data)] == ["en-de"]


@pytest.mark.slow
def test_the_tag_decides_the_target(folder, tmp_path):
    train = {"num_steps": 300, "eval_every_steps": 300, "checkpoint_every_steps": 300, "batch_tokens": 1024}
    optimizer = {"schedule": "constant", "learning_rate": 5e-3, "warmup_steps": 20}
    fit(config_of(folder, train=train, optimizer=optimizer), tmp_path / "run")
    model = transformer.load(tmp_path / "run")
    sources, german = ((folder / f"valid.{code}").read_text().splitlines() for code in ("en", "de"))
    targets = {"de": german, "fr": [line.replace(" ", "-") for line in sources]}
    for language, lines in targets.items():
        scores = [
            [each.log_prob for each in model.score(sources, lines, target_language=code)]
            for code in (language, *(targets.keys() - {language}))
        ]
        assert all(right > wrong + 5 for right, wrong in zip(*scores, strict=True))  # nats of a sentence
