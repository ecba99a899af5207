"""The site of docs/: its pages from the code are whole, its links hold, it fetches nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from spt_ds.cli import COMMANDS, entry
from spt_ds.config.load import key_paths, options_of
from spt_ds.config.schema import Config
from spt_ds.run.completion import parser_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
stage = SimpleNamespace(**runpy.run_path(str(DOCS / "site" / "stage.py")))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("site") / "source"
    stage.Stage(folder).fill()
    return folder


def test_every_option_with_its_default_and_meaning(pages: Path) -> None:
    page = (pages / "reference" / "options.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", page, re.M))
    assert list(rows) == list(key_paths(Config))
    defaults = options_of(Config(), "json")
    for path, row in rows.items():
        type_, default, meaning = re.split(r"(?<!\\) \| |(?<=\|) (?=\|)", row)
        assert type_, path
        assert meaning, path
        if default:
            assert json.loads(default.strip("`").replace("\\|", "|")) == defaults[path], path
        else:
            assert defaults[path] in ([], {}), path


def test_every_argument_of_every_command(pages: Path) -> None:
    page = (pages / "reference" / "cli.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## `spt-ds (\w+)`\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert list(parts) == list(COMMANDS)
    for name, part in parts.items():
        for action in parser_of(entry(name))._actions:
            assert all(option in part for option in action.option_strings), name
    assert "usage: spt-ds export hub" in parts["export"]


def test_public_names_are_those_of_the_package(pages: Path) -> None:
    page = (pages / "reference" / "api.md").read_text(encoding="utf-8")
    for name in re.findall(r"^\.\. auto\w+:: (\S+)", page, re.M):
        module, _, last = name.rpartition(".")
        assert getattr(importlib.import_module(module), last).__doc__, name
    assert ".. autofunction:: spt_ds.load\n" in page


def test_links_hold_on_the_site(pages: Path) -> None:
    seen = 0
    for page in pages.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        for match in stage.CODE_OR_LINK.finditer(text):
            if match.group(1):
                assert (page.parent / match.group(1)).is_file(), f"{page}: {match.group()}"
                seen += 1
    assert seen > 150
    shown = (pages / "project" / "spt_ds" / "cli.py.md").read_text(encoding="utf-8")
    assert (DOCS.parent / "spt_ds" / "cli.py").read_text(encoding="utf-8") in shown


def test_code_is_no_link() -> None:
    text = "`a[0](b.md)` [c](d.md)\n\n```\ne[1](f.md)\n```\n"
    found = [match.group(1) for match in stage.CODE_OR_LINK.finditer(text)]
    assert found == [None, "d.md", None]


def test_the_navigation_has_every_page(pages: Path) -> None:
    index = (pages / "index.md").read_text(encoding="utf-8")
    named = re.findall(r"^([\w/-]+\.\w+)$", index, re.M)
    assert len(named) == len(set(named))
    own = {page.relative_to(pages).as_posix() for page in pages.rglob("*.md")}
    assert own - set(named) - {"index.md"} == {
        name
        for name in own
        if name.startswith("project/") and name.partition("/")[2] not in stage.PROJECT
    }


@pytest.mark.skipif(
    importlib.util.find_spec("furo") is None, reason="sphinx is not installed; make docs does it"
)
def test_the_site_is_built_and_a_broken_link_is_an_error(pages: Path, tmp_path: Path) -> None:
    page = pages / "reference" / "options.md"
    kept = page.read_text(encoding="utf-8")
    page.write_text(kept + "\nSee [this](data.md#no-such-heading).\n", encoding="utf-8")
    try:
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "site"]
        done = subprocess.run(
            [*command, str(pages), str(tmp_path)],
            cwd=DOCS,
            capture_output=True,
            text=True,
            timeout=280,
        )
    finally:
        page.write_text(kept, encoding="utf-8")
    assert done.returncode == 1
    (warning, *rest) = done.stderr.strip().splitlines()
    assert "no-such-heading" in warning
    assert rest == []
    fetched = r"<(?:script|img|iframe|link rel=\"style)[^>]*(?:src|href)=\"(?:https?:)?//"
    for html in tmp_path.rglob("*.html"):
        assert not re.search(fetched, html.read_text(encoding="utf-8")), html
    for css in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", css.read_text()), css
    api = (tmp_path / "reference" / "api.html").read_text(encoding="utf-8")
    assert "cleaned as the scores clean it" in api
