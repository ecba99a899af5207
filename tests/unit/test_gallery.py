"""The example of a report in docs/gallery: current, small, and without traces of a machine."""

from __future__ import annotations

import html
import re
from pathlib import Path

from PIL import Image

import spt_ds.report.command

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "gallery"
PAGE = html.unescape((FOLDER / "demo.html").read_text(encoding="utf-8"))
AGAIN = "run `make demo` and `python docs/gallery/make.py runs/demo`, and commit"


def test_its_sections_are_those_of_a_report_of_today() -> None:
    source = Path(spt_ds.report.command.__file__).read_text(encoding="utf-8")
    sections = re.findall(r'^        "([A-Z][\w ]+)": \w+\.\w+,$', source, re.M)
    assert len(sections) > 5
    assert re.findall(r"<h2[^>]*>([^<]+)</h2>", PAGE) == sections, AGAIN


def test_it_fetches_nothing_and_names_no_machine() -> None:
    assert "default-src 'none'" in PAGE
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", PAGE)
    assert not re.search(r"/(?:home|root|tmp|Users)/", PAGE)
    (host,) = re.findall(r">machine\.host</th><td[^>]*>([^<]+)<", PAGE)
    assert host == "example"


def test_the_pictures_are_small_and_of_the_widths_that_the_page_names() -> None:
    pictures = sorted(FOLDER.glob("*.webp"))
    page = (FOLDER / "report.md").read_text(encoding="utf-8")
    widths = set()
    for path in pictures:
        assert f"({path.name})" in page
        with Image.open(path) as image:
            widths.add(image.width)
    assert widths == {1280, 400}
    assert sum(path.stat().st_size for path in pictures) < 300_000
    assert len(PAGE.encode()) < 400_000
