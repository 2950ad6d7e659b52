"""Every decision follows from the figures, which are paired by seed and test unit; the test units choose nothing."""

import json

import numpy as np
import pytest

from kd_lightning.pipeline.compare import against_teacher, compare
from kd_lightning.pipeline.statistics import Performance, holm, paired_difference, paired_p_value
from kd_lightning.records import Result
from tests.pipeline.finished_runs import (
    CLASSES,
    TARGET,
    TASK,
    Judged,
    N,
    latency,
    measured,
    run,
    runs,
    scored,
    sweep,
    verdict,
)


@pytest.mark.parametrize(
    ("accuracies", "worth_it", "reason"),
    [
        ({"student": 0.74, "control": 0.755, "distilled": 0.80}, True, "shown"),
        ({"student": 0.80, "control": 0.80, "distilled": 0.803}, False, "not_shown"),
        ({"student": 0.87, "control": 0.87, "distilled": 0.83}, False, "costs"),
    ],
)
def test_the_decision_follows_from_the_difference_to_the_student_alone(accuracies, worth_it, reason):
    v = verdict(teacher=0.90, **accuracies)
    assert (v.worth_it, v.decided, v.reason) == (worth_it, True, reason)
    gain = v.differences["distilled-alone"]
    assert gain.mean == pytest.approx(accuracies["distilled"] - accuracies["student"])
    assert (gain.low > 0, gain.high < 0) == (reason == "shown", reason == "costs")
    assert (v.units, v.seeds, v.variants, v.distilled) == (N, 3, 1, "distilled")


def test_a_control_in_the_middle_leaves_the_reason_open():
    v = verdict(teacher=0.90, student=0.74, control=0.748, distilled=0.756)
    assert v.differences["distilled-alone"].low > 0
    assert v.differences["distilled-control"].low < 0 > v.differences["control-alone"].low
    assert v.worth_it


def test_a_teacher_that_is_no_better_leaves_no_gap():
    level = verdict(teacher=0.74, student=0.74, control=0.74, distilled=0.80)
    assert level.worth_it
    assert level.gap_closed.low is None
    assert level.gap_closed.high is None
    assert verdict(teacher=0.60, student=0.74, control=0.74, distilled=0.74).gap_closed.mean is None


def test_missing_roles_give_a_partial_verdict():
    no_student = verdict(teacher=0.90, distilled=0.80)
    assert (no_student.worth_it, no_student.decided, no_student.reason) == (False, False, "missing")
    assert set(no_student.models) == {"teacher", "distilled"}
    only_teacher = verdict(teacher=0.90)
    assert (only_teacher.distilled, only_teacher.reason) == (None, "missing")
    assert only_teacher.models["teacher"].retention == 1
    no_teacher = verdict(student=0.74, control=0.75, distilled=0.80)
    assert no_teacher.worth_it
    assert no_teacher.models["distilled"].agreement is None
    assert no_teacher.models["distilled"].retention is None
    no_control = verdict(teacher=0.90, student=0.74, distilled=0.80)
    assert no_control.worth_it
    for partial in (no_student, only_teacher, no_teacher, no_control):
        json.dumps(partial.to_dict(), allow_nan=False)


def test_of_several_distilled_models_validation_chooses():
    v = compare(measured(sweep(), **{"T=2": latency(0.5, 1234)}), TASK)
    assert v.distilled == "T=2"  # T=1 is the best on the test images
    assert v.variants == 3
    assert list(v.models) == ["teacher", "student", "control", "T=1", "T=2", "T=4"]
    assert v.gap_closed == v.models["T=2"].gap_closed
    assert v.differences["distilled-alone"].mean == pytest.approx(0.05)
    row = v.to_dict()["models"]["T=2"]
    assert (row["temperature"], row["teacher_entropy"], row["latency_ms_p95"]) == (2.0, 0.28, 0.75)
    assert v.to_dict()["models"]["T=4"]["latency_ms_p50"] is None
    assert "temperature" not in v.to_dict()["models"]["student"]


def test_where_lower_is_better_the_lowest_error_on_validation_is_chosen():
    task = Judged(name="mean absolute error", key="mae", units="patients", higher_is_better=False, percent=False)
    rng = np.random.default_rng(0)
    results = [
        scored("distilled", rng.gamma(2, 1.0, 50), s, val=val, label=label)
        for label, val in (("a", 3.0), ("b", 2.0), ("c", 4.0))
        for s in range(2)
    ]
    assert compare(results, task).distilled == "b"


def test_the_others_are_compared_with_the_reference():
    v = compare(sweep(), TASK, reference="T=4")
    right = {
        x: Performance.of(np.stack([r.scores for r in sweep() if r.label == x]), TASK.headline)
        for x in ("T=1", "T=2", "T=4")
    }
    assert v.models["T=1"].against_reference == paired_difference(right["T=1"], right["T=4"])
    assert v.models["T=4"].against_reference is None
    assert v.models["student"].against_reference is None
    assert v.to_dict()["models"]["T=1"]["against_reference"]["mean"] == pytest.approx(0.05)
    adjusted = holm([paired_p_value(right[x], right["T=4"]) for x in ("T=1", "T=2")])
    assert [v.models[x].against_reference_p for x in ("T=1", "T=2", "T=4")] == [*adjusted, None]
    assert v.to_dict()["models"]["T=2"]["against_reference_p"] == adjusted[1]
    one = compare([result for result in sweep() if result.seed == 0], TASK, reference="T=4")
    assert one.models["T=1"].against_reference_p is None
    with pytest.raises(
        ValueError, match=r"reference 'T=3' is no distilled model, expected one of \['T=1', 'T=2', 'T=4'\]"
    ):
        compare(sweep(), TASK, reference="T=3")


def test_one_model_of_a_role_is_named_by_the_role():
    distilled = run("distilled", 0.8, 0, label="T=4", figures=latency(0.5, 1234))
    v = compare([*runs(teacher=0.90, student=0.74), distilled], TASK)
    assert set(v.models) == {"teacher", "student", "distilled"}
    assert v.models["distilled"].figures["latency_ms_p50"] == 0.5


def test_one_seed_decides_nothing_and_has_no_spread():
    v = verdict(teacher=0.90, student=0.74, control=0.75, distilled=0.80, seeds=(7,))
    assert v.differences["distilled-alone"].low > 0
    assert (v.worth_it, v.decided, v.reason, v.seeds) == (False, False, "one_seed", 1)
    assert v.models["distilled"].sd is None
    several = verdict(teacher=0.90, student=0.74, distilled=0.80)
    assert (several.worth_it, several.decided) == (True, True)


def test_two_networks_that_are_equally_good_are_never_worth_it_after_one_seed():
    """Null pairs of which training again moves each by 2 points: the interval over test images alone is too narrow."""
    rng = np.random.default_rng(0)
    shown = 0
    for _ in range(100):
        accuracies = 0.75 + rng.normal(0, 0.02, 2)
        results = [run(role, a, 0) for role, a in zip(("student", "distilled"), accuracies, strict=True)]
        v = compare(results, TASK)
        shown += v.differences["distilled-alone"].low > 0
        assert not v.worth_it
        assert not v.decided
    assert shown > 10  # and would have been "worth it" in so many


@pytest.mark.parametrize("role", ["student", "distilled"])
@pytest.mark.parametrize("seeds", [[0, 1, 2], [1]])
def test_a_student_that_learned_nothing_decides_nothing(role, seeds):
    rng = np.random.default_rng(0)
    for what, predictions in (
        ("predicts a single class", np.full(N, 3)),
        ("is at chance", rng.integers(CLASSES, size=N)),
    ):
        results = [
            run(r.role, 0.5, r.seed, predictions=predictions) if r.role == role and r.seed in seeds else r
            for r in runs(teacher=0.9, student=0.74, control=0.74, distilled=0.8)
        ]
        v = compare(results, TASK)
        assert (v.worth_it, v.decided, v.reason) == (False, False, "learned_nothing")
        some = "" if len(seeds) == 3 else " (seed 1)"
        assert v.to_dict()["models"][role]["learned_nothing"] == f"{what}{some}"
        assert v.cautions == {"learned_nothing": (role,)}
        assert "learned_nothing" not in v.to_dict()["models"]["control"]


def test_a_control_that_learned_nothing_leaves_the_decision():
    results = [
        run("control", 0.1, r.seed, predictions=np.zeros(N, int)) if r.role == "control" else r
        for r in runs(teacher=0.9, student=0.74, control=0.74, distilled=0.8)
    ]
    v = compare(results, TASK)
    assert v.worth_it
    assert v.cautions == {"learned_nothing": ("control",)}


@pytest.mark.parametrize("target", [np.arange(99) % 10, np.zeros(500, int)])
def test_too_few_test_images_or_one_class_tell_nothing_of_chance(target):
    results = [run("student", 1.0, 0, target=target, flips=0, predictions=np.zeros(len(target), int))]
    assert compare(results, TASK).models["student"].learned_nothing is None


def test_figures_of_a_model():
    v = verdict(teacher=0.90, student=0.74, distilled=0.80)
    a = [run("distilled", 0.80, s) for s in range(3)]
    teacher = run("teacher", 0.90, 0)
    row = v.to_dict()["models"]["distilled"]
    assert row["accuracy"]["seeds"] == [r.scores.mean() for r in a]
    assert row["accuracy"]["mean"] == pytest.approx(0.80)
    assert row["val_accuracy"] == 0.5
    assert row["retention"] == pytest.approx(0.80 / 0.90)
    assert row["agreement"] == pytest.approx(np.mean([(r.answers == teacher.answers).mean() for r in a]))
    assert (row["params"], row["size_mb"], row["train_seconds"]) == (6000, 0.03, 10.0)
    assert isinstance(row["params"], int)
    spread = [run("distilled", accuracy, s) for s, accuracy in enumerate((0.79, 0.80, 0.81))]
    assert compare(spread, TASK).models["distilled"].sd == pytest.approx(0.01)


def test_what_a_run_leaves_beside_its_own_figures():
    teacher, student = run("teacher", 0.90, 0), run("student", 0.74, 0)
    found = against_teacher(student, teacher, TASK)
    agreement = (student.answers == teacher.answers).mean()
    assert found == {"agreement": pytest.approx(agreement), "retention": pytest.approx(0.74 / 0.90)}
    assert student.metrics(TASK.headline) == {
        "final/acc": pytest.approx(0.74),
        "final/val_acc": 0.5,
        "final/params": 6000,
        "final/size_mb": 0.03,
        "final/train_seconds": 10.0,
    }


def test_of_errors_retention_and_the_share_of_the_gap_are_below_one_where_the_student_is_worse():
    task = Judged(name="mean absolute error", key="mae", units="patients", higher_is_better=False, percent=False)
    rng = np.random.default_rng(0)
    base = rng.gamma(3, 1.0, 400)
    scale = {"teacher": 1.0, "student": 2.0, "distilled": 1.4}
    results = [
        scored(role, factor * base * rng.uniform(0.9, 1.1, 400), seed)
        for role, factor in scale.items()
        for seed in range(1 if role == "teacher" else 3)
    ]
    v = compare(results, task)
    assert v.worth_it
    assert v.differences["distilled-alone"].mean == pytest.approx(0.6 * base.mean(), rel=0.02)
    assert v.gap_closed.mean == pytest.approx(0.6, abs=0.02)
    assert v.models["distilled"].retention == pytest.approx(1 / 1.4, rel=0.02)
    assert v.models["student"].retention == pytest.approx(1 / 2, rel=0.02)
    row = v.to_dict()["models"]["student"]
    assert row["mean_absolute_error"]["mean"] == pytest.approx(2 * base.mean(), rel=0.02)
    assert row["val_mean_absolute_error"] == 1.0


def test_a_headline_that_is_no_mean_is_judged_on_its_counts():
    task = Judged(name="mIoU", key="miou", units="images", of_mean=lambda mean: float(np.mean(mean[0] / mean[1])))
    rng = np.random.default_rng(0)
    union = rng.integers(50, 100, (300, 2))
    results = [
        scored(role, np.stack([union * rng.normal(iou, 0.1, (300, 2)), union], axis=1), seed)
        for role, iou in {"teacher": 0.8, "student": 0.5, "distilled": 0.65}.items()
        for seed in range(1 if role == "teacher" else 3)
    ]
    v = compare(results, task)
    assert v.worth_it
    for role, iou in (("student", 0.5), ("distilled", 0.65)):
        (first, *_) = [r.scores for r in results if r.role == role]
        assert v.models[role].value == pytest.approx(iou, abs=0.01)
        assert v.models[role].seeds[0] == pytest.approx((first[:, 0].sum(0) / first[:, 1].sum(0)).mean())
    assert v.gap_closed.low < 0.5 < v.gap_closed.high


def test_seeds_are_paired_whatever_order_they_come_in():
    results = runs(teacher=0.90, student=0.74, control=0.75, distilled=0.80)
    assert compare(results[::-1], TASK).to_dict() == compare(results, TASK).to_dict()


def test_images_and_seeds_are_paired():
    """Same accuracies, but other images, or other partners among the seeds: another interval."""
    student = [run("student", 0.74 + 0.01 * s, s, flips=0) for s in range(3)]
    close = [run("distilled", 0.75 + 0.01 * s, s, flips=0) for s in range(3)]
    crossed = [run("distilled", 0.75 + 0.01 * ((s + 1) % 3), s, flips=0) for s in range(3)]
    order = np.random.default_rng(1).permutation(N // CLASSES)
    elsewhere = []
    for result in close:  # moved to other images of the same class
        predictions = result.answers.reshape(-1, CLASSES)[order].ravel()
        elsewhere.append(run("distilled", 0.75, result.seed, predictions=predictions))
    by_case = [compare(student + other, TASK) for other in (close, crossed, elsewhere)]
    means = [v.differences["distilled-alone"].mean for v in by_case]
    assert means == pytest.approx([0.01] * 3)
    assert [v.worth_it for v in by_case] == [True, False, False]


def test_seeds_that_only_one_model_has_are_left_out_of_the_comparison_only():
    results = [r for r in runs(teacher=0.9, student=0.74, distilled=0.80) if (r.role, r.seed) != ("student", 2)]
    v = compare(results, TASK)
    expected = np.mean([run("distilled", 0.80, s).scores - run("student", 0.74, s).scores for s in (0, 1)])
    assert v.differences["distilled-alone"].mean == pytest.approx(expected)
    assert len(v.models["distilled"].seeds) == 3
    assert v.seeds == 2


def test_parts_of_the_test_units_are_means_over_seeds():
    results = [
        run("distilled", 0.8, s, parts={"recall on 'ankle boot'": share}) for s, share in enumerate((0.6, 0.7, 0.8))
    ]
    v = compare([*results, *runs(student=0.74)], TASK)
    assert v.to_dict()["models"]["distilled"]["parts"] == {"recall on 'ankle boot'": pytest.approx(0.7)}
    assert "parts" not in v.to_dict()["models"]["student"]


def test_answers_that_cannot_agree_are_not_compared():
    """Vectors of another width, say."""
    task = Judged(name="recall@10", key="recall_at_10", units="sentences")
    rng = np.random.default_rng(0)
    wide = scored("teacher", rng.random(50), answers=rng.random((50, 8)))
    narrow = scored("student", rng.random(50), answers=rng.random((50, 4)))
    assert compare([wide, narrow], task).models["student"].agreement is None
    assert set(against_teacher(narrow, wide, task)) == {"retention"}
    assert compare([wide, narrow], task).models["teacher"].agreement == 1


def test_a_teacher_for_each_seed_is_paired_with_its_students():
    results = runs(student=0.74, distilled=0.80) + [run("teacher", 0.90, s) for s in range(3)]
    agreement = compare(results, TASK).models["distilled"].agreement
    each = [(run("distilled", 0.8, s).answers == run("teacher", 0.9, s).answers).mean() for s in range(3)]
    assert agreement == pytest.approx(np.mean(each))
    with pytest.raises(ValueError, match=r"no seed in common \('teacher' \[0, 1, 2\], 'student' \[5\]\)"):
        compare([run("student", 0.74, 5), *results[-3:]], TASK)


def test_a_result_without_its_arrays_is_json_and_reads_back():
    one = run("student", 0.75, np.int64(3), flips=0, val=np.float32(0.5), temperature=(8.0, 1.0), parts={"a": 0.5})
    read = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert (read["role"], read["seed"], read["figures"]["val"]) == ("student", 3, 0.5)
    assert not {"answers", "scores"} & set(read)
    again = Result.from_dict(read, answers=one.answers, scores=one.scores, label="renamed")
    assert again.label == "renamed"
    assert again.temperature == (8.0, 1.0)
    assert again.to_dict() == one.to_dict() | {"label": "renamed"}


def test_a_figure_that_nobody_declared_is_refused():
    with pytest.raises(ValueError, match=r"figures \['colour'\] of 'student' are not declared: add them to records"):
        run("student", 0.7, 0, figures={"colour": 1.0})


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (lambda: [], "expected at least one result, got none: run a stage"),
        (
            lambda: [run("student", 0.7, 0), run("distilled", 0.7, 0, target=TARGET[:1000])],
            r"'distilled' seed 0 has 1000 answers and scores \(1000,\), and 'student' 2000 and \(2000,\): test every",
        ),
        (
            lambda: [run("student", 0.7, 0), run("distilled", 0.7, 0, predictions=TARGET[:10])],
            r"has 10 answers and scores \(10,\), .* test every model on the same images",
        ),
        (
            lambda: [run("student", 0.7, 0), run("distilled", 0.7, 0, target=TARGET[::-1].copy())],
            "'distilled' seed 0 has another target than 'student': test both on the same images in the same order",
        ),
        (
            lambda: [run("student", 0.7, 4), run("student", 0.8, 4)],
            "'student' seed 4 is given twice: pass one result a run",
        ),
        (
            lambda: [run("student", 0.7, 0), run("control", 0.8, 1, label="student")],
            "label 'student' has roles student and control: one label, one model",
        ),
        (
            lambda: [run("student", 0.7, 0, label="teacher")],
            "label 'teacher' names a role, and the run has role 'student': rename it",
        ),
        (lambda: [run("pupil", 0.7, 0)], "has role 'pupil', expected one of teacher, assistant, student"),
        (
            lambda: [run("student", 0.7, 0, label="a"), run("student", 0.7, 0, label="b")],
            r"expected one model with role 'student', got \['a', 'b'\]",
        ),
        (
            lambda: [run("student", 0.7, 0), run("distilled", 0.7, 1)],
            r"no seed in common \('distilled' \[1\], 'student' \[0\]\): train models that are compared with the same",
        ),
        (
            lambda: [run("distilled", 0.7, 0, label=x, val=float("nan")) for x in "ab"],
            "'a' has validation accuracy nan: the best of 2 is chosen on it",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(results, message):
    with pytest.raises(ValueError, match=message):
        compare(results(), TASK)
