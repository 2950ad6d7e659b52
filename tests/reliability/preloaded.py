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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests import shortcuts
from tests.command import environment

ROOT = Path(__file__).resolve().parents[2]
_OF_OTHER_TESTS = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID")
KD_LIGHTNING = "from kd_lightning.cli import main; main()"


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
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.reliability.preloaded import _serve; _serve()"],
            cwd=ROOT,
            env=_variables(),
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

    def start(
        self, *arguments: str, cwd: Path, output: Path, program: str = KD_LIGHTNING, **more: str | None
    ) -> Command:
        """Fork ``kd-lightning *arguments``, or ``python -c <program> *arguments``.

        It has the environment of this process and ``more``, without the variables that are None; one that is read by
        what was imported before changes nothing.
        """
        output.touch()  # may be read at once
        variables = {key: value for key, value in {**_variables(), **more}.items() if value is not None}
        asked = {"start": list(arguments), "program": program, "cwd": str(cwd), "output": str(output)}
        asked["environment"] = variables
        return Command(self.ask(asked)["pid"], output, self)

    def run(
        self,
        *arguments: str,
        cwd: Path,
        output: Path,
        code: int = 0,
        seconds: float = 600,
        **more: str | None,
    ) -> str:
        """Return what it printed; it has to end with ``code``."""
        command = self.start(*arguments, cwd=cwd, output=output, **more)
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


def _variables() -> dict[str, str]:
    # pyarrow's allocator has a thread of its own otherwise
    found = environment(PYTHONPATH=str(ROOT), JE_ARROW_MALLOC_CONF="background_thread:false")
    # What a logger of another test has set in this process: MLflow tells the processes that it starts of its store.
    return {name: value for name, value in found.items() if name not in _OF_OTHER_TESTS}


def _serve() -> None:
    """Import, then fork a command for each line asked."""
    inherited = set(os.environ)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Not onnxruntime, which starts a thread as it is imported.
    import lightning.pytorch.loggers.mlflow
    import mlflow.tracking
    import onnx
    import onnxscript
    import sqlalchemy.dialects.sqlite
    import torch.export._trace
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    import kd_lightning.cli
    import kd_lightning.command
    from kd_lightning.data import fashion_mnist
    from kd_lightning.source_code import package_hash

    del kd_lightning, lightning, mlflow, onnx, onnxscript, sqlalchemy, torch
    package_hash()
    shortcuts.take()
    fashion_mnist.read_packaged()
    ONNXRegistry.from_torchlib()

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
            for key in inherited - request["environment"].keys():
                os.environ.pop(key, None)  # an import may have taken it out
            _be_command(request)
        answer({"pid": pid})


def _be_command(request: dict[str, object]) -> None:
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
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    sys.modules["kd_lightning.cli"]._BEGUN = time.time_ns()  # type: ignore[attr-defined]
    if shortcuts.FEW_SAMPLES in os.environ:
        shortcuts.read_few()
    arguments: Sequence[str] = request["start"]  # type: ignore[assignment]
    sys.argv = ["kd-lightning", *arguments]
    code: object = 0
    try:
        exec(str(request["program"]), {"__name__": "__main__"})
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
