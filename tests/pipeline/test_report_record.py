"""``report.json``: what a stage's answers say of parts of the test units, and what is computed once."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.data.contract import Data
from kd_lightning.pipeline import report_record
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.report_groups import of_answers
from kd_lightning.pipeline.shown_inputs import Shows, image, top
from kd_lightning.report.html import render
from kd_lightning.tasks import Batch, Classification, LanguageModelling, Regression
from tests.pipeline import tiny_training
from tests.report.records import by_task

N = 60


def stages(task, answers, scores):
    """Finished stages by model, as far as their answers are asked for."""
    found = {}
    for key, of in answers.items():
        result = SimpleNamespace(answers=of, scores=scores(of))
        found[key] = [SimpleNamespace(result=result)]
    return found


def data(target, **attributes):
    loader = DataLoader(TensorDataset(torch.zeros(len(target), 1), target), batch_size=25)
    return Data(SimpleNamespace(test_dataloader=lambda: loader, **attributes))


def test_recall_agreement_and_retention_by_class() -> None:
    target = torch.arange(N) % 3
    teacher = target.clone()
    teacher[:6] = 0
    student = torch.where(target == 2, 1, target)
    answers = {"teacher": teacher.numpy(), "student": student.numpy()}
    given = data(target, class_names=["a", "b", "c"])
    found = of_answers(Classification(), stages(None, answers, lambda of: (of == target.numpy()).astype(float)), given)
    groups = found["groups"]
    assert (groups["by"], groups["names"], groups["count"]) == ("class", ["a", "b", "c"], [20, 20, 20])
    assert groups["models"]["teacher"]["mean"] == pytest.approx([1, 0.9, 0.9])
    assert groups["models"]["student"]["mean"] == pytest.approx([1, 1, 0])
    assert groups["models"]["student"]["retention"] == pytest.approx([1, 1 / 0.9, 0])
    assert groups["models"]["student"]["agreement"] == pytest.approx([1, 0.9, 0])


def test_errors_by_range_of_the_target_in_its_own_unit() -> None:
    task = Regression()
    target = torch.linspace(0, 1, N)[:, None]
    answers = {"teacher": target.numpy() + 0.1, "student": target.numpy() + 0.2}
    given = data(target, target_mean=100.0, target_std=10.0)
    found = of_answers(task, stages(task, answers, lambda of: np.abs(of - target.numpy())[:, 0].astype(float)), given)
    groups = found["groups"]
    assert groups["by"] == "target"
    assert groups["names"][0].startswith("100 to")
    assert groups["names"][-1].endswith("to 110")
    assert sum(groups["count"]) == N
    assert groups["models"]["student"]["mean"] == pytest.approx([0.2] * 4)
    assert groups["models"]["student"]["retention"] == pytest.approx([0.5] * 4)


def test_bits_by_text() -> None:
    task = LanguageModelling(per="token")
    answers = {"teacher": np.zeros((N, 5), np.int16), "student": np.zeros((N, 5), np.int16)}
    scores = np.stack([np.repeat([5.0, 10.0], N // 2), np.full(N, 5.0)], 1)
    given = data(
        torch.zeros(N, 5, dtype=torch.int64), test_groups=(["hamlet", "lear"], [0] * (N // 2) + [1] * (N // 2))
    )
    found = of_answers(task, stages(task, answers, lambda of: scores), given)["groups"]
    assert (found["by"], found["names"]) == ("text", ["hamlet", "lear"])
    assert found["models"]["student"]["mean"] == [1, 2]


def test_an_image_is_shown_as_it_was_before_it_was_normalised() -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(1, 4, 4) * 17
    inputs = (torch.from_numpy(pixels).float() / 255 - 0.3) / 0.2
    shown = Shows(SimpleNamespace(mean=(0.3,), std=(0.2,)))(Batch((inputs[None],), {}, None), 0)
    assert shown == image(pixels)
    large = image(np.zeros((3, 224, 224), np.uint8))
    assert max(large["width"], large["height"]) <= 96


def test_the_classes_that_are_shown_are_the_teachers_best_the_label_and_the_others_answers() -> None:
    p = {"teacher": np.array([0.5, 0.3, 0.1, 0.06, 0.04]), "distilled": np.array([0, 0, 0, 1.0, 0])}
    assert top(p, label=4) == [0, 1, 2, 3, 4]


def test_a_record_of_stages_is_rendered_and_its_networks_run_once(tmp_path: Path, monkeypatch) -> None:
    teacher = tiny_training.made(tmp_path, "teacher")
    finished = [teacher, tiny_training.made(tmp_path, "student"), tiny_training.made(tmp_path, "distilled", teacher)]
    made = finished[0].training.make_data()
    made.setup("test")
    verdict = compare([stage.result for stage in finished], Classification())
    path = tmp_path / "pipeline-x" / "report.json"
    given = {"name": "tiny", "task": Classification(), "verdict": verdict, "finished": finished, "data": made}
    config = {"logger": {"tracking_uri": "https://someone:secret@server"}}
    first = report_record.write_record(path, **given, config=config)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == json.loads(json.dumps(first))
    assert "secret" not in path.read_text()
    assert first["looked_at"]["units"] == 40
    assert first["examples"]
    assert "distilled" in render(first)
    monkeypatch.setattr(report_record, "soft_outputs", None)  # is not called
    assert report_record.write_record(path, **given, config=config)["examples"] == first["examples"]
    path.unlink()
    with pytest.raises(TypeError, match="not callable"):
        report_record.write_record(path, **given, config=config)


@pytest.mark.parametrize("kind", ["classification", "segmentation", "several labels", "rows"])
def test_no_unit_is_shown_twice_and_each_rule_shows_a_few(kind: str) -> None:
    examples = by_task()[kind]["examples"]
    units = [json.dumps(example["input"]) for example in examples]
    assert len(set(units)) == len(units)
    rules = [example["rule"] for example in examples]
    first = "error" if kind == "rows" else "knowledge"
    assert rules == [first] * 4 + ["disagreement"] * 4 + ["lot"] * 4
