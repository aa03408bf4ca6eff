"""python -m transformer.prepare, end to end: afterwards nothing is left for train.py to make."""

import contextlib
import http.server
import os
import re
import subprocess
import sys
import threading
import urllib.request

import pytest

from tests.conftest import ROOT
from tests.helpers import wmt_archives
from transformer import command_line, prepare
from transformer.config import validation
from transformer.data import corpus as corpora
from transformer.data import input_pipeline, mixture_corpus, tokenizer, vocabulary
from transformer.runtime.errors import UserError


def flags(config, **fields):
    """Of a config by its name, such as text or wmt14:en_de_base."""
    file, colon, variant = config.partition(":")
    given = f"--config={ROOT}/configs/{file}.py{colon}{variant}"
    return ["prepare", given, *(f"--config.{key}={v}" for key, v in fields.items())]


def resolved(arguments):
    return command_line.config_flags([argument for argument in arguments if argument != "--report"])[0]


def assert_nothing_is_left_to_do(config, monkeypatch, workdir, capfd):
    """What loop.fit does with data before its first update."""
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "train", lambda *_: pytest.fail("trains a vocabulary"))
        patch.setattr(tokenizer.Tokenizer, "encode", lambda *_: pytest.fail("tokenizes"))
        corpus = corpora.open_corpus(config.data)
        trained = vocabulary.get_tokenizer(config.data, corpus, workdir)
        ids = input_pipeline.token_ids(config.data, corpus, "train", trained)
    plan = input_pipeline.make_batch_schedule(config, ids)
    batch = next(input_pipeline.train_iterator(plan, ids, start=0, num_steps=1))
    assert batch.target_BT.shape[0] >= 1
    assert "preparing" not in capfd.readouterr().err
    return corpus, trained


@pytest.fixture
def text(tmp_path):
    for split, count in (("train", 300), ("val", 9), ("test", 5)):
        for side in ("en", "de"):
            lines = wmt_archives.plain(wmt_archives.sentences(split, side, count)[11:])
            (tmp_path / f"{split}.{side}").write_bytes(lines)
    return {"data.dir": tmp_path, "data.data_dir": tmp_path / "data", "data.vocab_size": 300}


def test_text_is_prepared_and_jax_not_imported(tmp_path, text, monkeypatch, capfd):
    code = "import sys; from transformer import prepare; prepare.main(sys.argv)"
    code += "; print([name for name in ('jax', 'tensorflow', 'flax') if name in sys.modules])"
    arguments = flags("text", **text)
    command = [sys.executable, "-W", "error", "-c", code, *arguments[1:]]
    result = subprocess.run(command, capture_output=True, cwd=ROOT, text=True)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr
    assert f"ready in {tmp_path}/data: 300 training pairs, without 0 longer than" in result.stderr
    assert_nothing_is_left_to_do(resolved(arguments), monkeypatch, tmp_path / "workdir", capfd)


def test_without_a_report_stdout_is_empty_and_a_second_run_reuses_the_data(text, capfd):
    prepare.main(flags("text", **text))
    out, err = capfd.readouterr()
    assert out == ""
    assert "training a bpe vocabulary of 300 subword tokens" in err
    prepare.main(flags("text", **text))
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search("^ready in ", err, re.MULTILINE)
    assert "vocabulary" not in err
    assert "preparing" not in err


def test_for_fine_tuning_the_vocabulary_is_that_of_the_other_run(tmp_path, text, monkeypatch, capfd):
    tokenizer.train(["some words of another text"], 300, "bpe").save(tmp_path / "base" / "tokenizer")
    monkeypatch.setattr(tokenizer, "train", lambda *_: pytest.fail("trains a vocabulary"))
    prepare.main(flags("text", **text, **{"train.init_from": tmp_path / "base"}))
    assert "300 subword tokens" in capfd.readouterr().err


def test_the_report_is_of_every_split(text, capfd):
    prepare.main([*flags("text", **text), "--report"])
    out = capfd.readouterr().out
    for name in ("train", "validation", "test", "Sentence pairs", "steps an epoch"):
        assert name in out


class Proxy(http.server.BaseHTTPRequestHandler):
    """Serves the small archives at their real addresses, as a proxy does; one of them is cut the first time."""

    archives = wmt_archives.published()

    def log_message(self, *_):
        pass

    def do_GET(self):
        content = self.archives[self.path]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(
            content[start : len(content) // 2] if "europarl" in self.path and not start else content[start:]
        )


@contextlib.contextmanager
def proxied(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setattr(urllib.request, "_opener", None)  # which would remember another proxy
        yield
        server.shutdown()
        thread.join()


def test_a_mixture_that_cannot_be_trained_is_refused_before_it_is_prepared(tmp_path, monkeypatch):
    (tmp_path / "x.tsv").write_text("a\tb\n")
    both = [{"name": "text", "train": f"{tmp_path}/x.tsv", "source_language": a, "target_language": b}
            for a, b in (("en", "de"), ("de", "en"))]  # fmt: skip
    config = validation.validate({"data": {"mixture": tuple(both), "data_dir": f"{tmp_path}/data"}}, strict=False)
    monkeypatch.setattr(mixture_corpus, "open_sources", lambda *_, **__: pytest.fail("prepares"))
    with pytest.raises(UserError, match="entries 1 and 2 are two directions with the same columns"):
        prepare.prepare(config, report=False)


@pytest.mark.parametrize(("name", "archives"), [("en_de_base", 4), ("en_fr_base", 6)])
def test_wmt_is_fetched_and_prepared_from_end_to_end(tmp_path, monkeypatch, capfd, name, archives):
    wmt_archives.record(monkeypatch, Proxy.archives)
    fields = {"data.data_dir": tmp_path, "data.vocab_size": 420, "train.batch_tokens": 512}
    arguments = [*flags(f"wmt14:{name}", **fields), "--report"]
    with proxied(monkeypatch):
        prepare.main(arguments)
    out, err = capfd.readouterr()
    assert err.count("data: downloading http://") == archives
    shown = [line.split()[1] for line in out.splitlines() if line.startswith("│ ")]
    assert shown[:3] == ["train", "validation", "test"]
    config = resolved(arguments)
    corpus, trained = assert_nothing_is_left_to_do(config, monkeypatch, tmp_path / "workdir", capfd)
    assert trained.vocab_size == 420
    source, target = list(corpus.split("test"))[-1]
    language = config.data.target_language
    assert source == f"en newstest2014-{language} 7 stone red"
    assert target == f"{language} newstest2014-{language} 7 stone red"
    assert ("en newstest2013 3 old water", f"{language} newstest2013 3 old water") in list(corpus.split("validation"))


def test_what_cannot_be_fetched_is_one_message(tmp_path):
    """No server, no TensorFlow: exit code 2, each archive with its address, and the folder to put it into."""
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    command = [
        sys.executable,
        "-m",
        "transformer.prepare",
        *flags("wmt14:en_de_base", **{"data.data_dir": tmp_path})[1:],
    ]
    result = subprocess.run(command, capture_output=True, cwd=ROOT, text=True, env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert "4 of 4 archives are missing" in result.stderr
    assert f"into {tmp_path}/downloads/manual (config.data.manual_dir)" in result.stderr
    wanted = [url for url in Proxy.archives if re.search("europarl|commoncrawl|nc-v13|dev.tgz", url)]
    assert len(wanted) == 4
    for url in wanted:
        assert f"{url.rpartition('/')[2]}  from {url}  (" in result.stderr
    assert not list(tmp_path.glob("**/*record*"))


def test_a_config_that_cannot_be_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="data set 'nothing' in TFDS nor prepared in"):
        prepare.main(flags("text", **{"data.name": "nothing", "data.data_dir": tmp_path}))
    with pytest.raises(UserError, match="all 300 training pairs are longer"):
        prepare.main(flags("text", **{**text, "data.max_length": 2}))
