"""Makes the example of docs/gallery from the run of `make demo`.

    python docs/gallery/make.py runs/demo

writes `demo.html`, and what Chromium shows of it at two widths. The name and the system of the
machine are left out.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from spt_ds.report.command import page
from spt_ds.report.runs import read_runs

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "demo.html"
WIDTHS, HEIGHT = (1280, 400), 2400
# What a reader of a report needs; checkpoints are not read.
FILES = ("config.yaml", "metrics.jsonl", "DONE.json", "environment.json", "audit.json")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def copy_run(run: Path, to: Path) -> None:
    """Copy what the report reads, without the name and the system of the machine."""
    to.mkdir()
    for name in FILES:
        if (run / name).exists():
            shutil.copy(run / name, to)
    shutil.copytree(run / "generate", to / "generate")
    path = to / "environment.json"
    environment = json.loads(path.read_text(encoding="utf-8"))
    environment["machine"] |= {"host": "example", "system": "Linux"}
    path.write_text(json.dumps(environment), encoding="utf-8")


def picture(width: int, profile: Path) -> None:
    """Write what a browser of that width shows, in light mode."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit("the pictures are taken by Chromium, which is not installed")
    shot = profile / f"{width}.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={profile}"]
    command += [f"--window-size={width},{HEIGHT}", f"--screenshot={shot}", PAGE.as_uri()]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    with Image.open(shot) as image:
        image.convert("RGB").save(FOLDER / f"demo-{width}.webp", quality=80, method=6)


def main() -> int:
    """Write the page and its pictures from the run that the command line names."""
    run = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / run.name
        copy_run(run, copy)
        PAGE.write_text(page(read_runs([copy])).replace(str(copy), str(run)), encoding="utf-8")
        for width in WIDTHS:
            picture(width, Path(name))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
