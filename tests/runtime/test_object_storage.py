"""Object storage: workdirs and data at gs:// and s3:// addresses, against emulators on this machine."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from etils import epath

from tests.conftest import ROOT, small_config
from tests.distributed.test_multihost import losses, train_here
from tests.helpers import storage
from tests.helpers.processes import TINY, environment, on_hosts, write_data
from transformer.checkpoints.manager import MANIFEST, CheckpointManager
from transformer.data import corpus as corpora
from transformer.data import synthetic_corpus, text_files
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError, WorkdirError
from transformer.runtime.files import append, open_atomic, user_error_on_oserror, write_atomic
from transformer.training import workdir
from transformer.training.metric_writer import MetricWriter

pytestmark = pytest.mark.filterwarnings("ignore")  # of the clients' own making


@pytest.fixture(scope="module", params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def bucket(request, tmp_path_factory):
    """The address of an empty bucket."""
    missing = storage.missing(request.param)
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} of requirements-dev.txt")
    with (
        storage.Emulator(request.param, tmp_path_factory.mktemp("storage")) as emulator,
        pytest.MonkeyPatch.context() as m,
    ):
        for name, value in emulator.env.items():
            m.setenv(name, value)
        m.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        import fsspec

        epath.backend.fsspec_backend._get_filesystem.cache_clear()
        fsspec.filesystem({"gs": "gcs"}.get(request.param, request.param)).clear_instance_cache()
        yield f"{request.param}://bucket"


@pytest.fixture
def quick(monkeypatch):
    """Locks that are given up soon."""
    monkeypatch.setattr(object_storage, "LOCK_REFRESH_S", 0.3)
    monkeypatch.setattr(object_storage, "LOCK_TIMEOUT_S", 2.0)
    monkeypatch.setattr(object_storage, "LOCK_SETTLE_S", 0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def test_paths_and_addresses():
    assert object_storage.is_remote("gs://b/x")
    assert not object_storage.is_remote("/b/x")
    assert object_storage.unsupported_reason("/b/x") is None
    assert "expected a local path, gs://BUCKET" in object_storage.unsupported_reason("ftp://b/x")


def test_data_at_an_address_that_cannot_be_used_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"config\.data\.data_dir: expected a local path, gs://BUCKET"):
        corpora.validate_source(small_config(data={"name": "cldr", "data_dir": "ftp://b/x"}).data)
    with pytest.raises(UserError, match=r"config\.data\.tokenizer: expected a local path, gs://BUCKET.*got http://h/x"):
        corpora.validate_source(small_config(data={"name": "cldr", "tokenizer": "http://h/x.model"}).data)
    monkeypatch.setenv("TFDS_DATA_DIR", "ftp://b/x")
    with pytest.raises(UserError, match=r"TFDS_DATA_DIR: expected a local path"):
        corpora.validate_source(small_config(data={"name": "cldr"}).data)


def test_an_address_whose_package_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(object_storage.importlib.util, "find_spec", lambda name: None)
    for kind, package in object_storage.PACKAGES.items():
        assert (
            object_storage.unsupported_reason(f"{kind}://b/x")
            == f"{kind}:// needs the package {package}: pip install {package}"
        )
        assert f"{package}==" in (ROOT / "requirements-dev.txt").read_text()


def test_a_log_of_a_local_folder_is_that_folder(tmp_path):
    log = object_storage.SyncedDirectory(epath.Path(tmp_path), "a.txt")
    log.close()
    assert log.folder == epath.Path(tmp_path)
    assert tmp_path.exists()


def test_files_are_whole_and_can_grow(bucket):
    path = epath.Path(bucket) / "files" / "a.txt"
    write_atomic(path, "one\n")
    append(path, b"two\n")
    assert path.read_text() == "one\ntwo\n"
    with pytest.raises(TypeError), open_atomic(path) as file:
        file.write(b"half") and file.write("no bytes")
    assert path.read_text() == "one\ntwo\n"


def test_what_storage_refuses_is_a_message():
    class HttpError(Exception):
        pass

    HttpError.__module__ = "gcsfs.retry"
    with (
        pytest.raises(UserError, match=r"--workdir=gs://b: Forbidden, 403; check the path"),
        user_error_on_oserror("--workdir=gs://b"),
    ):
        raise HttpError("Forbidden, 403")
    with pytest.raises(KeyError), user_error_on_oserror("x"):
        raise KeyError("not of the storage")


def test_a_log_is_copied_as_it_grows(bucket, monkeypatch):
    address = epath.Path(bucket) / "log"
    for lines in ("1\n", "1\n2\n"):
        log = object_storage.SyncedDirectory(address, "a.txt")
        append(log.folder / "a.txt", lines[-2:].encode())
        log.sync()
        log.sync(now=True)
        assert (address / "a.txt").read_text() == lines
        log.close()
        assert not log.folder.exists()


def test_metrics_of_a_run_without_a_checkpoint_are_quarantined_there(bucket, capsys):
    address = epath.Path(bucket) / "lost"
    write_atomic(address / "metrics.jsonl", '{"step": 5}\n')
    with MetricWriter(address, 0, 20):
        pass
    assert f"{address}: holds no checkpoint" in capsys.readouterr().err
    assert (address / "metrics.jsonl.old").read_text() == '{"step": 5}\n'


def test_a_log_is_copied_in_the_background(bucket, monkeypatch):
    address, released, upload = epath.Path(bucket) / "later", threading.Event(), object_storage.upload
    monkeypatch.setattr(object_storage, "SYNC_INTERVAL_S", -1.0)
    monkeypatch.setattr(object_storage, "upload", lambda *paths: released.wait(60) and upload(*paths))
    log = object_storage.SyncedDirectory(address, "a.txt")
    append(log.folder / "a.txt", b"1\n")
    log.sync()
    assert not (address / "a.txt").exists()
    released.set()
    log.sync(now=True)
    assert (address / "a.txt").read_text() == "1\n"
    monkeypatch.setattr(object_storage, "upload", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        log.close()


def test_listings_are_never_those_of_a_while_ago():
    """Whatever opens the first address of a process, even where TensorFlow is installed."""
    program = (
        "import os; from transformer.runtime import object_storage; import fsspec; from etils import epath\n"
        "assert [fsspec.config.conf[kind]['use_listings_cache'] for kind in ('gs', 's3')] == [False, False]\n"
        "assert hasattr(epath.Path('s3://bucket/run')._backend, 'fs') and os.environ['EPATH_USE_TF'] == 'false'"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_one_process_at_a_time_holds_a_folder(bucket, quick):
    path, losers = epath.Path(bucket) / "held" / "lock", []
    with object_storage.Lock(path, "process 1 on a", losers.append):
        with pytest.raises(object_storage.LockHeldError, match="process 1 on a"):
            object_storage.Lock(path, "process 2 on b", losers.append)
        with pytest.raises(WorkdirError, match=r"held: held by process 1 on a; wait for it"):
            workdir.acquire_lock(path.parent)
    object_storage.Lock(path, "process 2 on b", losers.append).close()
    assert not path.exists()
    assert not losers


def test_of_processes_that_come_at_once_one_holds_a_folder(bucket, quick):
    path, barrier = epath.Path(bucket) / "raced" / "lock", threading.Barrier(3)

    def lock(number):
        barrier.wait()
        try:
            return object_storage.Lock(path, f"process {number}", [].append)
        except object_storage.LockHeldError:
            return None

    with ThreadPoolExecutor(3) as pool:
        held = [each for each in pool.map(lock, range(3)) if each]
    assert len(held) == 1
    held[0].close()


@pytest.mark.slow
def test_the_lock_of_a_dead_process_is_taken_and_it_learns_so_if_it_lives(bucket, quick, monkeypatch):
    path, losers = epath.Path(bucket) / "dead" / "lock", []
    silent = threading.Event()
    kept = object_storage.Lock._refresh

    def keep(self):
        silent.wait(20) if self._owner == "first" else None
        kept(self)

    monkeypatch.setattr(object_storage.Lock, "_refresh", keep)
    first = object_storage.Lock(path, "first", losers.append)
    since = time.monotonic()
    with object_storage.Lock(path, "second", losers.append):
        assert time.monotonic() - since > object_storage.LOCK_TIMEOUT_S
        silent.set()
        deadline = time.monotonic() + 10
        while not losers and time.monotonic() < deadline:
            time.sleep(0.05)
        assert losers == ["second"]
        first.close()
        assert path.exists()


STEPS = ["--config.train.eval_every_steps=4", "--config.train.checkpoint_every_steps=2", "--config.train.keep_last=2"]


def flags(folder, bucket, steps):
    return [
        *STEPS,
        f"--config.train.num_steps={steps}",
        f"--config.data.data_dir={bucket}/data",
        "--config.mesh.data=1",
    ]


@pytest.mark.slow
def test_a_run_is_kept_damaged_and_resumed_there(folder, bucket, tmp_path, quick, capsys):
    """In this process: 4 updates, then 8, against 8 at a stretch on the local disk; prepared data is shared there."""
    run = epath.Path(bucket) / "runs" / "a"
    train_here(folder, run, *flags(folder, bucket, 4))
    assert CheckpointManager(run).steps() == [2, 4]
    assert "tokenizing" in capsys.readouterr().err
    for path in (
        run / "checkpoints" / "4" / "config.json",
        run / "checkpoints" / "2" / "params" / "_CHECKPOINT_METADATA",
    ):
        assert path.exists()
    (run / "checkpoints" / "4" / "config.json").write_text("{}")
    (run / "checkpoints" / "6" / "params").mkdir(parents=True)
    (run / "checkpoints" / "6" / "params" / "half").write_bytes(b"cut short")
    object_storage._remote_urls.clear()
    os.rename(os.environ["XDG_CACHE_HOME"], f"{os.environ['XDG_CACHE_HOME']}.{time.monotonic_ns()}")  # another machine
    train_here(folder, run, *flags(folder, bucket, 8))
    stderr = capsys.readouterr().err
    assert "checkpoint 4 is damaged and skipped: config.json" in stderr
    assert "resuming after step 2" in stderr
    assert "tokenizing" not in stderr
    assert "preparing" not in stderr
    assert CheckpointManager(run).steps() == [4, 6, 8] or CheckpointManager(run).steps() == [6, 8]
    assert CheckpointManager(run).latest_valid_step() == 8
    assert not (run / "checkpoints" / "6" / "params" / "half").exists()
    train_here(folder, tmp_path / "alone", *flags(folder, tmp_path, 8))
    assert losses(run) == losses(tmp_path / "alone")


def test_text_files_are_read_there(folder, bucket, tmp_path):
    from transformer.config import DataConfig
    from transformer.data import local_text

    object_storage.upload(folder, f"{bucket}/text")
    wanted, result = (
        local_text.find_splits(DataConfig(name="text", dir=str(where))) for where in (folder, f"{bucket}/text")
    )
    assert result.keys() == wanted.keys()
    for split in wanted:
        there, here = ([pair for part in files[split].parts() for pair in part.pairs()] for files in (result, wanted))
        assert there == here
    assert local_text._digest(result, tmp_path) == local_text._digest(wanted, tmp_path)


def test_a_synthetic_corpus_is_made_there(folder, bucket):
    text = synthetic_corpus.scan([str(folder / "train.en")])

    def make():
        corpus = synthetic_corpus.SyntheticCorpus(f"{bucket}/corpus", text, ("en", "de"), "source", 50, {}, {})
        corpus.open()
        return corpus

    def translate(corpus, shards):
        for shard in corpus.read(shards):
            with corpus.claim(shard.number) as claimed:
                assert claimed
                corpus.write(shard.number, shard.lines[::-1])

    translate(make(), [0, 2])
    again = make()
    assert again.missing() == [1]
    with again.claim(2) as claimed:
        assert not claimed
    translate(again, [1])
    again.join()
    assert make().is_complete()
    assert make().missing() == []
    names = [path.name for path in (epath.Path(bucket) / "corpus").iterdir()]
    assert sorted(names) == ["manifest.json", "train.de", "train.en"]
    lines = list(text_files.read_lines(f"{bucket}/corpus/train.de"))
    assert lines == [line for shard in again.read(range(3)) for line in shard.lines[::-1]]


def test_a_step_without_a_manifest_is_not_a_checkpoint(bucket):
    checkpoints = CheckpointManager(epath.Path(bucket) / "runs" / "half")
    for step in (3, 6):
        (checkpoints.folder / str(step) / "params").mkdir(parents=True)
        (checkpoints.folder / str(step) / "params" / "array").write_text("numbers")
        (checkpoints.folder / str(step) / MANIFEST).write_text("{}")
    assert checkpoints.steps() == [3, 6]
    (checkpoints.folder / "6" / MANIFEST).unlink()
    assert checkpoints.steps() == [3]


def python(*command, **options):
    full = [sys.executable, *map(str, command)]
    return subprocess.run(full, env=environment(1), cwd=ROOT, capture_output=True, timeout=300, **options)


@pytest.mark.hosts
def test_train_kill_resume_eval_and_translate(folder, bucket, tmp_path):
    """As commands; a second trainer is refused while the first lives, and takes over from a killed one."""
    if bucket.startswith("gs://"):
        pytest.skip("there two hosts do it, see test_two_hosts_keep_a_run_there")
    run = f"{bucket}/runs/killed"
    data = [f"--config.data.dir={folder}", f"--config.data.data_dir={bucket}/data", f"--workdir={run}"]
    long = [
        "train.py",
        *TINY,
        *data,
        "--config.train.eval_every_steps=100000",
        "--config.train.checkpoint_every_steps=5",
    ]
    with on_hosts(1, [*long, "--config.train.num_steps=100000"], tmp_path / "out", 1) as first:
        first.wait_until(0, "step 8/")
        second = python(*long, "--config.train.num_steps=100000")
        assert second.returncode == 4
        assert f"held by process {first.all[0].pid} on" in second.stderr.decode()
        first.all[0].kill()
        assert first.wait() == [-9]
    newest = CheckpointManager(run).latest_valid_step()
    assert newest >= 5
    last = newest + 10
    resumed = python(*long, f"--config.train.num_steps={last}")
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert f"resuming after step {newest}" in resumed.stderr.decode()
    scored = python("eval.py", f"--workdir={run}", f"--output={run}/mine.txt")
    assert scored.returncode == 0, scored.stderr.decode()
    report = json.loads(scored.stdout.splitlines()[-1])
    assert (report["step"], report["sentences"]) == (last, 13)
    translated = python("-m", "transformer.translate", f"--workdir={run}", input=(folder / "test.en").read_bytes())
    assert translated.stdout == (epath.Path(run) / "mine.txt").read_bytes()
    assert (epath.Path(run) / "report.html").exists()
    assert list(losses(epath.Path(run))) == list(range(1, last + 1))


def test_several_hosts_are_refused_on_s3(monkeypatch):
    monkeypatch.setattr("transformer.distributed.multihost.process_count", lambda: 2)
    with pytest.raises(UserError, match="several hosts cannot keep checkpoints on s3://"):
        CheckpointManager("s3://bucket/run")
    CheckpointManager("gs://bucket/run")


@pytest.mark.hosts
def test_two_hosts_keep_a_run_there(folder, bucket, tmp_path):
    """SIGTERM to one, resumed by both, and the losses are those of one process on the local disk."""
    if bucket.startswith("s3://"):
        pytest.skip("several hosts are refused there, see test_several_hosts_are_refused_on_s3")
    run = f"{bucket}/runs/two"
    own = [*flags(folder, bucket, 8)[:-1], "--config.mesh.fsdp=4", "--config.mesh.data=1"]
    command = ["train.py", *TINY, f"--config.data.dir={folder}", *own, f"--workdir={run}"]
    for codes in ([143, 143], [0, 0]):
        with on_hosts(2, command, tmp_path / "out", devices=2) as pair:
            if codes != [0, 0]:
                pair.wait_until(0, "step 1/")
                pair.all[0].terminate()
            assert pair.wait() == codes, pair.stderr(0) + pair.stderr(1)
    train_here(folder, tmp_path / "alone", *flags(folder, tmp_path, 8))
    ours, theirs = losses(epath.Path(run)), losses(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
