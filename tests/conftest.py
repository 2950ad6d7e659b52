import pytest

from tests.command import TINY, kd_lightning

collect_ignore = ["benchmarks"]  # programs that print, and import each other as such


@pytest.fixture(autouse=True)
def _no_tracking_server_of_the_shell(monkeypatch):
    """No test reports to the server of whoever runs it."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of one small pipeline, and what it printed; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, kd_lightning(*TINY, cwd=folder)
