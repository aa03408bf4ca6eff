"""ArrayRecord files of sentence pairs: random access with a bounded number of open files, and writing a file.

A record is a tf.Example with the text of each language, as TFDS writes it for `features.Translation`. Imports no JAX.
"""

import bisect
import collections
import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

MAX_OPEN_FILES = 16  # of one RecordReader; an open file takes a descriptor and 0.8 MB


class RecordReader:
    """Random access to the serialized examples of ArrayRecord files; picklable and thread-safe.

    ArrayRecord's own data source takes time proportional to the size of the file for each record: 300 µs against 7
    here at 160,000 records. At most MAX_OPEN_FILES files are open, those read last.
    """

    def __init__(self, paths: list[str], counts: list[int]):
        self._paths = paths
        self._ends = list(itertools.accumulate(counts))
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()  # the file read last is last
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=collections.OrderedDict(), _lock=threading.Lock())

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def files(self) -> list[tuple[str, int]]:
        """The path and the number of records of each file."""
        starts = [0, *self._ends]
        return [(path, end - start) for path, start, end in zip(self._paths, starts, self._ends, strict=False)]

    def read(self, first: int, last: int) -> list[bytes]:
        """The records first ≤ index < last; a RuntimeError or IndexError if the files are damaged."""
        records: list[bytes] = []
        while first < last:
            file = bisect.bisect_right(self._ends, first)
            start = self._ends[file - 1] if file else 0
            stop = min(last, self._ends[file])
            records += self._reader(file).read(first - start, stop - start)
            first = stop
        return records

    def _reader(self, file: int) -> Any:
        with self._lock:
            reader = self._open.pop(file, None)
            if reader is None:
                while len(self._open) >= MAX_OPEN_FILES:
                    self._open.popitem(last=False)  # closes the file once no thread reads from it
                options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 1 << 15}
                reader = ArrayRecordReader(self._paths[file], **options)
            self._open[file] = reader
            return reader


def count_records(path: str) -> int:
    """The number of records of a file; a RuntimeError or OSError if it is missing or damaged."""
    reader = ArrayRecordReader(path)
    try:
        return reader.num_records()
    finally:
        reader.close()


def serialize(pair: tuple[str, str], languages: tuple[str, str]) -> bytes:
    """A tf.Example of two texts by language code; equal pairs give equal bytes."""
    example = tf_example_pb2.Example()
    for language, text in zip(languages, pair, strict=True):
        example.features.feature[language].bytes_list.value.append(text.encode())
    return example.SerializeToString(deterministic=True)  # otherwise a map has no fixed order


def parse(record: bytes, languages: tuple[str, str]) -> tuple[str, str]:
    """Parses a serialized example; TFDS's own parser uses NumPy and takes three times as long."""
    features = tf_example_pb2.Example.FromString(record).features.feature
    source, target = (features[code].bytes_list.value[0].decode() for code in languages)
    return source, target


@contextlib.contextmanager
def open_writer(path: os.PathLike | str) -> Iterator[Any]:
    """A writer of a file as TFDS makes it, each record a group of its own; an OSError if it cannot be written."""
    try:
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
        yield writer
        writer.close()
    except RuntimeError as error:  # of ArrayRecord
        raise OSError(f"{path}: cannot be written: {error}") from error
