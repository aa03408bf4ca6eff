"""Object storage on loopback: gcp-storage-emulator for gs://, moto's server for s3://."""

import importlib.util
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

from tests.helpers.processes import free_port

PACKAGES = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto")}


def missing(kind: str) -> list[str]:
    """Packages of the dev extra that are not here."""
    return [name for name in PACKAGES[kind] if importlib.util.find_spec(name) is None]


class Emulator:
    """Started at the beginning of the block and ended with it.

    Attributes:
      env: what clients need to find it.
    """

    def __init__(self, kind: str, folder):
        self.kind, self._port, self._log = kind, free_port(), folder / f"{kind}.log"
        self.url = f"http://127.0.0.1:{self._port}"
        gs = {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url}
        # The emulator knows no kinds of buckets; asking it for them costs seconds and lines of warnings.
        gs |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "GOOGLE_AUTH_DISABLE_GCE_CHECK": "true"}
        s3 = {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        self.env = gs if kind == "gs" else {**s3, "AWS_DEFAULT_REGION": "us-east-1"}

    def __enter__(self):
        where = ["--host=127.0.0.1", f"--port={self._port}"]
        if self.kind == "gs":
            start = ["start", "--in-memory", "--default-bucket=bucket", *where]
            command = ["-c", f"from gcp_storage_emulator.__main__ import main; main({start})"]
        else:
            command = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env={**os.environ})
        deadline = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline, self._log.read_text()
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.1)
        if self.kind == "s3":
            request = urllib.request.Request(f"{self.url}/bucket", method="PUT")
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.url, timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True
