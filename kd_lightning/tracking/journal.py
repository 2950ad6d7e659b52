"""What a run has logged: one JSON object a line, in the run's own folder. The report and MLflow are made from it."""

import atexit
import errno
import json
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from kd_lightning.durable_files import sha256_of

JOURNAL = "journal.jsonl"
FSYNC_SECONDS = 1.0
"""How much a machine loses that loses its power."""
WRITE_SECONDS = 0.05
"""How much a process loses that is killed."""
_LOCK = ".journal.lock"
COPIES = "artifacts"
"""Beside the journal: files that were copied, or made, to be shipped."""
_log = logging.getLogger(__name__)


class Journal:
    """The journal of a run that is under way; its folder is locked meanwhile, which tells a run that was killed.

    :meth:`write` waits for nothing. A background thread writes the lines within ``WRITE_SECONDS``, and has the disk
    keep them every ``FSYNC_SECONDS``. What cannot be written, as on a full disk, stays in memory until it can.

    Args:
        folder: Made where it is not there.
        wait: Seconds to wait for another process that holds it.

    Raises:
        filelock.Timeout: When another process goes on with the run.
    """

    def __init__(self, folder: Path, wait: float = 2.0) -> None:
        self.folder = folder
        self.key = ""
        """Under which stores find the run, as soon as it has begun."""
        self._lines: deque[bytes] = deque()
        self._unwritten = b""
        self._size = 0
        self._synced, self._synced_at = 0, 0.0
        self._in_trouble = False
        self._file: int | None = None
        self._mutex = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / _LOCK, thread_local=False)
        self._open(wait)

    def write(self, op: str, at: int | None = None, **values: Any) -> None:
        """Add an operation.

        Args:
            op: Its name in :data:`~kd_lightning.tracking.operations.OPERATIONS`.
            at: Milliseconds since 1970; now by default.
            values: Its own JSON values. Paths below the folder are noted as seen from it.
        """
        content = {"op": op, "at": now() if at is None else at, **values}
        self._lines.append(json.dumps(content, default=self._as_json).encode() + b"\n")
        _writer.wake(self)

    def begin(self, *, key: str | None = None, curves: Path | None = None, **values: Any) -> None:
        """Add that the run begins, or goes on.

        Args:
            key: Of a new run; one that nobody else has by default.
            curves: Folder of another run's journal, whose numbers a new run takes over.
            values: Of :func:`~kd_lightning.tracking.opening.open_run`.
        """
        before = own_begin(self.folder)
        if before is None:
            self._start_over()
        self.key = str(before["key"]) if before else key or uuid4().hex
        origin = None if curves is None else Path(os.path.relpath(curves, self.folder)).as_posix()
        self.write("begin", key=self.key, of=self.folder.name, **values, curves=origin)
        if curves is not None and before is None:
            self._follow(curves)

    def metrics(self, values: Mapping[str, Any], step: int | None = None, at: int | None = None, **about: str) -> None:
        """Add numbers; of a step, where they have one."""
        self.write("metrics", at, step=step or 0, values={name: _number(x) for name, x in values.items()}, **about)

    def artifact(self, file: Path, folder: str | None = None, *, copy: bool) -> None:
        """Add a file, or all those of a directory.

        Args:
            file: Noted with its SHA-256.
            folder: In the run's artifacts.
            copy: Whether it is copied beside the journal now, as it may change; a copy goes once it is shipped.
        """
        for path in (path for path in sorted(file.rglob("*")) if path.is_file()) if file.is_dir() else (file,):
            below = path.parent.relative_to(file).as_posix() if file.is_dir() else "."
            into = "/".join(part for part in (folder or "", below if below != "." else "") if part)
            if copy:
                target = self.folder / COPIES / uuid4().hex[:8] / path.name
                target.parent.mkdir(parents=True)
                path = Path(shutil.copy2(path, target))
            self.write("artifact", path=path, sha256=sha256_of(path), folder=into or None)

    def text(self, text: str, name: str) -> None:
        """Add a file with that text."""
        file = self.folder / COPIES / uuid4().hex[:8] / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
        self.artifact(file, copy=False)

    def end(self, status: str, end_time: int | None = None) -> None:
        """Add that the run is over: ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self.write("end", status=status, end_time=now() if end_time is None else end_time)

    def _follow(self, folder: Path) -> None:
        """Take over another run's numbers, but for those that its pipeline found at the end."""
        for _, operation in read(folder):
            if operation["op"] == "metrics":
                values = {name: x for name, x in operation["values"].items() if not name.startswith("final/")}
                if values:
                    self._lines.append(json.dumps({**operation, "values": values}).encode() + b"\n")
        _writer.wake(self)

    def sync(self) -> bool:
        """Write what is not written and wait until the disk has it; tell whether it has."""
        with self._mutex:
            return self._write_lines() and self._fsync()

    def hurry(self) -> None:
        """Have the disk keep it now, without waiting."""
        self._synced_at = 0.0
        _writer.wake(self)

    def close(self) -> None:
        """Let other processes go on with the run; what is written later opens it again."""
        with self._mutex:
            if self._file is not None and self._write_lines() and self._fsync():
                os.close(self._file)
                self._file = None
                self._lock.release()

    def keep(self) -> bool:
        """Write, and let the disk keep it where it is time; tell whether all is done."""
        with self._mutex:
            if not self._write_lines():
                return False
            if self._synced < self._size and time.monotonic() - self._synced_at >= FSYNC_SECONDS:
                return self._fsync()
            return self._synced == self._size

    def _open(self, wait: float) -> None:
        self._lock.acquire(timeout=wait)
        try:
            self._file = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._size = self._synced = whole_size(self.folder)
            os.ftruncate(self._file, self._size)  # a line that a killed process has torn
        except BaseException:
            self._lock.release()
            raise

    def _start_over(self) -> None:
        assert self._file is not None
        os.ftruncate(self._file, 0)
        self._size = self._synced = 0

    def _write_lines(self) -> bool:
        while self._lines:
            self._unwritten += self._lines.popleft()
        if not self._unwritten:
            return True
        try:
            if self._file is None:
                self._open(wait=0)
            assert self._file is not None
            written = os.write(self._file, self._unwritten)
            self._size += written
            self._unwritten = self._unwritten[written:]
            if self._unwritten:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (OSError, Timeout) as error:
            self._trouble(error)
            return False
        self._in_trouble = False
        return True

    def _fsync(self) -> bool:
        if self._file is not None and self._synced < self._size:
            size = self._size
            try:
                os.fsync(self._file)
            except OSError as error:
                self._trouble(error)
                return False
            self._synced, self._synced_at = size, time.monotonic()
        return True

    def _trouble(self, error: BaseException) -> None:
        if not self._in_trouble:
            self._in_trouble = True
            why = getattr(error, "strerror", None) or str(error)
            _log.warning("%s cannot be written (%s); the training goes on, and it is tried again", self._path, why)

    @property
    def _path(self) -> Path:
        return self.folder / JOURNAL

    def _as_json(self, value: Any) -> Any:
        if not isinstance(value, Path):
            return str(value)
        value = value.absolute()
        inside = self.folder.absolute()
        return value.relative_to(inside).as_posix() if value.is_relative_to(inside) else str(value)


class _Writer:
    """The thread that writes all journals of this process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._journals: set[Journal] = set()
        self._thread: threading.Thread | None = None

    def wake(self, journal: Journal) -> None:
        if journal in self._journals:
            return
        with self._changed:
            self._journals.add(journal)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="kd-lightning journal", daemon=True)
                self._thread.start()
            self._changed.notify()

    def sync(self) -> None:
        for journal in list(self._journals):
            journal.sync()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._journals:
                    self._changed.wait()
                journals = list(self._journals)
                self._journals.clear()
            unfinished = [journal for journal in journals if not journal.keep()]
            time.sleep(WRITE_SECONDS)
            with self._changed:
                self._journals.update(unfinished)


_writer = _Writer()
atexit.register(_writer.sync)


def read(folder: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a journal: where the next line begins, and the operation; a torn last line is left out.

    Args:
        folder: The journal's.
        offset: Where a line begins, in bytes.
    """
    try:
        file = (folder / JOURNAL).open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                operation = json.loads(line)
                assert isinstance(operation["op"], str)
            except (ValueError, TypeError, KeyError, AssertionError):
                _log.warning("%s has a line that is damaged, which is left out", folder / JOURNAL)
                operation = {"op": "damaged"}
            yield offset, operation


def history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return a run's numbers from its journal: steps and values by metric, in the order of the steps.

    A step that comes twice, as after a resume from a checkpoint, has the later value. Empty where there is no journal.
    """
    found: dict[str, dict[int, float]] = {}
    for _, operation in read(folder):
        if operation["op"] == "metrics":
            for name, value in operation["values"].items():
                found.setdefault(name, {})[int(operation["step"])] = float(value)
    return {name: sorted(values.items()) for name, values in found.items()}


def last_begin(folder: Path) -> dict[str, Any] | None:
    """Return the newest ``begin`` of a journal."""
    return next((found for found in reversed(_marks(folder)) if found["op"] == "begin"), None)


def own_begin(folder: Path) -> dict[str, Any] | None:
    """Return the newest ``begin`` of a journal, None where it is of another folder, as a line says."""
    begin = last_begin(folder)
    if begin is not None and begin["of"] != folder.name:
        _log.warning("%s is damaged: it is of %s; a new run is begun", folder / JOURNAL, begin["of"])
        return None
    return begin


def is_ended(folder: Path, status: str | None = None) -> bool:
    """Tell whether a journal's run was closed; with that status, if one is given."""
    marks = _marks(folder)
    return bool(marks) and marks[-1]["op"] == "end" and status in (None, marks[-1]["status"])


def whole_size(folder: Path) -> int:
    """Return how many bytes of a journal are whole lines."""
    try:
        with (folder / JOURNAL).open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end:
                begin = max(0, end - (1 << 16))
                file.seek(begin)
                found = file.read(end - begin).rfind(b"\n")
                if found >= 0:
                    return begin + found + 1
                end = begin
    except FileNotFoundError:
        pass
    return 0


def close_if_dead(folder: Path) -> bool:
    """End a run whose process was killed; tell whether a process is at work on it."""
    try:
        journal = Journal(folder, wait=0)
    except Timeout:
        return True
    if last_begin(folder) is not None and not is_ended(folder):
        journal.end("KILLED", _last_time(folder))
    journal.close()
    return False


def now() -> int:
    """Return the time in milliseconds since 1970, as MLflow counts it."""
    return int(time.time() * 1000)


def remove_copy(folder: Path, file: Path) -> None:
    """Remove a file that was copied beside a journal, once it is shipped."""
    if file.is_relative_to(folder / COPIES):
        with suppress(OSError):
            file.unlink()
            file.parent.rmdir()
            (folder / COPIES).rmdir()


def _marks(folder: Path) -> list[dict[str, Any]]:
    """Return the operations that begin or end a run."""
    try:
        with (folder / JOURNAL).open("rb") as file:
            lines = [line for line in file if line.startswith((b'{"op": "begin"', b'{"op": "end"'))]
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _last_time(folder: Path) -> int:
    return int((folder / JOURNAL).stat().st_mtime * 1000)


def _number(value: Any) -> float | str:
    value = float(value)
    return value if value - value == 0 else str(value)  # JSON has no NaN and no infinity
