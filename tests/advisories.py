"""Known vulnerabilities of the locked packages, from a copy of the Python advisory database.

`python -m tests.advisories FOLDER` reads a clone of github.com/pypa/advisory-database and compares
it with constraints.txt. `make audit` asks the services themselves; this is for a machine that
reaches none of them. Ends with 1 where an advisory names a locked version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

LOCK = Path(__file__).resolve().parents[1] / "constraints.txt"


def locked(text: str) -> set[tuple[str, Version]]:
    """Name and version of each line of a lock; a package has several where Pythons differ."""
    pins: set[tuple[str, Version]] = set()
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            pins.add((canonicalize_name(requirement.name), Version(pin.version)))
    return pins


def names(advisory: dict[str, Any], package: str, version: Version) -> bool:
    """Whether an advisory (OSV format) names this version of a package."""
    for affected in advisory.get("affected", ()):
        if canonicalize_name(affected["package"]["name"]) != package:
            continue
        if any(_is(version, listed) for listed in affected.get("versions", ())):
            return True
        for span in affected.get("ranges", ()):
            if span["type"] != "GIT" and _inside(version, span["events"]):
                return True
    return False


def _is(version: Version, listed: object) -> bool:
    try:
        return Version(str(listed)) == version
    except InvalidVersion:
        return False


def _inside(version: Version, events: list[dict[str, str]]) -> bool:
    """Whether `version` lies in one of the spans that introduced and fixed bound."""
    inside = False
    for event in events:
        for kind, number in event.items():
            bound = Version(str(number))
            if kind == "introduced":
                inside = inside or version >= bound
            else:
                inside = inside and not (version >= bound if kind == "fixed" else version > bound)
    return inside


def findings(folder: Path, pins: set[tuple[str, Version]]) -> Iterator[str]:
    """Yield `package version: advisory` for each advisory that names a locked version."""
    for package, version in sorted(pins):
        for path in sorted((folder / "vulns" / package).glob("*.yaml")):
            advisory = yaml.safe_load(path.read_text(encoding="utf-8"))
            if "withdrawn" not in advisory and names(advisory, package, version):
                yield f"{package} {version}: {advisory['id']}"


def main() -> int:
    folder = Path(sys.argv[1])
    if not (folder / "vulns").is_dir():
        print(f"{folder}: no folder vulns; give a clone of github.com/pypa/advisory-database")
        return 2
    pins = locked(LOCK.read_text(encoding="utf-8"))
    found = list(findings(folder, pins))
    print("\n".join([*found, f"{len(pins)} locked versions, {len(found)} advisories"]))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
