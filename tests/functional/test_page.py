"""The HTML report in a real browser: light and dark, on a desk and on a phone, and for a screen reader."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from tasks.report import report
from tasks.settings import load_settings
from tests.browser import needs_browser, open_browser
from tests.unit.measured import GATE, made_up

pytestmark = needs_browser

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"lost": 0, "size": 269_000_000},
    "int8": {"scheme": "W8A8", "bits": 8, "lost": 0.002, "size": 163_000_000, "worse": 0.006, "speed": 1.1},
    "gptq-int4": {"bits": 4, "lost": 0.2, "size": 112_000_000, "worse": 0.2, "speed": None},
    "auto": {"scheme": "mixed", "bits": 4, "lost": 0.01, "size": 115_000_000, "worse": 0.1, "speed": None},
    "unsure": {"bits": 4, "lost": 0.05, "size": 114_000_000, "worse": 0.1, "speed": None},
}
DESK, PHONE, SMALL = (1280, 800), (390, 844), (320, 640)

# Text with too little contrast: the colour that is painted against the nearest opaque background
CONTRAST = """
const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const behind = node => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const found = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || node.tagName === "title" || !node.getClientRects().length) continue;
  const style = getComputedStyle(node);
  const [a, b] = [light(parse(node.ownerSVGElement ? style.fill : style.color)), light(behind(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  found.push([ratio, node.tagName + "." + node.getAttribute("class") + ": " + node.textContent.trim().slice(0, 30)]);
}
return found;
"""
HEADINGS = "return [...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => Number(h.tagName[1]))"
BROKEN = """
const named = node => (node.getAttribute("aria-label") || (node.getAttribute("aria-labelledby") || "").split(" ")
  .map(id => document.getElementById(id)?.textContent ?? "").join(" ")).trim();
const all = words => [...document.querySelectorAll(words)];
const scrolls = node => node.scrollWidth > node.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(node).overflowX);
const ids = all("[id]").map(node => node.id);
return {
  "headers without a scope": all("th:not([scope])").length,
  "tables without a caption": all("table").filter(node => !node.caption?.textContent.trim()).length,
  "rows without a header": all("tbody tr").filter(row => row.cells[0].tagName !== "TH").length,
  "regions without a name": all("section, nav, [role=region], [role=img]").filter(node => !named(node)).length,
  "graphics that are neither named nor hidden":
    all("svg").filter(node => !(named(node) || node.closest("[role=img], [aria-hidden=true]"))).length,
  "references to nothing": all("[aria-labelledby], [aria-describedby]").filter(node =>
    `${node.getAttribute("aria-labelledby") || ""} ${node.getAttribute("aria-describedby") || ""}`
      .trim().split(/\\s+/).some(id => !document.getElementById(id))).length,
  "links to nothing": all("a").filter(node => !document.querySelector(node.getAttribute("href"))).length,
  "ids that occur twice": ids.length - new Set(ids).size,
  "boxes that scroll without a keyboard": all("body *").filter(node => scrolls(node) && node.tabIndex !== 0).length,
  "pictures without a text": all("img:not([alt])").length,
};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of fake measurements, with all verdicts and a heat map."""
    root = tmp_path_factory.mktemp("page")
    made_up(root, VARIANTS)
    settings = load_settings(Path("params.yaml")).model_copy(update={"gate": GATE})
    settings = settings.model_copy(update={"variants": dict.fromkeys(VARIANTS, settings.variants["base"])})
    report(settings, root / "metrics", root / "results", root / "source.json", root / "report")
    return root / "report/index.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chrome = open_browser(tmp_path_factory.mktemp("browser"))
    yield chrome
    chrome.quit()


def show(browser: webdriver.Chrome, page: Path, size: tuple[int, int], scheme: str = "light") -> None:
    """Open the page on a screen of this size, with everything unfolded."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")


def test_the_first_screen_has_what_a_decision_needs(browser: webdriver.Chrome, page: Path) -> None:
    for size in (DESK, PHONE):
        show(browser, page, size)
        (title,) = browser.find_elements(By.TAG_NAME, "h1")
        assert title.text == "auto passes its gate"
        decision = browser.find_element(By.CSS_SELECTOR, "section.decision")
        assert decision.rect["y"] + decision.rect["height"] <= size[1]
        for part in ("115 MB", "2.34x smaller", "95% interval", "gate 95%", "transformers 5.17.0 on cpu", "Next: "):
            assert part in decision.text


@pytest.mark.parametrize("size", [DESK, PHONE, SMALL])
def test_only_tables_and_the_heat_map_scroll_sideways(
    browser: webdriver.Chrome, page: Path, size: tuple[int, int]
) -> None:
    show(browser, page, size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    wide = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(node => node.getBoundingClientRect().right > innerWidth"
        " + 1 && !node.closest('.wide')).map(node => node.tagName + ' ' + node.textContent.slice(0, 30))"
    )
    assert wide == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser: webdriver.Chrome, page: Path, scheme: str) -> None:
    show(browser, page, DESK, scheme)
    found = browser.execute_script(CONTRAST)
    assert len(found) > 300
    assert [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5] == []
    assert any(text.endswith("gptq-int4") for _, text in found if text.startswith("text."))  # of the plot


def test_a_screen_reader_finds_its_way(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, PHONE)
    levels = browser.execute_script(HEADINGS)
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert {name: count for name, count in browser.execute_script(BROKEN).items() if count} == {}
    for landmark in ("header", "nav", "main"):
        assert len(browser.find_elements(By.CSS_SELECTOR, f"body > {landmark}, main > {landmark}")) == 1
    plot = browser.find_element(By.CSS_SELECTOR, "[role=img]")
    assert plot.accessible_name == "Quality over size"
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"


def test_a_phone_and_a_desk_each_see_one_plot(browser: webdriver.Chrome, page: Path) -> None:
    for size, seen in ((DESK, [True, False]), (PHONE, [False, True])):
        show(browser, page, size)
        plots = [browser.find_element(By.CLASS_NAME, name) for name in ("at-wide", "at-narrow")]
        assert [plot.is_displayed() for plot in plots] == seen
        smallest = browser.execute_script(
            "const size = text => parseFloat(getComputedStyle(text).fontSize) * Math.sqrt(Math.abs("
            "(m => m.a * m.d - m.b * m.c)(text.getScreenCTM())));"
            "const shown = [...document.querySelectorAll('.plot text')].filter(text => text.getClientRects().length);"
            "return Math.min(...shown.map(size))"
        )
        assert smallest >= 10  # pixels


def test_plots_follow_light_and_dark(browser: webdriver.Chrome, page: Path) -> None:
    colours = []
    for scheme in ("light", "dark"):
        show(browser, page, DESK, scheme)
        colours.append(
            browser.execute_script(
                "return ['.plot text', '.heat text', '.cost', 'h1']"
                ".map(words => document.querySelector(words)).map(node => getComputedStyle(node))"
                ".map(style => style.fill + style.color)"
            )
        )
    assert not set(colours[0]) & set(colours[1])


def test_texts_stand_side_by_side_with_where_they_part(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, DESK)
    first = browser.find_element(By.CSS_SELECTOR, "article.prompt")
    assert first.find_element(By.TAG_NAME, "h3").text == "Prompt <0>,\nthen"
    texts = first.find_elements(By.CSS_SELECTOR, ".beside > div")
    assert [text.text.partition(" ")[0] for text in texts] == list(VARIANTS)
    assert "parts at once, a near-tie (0.01 nats)" in texts[1].text
    assert texts[1].find_element(By.TAG_NAME, "mark").text.startswith("other500")
    assert texts[0].rect["y"] == texts[1].rect["y"]
    assert len(browser.find_elements(By.CSS_SELECTOR, "article.prompt")) == 5
    show(browser, page, PHONE)
    texts = browser.find_elements(By.CSS_SELECTOR, "article.prompt .beside > div")
    assert texts[0].rect["x"] == texts[1].rect["x"]


def test_nothing_is_requested_but_the_page(browser: webdriver.Chrome, page: Path) -> None:
    browser.get_log("performance")
    show(browser, page, DESK)
    asked = [line["message"] for line in browser.get_log("performance") if "requestWillBeSent" in line["message"]]
    assert len(asked) == 1
    assert page.as_uri() in asked[0]
