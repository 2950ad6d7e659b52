"""A journal holds what was logged, waits for nobody, and survives what happens to processes and disks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import Timeout

from kd_lightning.durable_files import sha256_of
from kd_lightning.tracking.journal import (
    JOURNAL,
    WRITE_SECONDS,
    Journal,
    close_if_dead,
    history,
    is_ended,
    last_begin,
    read,
)

ROOT = Path(__file__).parents[2]


def begun(folder: Path) -> Journal:
    journal = Journal(folder)
    journal.begin(experiment="e", name="n", tags={}, parent=None, store=None)
    return journal


def operations(folder: Path) -> list[dict]:
    return [operation for _, operation in read(folder)]


def test_the_later_of_two_values_of_a_step_counts_and_no_json_number_is_missing(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    for step in (0, 1, 2, 1, 2, 3):
        journal.metrics({"a": step, "b": float("nan")}, step)
    journal.metrics({"a": 10.0, "c": float("-inf")}, 2)
    journal.metrics({"final": 0.5})
    assert journal.sync()
    found = history(tmp_path)
    assert found["a"] == [(0, 0.0), (1, 1.0), (2, 10.0), (3, 3.0)]
    assert [step for step, value in found["b"] if value != value] == [0, 1, 2, 3]
    assert (found["c"], found["final"]) == ([(2, -float("inf"))], [(0, 0.5)])
    for line in (tmp_path / JOURNAL).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert history(tmp_path / "none") == {}


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9, 0.999])
def test_a_torn_line_is_left_out_and_written_over(tmp_path: Path, kept: float) -> None:
    journal = begun(tmp_path)
    for step in range(50):
        journal.metrics({"a": step}, step)
    journal.close()
    whole = (tmp_path / JOURNAL).read_bytes()
    torn = whole[: int(kept * len(whole))]
    (tmp_path / JOURNAL).write_bytes(torn)
    steps = torn.count(b"\n") - 1
    assert history(tmp_path)["a"] == [(step, float(step)) for step in range(steps)]
    again = begun(tmp_path)
    again.metrics({"a": -1.0}, steps)
    again.close()
    assert history(tmp_path)["a"] == [*((step, float(step)) for step in range(steps)), (steps, -1.0)]
    assert [operation["op"] for operation in operations(tmp_path)].count("damaged") == 0


def test_a_line_that_is_damaged_costs_that_line_alone(tmp_path: Path, caplog) -> None:
    journal = begun(tmp_path)
    for step in range(3):
        journal.metrics({"a": step}, step)
    journal.close()
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff\x00" + lines[2][2:]
    (tmp_path / JOURNAL).write_bytes(b"".join(lines))
    assert history(tmp_path)["a"] == [(0, 0.0), (2, 2.0)]
    assert "has a line that is damaged" in caplog.text


def test_files_are_noted_as_seen_from_the_journal(tmp_path: Path) -> None:
    journal = begun(tmp_path / "run")
    inside, outside = tmp_path / "run" / "final.ckpt", tmp_path / "other.txt"
    for file in (inside, outside):
        file.write_text(file.name)
    journal.artifact(inside, copy=False)
    journal.artifact(outside, "texts", copy=False)
    journal.artifact(outside, copy=True)
    journal.close()
    noted = [(op["path"], op["folder"]) for op in operations(tmp_path / "run") if op["op"] == "artifact"]
    assert noted[:2] == [("final.ckpt", None), (str(outside), "texts")]
    copy = tmp_path / "run" / noted[2][0]
    assert copy.read_text() == "other.txt"
    assert sha256_of(copy) == operations(tmp_path / "run")[-1]["sha256"]


def test_a_run_that_is_alive_is_held_and_one_that_is_not_is_closed(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    journal.sync()
    with pytest.raises(Timeout):
        Journal(tmp_path, wait=0)
    assert close_if_dead(tmp_path)
    assert not is_ended(tmp_path)
    journal.close()
    assert not close_if_dead(tmp_path)
    assert is_ended(tmp_path, "KILLED")
    before = (tmp_path / JOURNAL).read_bytes()
    assert not close_if_dead(tmp_path)
    assert (tmp_path / JOURNAL).read_bytes() == before
    again = begun(tmp_path)
    again.close()
    assert again.key == journal.key
    assert not is_ended(tmp_path)


def test_the_journal_of_another_folder_is_not_gone_on_with(tmp_path: Path, caplog) -> None:
    first = begun(tmp_path / "one")
    first.close()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / JOURNAL).write_bytes((tmp_path / "one" / JOURNAL).read_bytes())
    second = begun(tmp_path / "two")
    second.close()
    assert second.key != first.key
    assert last_begin(tmp_path / "two")["key"] == second.key
    assert len(operations(tmp_path / "two")) == 1
    assert "two/journal.jsonl is damaged: it is of one; a new run is begun" in caplog.text


KILLED = """
import sys, time
from pathlib import Path
from kd_lightning.tracking.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.begin(experiment="e", name="n", tags={}, parent=None, store=None)
step = 0
while True:
    journal.metrics({"step": step, "time": time.time()}, step)
    print(step, time.time(), flush=True)
    step += 1
    time.sleep(0.001)
"""


def test_a_process_that_is_killed_loses_what_it_says_at_most(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    printed = [process.stdout.readline() for _ in range(1000)]
    os.kill(process.pid, signal.SIGKILL)
    printed += process.stdout.read().splitlines()
    process.wait()
    steps = [line.split() for line in printed if len(line.split()) == 2]
    kept = history(tmp_path / "run")
    assert [step for step, _ in kept["step"]] == list(range(len(kept["step"])))
    _, last = kept["time"][-1]
    assert float(steps[-1][1]) - last < 20 * WRITE_SECONDS  # a busy machine
    assert not close_if_dead(tmp_path / "run")  # the system has let go of it
    assert is_ended(tmp_path / "run", "KILLED")


def test_a_full_disk_costs_no_value(tmp_path: Path, caplog) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system of 64 kB needs root")
    try:
        journal = begun(small / "run")
        for step in range(2000):
            journal.metrics({"a": step}, step)
        assert not journal.sync()
        assert "cannot be written (No space left on device); the training goes on" in caplog.text
        kept = history(small / "run")["a"]
        assert 0 < len(kept) < 2000
        subprocess.run(["mount", "-o", "remount,size=1m", str(small)], check=True)
        begin = time.monotonic()
        while not journal.sync():
            assert time.monotonic() - begin < 5
        assert history(small / "run")["a"] == [(step, float(step)) for step in range(2000)]
        journal.close()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
