import os
import pickle
import subprocess
import sys
import threading

from tensorflow_datasets.proto import tf_example_pb2

from tests.conftest import ROOT
from transformer.data import records
from transformer.data.records import RecordReader

MANY = 1200
# Reads all files of a folder in a process that may open 256 at once, some of which it has open.
READ_MANY = """
import os, resource, sys
from transformer.data.records import RecordReader
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
paths = [os.path.join(sys.argv[1], name) for name in sorted(os.listdir(sys.argv[1]))]
reader = RecordReader(paths, [1] * len(paths))
everything = reader.read(0, len(reader))
again = [reader.read(index, index + 1)[0] for index in range(0, len(reader), 7)]
assert everything[::7] == again
print(len(everything), everything[-1].decode())
"""


def make_files(folder, count, per_file=1):
    paths = []
    for number in range(count):
        paths.append(str(folder / f"{number:05}"))
        with records.open_writer(paths[-1]) as writer:
            for row in range(per_file):
                writer.write(b"%d %d" % (number, row))
    return paths


def test_more_files_than_a_process_may_open_are_read(tmp_path):
    path = make_files(tmp_path, 1)[0]
    for number in range(1, MANY):
        os.link(path, tmp_path / f"{number:05}")
    result = subprocess.run([sys.executable, "-c", READ_MANY, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{MANY} 0 0\n"), result.stderr


def test_at_most_so_many_files_are_open_and_those_read_last_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_OPEN_FILES", 3)
    reader = RecordReader(make_files(tmp_path, 6), [1] * 6)
    before = len(os.listdir("/proc/self/fd"))
    for file in (0, 1, 2, 0, 3, 4):
        assert reader.read(file, file + 1) == [b"%d 0" % file]
    assert list(reader._open) == [0, 3, 4]
    assert len(os.listdir("/proc/self/fd")) == before + 3


def test_threads_read_while_files_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_OPEN_FILES", 1)
    reader = RecordReader(make_files(tmp_path, 5, 20), [20] * 5)
    wrong = []

    def work(first):
        for turn in range(200):
            row = (first + 13 * turn) % 100
            if reader.read(row, row + 1) != [b"%d %d" % divmod(row, 20)]:
                wrong.append(row)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_reader_can_be_pickled(tmp_path):
    reader = RecordReader(make_files(tmp_path, 2, 3), [3, 3])
    reader.read(0, 6)
    assert pickle.loads(pickle.dumps(reader)).read(2, 4) == [b"0 2", b"1 0"]


def test_a_record_is_a_tf_example_with_its_languages_in_order():
    record = records.serialize(("one", "é"), ("en", "de"))
    assert records.parse(record, ("en", "de")) == ("one", "é")
    feature = tf_example_pb2.Example.FromString(record).features.feature
    assert feature["de"].bytes_list.value[0] == "é".encode()
    assert record == records.serialize(("é", "one"), ("de", "en"))
    assert record.index(b"de") < record.index(b"en")
