import pytest


@pytest.fixture(autouse=True)
def _no_tracking_server_of_the_shell(monkeypatch):
    """No test reports to the server of whoever runs it."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
