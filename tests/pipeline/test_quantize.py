"""The stage ``quantized``: what it leaves, what the files predict, what it refuses and what it warns of."""

import json
import re
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils.data import DataLoader

from kd_lightning import load_student
from kd_lightning.cli import conf_dir
from kd_lightning.configuration.assembling import pipeline
from kd_lightning.data import FashionMNIST
from kd_lightning.models import CNN8
from kd_lightning.pipeline.quantize import QuantizationPlan
from kd_lightning.quantization import QuantizationSpec
from kd_lightning.records import Result
from tests.command import TINY, copied, kd_lightning
from tests.pipeline.test_pipeline import MAIN, runs
from tests.pipeline.tiny_training import TinyData, made, run
from tests.tiny import Network, loader

ALL = [*TINY, "stages=[teacher,assistants,student,control,distilled,quantized,verdict]", "quantized.steps=10"]
OURS = (
    "quantized-teacher-ptq-int8-s0",
    "quantized-student-ptq-int8-s0",
    "continued-kd-T4-s0",
    "quantized-distilled-ptq-int8-s0",
    "quantized-distilled-qat-int8-s0",
    "quantized-distilled-ptq-w4-s0",
)


@pytest.fixture(scope="module")
def quantized(finished, tmp_path_factory):
    """The folder of the small pipeline with all that is quantised, and what was printed; not to be written to."""
    folder = copied(finished[0], tmp_path_factory.mktemp("quantized"))
    return folder, kd_lightning(*ALL, cwd=folder)


def stage(folder: Path, name: str) -> Path:
    (found,) = folder.glob(f"mlruns/stages/{name}-*")
    return found


def result(folder: Path, name: str) -> dict:
    return json.loads((stage(folder, name) / "result.json").read_text())["result"]


@pytest.mark.integration
def test_every_run_stands_in_mlflow_with_what_was_quantised(quantized) -> None:
    client, parents, children = runs(quantized[0])
    ours = {run.info.run_name: run for run in children if run.data.tags["kd.pipeline"] == parents[-1].info.run_id}
    assert tuple(ours) == (*MAIN, *OURS)
    for name in OURS:
        run = ours[name]
        assert (run.data.tags["kd.role"], run.info.status) == (name.split("-")[0], "FINISHED")
        assert {"final/acc", "final/agreement", "final/latency_ms_p50", "final/file_mb"} <= set(run.data.metrics)
        if name.startswith("quantized"):
            logged = run.data.metrics
            assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"final.ckpt"}
            (file,) = (client.get_logged_model(of.model_id) for of in run.outputs.model_outputs)
            assert (file.name, file.source_run_id) == (f"{name}-onnx", run.info.run_id)
            assert logged["final/quantized_layers"] == (6 if "teacher" in name else 4)
            assert logged["final/integer_operators"] == (0 if "w4" in name else logged["final/quantized_layers"])
            assert 0 < logged["final/agreement_fp32"] <= 1
            not_of_a_file = {"final/size_mb", "final/train_seconds"}
            assert {of.key: of.value for of in file.metrics} == {
                key: value for key, value in logged.items() if key.startswith("final/") and key not in not_of_a_file
            }
    assert "train/loss/kd" in ours["quantized-distilled-qat-int8-s0"].data.metrics
    for name in MAIN:  # of which the files were timed
        run = ours[name]
        models = [client.get_logged_model(of.model_id) for of in run.outputs.model_outputs]
        models.sort(key=lambda model: len(model.name))
        network, file = ({of.key: of for of in model.metrics if of.run_id == run.info.run_id} for model in models)
        assert (models[0].name, models[1].name) == (name, f"{name}-onnx")
        of_the_file = {"final/file_mb", "final/latency_ms_p50", "final/throughput_per_s"}
        assert of_the_file <= set(file)
        assert not of_the_file & set(network)
        assert file["final/acc"].value == network["final/acc"].value == run.data.metrics["final/acc"]
        assert file["final/acc"].dataset_digest == network["final/acc"].dataset_digest is not None
        assert len(client.get_metric_history(run.info.run_id, "final/acc")) == 1


@pytest.mark.integration
@pytest.mark.parametrize("name", [name for name in OURS if name.startswith("quantized")])
def test_what_is_scored_is_what_the_file_predicts(quantized, name: str) -> None:
    folder = stage(quantized[0], name)
    data = FashionMNIST()
    data.setup("test")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    given = session.get_inputs()[0].name
    images, target = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    predicted = session.run(None, {given: images.numpy()})[0].argmax(-1)
    with np.load(folder / "predictions.npz") as stored:
        assert np.array_equal(stored["answers"], predicted)
        assert np.array_equal(stored["scores"], predicted == target.numpy())
    found = result(quantized[0], name)
    assert found["headline"] == pytest.approx((predicted == target.numpy()).mean())
    source = {"teacher": MAIN[0], "student": MAIN[1], "distilled": MAIN[3]}[name.split("-")[1]]
    with np.load(stage(quantized[0], "continued-kd-T4-s0" if "qat" in name else source) / "predictions.npz") as stored:
        agreement = (stored["answers"] == predicted).mean()
    assert found["figures"]["agreement_fp32"] == pytest.approx(agreement)
    assert found["figures"]["agreement_file"] >= 0.995
    assert found["figures"]["file_mb"] == pytest.approx((folder / "model.onnx").stat().st_size / 1e6)


@pytest.mark.integration
def test_the_verdict_has_a_row_for_each_and_says_what_it_costs(quantized) -> None:
    folder, printed = quantized
    verdicts = [json.loads(file.read_text()) for file in folder.glob("mlruns/stages/pipeline-*/verdict.json")]
    (verdict,) = (verdict for verdict in verdicts if "continued" in verdict["models"])
    own = ["distilled PTQ int8", "distilled QAT int8", "distilled 4-bit weights"]
    order = ["teacher", "student", "control", "distilled", "continued", "teacher int8", "student int8", *own]
    assert list(verdict["models"]) == order
    assert verdict["runtime"] == "ONNX Runtime"
    for model in verdict["models"].values():
        assert 0 < model["latency_ms_p50"] <= model["latency_ms_p95"]
        assert model["file_mb"] > 0
    sizes = {label: verdict["models"][label]["file_mb"] for label in ("distilled", *own)}
    assert sizes["distilled 4-bit weights"] < sizes["distilled PTQ int8"] < sizes["distilled"]
    assert {"ptq-distilled", "qat-continued", "qat-ptq", "continued-distilled"} <= set(verdict["differences"])
    words = " ".join(printed.split())
    assert " ".join(verdict["sentence"].split()) in words
    assert all(finding in words for finding in verdict["findings"])
    assert re.search(r"In int8(, against fp32| no loss was shown): .*PTQ", words)
    assert re.search(r"Against the teacher (distilled (PTQ|QAT) int8|it) is [\d.]+ times smaller", words)
    assert "INFO" not in printed


@pytest.mark.integration
def test_the_control_in_float_trains_on_from_the_distilled_student(quantized) -> None:
    before, after = (load_student(stage(quantized[0], name) / "final.ckpt") for name in (MAIN[3], "continued-kd-T4-s0"))
    CNN8().load_state_dict(after)
    assert after["block1.1.num_batches_tracked"] == before["block1.1.num_batches_tracked"] + 10
    moved = (after["head.weight"] - before["head.weight"]).abs().max()
    assert 0 < moved < 10 * 0.1 * 2e-3 * 3  # steps of Adam at a tenth of the learning rate


@pytest.mark.integration
def test_the_same_command_again_trains_nothing_and_a_lost_file_is_made_again(quantized, tmp_path: Path) -> None:
    folder = copied(quantized[0], tmp_path)
    (stage(folder, "quantized-student-ptq-int8-s0") / "model.onnx").unlink()
    printed = kd_lightning(*ALL, "logger=null", cwd=folder)
    assert printed.count("reused") == 9
    assert "quantized-student-ptq-int8-s0: " in printed
    again, before = (result(f, "quantized-student-ptq-int8-s0") for f in (folder, quantized[0]))
    for found in (again, before):
        del found["figures"]["train_seconds"]
    assert again == before


@pytest.mark.integration
def test_what_the_losses_have_learnt_goes_on(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    arguments = ["losses=[kd,hint]", "losses.hint.student_layer=block3", "losses.hint.teacher_layer=block4"]
    stages = "stages=[teacher,distilled,quantized,verdict]"
    kd_lightning(*ALL, *arguments, stages, "trainer.max_steps=60", "logger=null", cwd=folder)
    method = "kd-T4+hint-s0"
    distilled, continued = (
        torch.load(stage(folder, f"{role}-{method}") / "final.ckpt", weights_only=True)["losses"]
        for role in ("distilled", "continued")
    )
    assert distilled.keys() == continued.keys()
    (name,) = (name for name, value in distilled.items() if "hint" in name and value.ndim > 1)
    moved = (continued[name] - distilled[name]).abs().max()
    assert 0 < moved < 10 * 0.1 * 2e-3 * 3
    assert result(folder, "quantized-distilled-qat-int8-s0")["figures"]["quantized_layers"] == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantized.spec.skip=[haed]"], "teacher-hard_label-s0 cannot be quantized: skip names 'haed', which is no"),
        (["quantized.spec.activation_bits=4"], "expected activations of 8 bits in a file, got 4"),
        (["quantized.steps=0"], "expected quantized.steps of 1 or more, got 0"),
        (["quantized.learning_rate=0"], "expected quantized.learning_rate > 0, a share, got 0"),
        (
            [
                "losses=[simkd]",
                "losses.simkd.student_layer=flatten",
                "losses.simkd.teacher_layer=hidden",
                "losses.simkd.student_classifier=head",
                "losses.simkd.teacher_classifier=head",
            ],
            r"losses \['simkd'\] of distilled-simkd-s\d change the student's architecture.*: leave quantized out of",
        ),
    ],
)
def test_a_mistake_is_an_error_before_anything_is_trained(tmp_path: Path, monkeypatch, overrides, message) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run_here(*overrides)
    assert not list(tmp_path.glob("mlruns/stages/*/final.ckpt"))


def test_data_that_say_how_no_inputs_were_normalised(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kd_lightning.data.contract.Data.std", ())
    with pytest.raises(ValueError, match=r"teacher-.* cannot be quantized: expected mean and std of the same channels"):
        run_here()
    assert not list(tmp_path.glob("mlruns/stages/*/final.ckpt"))


def test_missing_packages_are_named_before_anything_is_trained(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kd_lightning.export.formats.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ImportError, match=r"the stage quantized expects .* pip install 'kd-lightning\[onnx\]'"):
        run_here()
    assert not list(tmp_path.glob("mlruns/stages/*/final.ckpt"))


def run_here(*overrides: str) -> None:
    """Run a pipeline in this process."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        job = pipeline(hydra.compose("config", overrides=["logger=null", *overrides]))
    job.run()


def quantised(stages: Path, spec: QuantizationSpec, **changes: Any) -> Result:
    """What becomes of a student alone after post-training quantisation."""
    plan = QuantizationPlan(spec=spec, weights_only=None, calibration_samples=16)
    (stage,) = plan.run([made(stages, "student", **changes)], lambda training: run(stages, training))
    return stage.result


def test_a_file_that_overflows_here_comes_with_the_remedy(tmp_path: Path) -> None:
    found = quantised(tmp_path, QuantizationSpec(target="vnni"))
    assert found.quantized.mismatch == QuantizationSpec(target="vnni").mismatch()
    assert found.quantized.source == "student"
    assert found.quantized.training is False
    assert found.figures["quantized_layers"] == found.figures["integer_operators"] == 2
    assert found.figures["agreement_fp32"] > 0.8
    assert found.figures["file_mb"] > 0


def test_a_file_that_predicts_a_single_class_says_so(tmp_path: Path) -> None:
    """On more than a few test samples: the tiny data's are too few to judge."""
    found = quantised(tmp_path, QuantizationSpec(), data=Many, network=Constant)
    assert found.learned_nothing == "predicts a single class"
    assert set(found.answers.tolist()) == {1}


class Many(TinyData):
    def test_dataloader(self) -> DataLoader:
        return loader(200, seed=2)


class Constant(Network):
    """Finds class 1 the most likely, whatever it gets."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e-3 * super().forward(x) + torch.tensor([0.0, 50.0, 0.0, 0.0])
