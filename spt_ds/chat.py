"""`spt-ds chat RUN`: a conversation in the terminal, or with lines from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spt_ds.display import holds_surrogate
from spt_ds.errors import DataError, SptError
from spt_ds.log import say_loading, show
from spt_ds.run.command import add_overrides, large_imports, run_command

if TYPE_CHECKING:
    from spt_ds.api import Bot, Reply

MAX_PERSONA_BYTES = 1 << 20  # what a model reads of it is far less
HELP = """\
  /persona [FILE]  another persona, from FILE (a sentence a line) or typed; the turns stay
  /reset           begin the dialogue again
  /retry           answer the last message again
  /prompt [K]      always answer with prompt K; `/prompt auto` goes back to generate.mode
  /save FILE       write the dialogue as JSONL, which training reads too
  /help            this list
  /quit            leave, as the end of input does
Anything else is said to the bot. Ctrl-C stops a reply."""


@dataclass(frozen=True)
class Turn:
    """One message and its answer, with what was known when it was given."""

    persona: tuple[str, ...]
    history: tuple[str, ...]  # the message last
    reply: Reply


class Quit(Exception):
    """Raised by /quit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Talk until the input ends; return the exit code."""
    parser = argparse.ArgumentParser(prog="spt-ds chat", description="Talk with a trained run.")
    parser.add_argument("run", type=Path, help="run folder of a training")
    parser.add_argument("--checkpoint", default="best", help="best, last, or the number of a step")
    parser.add_argument(
        "--persona",
        type=Path,
        metavar="FILE",
        help="the bot's persona, a sentence a line; else typed",
    )
    add_overrides(parser, "override an option, such as generate.do_sample=true")
    return run_command(parser, argv, _talk)


def _talk(args: argparse.Namespace) -> None:
    persona = read_persona(args.persona) if args.persona else None
    say_loading()
    with large_imports():
        import spt_ds.engine.generator  # noqa: F401 (what opening a bot loads)
        from spt_ds.api import open_bot

    bot = open_bot(args.run, args.checkpoint, args.overrides)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (lines can be edited and recalled; not on every system)
    Conversation(bot, persona).run()


def read_persona(path: Path) -> tuple[str, ...]:
    """Return the sentences of a text file, one a line; raise DataError where it cannot be read."""
    try:
        with Path(os.path.expanduser(path)).open("rb") as file:
            content = file.read(MAX_PERSONA_BYTES + 1)
        if len(content) > MAX_PERSONA_BYTES:
            raise ValueError(f"larger than {MAX_PERSONA_BYTES >> 20} MiB")
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # not UTF-8, or a name that no file can have
        raise DataError(
            f"{path}: no persona can be read ({error}); give a UTF-8 text, a sentence a line"
        ) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


class Conversation:
    """Reads lines, answers them and obeys commands; input and output are those of the process."""

    def __init__(self, bot: Bot, persona: tuple[str, ...] | None) -> None:
        """`persona` None asks for it first."""
        self.bot = bot
        self.persona = persona
        self.turns: list[Turn] = []
        self.unanswered: str | None = None  # the last message, when its reply was stopped or failed
        self.prompt: int | None = None  # None: as generate.mode says
        self._saved: set[Path] = set()

    def run(self) -> None:
        """Go on until /quit or the end of the input."""
        commands = {
            "/persona": self._persona,
            "/reset": self._reset,
            "/retry": self._retry,
            "/prompt": self._prompt,
            "/save": self._save,
            "/help": self._help,
            "/quit": self._quit,
        }
        while True:
            try:
                if self.persona is None:
                    self._persona("")
                    print("Say something, or /help.")
                line = _line("> ")
                word, _, rest = line.partition(" ")
                if not line.startswith("/"):
                    self._say(line)
                elif word in commands:
                    commands[word](rest.strip())
                else:
                    show(f"{word}: no such command; /help lists them")
            except SptError as error:
                print(f"error: {error}")
            except KeyboardInterrupt:
                print()  # the line is dropped; a reply was stopped in _say
            except (EOFError, Quit):
                print()
                return

    def _say(self, message: str) -> None:
        if not message:
            return
        history: list[str] = (
            [*self.turns[-1].history, self.turns[-1].reply.text] if self.turns else []
        )
        history.append(message)
        # Noted before the reply is asked for, so that /retry has it after a stop or an error.
        persona, self.unanswered = self.persona or (), message
        try:
            # Closed at once: a generator that is only dropped may decode on in its thread.
            with contextlib.closing(
                self.bot.stream(persona, history, prompt=self.prompt)
            ) as pieces:
                reply = _show(pieces)
        except KeyboardInterrupt:
            print("\n  [stopped; the message is taken back, /retry asks it again]")
            return
        if not reply.text:
            print(
                f"  [no words, {len(reply.tokens)} tokens; the message is taken back, /retry asks"
                " it again]"
            )
            return
        self.unanswered = None
        self.turns.append(Turn(persona, tuple(history), reply))
        print(f"\n  [{_summary(reply, self.prompt is not None)}]")

    def _persona(self, path: str) -> None:
        if path:
            self.persona = read_persona(Path(path))
        else:
            print("The bot's persona, a sentence a line; an empty line ends it.")
            sentences = []
            while sentence := _line("persona> "):
                sentences.append(sentence)
            self.persona = tuple(sentences)
        print(f"  [persona of {len(self.persona)} sentences]")

    def _reset(self, _: str) -> None:
        self.turns, self.unanswered = [], None
        print("  [a new dialogue]")

    def _retry(self, _: str) -> None:
        if self.unanswered is None and self.turns:
            self.unanswered = self.turns.pop().history[-1]
        if self.unanswered is None:
            print("  [nothing was said yet]")
        else:
            self._say(self.unanswered)

    def _prompt(self, number: str) -> None:
        if number == "auto":
            self.prompt = None
        elif number.isdecimal() and len(number) < 10 and int(number) < self.bot.prompts:
            self.prompt = int(number)
        elif number:
            show(f"/prompt {number}: give 0 to {self.bot.prompts - 1}, or auto")
            return
        print(f"  [prompt {'auto' if self.prompt is None else self.prompt}]")

    def _save(self, name: str) -> None:
        if not name:
            raise DataError("/save: name a file")
        path = Path(os.path.expanduser(name))
        try:
            # A file of another origin is not overwritten; one that this conversation wrote is
            # brought up to date.
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                lines = (
                    json.dumps(_record(turn, path.stem), ensure_ascii=False) + "\n"
                    for turn in self.turns
                )
                file.writelines(lines)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(f"{path}: cannot be written ({why}); give another name") from error
        self._saved.add(path)
        show(f"  [{len(self.turns)} turns in {path}]")

    def _help(self, _: str) -> None:
        print(HELP)

    def _quit(self, _: str) -> None:
        raise Quit


def _line(prompt: str) -> str:
    """Read a line; one whose bytes are no text is left out, and the next is asked for."""
    while holds_surrogate(line := input(prompt).strip()):
        print(
            "error: the line holds bytes that are not UTF-8 and is left out; set the terminal to"
            " UTF-8, or save what is piped in as UTF-8"
        )
    return line


def _show(pieces: Generator[str, None, Reply]) -> Reply:
    """Print pieces as they come and return what the generator returns."""
    while True:
        try:
            # Not a `for` loop, which throws away what the generator returns.
            show(next(pieces), end="")
        except StopIteration as end:
            reply: Reply = end.value
            return reply


def _summary(reply: Reply, fixed: bool) -> str:
    answered = (
        "all prompts, fused"
        if reply.prompt is None
        else f"prompt {reply.prompt}{' (fixed)' if fixed else ''}"
    )
    scores = " ".join(f"{score:.3f}" for score in reply.scores)
    dropped = (
        f"; the oldest {reply.dropped_turns} turns no longer fit" if reply.dropped_turns else ""
    )
    return f"{answered}; scores {scores}; {len(reply.tokens)} tokens{dropped}"


def _record(turn: Turn, dialogue: str) -> dict[str, object]:
    reply = turn.reply
    return {
        "dialogue_id": dialogue,
        "turn": len(turn.history),
        "persona": turn.persona,
        "history": turn.history,
        "response": reply.text,
        "prompt": reply.prompt,
        "scores": [round(score, 6) for score in reply.scores],
        "new_tokens": len(reply.tokens),
    }
