"""The page of `spt-ds serve`, used as a person does, in a real browser."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from spt_ds import dist
from spt_ds.api import open_run
from spt_ds.serve.answers import Meters
from spt_ds.serve.ask import Rules
from spt_ds.serve.batcher import Batcher, Limits
from tests.helpers.browser import CHROMIUM, Page, browser
from tests.helpers.served import embedded_run, served

FILES = Path(__file__).resolve().parents[2] / "spt_ds" / "serve" / "page"
PERSONA = "I am in college.\nI answer for Juniper Travel."
MALICE = "<img src=x onerror=\"document.title='x'\"> hi"
DONE = "!document.body.classList.contains('busy') && document.querySelectorAll('{}').length === {}"


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run."""
    before = dict(os.environ)
    yield embedded_run(tmp_path_factory.mktemp("page") / "bank", "before_reply").path
    dist.shutdown()
    os.environ.clear()
    os.environ.update(before)


def server_of(run: Path) -> tuple[Batcher, Meters]:
    session, meters = open_run(run, "best", ["generate.min_new_tokens=8"]), Meters()
    rules = Rules("bank", 4, session.config.generate, 64)
    return Batcher(session, rules, Limits(16, 16, 60), meters), meters


@pytest.fixture(scope="module")
def url(bank: Path) -> Iterator[str]:
    with served(*server_of(bank)) as (url, _):
        yield url


def focus(page: Page, name: str) -> None:
    page.value(f"document.getElementById('{name}').focus()")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize(
    ("width", "scheme", "ground"),
    [(1280, "light", (0xF5, 0xF5, 0xF2)), (380, "dark", (0x13, 0x15, 0x19))],
)
def test_a_dialogue_of_three_turns(
    url: str, tmp_path: Path, width: int, scheme: str, ground: tuple[int, int, int]
) -> None:
    from PIL import Image

    with browser(tmp_path / "profile") as page:
        page.open(url, width, 820, scheme)
        page.wait("document.querySelectorAll('.choice').length === 6")
        page.press("p", "KeyP", modifiers=1)
        page.type(PERSONA)
        assert page.value("document.getElementById('persona').value") == PERSONA
        page.value(
            "document.getElementById('settings').open = innerWidth > 760; grown = [];"
            "new MutationObserver(() => grown.push(document.querySelector('.reply:last-child"
            " .text')?.textContent)).observe(document.getElementById('log'),"
            " {subtree: true, childList: true, characterData: true})"
        )
        focus(page, "message")
        for number, message in enumerate(("hi, how are you?", MALICE, "where do you live?")):
            page.type(message)
            page.press("Enter")
            page.wait(DONE.format(".reply:not(.growing)", number + 1))
        assert page.value("document.title") == "bank"
        said = page.value("[...document.querySelectorAll('.said')].map((n) => n.textContent)")
        assert said[1] == MALICE
        replies = page.value("[...document.querySelectorAll('.text')].map((n) => n.textContent)")
        assert all(replies)
        assert len(set(page.value("grown"))) > 6  # they came piece by piece
        charts = page.value(
            "[...document.querySelectorAll('.reply')].map((n) => [n.querySelector('.who')"
            ".textContent, n.querySelector('.chosen .name').textContent,"
            " [...n.querySelectorAll('.value')].map((v) => Number(v.textContent))])"
        )
        for who, chosen, scores in charts:
            assert who == f"prompt {chosen}"
            assert len(scores) == 4
            assert scores[int(chosen)] == max(scores)
        # another prompt by keyboard, then all of them side by side
        page.value("document.getElementById('settings').open = true")
        page.value("document.querySelector('input[value=auto]').focus()")
        for _ in range(3):
            page.press("ArrowDown")
        assert page.value("document.querySelector('input[name=prompt]:checked').value") == "2"
        focus(page, "message")
        page.type("and then?")
        page.press("Enter")
        page.wait(DONE.format(".reply:not(.growing)", 4))
        assert page.value("[...document.querySelectorAll('.who')].at(-1).textContent") == "prompt 2"
        page.value("document.querySelector('input[value=all]').click()")
        focus(page, "message")
        page.type("and you?")
        page.press("Enter")
        page.wait(DONE.format(".many .reply:not(.growing)", 4))
        assert page.value("document.querySelectorAll('.followed').length") == 1
        page.value(
            "[...document.querySelectorAll('.pick')].find((n) => n.textContent"
            " === 'take this one').click()"
        )
        assert page.value("document.querySelectorAll('.followed').length") == 1
        assert page.value("document.documentElement.scrollWidth") == width
        page.shoot(tmp_path / "shot.png")
        assert page.errors == []
        assert all(address.startswith(url) for address in page.requests)
        page.press("n", "KeyN", modifiers=1)
        page.wait("document.querySelectorAll('.reply').length === 0")
    picture = Image.open(tmp_path / "shot.png").convert("RGB")
    assert picture.size == (width, 820)
    counts = picture.getcolors(1 << 24)
    assert counts is not None
    assert {colour: count for count, colour in counts}.get(ground, 0) > 20_000


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on this machine")
def test_the_page_asks_for_the_key(bank: Path, tmp_path: Path) -> None:
    with (
        served(*server_of(bank), key="k" * 20, local=False) as (url, _),
        browser(tmp_path / "profile") as page,
    ):
        page.open(url, 1000, 700, "light")
        page.wait("document.activeElement.id === 'key'")
        page.type("wrong")
        page.press("Enter")
        page.wait("document.querySelector('.note')?.textContent === 'That is not the key.'")
        page.type("k" * 20)
        page.press("Enter")
        page.wait("document.activeElement.id === 'message'")
        page.type("hi")
        page.press("Enter")
        page.wait(DONE.format(".reply:not(.growing)", 1))
        assert page.value("document.querySelectorAll('.note').length") == 0


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for path in FILES.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|url\(|innerHTML|style=|\bon\w+=", text), path
