import hashlib
import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from transformer.runtime import environment, file_digests
from transformer.runtime.file_digests import FileDigests


@pytest.fixture
def read(monkeypatch):
    """The files that are read from now on."""
    names, hash_file = [], file_digests.hash_file

    def noted(path, phase):
        names.append(os.path.basename(path))
        return hash_file(path, phase)

    monkeypatch.setattr(file_digests, "hash_file", noted)
    return names


def make_files(folder, count=3):
    paths = [folder / f"file {number}" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(b"content %d" % number * 1000)
    return paths


def compute(cache, paths):
    digests = FileDigests(cache).compute(paths, "hashing")
    assert digests == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_files_are_read_once(tmp_path, read):
    paths, cache = make_files(tmp_path), tmp_path / "cache" / "digests.json"
    compute(cache, paths)
    assert sorted(read) == ["file 0", "file 1", "file 2"]
    compute(cache, paths)
    compute(cache, paths[:2])
    assert len(read) == 3


@pytest.mark.parametrize("change", ["bit", "times kept", "replaced", "cut"])
def test_a_changed_file_is_read_again_and_no_other(tmp_path, read, change):
    paths, cache = make_files(tmp_path), tmp_path / "digests.json"
    compute(cache, paths)
    times = os.stat(paths[1])
    content = bytearray(paths[1].read_bytes())
    content[5] ^= 1
    if change == "replaced":
        (tmp_path / "new").write_bytes(content)
        os.utime(tmp_path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.replace(tmp_path / "new", paths[1])
    else:
        paths[1].write_bytes(content[:-1] if change == "cut" else content)
    if change == "times kept":
        os.utime(paths[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    del read[:]
    compute(cache, paths)
    assert read == ["file 1"]


def test_what_was_written_while_times_could_stay_equal_is_read_again(tmp_path, read, monkeypatch):
    paths, cache = make_files(tmp_path), tmp_path / "digests.json"
    monkeypatch.setattr(file_digests.time, "sleep", lambda _: None)
    compute(cache, paths)
    monkeypatch.setattr(file_digests, "TIME_GRANULARITY_NS", 3_600_000_000_000)
    compute(cache, paths)
    assert len(read) == 6


def test_digests_known_from_writing_are_recorded(tmp_path, read):
    paths, cache = make_files(tmp_path), tmp_path / "digests.json"
    digests = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    FileDigests(cache).record(digests)
    compute(cache, paths)
    assert not read


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 3}', '{"x": [1, 2]}', "3"])
def test_a_damaged_cache_is_made_anew(tmp_path, read, content):
    paths, cache = make_files(tmp_path, 1), tmp_path / "digests.json"
    compute(cache, paths)
    cache.write_text(content)
    compute(cache, paths)
    compute(cache, paths)
    assert len(read) == 2


def test_files_that_are_gone_are_forgotten(tmp_path, read):
    paths, cache = make_files(tmp_path), tmp_path / "digests.json"
    compute(cache, paths)
    paths[0].unlink()
    with pytest.raises(FileNotFoundError):
        compute(cache, paths)
    paths[1].write_bytes(b"x")
    compute(cache, paths[1:])
    assert "file 0" not in cache.read_text()


def test_the_user_s_cache_serves_folders_that_are_read_only(tmp_path, read, monkeypatch):
    paths = make_files(tmp_path)
    monkeypatch.setattr(environment, "cache_folder", lambda: tmp_path / "user")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "data" and access(path, mode))
    for _ in range(2):
        compute(tmp_path / "data" / "digests.json", paths)
    assert len(read) == 3
    assert len(list((tmp_path / "user").glob("digests/*.json"))) == 1


SLOW = """
import sys, time
from transformer.runtime import file_digests
hash_file = file_digests.hash_file
def slow(*arguments):
    print("read", flush=True)
    time.sleep(0.5)
    return hash_file(*arguments)
file_digests.hash_file = slow
file_digests.FileDigests(sys.argv[1]).compute(sys.argv[2:], "hashing")
"""


def test_of_several_processes_one_reads(tmp_path):
    paths = make_files(tmp_path, 2)
    time.sleep(0.05)
    command = [sys.executable, "-c", SLOW, tmp_path / "digests.json", *paths]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sum(process.communicate()[0].count("read") for process in processes) == 2
    assert {process.returncode for process in processes} == {0}
