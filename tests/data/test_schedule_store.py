"""Schedules in files: the batches of before, few bytes a pair, shared and never half-written."""

import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from transformer.data import schedule_store
from transformer.data.batching import BucketedSchedule, JaggedArray, Lengths, make_batch
from transformer.data.packing import PackedSchedule
from transformer.data.schedule_store import FileStore, Store

ROOT = pathlib.Path(__file__).parents[2]


def corpus(n=3000, seed=5):
    """Ids of both sides by formulas, so that the digests below depend on nothing else."""
    draws = np.random.Generator(np.random.PCG64(seed)).random((n, 3))
    source = (2 + 60 * draws[:, 0] ** 3).astype(np.int64)
    target = np.maximum((source * (0.6 + 0.8 * draws[:, 1])).astype(np.int64), 2)

    def side(lengths, start):
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return JaggedArray(((np.arange(offsets[-1]) * 7919 + start) % 30_000 + 4).astype(np.uint16), offsets)

    return side(source, 1), side(target, 2)


def make(ids, batching, **fields):
    lengths = Lengths(ids[0]), Lengths(ids[1])
    fields = {"batch_tokens": 1024, "max_length": 48, "seed": 0, **fields}
    if batching == "pack":
        return PackedSchedule(*lengths, **fields)
    return BucketedSchedule(*lengths, num_buckets=6, **fields)


def digest(schedule, ids):
    """Of the facts and all arrays of two epochs and three batches."""
    facts = (schedule.buckets, schedule.num_batches, schedule.kept, schedule.dropped, schedule.fill)
    result = hashlib.sha256(repr(facts).encode())
    for step in range(2 * schedule.steps_per_epoch + 3):
        spec = schedule.batch(step)
        result.update(np.asarray(spec.examples_B, "<i8").tobytes())
        for side in make_batch(spec, *ids):
            result.update(np.ascontiguousarray(side, "<i4").tobytes())
    return result.hexdigest()


# Made by the code that kept whole arrays of int64 in memory. They change with the order of the data of every run:
# never, unless runs shall not resume.
GOLDEN = {
    ("bucket", 0, 1): "818ad7791c08ec79b860b30ee733881b6ba6195cbfc401fb243e5a9958aa916e",
    ("pack", 0, 1): "3ffd3b1826c05566157a89d35a039b6b89e1eec9a9f19a2e4e3515ca554a198f",
    ("bucket", 0, 8): "e623b301a76ba3da6a1d52897bd511cd79456fe282a3bdcc5bd20e35db03cb36",
    ("pack", 0, 8): "4d5787beeff25f386a540944d175ef93475ea1d5903d0447ee410bc3ae431c21",
    ("bucket", 3, 1): "007c753aaee63e155168993438b75e23ddbcf7ffdb842faa909592a57332e7a3",
    ("pack", 3, 1): "cf770999158638437c473850a17aba6a18d09c73ede289f67b98eebbaec356b7",
    ("bucket", 3, 8): "e4b1eda0af9bc411361d3dd5de69c609f43fd59f82fe41c67ef0b292f711b435",
    ("pack", 3, 8): "99bdc369d77dc4b8cb34cea70fcb6c469c7aea667efe249e4e645af4a951bbae",
}


@pytest.mark.parametrize(("batching", "seed", "multiple"), GOLDEN)
def test_batches_are_those_of_earlier_versions(tmp_path, monkeypatch, batching, seed, multiple):
    monkeypatch.setattr("transformer.data.batching.PART_PAIRS", 700)
    ids = corpus()
    for store in (Store(), FileStore(tmp_path), FileStore(tmp_path)):
        schedule = make(ids, batching, seed=seed, length_multiple=multiple, store=store)
        assert digest(schedule, ids) == GOLDEN[batching, seed, multiple]


@pytest.mark.parametrize(("batching", "limit"), [("bucket", 26), ("pack", 40)])
def test_a_pair_takes_few_bytes(tmp_path, batching, limit):
    n = 30_000
    ids = corpus(n)
    schedule = make(ids, batching, store=FileStore(tmp_path))
    for step in (0, schedule.steps_per_epoch, 2 * schedule.steps_per_epoch):
        schedule.batch(step)
    offsets = sum(side.offsets.nbytes for side in ids)
    assert offsets + sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit * n
    # The process itself holds no array in proportion to the pairs.
    held = [value for value in vars(schedule).values() if isinstance(value, np.ndarray)]
    assert all(isinstance(array.base, np.memmap) or isinstance(array, np.memmap) for array in held)


def test_lengths_are_not_read_once_the_schedule_is_there(tmp_path):
    ids = corpus()
    wanted = make(ids, "bucket", store=FileStore(tmp_path)).batch(3)

    class Unread:
        def __len__(self):
            return len(ids[0])

        def __getitem__(self, part):
            pytest.fail("read again")

    fields = {"num_buckets": 6, "batch_tokens": 1024, "max_length": 48, "seed": 0}
    got = BucketedSchedule(Unread(), Unread(), **fields, store=FileStore(tmp_path)).batch(3)
    np.testing.assert_array_equal(got.examples_B, wanted.examples_B)


@pytest.mark.parametrize("name", ["schedule.json", "rows.npy", "epoch-0.npy"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "missing", "empty"])
def test_damaged_files_are_made_again(tmp_path, name, harm):
    ids = corpus()
    make(ids, "pack", store=FileStore(tmp_path)).batch(0)
    path = tmp_path / name
    content = path.read_bytes()
    broken = bytearray(content)
    broken[len(content) // 2] ^= 1
    harmed = {"flipped": bytes(broken), "cut": content[:-3], "empty": b""}
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(harmed[harm])
    assert digest(make(ids, "pack", store=FileStore(tmp_path)), ids) == GOLDEN["pack", 0, 1]
    make(ids, "pack", store=FileStore(tmp_path)).batch(0)
    assert path.read_bytes() == content


def test_old_epochs_and_files_of_killed_processes_are_deleted(tmp_path):
    schedule = make(corpus(), "bucket", store=FileStore(tmp_path))
    (tmp_path / "epoch-2.npy.0123.partial").write_bytes(b"x")
    for epoch in range(4):
        schedule.batch(epoch * schedule.steps_per_epoch)
    assert sorted(path.name for path in tmp_path.glob("*epoch*")) == ["epoch-2.npy", "epoch-3.npy"]


def test_a_file_that_another_run_deletes_meanwhile_is_made_again(tmp_path, monkeypatch):
    schedule = make(corpus(), "bucket", store=FileStore(tmp_path))
    wanted, load, stat = schedule.batch(0).examples_B, np.load, pathlib.Path.stat

    def load_deleted(path, **options):
        loaded = load(path, **options)
        path.unlink()
        monkeypatch.setattr(np, "load", load)
        return loaded

    monkeypatch.setattr(np, "load", load_deleted)
    again = make(corpus(), "bucket", store=FileStore(tmp_path))
    np.testing.assert_array_equal(again.batch(0).examples_B, wanted)

    def stat_deleted(path, **options):
        if path.name == "epoch-0.npy":
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(pathlib.Path, "stat", stat_deleted)
    again.batch(again.steps_per_epoch)
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-1.npy"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_in_a_folder_that_is_read_only_each_process_has_its_own(tmp_path):
    tmp_path.chmod(0o500)
    assert digest(make(corpus(), "bucket", store=FileStore(tmp_path / "x")), corpus()) == GOLDEN["bucket", 0, 1]


def test_where_nothing_can_be_written_each_process_has_its_own(tmp_path, capfd):
    (tmp_path / "file").write_bytes(b"")
    assert digest(make(corpus(), "bucket", store=FileStore(tmp_path / "file")), corpus()) == GOLDEN["bucket", 0, 1]
    assert "cannot be written" in capfd.readouterr().err


AT_ONCE = """
import sys
from tests.data import test_schedule_store as tests
print(tests.digest(tests.make(tests.corpus(), "pack", store=tests.FileStore(sys.argv[1])), tests.corpus()))
"""


def test_processes_that_start_at_once_make_one_file(tmp_path):
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {process.communicate()[0] for process in processes} == {GOLDEN["pack", 0, 1] + "\n"}
    assert len(list(tmp_path.glob("*.npy"))) == 1 + schedule_store.KEPT_EPOCHS
