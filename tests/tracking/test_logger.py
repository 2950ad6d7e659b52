"""The store is where the user expects it, and a place that cannot hold it is refused before anything is trained."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from kd_lightning.tracking import MLFlowLogger
from kd_lightning.tracking.logger import check_writable
from kd_lightning.tracking.sqlite import sqlite_file


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:///mlruns/mlflow.db", Path("mlruns/mlflow.db")),
        ("sqlite:////data/runs/mlflow.db", Path("/data/runs/mlflow.db")),
        ("sqlite:///mlflow.db", Path("mlflow.db")),
        ("sqlite+pysqlite:////data/mlflow.db", Path("/data/mlflow.db")),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("http://localhost:5000", None),
        ("postgresql://user@host/mlflow", None),
        ("databricks", None),
    ],
)
def test_the_file_of_a_sqlite_store(uri: str, file: Path | None) -> None:
    assert sqlite_file(uri) == file


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", megabytes=2)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_full_disk_is_told_before_the_training(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system of 1 MB needs root")
    try:
        with pytest.raises(
            OSError, match=r"cannot write 64 MB to .*small \(No space left on device\).*free some"
        ) as error:
            MLFlowLogger(tracking_uri=f"sqlite:///{small}/mlflow.db")
        assert error.value.errno == errno.ENOSPC
        assert list(small.iterdir()) == []  # the probe does not fill what is left
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        with pytest.raises(OSError, match=r"cannot write 64 MB to .*small.*\(Read-only file system\)"):
            check_writable(small)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot write 64 MB .*\(Permission denied\)"):
        check_writable(tmp_path)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_file_in_the_folders_place_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write 64 MB to .*file.*another working directory"):
        check_writable(tmp_path / folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_written_for_a_server(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger = MLFlowLogger(tracking_uri="http://127.0.0.1:9")
    assert logger.tracking_uri == "http://127.0.0.1:9"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "environment", "expected"),
    [
        (None, None, "sqlite:///mlruns/mlflow.db"),
        (None, "http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("sqlite:///other/mlflow.db", "http://127.0.0.1:9", "sqlite:///other/mlflow.db"),
    ],
)
def test_the_argument_goes_before_the_environment_before_the_working_directory(
    tmp_path: Path, monkeypatch, argument, environment, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if environment:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    assert MLFlowLogger(tracking_uri=argument).tracking_uri == expected
    assert [path.name for path in tmp_path.iterdir()] == (
        [expected.split("/")[3]] if expected.startswith("sqlite") else []
    )


def test_labels_as_users_write_them_are_logged_under_names_that_mlflow_takes(store: Path) -> None:
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{store}", run_name="names")
    logger.log_hyperparams({"variants": {"T=4": {"losses.kd.temperature": 4.0}}})
    assert logger.shipper.flush()
    params = logger.experiment.get_run(logger.run_id).data.params
    assert params == {"variants/T-4/losses.kd.temperature": "4.0"}


def test_tags_are_text_as_a_server_takes_nothing_else(tmp_path: Path) -> None:
    from mlflow.entities import RunTag

    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", tags={"kd.seed": 0, "kd.role": "teacher"})
    for key, value in (logger.tags or {}).items():
        RunTag(key, value).to_proto()  # what a request to a server is made of
    assert logger.tags == {"kd.seed": "0", "kd.role": "teacher"}
