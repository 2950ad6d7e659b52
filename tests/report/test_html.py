"""The page: each section where there is something to show, what came from outside as text, of a bounded size."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations

import pytest

from kd_lightning.pipeline.compare import compare
from kd_lightning.report import svg
from kd_lightning.report.facts import Facts
from kd_lightning.report.html import render, render_many
from kd_lightning.report.in_a_minute import cards
from kd_lightning.report.words import say
from tests.pipeline.finished_runs import TASK, everything, latency, measured, runs, sweep
from tests.report.records import by_task, record, several, verdict

EVIL = '<script>alert("x")</script>&amp;'
WITH_OUTPUTS = by_task()


class Page(HTMLParser):
    """What a browser makes of the page: elements, their attributes, the text of each section."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.sections, self._section, self._stack = [], {}, "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.elements.append((tag, given))
        if tag == "section":
            self._section = given.get("id", "minute")
        self._stack.append(tag)

    def handle_endtag(self, tag):
        while self._stack and self._stack.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._stack):
            self.sections[self._section] = self.sections.get(self._section, "") + data

    def of(self, tag):
        return [given for name, given in self.elements if name == tag]


def page(**parts):
    return Page(render(record(**parts)))


def test_every_section_stands_where_there_is_something_to_show() -> None:
    groups = {"by": "class", "names": ["a", "b"], "count": [3, 4], "models": {}}
    for key, gain in {"teacher": 0.9, "student": 0.5, "distilled": 0.7, "distilled PTQ int8": 0.7}.items():
        values = {"mean": [gain, gain - 0.1], "low": [gain] * 2, "high": [gain] * 2, "retention": [0.9, None]}
        groups["models"][key] = values | {"agreement": [0.8, 0.7]}
    shown = page(groups=groups, **WITH_OUTPUTS["classification"])
    assert list(shown.sections)[-8:] == [
        *("minute", "verdict", "knowledge", "temperature", "training", "groups", "quantization", "reproduce")
    ]
    linked = {given["href"] for given in shown.of("a")}
    assert {f"#{key}" for key in list(shown.sections)[-7:]} <= linked
    bare = page(of=compare(runs(teacher=0.9, student=0.7, distilled=0.8), TASK), training={"teacher": {}})
    assert list(bare.sections)[-3:] == ["minute", "verdict", "reproduce"]


def test_whichever_stages_were_left_out_there_is_a_page() -> None:
    roles = ("teacher", "student", "control", "distilled", "continued", "quantized")
    results = everything()
    files = {result.label: {"file_mb": 0.1} | latency(0.1, 9000) for result in results}
    results = measured(results, **files)
    for left_out in (set(of) for count in range(len(roles)) for of in combinations(roles, count)):
        source_of = {result.label: result.quantized.source for result in results if result.quantized is not None}
        some = [x for x in results if x.role not in left_out and source_of.get(x.label) not in left_out]
        if not some:
            continue
        for seeds in ((0,), (0, 1, 2)):
            of = compare([result for result in some if result.seed in seeds], TASK, runtime="ONNX Runtime")
            shown = page(of=of)
            assert list(shown.sections)[-1] == "reproduce", left_out
            assert {f"{100 * model.value:.1f}" for model in of.models.values()} <= {
                *re.findall(r"\d+\.\d", shown.sections["verdict"])
            }, left_out


@pytest.mark.parametrize(
    "models",
    [("teacher", "student"), ("teacher", "control"), ("teacher", "distilled"), ("teacher", "student", "control")],
)
def test_whichever_of_the_networks_answered_their_answers_are_shown(models) -> None:
    of = compare([result for result in everything() if result.role in models], TASK)
    for name, parts in by_task(models=models).items():
        assert parts, name
        shown = page(of=of, **parts)
        assert "knowledge" in shown.sections, name


def test_what_was_decided_is_said_with_its_figures() -> None:
    of = verdict()
    shown = page(of=of)
    text = " ".join(shown.sections["verdict"].split())
    for finding in say(of).findings:
        assert finding in text
    assert "Beware: distilled PTQ int8 does not run on integers alone" in text
    for key, model in of.models.items():
        assert f"{100 * model.value:.1f}" in text, key


@pytest.mark.parametrize(
    ("results", "answers"),
    [
        (everything(), ["Yes", "Softness, and the teacher's labels", "None"]),
        (everything(control=0.74), ["Yes", "The softness of the teacher's answers", "None"]),
        (everything(control=0.80), ["Yes", "The teacher's labels, not their softness", "None"]),
        (runs(teacher=0.9, student=0.80, control=0.80, distilled=0.80), ["No", "Neither was shown", "None"]),
        (runs(teacher=0.9, student=0.7, distilled=0.8), ["Yes", "Not asked", "None"]),
        (runs(seeds=(0,), teacher=0.9, student=0.7, distilled=0.8), ["Not decided", "Too early to say", "None"]),
        (sweep(), ["Yes", "Softness, and", "T = 2"]),
    ],
)
def test_a_stranger_is_told_in_a_minute(results, answers) -> None:
    found = cards(Facts(record(compare(results, TASK))))
    for card, answer in zip(found, answers, strict=False):
        assert card.answer.startswith(answer), card
    assert found[3].question == "At which price?"
    served = found[3].why.count(" for its bits")
    assert found[3].answer == ("80 s of training" if served else "70 s of training")


def test_the_price_is_what_was_measured() -> None:
    price = cards(Facts(record()))[3]
    assert price.answer == "80 s of training"
    assert (
        "10 s of training for the student (alone: 10 s) and 10 s for its bits, after 60 s for the teacher." in price.why
    )
    assert "distilled PTQ int8 is 22 times smaller, 5.0 times faster and 10.0 points worse in accuracy" in price.why
    assert (
        "62,500 requests make up for the student's training, 20 s" in price.why
    )  # 10 s for the student and 10 s for its bits, at 0.32 ms each


def test_what_is_served_is_the_faster_of_the_distilled_student_and_its_quantised_file() -> None:
    of = record()
    facts = Facts(of)
    assert facts.served == "distilled PTQ int8"
    assert "◆ what would be served" in page().sections["verdict"]
    of["verdict"]["models"]["distilled"]["latency_ms_p50"] = 0.5 * facts.figure("distilled PTQ int8", "latency_ms_p50")
    of["verdict"]["models"]["teacher int8"]["latency_ms_p50"] = 0.5 * facts.figure("teacher", "latency_ms_p50")
    assert facts.served == "distilled"
    first, *_, price, file = cards(facts)
    assert first.answer == "Yes, for a small model"
    assert first.why.endswith("The teacher stays 10.0 points better, at 90.0 %.")
    assert "Against the teacher, distilled is" in price.why
    assert file.question == "Which file to serve?"
    assert file.answer.startswith("distilled, or distilled ")
    assert "Where no accuracy may be lost: teacher int8" in file.why
    assert file.why.endswith("2.0 times faster than in float.")
    shown = Page(render(of)).sections["verdict"]
    assert "its quantised file is slower here" in shown
    assert "◆" not in shown


def test_the_words_that_stand_in_it_are_explained() -> None:
    shown = page().sections["verdict"]
    for word in ("student alone", "teacher's hard labels", "gap closed", "int8", "PTQ", "QAT", "OpenVINO"):
        assert word in shown.partition("What the words mean")[2], word
    bare = page(of=compare(runs(teacher=0.9, student=0.7, distilled=0.8), TASK), training={"teacher": {}})
    assert "PTQ" not in bare.sections["verdict"]


def test_of_a_teacher_without_classes_softness_is_not_asked() -> None:
    of = record()
    of["details"] |= {"hard_labels": False, "extra": 60}
    assert cards(Facts(of))[1].answer == "Softness, and the teacher's labels", "there is a control, of several labels"
    del of["verdict"]["differences"]["distilled-control"]
    why = cards(Facts(of))[1]
    assert why.answer == "What the teacher says"
    assert why.why.endswith("It also answers 60 images that have no label.")
    of["verdict"]["worth_it"] = False
    assert cards(Facts(of))[1].answer == "It was not shown to help"


def test_what_was_logged_of_the_training_is_named_and_of_the_machine_left_out() -> None:
    curve = {"step": [1.0, 2.0], "mean": [0.3, 0.2], "low": [0.3, 0.2], "high": [0.3, 0.2]}
    none = {name: [0.0, 0.0] for name in ("mean", "low", "high")}
    names = ("val/ece", "val/kl_teacher", "train/peak_memory_mb", "system/disk_usage_megabytes")
    logged = {**dict.fromkeys(names, curve), "train/teacher_share": {**curve, **none}}
    text = render(record(training={"student": logged, "distilled": {**logged, "train/teacher_share": curve}}))
    shown = [given["aria-label"] for given in Page(text).of("svg") if "aria-label" in given]
    assert "calibration error (ECE), validation: student alone from 30 to 20, distilled from 30 to 20" in shown
    assert "the teacher's part of the training's time: distilled from 30 to 20" in shown
    assert ">nats<" in text
    assert ">MB<" in text
    assert "disk" not in Page(text).sections["training"]


def test_storing_the_teachers_outputs_is_part_of_the_price() -> None:
    of = record()
    of["verdict"]["models"]["distilled"]["store_seconds"] = 5.0
    price = cards(Facts(of))[3]
    assert price.answer == "85 s of training"
    assert "after 60 s for the teacher and 5.0 s for storing its outputs." in price.why
    assert "78,100 requests make up for the storing and the student's training, 25 s" in price.why
    shown = Page(render(of))
    assert "storing the teacher's outputs5.0 s" in shown.sections["verdict"]
    assert "without storing" not in shown.sections["verdict"]
    assert "storing" not in page().sections["verdict"]


def test_the_break_even_is_computed_from_what_was_measured() -> None:
    (given,) = re.findall(r'id="costs">(.*?)</script>', render(record()))
    costs = json.loads(given)
    assert costs["teacher"] == 60
    found = {option.pop("title"): option for option in costs["options"]}
    measures = ("training", "storing", "single", "batch")
    assert {title: tuple(option[name] for name in measures) for title, option in found.items()} == {
        "teacher": (0.0, 0.0, pytest.approx(0.4e-3), pytest.approx(1 / 900)),
        "distilled PTQ int8": (20.0, 0.0, pytest.approx(0.08e-3), pytest.approx(1 / 9000)),
        "student alone": (10.0, 0.0, pytest.approx(0.1e-3), pytest.approx(1 / 9000)),
    }
    assert [option["quality"] for option in found.values()] == ["90.0 %", "80.0 %", "74.0 %"]


def test_learning_rates_are_drawn_by_group_of_parameters() -> None:
    def curve(*rates: float) -> dict[str, list[float]]:
        return {"step": [0.0, 1.0, 2.0], "mean": list(rates), "low": list(rates), "high": list(rates)}

    small, large = curve(1e-4, 1e-3, 1e-5), curve(0.1, 0.1, 0.1)
    logged = {key: {"lr-Adam": curve(1e-3, 2e-3, 0.0)} for key in ("teacher", "student", "control")}
    logged["distilled"] = {"lr-Adam/pg1": small, "lr-Adam/pg2": large}
    text = render(record(training=logged))
    shown = [given["aria-label"] for given in Page(text).of("svg") if "aria-label" in given]
    (first,) = [label for label in shown if label.startswith("Learning rate: ")]
    assert first.startswith("Learning rate: teacher at most 0.002, 0 at the end, student alone")
    assert first.endswith("distilled at most 0.001, 1e-05 at the end")
    assert "Learning rate, parameters pg2: distilled at most 0.1, 0.1 at the end" in shown
    assert "logarithmic" not in text.partition(first)[2].partition("</svg>")[0]
    logged["teacher"] = {"lr-SGD": large}
    text = render(record(training=logged))
    assert "logarithmic" in text.partition("Learning rate: teacher at most 0.1")[2].partition("</svg>")[0]


@pytest.mark.parametrize("task", WITH_OUTPUTS)
def test_each_task_shows_examples_of_its_own_kind(task) -> None:
    parts = WITH_OUTPUTS[task]
    of = record(**parts)
    if task == "language model":
        of["task"]["kind"] = "LanguageModelling"
    shown = Page(render(of))
    assert {one["rule"] for one in parts["examples"]} >= {"lot"}
    assert len([given for given in shown.of("article") if given["class"].startswith("example")]) == len(
        parts["examples"]
    )
    images = shown.of("img")
    for given in images:
        assert given["alt"]
        assert base64.b64decode(given["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert ("one of each token" in shown.sections["knowledge"]) == (task == "language model")
    assert bool(images) == (task in ("classification", "segmentation", "several labels", "vectors"))
    assert ("temperature" in shown.sections) == (task not in ("rows", "vectors"))
    text = shown.sections["knowledge"]
    assert {"language model": "␣", "words": "word", "rows": "Target:", "several labels": "Labels:"}.get(
        task, ""
    ) in text


def test_labels_and_names_from_outside_are_text() -> None:
    parts = by_task([EVIL, "shirt", "coat", "bag"])["classification"]
    groups = {"by": "class", "names": [EVIL, "b"], "count": [3, 4], "models": {}}
    for key in ("teacher", "student", "distilled"):
        groups["models"][key] = {"mean": [0.5, 0.6], "low": [0.5, 0.6], "high": [0.5, 0.6]}
    text = render(record(name=EVIL, groups=groups, **parts))
    shown = Page(text)
    assert len(shown.of("script")) == len(Page(render(record())).of("script"))
    assert EVIL in shown.sections["knowledge"]
    assert EVIL in shown.sections["groups"]
    assert "alert(" not in "".join(re.findall(r"<script.*?</script>", text, re.DOTALL))


def test_nothing_is_loaded_and_the_size_is_bounded() -> None:
    text = render(record(**WITH_OUTPUTS["segmentation"]))
    shown = Page(text)
    assert len(text.encode()) < 3_000_000
    assert not [
        given for tag, given in shown.elements if tag in ("link", "iframe") or given.get("src", "data:")[:5] != "data:"
    ]
    assert "default-src 'none'" in shown.of("meta")[2]["content"]


def test_figures_say_what_they_show() -> None:
    shown = page(**WITH_OUTPUTS["classification"])
    figures = [given for given in shown.of("svg") if given["class"] == "figure"]
    assert len(figures) > 10
    for given in figures:
        assert given["role"] == "img"
        assert len(given["aria-label"]) > 20
    assert all(given.get("aria-hidden") == "true" for given in shown.of("svg") if given not in figures)
    text = render(record(**WITH_OUTPUTS["classification"]))
    assert "nan" not in "".join(re.findall(r'(?:points|x|y|cx|cy)="[^"]*"', text))


def test_the_long_title_of_an_axis_is_smaller() -> None:
    series = [svg.Series("a", "teacher", [0, 1], [0, 1])]
    drawn = svg.dots(series, svg.Axis("target"), svg.Axis("gained by distillation, bits per character"), "two points")
    (size,) = re.findall(r'style="font-size:([\d.]+)px"', drawn)
    assert 8 < float(size) < 12


def test_a_schedule_is_drawn_as_it_ran() -> None:
    falling = {"step": [0.0, 50.0, 100.0], "mean": [8.0, 4.0, 1.0], "low": [8.0, 4.0, 1.0], "high": [8.0, 4.0, 1.0]}
    scheduled = [r for r in everything() if r.role != "distilled"]
    scheduled += [replace(r, temperature=(8.0, 1.0)) for r in everything() if r.role == "distilled"]
    of = compare(scheduled, TASK)
    shown = page(of=of, training={key: {"kd/temperature": falling} if key == "distilled" else {} for key in of.models})
    assert "The temperature went from 8 to 1." in [given.get("aria-label") for given in shown.of("svg")]
    assert "T from 8 to 1" in shown.sections["minute"]


def test_the_quality_of_a_sweep_is_drawn_over_temperature() -> None:
    shown = page(of=compare(sweep(), TASK))
    (drawn,) = [
        given["aria-label"] for given in shown.of("svg") if "distilled at 3 temperatures" in given.get("aria-label", "")
    ]
    assert "T = 1 83.0 %, T = 2 79.0 %, T = 4 78.0 %" in drawn


def test_why_a_layer_stays_in_float_is_said() -> None:
    layers = [{"name": "head", "bits": 32, "note": "stays in float: left out"}, {"name": "stem", "bits": 8, "note": ""}]
    said = page(layers={"distilled PTQ int8": layers}).sections["quantization"]
    assert "distilled PTQ int8: head: stays in float: left out." in said
    assert "distilled PTQ int8: of 4 quantised layers 3 run on integers." in said


def test_several_pipelines_stand_side_by_side() -> None:
    text = render_many([Facts(one, f"folder-{i}") for i, one in enumerate(several())])
    shown = Page(text)
    assert "worth it in 2 of these 2 pipelines: numbers 1 and 2" in shown.sections["minute"]
    assert "another <pipeline>" in shown.sections["minute"]
    assert "losses.kd.temperature" in text
    rows = re.findall(r'<th scope="row">\d\. .*?</th>(.*?)</tr>', text.replace("\xa0", " "))
    assert [re.findall("<td>(.*?)</td>", row)[:5] for row in rows[:2]] == [
        ["yes", "–", "90.0 %", "74.0 %", "80.0 %"],
        ["yes", "2", "90.0 %", "74.0 %", "79.0 %"],
    ]
    with pytest.raises(ValueError, match="expected two pipelines or more"):
        render_many([Facts(record())])


def test_a_record_of_another_version_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"has version 0, expected 1: run the pipeline again"):
        Facts(record(version=0))
