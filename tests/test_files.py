"""A file is there whole or not at all."""

import pytest

from transformer import files


def test_what_is_written_is_there_and_nothing_else(tmp_path):
    files.write_whole(tmp_path / "a", "ä\n")
    files.write_whole(tmp_path / "a", b"b")
    assert (tmp_path / "a").read_bytes() == b"b"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_half_way_leaves_the_file_as_it_was(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), files.growing(tmp_path / "a") as file:  # noqa: PT012
        file.write(b"new")
        assert (tmp_path / "a").read_bytes() == b"old"
        raise error
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
