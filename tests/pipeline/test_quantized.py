"""The stage ``quantized``: what it leaves, what the files predict, what it refuses and what it warns of."""

import json
import re
from pathlib import Path

import hydra
import numpy as np
import onnxruntime
import pytest
import torch

from kd_lightning import load_student
from kd_lightning.cli import conf_dir, pipeline
from kd_lightning.data import FashionMNIST
from kd_lightning.models import CNN8
from kd_lightning.pipeline.results import Quantized, Result
from kd_lightning.pipeline.serving import warnings_of
from kd_lightning.quantization import QuantizationSpec
from tests.command import TINY, copied, kd_lightning
from tests.pipeline.test_pipeline import MAIN, runs

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
            assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"final.ckpt", "model.onnx"}
            assert logged["final/quantized_layers"] == (6 if "teacher" in name else 4)
            assert logged["final/integer_operators"] == (0 if "w4" in name else logged["final/quantized_layers"])
            assert 0 < logged["final/agreement_fp32"] <= 1
    assert "train/loss/kd" in ours["quantized-distilled-qat-int8-s0"].data.metrics


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
        assert np.array_equal(stored["predictions"], predicted)
    found = result(quantized[0], name)
    assert found["accuracy"] == pytest.approx((predicted == target.numpy()).mean())
    source = {"teacher": MAIN[0], "student": MAIN[1], "distilled": MAIN[3]}[name.split("-")[1]]
    with np.load(stage(quantized[0], "continued-kd-T4-s0" if "qat" in name else source) / "predictions.npz") as stored:
        agreement = (stored["predictions"] == predicted).mean()
    assert found["quantized"]["agreement_fp32"] == pytest.approx(agreement)
    assert found["quantized"]["agreement_file"] >= 0.995
    assert found["quantized"]["file_mb"] == pytest.approx((folder / "model.onnx").stat().st_size / 1e6)


@pytest.mark.integration
def test_the_verdict_has_a_row_for_each_and_says_what_it_costs(quantized) -> None:
    folder, printed = quantized
    verdicts = [json.loads(file.read_text()) for file in folder.glob("mlruns/stages/pipeline-*/verdict.json")]
    (verdict,) = (verdict for verdict in verdicts if "continued" in verdict["models"])
    own = ["distilled PTQ int8", "distilled QAT int8", "distilled 4-bit weights"]
    order = ["teacher", "teacher int8", "student", "student int8", "control", "distilled", "continued", *own]
    assert list(verdict["models"]) == order
    for model in verdict["models"].values():
        assert model["runtime"] == "ONNX Runtime"
        assert model["file_mb"] > 0
    sizes = {label: verdict["models"][label]["file_mb"] for label in ("distilled", *own)}
    assert sizes["distilled 4-bit weights"] < sizes["distilled PTQ int8"] < sizes["distilled"]
    assert {"ptq-distilled", "qat-continued", "qat-ptq", "continued-distilled"} <= set(verdict["differences"])
    words = " ".join(printed.split())
    assert re.search(r"In int8, .*post-training quantisation", words)
    assert re.search(r"Distilled and quantised \(distilled (PTQ|QAT) int8\), it is [\d.]+ times smaller", words)
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
    assert (again["accuracy"], again["quantized"]) == (before["accuracy"], before["quantized"])


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
    assert result(folder, "quantized-distilled-qat-int8-s0")["quantized"]["layers"] == 4


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
    monkeypatch.setattr("kd_lightning.pipeline.quantizing.described", lambda data: {"mean": (0.3,), "std": ()})
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


def made(predictions, *, val=0.8, **changes) -> Result:
    values = {"source": "student", "training": False, "weight_bits": 8, "activation_bits": 8, "layers": 4}
    values |= {
        "float_layers": (),
        "integer_operators": 4,
        "agreement_fp32": 1.0,
        "agreement_file": 1.0,
        "file_mb": 0.05,
    }
    return Result(
        role="quantized",
        label="student int8",
        method="student-ptq-int8",
        seed=0,
        predictions=np.asarray(predictions),
        target=np.arange(100) % 10,
        val_accuracy=val,
        train_seconds=0.0,
        parameters=10,
        size_mb=0.1,
        quantized=Quantized(**values | changes),
    )


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({}, None),
        ({"val": 0.11}, "it is at chance, with 11.0% of the validation images right"),
        ({"predictions": np.full(100, 3)}, "it predicts a single class"),
        ({"integer_operators": 3}, "3 of 4 quantised layers run on integers in ONNX Runtime"),
        ({"integer_operators": 0, "activation_bits": None}, None),
        ({"agreement_file": 0.99}, "its file predicts what the fake-quantised network predicts on 99.0% of the test"),
        ({"file_mb": 0.1}, "its file has 0.100 MB, and that in fp32 0.090 MB"),
    ],
)
def test_what_would_make_the_comparison_an_empty_one_is_warned_of(changes, warning) -> None:
    found = warnings_of(made(**{"predictions": np.arange(100) % 10, **changes}), 0.09, 10, 1000)
    assert len(found) == (warning is not None)
    assert warning is None or found[0].startswith(warning)


def test_a_file_that_overflows_here_is_warned_of_with_the_remedy() -> None:
    off = made(np.arange(100) % 10, agreement_file=0.93)
    (found,) = warnings_of(off, 0.09, 10, 1000, QuantizationSpec(target="vnni").mismatch({"avx2"}))
    assert found == (
        "its file predicts what the fake-quantised network predicts on 93.0% of the test images: target='vnni' is "
        "exact on x86 with VNNI or AMX, and this processor has AVX2, where sums of 8-bit products may overflow: take "
        "target='any'"
    )
