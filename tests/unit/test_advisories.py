"""An advisory is found where it names a locked version, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from tests.advisories import LOCK, findings, locked, names


def advisory(**affected: object) -> dict[str, object]:
    return {"id": "X-1", "affected": [{"package": {"name": "Some_Package"}, **affected}]}


@pytest.mark.parametrize(
    ("version", "named"),
    [("0.9", False), ("1.0", True), ("1.4", True), ("1.5", False), ("2.0", True), ("3.0", True)],
)
def test_ranges(version: str, named: bool) -> None:
    events = [{"introduced": "1.0"}, {"fixed": "1.5"}, {"introduced": "2.0"}]
    one = advisory(ranges=[{"type": "ECOSYSTEM", "events": events}])
    assert names(one, "some-package", Version(version)) is named
    assert not names(one, "other", Version(version))


def test_listed_versions_and_last_affected() -> None:
    one = advisory(
        versions=["1.0", "not a version"],
        ranges=[
            {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"last_affected": "0.5"}]},
            {"type": "GIT", "events": [{"introduced": "0"}]},
        ],
    )
    found = [names(one, "some-package", Version(v)) for v in ("0.5", "0.6", "1.0")]
    assert found == [True, False, True]


def test_a_lock_and_a_database(tmp_path: Path) -> None:
    pins = locked("# made by uv\nsome-package==1.0 ; python_version < '3.11'\nother==2.1\n")
    folder = tmp_path / "vulns" / "some-package"
    folder.mkdir(parents=True)
    for number, extra in enumerate(({}, {"withdrawn": "2026-01-01"})):
        text = yaml.safe_dump({**advisory(versions=["1.0"]), **extra})
        (folder / f"{number}.yaml").write_text(text, encoding="utf-8")
    assert list(findings(tmp_path, pins)) == ["some-package 1.0: X-1"]


def test_the_lock_itself_can_be_read() -> None:
    assert len(locked(LOCK.read_text(encoding="utf-8"))) > 50
