"""Prepares the pages of the site: those of docs/, and those that are written from the code.

    python docs/site/stage.py FOLDER

`make docs` calls it, then Sphinx. A page reads the same on a forge and on the site, so a link to a
file outside docs/ gets a page that shows this file. Nothing that is made here is committed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from spt_ds.cli import COMMANDS, entry
from spt_ds.config.load import json_schema
from spt_ds.run.completion import parser_of

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
OWN = {"site"}  # folders of docs/ that are no pages
PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md")
# Fenced and inline code are left as they are; the last is a link with its target and anchor.
CODE_OR_LINK = re.compile(
    r"^ *```.*?^ *```|`[^`\n]+`|\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", re.M | re.S
)
GENERATED = {
    "reference/cli.md": "Which arguments does each command take?",
    "reference/options.md": "Which options does a YAML file have, and what are their defaults?",
    "reference/api.md": "What can I import, and what does it take and return?",
}
API = {
    "Replies": ["spt_ds.load", "spt_ds.api.Bot", "spt_ds.api.Reply"],
    "Runs for others": [
        "spt_ds.export.run_files.open_trained",
        "spt_ds.export.run_files.Trained",
        "spt_ds.export.peft_folder.export_peft",
        "spt_ds.export.hub_folder.export_hub",
        "spt_ds.export.card.Card",
        "spt_ds.export.vllm.export_vllm",
        "spt_ds.export.vllm.Router",
        "spt_ds.export.vllm.Request",
    ],
    "Runs of others": [
        "spt_ds.export.peft_folder.import_peft",
        "spt_ds.export.reference_files.import_reference",
    ],
    "Errors": [
        f"spt_ds.errors.{name}Error"
        for name in ("Spt", "Config", "Data", "Model", "Engine", "Checkpoint")
    ],
}


class Stage:
    """The folder that Sphinx reads, and the files outside docs/ that its pages link to."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.linked: set[Path] = set()

    def fill(self) -> None:
        """Write all pages."""
        for path in sorted(DOCS.rglob("*")):
            inside = path.relative_to(DOCS)
            if not path.is_file() or inside.parts[0] in OWN or "__pycache__" in inside.parts:
                continue
            if path.suffix in (".md", ".ipynb"):
                self._write(page_of(path), self.text(path))
            else:
                target = self.out / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        for name, text in (("cli", cli()), ("options", options()), ("api", api())):
            self._write(Path(f"reference/{name}.md"), text)
        self._write(Path("index.md"), index(self.text(DOCS / "README.md")))
        self.linked |= {ROOT / name for name in PROJECT}
        done: set[Path] = set()
        # A page of the project may link to more of its files.
        while todo := self.linked - done:
            for path in sorted(todo):
                self._write(page_of(path), self.shown(path))
            done |= todo

    def _write(self, page: Path, text: str) -> None:
        target = self.out / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def text(self, path: Path) -> str:
        """A page with links that hold on the site."""
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = notebook(json.loads(text))

        def link(match: re.Match[str]) -> str:
            if match.group(1) is None:
                return match.group()
            target = Path(os.path.normpath(path.parent / match.group(1)))
            if DOCS not in target.parents and target != DOCS:
                self.linked.add(target)
            elif target.suffix not in (".md", ".ipynb"):
                return match.group()
            to = os.path.relpath(page_of(target), page_of(path).parent)
            return f"]({to}{match.group(2) or ''})"

        return CODE_OR_LINK.sub(link, text)

    def shown(self, path: Path) -> str:
        """A page that shows a file or a folder outside docs/."""
        orphan = "" if path.name in PROJECT else "---\norphan: true\n---\n\n"
        if path.suffix == ".md":
            return orphan + self.text(path)
        title = f"# `{path.relative_to(ROOT)}`\n\n"
        if path.is_dir():
            names = [f"* `{inner.name}`" for inner in sorted(path.iterdir())]
            return orphan + title + "\n".join(names) + "\n"
        language = {".py": "python", ".json": "json", ".yaml": "yaml", ".sh": "bash"}
        code = path.read_text(encoding="utf-8")
        return f"{orphan}{title}````{language.get(path.suffix, 'text')}\n{code}````\n"


def page_of(path: Path) -> Path:
    """Where the site has a file of this repository."""
    if path == DOCS / "README.md":
        return Path("index.md")
    if DOCS in path.parents:
        return path.relative_to(DOCS).with_suffix(".md")
    inside = path.relative_to(ROOT)
    return Path("project") / (inside if inside.suffix == ".md" else f"{inside}.md")


def index(text: str) -> str:
    """The first page: the tables of docs/README.md, the generated pages, and the navigation."""
    rows = "".join(f"| [{page}]({page}) | {question} |\n" for page, question in GENERATED.items())
    before, found, after = text.partition("## Reference\n\n| page | question that it answers |\n")
    head, rule, table = after.partition("|---|---|\n")
    if not found or head or not rule:
        raise SystemExit("docs/README.md: no table of pages below `## Reference`")
    text = before + found + rule + rows + table
    project = "".join(f"project/{name}\n" for name in PROJECT)
    trees = [tree("Project", project)]
    for section in reversed(text.split("\n## ")[1:]):
        title, _, body = section.partition("\n")
        pages = re.findall(r"^\| \[[^\]]*\]\(([^)]+)\)", body, re.M)
        trees.insert(0, tree(title, "\n".join(pages)))
    return text + "".join(trees)


def tree(caption: str, pages: str) -> str:
    """A part of the navigation."""
    return f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages.strip()}\n```\n"


def notebook(cells: Mapping[str, Any]) -> str:
    """A notebook as a page: its text, its code, and what the code printed."""
    parts = []
    for cell in cells["cells"]:
        source = "".join(cell["source"]).strip()
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join("".join(output.get("text", ())) for output in cell.get("outputs", ()))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def cli() -> str:
    """The page of all commands, from their parsers."""
    parts = [
        "# Arguments of each command\n",
        "What `--help` prints. [Commands](commands.md) says what they read and write.\n",
    ]
    for name, (_, line) in COMMANDS.items():
        parts.append(f"## `spt-ds {name}`\n\n{line[0].upper()}{line[1:]}.\n")
        # argparse wraps at the width of a terminal.
        with mock.patch.dict(os.environ, COLUMNS="96"):
            helps = [parser.format_help().rstrip() for parser in parsers(name)]
        parts += [f"```text\n{text}\n```\n" for text in helps]
    return "\n".join(parts)


def parsers(command: str) -> Iterator[argparse.ArgumentParser]:
    """The parser of a command, then those of its forms."""
    parser = parser_of(entry(command))
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def options() -> str:
    """The page of all options, from the schema of a YAML file."""
    schema = json.loads(json_schema())
    parts = [
        "# Options of a YAML file\n",
        "`--set KEY=VALUE` overrides one of them. `spt-ds config --schema` prints the same as a"
        " JSON schema for editors.\n",
    ]
    sections: dict[str, list[str]] = {}
    for path, option in leaves(schema, schema["$defs"]):
        section = path.partition(".")[0] if "." in path else "The run itself"
        default = json.dumps(option["default"]) if "default" in option else ""
        cells = (
            f"`{path}`",
            kind(option, schema["$defs"]),
            f"`{default}`" if default else "",
            " ".join(option.get("description", "").split()),
        )
        row = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        sections.setdefault(section, []).append(row)
    for section, rows in sections.items():
        parts += [f"## {section}\n", "| option | type | default | meaning |\n|---|---|---|---|"]
        parts += ["\n".join(rows) + "\n"]
    return "\n".join(parts)


def leaves(
    node: Mapping[str, Any], defs: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each option of a schema by its dotted path."""
    for name, option in node["properties"].items():
        # Older releases of pydantic wrap the reference of a section that has a default.
        (reference,) = option.get("allOf", [option])
        if "$ref" in reference:
            yield from leaves(defs[reference["$ref"].rpartition("/")[2]], defs, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", option


def kind(option: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """The type of an option in words."""
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    if "const" in option:
        return f"`{option['const']}`"
    if several := option.get("anyOf") or option.get("oneOf"):
        return " or ".join(kind(one, defs) for one in several)
    if "$ref" in option:
        inner = defs[option["$ref"].rpartition("/")[2]]
        return "{" + ", ".join(inner.get("properties", ())) + "}"
    if "prefixItems" in option:
        return "[" + ", ".join(kind(one, defs) for one in option["prefixItems"]) + "]"
    if option.get("type") == "array":
        return f"list of {kind(option['items'], defs)}"
    names = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    limits = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    given = [f"{word} {option[key]}" for key, word in limits.items() if key in option]
    if "pattern" in option:
        given.append(f"as `{option['pattern']}`")
    name = option.get("type", "any value")
    return ", ".join([names.get(name, name), *given])


def api() -> str:
    """The page of public names, which Sphinx fills with their docstrings."""
    parts = [
        "# Python API\n",
        "`spt_ds.load`, `spt_ds.Config` and `spt_ds.SptError` are imported on first use, so that"
        " `import spt_ds` loads no PyTorch. [share.md](../how-to/share.md) shows the exports as"
        " commands.\n",
    ]
    for title, names in API.items():
        parts.append(f"## {title}\n\n```{{eval-rst}}")
        for name in names:
            last = name.rpartition(".")[2]
            if last[0].isupper():
                members = "" if last.endswith("Error") else "   :members:\n   :undoc-members:\n"
                parts.append(f".. autoclass:: {name}\n{members}")
            else:
                parts.append(f".. autofunction:: {name}\n")
        parts.append("```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    Stage(folder).fill()
