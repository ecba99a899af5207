"""The pictures of docs/ show the code as it is: the committed files are what the script draws."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.pictures import FOLDER, draw_module

draw = draw_module()


@pytest.mark.parametrize("name", ["rooms.svg", "step.svg"])
def test_committed_pictures_are_current(name: str) -> None:
    committed = (FOLDER / name).read_text(encoding="utf-8")
    assert committed == draw.PICTURES[name](), "run `python docs/pictures/draw.py` and commit"


def test_every_picture_is_committed_and_shown() -> None:
    page = (FOLDER.parent / "architecture.md").read_text(encoding="utf-8")
    assert {path.name for path in FOLDER.glob("*.svg")} == set(draw.PICTURES)
    assert [name for name in draw.PICTURES if f"(pictures/{name})" not in page] == []


def test_a_new_import_changes_the_picture_of_the_rooms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room, text in {"config": "", "model": "import torch\n", "engine": ""}.items():
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(draw, "PACKAGE", tmp_path)
    before = draw.draw_rooms()
    (tmp_path / "engine" / "a.py").write_text("from spt_ds.model.a import x\n", encoding="utf-8")
    assert draw.draw_rooms() != before
    assert draw.rooms()[0]["engine"] == {"model"}
    (tmp_path / "garage.py").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit, match="PURPOSE does not name garage"):
        draw.draw_rooms()


def test_a_function_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = draw.Box(0, "Step", "", "dist.py", ("no_such_function",), repeated=True)
    monkeypatch.setattr(draw, "STEP", (gone,))
    with pytest.raises(SystemExit, match=r"dist\.py does not define no_such_function"):
        draw.draw_step()


def test_the_page_names_the_fences_of_the_house() -> None:
    page = (FOLDER.parent / "architecture.md").read_text(encoding="utf-8")
    for package, allowed in draw.house("FENCES").items():
        (row,) = [
            line for line in page.splitlines() if line.startswith("|") and f"`{package}`" in line
        ]
        named = {name.rstrip("/") for name in re.findall(r"`([\w./]+)`", row.split("|")[2])}
        assert named == allowed, row
