"""Archives are fetched once, go on where they stopped, and are never taken for whole when they are not."""

import hashlib
import http.server
import pathlib
import threading
from typing import ClassVar

import numpy as np
import pytest

from tests.helpers.clock import FakeClock
from transformer.data import download
from transformer.data.download import Download, DownloadManager
from transformer.runtime.errors import UserError

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT at every address, in the way that the address asks for."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        start = self.headers.get("Range", "")
        self.asked.append((self.path, start))
        first = int(start.removeprefix("bytes=").rstrip("-") or 0)
        if "norange" in self.path:
            first = 0
        if "gone" in self.path:
            return self.send_error(404)
        if first >= len(CONTENT):
            return self.send_error(416)
        body = CONTENT[first:]
        if "wrong" in self.path:
            body = b"<html>" + body[6:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = "always" in self.path or ("once" in self.path and first == 0)
        self.wfile.write(body[: 0 if "always" in self.path and first else len(body) // 2] if cut else body)
        return None


@pytest.fixture
def address():
    Server.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def archive(address, path="set/a.tgz", recorded=True):
    digest = hashlib.sha256(CONTENT).hexdigest()
    facts = {"sha256": digest, "size": len(CONTENT)} if recorded else {}
    return Download(path.rpartition("/")[2], f"{address}/{path}", **facts)


def store(tmp_path):
    return DownloadManager(str(tmp_path / "manual"), str(tmp_path / "downloads"))


def get(tmp_path, wanted):
    return store(tmp_path).download([wanted])[wanted]


def partial_of(tmp_path):
    (path,) = tmp_path.glob("downloads/**/*.partial")
    return path


def test_an_archive_is_fetched_once(tmp_path, address, capfd):
    wanted = archive(address)
    result = get(tmp_path, wanted)
    assert result.path.read_bytes() == CONTENT
    assert result.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert get(tmp_path, wanted) == result
    assert len(Server.asked) == 1
    assert f"downloading {wanted.url}, 3 MB" in capfd.readouterr().err
    assert not list(tmp_path.glob("**/*.partial"))


def test_archives_of_one_name_do_not_mix(tmp_path, address):
    one, other = archive(address, "a/x.tgz"), archive(address, "b/x.tgz")
    result = store(tmp_path).download([one, other, one])
    assert result[one].path != result[other].path
    assert len(Server.asked) == 2


def test_the_manual_folder_comes_first(tmp_path, address):
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "a.tgz").write_bytes(CONTENT)
    assert get(tmp_path, archive(address)).path == tmp_path / "manual" / "a.tgz"
    assert Server.asked == []


def test_a_cut_download_goes_on_by_itself(tmp_path, address):
    result = get(tmp_path, archive(address, "once.tgz"))
    assert result.path.read_bytes() == CONTENT
    assert Server.asked == [("/once.tgz", ""), ("/once.tgz", f"bytes={len(CONTENT) // 2}-")]


def test_what_a_killed_run_left_is_gone_on_with(tmp_path, address):
    get(tmp_path, archive(address)).path.rename(tmp_path / "downloads" / "x")
    whole = next(tmp_path.glob("downloads/127*/set")) / "a.tgz"
    partial = whole.with_name("a.tgz.partial")
    for left, range_asked in ((1_000_000, "bytes=1000000-"), (len(CONTENT), f"bytes={len(CONTENT)}-")):
        partial.write_bytes(CONTENT[:left])
        assert get(tmp_path, archive(address)).path.read_bytes() == CONTENT
        assert Server.asked[-1] == ("/set/a.tgz", range_asked)
        assert not partial.exists()
        whole.unlink()


def test_a_server_that_cannot_go_on_begins_anew(tmp_path, address):
    get(tmp_path, archive(address, "norange.tgz")).path.unlink()
    (tmp_path / "downloads" / address.removeprefix("http://").replace(":", "_") / "norange.tgz.partial").write_bytes(
        b"x"
    )
    assert get(tmp_path, archive(address, "norange.tgz")).path.read_bytes() == CONTENT


def refusal_of(tmp_path, wanted):
    with pytest.raises(UserError) as error:
        get(tmp_path, wanted)
    return str(error.value)


def test_a_truncated_download_is_kept_for_resuming_and_not_used(tmp_path, address):
    for _ in range(2):
        says = refusal_of(tmp_path, archive(address, "always.tgz"))
        assert f"the connection ended after {len(CONTENT) // 2:,} bytes" in says
        assert "Run again to resume" in says
        assert partial_of(tmp_path).stat().st_size == len(CONTENT) // 2
        assert not list(tmp_path.glob("downloads/**/always.tgz"))


def test_something_else_than_the_archive_is_refused_and_deleted(tmp_path, address):
    says = refusal_of(tmp_path, archive(address, "wrong.tgz"))
    assert f"expected {len(CONTENT):,} bytes with sha256 {hashlib.sha256(CONTENT).hexdigest()}, got" in says
    assert "put it into config.data.manual_dir" in says
    assert not list(tmp_path.glob("downloads/**/wrong.tgz*"))


def test_a_damaged_file_is_refused_wherever_it_lies(tmp_path, address):
    path = get(tmp_path, archive(address)).path
    for place in (path, tmp_path / "manual" / "a.tgz"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(CONTENT[:-1])
        says = refusal_of(tmp_path, archive(address))
        assert says.startswith(
            f"{place}: not the archive {address}/set/a.tgz, or truncated: expected {len(CONTENT):,} b"
        )
        assert "delete it and run again" in says


def test_a_wrong_file_put_there_by_hand_is_found_before_others_are_fetched(tmp_path, address):
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "b.tgz").write_bytes(b"something else")
    with pytest.raises(UserError, match="not the archive"):
        store(tmp_path).download([archive(address), archive(address, "b.tgz")])
    assert Server.asked == []


def test_all_that_is_missing_is_named_at_once(tmp_path, address):
    wanted = [archive(address, "gone1.tgz"), Download("b.tar", "http://page", manual=True), archive(address, "c.tgz")]
    with pytest.raises(UserError) as error:
        store(tmp_path).download([*wanted, Download("d.tgz", "http://127.0.0.1:9/d.tgz")])
    says = str(error.value)
    assert "3 of 4 archives are missing" in says
    assert f"gone1.tgz  from {address}/gone1.tgz  (the server says 404 Not Found)" in says
    assert "b.tar  from http://page  (has to be fetched by hand)" in says
    assert "d.tgz  from http://127.0.0.1:9/d.tgz  (<urlopen error" in says
    assert f"into {tmp_path / 'manual'}" in says
    assert (pathlib.Path(*tmp_path.glob("downloads/127*[0-9][0-9]/c.tgz"))).read_bytes() == CONTENT


def test_without_a_recorded_checksum_the_digest_is_logged(tmp_path, address, capfd):
    wanted = archive(address, recorded=False)
    digest = get(tmp_path, wanted).sha256
    assert digest == hashlib.sha256(CONTENT).hexdigest()
    get(tmp_path, wanted)
    assert capfd.readouterr().err.count(f"sha256 {digest}") == 2


def test_progress_is_logged(tmp_path, address, capfd, monkeypatch):
    clock, size = FakeClock(monkeypatch), download._mb
    monkeypatch.setattr(download, "_mb", lambda count: clock.sleep(1) or size(count))
    monkeypatch.setattr(download, "CHUNK_BYTES", 100_000)
    get(tmp_path, archive(address))
    assert "data: downloading a.tgz: 2 of 3 MB · 0:0" in capfd.readouterr().err
