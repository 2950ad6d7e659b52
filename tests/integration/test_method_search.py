"""The bare loop gives the pipeline's students, and the search is the same again and fair."""

from pathlib import Path

import pytest
import torch

from kd_lightning.pipeline.run import run_stage
from tests.benchmarks.bare_training import Job

pytest.importorskip("optuna")
from tests.benchmarks.choose_settings import SEARCHED, Search, settings

LAYERS = "student_layer:{},teacher_layer:{}"
VARIANTS = {
    "KD": "losses:[hard_label,kd]",
    "CTKD": "losses:[hard_label,ctkd],callbacks:[curriculum_temperature]",
    "FitNet": "losses:[hard_label,kd,hint],losses.hint.student_layer:block3,losses.hint.teacher_layer:block4",
    "CRD": "losses:[hard_label,crd],losses.crd.student_layer:flatten,losses.crd.teacher_layer:hidden",
    "label smoothing": "losses:[hard_label]",
}
TINY = [
    "data.labelled=60",
    "data.unlabelled=40",
    "data.batch_size=32",
    "trainer.max_steps=7",
    "teacher.trainer.max_steps=3",
]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    variants = ",".join(f"{label}:{{{changes}}}" for label, changes in VARIANTS.items())
    work_dir = tmp_path_factory.mktemp("stages")
    return Job(None, [*TINY, f"+variants={{{variants}}}", "teacher.check=false", f"work_dir={work_dir}"])


@pytest.mark.parametrize("label", ["KD", "CTKD", "FitNet", "CRD", "label smoothing", "student", "control"])
def test_the_bare_loop_ends_with_the_weights_of_the_pipeline(job: Job, label: str, tmp_path: Path) -> None:
    training = job.trainings[label]
    stage = run_stage(training, job.teachers["teacher"], tmp_path, lambda folder: None, [])
    expected = stage.network().state_dict()
    network = job.train(training)
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    if label == "KD":
        assert job.entropy(training, 4.0) == pytest.approx(stage.result.figures["teacher_entropy"], rel=1e-5)


def test_every_method_is_searched_with_its_authors_setting_first_and_within_the_ranges() -> None:
    kd = {"losses.hard_label.weight": 1.0, "losses.kd.temperature": 3.0, "losses.kd.weight": 0.5}
    for label, searched in SEARCHED.items():
        tried = settings(label, 8, kd)
        assert tried[:5] == settings(label, 5, kd)  # a larger budget goes on
        assert len({tuple(setting.values()) for setting in tried}) == 8
        for path, number in searched.items():
            assert tried[0][path] == number.authors
            assert all(0.99 * number.low <= setting[path] <= 1.01 * number.high for setting in tried)
        if label.startswith("KD + "):
            assert all(setting.items() >= kd.items() for setting in tried)
        elif label != "label smoothing":
            assert {setting["losses.hard_label.weight"] for setting in tried} == {0.1, 1.0}


def test_a_search_that_was_cut_off_trains_the_rest_and_chooses_the_same(job: Job, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"

    def search() -> dict[str, dict[str, float]]:
        return Search(job, seeds=[10, 11], count=3, finalists=2, first_steps=None, results=file).run()

    chosen, lines = search(), file.read_text().splitlines()
    assert set(chosen) == set(VARIANTS)
    assert len(lines) == len(set(lines)) == 5 * (3 + 2)
    file.write_text("\n".join(lines[:9]) + "\n")
    assert search() == chosen
    assert sorted(file.read_text().splitlines()) == sorted(lines)
