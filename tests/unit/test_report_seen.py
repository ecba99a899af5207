"""The report as a reader sees it: in a browser, on a desk and on a phone, by day and by night."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from PIL import Image

from spt_ds.evaluate.command import main as evaluate
from spt_ds.report import plots
from spt_ds.report.command import main
from tests.helpers.browser import CHROMIUM, Page, browser
from tests.helpers.report_runs import MALICE, make_run, prediction, write_lines

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on this machine")

Show = Callable[..., Page]
HEBREW, EMOJI = "אני אוהב כלבים, dogs וגם חתולים 😀", "family 👩‍👩‍👧‍👦 and thumbs 👍🏽"
PAPER = {False: (0xFF, 0xFF, 0xFF), True: (0x14, 0x17, 0x1C)}
SCREENS = [(1280, False), (1280, True), (400, False), (400, True)]
LEAST_CONTRAST = 4.5  # WCAG, level AA, for text of normal size

AUDIT: dict[str, Any] = {
    "checkpoint": "step-00000030",
    "verdict": {"sentence": "It earns its keep."},
    "examples": 12,
    "dialogues": 6,
    "rows": [
        {
            "name": "retriever",
            "nll": 3.1,
            "low": 3.0,
            "high": 3.2,
            "minus_single": {"difference": -0.02, "low": -0.05, "high": 0.01, "p": 0.2},
            "share_of_gap": [0.2, 0.1, 0.3],
            "r2": 0.1,
        }
    ],
    "usage": [6, 6, 0],
}

# What is wider than the screen, or than the box that shows it.
TOO_WIDE = """
[...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.skip') || e.ownerSVGElement || !e.getClientRects().length) return false;
  const box = e.getBoundingClientRect();
  return box.right > document.documentElement.clientWidth + 1 || box.left < -1
      || (e.clientWidth && e.scrollWidth > e.clientWidth + 1);
}).map(e => `${e.tagName}.${e.getAttribute('class')} ${e.textContent.slice(0, 40)}`)
"""
# Texts with less contrast than they need. A number in a cell of a heat map lies on the cell, which
# is part of a picture: the colour of those is tested by itself.
PALE = """
(() => {
  const parts = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parts(getComputedStyle(e).backgroundColor);
      if (c.length == 3 || c[3] == 1) return c;
    }
    throw new Error('no background');
  };
  const found = {pale: [], texts: 0, svg: 0};
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.closest('.skip, [aria-hidden=true]')) continue;
    const style = getComputedStyle(e), inPlot = e.ownerSVGElement;
    const ink = parts(inPlot ? style.fill : style.color);
    if (inPlot && ['0,0,0', '255,255,255'].includes(ink.join())) continue;
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    found.texts += 1;
    found.svg += inPlot ? 1 : 0;
    if ((a + 0.05) / (b + 0.05) < LEAST)
      found.pale.push(`${e.tagName} ${ink} on ${behind(e)}: ${e.textContent.slice(0, 40)}`);
  }
  return found;
})()
""".replace("LEAST", str(LEAST_CONTRAST))
DIRECTIONS = """
[...document.querySelectorAll('[dir=auto]')].filter(e => e.textContent.trim() == TEXT)
  .map(e => getComputedStyle(e).direction)
"""


def twelve(lengthy: bool) -> list[dict[str, Any]]:
    """Replies of prompts 0 and 1 to texts in two directions, with emoji, and some without end."""
    rows = []
    for index in range(12):
        reply = ("i paint at night", "my bike is fast", HEBREW)[index % 3]
        row = prediction(index, reply, index % 3 % 2)
        row["history"] = [EMOJI, HEBREW, "x" * 300 if lengthy else "hi", MALICE]
        row["persona"] = ["i paint ." if index % 3 == 0 else "i ride .", HEBREW]
        row["scores"] = [0.31 + 0.01 * (index % 3 == 0), 0.31, 0.2]
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs over two bases, one with an audit, one with nothing but its configuration."""
    root = tmp_path_factory.mktemp("runs")
    for name, base in (("plain", "base-a"), ("long-" + "n" * 60, "org/base-b")):
        run = make_run(root / name, config=f"model: {{base: {base}}}\n")
        write_lines(run / "generate" / "predictions.jsonl", twelve(base != "base-a"))
        assert evaluate([str(run)]) == 0
    (root / "plain" / "audit.json").write_text(json.dumps(AUDIT))
    (root / "bare").mkdir()
    (root / "bare" / "config.yaml").write_text("name: bare\n")
    path = root / "report.html"
    folders = [str(folder) for folder in sorted(root.iterdir())]
    assert main([*folders, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def show(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Show]:
    """Opens the report in a window and unfolds all that it folds."""
    with browser(tmp_path_factory.mktemp("profile")) as page:

        def opened(width: int, dark: bool = False, height: int = 900) -> Page:
            page.open(report.as_uri(), width, height, "dark" if dark else "light")
            page.wait("document.querySelector('footer') != null")
            page.value("document.querySelectorAll('details').forEach(e => e.open = true)")
            return page

        yield opened


@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_a_screenshot_holds_the_whole_page(
    show: Show, tmp_path: Path, width: int, dark: bool
) -> None:
    page = show(width, dark)
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(TOO_WIDE) == []
    height = page.value("document.documentElement.scrollHeight")
    shot = tmp_path / "shot.png"
    show(width, dark, height).shoot(shot)
    picture = Image.open(shot).convert("RGB")
    assert picture.size == (width, height)
    margins = [picture.crop((x, 0, x + 6, height)) for x in (0, width - 6)]
    for margin in margins:  # nothing reaches into them
        assert margin.getcolors() == [(6 * height, PAPER[dark])]
    seen = {colour: count for count, colour in picture.getcolors(1 << 24) or []}
    for run in (1, 2):  # curves and bars of both are drawn
        assert seen[tuple(bytes.fromhex(plots.colour(run)[1:]))] > 100
    assert page.errors == []
    assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}


@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_every_text_stands_out_from_what_is_behind_it(show: Show, width: int, dark: bool) -> None:
    found = show(width, dark).value(PALE)
    assert found["pale"] == []
    assert found["texts"] > 300
    assert found["svg"] > 100


def test_numbers_stand_out_from_their_cells() -> None:
    def light(colour: tuple[float, ...]) -> float:
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour]
        return sum(p * w for p, w in zip(parts, (0.2126, 0.7152, 0.0722), strict=True))

    cells = matplotlib.colormaps["cividis"](range(256))
    for cell in cells:
        text = tuple(part / 255 for part in bytes.fromhex(plots.readable_on(cell[:3])[1:]))
        low, high = sorted((light(text), light(tuple(cell[:3]))))
        assert (high + 0.05) / (low + 0.05) >= LEAST_CONTRAST


def test_each_text_runs_in_the_direction_of_its_script(show: Show) -> None:
    page = show(1280)
    for text, direction in ((HEBREW, "rtl"), (EMOJI, "ltr"), (MALICE, "ltr")):
        found = page.value(DIRECTIONS.replace("TEXT", json.dumps(text)))
        assert len(found) > 4
        assert set(found) == {direction}


@pytest.mark.parametrize(("width", "shown"), [(1280, "wide"), (400, "narrow")])
def test_one_form_of_a_heat_map_is_shown(show: Show, width: int, shown: str) -> None:
    script = "[...document.querySelectorAll('svg.wide, svg.narrow')].filter(e => e.clientWidth)"
    classes = show(width).value(f"{script}.map(e => e.getAttribute('class'))")
    assert set(classes) == {shown}


def test_each_prompt_has_its_replies_contexts_and_use_over_time(show: Show) -> None:
    script = """[...document.querySelectorAll('#each-prompt .prompt')].map(e => ({
      name: e.querySelector('h4').textContent,
      replies: [...e.querySelectorAll('.chat .self')].map(r => r.lastChild.textContent),
      contexts: e.querySelectorAll('.context').length,
      words: [...e.querySelectorAll('.words bdi')].map(w => w.textContent),
      plot: [...e.querySelectorAll('figure svg')].map(s => s.getAttribute('aria-label')).join(),
    }))"""
    page = show(1280)
    found = page.value(script)
    assert [one["name"] for one in found] == ["Prompt 0", "Prompt 1"] * 2
    painter, rider = found[:2]
    assert set(painter["replies"]) == {"i paint at night", HEBREW}
    assert rider["replies"] == ["my bike is fast"]
    assert rider["words"][:4] == ["bike", "fast", "is", "my"]
    assert [one["contexts"] for one in found] == [2, 1] * 2  # the same one is not shown twice
    assert all("Use in training, % of examples over steps" in one["plot"] for one in found)
    assert "No reply and no logged step used: prompt 2." in page.value(
        "document.querySelector('#each-prompt').textContent"
    )


def test_the_page_begins_with_its_verdict(show: Show) -> None:
    page = show(400)
    assert page.value("document.querySelector('main section').id") == "verdict"
    assert page.value("document.querySelector('.verdict').getBoundingClientRect().top") < 500
