"""Whole pipelines, small: what they use again, and what they refuse."""

import json
import os
import re
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from kd_lightning import load_student
from kd_lightning.durable_files import unseal
from kd_lightning.report.facts import duration
from tests.command import TINY, copied, kd_lightning, kd_lightning_anew

pytestmark = pytest.mark.integration

MAIN = ("teacher-hard_label-s0", "student-hard_label-s0", "control-deit_hard-s0", "distilled-kd-T4-s0")


def runs(folder: Path):
    """Parents first, then children, in the order of their creation."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlruns/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "kd-lightning"]
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"], max_results=500)
    parents = [run for run in found if run.data.tags["kd.role"] == "pipeline"]
    return client, parents, [run for run in found if run.data.tags["kd.role"] != "pipeline"]


def weights(folder: Path) -> dict[str, float]:
    """When each stage's weights were written."""
    return {path.parent.name: path.stat().st_mtime for path in folder.glob("mlruns/stages/*/final.ckpt")}


def test_the_same_command_again_trains_nothing(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    before = weights(folder)
    printed = kd_lightning(*TINY, cwd=folder)
    assert printed.count("reused") == 4
    assert weights(folder) == before
    client, parents, children = runs(folder)
    assert [run.info.run_name for run in children] == [*MAIN, *MAIN]
    assert {run.data.tags["mlflow.parentRunId"] for run in children[4:]} == {parents[1].info.run_id}
    assert [run.data.tags["kd.reused_from"] for run in children[4:]] == [run.info.run_id for run in children[:4]]
    for run, before_it in zip(children[4:], children[:4], strict=True):  # with its curves
        curves = [client.get_metric_history(of.info.run_id, "train/loss") for of in (run, before_it)]
        assert len(curves[0]) > 1
        assert [(x.step, x.value) for x in curves[0]] == [(x.step, x.value) for x in curves[1]]
    first, again = ([run.outputs.model_outputs[0].model_id for run in of] for of in (children[:4], children[4:]))
    assert first == again  # linked, and stored once
    assert [run.inputs.to_dictionary() for run in children[:4]] == [run.inputs.to_dictionary() for run in children[4:]]


def test_where_nothing_has_changed_the_same_command_says_at_once_what_it_found(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    run = kd_lightning(*TINY, cwd=folder)  # not answered by what was found in another folder
    assert run.count("reused") == 4
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (verdict,) = folder.glob("mlruns/stages/*/verdict.json")
    again = kd_lightning(*TINY, cwd=folder)
    assert again.startswith("Nothing has changed since 20")
    assert again.partition("\n\n")[2] == run.partition("\n\n")[2]  # tables, words, the report and the view
    assert again.count("\n") > 15
    assert kd_lightning("--json", *TINY, cwd=folder) == verdict.read_text()
    assert kd_lightning("-q", *TINY, cwd=folder) == f"{json.loads(verdict.read_text())['sentence']}\n"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    client, parents, _ = runs(folder)
    client.delete_run(parents[-1].info.run_id)
    assert kd_lightning(*TINY, cwd=folder).count("reused") == 4
    assert len(runs(folder)[1]) == len(parents)


def test_no_answer_is_kept_of_a_variant_whose_data_does_not_say_what_it_reads(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    for answer in folder.rglob("answer-*.json"):
        answer.unlink()
    methods = {"silent": "pass", "telling": "def sources(self):\n        return []"}
    for name, method in methods.items():
        module = f"from kd_lightning.data import FashionMNIST\n\n\nclass Own(FashionMNIST):\n    {method}\n"
        (folder / f"{name}.py").write_text(module)
    time.sleep(0.1)  # of what is written as a command begins none is kept either
    for name, answers in (("silent", 0), ("telling", 1)):
        variants = f"+variants={{own:{{data._target_:{name}.Own}}}}"
        kd_lightning(*TINY, "stages=[teacher,distilled,verdict]", variants, cwd=folder)
        assert len(list(folder.rglob("answer-*.json"))) == answers


def test_what_has_changed_is_trained_and_nothing_else(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    printed = kd_lightning(*TINY, "losses.kd.temperature=2", cwd=folder)
    assert printed.count("reused") == 3
    assert "distilled-kd-T2-s0" in printed
    printed = kd_lightning(*TINY, "data.labelled=200", "stages=[teacher,student]", cwd=folder)
    assert printed.count("reused") == 1  # the teacher: its images are the same


@pytest.mark.parametrize("name", ["result.json", "predictions.npz", "final.ckpt"])
def test_a_stage_with_a_torn_file_runs_again(finished, tmp_path: Path, name: str) -> None:
    folder = copied(finished[0], tmp_path)
    (file,) = folder.glob(f"mlruns/stages/student-*/{name}")
    file.write_bytes(file.read_bytes()[:100])
    printed = kd_lightning(*TINY, "stages=[teacher,student]", "logger=null", cwd=folder)
    assert printed.count("reused") == 1
    assert "is damaged" in printed


def test_one_stage_alone_with_a_teacher_from_a_checkpoint(finished, tmp_path: Path) -> None:
    (teacher,) = finished[0].glob("mlruns/stages/teacher-*/final.ckpt")
    printed = kd_lightning(*TINY, "stages=[distilled]", f"teacher.checkpoint={teacher}", "logger=null", cwd=tmp_path)
    assert "[1/2] teacher-checkpoint-s0" in printed
    assert "[2/2] distilled-kd-T4-s0" in printed


def test_a_sweep_trains_the_teacher_once(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    printed = kd_lightning("-m", *TINY, "losses.kd.temperature=4.0,8", "stages=[teacher,distilled,verdict]", cwd=folder)
    assert printed.count("teacher-hard_label-s0: ") == 2
    assert printed.count("reused") == 3  # the teacher twice, and T = 4
    assert "distilled-kd-T8-s0" in printed
    client, (_, *jobs), children = runs(folder)
    (experiment,) = client.search_experiments(filter_string="name = 'kd-lightning'")
    (sweep,) = (run for run in children if run.data.tags["kd.role"] == "sweep")
    assert sweep.info.status == "FINISHED"
    assert sweep.info.run_name.endswith(": sweep over T")
    assert {job.data.tags["mlflow.parentRunId"] for job in jobs} == {sweep.info.run_id}
    assert [job.data.params["sweep/losses.kd.temperature"] for job in jobs] == ["4.0", "8"]
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{sweep.info.run_id[:12]}"])
    (parallel,) = (card for card in view["compareRunCharts"] if card["type"] == "PARALLEL")
    assert parallel["selectedParams"] == ["sweep/losses.kd.temperature"]
    order = f"{view['orderByKey']} {'ASC' if view['orderByAsc'] else 'DESC'}"
    found = client.search_runs([experiment.experiment_id], view["searchFilter"], order_by=[order])
    best_first = sorted(jobs, key=lambda job: job.data.metrics["final/val_acc"], reverse=True)
    assert [run.info.run_id for run in found] == [job.info.run_id for job in best_first]
    assert all(name in job.data.metrics for name in parallel["selectedMetrics"] for job in jobs)
    described = sweep.data.tags["mlflow.note.content"]
    best = best_first[0].data.params["sweep/losses.kd.temperature"]
    assert f"the best on the validation images: T = {best}." in described
    for job in jobs:
        row = f"| {job.data.params['sweep/losses.kd.temperature']} | {100 * job.data.metrics['final/val_acc']:.1f} |"
        assert row in described


def test_variants_are_rows_of_one_comparison(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    variants = "T4:{losses.kd.temperature:4.0}, hint:{losses:[kd,hint],losses.hint.student_layer:block3,"
    variants += "losses.hint.teacher_layer:block4}, smooth:{losses:[hard_label],losses.hard_label.label_smoothing:0.1}"
    printed = kd_lightning(*TINY, f"+variants={{{variants}}}", "reference=T4", cwd=folder)
    for label, method in {"T4": "kd-T4", "hint": "kd-T4+hint", "smooth": "hard_label"}.items():
        assert f"distilled {label}" in printed
        assert f"distilled-{method}-s0: " in printed
    words = " ".join(printed.split())
    assert "best on the validation images" in words
    assert "improvement on T4" in words


def test_an_assistant_is_taught_by_the_teacher_and_teaches_the_student(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    assistants = ["+models@assistants.medium.network=cnn8", "+assistants.medium.network.width=12"]
    variants = "+variants={direct:{taught_by:teacher},indirect:{taught_by:medium}}"
    printed = kd_lightning(*TINY, *assistants, variants, "reference=direct", cwd=folder)
    lines = printed.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines if re.match(r"\[\d/6\]", line)] == [
        "teacher-hard_label-s0",
        "assistant-medium-kd-T4-s0",
        "student-hard_label-s0",
        "control-deit_hard-s0",
        "distilled-kd-T4-s0",
        "distilled-kd-T4-s0",
    ]
    assert any(line.startswith("assistant ") for line in lines)
    _, parents, children = runs(folder)
    assert parents[-1].data.metrics["data/samples/labelled"] == 300
    assistant = next(run for run in children if run.data.tags["kd.role"] == "assistant")
    assert assistant.data.metrics["final/agreement"] > 0.5  # with the teacher, whose images and soft targets it learnt
    direct, indirect = [run for run in children if run.data.tags["kd.role"] == "distilled"][-2:]
    assert direct.data.metrics["final/teacher_entropy"] != indirect.data.metrics["final/teacher_entropy"]
    for run in (direct, indirect):  # of the same name
        assert "final/latency_ms_p50" in run.data.metrics


def test_an_assistant_that_nobody_teaches_is_another_teacher(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    assistants = ["+models@assistants.{}.network=cnn64", "+assistants.{}.taught_by=null"]
    assistants = [word.format(name) for name in ("same", "longer") for word in assistants]
    assistants += ["+assistants.longer.trainer.max_steps=40"]
    variants = "+variants={first:{taught_by:teacher},second:{taught_by:same},third:{taught_by:longer}}"
    given = [*TINY, *assistants, variants, "stages=[teacher,assistants,student,distilled,verdict]"]
    kd_lightning(*given, "reference=first", "logger=null", cwd=folder)
    (verdict,) = [file for file in folder.glob("mlruns/stages/pipeline-*/verdict.json") if "third" in file.read_text()]
    models = json.loads(verdict.read_text())["models"]
    assert models["same"]["method"] == "hard_label"
    assert models["same"]["agreement"] == 1  # trained like the teacher, it is the teacher
    assert models["longer"]["agreement"] < 1
    assert models["first"]["accuracy"] == models["second"]["accuracy"]
    assert models["first"]["teacher_entropy"] == models["second"]["teacher_entropy"]
    assert models["first"]["teacher_entropy"] != models["third"]["teacher_entropy"]


def test_stored_outputs_teach_what_the_live_teacher_does(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    arguments = [*TINY, "stages=[teacher,store_outputs,distilled]", "logger=null"]
    printed = kd_lightning(*arguments, "stages=[teacher,store_outputs,student,distilled,verdict]", cwd=folder)
    assert "stored outputs: 300 samples × 1 views as float16" in printed
    live, stored = (
        np.load(next(path.parent.glob("predictions.npz")))["answers"]
        for path in sorted(folder.glob("mlruns/stages/distilled-*/result.json"), key=lambda path: path.stat().st_mtime)
    )
    assert (live == stored).mean() > 0.98  # half precision is all that differs
    (written,) = folder.glob("mlruns/stages/outputs-*/*.json")
    seconds = unseal(written.read_text())["seconds"]
    page = max(folder.glob("mlruns/stages/pipeline-*/report.html"), key=lambda path: path.stat().st_mtime)
    models = json.loads(page.with_name("verdict.json").read_text())["models"]
    assert models["distilled"]["store_seconds"] == pytest.approx(seconds)
    assert seconds > 0
    assert models["student"]["store_seconds"] is None
    assert f"and {duration(seconds)} for storing its outputs" in page.read_text()
    before = written.stat().st_mtime_ns
    assert kd_lightning(*arguments, cwd=folder).count("reused") == 2
    assert written.stat().st_mtime_ns == before


def test_a_mistake_is_one_line_before_anything_is_trained(tmp_path: Path) -> None:
    printed = kd_lightning(*TINY, "logger=null", "losses.kd.temperature=-1", cwd=tmp_path, code=1)
    expected = (
        "kd-lightning: losses.kd.temperature=-1: expected temperature > 0, got -1: 1 leaves the logits as they are"
    )
    assert printed.startswith(expected)
    assert printed.count("\n") == 1
    assert not list(tmp_path.glob("mlruns/stages/*/"))


def test_a_training_that_diverges_is_one_line_and_no_verdict(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    printed = " ".join(kd_lightning(*TINY, "optimizer.lr=1e30", "logger=null", cwd=folder, code=1).split())
    assert re.search(r"kd-lightning: the training has diverged at step \d: the student's (weights|logits)", printed), (
        printed
    )
    assert "lower the learning rate" in printed
    assert "Traceback" not in printed
    assert "orth it" not in printed


def test_a_checkpoint_of_another_network_is_refused(finished, tmp_path: Path) -> None:
    (student,) = finished[0].glob("mlruns/stages/student-*/final.ckpt")
    printed = kd_lightning(*TINY, f"teacher.checkpoint={student}", "logger=null", cwd=tmp_path, code=1)
    assert "does not fit CNN64" in printed


def test_a_folder_that_cannot_be_written_to_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "mlruns").write_text("a file is in the way")
    printed = kd_lightning(*TINY, cwd=tmp_path, code=1)
    assert "cannot write" in printed
    assert os.listdir(tmp_path) == ["mlruns"]


def test_composed_losses_schedules_and_unlabelled_images(tmp_path: Path) -> None:
    arguments = ["losses=[hard_label,kd,hint]", "losses.hint.student_layer=block3", "losses.hint.teacher_layer=block4"]
    arguments += ["callbacks=[temperature_schedule]", "data.unlabelled=200", "trainer.accumulate_grad_batches=2"]
    kd_lightning(*TINY, *arguments, "stages=[teacher,distilled]", cwd=tmp_path)
    (result,) = (json.loads(file.read_text()) for file in tmp_path.glob("mlruns/stages/distilled-*/result.json"))
    # At the first and at the last step, not the yaml's.
    assert result["result"]["temperature"] == pytest.approx([8, 8 - 7 * 11 / 12])
    client, _, (_, distilled) = runs(tmp_path)
    history = client.get_metric_history(distilled.info.run_id, "kd/temperature")
    steps = {point.step: point.value for point in history}
    assert len(steps) > 3
    # 12 optimizer steps of two batches each: T goes from 8 to 1 with the optimizer's steps.
    assert all(min(abs(value - (8 - 7 * k / 12)) for k in range(12)) < 1e-5 for value in steps.values())
    assert list(steps.values()) == sorted(steps.values(), reverse=True)
    assert {"train/loss/hint", "train/loss/kd", "train/loss/hard_label"} <= set(distilled.data.metrics)


def test_training_for_few_bits_is_one_more_callback(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    (plain,) = folder.glob("mlruns/stages/distilled-*")
    printed = kd_lightning(*TINY, "callbacks=[quantization_aware_training]", cwd=folder)
    assert "p50 ms" in printed  # the verdict, which loads what was trained
    (file,) = (file for file in folder.glob("mlruns/stages/distilled-*/final.ckpt") if file.parent != plain)
    state = torch.load(file, weights_only=True)["state_dict"]
    enabled, observing, observed = state["block1.0.weight_quantizer._extra_state"].tolist()
    assert (enabled, observing, observed) == (1, 0, 1)


def test_two_processes_make_one_result(tmp_path: Path) -> None:
    printed = kd_lightning_anew(
        *TINY, "trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", cwd=tmp_path
    )
    assert printed.count("distilled-kd-T4-s0: ") == 1
    _, parents, children = runs(tmp_path)
    assert len(parents) == 1
    assert tuple(run.info.run_name for run in children) == MAIN


def test_mixed_precision_is_the_trainings_alone_and_learns_nearly_the_same(finished, tmp_path: Path) -> None:
    folder, states = copied(finished[0], tmp_path), []
    # bfloat16 on a CPU without the instructions is very slow: two steps, and the teacher without.
    for precision in ("32-true", "bf16-mixed"):
        arguments = [f"trainer.precision={precision}", "+teacher.trainer.precision=32-true", "trainer.max_steps=2"]
        printed = kd_lightning(*TINY, *arguments, "logger=null", "stages=[teacher,distilled]", cwd=folder)
        assert "distilled-kd-T4-s0: " in printed
        newest = max(folder.glob("mlruns/stages/distilled-*/final.ckpt"), key=lambda file: file.stat().st_mtime)
        states.append(load_student(newest))
    full, mixed = states
    assert {x.dtype for x in mixed.values()} == {x.dtype for x in full.values()}
    for name in (name for name, x in full.items() if x.ndim > 1):
        # Each number has gone two steps of Adam, 2e-3 each, nearly always in the same direction.
        assert 0 < (mixed[name] - full[name]).abs().mean() < 4e-4, name
