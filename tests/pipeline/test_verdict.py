"""Every recommendation follows from the figures, which are paired, and reads back as strict JSON."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from kd_lightning.pipeline.latency import Latency
from kd_lightning.pipeline.results import Result
from kd_lightning.pipeline.statistics import holm, paired_difference, paired_p_value
from kd_lightning.pipeline.table import print_verdict
from kd_lightning.pipeline.verdict import make_verdict, write_verdict

N, CLASSES = 2000, 10
TARGET = np.arange(N) % CLASSES
# Images from easy to hard, the same for every model: a model of accuracy p gets the p * N easiest right.
EASE = np.random.default_rng(0).permutation(N)


def run(role, accuracy, seed, *, label=None, target=TARGET, flips=60, val=0.5, **changes):
    """A run that gets `accuracy` of the images right, the easiest but for some `flips` that its seed draws."""
    rng = np.random.default_rng([seed, *f"{role}{label}".encode()])
    n = len(target)
    right = EASE[n > EASE].argsort() < round(accuracy * n)
    if flips:
        lost, won = (rng.choice(np.flatnonzero(side), flips, replace=False) for side in (right, ~right))
        right[lost], right[won] = False, True
    values = {
        "predictions": np.where(right, target, (target + 1) % CLASSES),
        "method": role,
        "train_seconds": 10.0,
        "parameters": 6000,
        "size_mb": 0.03,
        "val_accuracy": val,
    }
    return Result(role=role, label=label or role, seed=seed, target=target, **values | changes)


def runs(seeds=(0, 1, 2), **accuracies):
    """The usual experiment: one teacher, and every other role with all seeds."""
    return [
        run(role, accuracy, seed)
        for role, accuracy in accuracies.items()
        for seed in (seeds[:1] if role == "teacher" else seeds)
    ]


def verdict(*, extra_images=0, seeds=(0, 1, 2), **accuracies):
    return make_verdict(runs(seeds=seeds, **accuracies), {}, extra_images=extra_images)


def printed(verdict, width=100):
    file = io.StringIO()
    print_verdict(verdict, Console(file=file, width=width))
    return file.getvalue()


def test_better_than_alone_and_than_hard_labels_is_worth_it_and_softness_is_part_of_why():
    v = verdict(teacher=0.90, student=0.74, control=0.755, distilled=0.80)
    assert v.worth_it
    assert v.sentence.startswith("Worth it: the distilled student is 6.0 points (95 % interval ")
    assert "(80.0 % of the test images right against 74.0 %)" in v.sentence
    assert "closes 37.5 % of the gap to the teacher (" in v.sentence
    assert 'Softness ("dark knowledge") is part of why: 4.5 points (95 % interval ' in v.sentence
    assert "not shown" not in v.sentence


def test_the_labels_are_named_beside_the_softness_only_where_they_were_shown_to_help():
    both = verdict(teacher=0.95, student=0.70, control=0.76, distilled=0.82)
    assert "; the teacher's labels helped too (6.0 points" in both.sentence
    softness_alone = verdict(teacher=0.95, student=0.70, control=0.70, distilled=0.82)
    assert softness_alone.worth_it
    assert "helped too" not in softness_alone.sentence


def test_hard_labels_that_do_as_well_say_that_softness_was_not_shown():
    v = verdict(teacher=0.90, student=0.74, control=0.80, distilled=0.801)
    assert v.worth_it
    assert "The teacher's labels helped; that softness helped was not shown" in v.sentence
    assert "the teacher's hard labels did as well (a difference of 0.1 points" in v.sentence


def test_further_images_get_the_credit():
    v = verdict(teacher=0.90, student=0.77, control=0.85, distilled=0.85, extra_images=5500)
    assert v.worth_it
    assert (
        "The 5,500 further images that the teacher labelled helped; that softness helped was not shown: "
        "the teacher's hard labels did as well"
    ) in v.sentence
    soft = verdict(teacher=0.90, student=0.74, control=0.78, distilled=0.83, extra_images=5500)
    assert "; the 5,500 further images that the teacher labelled helped too (4.0 points" in soft.sentence


def test_a_control_in_the_middle_leaves_the_reason_open():
    v = verdict(teacher=0.90, student=0.74, control=0.748, distilled=0.756)
    assert v.differences["distilled-alone"].low > 0
    assert v.differences["distilled-control"].low < 0 > v.differences["control-alone"].low
    assert v.worth_it
    assert "Why was not shown: neither that the teacher's labels helped" in v.sentence
    assert "did as well" not in v.sentence


def test_no_difference_is_not_worth_it():
    v = verdict(teacher=0.90, student=0.80, control=0.80, distilled=0.803)
    assert not v.worth_it
    assert "Not worth it: no difference was shown: the student alone is as good" in v.sentence
    assert "a difference of 0.3 points, 95 % interval -" in v.sentence
    assert "closes" not in v.sentence
    assert "significant" not in v.sentence


def test_worse_is_not_worth_it_and_says_what_it_costs():
    v = verdict(teacher=0.90, student=0.87, control=0.87, distilled=0.83)
    assert not v.worth_it
    low, high = (
        round(100 * -x, 1) for x in (v.differences["distilled-alone"].high, v.differences["distilled-alone"].low)
    )
    assert f"Not worth it: distillation costs 4.0 points (95 % interval {low} to {high})" in v.sentence
    assert 0 < low < 4 < high


@pytest.mark.parametrize(("student", "worth_it"), [(0.70, True), (0.76, False)])
def test_hard_labels_that_do_better_are_recommended(student, worth_it):
    v = verdict(teacher=0.90, student=student, control=0.82, distilled=0.76)
    assert v.worth_it is worth_it
    assert "The teacher's hard labels are 6.0 points" in v.sentence
    assert "better than its soft ones, and " in v.sentence
    assert "better than the student alone: train on the teacher's hard labels" in v.sentence


def test_hard_labels_that_only_cost_less_are_not_recommended():
    v = verdict(teacher=0.90, student=0.87, control=0.87, distilled=0.83)
    assert "better than its soft ones; that they are better than the student alone was not shown" in v.sentence
    assert "train on" not in v.sentence


def test_hard_labels_that_help_where_softness_takes_nothing_away():
    v = verdict(teacher=0.90, student=0.760, control=0.772, distilled=0.767)
    assert not v.worth_it
    assert "The teacher's hard labels are 1.2 points" in v.sentence
    assert "better than the student alone: train on the teacher's hard labels" in v.sentence
    assert "soft ones" not in v.sentence


def test_a_teacher_that_is_no_better_leaves_no_gap():
    level = verdict(teacher=0.74, student=0.74, control=0.74, distilled=0.80)
    assert level.worth_it
    assert "There is no gap to close: that the teacher is better than the student alone was not shown" in level.sentence
    assert "closes" not in level.sentence
    assert level.gap_closed.low is None
    assert level.gap_closed.high is None
    assert re.search(r"distilled +80\.0 ± 0\.0 +\d\d\.\d +1\d\d\.\d +–", printed(level))
    worse = verdict(teacher=0.60, student=0.74, control=0.74, distilled=0.74)
    assert "There is no gap to close: the teacher is 14.0 points" in worse.sentence
    assert worse.gap_closed.mean is None


def test_missing_roles_give_a_partial_verdict_that_says_so():
    no_student = verdict(teacher=0.90, distilled=0.80)
    assert not no_student.worth_it
    assert no_student.sentence.startswith("Not decided: no student alone was run")
    assert set(no_student.models) == {"teacher", "distilled"}
    only_teacher = verdict(teacher=0.90)
    assert "no distilled student and no student alone was run" in only_teacher.sentence
    assert only_teacher.distilled is None
    assert only_teacher.models["teacher"].retention == 1
    no_teacher = verdict(student=0.74, control=0.75, distilled=0.80)
    assert no_teacher.worth_it
    assert "There is no teacher among the results" in no_teacher.sentence
    assert no_teacher.models["distilled"].agreement is None
    assert no_teacher.models["distilled"].retention is None
    no_control = verdict(teacher=0.90, student=0.74, distilled=0.80)
    assert no_control.worth_it
    assert "Whether softness helped was not asked: there is no control" in no_control.sentence
    for partial in (no_student, only_teacher, no_teacher, no_control):
        json.dumps(partial.to_dict(), allow_nan=False)
        printed(partial)


def sweep():
    variants = {"T=1": (0.83, 0.70), "T=2": (0.79, 0.78), "T=4": (0.78, 0.77)}  # test accuracy, validation accuracy
    return runs(teacher=0.90, student=0.74, control=0.755) + [
        run("distilled", test, seed, label=label, val=val, temperature=float(label[2:]), teacher_entropy=0.28)
        for label, (test, val) in variants.items()
        for seed in range(3)
    ]


def test_of_several_distilled_models_validation_chooses_and_the_sentence_says_so():
    v = make_verdict(sweep(), {"T=2": Latency(0.5, 0.75, 1234)})
    assert v.distilled == "T=2"  # T=1 is the best on the test images
    assert "student 'T=2' (of 3 distilled models the best on the validation images) is 5.0 points" in v.sentence
    assert list(v.models) == ["teacher", "student", "control", "T=1", "T=2", "T=4"]
    assert v.gap_closed == v.models["T=2"].gap_closed
    assert v.differences["distilled-alone"].mean == pytest.approx(0.05)
    row = v.to_dict()["models"]["T=2"]
    assert (row["temperature"], row["teacher_entropy"], row["latency_ms_p95"]) == (2.0, 0.28, 0.75)
    assert v.to_dict()["models"]["T=4"]["latency_ms_p50"] is None
    assert "temperature" not in v.to_dict()["models"]["student"]


def test_the_others_are_compared_with_the_reference():
    v = make_verdict(sweep(), {}, reference="T=4")
    expected = paired_difference(*(np.stack([r.correct for r in sweep() if r.label == x]) for x in ("T=1", "T=4")))
    assert v.models["T=1"].against_reference == expected
    assert v.models["T=4"].against_reference is None
    assert v.models["student"].against_reference is None
    assert v.to_dict()["models"]["T=1"]["against_reference"]["mean"] == pytest.approx(0.05)
    assert re.search(r"points over T=4 \(95 % interval\)", printed(v))
    assert re.search(r"distilled T=1 +\+5\.0 \(\d\.\d to \d\.\d\)", printed(v))
    right = {x: np.stack([r.correct for r in sweep() if r.label == x]) for x in ("T=1", "T=2", "T=4")}
    adjusted = holm([paired_p_value(right[x], right["T=4"]) for x in ("T=1", "T=2")])
    assert [v.models[x].against_reference_p for x in ("T=1", "T=2", "T=4")] == [*adjusted, None]
    assert v.to_dict()["models"]["T=2"]["against_reference_p"] == adjusted[1]
    assert "p (Holm, 2 comparisons)" in printed(v)
    one = make_verdict([result for result in sweep() if result.seed == 0], {}, reference="T=4")
    assert one.models["T=1"].against_reference_p is None
    assert "Holm" not in printed(one)
    assert "points over" not in printed(make_verdict(sweep(), {}))
    with pytest.raises(
        ValueError, match=r"reference 'T=3' is no distilled model, expected one of \['T=1', 'T=2', 'T=4'\]"
    ):
        make_verdict(sweep(), {}, reference="T=3")


def test_one_model_of_a_role_is_named_by_the_role():
    results = [*runs(teacher=0.90, student=0.74), run("distilled", 0.8, 0, label="T=4")]
    v = make_verdict(results, {"T=4": Latency(0.5, 0.75, 1234)})
    assert set(v.models) == {"teacher", "student", "distilled"}
    assert v.models["distilled"].latency.p50_ms == 0.5


def test_one_seed_decides_nothing_and_has_no_spread():
    v = verdict(teacher=0.90, student=0.74, control=0.75, distilled=0.80, seeds=(7,))
    assert v.differences["distilled-alone"].low > 0
    assert (v.worth_it, v.decided) == (False, False)
    assert v.sentence.startswith("Not decided: one seed")
    assert "(80.0 % of the test images right against 74.0 %: a difference of +6.0 (" in v.sentence
    assert "seeds=[0,1,2]" in v.sentence
    assert not re.search("worth|softness|hard labels|gap", v.sentence)
    assert v.models["distilled"].sd is None
    assert re.search(r"distilled +80\.0 ± – ", printed(v))
    several = verdict(teacher=0.90, student=0.74, distilled=0.80)
    assert (several.worth_it, several.decided) == (True, True)
    assert "one seed" not in several.sentence


def test_two_networks_that_are_equally_good_are_never_worth_it_after_one_seed():
    """Null pairs of which training again moves each by 2 points: the interval over test images alone is too narrow."""
    rng = np.random.default_rng(0)
    shown = 0
    for _ in range(100):
        accuracies = 0.75 + rng.normal(0, 0.02, 2)
        results = [run(role, a, 0) for role, a in zip(("student", "distilled"), accuracies, strict=True)]
        v = make_verdict(results, {})
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
        v = make_verdict(results, {})
        title = "student alone" if role == "student" else "distilled"
        assert (v.worth_it, v.decided) == (False, False)
        assert v.sentence.startswith(f"Not decided: {title} learned nothing (")
        some = "" if len(seeds) == 3 else " (seed 1)"
        assert v.sentence.count(f"Beware of {title}: it {what}{some}.") == 1
        assert v.to_dict()["models"][role]["learned_nothing"] == f"{what}{some}"
        assert "learned_nothing" not in v.to_dict()["models"]["control"]


def test_a_control_that_learned_nothing_is_said_beside_the_verdict():
    results = [
        run("control", 0.1, r.seed, predictions=np.zeros(N, int)) if r.role == "control" else r
        for r in runs(teacher=0.9, student=0.74, control=0.74, distilled=0.8)
    ]
    v = make_verdict(results, {})
    assert v.worth_it
    assert "Beware of teacher's hard labels: it predicts a single class." in v.sentence


@pytest.mark.parametrize("target", [np.arange(99) % 10, np.zeros(500, int)])
def test_too_few_test_images_or_one_class_tell_nothing_of_chance(target):
    results = [run("student", 1.0, 0, target=target, flips=0, predictions=np.zeros(len(target), int))]
    assert make_verdict(results, {}).models["student"].learned_nothing is None


def test_figures_of_a_model():
    v = verdict(teacher=0.90, student=0.74, distilled=0.80)
    a = [run("distilled", 0.80, s) for s in range(3)]
    teacher = run("teacher", 0.90, 0)
    row = v.to_dict()["models"]["distilled"]
    assert row["accuracy"]["seeds"] == [r.accuracy for r in a]
    assert row["accuracy"]["mean"] == pytest.approx(0.80)
    assert row["retention"] == pytest.approx(0.80 / 0.90)
    assert row["agreement"] == pytest.approx(np.mean([(r.predictions == teacher.predictions).mean() for r in a]))
    assert (row["params"], row["size_mb"], row["train_seconds"]) == (6000, 0.03, 10.0)
    spread = [run("distilled", accuracy, s) for s, accuracy in enumerate((0.79, 0.80, 0.81))]
    assert make_verdict(spread, {}).models["distilled"].sd == pytest.approx(0.01)


def test_seeds_are_paired_whatever_order_they_come_in():
    results = runs(teacher=0.90, student=0.74, control=0.75, distilled=0.80)
    assert make_verdict(results[::-1], {}).to_dict() == make_verdict(results, {}).to_dict()


def test_images_and_seeds_are_paired():
    """Same accuracies, but other images, or other partners among the seeds: another interval."""
    student = [run("student", 0.74 + 0.01 * s, s, flips=0) for s in range(3)]
    close = [run("distilled", 0.75 + 0.01 * s, s, flips=0) for s in range(3)]
    crossed = [run("distilled", 0.75 + 0.01 * ((s + 1) % 3), s, flips=0) for s in range(3)]
    order = np.random.default_rng(1).permutation(N // CLASSES)
    elsewhere = []
    for result in close:  # moved to other images of the same class
        predictions = result.predictions.reshape(-1, CLASSES)[order].ravel()
        elsewhere.append(run("distilled", 0.75, result.seed, predictions=predictions))
    by_case = [make_verdict(student + other, {}) for other in (close, crossed, elsewhere)]
    means = [v.differences["distilled-alone"].mean for v in by_case]
    assert means == pytest.approx([0.01] * 3)
    assert [v.worth_it for v in by_case] == [True, False, False]


def test_seeds_that_only_one_model_has_are_left_out_of_the_comparison_only():
    results = [r for r in runs(teacher=0.9, student=0.74, distilled=0.80) if (r.role, r.seed) != ("student", 2)]
    v = make_verdict(results, {})
    expected = np.mean([run("distilled", 0.80, s).accuracy - run("student", 0.74, s).accuracy for s in (0, 1)])
    assert v.differences["distilled-alone"].mean == pytest.approx(expected)
    assert len(v.models["distilled"].seeds) == 3


def test_recall_of_a_class_that_the_student_never_saw():
    results = []
    for result in runs(teacher=0.90, student=0.74, distilled=0.80):
        predictions = result.predictions.copy()
        boots = np.flatnonzero(TARGET == 9)
        share = {"teacher": 0.9, "student": 0.0, "distilled": 0.7}[result.role]
        predictions[boots] = 5
        predictions[boots[: round(share * len(boots))]] = 9
        results.append(run(result.role, 0.8, result.seed, predictions=predictions))
    v = make_verdict(results, {}, recall_classes={9: "ankle boot"})
    assert v.to_dict()["models"]["distilled"]["recall"] == {"ankle boot": pytest.approx(0.7)}
    assert "Recall on 'ankle boot': teacher 90.0 %, student alone 0.0 %, distilled 70.0 %." in v.sentence
    assert "ankle boot" in printed(v)
    assert "recall" not in make_verdict(results, {}).to_dict()["models"]["distilled"]
    assert "recall" not in printed(make_verdict(results, {}))


def test_json_is_strict_and_written_whole(tmp_path):
    results = runs(teacher=0.90, student=0.74, control=0.755, distilled=0.80)
    results[0] = run("teacher", 0.90, 0, train_seconds=float("nan"), val_accuracy=np.float32("inf"))
    v = make_verdict(results, {"teacher": Latency(0.1, 0.2, float("inf"))})
    path = tmp_path / "new" / "verdict.json"
    write_verdict(v, path)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == v.to_dict()
    assert read["models"]["teacher"]["train_seconds"] is None
    assert read["models"]["teacher"]["throughput_per_s"] is None
    assert set(read["gap_closed"]) == {"mean", "low", "high"}
    assert set(read["differences"]) == {"distilled-alone", "distilled-control", "control-alone", "teacher-alone"}
    assert {"worth_it", "sentence", "gap_closed", "models"} <= set(read)
    assert [p.name for p in path.parent.iterdir()] == ["verdict.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "verdict.json"
    write_verdict(verdict(student=0.74), path)
    before = path.read_text()

    def fail(*_):
        raise OSError("disk is gone")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_verdict(verdict(student=0.80), path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["verdict.json"]


def test_a_result_without_its_arrays_is_json():
    values = run("student", 0.75, np.int64(3), flips=0, val_accuracy=np.float32(0.5)).to_dict()
    read = json.loads(json.dumps(values, allow_nan=False))
    assert (read["role"], read["seed"], read["accuracy"], read["val_accuracy"]) == ("student", 3, 0.75, 0.5)
    assert not {"predictions", "target"} & set(read)


def test_the_table_holds_the_figures_and_fits_100_columns_without_colours():
    latency = {"T=2": Latency(0.512, 0.75, 12345.6), "teacher": Latency(1.5, 2.25, 999)}
    v = make_verdict(sweep(), latency, recall_classes={9: "ankle boot"})
    text = printed(v)
    assert "\x1b" not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    sd = f"{100 * v.models['T=2'].sd:.1f}"
    share = f"{100 * v.gap_closed.mean:.1f}"
    assert re.search(rf"distilled T=2 +79\.0 ± {sd} +\d\d\.\d +87\.8 +{share} +2 +28\.0 +\d\d\.\d", text)
    assert re.search(r"distilled T=2 +6,000 +0\.03 +0\.512 +0\.750 +12,346 +10\.0", text)
    assert re.search(r"student alone +6,000 +0\.03 +– +– +– +10\.0", text)
    assert re.search(r"teacher's hard labels +75\.5 ± ", text)
    assert " ".join(v.sentence.split()) in " ".join(text.split())


def test_columns_for_temperature_and_entropy_only_where_there_is_one():
    text = printed(verdict(teacher=0.90, student=0.74, distilled=0.80))
    assert "entropy" not in text
    assert not re.search(r"\bT\b", text)


def test_a_label_is_printed_as_it_is():
    results = [*runs(student=0.74), *(run("distilled", 0.8, s, label=f"[bold]{x}") for s in range(3) for x in "ab")]
    assert "distilled [bold]a" in printed(make_verdict(results, {}))


def test_a_teacher_for_each_seed_is_paired_with_its_students():
    results = runs(student=0.74, distilled=0.80) + [run("teacher", 0.90, s) for s in range(3)]
    agreement = make_verdict(results, {}).models["distilled"].agreement
    each = [(run("distilled", 0.8, s).predictions == run("teacher", 0.9, s).predictions).mean() for s in range(3)]
    assert agreement == pytest.approx(np.mean(each))
    with pytest.raises(ValueError, match=r"no seed in common \('teacher' \[0, 1, 2\], 'student' \[5\]\)"):
        make_verdict([run("student", 0.74, 5), *results[-3:]], {})


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (lambda: [], "expected at least one result, got none: run a stage"),
        (
            lambda: [run("student", 0.7, 0), run("distilled", 0.7, 0, target=TARGET[:1000])],
            r"'distilled' seed 0 has predictions \(1000,\) .* and 'student' target \(2000,\): test every model on",
        ),
        (
            lambda: [run("student", 0.7, 0), run("distilled", 0.7, 0, predictions=TARGET[:10])],
            r"has predictions \(10,\) for target \(2000,\)",
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
        make_verdict(results(), {})


def test_a_recall_class_without_test_images_is_refused():
    with pytest.raises(ValueError, match=r"no test image has class 12 \('boot'\), so it has no recall: leave it out"):
        make_verdict([run("student", 0.7, 0)], {}, recall_classes={12: "boot"})
