"""What sdist and wheel hold; `make test-wheel` runs the job from the installed one."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

from tests.helpers.environments import ROOT
from tests.wheel import build

FOLDERS = {"ds_configs": "_shipped/ds_configs", "slurm": "_shipped/slurm"}


def test_sdist_and_wheel_hold_what_the_package_reads(tmp_path: Path) -> None:
    sdist, wheel = build(tmp_path)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"ds_configs/zero3.json", "slurm/train.sbatch", "constraints.txt"} <= packed
    assert not any(name.startswith(("runs/", ".venv")) for name in packed)

    with zipfile.ZipFile(wheel) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        expected = [path for path in (ROOT / "spt_ds").rglob("*") if path.is_file()]
        names = {
            f"spt_ds/{path.relative_to(ROOT / 'spt_ds').as_posix()}"
            for path in expected
            if "__pycache__" not in path.parts
        }
        for source, target in FOLDERS.items():
            files = [file for file in (ROOT / source).iterdir() if file.name != "site.env"]
            names |= {f"spt_ds/{target}/{file.name}" for file in files}
            for file in files:
                entry = entries[f"spt_ds/{target}/{file.name}"]
                assert archive.read(entry) == file.read_bytes()
                mode = entry.external_attr >> 16
                assert bool(mode & 0o100) == bool(file.stat().st_mode & 0o100), file
        shipped = {name for name in entries if ".dist-info/" not in name}
    assert shipped == names
