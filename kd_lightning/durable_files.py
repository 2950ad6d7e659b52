"""Files that are whole and as they were written, or known not to be."""

import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_OWNER = re.compile(r"\.(\d+)@([^/]+)\.tmp$")
_DAY = 24 * 3600.0


def temporary_suffix() -> str:
    """Return the end of a temporary file's name, which says who writes it: process and machine."""
    return f".{os.getpid()}@{socket.gethostname()}.tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name and rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{temporary_suffix()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders that killed processes have left in a folder: ``.<name><suffix>``.

    Another machine may write to the same file system, and its processes cannot be asked: its files, like those that
    name nobody, go after a day. To be called before this process writes: in a container that was started again it may
    have the number of the one that was killed.
    """
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # somebody else's, or gone in the meantime
            if _is_left(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seal(content: Mapping[str, Any]) -> str:
    """Write values as JSON that begins with a checksum of these values."""
    return json.dumps({"sha256": _digest(content), **content}, indent=1)


def unseal(text: str | bytes) -> dict[str, Any]:
    """Read what :func:`seal` wrote.

    Raises:
        ValueError: For a text that is torn, or of which a value has changed.
    """
    try:
        content = json.loads(text)
        recorded = content.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("expected JSON with its checksum, as it was written; got a torn or foreign file") from error
    if recorded != _digest(content):
        raise ValueError("its values do not have the checksum that was written with them")
    return dict(content)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _digest(content: Mapping[str, Any]) -> str:
    # As read back: a tuple is a list then, and a number as a key a string.
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()


def _is_left(path: Path) -> bool:
    owner = _OWNER.search(path.name)
    if owner is not None and owner[2] == socket.gethostname() and os.name == "posix" and not _runs(int(owner[1])):
        return True
    return time.time() - path.stat().st_mtime > _DAY


def _runs(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
