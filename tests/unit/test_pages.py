"""Every link between the documents leads somewhere, and the index of docs/ names every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spt_ds.cli import COMMANDS
from spt_ds.run.folder import FREE_OPTIONS
from tests.helpers.pictures import draw_module

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
INDEX = DOCS / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
] + PAGES


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """The text of a document without its fenced code."""
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def links(path: Path) -> list[tuple[str, str]]:
    """(file, anchor) of each relative link, either part empty where the link has none."""
    targets = re.findall(r"\]\((?!\w+:)([^)\s]+)\)", prose(path))
    return [(target.partition("#")[0], target.partition("#")[2]) for target in targets]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_functions_that_a_link_names_exist(path: Path) -> None:
    for name, file in re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", prose(path)):
        if not name.endswith(".py"):
            assert name in draw_module().defined(path.parent / file), (
                f"{name_of(path)}: {file} has no {name}"
            )


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_resolve(path: Path) -> None:
    for file, anchor in links(path):
        target = path.parent / file if file else path
        assert target.exists(), f"{name_of(path)} links to {file}, which does not exist"
        if anchor:
            assert anchor in anchors(target), f"{name_of(path)}: no heading #{anchor} in {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_rows_of_a_table_have_the_same_columns(path: Path) -> None:
    """A bar ends a cell, also inside code: a row with one more loses its last cells when shown."""
    for block in re.findall(r"(?:^ *\|.*\n)+", prose(path), re.M):
        rows = [len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()]
        assert len(set(rows)) == 1, f"{name_of(path)}:\n{block}"


def test_the_index_names_every_page() -> None:
    listed = {(DOCS / file).resolve() for file, _ in links(INDEX)}
    missing = [name_of(page) for page in PAGES if page != INDEX and page not in listed]
    assert not missing, f"docs/README.md does not link to {', '.join(missing)}"


def test_the_tests_that_security_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py|test_\w+)`", prose(DOCS / "security.md"))
    sources = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "tests").rglob("*.py")}
    there = "\n".join(path.read_text(encoding="utf-8") for path in sources.values())
    assert len(named) > 12
    missing = [name for name in named if name not in sources and f"def {name}(" not in there]
    assert not missing


def test_the_readme_links_to_the_index() -> None:
    assert ("docs/README.md", "") in links(ROOT / "README.md")


def test_the_reference_lists_every_command() -> None:
    text = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"| `spt-ds {name}` |" not in text] == []


def test_the_reference_lists_what_a_resumed_run_may_change() -> None:
    text = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in sorted(FREE_OPTIONS) if f"`{name}`" not in text] == []
