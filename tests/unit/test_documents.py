"""README and docs name only commands, options, recipes and files that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from spt_ds.cli import COMMANDS
from spt_ds.config.load import key_paths, recipe_names
from spt_ds.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(path: Path) -> str:
    """The fenced code of a document, continued lines joined."""
    text = "\n".join(
        re.findall(r"^ *```\w*\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.M | re.S)
    )
    return text.replace("\\\n", " ")


def source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no module {module}"
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_options_exist(path: Path) -> None:
    for line in blocks(path).splitlines():
        modules = [
            COMMANDS[name][0] for name in re.findall(r"\bspt-ds (\w+)", line) if name in COMMANDS
        ]
        unknown = [
            name
            for name in re.findall(r"^\s*(?:[\w/]*bin/)?spt-ds (\w+)", line)
            if name not in COMMANDS
        ]
        assert not unknown, f"{path.name}: {line}"
        if launched := re.findall(r"(?:--module|-m) (spt_ds[\w.]*)", line):
            modules.append(launched[0])
        # What comes before belongs to the launcher.
        ours = re.split(r"(?:--module|-m) spt_ds[\w.]*|spt-ds ", line)[-1]
        for module in modules:
            known = source_of(module) + source_of("spt_ds.run.command")
            for option in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", ours):
                assert f'"{option}"' in known or option == "--version", (
                    f"{path.name}: {module} knows no {option}"
                )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_inside_sentences_exist(path: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for name in re.findall(r"`spt-ds\s+([a-z_]\w*)", text):
        assert name in COMMANDS, f"{path.name}: `spt-ds {name}`"


def test_commands_that_messages_name_exist() -> None:
    for file in (ROOT / "spt_ds").rglob("*.py"):
        for name in re.findall(r"`spt-ds ([a-z_]\w*)", file.read_text(encoding="utf-8")):
            assert name in COMMANDS, f"{file.name}: `spt-ds {name}`"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_and_their_options_exist(path: Path) -> None:
    for script, rest in re.findall(r"python ((?:benchmarks|docs)/[\w/]+\.py)(.*)", blocks(path)):
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", rest):
            assert f'"{option}"' in source, f"{path.name}: {script} knows no {option}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_recipes_and_overrides_exist(path: Path) -> None:
    code = blocks(path)
    for name in re.findall(r"--config ([\w.-]+)", code):
        assert name in recipe_names() or name.isupper() or name.endswith(".yaml"), (
            f"{path.name}: recipe {name}"
        )
    for key in re.findall(r"--set ([\w.]+)=", code):
        assert key in set(key_paths(Config)) or key.isupper(), f"{path.name}: option {key}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / name).exists(), f"{path.name}: link {name}"
    for name in re.findall(
        r"(?<![\w/])((?:docs|benchmarks|ds_configs|slurm|tests)/[\w./-]+\.\w+)", text
    ):
        example = ROOT / f"{name}.example"  # a file that the site makes from its example
        assert (ROOT / name).exists() or example.exists(), f"{path.name}: {name}"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, re.M), target
