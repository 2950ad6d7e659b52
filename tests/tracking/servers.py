"""Tracking servers, and what a server may turn into: a real `mlflow server`, one that only listens, one that fails."""

import http.client
import http.server
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Server:
    """A real `mlflow server` in a process group of its own, without the processes that run MLflow's jobs.

    Args:
        folder: Of its log and its files.
        store: A new store of SQLite, of which it uses a copy, or the address of another one.
    """

    def __init__(self, folder: Path, store: Path | str) -> None:
        self.folder, self.port = folder, free_port()
        if isinstance(store, Path):
            store = f"sqlite:///{shutil.copy(store, folder / 'mlflow.db')}"
        self.store = store
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        store = ["--backend-store-uri", self.store]
        store += ["--artifacts-destination", str(self.folder / "artifacts")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, *where],
            # Eight processes that import MLflow, and serve evaluations alone.
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=(self.folder / "server.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + 180
        while True:
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < end, "the server did not start"
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.1)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kill it and all its workers, as a machine that loses its power does."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None


class Postgres:
    """PostgreSQL in a folder of its own on loopback, as root by Debian's user for it: it refuses to be root."""

    PASSWORD = "pass-word-of-the-store"

    def __init__(self) -> None:
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="kd-lightning-postgres-")), free_port()
        self.uri = f"postgresql+psycopg2://kd:{self.PASSWORD}@127.0.0.1:{self.port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def missing() -> str | None:
        """Say what it takes and is not there."""
        try:
            import psycopg2  # noqa: F401
        except ImportError:
            return "PostgreSQL's driver is not installed: pip install psycopg2-binary"
        if _postgres("initdb") is None or _postgres("postgres") is None:
            return "PostgreSQL is not installed: apt-get install postgresql"
        if os.geteuid() == 0 and _user() is None:
            return "PostgreSQL refuses to be root, and there is no user postgres"
        return None

    def start(self) -> None:
        password, data = self.folder / "password", self.folder / "data"
        password.write_text(self.PASSWORD)
        if os.geteuid() == 0:
            for path in (self.folder, password):
                shutil.chown(path, _user())
        login = ["-U", "kd", "-A", "scram-sha-256", f"--pwfile={password}"]
        subprocess.run(
            [str(_postgres("initdb")), "-D", str(data), *login, "--no-sync", "-E", "UTF8", "--locale=C"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            user=_user(),
        )
        where = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder)]
        self._process = subprocess.Popen(
            [str(_postgres("postgres")), "-D", str(data), "-F", *where],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            user=_user(),
        )
        end = time.monotonic() + 60
        while True:
            assert self._process.poll() is None
            assert time.monotonic() < end, "PostgreSQL did not start"
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


def _postgres(name: str) -> str | None:
    newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(newest[-1]) if newest else shutil.which(name)


def _user() -> str | None:
    """Return who runs it: None for whoever runs the tests."""
    if os.geteuid() != 0:
        return None
    return next((user.pw_name for user in pwd.getpwall() if user.pw_name == "postgres"), None)


class Between:
    """A server in front of another, that hands on what is asked, fails, or takes its time."""

    def __init__(self, port: int) -> None:
        self.fails, self.seconds = False, 0.0
        between = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(between.seconds)
                try:
                    if between.fails:
                        raise OSError
                    asked = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                    host = {"Host": f"127.0.0.1:{port}"}
                    asked.request(self.command, self.path, content, {**dict(self.headers), **host})
                    answer = asked.getresponse()
                    status, content = answer.status, answer.read()
                except OSError:
                    status, content = 500, b"<html>Internal Server Error</html>"
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PATCH = do_PUT = _answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def silent() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class _Failing(http.server.BaseHTTPRequestHandler):
    def _fail(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b"<html>Internal Server Error</html>")

    do_GET = do_POST = do_PATCH = _fail  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def failing() -> Iterator[str]:
    """A server that answers every request with error 500."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
