"""`make test-cluster` where it cannot run: it says why, and does not fail."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.cluster.__main__ import main


@pytest.mark.parametrize(
    ("place", "name", "value", "told"),
    [
        (os, "geteuid", lambda: 1000, "need root"),
        (Path, "exists", lambda self: str(self) != "/etc/debian_version", "Debian"),
        (shutil, "which", lambda name: None, "apt-get install slurm-wlm"),
    ],
)
def test_says_why_it_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: object,
    name: str,
    value: object,
    told: str,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(place, name, value)
    assert main() == 0
    assert told in capsys.readouterr().out
