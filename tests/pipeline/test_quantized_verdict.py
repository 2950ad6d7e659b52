"""What quantising cost, and what speaks against the figures of quantised models, follows from the figures."""

import json

import numpy as np
import pytest

from kd_lightning.pipeline.compare import compare
from kd_lightning.records import Result
from tests.pipeline.finished_runs import (
    LABELS,
    TASK,
    everything,
    how,
    latency,
    measured,
    quantized,
    run,
    runs,
)


def test_quantised_models_stand_behind_the_others_in_the_order_of_what_they_were_made_of():
    v = compare(everything(), TASK)
    assert list(v.models) == ["teacher", "student", "control", "distilled", "continued", *LABELS]
    assert v.models["teacher int8"].gap_closed is None
    assert v.models["distilled PTQ int8"].gap_closed.mean == pytest.approx(0.375)
    assert v.distilled == "distilled"  # and not the one with the further steps
    assert v.worth_it
    assert (v.ptq, v.qat) == ("distilled PTQ int8", "distilled QAT int8")


def test_what_post_training_loses_and_training_wins_back():
    v = compare(everything(ptq=0.70, qat=0.798), TASK)
    expected = {"ptq-distilled": -0.10, "qat-continued": -0.002, "qat-ptq": 0.098, "continued-distilled": 0.0}
    expected |= {"qat-ptq beyond the steps": 0.098, "served-teacher": -0.20}
    for name, mean in expected.items():
        assert v.differences[name].mean == pytest.approx(mean), name
    assert v.differences["ptq-distilled"].high < 0 < v.differences["qat-ptq beyond the steps"].low


def test_what_the_steps_bring_in_float_as_well_is_not_the_quantisers_merit():
    v = compare(everything(qat=0.83, continued=0.828), TASK)
    assert v.differences["qat-ptq"].low > 0
    assert v.differences["qat-ptq beyond the steps"].mean == pytest.approx(0.002)
    assert v.differences["qat-ptq beyond the steps"].low < 0


def test_validation_chooses_which_is_served_and_the_simpler_one_wins_a_tie():
    assert compare(everything(val=0.49), TASK).served == "distilled QAT int8"
    assert compare(everything(val=0.51), TASK).served == "distilled PTQ int8"
    assert compare(everything(val=0.50), TASK).served == "distilled PTQ int8"
    assert compare(runs(teacher=0.9, student=0.74), TASK).served is None


def test_what_was_quantised_of_the_chosen_variant():
    variants = [run("distilled", 0.80, s, label=f"T={t}", val=t / 10) for s in range(3) for t in (1, 4)]
    results = [*runs(student=0.74), *variants, *quantized("distilled PTQ int8", 0.70, "T=4")]
    v = compare(results, TASK)
    assert list(v.models) == ["student", "T=1", "T=4", "distilled PTQ int8"]
    assert v.differences["ptq-distilled"].mean == pytest.approx(-0.10)
    assert v.models["distilled PTQ int8"].quantized.source == "T=4"


def test_a_source_at_chance_is_cautioned_of_once():
    zeros = np.zeros(2000, int)
    student = [run("student", 0.1, s, predictions=zeros) for s in range(3)]
    of_it = {"label": "student int8", "quantized": how("student")}
    made = [run("quantized", 0.1, s, predictions=zeros, **of_it) for s in range(3)]
    v = compare([*student, *made], TASK)
    assert v.models["student int8"].learned_nothing == "predicts a single class"
    assert v.cautions == {"learned_nothing": ("student",)}


def test_what_speaks_against_the_figures_of_quantised_models():
    float_files = {"distilled": {"file_mb": 0.03}, "student": {"file_mb": 0.03}, "teacher": {"file_mb": 0.43}}
    worse = {"integer_operators": 3, "agreement_file": 0.98, "file_mb": 0.03}
    v = compare(measured(everything(figures=worse), **float_files), TASK)
    label = ("distilled PTQ int8",)
    assert v.cautions == {"not_all_integers": label, "file_differs": label, "file_larger": label}
    assert compare(measured(everything(), **float_files), TASK).cautions == {}


def test_weights_alone_are_not_expected_to_run_on_integers():
    floats = {"integer_operators": 0}
    both = [
        *quantized("distilled PTQ 4-bit weights", 0.8, "distilled", bits=(4, None), figures=floats),
        *quantized("distilled PTQ w4a8", 0.8, "distilled", bits=(4, 8), figures=floats),
    ]
    v = compare([*runs(student=0.74, distilled=0.8), *both], TASK)
    assert v.cautions == {"not_all_integers": ("distilled PTQ w4a8",)}
    assert v.ptq == "distilled PTQ w4a8"  # which quantises activations too, as files in int8 do


def test_json_has_agreement_file_size_and_runtimes():
    further = {"student": {"file_mb": 0.04} | latency(0.05, 9000) | latency(0.03, 8000, "openvino_")}
    results = measured(everything(figures={"agreement_fp32": 0.985}), **further)
    v = compare(results, TASK, runtime="ONNX Runtime", processor="AVX2, AVX-512 VNNI")
    read = json.loads(json.dumps(v.to_dict(), allow_nan=False))
    assert (read["runtime"], read["processor"]) == ("ONNX Runtime", "AVX2, AVX-512 VNNI")
    student, row = read["models"]["student"], read["models"]["distilled PTQ int8"]
    keys = ("file_mb", "latency_ms_p50", "openvino_latency_ms_p50")
    assert [student[key] for key in keys] == pytest.approx([0.04, 0.05, 0.03])
    assert student["agreement_fp32"] is None
    assert "quantized" not in student
    assert (row["agreement_fp32"], row["file_mb"], row["role"]) == (pytest.approx(0.985), 0.02, "quantized")
    assert (row["quantized_layers"], row["integer_operators"]) == (4, 4)
    assert row["quantized"] == {
        "source": "distilled",
        "training": False,
        "weight_bits": 8,
        "activation_bits": 8,
        "float_layers": [],
        "mismatch": "",
    }
    assert compare(everything(), TASK).to_dict()["processor"] is None


def test_a_quantised_result_reads_back():
    (one,) = quantized("student int8", 0.7, "student", seeds=(0,), float_layers=("head",), mismatch="take target='any'")
    again = Result.from_dict(json.loads(json.dumps(one.to_dict())), answers=one.answers, scores=one.scores)
    assert again.quantized == one.quantized
    assert again.to_dict() == one.to_dict()


def test_a_quantised_result_without_the_how_and_the_other_way_are_refused():
    with pytest.raises(ValueError, match="'student int8' seed 0 has role 'quantized' and quantized=None"):
        compare([run("quantized", 0.7, 0, label="student int8")], TASK)
    with pytest.raises(ValueError, match="'student' seed 0 has role 'student' and quantized=Quantized"):
        compare([run("student", 0.7, 0, quantized=how("student"))], TASK)
