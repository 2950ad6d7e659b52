"""Files that are whole: sealed JSON, and what killed processes leave."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_lightning.durable_files import remove_leftovers, seal, temporary_suffix, unseal, write_atomically
from kd_lightning.export.files import new_files
from kd_lightning.tracking.logger import check_writable

CONTENT = {"a": 0.1, "b": [1, 2], "c": {"d": None}, "e": "ü"}


def test_what_was_sealed_is_read() -> None:
    assert unseal(seal(CONTENT)) == CONTENT
    assert unseal(seal({"tuple": (1, 2), "number": {3: 4}})) == {"tuple": [1, 2], "number": {"3": 4}}


def test_every_flipped_bit_is_found_unless_it_says_the_same() -> None:
    whole = seal(CONTENT).encode()
    refused = 0
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            try:
                assert unseal(bytes(damaged)) == CONTENT
            except ValueError:
                refused += 1
    assert refused > 0.9 * 8 * len(whole)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"a": 1}', "[" * 100_000, b"\xff\xfe", seal({})[:-3]])
def test_what_was_not_sealed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="got a torn or foreign file"):
        unseal(text)


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_dead_process_has_left_is_removed_and_nothing_else(tmp_path: Path, dead: int) -> None:
    here = socket.gethostname()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    kept = {f".final.ckpt.{alive.pid}@{here}.tmp", f".final.ckpt.{dead}@{here}-2.tmp", ".new.tmp", "x.tmp", ".hidden"}
    gone = {f".final.ckpt.{dead}@{here}.tmp", f".probe.{dead}@{here}.tmp", ".final.ckpt.123.tmp", ".final.ckpt.1@b.tmp"}
    for name in kept | gone:
        (tmp_path / name).write_bytes(b"1")
    two_days_ago = time.time() - 2 * 24 * 3600
    for name in (".final.ckpt.123.tmp", ".final.ckpt.1@b.tmp"):
        os.utime(tmp_path / name, (two_days_ago, two_days_ago))
    folder = tmp_path / f".model.onnx.x3k.{dead}@{here}.tmp"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"1")
    remove_leftovers(tmp_path)
    alive.communicate(b"\n")
    assert left(tmp_path) == kept


def test_a_process_that_has_the_number_of_the_killed_one_removes_what_it_left(tmp_path: Path) -> None:
    """As in a container that was started again."""
    (tmp_path / f".final.ckpt{temporary_suffix()}").write_bytes(b"1")
    remove_leftovers(tmp_path)
    assert left(tmp_path) == set()


KILLED = """
import os, pathlib, signal, sys
from kd_lightning.export.files import new_files
from kd_lightning.durable_files import write_atomically
from kd_lightning.tracking import logger

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

path = pathlib.Path(sys.argv[1])
if sys.argv[2] == "export":
    with new_files(path / "model.onnx") as folder:
        (folder / "model.onnx").write_bytes(b"1")
        die()
os.replace = os.fsync = die
if sys.argv[2] == "write":
    write_atomically(path / "final.ckpt", b"1")
logger.check_writable(path, 1)
"""


@pytest.mark.parametrize("what", ["write", "export", "probe"])
def test_a_killed_process_leaves_nothing_for_long(tmp_path: Path, what: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), what], timeout=120)
    assert done.returncode == -9
    assert len(left(tmp_path)) == 1
    check_writable(tmp_path, 1)
    assert left(tmp_path) == set()


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "final.ckpt"
    write_atomically(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(OSError, match="no"):
            write_atomically(file, b"new")
    assert (file.read_bytes(), left(tmp_path)) == (b"old", {"final.ckpt"})
    write_atomically(file, b"new")
    assert (file.read_bytes(), left(tmp_path)) == (b"new", {"final.ckpt"})


def test_exported_files_come_beside_what_is_there(tmp_path: Path) -> None:
    with new_files(tmp_path / "model.onnx") as folder:
        assert folder.name.endswith(temporary_suffix())
        (folder / "model.onnx").write_bytes(b"1")
    assert left(tmp_path) == {"model.onnx"}
