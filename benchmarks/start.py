"""CPU seconds of the start of `spt-ds train`, in this checkout and in others that take turns.

    git worktree add ../spt-0.1.0 97d1fa6^
    python benchmarks/start.py ../spt-0.1.0 [--rounds 7]

A start is a process from its first instruction to the moment when its ranks would meet: all imports
are done, nothing of the base is read. Beside it comes what `import torch` and the base class of
transformers' models take by themselves. What only tests bring is hidden (`--hide`): transformers
imports scipy wherever it is installed. The median of the rounds counts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
REPORT = """
import os, resource, sys
from importlib.machinery import PathFinder
class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in os.environ["HIDDEN"].split(","):
            return super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
def report(*_):
    used = resource.getrusage(resource.RUSAGE_SELF)
    print("CPU", used.ru_utime + used.ru_stime, len(sys.modules), flush=True)
    raise SystemExit
"""
# Every release so far calls `join` behind its imports.
START = (
    f"{REPORT}\nimport spt_ds.train\nspt_ds.train.join = report\nspt_ds.train.main(sys.argv[1:])"
)
LIBRARIES = f"{REPORT}\nimport torch, transformers.modeling_utils\nreport()"


def measured(code: str, checkout: Path, folder: str, hidden: str) -> tuple[float, int]:
    """CPU seconds and loaded modules of one process."""
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", "demo", "--run-dir", f"{folder}/run"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "HIDDEN": hidden,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("CPU "))
    return float(line.split()[1]), int(line.split()[2])


def main() -> None:
    """Print a line for each case and, last, all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("others", nargs="*", type=Path, help="other checkouts to start")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hide", default="scipy,PIL", help="packages that are not to be found")
    args = parser.parse_args()
    cases = {str(path): (START, path.resolve()) for path in args.others}
    cases |= {"this checkout": (START, HERE), "libraries alone": (LIBRARIES, HERE)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    modules: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        # The first round fills the caches of files and bytecode, and is not counted.
        for number in range(args.rounds + 1):
            for name, (code, checkout) in cases.items():
                used, modules[name] = measured(code, checkout, folder, args.hide)
                if number:
                    seconds[name].append(used)
    found = {}
    for name, each in seconds.items():
        found[name] = {
            "median_cpu_s": round(statistics.median(each), 2),
            "least_cpu_s": round(min(each), 2),
            "modules": modules[name],
        }
        print(f"{name}: {found[name]}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
