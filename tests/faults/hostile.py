"""Rows G: files that would like to be executed, archives that would like to write elsewhere, and the source itself."""

import gzip
import io
import itertools
import json
import os
import pathlib
import pickle
import re
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest

from tests import test_imports
from tests.faults.table import Tally, row
from tests.faults.world import Heard, World, files_of, write_pairs
from transformer.checkpoints.manager import CheckpointManager
from transformer.checkpoints.manifest import MANIFEST, Manifest
from transformer.config import DataConfig
from transformer.data import corpus as corpora
from transformer.data import input_pipeline, text_files, token_id_cache, wmt
from transformer.runtime.errors import UserError
from transformer.runtime.files import sha256


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, canary: pathlib.Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def payloads(canary: pathlib.Path) -> dict[str, bytes]:
    """Files that make the canary when they are read carelessly."""
    array = io.BytesIO()
    np.save(array, np.array([Evil(canary)], object), allow_pickle=True)
    shell = f"touch {canary}"
    return {
        "pickle": pickle.dumps(Evil(canary)),
        "npy of objects": array.getvalue(),
        "yaml": f'!!python/object/apply:os.system ["{shell}"]\n'.encode(),
        "msgpack": b"\xc7" + bytes([len(pickle.dumps(Evil(canary))) % 256]) + b"\x01" + pickle.dumps(Evil(canary)),
        "python": f"import os\nos.system({shell!r})\n".encode(),
    }


def forge(folder: pathlib.Path) -> None:
    """Makes a checkpoint sound again after its files were changed, as whoever changed them could."""
    before = CheckpointManager(folder.parent.parent).manifest(int(folder.name))
    paths = [path for path in files_of(folder) if path.name != MANIFEST]
    result = {str(path.relative_to(folder)): (path.stat().st_size, sha256(path)) for path in paths}
    changed = Manifest(before.metrics, before.data, before.host, result)
    (folder / MANIFEST).write_text(changed.to_json())


NAMES = ("state.pkl", "params.npy", "config.yaml", "state.msgpack", "config.py", "sitecustomize.py", "__init__.py")


@row("G1", "pickle, npy of objects, YAML tag, msgpack, Python in a workdir, digests forged to fit", full=110, quick=24)
def nothing_is_executed(world: World, tally: Tally) -> None:
    canary = world.folder / "canary"
    evil = payloads(canary)
    with tally.one("the payload works"):
        pickle.loads(evil["pickle"])
        assert canary.exists()
        canary.unlink()
        np.load(io.BytesIO(evil["npy of objects"]), allow_pickle=True)
        assert canary.exists()
        canary.unlink()
    run = world.three_checkpoints()
    folder = run / "checkpoints" / "15"
    names = [path.relative_to(folder) for path in files_of(folder) if path.name != MANIFEST]
    cases = list(itertools.product(names, evil))[:: 6 if tally.quick else 1]
    forged = []
    for name, kind in cases:
        forged.append(world.copy(run))
        folder = forged[-1] / "checkpoints" / "15"
        (folder / name).write_bytes(evil[kind])
        forge(folder)
    read = world.read(forged)
    for (name, kind), place in zip(cases, forged, strict=True):
        with tally.one(f"{kind} as {name}"):
            assert f"{place}: " in read, "it was not read"
            assert not canary.exists()
    folder = run / "checkpoints" / "15"
    with tally.one("beside the right files"):
        for place, name in itertools.product((run, run / "tokenizer", folder, folder / "params"), NAMES):
            (place / name).write_bytes(evil["pickle" if not name.endswith(".py") else "python"])
        forge(folder)
        process = world.trained(run)
        assert process.code == 0, process.stderr()
        assert not canary.exists()
    with tally.one("token ids"):
        assert_no_token_ids_of_objects(world, evil["npy of objects"])
        assert not canary.exists()
    with tally.one("the optimizer, in training"):
        run = world.three_checkpoints()
        folder = run / "checkpoints" / "15"
        for path in files_of(folder / "optimizer"):
            path.write_bytes(evil["pickle"])
        forge(folder)
        assert world.trained(run).code not in (0, None)
        assert not canary.exists()
    with tally.one("a manifest that is code"):
        (folder / MANIFEST).write_bytes(evil["python"])
        with Heard():
            assert CheckpointManager(run).latest_valid_step() == 10
        assert not canary.exists()


def assert_no_token_ids_of_objects(world: World, array: bytes) -> None:
    """They are made anew."""
    folder = world.new_folder()
    write_pairs(folder, train=40)
    data = DataConfig(name="text", dir=str(folder), data_dir=str(folder / "prepared"), vocab_size=285)
    words = CheckpointManager(world.whole().workdir).tokenizer(15)
    with Heard() as heard:
        corpus = corpora.open_corpus(data)
        wanted = np.array(input_pipeline.token_ids(data, corpus, "train", words).source.offsets)  # not the file itself
        (path,) = (path for path in files_of(folder / "prepared") if path.name == "source.offsets.npy")
        path.write_bytes(array)
        about = json.loads((path.parent / token_id_cache.METADATA_FILE).read_text())
        about["sha256"][path.name] = sha256(path)
        (path.parent / token_id_cache.METADATA_FILE).write_text(json.dumps(about))
        result = input_pipeline.token_ids(data, corpus, "train", words)
    assert "damaged" in heard.getvalue()
    assert np.array_equal(result.source.offsets, wanted)


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """A member of a tar."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 2 if kind == tarfile.REGTYPE else 0
    return info


def hostile_tar(outside: pathlib.Path, packed: bool) -> bytes:
    """Members with every way to point elsewhere, and a good one last."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if packed else "w") as tar:
        for info in (
            entry("../above"),
            entry("a/../../above"),
            entry(f"{outside}/absolute"),
            entry("link", tarfile.SYMTYPE, "/etc/hostname"),
            entry("hard", tarfile.LNKTYPE, "../../etc/hostname"),
            entry("folder", tarfile.SYMTYPE, str(outside)),
            entry("folder/through"),
            entry("device", tarfile.CHRTYPE),
            entry("pipe", tarfile.FIFOTYPE),
            entry("good"),
        ):
            tar.addfile(info, io.BytesIO(b"x\n") if info.size else None)
    return buffer.getvalue()


def hostile_zip(outside: pathlib.Path) -> bytes:
    """The same as a zip, as far as it can."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("../above", f"{outside}/absolute", "good"):
            archive.writestr(name, b"x\n")
    return buffer.getvalue()


NO_FILES = ("link", "hard", "device", "pipe")  # of which not a byte may be read


@row("G2", "archives with .., absolute paths, links, devices, pipes, bombs", full=24, quick=24)
def nothing_is_written_outside(world: World, tally: Tally) -> None:
    folder, outside = world.new_folder(), world.new_folder()
    inside = folder / "deep" / "inside"
    inside.mkdir(parents=True)
    outside.mkdir()
    archives = {
        "a.tar": hostile_tar(outside, packed=False),
        "a.tgz": hostile_tar(outside, packed=True),
        "a.zip": hostile_zip(outside),
    }
    for file, content in archives.items():
        (inside / file).write_bytes(content)
    before = sorted(folder.rglob("*"))
    asked = ("../above", "a/../../above", f"{outside}/absolute", *NO_FILES, "folder/through", "good")
    for file, name in itertools.product(archives, asked):
        with tally.one(f"{file}: {name}"):
            try:
                lines = list(wmt.read_archive_lines(inside / file, name))
                assert lines == ["x"]
                assert name not in NO_FILES
            except UserError:
                assert name != "good"
            assert sorted(folder.rglob("*")) == before
            assert not list(outside.iterdir())
    bombs = {"bomb.txt.gz": text_files.read_lines, "bomb.gz": lambda path: wmt.read_archive_lines(path, "")}
    for file, read in bombs.items():
        with tally.one(f"{file}: a line of 1 GB"):
            with gzip.open(folder / file, "wb", compresslevel=1) as bomb:
                for _ in range(256):
                    bomb.write(b"a" * (1 << 22))
            tracemalloc.start()
            with pytest.raises(UserError, match="line 1: longer than"):
                list(read(folder / file))
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            assert peak < 300, f"{peak:.0f} MiB"
            (folder / file).unlink()


@row("G4", "the source: nothing that executes what it reads", full=90, quick=90)
def static_gate(world: World, tally: Tally) -> None:
    for path in test_imports.SOURCES:
        with tally.one(path.name):
            assert not re.findall(test_imports.FORBIDDEN, path.read_text())
