"""The description in MLflow: Markdown that shows exactly what is said, whatever labels hold."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from kd_lightning.pipeline.compare import compare
from kd_lightning.report.markdown import MOST, as_markdown, sweep_as_markdown
from kd_lightning.report.table import overview
from kd_lightning.report.words import say
from kd_lightning.tracking.sweeps import SweptPipeline
from tests.pipeline.finished_runs import TASK, everything, latency, measured, run, runs, sweep, verdict


class Shown(HTMLParser):
    """What a browser shows: cells by row, and the text of everything else."""

    def __init__(self, markdown):
        super().__init__()
        self.rows, self.text, self.bold, self._stack = [], [], [], []
        self.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))

    def handle_starttag(self, tag, attributes):
        self._stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._stack.pop()

    def handle_data(self, data):
        if {"td", "th"} & set(self._stack):
            self.rows[-1][-1] += data
        else:
            self.text.append(data)
            if "strong" in self._stack:
                self.bold.append(data)


def test_it_shows_the_sentence_the_table_the_findings_and_the_warnings():
    by_label = {"teacher": {"file_mb": 0.43} | latency(0.4, 900), "distilled PTQ int8": {"integer_operators": 3}}
    v = compare(measured(everything(), **by_label), TASK, runtime="ONNX Runtime", processor="AVX2")
    sentence, findings, warnings = say(v)
    shown = Shown(as_markdown(v))
    table = overview(v)
    assert shown.rows == [list(table.columns), *map(list, table.rows)]
    assert shown.bold == [sentence, "Beware:"]
    text = "".join(shown.text)
    assert all(said in text for said in (*findings, *warnings, table.note))
    assert len(warnings) == 1
    assert len(findings) == 4
    assert len(as_markdown(v)) < MOST


@pytest.mark.parametrize(
    "label", ["a|b", "*T*=4", "_x_ __y__", "`code`", "[a](b)", "<b>&lt;", "~~no~~", "a\\|b", "# 1"]
)
def test_a_label_is_shown_as_it_is(label):
    variants = [run("distilled", 0.8, s, label=x, val=val) for s in range(3) for x, val in ((label, 0.6), ("b", 0.5))]
    v = compare([*runs(student=0.74), *variants], TASK)
    shown = Shown(as_markdown(v))
    assert f"distilled {label}" in [row[0] for row in shown.rows]
    assert shown.bold == [say(v).sentence]
    assert repr(label) in shown.bold[0]


def test_several_distilled_models_are_two_tables():
    shown = Shown(as_markdown(compare(sweep(), TASK, reference="T=4")))
    assert [row[0] for row in shown.rows].count("distilled T=1") == 2
    assert "improvement on T=4 (95 % interval)" in [cell for row in shown.rows for cell in row]


def test_no_more_than_a_tag_may_hold():
    variants = [run("distilled", 0.8, s, label=f"method with a long name {i}") for s in range(2) for i in range(100)]
    v = compare([*runs(student=0.74), *variants], TASK, reference=variants[0].label)
    text = as_markdown(v)
    assert len(text) <= MOST == 5000
    shown = Shown(text)
    assert shown.bold[0] == say(v).sentence
    left_out = 101 - [row[0] for row in shown.rows[1:]].index("")
    assert f"{left_out} further rows: verdict.json" in "".join(shown.text)
    assert len(as_markdown(verdict(student=0.74), most=30)) == 30


def swept(temperature: str, val: float | None, **figures: float) -> SweptPipeline:
    found = {} if val is None else {f"final/val_{TASK.headline.key}": val, f"final/{TASK.headline.key}": val - 0.01}
    values = {"losses.kd.temperature": temperature, "losses.kd.weight": "1"}
    return SweptPipeline(values=values, figures=found | {f"final/{name}": x for name, x in figures.items()})


def test_a_sweep_is_a_table_of_its_pipelines_the_best_on_the_validation_split_first():
    unsure = {"gap_closed": 0.9, "worth_it": 0.0, "decided": 0.0}
    sure = {"gap_closed": 0.25, "gap_closed_low": 0.1, "gap_closed_high": 0.4, "worth_it": 1.0, "decided": 1.0}
    pipelines = [swept("1", 0.7, **unsure), swept("4", None), swept("16", 0.8, **sure)]
    shown = Shown(sweep_as_markdown(TASK.headline, pipelines))
    assert shown.rows[0][:2] == ["T", "weight"]
    assert [(row[0], row[2], row[5], row[6]) for row in shown.rows[1:]] == [
        ("16", "80.0", "25.0", "yes"),
        ("1", "70.0", "–", "not decided"),
    ]
    (said,) = shown.bold
    assert said.startswith("Of 2 pipelines the best on the validation images: T = 16, weight = 1. 1 more")
    error = replace(TASK.headline, higher_is_better=False)
    assert [row[0] for row in Shown(sweep_as_markdown(error, pipelines)).rows[1:]] == ["1", "16"]
    assert "none with a verdict" in sweep_as_markdown(TASK.headline, [swept("4", None)])


def test_a_sweep_of_many_pipelines_fits_the_tag():
    text = sweep_as_markdown(TASK.headline, [swept(str(i), 0.5 + i / 1000) for i in range(300)])
    assert len(text) <= MOST
    assert Shown(text).rows[1][0] == "299"
    assert "further rows" in text
