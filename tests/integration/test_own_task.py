"""A task that is not in the package: one .py and one .yaml in a folder of one's own, through a whole command."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.command import TINY, kd_lightning
from tests.pipeline.test_pipeline import runs

pytestmark = pytest.mark.integration

TASK = '''"""Sizes from 0 to 9: what matters is how far off an answer is."""

import math

import torch

from kd_lightning.tasks import Headline, Task


class Sizes(Task):
    """Classes in an order, judged by the root mean squared error of the expected one."""

    def __init__(self, units="shoes"):
        self.headline = Headline(
            name="root mean squared error",
            key="rmse",
            units=units,
            higher_is_better=False,
            percent=False,
            symbol="sizes",
            digits=2,
            of_mean=lambda mean: math.sqrt(float(mean)),
        )

    def answers(self, outputs):
        return outputs.logits.softmax(-1) @ torch.arange(10.0, device=outputs.logits.device)

    def scores(self, outputs, target):
        return (self.answers(outputs) - target).square()

    def agreement(self, student, teacher):
        return ((student - teacher).abs() < 0.5).float()

    def knows_nothing(self, target, width=None):
        return float(target.float().std(correction=0))

    def check(self, target, logits):
        if logits.shape[-1] != 10:
            raise ValueError(f"expected an output for each of 10 sizes, got {logits.shape[-1]}: set num_classes")
'''
YAML = "_target_: own_task.Sizes\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own_task.py").write_text(TASK)
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "sizes.yaml").write_text(YAML)
    return tmp_path


def command(folder: Path, *arguments: str, code: int = 0) -> str:
    given = [f"hydra.searchpath=[file://{folder}/conf]", "task=sizes", *TINY, "trainer.check_val_every_n_epoch=1"]
    return kd_lightning(*given, *arguments, cwd=folder, code=code)  # which finds modules there


def test_one_file_and_one_yaml_go_to_the_verdict(folder: Path) -> None:
    stages = "teacher,student,distilled"
    printed = command(folder, f"stages=[{stages},verdict]", "seeds=[0,1]")
    assert re.search(r"teacher-hard_label-s0: validation root mean squared error \d\.\d\d sizes \(", printed)
    assert "root mean squared error" in " ".join(printed.split())

    (file,) = folder.glob("mlruns/stages/pipeline-*/verdict.json")
    verdict = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert verdict["headline"]["higher_is_better"] is False
    assert verdict["units"] == 2500
    teacher, student = (verdict["models"][role]["root_mean_squared_error"] for role in ("teacher", "student"))
    assert 0 < teacher["mean"] < student["mean"] < 4  # the classes' standard deviation is 2.9
    assert verdict["models"]["student"]["retention"] == pytest.approx(teacher["mean"] / student["mean"])
    assert verdict["differences"]["teacher-alone"]["mean"] == pytest.approx(student["mean"] - teacher["mean"])

    _, parents, children = runs(folder)
    assert parents[0].data.metrics["final/rmse_teacher"] == pytest.approx(teacher["mean"])
    by_name = {run.info.run_name: run.data.metrics for run in children}
    logged = by_name["distilled-kd-T4-s0"]
    assert {"final/rmse", "final/val_rmse", "final/agreement", "final/retention", "val/rmse"} <= logged.keys()
    assert logged["val/teacher_rmse"] == pytest.approx(by_name["teacher-hard_label-s0"]["final/val_rmse"], rel=1e-3)

    quantized = [
        f"stages=[{stages},quantized,verdict]",
        "quantized.steps=4",
        "quantized.weights_only=null",
        "seeds=[0]",
    ]
    assert command(folder, *quantized).count("reused") == 3
    by_name = {run.info.run_name: run.data.metrics for run in runs(folder)[2]}
    assert 0.5 < by_name["quantized-distilled-ptq-int8-s0"]["final/agreement_fp32"] <= 1
    for stage in folder.glob("mlruns/stages/*/result.json"):
        with np.load(stage.parent / "predictions.npz") as arrays:
            recorded = json.loads(stage.read_text())["result"]["headline"]
            assert math.sqrt(arrays["scores"].mean()) == pytest.approx(recorded)

    # Another name for the units changes no training; another way to score does.
    again = command(folder, *quantized, "+task.units=boots")
    assert again.count("reused") == again.count("validation root mean squared error") == 8, again
    (folder / "own_task.py").write_text(TASK.replace(".square()", ".abs()"))
    assert "reused" not in command(folder, "stages=[teacher]")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "return (self.answers(outputs) - target).square()",
            "return outputs.logit",
            "task: AttributeError: 'Outputs' object has no attribute",
        ),
        ("[-1] != 10", "[-1] != 9", r"data: expected an output for each of 10 sizes, got 10: set num_classes"),
    ],
)
def test_a_mistake_in_it_is_one_line_before_anything_is_trained(folder: Path, old: str, new: str, said: str) -> None:
    assert old in TASK
    (folder / "own_task.py").write_text(TASK.replace(old, new))
    printed = command(folder, "logger=null", code=1)
    assert printed.startswith("kd-lightning: ")
    assert printed.count("\n") == 1
    assert said in printed
    assert not list(folder.glob("mlruns/stages/*/"))
