"""The image, as far as it can be checked without Docker."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PINNED = re.compile(r"[\w./-]+:\d[\w.]*\d[\w.-]*")  # a tag that begins with a release


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the file and its text; comments left out, continued lines joined."""
    lines = [line for line in TEXT.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    parts = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, rest in parts]


def of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def sent(name: str) -> bool:
    """Whether .dockerignore lets a file into the build: the last pattern that fits decides."""
    allowed = True
    parts = name.split("/")
    above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip().removeprefix("!")
        if pattern and not pattern.startswith("#"):
            tail = pattern.removeprefix("**/")
            names = parts if tail != pattern else above if "/" in pattern else above[:1]
            if any(fnmatch.fnmatchcase(one, tail) for one in names):
                allowed = line.startswith("!")
    return allowed


def copied() -> list[tuple[Path, str]]:
    """What the image gets from the clone, and where to."""
    return [
        (ROOT / source, target)
        for rest in of("COPY")
        for *sources, target in [shlex.split(rest)]
        for source in sources
    ]


def test_bases_are_pinned() -> None:
    assert of("FROM") == ["${BASE}"]
    (default,) = (rest.removeprefix("BASE=") for rest in of("ARG") if rest.startswith("BASE="))
    page = (ROOT / "docs/how-to/container.md").read_text(encoding="utf-8")
    named = re.findall(r"BASE=([\w./:-]+)", TEXT.partition("\nFROM")[0] + page)
    assert {default, "nvidia/cuda:13.0.1-devel-ubuntu24.04"} == {default, *named}
    assert all(PINNED.fullmatch(base) for base in [default, *named])
    assert not PINNED.fullmatch("python:latest")
    assert not PINNED.fullmatch("python")


def test_nothing_is_fetched_but_by_the_package_managers() -> None:
    assert of("ADD") == []
    for command in of("RUN"):
        assert not re.search(r"https?:|curl|wget|git clone|sudo|--trusted-host", command)
        if "pip install" in command:
            assert "--constraint constraints.txt" in command
            assert "--no-cache-dir" in command
        for part in re.findall(r"apt-get install[^&;]*", command):
            assert "--no-install-recommends" in part
            assert "rm -rf /var/lib/apt/lists/*" in command


def test_shell_lines_parse() -> None:
    for command in of("RUN"):
        assert subprocess.run(["sh", "-n", "-c", command]).returncode == 0, command


def test_it_ends_as_a_user_without_rights() -> None:
    assert of("USER")[-1] not in ("root", "0")
    words = [word for word, _ in instructions()]
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert "RUN" not in words[words.index("USER") :]


def test_nothing_secret_is_copied_or_asked_for() -> None:
    for name in ("ARG", "ENV"):
        for rest in of(name):
            assert not re.search(r"TOKEN\b|KEY|SECRET|PASSWORD", rest, re.I), rest
    for source, _ in copied():
        assert source.exists(), source
        assert sent(source.relative_to(ROOT).as_posix()), source
    for name in (
        ".git/config",
        ".env",
        "runs/demo/config.yaml",
        "slurm/site.env",
        "spt_ds/__pycache__/cli.pyc",
        "spt_ds/.env",
        "id_rsa",
    ):
        assert not sent(name), name


def test_what_is_copied_is_enough_to_install(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for source, target in copied():
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "site.env")
            shutil.copytree(source, clone / target, ignore=ignored)
        else:
            clone.mkdir(exist_ok=True)
            shutil.copy(source, clone / target)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", tmp_path, clone], check=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "spt_ds/cli.py" in names
    assert "spt_ds/_shipped/ds_configs/zero3.json" in names
    assert any(name.startswith("spt_ds/assets/base/") for name in names)
    extras = next(rest for rest in of("ARG") if rest.startswith("EXTRAS=")).partition("=")[2]
    metadata = next(name for name in names if name.endswith("/METADATA"))
    known = re.findall(
        r"^Provides-Extra: (.+)$", zipfile.ZipFile(wheel).read(metadata).decode(), re.M
    )
    assert set(extras.split(",")) <= set(known)


def test_the_entry_point_answers(capfd: pytest.CaptureFixture[str]) -> None:
    (program,) = json.loads(of("ENTRYPOINT")[-1])
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    (module,) = re.findall(rf'"{program} = ([\w.]+):main"', setup)
    words = [sys.executable, "-m", module, *json.loads(of("CMD")[-1])]
    assert subprocess.run(words, cwd=ROOT, timeout=60).returncode == 0
    assert "usage: spt-ds COMMAND" in capfd.readouterr().out


def test_the_development_container() -> None:
    settings = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert PINNED.fullmatch(settings["image"])
    assert settings["remoteUser"] != "root"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(VENV)", ".venv")
    script, make = settings["postCreateCommand"].split(" && ")
    assert (ROOT / script.removeprefix("sudo ")).is_file()
    assert f"\n{make.removeprefix('make ')}:" in makefile
