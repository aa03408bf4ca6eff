import collections
import itertools
import sys

import numpy as np
import pytest

from benchmarks import data_scale


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    monkeypatch.setattr(data_scale, "WORDS", 5_000)
    monkeypatch.setattr(data_scale, "CHUNK_PAIRS", 1_000)


def test_pairs_are_the_same_in_every_run_and_for_every_number():
    pairs = list(data_scale.generate_pairs(2_500))
    assert len(pairs) == 2_500
    assert list(data_scale.generate_pairs(1_200)) == pairs[:1_200]
    assert next(iter(data_scale.generate_pairs(1, seed=1))) != pairs[0]


def test_text_is_like_that_of_wmt():
    pairs = list(data_scale.generate_pairs(3_000))
    words = [[len(side.split()) for side in pair] for pair in pairs]
    source, target = np.array(words).T
    assert 20 < source.mean() < 30
    assert np.percentile(source, 99) > 3 * source.mean()
    assert np.corrcoef(source, target)[0, 1] > 0.9
    counts = collections.Counter(itertools.chain.from_iterable(pair[0].split() for pair in pairs))
    frequencies = [count for _, count in counts.most_common(200)]
    assert 5 < frequencies[9] / frequencies[99] < 20  # Zipf: 10
    assert 1 < len(pairs) - len(set(pairs)) < 60
    assert not any("\n" in side or side != side.strip() for pair in pairs for side in pair)


def test_text_is_written_once(tmp_path):
    data_scale.write_text(tmp_path, 50)
    lines = [(tmp_path / f"train.{language}").read_text().splitlines() for language in data_scale.LANGUAGES]
    assert list(zip(*lines, strict=True)) == list(data_scale.generate_pairs(50))
    before = (tmp_path / "train.en").stat()
    data_scale.write_text(tmp_path, 50)
    assert (tmp_path / "train.en").stat().st_ino == before.st_ino


TWO = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "x = bytearray(b'x') * 60_000_000; import time; time.sleep(0.8)"])
y = bytearray(b"y") * 50_000_000
child.wait()
sum(range(10_000_000))
print("done")
"""


def test_time_and_memory_are_of_all_processes():
    usage = data_scale.measure([sys.executable, "-c", TWO])
    assert usage.stdout == "done\n"
    assert 110 < usage.peak_mb < 200
    assert usage.seconds > 0.8
    assert 0.05 < usage.cpu_s < usage.seconds + 1
    with pytest.raises(RuntimeError, match="exit code 3"):
        data_scale.measure([sys.executable, "-c", "import sys; sys.exit(3)"])
