"""The table of skipped tests at the end of .ci/run; it fails where a skip was not foreseen.

`python -m tests.skips FILE` reads what tests/conftest.py wrote while SPT_SKIPS named FILE.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

# What a skip says -> why no installation on the machine of CI could avoid it.
FORESEEN = {
    r"needs a CUDA device": "there is no GPU",
    r"(flash|flash4|varlen) is not installed": "kernels of a GPU",
    r"sphinx is not installed": "make docs, an earlier step, installs it in .venv alone",
    r"this machine does not let root make namespaces": "a container without that right",
    r"only root can mount a small disk": "a container without that right",
}


def table(lines: list[str]) -> tuple[str, list[str]]:
    """Return the table of the skips, and the reasons that were not foreseen."""
    skips = [json.loads(line) for line in lines]
    counts = Counter((skip["test"], skip["reason"]) for skip in skips)
    rows, unforeseen = ["| test | times | reason | foreseen |", "|---|---|---|---|"], []
    for (test, reason), times in sorted(counts.items()):
        why = next((why for part, why in FORESEEN.items() if re.search(part, reason)), None)
        rows.append(f"| {test} | {times} | {reason} | {why or 'NO'} |")
        if why is None:
            unforeseen.append(f"{test}: {reason}")
    return "\n".join(rows), unforeseen


def main() -> int:
    """Print the table; return 1 where a skip was not foreseen."""
    path = Path(sys.argv[1])
    text, unforeseen = table(path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
    print(f"skipped tests:\n{text}")
    if unforeseen:
        print("not foreseen (install what is missing in .ci/packages, or say why not here):")
        print("\n".join(unforeseen))
    return 1 if unforeseen else 0


if __name__ == "__main__":
    raise SystemExit(main())
