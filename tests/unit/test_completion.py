"""Completion as a shell gives it: words are typed into a real bash and a real zsh."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spt_ds.cli import COMMANDS, entry, main
from spt_ds.config.load import key_paths, recipe_names
from spt_ds.config.schema import Config
from spt_ds.run.completion import parser_of

ROOT = Path(__file__).resolve().parents[2]
STARTS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
SETUP = {
    "bash": "bind 'set enable-bracketed-paste off'; bind 'set bell-style none'",
    "zsh": "bindkey -e; unset zle_bracketed_paste; unsetopt beep; autoload -U compinit;"
    # Typed ahead, a Tab would be a letter.
    " compinit -u -D; zstyle ':completion:*' insert-tab false; setopt no_auto_remove_slash",
}


class Shell:
    """An interactive shell in a terminal of its own."""

    def __init__(self, name: str, script: Path) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "dumb", "PS1": "> ", "HISTFILE": "", "INPUTRC": "/dev/null"}
            os.chdir(script.parent)
            os.execvp(STARTS[name][0], STARTS[name])
        self.typed(f'{SETUP[name]}; eval "$(cat {script.name})"; echo re""ady\n', r"\nready\r")

    def typed(self, keys: str, until: str) -> str:
        """Type `keys` and return what is shown until a pattern is seen."""
        os.write(self.terminal, keys.encode())
        shown, end = "", time.monotonic() + 60
        while not re.search(until, shown):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.terminal], [], [], left)[0]:
                raise AssertionError(f"no {until!r} in {shown!r}")
            shown += os.read(self.terminal, 65536).decode(errors="replace")
        return shown

    def completed(self, line: str) -> str:
        """What one Tab makes of a line: Ctrl-A and Ctrl-E put a command around it, to print it."""
        answer = r"\n\[([^\n]*)\]\r\n"
        shown = self.typed(f"{line}\t\x01printf '[%s]\\n' '\x05'\n", answer)
        return re.findall(answer, shown)[-1]

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.fixture(scope="module", params=["bash", "zsh"])
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "spt_ds.cli", "completion", request.param]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (folder / "mine.yaml").write_text("name: mine\n", encoding="utf-8")
    (folder / "notes.txt").write_text("", encoding="utf-8")
    (folder / "runs").mkdir()
    path = folder / f"completion.{request.param}"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shell(script: Path) -> Iterator[Shell]:
    shell = Shell(script.suffix[1:], script)
    yield shell
    shell.close()


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("spt-ds tr", "spt-ds train "),
        ("spt-ds export v", "spt-ds export vllm "),
        ("spt-ds generate --base", "spt-ds generate --base-alone "),
        ("spt-ds train --config cli", "spt-ds train --config clients "),
        ("spt-ds train --config mine", "spt-ds train --config mine.yaml "),
        ("spt-ds config llama-2-70", "spt-ds config llama-2-70b-4bit "),
        # No blank after a key: its value follows.
        ("spt-ds train --set losses.tau_g", "spt-ds train --set losses.tau_gold="),
        (
            "spt-ds chat --set generate.top_k=3 --pers",
            "spt-ds chat --set generate.top_k=3 --persona ",
        ),
        ("spt-ds summary ru", "spt-ds summary runs/"),
        ("spt-ds nonsens", "spt-ds nonsens"),
    ],
)
def test_tab(shell: Shell, script: Path, line: str, completed: str) -> None:
    # zsh takes its blank back when the cursor leaves the word.
    expected = completed.rstrip(" ") if script.suffix == ".zsh" else completed
    assert shell.completed(line) == expected


def candidates(script: Path, *words: str) -> set[str]:
    """What bash offers for the last of some words."""
    ask = (
        '. "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _spt_ds 2>/dev/null;'
        " printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    command = ["bash", "--norc", "-c", ask, str(script), "spt-ds", *words]
    done = subprocess.run(
        command, cwd=script.parent, capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_nothing_is_left_out(script: Path) -> None:
    if script.suffix == ".zsh":
        text = script.read_text(encoding="utf-8")
        assert all(name in text for name in [*recipe_names(), *key_paths(Config)])
        return
    assert candidates(script, "") == set(COMMANDS)
    for name in COMMANDS:
        known = {
            option for action in parser_of(entry(name))._actions for option in action.option_strings
        }
        assert candidates(script, name, "-") == known, name
    assert candidates(script, "train", "--set", "") == {f"{key}=" for key in key_paths(Config)}
    offered = candidates(script, "train", "--config", "")
    assert offered == {*recipe_names(), "mine.yaml", "runs/"}


def test_a_parser_is_made_and_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    kept = argparse.ArgumentParser.parse_args
    for name in COMMANDS:
        assert parser_of(entry(name)).prog == f"spt-ds {name}"
    assert argparse.ArgumentParser.parse_args is kept
    assert capsys.readouterr() == ("", "")


def test_the_parsers_of_all_commands_need_no_torch() -> None:
    code = (
        "import sys; from spt_ds.cli import main; main(['completion', 'zsh']);"
        " sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_without_shtab_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'spt-ds[completion]'" in capsys.readouterr().err
