"""The report in a real browser: nothing is said on the console, nothing is loaded, all is drawn and can be reached."""

from importlib.resources import files
from pathlib import Path

import pytest

from kd_lightning.report.facts import Facts
from kd_lightning.report.html import render, render_many
from tests.browser import CHROMIUM, Browser
from tests.report.records import by_task, record, several

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is found: apt-get install chromium"),
]

PAGES = ("classification", "language model", "segmentation", "rows", "several pipelines")
_DRAWN = """[...document.querySelectorAll('svg.figure, img')].map(x => x.getBoundingClientRect())
    .filter(box => box.width < 20 || box.height < 20).length"""
_EVERY_RULE = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
_AXE = f"""axe.run(document, {{runOnly: {_EVERY_RULE}}}).then(found => found.violations.flatMap(
    rule => rule.nodes.map(node => rule.id + ': ' + node.html.slice(0, 200) + ' ' + node.failureSummary)))"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder, parts = tmp_path_factory.mktemp("pages"), by_task()
    groups = {"by": "class", "names": ["a", "b"], "count": [3, 4], "models": {}}
    for key in ("teacher", "student", "distilled"):
        groups["models"][key] = {"mean": [0.9, 0.8], "low": [0.9, 0.8], "high": [0.9, 0.8], "retention": [1.0, 0.9]}
    texts = {name: render(record(groups=groups, **parts[name])) for name in PAGES[:-1]}
    texts[PAGES[-1]] = render_many([Facts(one) for one in several()])
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def axe() -> str:
    pytest.importorskip("axe_core_python", reason="axe-core is not installed: pip install axe-core-python")
    return (files("axe_core_python") / "axe.min.js").read_text()


@pytest.mark.parametrize("name", PAGES)
def test_it_is_drawn_without_a_request_or_an_error(browser, pages, name: str) -> None:
    browser.said.clear()
    browser.requests.clear()
    for width in (1400, 400):
        browser.open(pages[name], width=width)
        assert browser.run("document.querySelectorAll('svg.figure').length") > 2
        assert browser.run(_DRAWN) == 0
        assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.said == []
    assert {address for address in browser.requests if not address.startswith("data:")} == {pages[name].as_uri()}


@pytest.mark.parametrize("name", ["classification", "language model", "several pipelines"])
def test_axe_finds_nothing_in_the_light_and_in_the_dark(browser, pages, axe: str, name: str) -> None:
    for dark in (False, True):
        browser.open(pages[name], dark=dark)
        browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
        browser.run(f"{axe}; 1")
        assert browser.run(_AXE) == []


def test_the_theme_follows_the_system_until_it_is_chosen_with_the_keyboard(browser, pages) -> None:
    page = pages["classification"]
    background = "getComputedStyle(document.body).backgroundColor"
    colours = []
    for dark in (False, True):
        browser.open(page, dark=dark)
        colours.append(browser.run(background))
    assert colours[0] == "rgb(255, 255, 255)" != colours[1]
    browser.run("document.getElementById('theme').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    assert browser.run(background) == colours[0], "light, in a dark system"
    assert "light" in browser.run("document.getElementById('theme').getAttribute('aria-label')")
    browser.run("localStorage.clear()")


def test_the_price_follows_what_is_assumed(browser, pages) -> None:
    browser.open(pages["classification"])
    said = "document.getElementById('paid').textContent"
    assert "62,500 requests" in browser.run(said)
    change = "{name}.value = {value}; {name}.dispatchEvent(new Event('input', {{bubbles: true}}))"
    browser.run(change.format(name="document.querySelector('[name=requests]')", value=62500))
    assert "paid back after 24 hours at 62,500 requests a day" in browser.run(said)
    browser.run(change.format(name="document.querySelector('[name=tries]')", value=10))
    assert "paid back after 10 days" in browser.run(said)
    browser.run("document.querySelector('[name=batch]').click()")
    assert "625,000 requests" not in browser.run(said)
