"""The translate_corpus command: the translator's own lines in files that training reads, resumed at the first missing
shard, shared by several commands."""

import json
import lzma
import os
import signal
import time

import numpy as np
import pytest

import transformer
from tests.commands.test_translate import save, write
from tests.decoding.test_translator import LINES
from tests.helpers import commands
from tests.helpers.clock import FakeClock
from tests.helpers.processes import Processes, on_hosts
from transformer import translate_corpus
from transformer.config import DataConfig
from transformer.data import local_text, synthetic_corpus, tokenizer
from transformer.data.synthetic_corpus import SyntheticCorpus
from transformer.runtime.errors import StoppedError, UserError

TEXT = [*LINES[:5], "", " ", *LINES[5:12]]  # 14 lines, of which two are blank


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("runs") / "one", tokenizer.train(LINES, 300, "bpe"))


@pytest.fixture(scope="module")
def expected(workdir):
    return transformer.load(workdir).translate(TEXT)


@pytest.fixture
def flags(workdir, tmp_path):
    """Of a small corpus in four shards."""
    write(tmp_path / "mono.1.en", TEXT[:6])
    (tmp_path / "mono.2.en.xz").write_bytes(lzma.compress("".join(f"{line}\n" for line in TEXT[6:]).encode()))
    return [
        f"--workdir={workdir}", f"--input={tmp_path}/mono.*", "--input_side=target", f"--output={tmp_path}/out",
        "--shard_lines=4",
    ]  # fmt: skip


def run(*flags):
    translate_corpus.main(["translate_corpus", *map(str, flags)])


def read(folder):
    """The lines of both sides, English and German."""
    return tuple((folder / f"train.{language}").read_bytes().decode().split("\n")[:-1] for language in ("en", "de"))


def test_training_reads_what_is_written(flags, expected, tmp_path, capsys):
    run(*flags)
    assert read(tmp_path / "out") == (TEXT, expected)
    logged = capsys.readouterr()
    assert logged.out == ""
    assert "14 lines to translate; loading JAX and the model of " in logged.err
    hint = f"--config.data.dir={tmp_path}/out --config.data.source_language=de --config.data.target_language=en"
    assert hint in logged.err
    data = DataConfig(name="text", dir=f"{tmp_path}/out", source_language="de", target_language="en")
    pairs = [pair for part in local_text.find_splits(data)["train"].parts() for pair in part.pairs()]
    assert pairs == list(zip(expected, TEXT, strict=True))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    settings = manifest["settings"]
    assert (manifest["complete"], manifest["shards"], manifest["source"]) == (True, 4, "train.de")
    assert (settings["model"]["steps"], settings["input_lines"], settings["decode"]["beam_size"]) == ([0], 14, 2)
    assert len(settings["model"]["params"]) == 64
    run(*flags)  # which finds it complete
    assert "resuming, 4 of 4 shards are there" in capsys.readouterr().err


def test_sampled_and_tagged_sources_are_the_same_for_any_shards(flags, workdir, tmp_path):
    sampled = transformer.load(workdir).translate(TEXT, method="sample", seed=5)
    fields = ["--decode.method=sample", "--decode.seed=5", "--tag=<bt>"]
    run(*flags, *fields)
    tagged = [f"<bt> {line}" if line.strip() else line for line in sampled]
    assert read(tmp_path / "out") == (TEXT, tagged)
    assert [line for line, source in zip(tagged, TEXT, strict=True) if not source.strip()] == ["", ""]
    run(*flags[:3], *fields, f"--output={tmp_path}/other", "--shard_lines=100")
    assert read(tmp_path / "other") == (TEXT, tagged)


def test_distilled_text_has_its_translations_as_target(flags, tmp_path, capsys):
    run(*(flag.replace("=target", "=source") for flag in flags))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["source"], manifest["target"]) == ("train.en", "train.de")
    assert "--config.data.source_language=en --config.data.target_language=de" in capsys.readouterr().err


@pytest.mark.parametrize("after", [0, 2])
def test_a_stopped_command_is_resumed_at_the_first_missing_shard(flags, expected, tmp_path, monkeypatch, capsys, after):
    write_shard, written = SyntheticCorpus.write, []

    def write_and_stop(corpus, index, translations):
        if len(written) == after:
            os.kill(os.getpid(), signal.SIGTERM)
        write_shard(corpus, index, translations)
        written.append(index)

    monkeypatch.setattr(SyntheticCorpus, "write", write_and_stop)
    with pytest.raises(StoppedError, match=f"stopped by SIGTERM; {after + 1} of 4 shards are saved") as error:
        run(*flags)
    assert error.value.exit_code == 143
    assert "SIGTERM: stopping after this batch of sentences; send it again" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "manifest.json", "shards"]
    monkeypatch.setattr(SyntheticCorpus, "write", lambda *args: (written.append(args[1]), write_shard(*args)))
    run(*flags)
    assert written == [0, 1, 2, 3]
    assert read(tmp_path / "out") == (TEXT, expected)
    assert f"resuming, {after + 1} of 4 shards are there" in capsys.readouterr().err


def test_parts_do_no_shard_twice_and_the_last_joins_them(flags, expected, tmp_path, monkeypatch, capsys):
    write_shard, written = SyntheticCorpus.write, []
    monkeypatch.setattr(SyntheticCorpus, "write", lambda *args: (written.append(args[1]), write_shard(*args)))
    run(*flags, "--part=2/3")
    assert written == [1]
    assert "out: 3 of 4 shards are left to other commands, from shard 0 on; the last" in capsys.readouterr().err
    run(*flags, "--part=1/3")
    assert not (tmp_path / "out" / "train.en").exists()
    run(*flags, "--part=3/3")
    assert written == [1, 0, 3, 2]
    assert read(tmp_path / "out") == (TEXT, expected)


def test_a_shard_that_another_command_holds_is_left_to_it(flags, expected, tmp_path, monkeypatch, capsys):
    write_shard, held = SyntheticCorpus.write, []

    def hold_the_next(corpus, index, translations):
        if not held:
            held.append(corpus.claim(2))
            held[0].__enter__()
        write_shard(corpus, index, translations)

    monkeypatch.setattr(SyntheticCorpus, "write", hold_the_next)
    run(*flags)
    assert "1 of 4 shards are left to other commands, from shard 2 on" in capsys.readouterr().err
    held[0].__exit__(None, None, None)
    run(*flags)
    assert read(tmp_path / "out") == (TEXT, expected)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--decode.beam_size=1"], r"other settings: decode\.beam_size: 2 → 1\. Give the same ones to resume it"),
        (["--checkpoint=average:1"], r"other settings: model\.average: false → true\. Give"),
        (["--tag=<bt>"], 'other settings: tag: "" → "<bt>"'),
    ],
)
def test_a_resumed_corpus_has_one_setting(flags, extra, message):
    run(*flags, "--part=4/4")
    with pytest.raises(UserError, match=message):
        run(*flags, *extra)
    run(*flags, "--part=4/4", "--decode.batch_rows=4")  # which changes no translation


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tag=<bt>", "--input_side=source"], "--tag marks synthetic sources: it goes with --input_side=target"),
        (["--tag=a b"], "--tag='a b': expected one word without spaces"),
        (["--input=DIR/none.*"], "--input: expected files that match .*none.*, found none"),
        (["--input=DIR/none"], "none: there is no such file"),
        (["--input=DIR/empty"], "empty: expected lines to translate, found none"),
        (["--input=DIR/nul"], "nul, line 2: holds a NUL character"),
        (["--ensemble=DIR/none"], "none: expected a folder that train.py wrote, found none"),
        (["--workdir=DIR/none"], "none: expected a folder that train.py wrote, found none"),
        (["--decode.beam_size=0"], r"config\.decode\.beam_size: expected at least 1, got 0"),
        (["--output=DIR/nul"], "/nul: .*; check the path"),
    ],
)
def test_what_cannot_be_translated_is_one_message(flags, tmp_path, extra, message):
    (tmp_path / "empty").touch()
    write(tmp_path / "nul", ["a", "\0"])
    with pytest.raises(UserError, match=message) as error:
        run(*flags, *(flag.replace("DIR", str(tmp_path)) for flag in extra))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/train.*"))


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "a/b"])
def test_a_part_is_one_of_several(flags, part):
    stderr = commands.run("-m", "transformer.translate_corpus", *flags, f"--part={part}", code=2).stderr.decode()
    assert f"--part: expected I/N with I from 1 to N, such as 1/4, got '{part}'" in stderr


def test_progress_has_a_rate_and_the_time_left(tmp_path, monkeypatch, capsys):
    """Of this command's own work: what was there before, or is of others, does not count."""
    clock = FakeClock(monkeypatch)
    write(tmp_path / "mono", ["line"] * 50)
    text = synthetic_corpus.scan([str(tmp_path / "mono")])
    corpus = SyntheticCorpus(tmp_path / "out", text, ("en", "de"), "source", 10, {}, {})
    corpus.open()
    corpus.write(1, ["Zeile"] * 10)

    def translate(lines, advance):
        for _ in range(2):
            clock.sleep(5)
            advance(5)
        return ["Zeile"] * 10

    with corpus.claim(3):
        translate_corpus.translate_shards(corpus, range(5), translate, "", lambda: None)
    resumed, first, second, third = capsys.readouterr().err.splitlines()
    assert resumed == f"{tmp_path}/out: resuming, 1 of 5 shards are there"
    assert first == "translating: 15/50 lines · 1.0 lines/s · 0:00:10 elapsed · 0:01:10 left"
    assert second == "translating: 25/50 lines · 1.0 lines/s · 0:00:20 elapsed · 0:00:33 left"
    assert third == "translating: 35/40 lines · 1.0 lines/s · 0:00:30 elapsed · 0:00:06 left"
    assert corpus.missing() == [3]


@pytest.mark.slow
def test_an_ensemble_translates_too(flags, workdir, tmp_path):
    run(*flags, f"--ensemble={workdir}", "--decode.beam_size=1")
    both = transformer.load(workdir, ensemble=[workdir]).translate(TEXT, beam_size=1)
    assert read(tmp_path / "out") == (TEXT, both)
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["model"] == settings["model2"]


@pytest.mark.hosts
def test_two_hosts_share_the_shards(flags, expected, tmp_path):
    command = ["-m", "transformer.translate_corpus", *flags]
    with on_hosts(2, command, tmp_path / "logs", devices=2) as pair:
        assert pair.wait() == [0, 0], pair.stderr(0) + pair.stderr(1)
        assert "train on them: python train.py" in pair.stderr(0)
    assert read(tmp_path / "out") == (TEXT, expected)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock", "manifest.json", "train.de", "train.en",
    ]  # fmt: skip


@pytest.mark.hosts
def test_a_signal_to_one_host_ends_both_and_a_killed_command_is_resumed(workdir, tmp_path):
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(LINES[0].split() + LINES[7].split(), 12)) for _ in range(2400)]
    write(tmp_path / "mono", lines)
    command = [
        "-m", "transformer.translate_corpus", f"--workdir={workdir}", f"--input={tmp_path}/mono",
        "--input_side=target", f"--output={tmp_path}/out", "--shard_lines=50",
    ]  # fmt: skip
    shards = tmp_path / "out" / "shards"

    def done():
        return {path.name: path.stat().st_mtime_ns for path in shards.glob("*[0-9]")}

    def wait_for_shards(processes, count):
        deadline = time.monotonic() + 180
        while len(done()) < count:
            assert time.monotonic() < deadline, processes.stderr(0)
            assert processes.all[0].poll() is None, processes.stderr(0)
            time.sleep(0.05)

    with on_hosts(2, command, tmp_path / "logs", devices=1) as pair:
        wait_for_shards(pair, 2)
        pair.all[1].send_signal(signal.SIGTERM)
        assert pair.wait() == [143, 143], pair.stderr(0) + pair.stderr(1)
        assert "stopped by SIGTERM; " in pair.stderr(1)
        assert "host 1 (process " in pair.stderr(0)
    before = done()
    with Processes([command, command], 1, tmp_path / "logs") as two:
        wait_for_shards(two, len(before) + 2)
        assert done().items() >= before.items()  # none is translated again
        two.all[0].kill()
        assert two.wait()[1] == 0, two.stderr(1)
    english, german = read(tmp_path / "out")
    assert english == lines
    assert german == transformer.load(workdir).translate(lines)
