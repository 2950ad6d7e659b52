"""What quantising cost, whether training for it helped, and what both bring together, follows from the figures."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning.pipeline.latency import Latency, measure
from kd_lightning.pipeline.results import Quantized, Result
from kd_lightning.pipeline.verdict import make_verdict
from kd_lightning.processor import describe
from tests.pipeline.test_verdict import printed, run, runs

LABELS = ("teacher int8", "student int8", "distilled PTQ int8", "distilled QAT int8", "distilled 4-bit weights")


def how(source, *, training=False, bits=(8, 8), **changes):
    values = {"layers": 4, "float_layers": (), "integer_operators": 4, "agreement_fp32": 0.97}
    values |= {"agreement_file": 0.999, "file_mb": 0.02}
    return Quantized(source=source, training=training, weight_bits=bits[0], activation_bits=bits[1], **values | changes)


def quantized(label, accuracy, source, seeds=(0, 1, 2), val=0.5, flips=60, **changes):
    return [
        run("quantized", accuracy, s, label=label, val=val, flips=flips, quantized=how(source, **changes))
        for s in seeds
    ]


def everything(*, ptq=0.80, qat=0.80, continued=0.80, source="distilled", **changes):
    return [
        *quantized("distilled PTQ int8", ptq, source, **changes),  # in another order than they shall have
        *runs(teacher=0.90, student=0.74, control=0.755, distilled=0.80, continued=continued),
        *quantized("teacher int8", 0.90, "teacher", seeds=(0,), file_mb=0.12),
        *quantized("distilled QAT int8", qat, source, training=True),
        *quantized("distilled 4-bit weights", 0.60, source, bits=(4, None)),
        *quantized("student int8", 0.74, "student"),
    ]


def test_each_quantised_model_stands_behind_what_it_was_made_of():
    v = make_verdict(everything(), {})
    teacher, student, *of_distilled = LABELS
    order = ["teacher", teacher, "student", student, "control", "distilled", "continued"]
    assert list(v.models) == [*order, *of_distilled]
    assert v.models[teacher].gap_closed is None
    assert v.models[of_distilled[0]].gap_closed.mean == pytest.approx(0.375)
    assert v.distilled == "distilled"  # and not the one with the further steps
    assert v.worth_it


def test_nothing_lost_and_no_training_needed_is_said():
    text = make_verdict(everything(), {}).sentence
    assert (
        "In int8, that post-training quantisation lost anything against the distilled student in fp32 was not" in text
    )
    assert "that quantisation-aware training lost anything against the same further steps in fp32 was not shown" in text
    assert "better than post-training quantisation was not shown (a difference of 0.0 points" in text
    assert "post-training quantisation is enough here" in text


def test_what_post_training_loses_and_training_wins_back():
    v = make_verdict(everything(ptq=0.70, qat=0.798), {})
    assert v.differences["ptq-distilled"].mean == pytest.approx(-0.10)
    assert "In int8, post-training quantisation lost 10.0 points (95 % interval " in v.sentence
    assert "Quantisation-aware training is 9.8 points (95 % interval " in v.sentence
    assert "better than post-training quantisation, 9.8 points (95 % interval " in v.sentence
    assert "beyond what the same further steps bring in fp32" in v.sentence


def test_what_the_steps_bring_in_float_as_well_is_not_the_quantisers_merit():
    v = make_verdict(everything(qat=0.83, continued=0.828), {})
    assert "Quantisation-aware training is 3.0 points" in v.sentence
    assert "that it is more than the same further steps bring in fp32 was not shown (by 0.2 points, 95 %" in v.sentence
    assert v.differences["qat-ptq beyond the steps"].mean == pytest.approx(0.002)


def test_training_that_does_harm_is_to_be_left_out():
    text = make_verdict(everything(qat=0.77), {}).sentence
    assert re.search(
        r"Quantisation-aware training is 3\.0 points \(.*\) worse than post-training .*: leave it out", text
    )


def test_the_sum_is_compared_with_the_teacher_in_the_same_runtime():
    latency = {label: Latency(0.05, 0.06, 9000, "ONNX Runtime") for label in (*LABELS, "student", "distilled")}
    latency["teacher"] = Latency(0.4, 0.5, 1000, "ONNX Runtime")
    v = make_verdict(everything(), latency, files_mb={"teacher": 0.43, "student": 0.04})
    assert (
        "Distilled and quantised (distilled PTQ int8), it is 21.5 times smaller and 8.0 times faster at batch 1 in "
        "ONNX Runtime than the teacher in fp32, with 80.0 % of the test images right against 90.0 %."
    ) in v.sentence
    latency["teacher"] = Latency(0.4, 0.5, 1000)  # in PyTorch: not comparable
    assert "times faster" not in make_verdict(everything(), latency, files_mb={"teacher": 0.43}).sentence
    assert "than the teacher in fp32, with" not in make_verdict(everything(), latency).sentence


def test_integers_that_take_longer_than_floats_are_said_to():
    latency = {"distilled": Latency(0.010, 0.02, 300, "ONNX Runtime")}
    latency["distilled PTQ int8"] = Latency(0.015, 0.02, 150, "ONNX Runtime")
    openvino = {key: replace(value, runtime="OpenVINO") for key, value in latency.items()}
    openvino["distilled PTQ int8"] = Latency(0.005, 0.02, 600, "OpenVINO")
    v = make_verdict(everything(), latency, latency_openvino=openvino, files_mb={"distilled": 0.03})
    assert (
        "Against its own file in fp32 it (distilled PTQ int8) is 1.5 times smaller, 1.5 times slower at batch 1 and "
        "2.0 times slower at batch 64 in ONNX Runtime, 2.0 times faster at batch 1 and 2.0 times faster at batch 64 in "
        "OpenVINO."
    ) in v.sentence
    assert "Against its own file" not in make_verdict(everything(), {}).sentence


def test_the_processor_that_measured_is_said_with_the_speed():
    assert measure({"a": nn.Identity()}, torch.zeros(1, 2), seconds=0.01)["a"].processor == describe()
    latency = {"distilled": Latency(0.010, 0.02, 300, "ONNX Runtime", "AVX2, AVX-512 VNNI")}
    latency["distilled PTQ int8"] = replace(latency["distilled"], p50_ms=0.005)
    v = make_verdict(everything(), latency)
    assert (
        "2.0 times faster at batch 1 and not faster at batch 64 in ONNX Runtime (on AVX2, AVX-512 VNNI)." in v.sentence
    )
    assert v.to_dict()["processor"] == "AVX2, AVX-512 VNNI"
    assert "speed on a processor with AVX2, AVX-512 VNNI" in printed(v)
    nothing_measured = make_verdict(everything(), {})
    assert nothing_measured.to_dict()["processor"] is None
    assert "processor" not in printed(nothing_measured)


def test_validation_chooses_which_is_compared_with_the_teacher():
    files = {"teacher": 0.43}
    assert "(distilled QAT int8), it is" in make_verdict(everything(val=0.49), {}, files_mb=files).sentence
    assert "(distilled PTQ int8), it is" in make_verdict(everything(val=0.51), {}, files_mb=files).sentence


def test_warnings_are_stated_with_the_model():
    v = make_verdict(everything(warnings=("it predicts a single class",)), {})
    assert "Beware of 'distilled PTQ int8': it predicts a single class." in v.sentence
    assert v.sentence.count("Beware") == 1


def test_a_source_at_chance_is_said_once():
    target = np.arange(2000) % 10
    zeros = np.zeros_like(target)
    student = [run("student", 0.1, s, predictions=zeros) for s in range(3)]
    warnings = (
        "it is at chance, with 9.9% of the validation images right",
        "it predicts a single class",
        "no integers",
    )
    text = make_verdict([*student, *quantized("student int8", 0.1, "student", warnings=warnings)], {}).sentence
    assert "Beware of 'student int8': no integers." in text
    assert text.count("Beware of 'student int8'") == 1


def test_one_seed_says_nothing_of_training_for_it():
    of_seed_0 = [result for result in everything(ptq=0.70, qat=0.798) if result.seed == 0]
    v = make_verdict(of_seed_0, {})
    assert "In int8, post-training quantisation lost 10.0 points" in v.sentence
    assert "uantisation-aware training" not in v.sentence
    assert "Quantisation-aware training is 9.8" in make_verdict(everything(ptq=0.70, qat=0.798), {}).sentence


def test_other_bits_are_named():
    results = [*runs(student=0.74, distilled=0.80), *quantized("distilled PTQ", 0.80, "distilled", bits=(4, 8))]
    assert "In 4-bit weights and 8-bit activations, that post-training" in make_verdict(results, {}).sentence


def test_what_was_quantised_of_the_chosen_variant():
    variants = [run("distilled", 0.80, s, label=f"T={t}", val=t / 10) for s in range(3) for t in (1, 4)]
    results = [*runs(student=0.74), *variants, *quantized("distilled PTQ int8", 0.70, "T=4")]
    v = make_verdict(results, {})
    assert list(v.models) == ["student", "T=1", "T=4", "distilled PTQ int8"]
    assert v.differences["ptq-distilled"].mean == pytest.approx(-0.10)


def test_json_and_table_have_agreement_file_size_and_runtimes():
    latency = {"student": Latency(0.05, 0.06, 9000, "ONNX Runtime")}
    v = make_verdict(
        everything(agreement_fp32=0.985),
        latency,
        latency_openvino={"student": Latency(0.03, 0.04, 8000, "OpenVINO")},
        files_mb={"student": 0.04},
    )
    models = json.loads(json.dumps(v.to_dict(), allow_nan=False))["models"]
    assert models["student"]["file_mb"] == 0.04
    assert models["student"]["runtime"] == "ONNX Runtime"
    assert models["student"]["openvino"]["latency_ms_p50"] == 0.03
    assert "agreement_fp32" not in models["student"]
    row = models["distilled PTQ int8"]
    assert (row["agreement_fp32"], row["file_mb"], row["role"]) == (pytest.approx(0.985), 0.02, "quantized")
    assert row["quantized"]["integer_operators"] == 4
    text = printed(v)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert re.search(r"distilled PTQ int8 .* 98\.5", text)
    assert re.search(r"student alone +6,000 +0\.030 +0\.040 +0\.050 +0\.060 +9,000", text)
    assert re.search(r"distilled PTQ int8 +6,000 +– +0\.020", text)  # the weights it was trained with are not served
    assert re.search(r"distilled, further steps +80\.0", text)
    assert re.search(r"student alone +0\.030 +0\.040 +8,000", text)
    assert "OpenVINO p50" in text
    assert "fp32" not in printed(make_verdict(runs(student=0.7), {}))


def test_a_result_reads_back():
    (one,) = quantized("student int8", 0.7, "student", seeds=(0,), float_layers=("head",), warnings=("a", "b"))
    values = json.loads(json.dumps(one.to_dict()))
    again = Result.from_dict(values, predictions=one.predictions, target=one.target)
    assert again.quantized == one.quantized
    assert again.to_dict() == one.to_dict()
    plain = run("student", 0.7, 0)
    assert Result.from_dict(plain.to_dict(), predictions=plain.predictions, target=plain.target).quantized is None


def test_a_quantised_result_without_the_how_and_the_other_way_are_refused():
    with pytest.raises(ValueError, match="'student int8' seed 0 has role 'quantized' and quantized=None"):
        make_verdict([run("quantized", 0.7, 0, label="student int8")], {})
    with pytest.raises(ValueError, match="'student' seed 0 has role 'student' and quantized=Quantized"):
        make_verdict([run("student", 0.7, 0, quantized=how("student"))], {})
