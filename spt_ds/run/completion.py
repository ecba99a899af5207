"""Completion of `spt-ds` in bash and zsh, written from the commands' own parsers by shtab."""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spt_ds.config.load import key_paths, recipe_names
from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError

SHELLS = ("bash", "zsh")
Main = Callable[[Sequence[str]], int]

# Shell functions for what no parser knows: recipes beside files, and the keys of `--set`, which are
# followed by `=` and not by a blank.
FUNCTIONS = {
    "bash": """
_spt_ds_config() {{
  compgen -W {recipes} -- "$1"
  compgen -f -X '!*.y*ml' -- "$1"
  compgen -d -S / -- "$1"
}}
_spt_ds_key() {{
  compgen -W {keys} -S = -- "$1"
}}
""",
    "zsh": """
_spt_ds_config() {{
  local recipes=({recipes})
  compadd -a recipes
  _files -g '*.y(a|)ml'
}}
_spt_ds_key() {{
  local keys=({keys})
  compadd -S = -a keys
}}
""",
}
# bash asks in a subshell, which cannot say that no blank is to follow.
BASH_END = """
_spt_ds() {
  _shtab_spt_ds "$@"
  [[ ${COMPREPLY[0]-} != *[=/] ]] || compopt -o nospace
}
complete -o bashdefault -F _spt_ds spt-ds
"""


class _Made(Exception):
    """Carries a parser out of the command that made it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(main: Main) -> argparse.ArgumentParser:
    """Return the parser that a command's `main` makes; nothing is parsed and nothing runs."""

    def keep(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        raise _Made(parser)

    # A command makes its parser where it is called, so that the others start without it. It ends
    # here at the first thing that it does with it.
    parse_args = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = keep  # type: ignore[assignment, method-assign]
    try:
        main([])
    except _Made as made:
        return made.parser
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    raise RuntimeError(f"{main} parsed no arguments")


def whole_parser(commands: Mapping[str, tuple[Main, str]]) -> argparse.ArgumentParser:
    """Return one parser of all commands: of each its `main` and a line of help."""
    whole = argparse.ArgumentParser(prog="spt-ds")
    whole.add_argument("-V", "--version", action="store_true", help="print the version")
    forms = whole.add_subparsers(metavar="COMMAND")
    for name, (main, help_text) in commands.items():
        forms.add_parser(name, help=help_text)
        forms.choices[name] = _marked(parser_of(main))
    return whole


def script(shell: str, commands: Mapping[str, tuple[Main, str]]) -> str:
    """Return the text that a shell is to evaluate. Raises ConfigError without package shtab."""
    try:
        shtab = importlib.import_module("shtab")
    except ImportError as error:
        raise ConfigError(
            "package shtab is not installed; install it with: pip install 'spt-ds[completion]'"
        ) from error
    quote = shlex.quote if shell == "bash" else str
    words = {"recipes": recipe_names(), "keys": list(key_paths(Config))}
    functions = FUNCTIONS[shell].format(
        **{name: quote(" ".join(values)) for name, values in words.items()}
    )
    text: str = shtab.complete(whole_parser(commands), shell, preamble=functions)
    return text + (BASH_END if shell == "bash" else "")


def _marked(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Say of each argument what completes it, where the parser's choices do not."""
    for action in _actions(parser):
        function = None
        if action.dest == "overrides" and action.nargs != 0:
            function = dict.fromkeys(SHELLS, "_spt_ds_key")
        elif action.dest == "config" and action.type is not Path:
            function = dict.fromkeys(SHELLS, "_spt_ds_config")
        elif action.type is Path:
            function = {"bash": "_shtab_compgen_files", "zsh": "_files"}
        if function:
            action.complete = function
        # shtab takes any mapping of choices for sub-commands.
        elif action.choices and not isinstance(action, argparse._SubParsersAction):
            action.choices = list(action.choices)
    return parser


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """The arguments of a parser and of the parsers below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
