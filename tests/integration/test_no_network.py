"""Nothing is fetched, sent or looked up, at import or at run time, unless the user names a hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Python imports a module of this name before anything else. Processes of one host may still meet.
WATCH = """
import os, socket

def seen(what, address):
    host = address[0] if isinstance(address, tuple) else address
    if host is None or str(host).startswith("127.") or host in ("::1", "localhost", ""):
        return
    if isinstance(address, tuple) or what == "lookup":
        with open(os.environ["SEEN"], "a") as file:
            file.write(f"{what} {address}\\n")
        raise OSError(f"the test forbids it: {what} {address}")

def watched(name, what, place):
    before = getattr(place, name)
    def call(*args, **kwargs):
        seen(what, args[1] if what == "connect" else args[0])
        return before(*args, **kwargs)
    setattr(place, name, call)

for name in ("connect", "connect_ex"):
    watched(name, "connect", socket.socket)
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    watched(name, "lookup", socket)
"""
# One process does what a user does with one run.
WORK = """
import importlib, io, pkgutil, shutil, sys
import spt_ds
for module in pkgutil.walk_packages(spt_ds.__path__, "spt_ds."):
    importlib.import_module(module.name)
from spt_ds import cli
small = ["--set", "train.max_steps=1", "--set", "train.global_batch=2", "--set", "data.workers=0"]
for split in ("train", "valid", "test"):
    small += ["--set", f"data.max_{split}_examples=4"]
short = ["--set", "generate.max_new_tokens=2"]
sys.stdin = io.StringIO("i ski.\\n\\nhi\\n/quit\\n")
for words in (
    ["config", "demo"],
    ["plan", "--config", "demo"],
    ["train", "--config", "demo", "--run-dir", "run", *small],
    ["generate", "run", *short],
    ["evaluate", "run"],
    ["summary", "run"],
    ["compare", "run", "other"],
    ["report", "run"],
    ["quantize", "embedded", "base-4-bits"],
    ["chat", "run", *short],
):
    if words[0] == "compare":
        shutil.copytree("run", "other")
    code = cli.main(words)
    assert code == 0, (words, code)
print("all done")
"""


def run(folder: Path, code: str, *prefix: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run Python code with the watch in place; return the process and what the watch saw."""
    (folder / "watch").mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    seen = folder / "seen"
    seen.touch()
    here = str(Path(__file__).resolve().parents[2])
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(folder / "watch"), here]),
        "SEEN": str(seen),
        "HF_HOME": str(folder / "hub"),
        "SPT_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done, seen.read_text(encoding="utf-8")


def test_a_run_from_import_to_chat_asks_for_no_address(tmp_path: Path) -> None:
    done, seen = run(tmp_path, WORK)
    assert done.returncode == 0, done.stderr
    assert "all done" in done.stdout
    assert seen == ""
    assert not list(tmp_path.glob("hub/**/*.json"))


def test_a_host_without_any_network_is_enough(tmp_path: Path) -> None:
    """Also for what does not go through Python's sockets: the kernel has none to offer."""
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let root make namespaces")
    prefix = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    done, seen = run(tmp_path, WORK, *prefix)
    assert done.returncode == 0, done.stderr
    assert seen == ""


def test_the_watch_sees_a_base_of_the_hub(tmp_path: Path) -> None:
    code = (
        "from spt_ds.config.model import ModelConfig\n"
        "from spt_ds.model.loading import load_base_config\n"
        "load_base_config(ModelConfig(base='somebody/something'))\n"
    )
    done, seen = run(tmp_path, code)
    assert "ModelError: model.base: no configuration can be read from" in done.stderr
    assert "huggingface" in seen
