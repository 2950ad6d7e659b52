"""Tasks through whole commands: teacher, students, int8, verdict; its figures are those of the files, computed anew."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
from lightning.pytorch import LightningDataModule
from sklearn.metrics import f1_score, jaccard_score, mean_absolute_error

from kd_lightning.data import Diabetes, FashionItems, ShapeGeometry, ShapeMasks
from tests.command import kd_lightning

pytestmark = pytest.mark.integration

LITTLE = [
    "seeds=[0]",
    "teacher.trainer.max_steps=60",
    "trainer.max_steps=20",
    "trainer.check_val_every_n_epoch=null",
    "quantized.steps=5",
    "teacher.check=false",
    "logger=null",
]


class Case(NamedTuple):
    data: Callable[[], LightningDataModule]
    named: str
    figure: Callable[[np.ndarray, np.ndarray], float]
    """Of a file's outputs and the targets of the test split."""
    control: bool
    overrides: tuple[str, ...] = ()


def macro_f1(outputs: np.ndarray, target: np.ndarray) -> float:
    there = target.any(0) | (outputs > 0).any(0)
    return float(f1_score(target[:, there], outputs[:, there] > 0, average="macro", zero_division=0))


def mean_iou(outputs: np.ndarray, target: np.ndarray) -> float:
    return float(jaccard_score(target.ravel(), outputs.argmax(1).ravel(), average="macro", zero_division=0))


CASES = {
    "fashion_mnist/items": Case(FashionItems, "macro-F1", macro_f1, True, ("data.unlabelled=200",)),
    "shapes/masks": Case(ShapeMasks, "mIoU", mean_iou, True, ("data.unlabelled=100", "data.teacher_images=500")),
    "shapes/geometry": Case(
        ShapeGeometry,
        "mean_absolute_error",
        lambda outputs, target: 6 * mean_absolute_error(target, outputs),
        False,
        ("data.unlabelled=200", "data.labelled=200", "data.teacher_images=500"),
    ),
    "tabular/diabetes": Case(
        Diabetes, "mean_absolute_error", lambda outputs, target: 77 * mean_absolute_error(target, outputs), False
    ),
}


@pytest.mark.parametrize("experiment", CASES)
def test_a_task_goes_to_a_verdict_and_its_figures_are_those_of_the_files(experiment: str, tmp_path: Path) -> None:
    case = CASES[experiment]
    printed = kd_lightning(f"experiment={experiment}", *LITTLE, *case.overrides, cwd=tmp_path)
    assert "not decided" in printed.lower() or "worth it" in printed.lower()
    (file,) = tmp_path.glob("mlruns/stages/pipeline-*/verdict.json")
    models = json.loads(file.read_text())["models"]
    assert ("control" in models) == case.control
    inputs, target = zip(*case.data().test_dataloader(), strict=True)
    for label, stage in (("distilled QAT int8", "qat-int8"), ("distilled PTQ int8", "ptq-int8")):
        (model,) = tmp_path.glob(f"mlruns/stages/quantized-distilled-{stage}-s0-*/model.onnx")
        session = onnxruntime.InferenceSession(model)
        (name,) = (given.name for given in session.get_inputs())
        outputs = np.concatenate([session.run(None, {name: x.numpy()})[0] for x in inputs])
        expected = case.figure(outputs, np.concatenate([y.numpy() for y in target]))
        assert models[label][case.named]["mean"] == pytest.approx(expected, rel=1e-5)
