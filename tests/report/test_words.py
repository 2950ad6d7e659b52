"""One sentence decides, a few lines say why with their intervals, warnings of one kind are said once."""

import re

import numpy as np
import pytest

from kd_lightning.pipeline.compare import compare
from kd_lightning.report.words import say
from tests.pipeline.finished_runs import (
    TASK,
    Judged,
    N,
    everything,
    latency,
    measured,
    run,
    runs,
    said,
    scored,
    sweep,
    verdict,
)


def words(text):
    """What a reader counts: everything with a letter or a digit."""
    return [word for word in text.split() if re.search(r"\w", word)]


def test_better_than_alone_and_than_hard_labels_is_worth_it_and_softness_helped():
    sentence, findings, warnings = say(verdict(teacher=0.90, student=0.74, control=0.74, distilled=0.80))
    assert re.fullmatch(
        r"Worth it: distillation improves the student's accuracy by 6\.0 points \(95 % interval \d\.\d to \d\.\d\), "
        r"from 74\.0 % to 80\.0 % on 2,000 test images, and closes 37\.5 % of the gap to the teacher "
        r"\(\d\d\.\d to \d\d\.\d %\)\.",
        sentence,
    )
    (softness,) = findings
    assert re.fullmatch(r"Softness helped, by 6\.0 points \(\d\.\d to \d\.\d\) against hard labels\.", softness)
    assert warnings == ()


def test_the_labels_are_named_beside_the_softness_only_where_they_were_shown_to_help():
    both = said(verdict(teacher=0.95, student=0.70, control=0.76, distilled=0.82))
    assert "; the teacher's labels helped too, by 6.0 points (" in both
    softness_alone = verdict(teacher=0.95, student=0.70, control=0.70, distilled=0.82)
    assert softness_alone.worth_it
    assert "helped too" not in said(softness_alone)


def test_hard_labels_that_do_as_well_say_that_softness_was_not_shown():
    v = verdict(teacher=0.90, student=0.74, control=0.80, distilled=0.801)
    assert v.worth_it
    (finding,) = say(v).findings
    assert finding.startswith("The teacher's labels helped, by 6.0 points (")
    assert "; that softness helped was not shown (+0.1 points, -" in finding


def test_further_images_get_the_credit():
    v = verdict(teacher=0.90, student=0.77, control=0.85, distilled=0.85, extra=5500)
    assert v.worth_it
    (finding,) = say(v).findings
    assert finding.startswith("The 5,500 further images that the teacher labelled helped, by 8.0 points (")
    assert "that softness helped was not shown (0.0 points, -" in finding
    soft = verdict(teacher=0.90, student=0.74, control=0.78, distilled=0.83, extra=5500)
    assert "; the 5,500 further images that the teacher labelled helped too, by 4.0 points" in said(soft)


def test_a_control_in_the_middle_leaves_the_reason_open():
    (finding,) = say(verdict(teacher=0.90, student=0.74, control=0.748, distilled=0.756)).findings
    assert finding.startswith("Why was not shown: neither that the teacher's labels helped (+0.8 points, -")
    assert "nor that softness did (+0.8 points, -" in finding


def test_no_difference_is_not_worth_it():
    text = said(verdict(teacher=0.90, student=0.80, control=0.80, distilled=0.803))
    assert text.startswith(
        "Not worth it: that distillation improves the student was not shown: accuracy 80.3 % against 80.0 % alone on "
        "2,000 test images (+0.3 points, 95 % interval -"
    )
    assert not re.search("closes|significant|equal|as good|as well", text)


def test_worse_is_not_worth_it_and_says_what_it_costs():
    v = verdict(teacher=0.90, student=0.87, control=0.87, distilled=0.83)
    gain = v.differences["distilled-alone"]
    low, high = (round(100 * -x, 1) for x in (gain.high, gain.low))
    assert say(v).sentence.startswith(
        f"Not worth it: distillation worsens the student's accuracy by 4.0 points (95 % interval {low} to {high}), "
        "from 87.0 % to 83.0 % on 2,000 test images"
    )
    assert 0 < low < 4 < high


@pytest.mark.parametrize(("student", "worth_it"), [(0.70, True), (0.76, False)])
def test_hard_labels_that_do_better_are_recommended(student, worth_it):
    v = verdict(teacher=0.90, student=student, control=0.82, distilled=0.76)
    assert v.worth_it is worth_it
    (finding,) = say(v).findings
    assert finding.startswith("The teacher's hard labels are better than its soft ones by 6.0 points (")
    assert f", and than the student alone by {100 * (0.82 - student):.1f} points (" in finding
    assert finding.endswith(": train on the teacher's hard labels.")


def test_hard_labels_that_only_cost_less_are_not_recommended():
    (finding,) = say(verdict(teacher=0.90, student=0.87, control=0.87, distilled=0.83)).findings
    assert "; that they are better than the student alone was not shown (" in finding
    assert "train on" not in finding


def test_hard_labels_that_help_where_softness_takes_nothing_away():
    v = verdict(teacher=0.90, student=0.760, control=0.772, distilled=0.767)
    assert not v.worth_it
    (finding,) = say(v).findings
    assert finding.startswith("The teacher's hard labels are better than the student alone by 1.2 points (")
    assert finding.endswith(": train on the teacher's hard labels.")
    assert "soft ones" not in finding


def test_a_teacher_that_is_no_better_leaves_no_gap():
    level = say(verdict(teacher=0.74, student=0.74, control=0.74, distilled=0.80)).sentence
    assert (
        "; there is no gap to close: that the teacher is better than the student alone was not shown (0.0 points, -"
        in level
    )
    assert "closes" not in level
    worse = say(verdict(teacher=0.60, student=0.74, control=0.74, distilled=0.74)).sentence
    assert "; there is no gap to close: the teacher is worse than the student alone by 14.0 points (" in worse


def test_missing_roles_are_named():
    no_student = say(verdict(teacher=0.90, distilled=0.80)).sentence
    assert no_student.startswith("Not decided: no student alone was run")
    assert no_student.endswith(" Distilled: accuracy 80.0 %.")
    assert "no distilled student and no student alone was run" in say(verdict(teacher=0.90)).sentence
    no_teacher = verdict(student=0.74, control=0.75, distilled=0.80)
    assert "is not known without a teacher among the results." in say(no_teacher).sentence
    no_control = say(verdict(teacher=0.90, student=0.74, distilled=0.80))
    assert no_control.findings == (
        "Whether softness helped was not asked: there is no control on the teacher's hard labels.",
    )


def test_of_several_distilled_models_the_sentence_names_the_one_it_is_about():
    sentence = say(compare(sweep(), TASK)).sentence
    assert (
        "distillation with 'T=2' (of 3 distilled models the best on the validation images) improves the student's "
        "accuracy by 5.0 points"
    ) in sentence


def test_one_seed_decides_nothing():
    v = verdict(teacher=0.90, student=0.74, control=0.75, distilled=0.80, seeds=(7,))
    text = said(v)
    assert text.startswith("Not decided: one seed, and training again may differ by more. ")
    assert "Distillation gives accuracy 80.0 % against 74.0 % alone on 2,000 test images (+6.0 points; " in text
    assert "is the 95 % interval over the test images alone" in text
    assert "seeds=[0,1,2]" in text
    assert not re.search("worth|softness|hard labels|gap", text)
    of_sweep = compare([r for r in sweep() if r.seed == 0], TASK)
    assert "with 'T=2' (of 3 distilled models the best on the validation images) gives" in said(of_sweep)


@pytest.mark.parametrize("role", ["student", "distilled"])
@pytest.mark.parametrize("seeds", [[0, 1, 2], [1]])
def test_a_student_that_learned_nothing_is_said_with_its_seeds(role, seeds):
    zeros = np.zeros(N, int)
    results = [
        run(r.role, 0.5, r.seed, predictions=zeros) if r.role == role and r.seed in seeds else r
        for r in runs(teacher=0.9, student=0.74, control=0.74, distilled=0.8)
    ]
    sentence, findings, warnings = say(compare(results, TASK))
    title = "student alone" if role == "student" else "distilled"
    assert sentence.startswith(f"Not decided: {title} learned nothing (accuracy ")
    assert "lower the learning rate, or train for longer" in sentence
    some = "" if len(seeds) == 3 else " (seed 1)"
    assert warnings == (f"Figures that say nothing of the method: {title} predicts a single class{some}.",)
    assert findings == ()


def test_recall_of_a_class_that_the_student_never_saw():
    shares = {"teacher": 0.9, "student": 0.0, "distilled": 0.7}
    results = [
        run(r.role, 0.8, r.seed, parts={"recall on 'ankle boot'": shares[r.role]})
        for r in runs(teacher=0.90, student=0.74, distilled=0.80)
    ]
    line = "Recall on 'ankle boot': teacher 90.0 %, student alone 0.0 %, distilled 70.0 %."
    assert line in say(compare(results, TASK)).findings
    assert "ecall" not in said(verdict(teacher=0.90, student=0.74, distilled=0.80))


def errors(factor, seed, base):
    return factor * base * np.random.default_rng(seed).uniform(0.9, 1.1, len(base))


def test_of_an_error_less_is_better():
    """Mean absolute error in millimetres: an improvement is positive, and said as such."""
    name = {"name": "mean absolute error", "key": "mae", "units": "patients"}
    task = Judged(**name, higher_is_better=False, percent=False, symbol="mm", digits=2)
    base = np.random.default_rng(0).gamma(3, 1.0, 89)

    def compared(**factors):
        return compare(
            [
                scored(role, errors(factor, seed, base), seed)
                for role, factor in factors.items()
                for seed in range(1 if role == "teacher" else 3)
            ],
            task,
        )

    better = compared(teacher=1.0, student=2.0, distilled=1.4)
    alone, distilled = (better.models[key].value for key in ("student", "distilled"))
    sentence, findings, _ = say(better)
    assert re.fullmatch(
        rf"Worth it: distillation improves the student's mean absolute error by {alone - distilled:.2f} mm \(95 % "
        rf"interval \d\.\d\d to \d\.\d\d\), from {alone:.2f} mm to {distilled:.2f} mm on 89 test patients, and closes "
        r"\d\d\.\d % of the gap to the teacher \(\d\d\.\d to \d\d\.\d %\)\.",
        sentence,
    )
    assert findings == ()  # no classes, so that no control on hard labels is missed
    worse = say(compared(teacher=1.0, student=1.4, distilled=2.0)).sentence
    assert worse.startswith("Not worth it: distillation worsens the student's mean absolute error by ")
    same = say(compared(teacher=1.0, student=1.4, distilled=1.4)).sentence
    assert "was not shown: mean absolute error " in same


def test_a_headline_that_is_no_mean_says_how_its_interval_was_found():
    task = Judged(name="mIoU", key="miou", units="images", of_mean=lambda mean: float(np.mean(mean[0] / mean[1])))
    rng = np.random.default_rng(0)
    union = rng.integers(50, 100, (300, 2))

    def compared(**accuracies):
        return compare(
            [
                scored(role, np.stack([union * rng.normal(iou, 0.1, (300, 2)), union], axis=1), seed)
                for role, iou in accuracies.items()
                for seed in range(1 if role == "teacher" else 3)
            ],
            task,
        )

    sentence = say(compared(teacher=0.8, student=0.5, distilled=0.65)).sentence
    assert re.match(
        r"Worth it: distillation improves the student's mIoU by 1[45]\.\d points \(95 % interval 1\d\.\d to 1\d\.\d, "
        r"bootstrap over test images\), from \d\d\.\d % to \d\d\.\d % on 300 test images, and closes ",
        sentence,
    )
    not_shown = say(compared(teacher=0.8, student=0.5, distilled=0.5)).sentence
    assert ", bootstrap over test images)" in not_shown


@pytest.mark.parametrize(
    ("headline", "scale", "expected"),
    [
        (
            {"name": "recall@10 of the teacher's neighbours", "key": "recall_at_10", "units": "sentences"},
            0.3,
            "improves the student's recall@10 of the teacher's neighbours by 12.0 points (95 % interval",
        ),
        (
            {
                "name": "cross-entropy",
                "key": "bpc",
                "units": "passages",
                "higher_is_better": False,
                "percent": False,
                "symbol": "bits per character",
                "digits": 2,
            },
            -2.0,
            "improves the student's cross-entropy by 0.80 bits per character (95 % interval",
        ),
        (
            {"name": "perplexity", "key": "ppl", "units": "passages", "higher_is_better": False, "percent": False},
            -20.0,
            "improves the student's perplexity by 8.0 (95 % interval",
        ),
    ],
)
def test_other_headlines_are_said_in_their_own_units(headline, scale, expected):
    quality = {"teacher": 2.2, "student": 1.4, "distilled": 1.8}
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.1, 200)
    results = [
        scored(role, abs(scale) * (base + (value if scale > 0 else 4 - value)), seed)
        for role, value in quality.items()
        for seed in range(1 if role == "teacher" else 3)
    ]
    sentence = say(compare(results, Judged(**headline))).sentence
    assert sentence.startswith("Worth it: distillation ")
    assert expected in sentence
    assert f"on 200 test {headline['units']}, and closes 50.0 % of the gap to the teacher (" in sentence


def test_all_that_is_said_of_the_main_job_is_short():
    files = {label: {"file_mb": mb} for label, mb in (("teacher", 0.43), ("distilled", 0.027))}
    speeds = {label: latency(0.02, 9000) for label in ("teacher", "distilled", "distilled PTQ int8")}
    results = measured(everything(control=0.74), **{label: files.get(label, {}) | speeds[label] for label in speeds})
    sentence, findings, warnings = say(compare(results, TASK, runtime="ONNX Runtime", processor="AVX2"))
    assert len(findings) == 5
    assert warnings == ()
    assert len(words(" ".join([sentence, *findings]))) < 120
