"""BLEU suits the script of what is translated into, and the best checkpoint is told by a figure that can tell."""

import dataclasses
import re

import pytest
from etils import epath

from tests.conftest import small_config
from train import train as fit
from transformer.checkpoints import best_metric, manager
from transformer.checkpoints.manager import CheckpointManager
from transformer.config import DataConfig, validation
from transformer.evaluation import bleu_tokenizer
from transformer.evaluation import metrics as scores
from transformer.runtime.errors import UserError
from transformer.training import trainer
from transformer.training.session import prepare

pytestmark = pytest.mark.reported

CHINESE = ["我们今天去北京的大学看朋友。", "他昨天买了三本新书。"]
JAPANESE = ["私たちは今日、大学へ友達に会いに行きます。", "彼は昨日、新しい本を三冊買いました。"]
THAI = ["วันนี้เราจะไปเยี่ยมเพื่อนที่มหาวิทยาลัย", "เมื่อวานเขาซื้อหนังสือใหม่สามเล่ม"]
GERMAN = ["Wir besuchen heute Freunde an der Universität.", "Er hat gestern drei neue Bücher gekauft."]
KOREAN = ["우리는 오늘 대학에 친구를 만나러 갑니다.", "그는 어제 새 책 세 권을 샀습니다."]


def choose(language, references, **fields):
    return bleu_tokenizer.choose_bleu_tokenizer(DataConfig(target_language=language, **fields), references)


@pytest.mark.parametrize("language", "zh zh-CN zh_tw zho zho_Hant cmn yue wuu lzh nan hak gan cn zhs zht tw hk".split())
def test_perfect_chinese_scores_100(language):
    chosen = choose(language, CHINESE)
    result = scores.score(CHINESE, [CHINESE], ["bleu"], chosen.name)
    assert (chosen.name, result["bleu"]) == ("zh", pytest.approx(100))
    assert "tok:zh" in result["bleu_signature"]


@pytest.mark.parametrize(
    ("language", "references"),
    [("ja", JAPANESE), ("jp", JAPANESE), ("jpn", JAPANESE), ("th-TH", THAI), ("tha", THAI), ("th1", THAI), ("my", [])],
)
def test_other_scripts_without_spaces_are_scored_by_characters(language, references):
    assert choose(language, references).name == "char"


@pytest.mark.parametrize(
    ("language", "references"), [("de", GERMAN), ("ko", KOREAN), ("kr", KOREAN), ("xx", GERMAN), ("xx", []), ("ru", [])]
)
def test_languages_with_spaces_are_scored_as_always(language, references):
    assert choose(language, references).name == "13a"


def test_a_few_foreign_letters_choose_nothing():
    assert choose("xx", [*GERMAN, "Er sagt 我们"]).name == "13a"
    assert choose("cn", [*CHINESE, "iPhone 15"]).name == "zh"


def test_the_config_overrides_and_the_line_says_why():
    assert str(choose("zh", CHINESE, bleu_tokenizer="13a")) == (
        "BLEU is that of sacrebleu -tok 13a, as data.bleu_tokenizer says"
    )
    assert choose("cn", CHINESE).reason == "as most letters of the references are of a script without spaces"
    assert choose("wuu", CHINESE).reason == "as wuu is written without spaces"
    assert choose("de", GERMAN).reason == "for de"
    assert choose("zh", CHINESE, tokenized=True).name == bleu_tokenizer.PUBLISHED


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"bleu_tokenizer": "flores200"}, "bleu_tokenizer: expected one of auto, 13a, intl, zh, char, none, got 'flor"),
        ({"bleu_tokenizer": "zh", "tokenized": True}, "bleu_tokenizer = zh: read only with tokenized = False"),
    ],
)
def test_another_tokenizer_is_refused_before_anything_runs(data, match):
    with pytest.raises(UserError, match=match):
        validation.validate({"data": data})


def test_sentences_under_four_tokens_are_ranked_by_chrf():
    words = ["Haus", "rotes Haus", "ein Haus hier", "ein Haus steht hier"]
    assert bleu_tokenizer.choose_best_metric(words, "13a") == (
        "chrf",
        "the best checkpoint is that of the highest chrF2, as in validation 3 of 4 references have under four tokens "
        "and so no 4-grams for BLEU; train.best_metric sets another",
    )
    assert bleu_tokenizer.choose_best_metric(words[2:], "13a") == ("bleu", "")
    assert bleu_tokenizer.choose_best_metric(["我们今天", "他昨天"], "13a")[0] == "chrf"
    assert bleu_tokenizer.choose_best_metric(["我们今天", "他昨天"], "zh")[0] == "bleu"


RECORDED = {  # step → BLEU, chrF, loss: each figure has another best
    1: (0.0, 60.0, 3.0),
    2: (1.0, 40.0, 2.0),
    3: (0.0, 50.0, 1.0),
}


def checkpoints(tmp_path, metric):
    """Manifests and configs alone: all that scores are read from."""
    result = CheckpointManager(tmp_path)
    config = small_config(train={"best_metric": metric})
    for step, (bleu, chrf, loss) in RECORDED.items():
        folder = result.folder / str(step)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config.to_json())
        size, digest = (folder / "config.json").stat().length, manager.sha256(folder / "config.json")
        metrics = {"valid/bleu": bleu, "valid/chrf": chrf, "valid/loss": loss}
        manifest = manager.Manifest(metrics, {}, {}, {"config.json": (size, digest)})
        (folder / manager.MANIFEST).write_text(manifest.to_json())
    return result


@pytest.mark.parametrize(
    ("metric", "order"), [("bleu", [1, 3, 2]), ("chrf", [2, 3, 1]), ("loss", [1, 2, 3]), ("auto", [1, 3, 2])]
)
def test_checkpoints_are_ranked_by_the_metric_of_their_run(metric, order, tmp_path):
    """Runs of before have "auto" in their config at most, and go by BLEU."""
    result = checkpoints(tmp_path, metric)
    assert result.steps_by_metric([1, 2, 3]) == order
    result.prune(keep_last=1, keep_best=1)
    assert result.steps() == sorted({order[-1], 3})


def test_validation_computes_the_metrics_of_the_config():
    """And BLEU and chrF2, which earlier versions recorded; TER, which is slow, only if the best checkpoint needs it."""
    for metrics, best, expected in (
        ("bleu,chrf,ter", "auto", ["bleu", "chrf"]),
        ("ter,accuracy", "ter", ["bleu", "chrf", "ter", "accuracy"]),
        ("exact_match", "loss", ["bleu", "chrf", "exact_match"]),
        ("bleu", "rouge1", ["bleu", "chrf", "rouge1"]),  # of a run whose eval.metrics changed
    ):
        config = validation.to_dataclasses({"eval": {"metrics": metrics}, "train": {"best_metric": best}})
        assert best_metric.validation_metrics(config) == expected
    assert best_metric.format_score("ter", best_metric.score("ter", {"valid/ter": 61.234})) == "61.23"


def test_a_lower_loss_is_progress_and_a_higher_one_is_stale():
    progress = trainer.EarlyStopping()
    assert trainer.EarlyStopping.from_metrics(progress.to_metrics()) == progress
    for loss, stale in ((3.0, 0), (2.0, 0), (2.5, 1), (2.0, 2), (1.9, 0)):
        progress = progress.update(best_metric.score("loss", {"valid/loss": loss}))
        assert progress.stale == stale
        assert trainer.EarlyStopping.from_metrics(progress.to_metrics()) == progress
    assert best_metric.format_score("loss", progress.best) == "1.900"
    assert trainer.EarlyStopping.from_metrics({"best": -1.0, "stale": 0}) == trainer.EarlyStopping(
        -1.0
    )  # as earlier versions wrote it


@pytest.fixture
def words(tmp_path):
    """Pairs of single words in Chinese, in a folder of train.en and train.cn."""
    for name, count in (("train", 40), ("val", 6)):
        pairs = [(f"the river house tree {i}", chr(0x4E00 + i % 9)) for i in range(count)]
        (tmp_path / f"{name}.en").write_text("".join(f"{source}\n" for source, _ in pairs))
        (tmp_path / f"{name}.cn").write_text("".join(f"{target}\n" for _, target in pairs))
    return tmp_path


def run_config(words, **train):
    text = {"name": "text", "dir": str(words), "target_language": "cn", "data_dir": str(words / "cache")}
    config = small_config(data={**text, "vocab_size": 305}, train={"num_steps": 1, **train}, model={"num_layers": 1})
    return dataclasses.replace(config, decode=dataclasses.replace(config.decode, beam_size=1, max_extra_length=2))


@pytest.mark.slow
def test_a_run_decides_once_says_so_and_keeps_it(words, capsys):
    workdir = words / "run"
    fit(run_config(words), workdir)
    stderr = capsys.readouterr().err
    assert (
        "BLEU is that of sacrebleu -tok zh, as most letters of the references are of a script without spaces" in stderr
    )
    assert "the best checkpoint is that of the highest chrF2, as in validation 6 of 6 references" in stderr
    assert re.search(r"BLEU [0-9.]+ · chrF2 ([0-9.]+), best \1 ·", stderr)
    assert '"best_metric": "chrf"' in (workdir / "config.json").read_text()
    assert CheckpointManager(workdir).config(1).train.best_metric == "chrf"
    resumed, _ = prepare(run_config(words, num_steps=2), epath.Path(workdir))
    assert resumed.config.train.best_metric == "chrf"
    with pytest.raises(UserError, match=r"train\.best_metric: 'chrf' → 'bleu'"):
        prepare(run_config(words, num_steps=2, best_metric="bleu"), epath.Path(workdir))
