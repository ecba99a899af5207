"""Runs commands of the documents in a folder, those of spt_ds and of Python in this process."""

from __future__ import annotations

import argparse
import io
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

from spt_ds.cli import main
from tests.helpers.fake_trackers import Server, modules
from tests.helpers.pages import bash
from tests.helpers.ranks import free_port
from tests.helpers.shell_blocks import ours, words_of

# Programs that bash runs: they read and write nothing but the folder.
PLAIN = ("cat", "echo", "eval", "head", "ls", "printf")
SAID = "hi, how are you?\n/quit\n"
PERSONA = {"role": "system", "content": "i like to ski."}
ASKED = {"messages": [PERSONA, {"role": "user", "content": "hi!"}], "max_tokens": 4}


class Parsed(Exception):
    """The arguments of a script were accepted."""


class Shell:
    """A folder in which commands run; `short` has the options that make a long one short.

    `short` maps a pattern of a command's words to what is appended. The first that matches counts.
    """

    def __init__(self, place: Path, short: Mapping[str, str], patch: pytest.MonkeyPatch) -> None:
        self.place, self.short, self.patch = place, short, patch
        patch.chdir(place)
        patch.setattr("spt_ds.costs.command._in_own_process", measured_here)
        # In another process it tries each backend, for many seconds.
        patch.setattr("spt_ds.doctor._backends", lambda: iter(()))
        for name, module in modules(Server(place / "trackers.jsonl")).items():
            patch.setitem(sys.modules, name, module)

    def run(self, command: str) -> None:
        """Run `command` as it is printed, but shorter."""
        variables, words = words_of(command)
        for name, value in variables.items():
            self.patch.setenv(name, value)
        own = ours(words)
        if words[0] in PLAIN:
            bash(command, self.place)
        elif own is not None and own[0] == "serve":
            self.serve(own, asks)
        elif own is not None:
            self.spt_ds(own)
        elif words[0] == "python":
            assert self.python(words[1:]) == 0, command
        else:
            pytest.fail(
                f"nothing says how to test {command!r}: give its fence another language, such as"
                " text, if it is no command; else add it to CANNOT with the reason why it cannot"
                " run here, and with what is checked instead"
            )

    def shorter(self, words: list[str]) -> list[str]:
        line = " ".join(words)
        more = next((more for key, more in self.short.items() if re.search(key, line)), "")
        return [word for word in words if word != "OPTIONS"] + shlex.split(more)

    def spt_ds(self, words: list[str]) -> None:
        words = self.shorter(words)
        self.patch.setattr("sys.stdin", io.StringIO(SAID))
        assert main(words) == 0, shlex.join(words)

    def python(self, words: list[str]) -> Any:
        """Run a script or a module as the main program; return its exit code."""
        module = words[0] == "-m"
        words = self.shorter(words[module:])
        self.patch.setattr("sys.argv", words)
        try:
            if module:
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            return end.code or 0
        return 0

    def accepted(self, command: str) -> None:
        """The parser of a Python script accepts the words of a command; no more of it runs."""
        parse = argparse.ArgumentParser.parse_args

        def stop(parser: argparse.ArgumentParser, *args: Any) -> None:
            parse(parser, *args)
            raise Parsed

        _, words = words_of(command)
        with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(Parsed):
            self.python(words[1:])

    def serve(self, words: list[str], ask: Callable[[str], None]) -> None:
        """Serve, call `ask` with the address as soon as there is an answer, and stop as Ctrl-C."""
        port, ended = free_port(), threading.Event()
        url, wrong = f"http://127.0.0.1:{port}", [AssertionError("was not asked")]

        def call() -> None:
            while not ended.wait(0.05) and not is_up(url):
                pass
            if ended.is_set():
                return
            try:
                ask(url)
                wrong.clear()
            except Exception as error:
                wrong[:] = [AssertionError(repr(error))]
            os.kill(os.getpid(), signal.SIGINT)

        caller = threading.Thread(target=call, daemon=True)
        caller.start()
        try:
            code = main([*words, "--port", str(port)])
        finally:
            ended.set()
            caller.join(20)
        assert code == 0, shlex.join(words)
        if wrong:
            raise wrong[0]


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def asks(url: str) -> None:
    """Ask for one reply, with the key that the environment has."""
    key = os.environ.get("SPT_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    got = httpx.post(f"{url}/v1/chat/completions", json=ASKED, headers=headers, timeout=60)
    assert got.status_code == 200, got.text
    assert got.json()["choices"][0]["message"]["role"] == "assistant"


def measured_here(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    """What `spt-ds bench` does in a process of its own, in this one: seconds less for each case."""
    from spt_ds.costs.command import SUBJECTS, _subject

    subject, function = _subject(args)
    assert function == SUBJECTS[args.subject][1]
    return {"case": case, "prompts": prompts, **getattr(subject, function)(case, prompts, args)}


def made_by(command: str) -> list[Path]:
    """What a command makes and refuses to find: it is not there when its block begins."""
    _, words = words_of(command)
    own = ours(words) if words else None
    if not own:
        return []
    if own[0] in ("export", "import"):
        return [Path(own[3])]
    if own[0] != "train":
        return []
    if "--run-dir" in own:
        return [Path(own[own.index("--run-dir") + 1])]
    return [Path("runs") / own[own.index("--config") + 1].removesuffix(".yaml")]


def fresh(command: str) -> None:
    """Remove what `command` makes from the folder."""
    for path in made_by(command):
        if not path.is_absolute():
            shutil.rmtree(path, ignore_errors=True)
