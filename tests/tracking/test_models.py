"""Networks and exported files as models in MLflow: found, loaded, registered and served."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from kd_lightning.export import export
from kd_lightning.models import CNN8
from kd_lightning.tracking.datasets import dataset
from kd_lightning.tracking.models import digest_of, figures, find, model, register
from kd_lightning.tracking.serving import Served
from tests.tracking.servers import free_port

NETWORK = {"_target_": "kd_lightning.models.CNN8", "num_classes": 10}


@pytest.fixture
def client(store: Path, tmp_path: Path) -> Iterator[MlflowClient]:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{store}")
    client = MlflowClient(f"sqlite:///{store}")
    client.create_experiment("models", artifact_location=(tmp_path / "artifacts").as_uri())
    yield client
    mlflow.set_tracking_uri(before)


def new_run(client: MlflowClient) -> str:
    return client.create_run(client.get_experiment_by_name("models").experiment_id).info.run_id


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A folder with weights, file and example; inputs, and what the network answers."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    network, images = CNN8().eval(), torch.randn(8, 1, 28, 28)
    torch.save({"state_dict": network.state_dict(), "losses": {}}, folder / "final.ckpt")
    export(network, images, folder / "model.onnx")
    np.savez(folder / "example.npz", input=images[:1].numpy())
    with torch.no_grad():
        return folder, images.numpy(), network(images).numpy()


def described(folder: Path, kind: str) -> dict:
    shared = {"name": f"student-T0.5-{kind}", "digest": digest_of(kind), "example_path": str(folder / "example.npz")}
    if kind == "onnx":
        return {**shared, "file_path": str(folder / "model.onnx")}
    return {**shared, "weights_path": str(folder / "final.ckpt"), "network": NETWORK, "tags": {"kd.role": "student"}}


@pytest.mark.parametrize("kind", ["network", "onnx"])
def test_a_model_is_stored_once_is_linked_to_each_run_and_answers_as_the_network(client, trained, kind: str) -> None:
    folder, images, logits = trained
    first, second = new_run(client), new_run(client)
    for run_id in (first, first, second):  # the answer was lost; then a stage that is used again
        model(client, run_id, **described(folder, kind))
    (logged,) = client.search_logged_models([client.get_run(first).info.experiment_id])
    assert (logged.name, logged.source_run_id, str(logged.status)) == (f"student-T0-5-{kind}", first, "READY")
    assert logged.params == described(folder, kind).get("tags", {})
    for run_id in (first, second):
        assert [output.model_id for output in client.get_run(run_id).outputs.model_outputs] == [logged.model_id]
    loaded = mlflow.pyfunc.load_model(f"models:/{logged.model_id}")
    assert loaded.metadata.get_input_schema().inputs[0].shape == (-1, 1, 28, 28)
    assert loaded.input_example.shape == (1, 1, 28, 28)
    np.testing.assert_allclose(loaded.predict(images)["logits"], logits, rtol=1e-4, atol=1e-5)


def test_a_model_whose_upload_was_cut_off_is_completed(client, trained) -> None:
    folder, images, logits = trained
    run_id, values = new_run(client), described(folder, "onnx")
    with pytest.raises(FileNotFoundError):
        model(client, run_id, **{**values, "file_path": str(folder / "gone.onnx")})
    begun = find(client, client.get_run(run_id).info.experiment_id, values["digest"])
    assert str(begun.status) == "PENDING"
    model(client, run_id, **values)
    assert find(client, begun.experiment_id, values["digest"]).model_id == begun.model_id
    loaded = mlflow.pyfunc.load_model(f"models:/{begun.model_id}")
    np.testing.assert_allclose(loaded.predict(images)["logits"], logits, rtol=1e-4, atol=1e-5)


def test_a_model_is_a_version_of_the_registered_one_once(client, trained) -> None:
    folder, images, logits = trained
    run_id, values = new_run(client), described(folder, "onnx")
    with pytest.raises(ValueError, match="no model of the digest"):
        register(client, run_id, name="student", digest=values["digest"])
    model(client, run_id, **values)
    for _ in range(2):
        register(client, run_id, name="student", digest=values["digest"])
    (version,) = client.search_model_versions("name = 'student'")
    assert version.run_id == run_id
    loaded = mlflow.pyfunc.load_model(f"models:/student/{version.version}")
    np.testing.assert_allclose(loaded.predict(images)["logits"], logits, rtol=1e-4, atol=1e-5)


def test_figures_of_a_model_stand_once_in_it_and_in_the_run(client, trained) -> None:
    folder, _, _ = trained
    run_id, values = new_run(client), described(folder, "onnx")
    data = {"name": "FashionMNIST", "digest": digest_of("test")}
    measured = [{"values": {"final/acc": 0.8}, "dataset": data}, {"values": {"final/file_mb": 0.1}, "dataset": None}]
    told = {"digest": values["digest"], "measured": measured, "measured_at": 1_700_000_000_000}
    with pytest.raises(ValueError, match="expected it ahead of its figures"):
        figures(client, run_id, **told)
    model(client, run_id, **values)
    client.log_metric(run_id, "final/acc", 0.8, told["measured_at"], 0)
    for _ in range(2):  # the answer was lost
        figures(client, run_id, **told)
    logged = find(client, client.get_run(run_id).info.experiment_id, values["digest"])
    found = {of.key: (of.value, of.run_id, of.dataset_name, of.dataset_digest) for of in logged.metrics}
    assert len(logged.metrics) == 2
    assert found["final/acc"] == (0.8, run_id, "FashionMNIST", digest_of("test")[:36])
    assert found["final/file_mb"] == (0.1, run_id, None, None)
    assert len(client.get_metric_history(run_id, "final/acc")) == 1


def test_data_is_an_input_of_a_run_once(client) -> None:
    run_id = new_run(client)
    values = {"name": "FashionMNIST", "rows": 30, "made_by": "kd_lightning.data.FashionMNIST"}
    for context in ("training", "training", "test"):
        dataset(client, run_id, **values, context=context, digest=digest_of(context))
    found = [(entry.dataset, entry.tags[0].value) for entry in client.get_run(run_id).inputs.dataset_inputs]
    assert [(of.name, context, json.loads(of.profile)) for of, context in found] == [
        ("FashionMNIST", "training", {"num_rows": 30}),
        ("FashionMNIST", "test", {"num_rows": 30}),
    ]
    assert found[0][0].digest == digest_of("training")[:36]


def test_several_inputs_go_to_the_arguments_that_have_their_names() -> None:
    class Sums(torch.nn.Module):
        def forward(self, first, second, *, scale):
            return scale * (first + 2 * second)

    arrays = {"input0": np.ones((2, 3)), "input1": np.ones((2, 3)), "scale": np.full((2, 1), 10)}
    np.testing.assert_array_equal(Served(Sums()).predict(arrays)["logits"], np.full((2, 3), 30))


@pytest.mark.integration
def test_mlflow_serves_the_model_over_http(client, trained, tmp_path: Path) -> None:
    folder, images, logits = trained
    run_id, values = new_run(client), described(folder, "onnx")
    model(client, run_id, **values)
    register(client, run_id, name="student", digest=values["digest"])
    port = free_port()
    address = ["--host", "127.0.0.1", "--port", str(port), "--env-manager", "local", "--workers", "1"]
    served = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/student/1", *address],
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": client.tracking_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # where uvicorn is
        },
        stdout=(tmp_path / "served.log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while True:
            assert served.poll() is None, (tmp_path / "served.log").read_text()
            assert time.monotonic() < end, "it did not start"
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2) as answer:
                if answer.status == 200:
                    break
            time.sleep(0.1)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": images.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            predictions = json.load(answer)["predictions"]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(served.pid, signal.SIGTERM)
        served.wait(30)
    np.testing.assert_allclose(predictions["logits"], logits, rtol=1e-4, atol=1e-5)
