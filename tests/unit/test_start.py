"""What a command loads before it works, counted in modules: seconds depend on the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each takes from tenths of a second to seconds, and training on local files needs none of them.
# transformers loads scipy by itself.
UNNEEDED = (
    "bitsandbytes, bm25s, datasets, deepspeed, matplotlib, nltk, pandas, peft, rouge_score,"
    " sklearn, tensorboard, tensorflow, torchvision, transformers.trainer"
)
# The command up to the point where its ranks meet.
START = f"""
import gc, sys
from importlib import import_module
command = import_module(sys.argv[1])
def join(*_):
    print(sorted(set("{UNNEEDED}".split(", ")) & sys.modules.keys()))
    print("transformers.modeling_utils" in sys.modules, "pyarrow" in sys.modules)
    print(gc.isenabled(), gc.get_freeze_count() > 100_000)
    sys.exit(7)
command.join = join
command.main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    "words", ["spt_ds.train --config demo", "spt_ds.generate tests/data/run_0_1_0/run"]
)
def test_a_start_loads_what_it_needs_alone(words: str) -> None:
    command = [sys.executable, "-c", START, *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 7, done.stderr
    unneeded, needed, collector = done.stdout.splitlines()
    assert unneeded == "[]"
    assert needed == "True True"  # else the two others would be empty promises
    # It rested while objects were made that live to the end, and works again.
    assert collector == "True True"


def test_a_process_that_has_its_libraries_keeps_its_garbage() -> None:
    code = (
        "import gc, sys; from spt_ds.run.command import large_imports\n"
        "sys.modules['torch'] = None\n"
        "with large_imports(): assert gc.isenabled()\n"
        "sys.exit(gc.get_freeze_count() > 100)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("wanted", [True, False])
def test_the_collector_is_left_as_it_was_found(wanted: bool) -> None:
    """Also where an import fails, and where somebody has switched the collector off."""
    code = (
        f"import gc; gc.{'enable' if wanted else 'disable'}()\n"
        "from spt_ds.run.command import large_imports\n"
        "try:\n    with large_imports(): raise ImportError\nexcept ImportError: pass\n"
        f"raise SystemExit(gc.isenabled() is not {wanted})"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
