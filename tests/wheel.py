"""`make test-wheel`: the job runs from a built wheel that is installed outside the clone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.environments import ROOT, call, install_into, make_environment

SHORT = (
    "--set=train.max_steps=2",
    "--set=train.global_batch=4",
    "--set=data.max_train_examples=8",
    "--set=data.max_valid_examples=4",
    "--set=data.max_test_examples=4",
    "--set=data.workers=0",
    "--set=generate.max_new_tokens=8",
)


def build(into: Path) -> tuple[Path, Path]:
    """Build the sdist from the clone, and the wheel from the sdist; return both."""
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", into, ROOT)
    (sdist,), (wheel,) = into.glob("*.tar.gz"), into.glob("*.whl")
    return sdist, wheel


def main() -> int:
    """Build, install and run; an exception tells what failed."""
    with tempfile.TemporaryDirectory(prefix="spt-wheel-") as name:
        folder = Path(name)
        _, wheel = build(folder / "dist")
        python = make_environment(folder / "venv")
        install_into(python, "--constraint", ROOT / "constraints.txt", wheel)
        work = folder / "work"
        work.mkdir()
        run_job(python.parent / "spt-ds", work)
    print("test-wheel: train, generate, evaluate and summary ran from the installed wheel")
    return 0


def run_job(command: Path, work: Path) -> None:
    """The main job and the shipped files, by the installed command, in an empty folder."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    environment = {**kept, "OMP_NUM_THREADS": "1", "SPT_CACHE": str(work / "cache")}

    def spt_ds(*arguments: str) -> None:
        print("$ spt-ds", *arguments, flush=True)
        subprocess.run([str(command), *arguments], cwd=work, env=environment, check=True)

    spt_ds("config")
    spt_ds("train", "--config", "demo", "--deepspeed_config", "zero3", "--run-dir", "run", *SHORT)
    spt_ds("generate", "run")
    spt_ds("evaluate", "run/generate/predictions.jsonl", "--out", "run/generate")
    spt_ds("summary", "run")
    spt_ds("slurm", "--copy", ".")
    assert os.access(work / "slurm" / "train.sbatch", os.X_OK)


if __name__ == "__main__":
    raise SystemExit(main())
