"""The Python of the documents runs as it is printed, and their YAML is accepted.

Shell commands run in tests/integration/test_shell_snippets.py.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from spt_ds.cli import main
from spt_ds.config.load import load_config
from spt_ds.sweep.cells import load_cells
from tests.helpers.runs import make_run
from tests.unit.test_words import DOCUMENTS, ROOT

BLOCK = re.compile(r"^ *```(python|yaml)\n(.*?)^ *```", re.M | re.S)
SNIPPETS = [
    (path.relative_to(ROOT).as_posix(), number, language, code)
    for path in DOCUMENTS
    for number, (language, code) in enumerate(BLOCK.findall(path.read_text(encoding="utf-8")))
]


def of(language: str) -> list[Any]:
    return [
        pytest.param(code, id=f"{name}-{number}")
        for name, number, kind, code in SNIPPETS
        if kind == language
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the snippets name: a run, its exports, and its base."""
    folder = tmp_path_factory.mktemp("snippets")
    run = make_run(folder, "llama")
    (folder / "runs").mkdir()
    shutil.move(run.path, folder / "runs" / "demo")
    for kind in ("hub", "peft"):
        out = "shared/demo" if kind == "hub" else "shared/demo-peft"
        words = ["export", kind, str(folder / "runs" / "demo"), str(folder / out)]
        assert main([*words, "--base", "org/base"]) == 0
    # The base has its name at the hub; here it is a folder.
    config = folder / "shared" / "demo" / "config.yaml"
    config.write_text(config.read_text().replace("org/base", str(folder / "base")))
    return folder


@pytest.mark.parametrize("code", of("python"))
def test_python_runs_as_printed(code: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    # The hub answers with the folder that was exported.
    hub = place / "shared" / "demo"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(hub))
    exec(compile(code.replace("ORG/BASE", str(place / "base")), "snippet", "exec"), {})


@pytest.mark.parametrize("code", of("yaml"))
def test_yaml_is_accepted(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "snippet.yaml"
    file.write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    if "grid" in yaml.safe_load(code):
        assert load_cells(file)[1]
    else:
        load_config(str(file))


def test_there_are_snippets() -> None:
    """A change of the fences must not leave the tests above without any."""
    assert len(of("python")) >= 4
    assert len(of("yaml")) >= 7
