"""`make test-cluster` where it cannot run: it says why, and fails where it could be mended."""

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
    # The programs of a machine that is not to be changed are of no account.
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main() == 0
    assert told in capsys.readouterr().out


def test_fails_where_the_packages_could_be_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "slurmd" else name)
    assert main() == 1
    assert "not installed: slurmd; run .ci/packages" in capsys.readouterr().err
