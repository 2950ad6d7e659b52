"""The tables fit 80 columns, hold what decides, and say nothing twice."""

import re

import numpy as np
import pytest

from kd_lightning.pipeline.compare import compare
from kd_lightning.report.words import say
from tests.pipeline.finished_runs import (
    TASK,
    Judged,
    everything,
    latency,
    measured,
    printed,
    quantized,
    run,
    runs,
    scored,
    sweep,
    verdict,
)


def test_the_table_holds_what_decides_and_fits_80_columns_without_colours():
    of_it = {"T=2": latency(0.512, 12345.6) | {"file_mb": 0.0271}, "teacher": latency(1.5, 999)}
    v = compare(measured(sweep(), **of_it), TASK, runtime="ONNX Runtime", processor="AVX2, AVX-512, AVX-512 VNNI")
    text = printed(v)
    assert "\x1b" not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    sd = f"{100 * v.models['T=2'].sd:.1f}"
    share = f"{100 * v.gap_closed.mean:.1f}"
    agreement = f"{100 * v.models['T=2'].agreement:.1f}"
    assert re.search(rf"^distilled T=2 +79\.0 ± {sd} +{agreement} +{share} +2 +0\.027 +0\.512 *$", text, re.MULTILINE)
    assert re.search(r"^teacher +90\.0 ± – +100\.0 +– +– +– +1\.500 *$", text, re.MULTILINE)
    assert re.search(r"^student alone +74\.0 ± .* – +– +– *$", text, re.MULTILINE)
    assert re.search(r"^teacher's hard labels +75\.5 ± ", text, re.MULTILINE)
    assert "± over 3 seeds; p50 in ONNX Runtime on AVX2, AVX-512, AVX-512 VNNI" in text
    assert text.count("distilled T=2") == 1  # one table
    assert " ".join(say(v).sentence.split()) in " ".join(text.split())


def test_quantised_models_stand_last_and_all_findings_are_printed():
    text = printed(compare(measured(everything(), teacher={"file_mb": 0.43}), TASK))
    lines = [line for line in text.splitlines() if " ± " in line]
    names = [line.split("  ")[0] for line in lines]
    assert names[:5] == ["teacher", "student alone", "teacher's hard labels", "distilled", "distilled, further steps"]
    assert names[5:] == [
        "teacher int8",
        "student int8",
        "distilled PTQ int8",
        "distilled QAT int8",
        "distilled 4-bit weights",
    ]
    found = say(compare(measured(everything(), teacher={"file_mb": 0.43}), TASK)).findings
    assert len(found) == 4
    flat = " ".join(text.split())
    assert all(f"- {finding}" in flat for finding in found)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 100, 200])
def test_long_labels_and_headlines_are_wrapped_and_not_cut(width):
    label = "distilled PTQ 4-bit weights, 8-bit activations"
    name = {"name": "recall@10 of the teacher's neighbours", "key": "recall_at_10", "units": "sentences"}
    rng = np.random.default_rng(0)
    results = [
        scored(
            role, rng.random(50), s, figures={"val": 1.0, "file_mb": 1234.5} | latency(123.4, 1), temperature=(8.0, 1.0)
        )
        for role in ("teacher", "student", "distilled")
        for s in range(2)
    ]
    (made, *_) = quantized(label, 0.8, "distilled", seeds=(0,))
    results.append(
        scored("quantized", rng.random(50), label=label, quantized=made.quantized, figures={"val": 1.0} | made.figures)
    )
    text = printed(compare(results, Judged(**name), runtime="ONNX Runtime"), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert "8 to 1" in text
    assert "1234.500" in text
    assert "123.400" in text


def test_an_error_stands_with_its_unit():
    name = {"name": "mean absolute error", "key": "mae", "units": "patients", "symbol": "mm", "digits": 2}
    task = Judged(**name, higher_is_better=False, percent=False)
    results = [scored("student", np.full(50, value), s) for s, value in enumerate((1.0, 2.0))]
    text = printed(compare(results, task))
    assert re.search(r"^student alone +1\.50 ± 0\.71 ", text, re.MULTILINE)
    assert "absolute" in text.splitlines()[0] + text.splitlines()[1]
    assert "mm" in text.split("student alone")[0]


def test_a_column_for_temperature_and_for_what_was_measured_only():
    text = printed(verdict(teacher=0.90, student=0.74, distilled=0.80))
    assert not re.search(r"\bT\b", text)
    assert "p50" not in text
    assert "weights" in text
    assert "file MB" not in text
    assert "file MB" in printed(compare(everything(), TASK))


def test_one_seed_has_no_spread():
    text = printed(verdict(teacher=0.90, student=0.74, distilled=0.80, seeds=(7,)))
    assert re.search(r"^distilled +80\.0 ± – ", text, re.MULTILINE)
    assert "over" not in text.split("Not decided")[0]


def test_no_share_of_a_gap_that_was_not_shown():
    level = printed(verdict(teacher=0.74, student=0.74, control=0.74, distilled=0.80))
    assert re.search(r"^distilled +80\.0 ± 0\.0 +\d\d\.\d +– +0\.030 *$", level, re.MULTILINE)


def test_the_others_stand_against_the_reference():
    v = compare(sweep(), TASK, reference="T=4")
    text, flat = printed(v), " ".join(printed(v).split())
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^distilled T=1 +\+5\.0 points \(\d\.\d to \d\.\d\) +< 0\.001 *$", text, re.MULTILINE)
    assert "improvement on T=4 (95 %" in flat
    assert "p (Holm," in flat
    assert "comparisons)" in flat
    one = printed(compare([result for result in sweep() if result.seed == 0], TASK, reference="T=4"))
    assert "Holm" not in one
    assert "one seed: 95 %" in " ".join(one.split())
    assert "improvement on" not in printed(compare(sweep(), TASK))


def test_a_label_is_printed_as_it_is():
    results = [*runs(student=0.74), *(run("distilled", 0.8, s, label=f"[bold]{x}") for s in range(3) for x in "ab")]
    assert "distilled [bold]a" in printed(compare(results, TASK))


def test_warnings_are_printed_once_a_kind():
    text = printed(compare(everything(figures={"integer_operators": 3}), TASK))
    assert text.count("Beware: ") == 1
    assert "Beware: distilled PTQ int8 does not run on integers alone" in text
