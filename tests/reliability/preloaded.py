"""Start ``kd-lightning`` many times, each a process of its own, forked from one that has imported everything.

An import takes some six seconds, a fork a hundredth of one. The parent imports, runs no operator of PyTorch and so has
no thread that a child would miss; what a child does is what ``python -m kd_lightning`` does from there on, but for the
shortcuts in :mod:`tests.shortcuts`.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.command import environment
from tests.shortcuts import look_briefly, measure_briefly, migrate_once, read_operators_once

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Command:
    """A running ``kd-lightning``, the leader of a session of its own."""

    pid: int
    output: Path
    parent: "Preloaded"
    code: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal's number; None while it runs."""
        if self.code is None:
            self.code = self.parent.ask({"poll": self.pid})["code"]
        return self.code

    def wait(self, seconds: float = 600) -> int:
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"it did not end within {seconds} s, and had printed:\n{self.printed()[-3000:]}")
            time.sleep(0.02)
        return code

    def wait_until(self, condition: Callable[[], object], seconds: float = 600) -> bool:
        """Return whether the condition came true before the command ended."""
        end = time.monotonic() + seconds
        while not condition():
            if self.poll() is not None:
                return False
            assert time.monotonic() < end, f"nothing within {seconds} s; printed:\n{self.printed()[-3000:]}"
            time.sleep(0.002)
        return True

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it and whatever it started, at once."""
        os.killpg(self.pid, signal.SIGKILL)

    def printed(self) -> str:
        return self.output.read_text(errors="replace")

    def left_behind(self) -> list[str]:
        """Return the processes of its session that are still there: ``pid name``."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, rest = stat.read_text().rsplit(")", 1)
            except OSError:
                continue
            state, _, _, session = rest.split()[:4]
            if int(session) == self.pid and state != "Z":
                found.append(name.replace("(", ""))
        return found


class Preloaded:
    """The parent, as a context: ``start`` forks a command."""

    def __enter__(self) -> "Preloaded":
        self._folder = tempfile.TemporaryDirectory()
        code = "import sys; from tests.reliability.preloaded import _serve; _serve(sys.argv[1])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, f"{self._folder.name}/mlflow.db"],
            cwd=ROOT,
            # pyarrow's allocator has a thread of its own otherwise
            env=environment(PYTHONPATH=str(ROOT), JE_ARROW_MALLOC_CONF="background_thread:false"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == {"threads": 1}, "a fork would not have the threads of what was imported"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._folder.cleanup()

    def start(self, *arguments: str, cwd: Path, output: Path, **environment: str | None) -> Command:
        """Fork ``kd-lightning *arguments``; a variable that is None is taken out of its environment."""
        asked = {"start": list(arguments), "cwd": str(cwd), "output": str(output), "environment": environment}
        return Command(self.ask(asked)["pid"], output, self)

    def run(
        self,
        *arguments: str,
        cwd: Path,
        output: Path,
        code: int = 0,
        seconds: float = 600,
        **environment: str | None,
    ) -> str:
        """Return what it printed; it has to end with ``code``."""
        command = self.start(*arguments, cwd=cwd, output=output, **environment)
        ended = command.wait(seconds)
        assert ended == code, f"{arguments} ended with {ended}:\n{command.printed()[-6000:]}"
        return command.printed()

    def ask(self, request: dict[str, object]) -> dict[str, int]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, int]:
        assert self._process.stdout is not None
        answer: dict[str, int] = json.loads(self._process.stdout.readline())
        return answer


def _serve(database: str) -> None:
    """Import, then fork a command for each line asked; ``database`` is where to keep a new store, to be copied."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Not onnxruntime, which starts a thread as it is imported.
    import lightning.pytorch.loggers.mlflow
    import mlflow.tracking
    import onnx
    import onnxscript
    import sqlalchemy.dialects.sqlite

    import kd_lightning.cli
    import kd_lightning.command
    from kd_lightning.source_code import package_hash

    del lightning, mlflow, onnx, onnxscript, sqlalchemy
    package_hash()
    read_operators_once()
    measure_briefly()
    look_briefly()
    migrate_once(Path(database))

    def answer(content: dict[str, object]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    answer({"threads": len(os.listdir("/proc/self/task"))})
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer({"code": os.waitstatus_to_exitcode(status) if pid else None})
            continue
        pid = os.fork()
        if pid == 0:
            _be_command(request, kd_lightning.cli.main)
        answer({"pid": pid})


def _be_command(request: dict[str, object], main: Callable[[], None]) -> None:
    os.setsid()
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: a command does not outlive the tests
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    output = os.open(str(request["output"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, 256)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(str(request["cwd"]))
    for key, value in request["environment"].items():  # type: ignore[attr-defined]
        os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    arguments: Sequence[str] = request["start"]  # type: ignore[assignment]
    sys.argv = ["kd-lightning", *arguments]
    code: object = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    import atexit
    import threading

    threading._shutdown()  # as the interpreter's end does: what runs on is waited for
    atexit._run_exitfuncs()
    os._exit(code if isinstance(code, int) else 0)
