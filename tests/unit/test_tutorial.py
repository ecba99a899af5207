"""The files that the tutorial asks a reader to write are accepted as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spt_ds.config.load import load_config
from spt_ds.data.readers import read

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial" / "first-run.md"


def test_the_files_of_the_tutorial_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (name, dialogues) = re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", text, re.M | re.S)[0]
    (settings,) = re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(dialogues, encoding="utf-8")
    Path("mine.yaml").write_text(settings, encoding="utf-8")
    config = load_config("mine.yaml")
    assert {config.data.train, config.data.valid, config.data.test} == {name}
    assert len(list(read(name))) == 8  # two replies in each of four dialogues
