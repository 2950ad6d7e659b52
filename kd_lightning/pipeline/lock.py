"""One process at a time works in a folder."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock, Timeout

from kd_lightning.durable_files import write_atomically
from kd_lightning.tracking.runs import is_rank_zero

Value = TypeVar("Value")

_LOCK, _OWNER = "lock", "owner"
_POLL_SECONDS = 0.2
_log = logging.getLogger(__name__)


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder, as soon as no other process does; the system frees it from a process that ends, however it ends.

    The wait is said in a line that names the other process.

    Args:
        folder: Made where it is not there.
        what: The work in it, for that line: ``the stage teacher-hard_label-s0``.
    """
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("%s is under way in %s: waiting for that, to use what it gives", what, _owner(folder))
        lock.acquire(poll_interval=_POLL_SECONDS)
    with _named(folder, lock):
        yield


@contextmanager
def held_by_ranks(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for all processes of a distributed training: rank zero waits for others, and the ranks for it."""
    with held(folder, what) if is_rank_zero() else nullcontext():
        agreed(None)
        yield


def agreed(value: Value) -> Value:
    """Return rank zero's value on all ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


@contextmanager
def held_if_free(folder: Path) -> Iterator[bool]:
    """Hold a folder unless another process does; tell whether it is held."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    with _named(folder, lock):
        yield True


def _lock(folder: Path) -> FileLock:
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / _LOCK)


@contextmanager
def _named(folder: Path, lock: FileLock) -> Iterator[None]:
    try:
        write_atomically(folder / _OWNER, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with suppress(OSError):
            (folder / _OWNER).unlink()
        lock.release()


def _owner(folder: Path) -> str:
    try:
        return (folder / _OWNER).read_text(errors="replace")
    except OSError:
        return "another process"
