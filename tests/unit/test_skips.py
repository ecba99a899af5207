"""The table of skipped tests fails on a skip that was not foreseen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import skips

ROOT = Path(__file__).resolve().parents[2]
FILE = """
import pytest

def test_gpu(): pytest.skip("needs a CUDA device")
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.skipif(True, reason="shellcheck is not installed")
def test_tool(n): pass
@pytest.mark.xfail
def test_expected(): assert False
def test_passes(): pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=str)
def test_skips_are_noted(workers: list[str], tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_some.py").write_text(FILE)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *workers, str(tmp_path)],
        cwd=tmp_path,
        env={**kept, "SPT_SKIPS": str(tmp_path / "skips")},
        check=True,
        capture_output=True,
        timeout=120,
    )
    text, unforeseen = skips.table((tmp_path / "skips").read_text().splitlines())
    assert "test_gpu | 1 | needs a CUDA device | there is no GPU |" in text
    assert "test_tool | 2 | shellcheck is not installed | NO |" in text
    assert "test_expected" not in text
    assert [line.partition("::")[2] for line in unforeseen] == [
        "test_tool: shellcheck is not installed"
    ]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "skips"
    monkeypatch.setattr(sys, "argv", ["skips", str(path)])
    assert skips.main() == 0
    path.write_text('{"test": "a::b", "reason": "needs a CUDA device"}\n')
    assert skips.main() == 0
    path.write_text('{"test": "a::b", "reason": "no chromium or chrome on this machine"}\n')
    assert skips.main() == 1
    assert "a::b: no chromium" in capsys.readouterr().out
