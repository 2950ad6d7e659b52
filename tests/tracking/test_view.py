"""What MLflow's page reads of an experiment: that it is one of model training, and the views that are shared."""

import json
import shlex
from pathlib import Path

import mlflow.cli
import pytest
from mlflow import MlflowClient

from kd_lightning.tracking.view import EXPERIMENT_TAGS, address, comparison, look, open_as_training, place, sweep

KIND = "mlflow.experimentKind"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "custom_model_development"),
        ("genai_development_inferred", "custom_model_development"),
        ("no_inferred_type", "custom_model_development"),
        ("genai_development", "genai_development"),  # somebody chose it
        ("custom_model_development", "custom_model_development"),
    ],
)
def test_an_experiment_opens_as_model_training_unless_somebody_chose_otherwise(
    store: Path, before: str | None, after: str
) -> None:
    client = MlflowClient(f"sqlite:///{store}")
    experiment_id = client.create_experiment("kinds", tags={} if before is None else {KIND: before})
    open_as_training(client, client.get_experiment(experiment_id))
    assert client.get_experiment(experiment_id).tags[KIND] == after
    assert EXPERIMENT_TAGS == {KIND: "custom_model_development"}


def test_runs_are_sorted_by_role_and_each_role_has_its_colour() -> None:
    made = ["teacher", "student", "control", "distilled", "quantized", "continued", "quantized"]
    looks = [look(role, i) for i, role in enumerate(made)]
    order = sorted(range(len(made)), key=lambda i: looks[i]["kd.order"])
    assert [made[i] for i in order] == [*made[:4], "continued", "quantized", "quantized"]
    assert order[-2:] == [4, 6]
    assert len({of["mlflow.runColor"] for of in looks}) == len(set(made))


def test_a_view_is_kept_once_and_fits_a_tag(store: Path) -> None:
    client = MlflowClient(f"sqlite:///{store}")
    run = client.create_run(client.create_experiment("views"))
    run_id, experiment_id = run.info.run_id, run.info.experiment_id
    for name in ("size_mb", "file_mb"):
        comparison(client, run_id, headline="acc", figures=[f"final/{name}", "final/latency_ms_p50"])
    (text,) = client.get_experiment(experiment_id).tags.values()
    view = json.loads(text)
    assert len(text) < 5000  # of older versions of MLflow
    assert "metrics.`final/file_mb`" in view["selectedColumns"]
    assert {card["type"] for card in view["compareRunCharts"]} == {"BAR", "SCATTER", "LINE"}
    sections = [section["uuid"] for section in view["compareRunSections"]]
    assert sections == ["final", "training"]
    assert {card["metricSectionId"] for card in view["compareRunCharts"]} == set(sections)


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_the_best_pipeline_of_a_sweep_comes_first_and_none_is_folded_into_the_sweep(
    store: Path, lower_is_better: bool
) -> None:
    client = MlflowClient(f"sqlite:///{store}")
    run = client.create_run(client.create_experiment("sweeps"))
    sweep(client, run.info.run_id, headline="x", parameters=["sweep/T"], lower_is_better=lower_is_better)
    (text,) = client.get_experiment(run.info.experiment_id).tags.values()
    view = json.loads(text)
    assert (view["orderByKey"], view["orderByAsc"]) == (
        "metrics.`final/val_x`",
        lower_is_better,
    )  # by time it folds them


@pytest.mark.parametrize(
    ("settings", "server"),
    [
        ({}, "http://127.0.0.1:5000"),
        ({"MLFLOW_PORT": "5005"}, "http://127.0.0.1:5005"),
        ({"MLFLOW_HOST": "0.0.0.0", "MLFLOW_PORT": "80"}, "http://127.0.0.1:80"),
        ({"MLFLOW_HOST": "gpu1.example"}, "http://gpu1.example:5000"),
    ],
)
def test_the_command_for_a_local_store_listens_where_the_address_is(monkeypatch, settings: dict, server: str) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("MLFLOW_HOST", "MLFLOW_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    said = place("run", "sqlite:///mlruns/mlflow.db", "1", "0" * 32)
    assert f"--port {server.rpartition(':')[2]}, then {server}/#/experiments/1/runs?" in said
    arguments = shlex.split(said.partition("mlflow ui ")[2].partition(", then")[0])
    asked = mlflow.cli.server.make_context("ui", arguments, resilient_parsing=True).params
    assert asked["port"] == int(server.rpartition(":")[2])
    assert asked["host"] == settings.get("MLFLOW_HOST", "127.0.0.1")


def test_on_macos_the_port_is_none_that_airplay_has(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_PORT", raising=False)
    monkeypatch.setattr("sys.platform", "darwin")
    said = place("run", "sqlite:///mlruns/mlflow.db", "1", "0" * 32)
    assert "--port 5001, then http://127.0.0.1:5001/" in said


def test_no_password_is_in_the_address() -> None:
    assert "secret" not in address("http://me:secret@mlflow.example:5000", "1", "0" * 32)
