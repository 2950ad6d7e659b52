"""What quantising cost, whether training for it helped, and what both bring together: one line each."""

import re

from kd_lightning.pipeline.compare import compare
from kd_lightning.report.words import say
from tests.pipeline.finished_runs import LABELS, TASK, everything, latency, measured, quantized, run, runs, said


def test_nothing_lost_and_no_training_needed_is_said():
    _, cost, training, *_ = say(compare(everything(), TASK)).findings
    interval = r"0\.0 points \(-\d\.\d to \d\.\d\)"
    assert re.fullmatch(rf"In int8 no loss was shown: PTQ {interval}, QAT {interval}\.", cost)
    assert re.fullmatch(
        r"QAT was not shown better than PTQ \(0\.0 points, -\d\.\d to \d\.\d\): PTQ is enough\.", training
    )


def test_a_file_that_validation_preferred_is_not_said_to_be_needless():
    verdict = compare(measured(everything(), distilled_QAT_int8={"val": 1.1}), TASK)
    assert verdict.served == "distilled QAT int8"
    assert "QAT, which the validation split preferred, was not shown better than PTQ (0.0 points" in said(verdict)
    assert "PTQ is enough" not in said(verdict)


def test_what_post_training_loses_and_training_wins_back():
    text = said(compare(everything(ptq=0.70, qat=0.798), TASK))
    assert "In int8, against fp32: PTQ lost 10.0 points (" in text
    assert "; a loss by QAT was not shown: -0.2 points (-" in text
    assert "QAT is better than PTQ by 9.8 points (" in text
    assert ", 9.8 points (" in text
    assert "beyond what the same further steps bring in fp32" in text


def test_what_the_steps_bring_in_float_as_well_is_not_the_quantisers_merit():
    text = said(compare(everything(qat=0.83, continued=0.828), TASK))
    assert "QAT is better than PTQ by 3.0 points" in text
    assert "; that it is more than the same further steps bring in fp32 was not shown (+0.2 points, -" in text


def test_training_that_does_harm_is_to_be_left_out():
    text = said(compare(everything(qat=0.77), TASK))
    assert re.search(r"QAT is worse than PTQ by 3\.0 points \(\d\.\d to \d\.\d\): leave it out\.", text)


def test_the_sum_is_compared_with_the_teacher():
    by_label = {label: latency(0.05, 9000) for label in (*LABELS, "student", "distilled")}
    by_label |= {"teacher": latency(0.4, 1000) | {"file_mb": 0.43}, "student": {"file_mb": 0.04}}
    text = said(compare(measured(everything(), **by_label), TASK, runtime="ONNX Runtime"))
    assert re.search(
        r"Against the teacher it is 21\.5 times smaller, 8\.0 times faster, worse by 10\.0 points "
        r"\(\d+\.\d to \d+\.\d\)\.",
        text,
    )
    assert "Against the teacher" not in said(compare(everything(), TASK))
    one_seed = [result for result in measured(everything(), **by_label) if result.seed == 0]
    assert "8.0 times faster, with accuracy 80.0 % against 90.0 %." in said(compare(one_seed, TASK))


def test_integers_that_take_longer_than_floats_are_said_to():
    by_label = {
        "distilled": latency(0.010, 300) | latency(0.010, 300, "openvino_") | {"file_mb": 0.03},
        "distilled PTQ int8": latency(0.015, 150) | latency(0.005, 600, "openvino_"),
    }
    v = compare(measured(everything(), **by_label), TASK, runtime="ONNX Runtime", processor="AVX2")
    assert (
        "Against its fp32 file distilled PTQ int8 is 1.5 times smaller, in ONNX Runtime 1.5 times slower (batch 64: "
        "2.0 times slower), in OpenVINO 2.0 times faster (batch 64: 2.0 times faster)."
    ) in say(v).findings
    assert "Against its fp32 file" not in said(compare(everything(), TASK))
    even = {label: latency(0.01, 300) for label in by_label}
    text = said(compare(measured(everything(), **even), TASK, runtime="ONNX Runtime"))
    assert "is in ONNX Runtime not faster (batch 64: not faster)." in text


def test_validation_chooses_which_is_compared_with_the_teacher():
    teacher = {"teacher": {"file_mb": 0.43}}
    for val, key in ((0.49, "distilled QAT int8"), (0.51, "distilled PTQ int8")):
        text = said(compare(measured(everything(val=val), **teacher), TASK))
        assert f"Against the teacher {key} is 21.5 times smaller, worse by 10.0 points (" in text


def test_a_warning_of_one_kind_is_said_once_with_its_range():
    five = {"quantized_layers": 9, "integer_operators": 5, "agreement_file": 0.98}
    seven = {"quantized_layers": 9, "integer_operators": 7, "agreement_file": 0.99}
    by_label = {"distilled PTQ int8": five, "distilled QAT int8": seven, "student int8": seven}
    (_, files), (integers, _) = (say(compare(measured(everything(), **by_label), TASK)).warnings,) * 2
    assert integers == "3 models do not run on integers alone: 5 to 7 of 9 quantised layers do."
    assert files == (
        "Files of 3 models give the fake-quantised network's answers on 98.0 % to 99.0 % of the test images only."
    )


def test_a_warning_about_one_model_names_it_and_says_the_remedy():
    figures = {"integer_operators": 3, "agreement_file": 0.98, "file_mb": 0.045}
    results = everything(figures=figures, mismatch="sums of 8-bit products may overflow: take target='any'")
    assert say(compare(measured(results, distilled={"file_mb": 0.043}), TASK)).warnings == (
        "distilled PTQ int8 does not run on integers alone: 3 of 4 quantised layers do.",
        "distilled PTQ int8's file gives the fake-quantised network's answers on 98.0 % of the test images only: sums "
        "of 8-bit products may overflow: take target='any'.",
        "distilled PTQ int8 has a file no smaller than in fp32: 0.045 MB.",
    )


def test_one_seed_says_nothing_of_training_for_it():
    of_seed_0 = [result for result in everything(ptq=0.70, qat=0.798) if result.seed == 0]
    text = said(compare(of_seed_0, TASK))
    assert "In int8, against fp32: PTQ lost 10.0 points" in text
    assert "QAT is" not in text
    assert "by QAT" not in text


def test_other_bits_are_named():
    results = [*runs(student=0.74, distilled=0.80), *quantized("distilled PTQ", 0.80, "distilled", bits=(4, 8))]
    assert "In 4-bit weights and 8-bit activations no loss was shown: PTQ" in said(compare(results, TASK))


def test_never_more_than_six_findings():
    parts = {"parts": {"recall on 'a'": 0.5, "recall on 'b'": 0.6}}
    results = [run("teacher", 0.90, 0, **parts), *(r for r in everything() if r.role != "teacher")]
    by_label = {label: latency(0.02, 900) | {"file_mb": 0.1} for label in ("teacher", "distilled", LABELS[2])}
    findings = say(compare(measured(results, **by_label), TASK, runtime="ONNX Runtime")).findings
    assert len(findings) == 6
    assert findings[-1].startswith("Recall on 'a': teacher 50.0 %, ")
    assert "Recall on 'b': teacher 60.0 %, " in findings[-1]
