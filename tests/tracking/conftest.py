import shutil
from pathlib import Path

import pytest

from kd_lightning.tracking.sqlite import create_database


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new store, which takes seconds to make; read-only."""
    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    create_database(file)
    return file


@pytest.fixture
def store(database: Path, tmp_path: Path) -> Path:
    """A store of the test's own."""
    return Path(shutil.copy(database, tmp_path / "mlflow.db"))


@pytest.fixture(autouse=True)
def _no_tracking_server_of_another_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A logger that begins tells MLflow of its store, as Lightning's does, which sets the environment's.

    The journals of what goes to a server are in the working directory.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that what the test sets goes with it
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
