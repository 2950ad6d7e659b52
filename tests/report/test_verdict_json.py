"""``verdict.json`` is strict, written whole, and has the figures and what is said of them."""

import json

import numpy as np
import pytest

from kd_lightning.pipeline.compare import compare
from kd_lightning.records import FIGURES
from kd_lightning.report.verdict_json import as_dict, write_verdict
from kd_lightning.report.words import say
from tests.pipeline.finished_runs import TASK, latency, measured, run, runs, verdict


def test_json_is_strict_and_written_whole(tmp_path):
    results = runs(teacher=0.90, student=0.74, control=0.755, distilled=0.80)
    results[0] = run("teacher", 0.90, 0, val=np.float32("inf"), figures={"train_seconds": float("nan")})
    v = compare(measured(results, teacher=latency(0.1, float("inf"))), TASK)
    path = tmp_path / "new" / "verdict.json"
    write_verdict(v, path)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == as_dict(v)
    teacher = read["models"]["teacher"]
    assert (teacher["train_seconds"], teacher["throughput_per_s"], teacher["val_accuracy"]) == (None, None, None)
    assert teacher["latency_ms_p50"] == 0.1
    assert set(read["gap_closed"]) == {"mean", "low", "high"}
    assert set(read["differences"]) == {"distilled-alone", "distilled-control", "control-alone", "teacher-alone"}
    assert (read["worth_it"], read["decided"], read["reason"]) == (True, True, "shown")
    assert [p.name for p in path.parent.iterdir()] == ["verdict.json"]


def test_it_has_the_words_and_how_the_headline_is_to_be_read():
    v = verdict(teacher=0.90, student=0.74, control=0.755, distilled=0.80)
    read, words = as_dict(v), say(v)
    assert read["sentence"] == words.sentence
    assert read["findings"] == list(words.findings) != []
    assert read["warnings"] == []
    assert read["headline"] == {
        "name": "accuracy",
        "key": "acc",
        "units": "images",
        "higher_is_better": True,
        "percent": True,
        "symbol": "",
    }
    assert read["processor"] is None


def test_every_model_has_every_figure():
    read = as_dict(verdict(teacher=0.90, student=0.74))["models"]["student"]
    assert {figure.key for figure in FIGURES} - {"val"} <= set(read)
    assert {"accuracy", "val_accuracy", "retention", "agreement", "params", "size_mb", "train_seconds"} <= set(read)
    assert read["latency_ms_p50"] is None


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "verdict.json"
    write_verdict(verdict(student=0.74), path)
    before = path.read_text()

    def fail(*_):
        raise OSError("disk is gone")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_verdict(verdict(student=0.80), path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["verdict.json"]
