"""Preparing by several processes: the same bytes whatever their number and whatever is killed."""

import gzip
import itertools
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from transformer.config import DataConfig
from transformer.data import corpus, input_pipeline, prepared, shards, text_files, tokenizer
from transformer.runtime import files, progress
from transformer.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
SHARD_BYTES = 2_000

# Prepares a folder with its vocabulary by so many workers.
PREPARE = f"""
import sys
from transformer.config import DataConfig
from transformer.data import corpus, input_pipeline, shards, tokenizer, vocabulary
shards.SHARD_BYTES = {SHARD_BYTES}
folder, data_dir, workers = sys.argv[1:4]
given = folder + "/bpe.model" if len(sys.argv) == 4 else sys.argv[4]
data = DataConfig(name="text", dir=folder, data_dir=data_dir, vocab_size=300, tokenizer=given)
opened = corpus.open_corpus(data, tokenize=True, workers=int(workers))
trained = vocabulary.get_or_train_tokenizer(data, opened)
ids = input_pipeline.token_ids(data, opened, "train", trained, int(workers))
print(opened.digest)
"""


def sentence(rng, words):
    return " ".join(rng.choice(words) for _ in range(rng.randint(1, 12)))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with pairs of 21 shards, some of them blank, and a vocabulary."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(1)
    words = [a + b for a in "b d g k l m n".split() for b in ("a", "ei", "ü")]
    sides = [[sentence(rng, words) for _ in range(700)] for _ in range(2)]
    sides[0][5] = sides[1][600] = " "
    for language, lines in zip(("en", "de"), sides, strict=True):
        (folder / f"train.{language}").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"test.{language}").write_text("".join(f"{line}\n" for line in lines[:9]))
    tokenizer.train([*sides[0], *sides[1]], 300, "bpe").save(folder, "bpe.model")
    return folder


def start(*arguments, stderr=subprocess.PIPE):
    command = [sys.executable, "-c", PREPARE, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)


def prepare(*arguments):
    """Runs to the end; returns stdout and stderr."""
    process = start(*arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


def files_of(folder):
    """Path → content of all that is prepared."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def wanted(text, tmp_path_factory):
    """What one process prepares in one go."""
    folder = tmp_path_factory.mktemp("wanted")
    prepare(text, folder, 1)
    files = files_of(folder)
    assert sum("-train.array_record" in name for name in files) > 15
    assert sum("token_ids" in name for name in files) == 5
    return files


def done(folder):
    """The shards of training that are done."""
    return len(list(folder.glob("*/*/*.partial/train-*.done.json")))


def kill_and_go_on(text, folder, wanted, rng, workers, kills=1):
    """Kills when a random number of shards is done, and lets the last process end."""
    kept = 0
    for _ in range(kills):
        process = start(text, folder, workers)
        wait = rng.randint(1, 8)
        while process.poll() is None and done(folder) < kept + wait:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = done(folder)
    _, err = prepare(text, folder, workers)
    again = [int(match[1]) for match in re.finditer(r"data: (\d+) of \d+ shards were done before", err)]
    assert again == [kept + sum("-test.array_record" in name for name in wanted)]  # the test split comes first
    assert files_of(folder) == wanted
    assert not list(folder.rglob("*partial*"))
    assert not list(folder.rglob("incomplete*"))


def test_the_result_does_not_depend_on_the_number_of_workers(text, tmp_path, wanted):
    prepare(text, tmp_path, 2)
    assert files_of(tmp_path) == wanted


def test_after_kills_the_result_is_the_same_and_no_shard_is_made_twice(text, tmp_path, wanted):
    kill_and_go_on(text, tmp_path, wanted, random.Random(0), 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_after_six_kills_more(text, tmp_path, wanted, seed):
    kill_and_go_on(text, tmp_path, wanted, random.Random(seed), 1 + seed % 3, kills=2)


def test_two_processes_on_one_folder_wait_for_each_other(text, tmp_path, wanted):
    (folder,) = {pathlib.Path(name).parts[1] for name in wanted if name.startswith("parallel_text")}
    (tmp_path / "parallel_text" / folder).mkdir(parents=True)
    with files.file_lock(tmp_path / "parallel_text" / folder):
        processes = [start(text, tmp_path, 1) for _ in range(2)]
        for process in processes:
            assert f"another process is preparing {tmp_path}" in process.stderr.readline()
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert sum("data: sentence pairs" in err for _, err in results) == 1
    assert files_of(tmp_path) == wanted


@pytest.mark.slow
def test_a_trained_vocabulary_gives_the_same_ids_in_a_second_pass_and_after_a_kill(text, tmp_path, wanted):
    one, two = tmp_path / "one", tmp_path / "two"
    prepare(text, one, 1, "bpe")
    process = start(text, two, 2, "bpe")
    while process.poll() is None and len(list(two.glob("token_ids/*.partial/*.done.json"))) < 3:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    prepare(text, two, 2, "bpe")
    assert files_of(one) == files_of(two)
    assert not list(two.rglob("*partial*"))


def config(folder, data_dir, **fields):
    return DataConfig(name="text", dir=str(folder), data_dir=str(data_dir), **fields)


def test_ids_made_in_one_pass_are_those_of_each_sentence(text, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD_BYTES * 5)
    data = config(text, tmp_path, tokenizer=str(text / "bpe.model"), vocab_size=300)
    opened = corpus.open_corpus(data, tokenize=True, workers=1)
    trained = tokenizer.load(text / "bpe.model")
    monkeypatch.setattr(shards, "run", lambda *_: pytest.fail("tokenized again"))
    ids = input_pipeline.token_ids(data, opened, "train", trained)
    pairs = list(opened.split("train"))
    assert len(ids.source) == len(pairs) < 698
    for side, jagged in enumerate(ids):
        flat = np.concatenate(trained.encode([pair[side] for pair in pairs]))
        np.testing.assert_array_equal(jagged.flat, flat)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_progress_of_tokenizing_ends_at_its_total(text, tmp_path, monkeypatch, split):
    phases, shown = [], progress.shown
    opened = corpus.open_corpus(config(text, tmp_path), workers=1)
    monkeypatch.setattr(progress, "shown", lambda phase: phases.append(phase) or shown(phase))
    opened.split(split).make_token_ids(tmp_path / "ids", tokenizer.load(text / "bpe.model"), workers=1)
    (tokenizing,) = (phase for phase in phases if phase.name == f"tokenizing {split}")
    total = {"train": 700, "validation": len(opened.split("validation"))}[split]
    assert (tokenizing.completed, tokenizing.total, tokenizing.unit) == (total, total, "pairs")


def test_another_vocabulary_or_direction_takes_nothing_of_an_interrupted_preparation(text, tmp_path):
    block = shards.Block("train-00000", [shards.Texts([("a b", "c"), ("", "d")])])
    jobs = [
        shards.ShardJob(str(tmp_path), ("en", "de"), store=True, scan=True),
        shards.ShardJob(str(tmp_path), ("en", "de"), store=True, scan=True, reverse=True),
        shards.ShardJob(str(tmp_path), ("en", "de"), True, True, tokenizer=tokenizer.load(text / "bpe.model")),
    ]
    for job in jobs:
        assert job(block).shard.is_new
        assert not job(block).shard.is_new
    other = shards.Block("train-00000", [shards.Texts([("a b", "c"), ("e", "d")])])
    assert jobs[-1](other).shard.is_new


@pytest.mark.parametrize("end", ["records", "source.ids", "target.ids", "pairs.npy", "done.json"])
def test_a_shard_that_was_damaged_is_made_again(text, tmp_path, end):
    block = shards.Block("train-00000", [shards.Texts([("a b", "c"), ("", "d")])])
    job = shards.ShardJob(str(tmp_path), ("en", "de"), True, True, tokenizer=tokenizer.load(text / "bpe.model"))
    job(block)
    path = job.path("train-00000", end)
    content = path.read_bytes()
    for damaged in (content[:-1], b"", bytes([content[0] ^ 1]) + content[1:]):
        path.write_bytes(damaged)
        assert job(block).shard.is_new
        assert path.read_bytes() == content


def write(folder, name, content):
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)


TEXTS = [
    b"",
    b"\xef\xbb\xbf",
    b"\xef\xbb\xbf\n",
    b"a",
    b"a\n",
    b"\n",
    b"a\n\nb",
    b"\xef\xbb\xbfa\r\nb\r\n\xef\xbb\xbfc\rd\n",
    b"x\r",
    "é\u2028ü\n".encode() * 9,
]


@pytest.mark.parametrize("size", [16, 64, 1 << 25])
@pytest.mark.parametrize("source", TEXTS)
def test_lines_are_those_that_are_read_one_by_one(tmp_path, monkeypatch, source, size):
    monkeypatch.setattr(shards, "SHARD_BYTES", size)
    count = len(list(text_files.read_lines(write(tmp_path, "a.en", source))))
    paths = write(tmp_path, "a.en", source), write(tmp_path, "a.de.gz", b"some words\n" * count)
    pairs = [pair for part in shards.line_parts(*paths) for pair in part.pairs()]
    assert pairs == list(text_files.read_parallel(*paths))


@pytest.mark.parametrize("target", [b"\xef\xbb\xbf", b"a", b"a\n", b"\n"])
def test_a_byte_order_mark_alone_is_an_empty_line(tmp_path, target):
    for paths in itertools.permutations((write(tmp_path, "a.en", b"\xef\xbb\xbf"), write(tmp_path, "a.de", target))):
        pairs = [pair for part in shards.line_parts(*paths) for pair in part.pairs()]
        assert pairs == list(text_files.read_parallel(*paths))
        assert len(pairs) == 1


@pytest.mark.parametrize("counts", [(3, 4), (4, 3), (0, 1), (2000, 1999), (1, 2000)])
@pytest.mark.parametrize("last", [b"", b"no end"])
def test_sides_that_differ_in_count_are_one_message(tmp_path, monkeypatch, counts, last):
    monkeypatch.setattr(shards, "SHARD_BYTES", 160)
    paths = [write(tmp_path, f"a.{i}", b"line\n" * count + last) for i, count in enumerate(counts)]
    counts = [count + bool(last) for count in counts]
    longer = paths[counts[1] > counts[0]]
    with pytest.raises(UserError) as error:
        list(shards.line_parts(*paths))
    assert f"{paths[0]} has {counts[0]:,} lines and {paths[1]} has {counts[1]:,}: expected" in str(error.value)
    assert f"line {min(counts) + 1:,} of {longer} has no counterpart" in str(error.value)


@pytest.mark.parametrize(("bad", "says"), [(b"\xff", "not UTF-8 (byte 3 of the line, 0xff)"), (b"\0", "NUL character")])
@pytest.mark.parametrize("workers", [1, 2])
def test_invalid_text_names_file_and_line_and_leaves_nothing(tmp_path, monkeypatch, bad, says, workers):
    monkeypatch.setattr(shards, "SHARD_BYTES", 160)
    monkeypatch.setattr(shards, "default_workers", lambda: workers)
    (tmp_path / "text").mkdir()
    lines = [b"line"] * 99
    write(tmp_path / "text", "train.en", b"\n".join(lines))
    lines[76] = b"li" + bad
    path = write(tmp_path / "text", "train.de", b"\n".join(lines))
    with pytest.raises(UserError) as error:
        corpus.open_corpus(config(tmp_path / "text", tmp_path / "data"))
    assert str(error.value).startswith(f"{path}, line 77: ")
    assert says in str(error.value)
    assert not list((tmp_path / "data").rglob("*record*"))
    assert not list((tmp_path / "data").rglob("*partial*"))


def test_overlong_lines_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(shards, "SHARD_BYTES", 640)
    paths = write(tmp_path, "a.en", b"a\n" * 3), write(tmp_path, "a.de", b"b\n" * 2 + b"b" * 200 + b"\n")
    with pytest.raises(UserError, match=r"a\.de, line 3: longer than"):
        list(shards.line_parts(*paths))


def test_finishing_deletes_interrupted_preparations_of_the_same_files_alone(tmp_path, monkeypatch):
    def write_text(name, content, languages=("en", "de")):
        (tmp_path / name).mkdir(exist_ok=True)
        for language in languages:
            write(tmp_path / name, f"train.{language}", content)
        fields = dict(zip(("source_language", "target_language"), languages, strict=True))
        return config(tmp_path / name, tmp_path / "data", **fields)

    def interrupt(data):
        """Returns the folder with what is done."""
        before = set((tmp_path / "data").rglob("*.partial"))
        with monkeypatch.context() as patch:
            patch.setattr(shards, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("interrupted")))
            with pytest.raises(UserError, match="interrupted; fix"):
                corpus.open_corpus(data)
        (work,) = set((tmp_path / "data").rglob("*.partial")) - before
        return work

    earlier = interrupt(write_text("one", b"a\nb\n"))
    held = interrupt(write_text("one", b"a\nc\n"))
    others = interrupt(write_text("two", b"a\nb\nc\n")), interrupt(write_text("one", b"x\ny\n", ("en", "fr")))
    reverse = interrupt(write_text("one", b"a\nd\n", ("de", "en")))
    with files.file_lock(held.parent):  # somebody works at it
        corpus.open_corpus(write_text("one", b"a\ne\n"))
    assert not earlier.exists()
    assert all(work.exists() for work in (held, reverse, *others))


@pytest.mark.parametrize("call", ["write", "close"])
def test_a_full_disk_is_one_message_and_what_is_done_is_kept(tmp_path, monkeypatch, call):
    (tmp_path / "text").mkdir()
    for language in ("en", "de"):
        write(tmp_path / "text", f"train.{language}", b"".join(b"line %d\n" % n for n in range(200)))
    monkeypatch.setattr(shards, "SHARD_BYTES", 500)
    monkeypatch.setattr(shards, "default_workers", lambda: 1)
    writer, files = prepared.records.ArrayRecordWriter, itertools.count()

    class Full:
        def __init__(self, *args):
            self._writer, self._full = writer(*args), next(files) >= 3

        def write(self, record):
            if self._full and call == "write":
                raise RuntimeError("No space left on device")
            self._writer.write(record)

        def close(self):
            if self._full:
                raise RuntimeError("No space left on device")
            self._writer.close()

    data = config(tmp_path / "text", tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(prepared.records, "ArrayRecordWriter", Full)
        with pytest.raises(UserError, match=r"No space left on device; fix .* kept in .*\.partial"):
            corpus.open_corpus(data)
    assert not list((tmp_path / "data").rglob("dataset_info.json"))
    assert done(tmp_path / "data") == 3
    assert len(corpus.open_corpus(data).split("train")) == 198
    assert not list((tmp_path / "data").rglob("*partial*"))


# Prepares and reads many shards in processes that may open 256 files at once.
MANY = """
import resource, sys
from transformer.config import DataConfig
from transformer.data import corpus, input_pipeline, shards, tokenizer
from transformer.config import default_config
from transformer.config.validation import to_dataclasses
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
shards.SHARD_BYTES = 100
folder, data_dir = sys.argv[1:]
fields = {"name": "text", "dir": folder, "data_dir": data_dir, "vocab_size": 300, "tokenizer": folder + "/bpe.model"}
data = DataConfig(**fields)
opened = corpus.open_corpus(data, tokenize=True)
train = opened.split("train")
assert train[0] != train[len(train) - 1]
assert sum(1 for _ in train) == len(train)
ids = input_pipeline.token_ids(data, opened, "train", tokenizer.load(folder + "/bpe.model"))
config = default_config()
config.data.max_length = 64
schedule = input_pipeline.make_batch_schedule(to_dataclasses(config.to_dict()), ids)
batches = input_pipeline.train_iterator(schedule, ids, start=0, num_steps=2)
print(len(train._records.files()), [batch.target_BT.ndim for batch in batches])
"""


@pytest.mark.slow
def test_twelve_hundred_shards_need_few_open_files(text, tmp_path):
    for language in ("en", "de"):
        lines = (text / f"train.{language}").read_text() * 5
        (tmp_path / f"train.{language}").write_text(lines)
    (tmp_path / "bpe.model").write_bytes((text / "bpe.model").read_bytes())
    command = [sys.executable, "-c", MANY, tmp_path, tmp_path / "data"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    count, _, shapes = result.stdout.partition(" ")
    assert (int(count) > 1200, shapes) == (True, "[2, 2]\n")
