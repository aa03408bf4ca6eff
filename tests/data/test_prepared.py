import fcntl
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest
import tensorflow_datasets as tfds

from transformer.data import prepared
from transformer.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]

# A builder that says when it starts and then takes its time, to be killed or raced against.
SLOW = """
import sys, time
import tensorflow_datasets as tfds
from transformer.data import prepared

class SlowPairs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.Translation(languages=("en", "de")))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}
    def _generate_examples(self):
        print("started", flush=True, file=sys.stderr)
        for row in range(10):
            time.sleep(float(sys.argv[2]))
            yield row, {"en": str(row), "de": "x"}

opened = prepared.prepare(lambda: SlowPairs(data_dir=sys.argv[1], file_format="array_record"), owned=True)
print(len(opened.records("train")), "pairs", opened.folder)
"""


class PreparedPairs(tfds.core.GeneratorBasedBuilder):
    """Five pairs in two splits, or an error."""

    VERSION = tfds.core.Version("1.0.0")
    error: BaseException | None = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.Translation(languages=("en", "de")), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        print("noise on stdout")
        return {"train": self._generate_examples(3), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for row in range(count):
            yield row, {"en": f"en {row}", "de": f"de {row}"}
        if self.error:
            raise self.error


def open_toy(data_dir, owned=True):
    return prepared.prepare(lambda: PreparedPairs(data_dir=data_dir, file_format="array_record"), owned=owned)


def file_of(opened, split):
    (path,) = opened.folder.glob(f"*-{split}.array_record-*")
    return path


def run_slow(data_dir, seconds):
    command = [sys.executable, "-c", SLOW, str(data_dir), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_data_set_is_prepared_once_and_stdout_stays_clean(tmp_path, capfd):
    first = open_toy(tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"data: preparing prepared_pairs/1.0.0 in {first.folder}\n"
    second = open_toy(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert first.names == second.names == ["train", "test"]
    assert first.digest() == second.digest()


def test_records_are_read_by_range(tmp_path):
    opened = open_toy(tmp_path)
    (train, test) = (opened.records(split) for split in ("train", "test"))
    both = prepared.RecordReader([*train._paths, *test._paths], [3, 2])
    assert len(both) == 5
    everything = both.read(0, 5)
    assert [b"en 0" in record for record in everything] == [True, False, False, True, False]
    for first in range(6):
        for last in range(first, 6):
            assert both.read(first, last) == everything[first:last]
    assert pickle.loads(pickle.dumps(both)).read(1, 4) == everything[1:4]


def test_records_are_read_in_threads(tmp_path):
    records = open_toy(tmp_path).records("train")
    wrong = []

    def work():
        for turn in range(300):
            row = turn % 3
            if f"en {row}".encode() not in records.read(row, row + 1)[0]:
                wrong.append(row)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_flipped_bit_is_found(tmp_path, keep_times):
    path = file_of(open_toy(tmp_path), "train")
    content, times = bytearray(path.read_bytes()), os.stat(path)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if keep_times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    opened = open_toy(tmp_path)
    assert len(opened.records("test")) == 2
    with pytest.raises(UserError, match=r"train\.array_record.*: changed since it was prepared"):
        opened.records("train")


def test_a_truncated_or_missing_file_is_found(tmp_path):
    path = file_of(open_toy(tmp_path), "train")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="changed since it was prepared"):
        open_toy(tmp_path).records("train")
    path.unlink()
    with pytest.raises(UserError, match=r"train\.array_record.*: missing from the prepared data"):
        open_toy(tmp_path).records("train")


def test_files_damaged_before_their_digests_were_recorded_are_found(tmp_path):
    opened = open_toy(tmp_path)
    record, path = opened.folder / "digests.json", file_of(opened, "test")
    record.unlink()
    content = path.read_bytes()
    path.write_bytes(file_of(opened, "train").read_bytes())
    with pytest.raises(UserError, match="expected 2 records, got 3"):
        open_toy(tmp_path)
    path.write_bytes(content[:-20])
    with pytest.raises(UserError, match="missing or damaged"):
        open_toy(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        open_toy(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3"])
def test_a_damaged_record_of_digests_is_refused(tmp_path, content):
    (open_toy(tmp_path).folder / "digests.json").write_text(content)
    with pytest.raises(UserError, match=r"digests\.json: damaged"):
        open_toy(tmp_path)


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    (open_toy(tmp_path).folder / "features.json").unlink()
    with pytest.raises(UserError, match="incomplete data; delete the folder"):
        open_toy(tmp_path)


def test_another_format_is_refused(tmp_path):
    path = open_toy(tmp_path).folder / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    builder = tfds.builder_from_directory(path.parent)
    with pytest.raises(UserError, match="prepared as tfrecord"):
        prepared.prepare(lambda: builder, owned=False)


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("disk"), UserError("disk")])
def test_a_failed_preparation_leaves_nothing(tmp_path, monkeypatch, error):
    monkeypatch.setattr(PreparedPairs, "error", error)
    with pytest.raises(UserError, match="disk"):
        open_toy(tmp_path)
    assert not list(tmp_path.glob("**/*1.0.0*"))
    monkeypatch.undo()
    assert len(open_toy(tmp_path).records("train")) == 3


def test_a_foreign_data_set_that_fails_says_how_to_prepare_it(tmp_path, monkeypatch):
    monkeypatch.setattr(PreparedPairs, "error", ImportError("no tensorflow"))
    monkeypatch.setattr(prepared, "is_of_tfds", lambda _: True)
    with pytest.raises(UserError) as error:
        open_toy(tmp_path, owned=False)
    for says in ("no tensorflow", "tfds.builder('prepared_pairs', file_format='array_record'", f"to {tmp_path}"):
        assert says in str(error.value)
    with pytest.raises(ImportError):  # a mistake in a builder of ours is not the user's
        open_toy(tmp_path, owned=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write data there: .*config\.data\.data_dir"):
        open_toy(tmp_path / "file")


@pytest.mark.slow
def test_a_killed_preparation_is_not_taken_for_finished(tmp_path):
    process = run_slow(tmp_path, 1)
    while "started" not in process.stderr.readline():
        pass
    (left,) = tmp_path.glob("slow_pairs/incomplete*")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert left.exists()
    out, _ = run_slow(tmp_path, 0).communicate()
    assert out == f"10 pairs {tmp_path}/slow_pairs/1.0.0\n"
    assert not left.exists()


@pytest.mark.slow
def test_of_two_processes_one_prepares_and_the_other_waits(tmp_path):
    first = run_slow(tmp_path, 0.1)
    while "started" not in first.stderr.readline():
        pass
    started = time.monotonic()
    second = run_slow(tmp_path, 0.1)
    results = [process.communicate() for process in (first, second)]
    assert [out for out, _ in results] == [f"10 pairs {tmp_path}/slow_pairs/1.0.0\n"] * 2
    assert "another process is preparing" in results[1][1]
    assert "started" not in results[1][1]
    assert time.monotonic() - started < 30


def test_without_locks_the_slower_process_takes_what_the_faster_made(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks")))
    generate = PreparedPairs._generate_examples

    def overtaken(self, count):
        monkeypatch.setattr(PreparedPairs, "_generate_examples", generate)
        with prepared.silence_tfds():
            PreparedPairs(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        return generate(self, count)

    monkeypatch.setattr(PreparedPairs, "_generate_examples", overtaken)
    assert len(open_toy(tmp_path).records("train")) == 3
    assert not list(tmp_path.glob("**/incomplete*"))


def test_a_read_only_folder_is_read(tmp_path, monkeypatch):
    opened = open_toy(tmp_path)
    (opened.folder / "digests.json").unlink()
    monkeypatch.setattr(prepared, "write_atomic", lambda *_: (_ for _ in ()).throw(PermissionError()))
    again = open_toy(tmp_path)
    assert again.digest() == opened.digest()
    assert len(again.records("train")) == 3
    assert not (opened.folder / "digests.json").exists()


def test_of_several_processes_one_copies_from_object_storage(tmp_path, monkeypatch):
    folder, copies = prepared.epath.Path(tmp_path / "set" / "1.0.0"), []

    def pull(address):
        if not address.exists():
            copies.append(address)
            time.sleep(0.2)
            address.mkdir()

    monkeypatch.setattr(prepared.object_storage, "has_address", lambda _: True)
    monkeypatch.setattr(prepared.object_storage, "pull", pull)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(prepared._pull_from_object_storage(folder))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, copies) == ([True] * 4, [folder])
    assert not prepared._pull_from_object_storage(folder)
