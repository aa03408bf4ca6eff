"""A file is there whole or not at all."""

import os
import pathlib
import subprocess
import sys
import threading

import pytest

from tests.conftest import ROOT
from transformer.runtime import files
from transformer.runtime.errors import UserError


def test_a_path_becomes_absolute_and_an_address_or_an_empty_one_stays(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for path, expected in (("~/run", "/home/me/run"), ("a/../run", f"{tmp_path}/run"), ("hdfs://b/x", "hdfs://b/x")):
        assert files.absolute_path(path) == expected
    assert files.absolute_path("") == ""
    assert files.usable_path(pathlib.Path("run")) == f"{tmp_path}/run"
    for path in (" ", "hdfs://b/x"):
        with pytest.raises(UserError, match=r"^expected a "):
            files.usable_path(path)


def test_what_is_written_is_there_and_nothing_else(tmp_path):
    files.write_atomic(tmp_path / "a", "ä\n")
    files.write_atomic(tmp_path / "a", b"b")
    assert (tmp_path / "a").read_bytes() == b"b"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_half_way_leaves_the_file_as_it_was(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), files.open_atomic(tmp_path / "a") as file:  # noqa: PT012
        file.write(b"new")
        assert (tmp_path / "a").read_bytes() == b"old"
        raise error
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_and_what_is_no_file_stay_what_they_are(tmp_path):
    """As root, a rename would turn a device into a file."""
    for name, target in (("link", "a"), ("dangling", "b"), ("queue", "pipe")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "a").write_bytes(b"old")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling"):
        files.write_atomic(tmp_path / name, "new")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"new"
    for name in ("pipe", "queue"):
        got = []
        reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()), daemon=True)  # noqa: B023
        reader.start()
        with pytest.raises(KeyError), files.open_atomic(tmp_path / name) as file:  # noqa: PT012
            file.write(b"half")
            raise KeyError
        with files.open_atomic(tmp_path / name) as file:
            file.write(b"old")
            file.seek(0)  # as an archive does, which a pipe could not
            file.write(b"new")
        reader.join(10)
        assert got == [b"new"]
    assert all((tmp_path / name).is_symlink() for name in ("link", "dangling", "queue"))
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "dangling", "link", "pipe", "queue"]


def test_what_standard_output_goes_to_is_written_on(tmp_path):
    program = (
        "from transformer.runtime import files; print('before'); "
        "files.write_atomic('/dev/stdout', 'ours\\n'); print('after')"
    )
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True, cwd=ROOT)
    assert (tmp_path / "out").read_text() == "before\nours\nafter\n"


def test_what_cannot_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    os.mkfifo(tmp_path / "pipe")
    for path in ("file", "new", "folder/new", "pipe"):
        files.check_writable(tmp_path / path, "--output")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]
    assert (tmp_path / "file").read_bytes() == b"old"
    for path in ("", "folder", "file/new"):
        with pytest.raises(UserError, match=r"^--output: .*([Dd]irectory|exists)"):
            files.check_writable(tmp_path / path, "--output")


def test_json_with_a_checksum_comes_back_unless_a_byte_of_it_changed():
    content = files.checksummed_json({"ä": [1, 0.1]})
    assert files.parse_checksummed_json(content) == {"ä": [1, 0.1]}
    for place in (0, content.index(b"0.1"), len(content) - 3):
        assert files.parse_checksummed_json(content[:place] + b"7" + content[place + 1 :]) is None
    assert files.parse_checksummed_json(content[:-4]) is None
    assert files.parse_checksummed_json(b"") is None
