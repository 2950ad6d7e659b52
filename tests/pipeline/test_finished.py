"""What a whole pipeline leaves: runs, a verdict and checkpoints."""

import json
import re

import mlflow
import numpy as np
import pytest
import torch

from kd_lightning import load_student
from kd_lightning.models import CNN8
from tests.pipeline.test_pipeline import MAIN, runs


def test_every_run_stands_in_mlflow_under_one_parent(finished) -> None:
    client, (parent,), children = runs(finished[0])
    assert tuple(run.info.run_name for run in children) == MAIN
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    for run in children:
        assert run.data.tags["mlflow.parentRunId"] == run.data.tags["kd.pipeline"] == parent.info.run_id
        assert run.data.tags["kd.seed"] == "0"
        assert {"final/acc", "final/agreement", "final/retention", "final/params", "final/size_mb"} <= set(
            run.data.metrics
        )
        assert {"final/latency_ms_p50", "final/throughput_per_s", "final/train_seconds"} <= set(run.data.metrics)
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"config.json"}
        (model,) = (client.get_logged_model(output.model_id) for output in run.outputs.model_outputs)
        assert (model.name, str(model.status)) == (run.info.run_name, "READY")
        inputs = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
        figures = {metric.key: (metric.value, metric.dataset_digest) for metric in model.metrics}
        assert {name: value for name, (value, _) in figures.items()} == {
            name: value for name, value in run.data.metrics.items() if name.startswith("final/")
        }
        for name in ("final/acc", "final/agreement", "final/retention"):
            assert figures[name][1] == inputs["test"].digest
            assert len(client.get_metric_history(run.info.run_id, name)) == 1
        assert figures["final/val_acc"][1] == inputs["validation"].digest
        assert figures["final/latency_ms_p50"][1] is None
        assert set(inputs) == {"training", "validation", "test"}
        assert json.loads(inputs["training"].profile) == {"num_rows": 6000 if run is children[0] else 300}
    distilled = children[-1]
    assert distilled.data.tags["kd.role"] == "distilled"
    assert distilled.data.tags["kd.method"] == "kd-T4"
    assert distilled.data.params["losses/kd/temperature"] == "4.0"
    logged = distilled.data.metrics
    assert {"train/loss", "train/loss/kd", "train/loss/hard_label", "train/loss_weighted/kd"} <= set(logged)
    assert logged["train/loss_weighted/kd"] == pytest.approx(0.9 * logged["train/loss/kd"], rel=1e-5)
    assert logged["kd/temperature"] == 4.0
    assert logged["lr-Adam"] > 0
    assert 0 < logged["kd/teacher_entropy"] < 1
    for name in ("final/acc", "final/agreement", "final/retention", "final/latency_ms_p50"):
        assert parent.data.metrics[name] == pytest.approx(logged[name])
    assert parent.data.metrics["final/acc_alone"] == pytest.approx(children[1].data.metrics["final/acc"])
    assert "verdict.json" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_the_verdict_is_printed_and_is_strict_json(finished) -> None:
    folder, printed = finished
    (file,) = folder.glob("mlruns/stages/pipeline-*/verdict.json")
    verdict = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert set(verdict["models"]) == {"teacher", "student", "control", "distilled"}
    assert isinstance(verdict["worth_it"], bool)
    assert " ".join(verdict["sentence"].split()) in " ".join(printed.split())
    assert "mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db" in printed
    assert verdict["models"]["student"]["params"] == 6218


def test_a_view_of_the_runs_is_shared_and_its_address_printed(finished) -> None:
    folder, printed = finished
    client, (parent,), children = runs(folder)
    experiment = client.get_experiment(parent.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    key = re.search(r"#/experiments/(\d+)/runs\?workflowType=machine_learning&viewStateShareKey=(\w+)", printed)
    assert key is not None
    assert key[1] == experiment.experiment_id
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key[2]}"])
    ordered = client.search_runs(
        [experiment.experiment_id], view["searchFilter"], order_by=[f"{view['orderByKey']} ASC"]
    )
    assert [run.info.run_id for run in ordered] == [run.info.run_id for run in children]
    columns = {"tags.`kd.role`", "tags.`kd.temperature`", "metrics.`final/acc`", "metrics.`final/size_mb`"}
    assert columns <= set(view["selectedColumns"])
    assert len({run.data.tags["mlflow.runColor"] for run in (parent, *children)}) == 5
    assert children[-1].data.tags["kd.temperature"] == "4"
    assert parent.info.run_name.startswith("fashion_mnist teacher.max_steps=60 max_steps=12")


def test_the_logged_student_answers_as_the_trained_one(finished, monkeypatch) -> None:
    folder, _ = finished
    monkeypatch.chdir(folder)
    client, _, children = runs(folder)
    logged = client.get_logged_model(children[-1].outputs.model_outputs[0].model_id)
    loaded = mlflow.pyfunc.load_model(logged.artifact_location)
    images = np.random.default_rng(0).standard_normal((2, 1, 28, 28), dtype=np.float32)
    (file,) = folder.glob("mlruns/stages/distilled-*/final.ckpt")
    network = CNN8().eval()
    network.load_state_dict(load_student(file))
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(loaded.predict(images)["logits"], expected, rtol=1e-5, atol=1e-6)


def test_the_students_checkpoint_is_the_bare_networks(finished) -> None:
    (file,) = finished[0].glob("mlruns/stages/distilled-*/final.ckpt")
    CNN8().load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    CNN8().load_state_dict(load_student(file))


def test_the_report_stands_beside_the_verdict_and_in_mlflow(finished) -> None:
    folder, printed = finished
    (page,) = folder.glob("mlruns/stages/pipeline-*/report.html")
    assert f"Report: {page.relative_to(folder)}" in printed
    text, verdict = page.read_text(), json.loads(page.with_name("verdict.json").read_text())
    for section in ("verdict", "knowledge", "temperature", "groups", "reproduce"):
        assert f'<section id="{section}"' in text
    assert "ankle boot" in text
    record = json.loads(page.with_name("report.json").read_text(), parse_constant=pytest.fail)
    assert record["verdict"] == verdict
    assert record["looked_at"]["of"] == 2500
    assert record["looked_at"]["units"] == record["places"] > 100
    logged = record["training"]["distilled"]
    assert len(logged["train/loss/kd"]["step"]) == 6
    assert set(logged["kd/temperature"]["mean"]) == {4.0}
    rates = logged["lr-Adam"]
    assert rates["step"] == logged["train/loss"]["step"]
    assert rates["mean"][-1] < 0.3 * max(rates["mean"])  # of one cycle
    assert 'aria-label="Learning rate: teacher at most 0.01' in text
    assert record["temperature"]["used"] == 4.0
    assert record["temperature"]["weights"] == [0.9, 0.1]
    assert record["examples"][0]["input"]["kind"] == "image"
    recall = record["groups"]["models"]["teacher"]["mean"]
    assert sum(x * n for x, n in zip(recall, record["groups"]["count"], strict=True)) / 2500 == pytest.approx(
        verdict["models"]["teacher"]["accuracy"]["mean"]
    )
    client, (parent,), _ = runs(folder)
    assert {"report.html", "report.json"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
