"""The documents are written in plain English: short sentences, common words, lines that fit.

A test can count words and find phrases. It cannot see whether a sentence has a verb or is true:
read a page aloud before you commit it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]
COLUMNS = 100
MOST_WORDS = 30
# A sentence that lists things may be longer: four or more parts, parted by commas.
LISTED, MOST_WORDS_OF_A_LIST = 3, 35
# A phrase that a reader has to translate, and the common word for it.
BANNED = {
    r"go(es|ing)? on": "resume, continue",
    r"went on": "resumed, continued",
    r"made up for": "is done later",
    r"ha(s|ve) no say": "is ignored",
    r"stands?|stood": "is, means",
    r"tells? of": "describes, names",
    r"told (by|of|apart)": "shown by, known from",
    r"for ever": "without end",
    r"at hand": "available",
    r"anew": "again",
    r"beforehand": "first, before",
    r"as ever": "as always",
    r"in (its|their) place": "instead",
    r"held against": "compared with",
    r"beside": "next to, with, apart from",
    r"whereof|whereby|thereof|herein|therein": "which, in it",
    r"let go of": "release",
    r"lie|lies": "is, are",
    r"parted": "separated",
    r"alike": "the same, equally",
    r"simply|obviously|of course|easily": "(leave it out)",
    r"powerful|seamless|blazing|state-of-the-art|world-class": "(give the figure)",
}
# Ends a sentence: a full stop, question or exclamation mark before a blank, but not after these.
ABBREVIATIONS = ("e.g.", "i.e.", "et al.", "vs.", "No.")


def paragraphs(text: str) -> Iterator[str]:
    """The running text of a document, item by item: no code blocks, tables or headings."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        bare = line.strip()
        begins = re.match(r"([-*+]|\d+\.) ", bare)
        if not bare or begins or bare.startswith(("#", "|", "<")):
            if lines:
                yield " ".join(lines)
            lines = []
        if bare and not bare.startswith(("#", "|", "<")):
            lines.append(bare[begins.end() :] if begins else bare)


def plain(paragraph: str) -> str:
    """Markup off: a piece of code counts as one word, a link as its text."""
    paragraph = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
    paragraph = re.sub(r"`[^`]*`", "code", paragraph)
    return paragraph.replace("**", "").replace("*", "")


def sentences(paragraph: str) -> list[str]:
    text = plain(paragraph)
    for short in ABBREVIATIONS:
        text = text.replace(short, short.replace(".", ""))
    return [part for part in re.split(r"(?<=[.!?])[)\"]? +(?=[A-Z0-9\"(]|code)", text) if part]


def too_long(sentence: str) -> bool:
    words = len([word for word in sentence.split() if re.search(r"\w", word)])
    listed = len(re.findall(r"[,;]", sentence)) >= LISTED
    return words > (MOST_WORDS_OF_A_LIST if listed else MOST_WORDS)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_sentences_are_short(path: Path) -> None:
    found = [
        sentence
        for paragraph in paragraphs(path.read_text(encoding="utf-8"))
        for sentence in sentences(paragraph)
        if too_long(sentence)
    ]
    assert not found, f"{name_of(path)}: make two sentences of each:\n" + "\n".join(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_words_are_common(path: Path) -> None:
    text = "\n".join(map(plain, paragraphs(path.read_text(encoding="utf-8"))))
    found = [
        f"{match.group()!r}: write {better}"
        for phrase, better in BANNED.items()
        for match in re.finditer(rf"\b(?:{phrase})\b", text, re.I)
    ]
    assert not found, f"{name_of(path)}:\n" + "\n".join(found)


def messages(code: str) -> Iterator[str]:
    """The texts in a file of code that may reach a user: all but docstrings."""
    tree = ast.parse(code)
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in statements:
            yield node.value if isinstance(node.value, str) else ""


def test_messages_use_common_words() -> None:
    found = [
        f"{name_of(path)}: {match.group()!r} in {text!r}: write {better}"
        for path in sorted((ROOT / "spt_ds").rglob("*.py"))
        for text in messages(path.read_text(encoding="utf-8"))
        for phrase, better in BANNED.items()
        for match in re.finditer(rf"\b(?:{phrase})\b", text, re.I)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_lines_of_prose_fit(path: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = [
        line
        for line in text.splitlines()
        if len(line) > COLUMNS and not line.lstrip().startswith("|")
    ]
    assert not found, f"{name_of(path)}: longer than {COLUMNS} columns:\n" + "\n".join(found)


def test_the_rules_see_what_they_forbid() -> None:
    """Each rule on a text that breaks it, and on its neighbour that does not."""
    thirty = " ".join(["word"] * 30)
    assert not too_long(thirty + ".")
    assert too_long(thirty + " more.")
    assert not too_long(thirty + " one, two, three, four.")
    text = (
        "# Title\n\nOne is `a b` long. Two is\nlonger, e.g. this.\n\n```\nx "
        + "y " * 50
        + "\n```\n"
    )
    (paragraph,) = paragraphs(text)
    assert sentences(paragraph) == ["One is code long.", "Two is longer, eg this."]
    assert list(paragraphs("* one\n  more\n* two\n| a | b |\n")) == ["one more", "two"]
    assert re.search(next(iter(BANNED)), "the run goes on")
    code = 'def one(x):\n    """It goes on."""\n    return f"{x} goes on" + "b"\n'
    assert sorted(messages(code)) == [" goes on", "b"]
