"""The score command and `TranslationModel.score`: one line for each pair, and messages for people."""

import json

import pytest

import transformer
from tests.commands.test_translate import save, write
from tests.decoding.test_translator import LINES
from transformer import score
from transformer.data import tokenizer
from transformer.runtime.errors import UserError

TARGETS = LINES[::-1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("runs") / "one", tokenizer.train(LINES, 300, "bpe"))


@pytest.fixture
def command(workdir, tmp_path, capfdbinary):
    """Runs the command on two files of lines; gives what it wrote to stdout."""

    def run(sources, targets, *flags):
        files = write(tmp_path / "in.en", sources), write(tmp_path / "in.de", targets)
        flags = [flag.replace("DIR", str(tmp_path)) for flag in flags]
        score.main(["score", f"--workdir={workdir}", f"--source={files[0]}", f"--target={files[1]}", *flags])
        return capfdbinary.readouterr().out.decode()

    return run


def test_lines_are_what_the_python_api_gives(command, workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "GROUP", 7)  # groups change nothing
    scores = transformer.load(workdir).score(LINES, TARGETS)
    assert command(LINES, TARGETS) == "".join(f"{each.log_prob:.6f}\n" for each in scores)
    lines = [json.loads(line) for line in command(LINES, TARGETS, "--per_token").splitlines()]
    assert [line["tokens"] for line in lines] == [each.tokens for each in scores]
    for line in lines:
        assert sum(line["log_probs"]) == pytest.approx(line["log_prob"], abs=1e-4)
    assert command(LINES, TARGETS, "--output=DIR/out") == ""
    assert (tmp_path / "out").read_text() == "".join(f"{each.log_prob:.6f}\n" for each in scores)


def test_an_ensemble_scores_by_the_mean_probability(command, workdir, tmp_path_factory):
    other = save(tmp_path_factory.mktemp("runs") / "another", tokenizer.train(LINES, 300, "bpe"), seed=4)
    both = transformer.load(workdir, ensemble=[other]).score(LINES, TARGETS)
    lines = command(LINES, TARGETS, f"--ensemble={other}")
    assert lines == "".join(f"{each.log_prob:.6f}\n" for each in both) != command(LINES, TARGETS)


def test_the_mean_and_warnings_are_logged_once(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(score, "GROUP", 2)
    files = write(tmp_path / "a", ["red", "", "cat", ""]), write(tmp_path / "b", ["red", "cat", "cat", ""])
    score.main(
        ["score", f"--workdir={workdir}", f"--source={files[0]}", f"--target={files[1]}", f"--output={tmp_path}/o"]
    )
    logged = capsys.readouterr().err
    assert logged.count("warning: 2 pairs have a blank side") == 1
    assert "checkpoint 0: 4 pairs, " in logged
    assert "perplexity" in logged


def test_fields_limit_the_lengths(command, workdir):
    model = transformer.load(workdir)
    (cut,) = model.score(LINES[-1:], ["red " * 20], max_source_tokens=3, max_extra_length=2)
    assert len(cut.tokens) == 5
    assert command(LINES[-1:], ["red " * 20], "--decode.max_source_tokens=3", "--decode.max_extra_length=2") == (
        f"{cut.log_prob:.6f}\n"
    )


@pytest.mark.parametrize(
    ("targets", "flags", "message"),
    [
        (["a", "b"], [], "in.en has 1 lines and .*in.de has 2: expected equal numbers"),
        (["a"], ["--decode.beam_size=3"], "scoring reads decode.max_source_tokens, max_extra_length.*, got beam_size"),
        (["a"], ["--decode.max_source_tokens=0"], "config.decode.max_source_tokens: expected at least 2, got 0"),
        (["a"], ["--output=DIR/in.de"], "would overwrite what is read"),
        (["a"], ["--checkpoint=77"], "checkpoint: expected latest"),
        (["a\0"], [], "in.de, line 1: holds a NUL character"),
    ],
)
def test_what_cannot_be_scored_is_one_message(command, targets, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        command(["a"], targets, *flags)
    assert "\n" not in str(caught.value)


def test_empty_files_have_no_scores(command):
    assert command([], []) == ""
