"""The shell of the documents: its blocks, their commands, and the words of each."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.unit.test_words import DOCUMENTS, ROOT

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.M | re.S)
SHELL = ("", "bash", "sh")
HEREDOC = re.compile(r"<<-?'?(\w+)'?")


@dataclass(frozen=True)
class Block:
    """A fence of a document that holds commands; `number` counts all fences of the document."""

    page: str
    number: int
    code: str

    @property
    def name(self) -> str:
        return f"{self.page}-{self.number}"


def _blocks() -> list[Block]:
    """Every block of every document whose fence names no language, or a shell."""
    return [
        Block(path.relative_to(ROOT).as_posix(), number, re.sub(f"^{indent}", "", code, flags=re.M))
        for path in DOCUMENTS
        for number, (indent, language, code) in enumerate(FENCE.findall(path.read_text("utf-8")))
        if language in SHELL
    ]


def commands(code: str) -> Iterator[str]:
    """The commands of a block: lines, with those that a backslash, quotes or a here-document join.

    Comments and empty lines are left out.
    """
    lines = iter(code.splitlines())
    for line in lines:
        text = line
        while text.endswith("\\") or not _closed(text):
            text += "\n" + next(lines)
        if found := HEREDOC.search(text):
            while text.rpartition("\n")[2] != found[1]:
                text += "\n" + next(lines)
        elif not shlex.split(text, comments=True):
            continue
        yield text


def _closed(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables that stand before a command, and its words."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = os.path.expandvars(value)
    return variables, words


def ours(words: list[str]) -> list[str] | None:
    """The words after `spt-ds` of a command that runs spt_ds, by whatever launcher; else None."""
    for flag in ("--module", "-m"):
        if flag in words and words[(at := words.index(flag)) + 1].startswith("spt_ds."):
            return [words[at + 1].removeprefix("spt_ds."), *words[at + 2 :]]
    if words[0] == "spt-ds":
        return words[1:]
    if words[0] == "sbatch":
        at = next(n for n, word in enumerate(words) if word.endswith(".sbatch"))
        return [words[at].rpartition("/")[2].removesuffix(".sbatch"), *words[at + 1 :]]
    if words[:2] == ["bash", "slurm/sweep.sbatch"]:
        return ["sweep", *words[words.index("--") + 1 :]]
    if words[:2] == ["docker", "run"]:
        at = next(n for n, word in enumerate(words) if re.fullmatch(r"spt-ds(:\w+)?", word))
        return words[at + 1 :]
    return None


BLOCKS = _blocks()
