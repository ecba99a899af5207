"""The terminal conversation over a scripted bot: commands, stops, saving."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

from spt_ds.api import Reply
from spt_ds.chat import Conversation, main, read_persona
from spt_ds.data.readers import read
from spt_ds.errors import DataError


class EchoBot:
    """Answers `echo MESSAGE` with a number that grows; `interrupt` presses Ctrl-C, `refuse` fails,
    between pieces.
    """

    prompts = 3

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[str, ...], tuple[str, ...], int | None]] = []
        self.interrupts = 0
        self.closed = 0

    def stream(
        self, persona: Sequence[str], history: Sequence[str], *, prompt: int | None = None
    ) -> Generator[str, None, Reply]:
        self.asked.append((tuple(persona), tuple(history), prompt))
        try:
            if history[-1] != "silence":
                yield "echo"
            if history[-1] == "interrupt" and not self.interrupts:
                self.interrupts += 1
                raise KeyboardInterrupt
            if history[-1] == "refuse":
                raise DataError("too long")
            if history[-1] == "silence":
                return Reply("", 0, (0.25, 0.5, 0.125), (2,), 0)
            yield f" {history[-1]} {len(self.asked)}"
        finally:
            self.closed += 1
        text = f"echo {history[-1]} {len(self.asked)}"
        return Reply(
            text,
            1 if prompt is None else prompt,
            (0.25, 0.5, 0.125),
            (7, 8, 9),
            dropped_turns=len(history) // 5,
        )


Talk = Callable[..., tuple[EchoBot, Conversation, str]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Give the lines to a conversation; return bot, conversation and what was printed."""

    def run(
        *lines: str, persona: tuple[str, ...] | None = ("i ski.",)
    ) -> tuple[EchoBot, Conversation, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        bot = EchoBot()
        conversation = Conversation(bot, persona)  # type: ignore[arg-type]
        conversation.run()
        return bot, conversation, capsys.readouterr().out

    return run


def test_turns_alternate_and_show_their_prompt(talk: Talk) -> None:
    bot, conversation, out = talk("hi", "", "  and you?  ")
    assert bot.asked[0] == (("i ski.",), ("hi",), None)
    assert bot.asked[1] == (("i ski.",), ("hi", "echo hi 1", "and you?"), None)
    assert "echo hi 1\n  [prompt 1; scores 0.250 0.500 0.125; 3 tokens]" in out
    assert len(conversation.turns) == 2


def test_forgotten_turns_are_told(talk: Talk) -> None:
    _, _, out = talk("a", "b", "c")
    assert out.count("no longer fit") == 1
    assert "the oldest 1 turns no longer fit" in out


def test_persona_is_typed_first(talk: Talk) -> None:
    bot, _, out = talk("i ski.", "i sing.", "", "hi", persona=None)
    assert bot.asked == [(("i ski.", "i sing."), ("hi",), None)]
    assert "persona of 2 sentences" in out


def test_another_persona_keeps_the_turns(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "persona.txt"
    path.write_text("i cook.\n\n  i row.\n", encoding="utf-8")
    bot, conversation, _ = talk("hi", f"/persona {path}", "yes", "/persona", "", "no")
    assert [asked[0] for asked in bot.asked] == [("i ski.",), ("i cook.", "i row."), ()]
    assert bot.asked[1][1] == ("hi", "echo hi 1", "yes")
    assert [turn.persona for turn in conversation.turns] == [asked[0] for asked in bot.asked]


def test_reset_and_retry(talk: Talk) -> None:
    bot, conversation, out = talk("/retry", "hi", "more", "/retry", "/reset", "/retry", "new")
    assert [asked[1] for asked in bot.asked] == [
        ("hi",),
        ("hi", "echo hi 1", "more"),
        ("hi", "echo hi 1", "more"),
        ("new",),
    ]
    assert out.count("nothing was said yet") == 2
    assert [turn.reply.text for turn in conversation.turns] == ["echo new 4"]


@pytest.mark.parametrize("message", ["interrupt", "refuse"])
def test_a_reply_without_end_is_no_turn(talk: Talk, message: str) -> None:
    bot, conversation, out = talk("hi", message, "/retry", "go on")
    before = ("hi", "echo hi 1")
    assert bot.asked[1][1] == bot.asked[2][1] == (*before, message)
    if message == "interrupt":  # the second time it is answered
        assert "[stopped" in out
        assert bot.asked[3][1] == (*before, message, "echo interrupt 3", "go on")
    else:
        assert out.count("error: too long") == 2
        assert bot.asked[3][1] == (*before, "go on")
    assert bot.closed == 4
    assert len(conversation.turns) == (3 if message == "interrupt" else 2)


def test_prompt_is_fixed_until_auto(talk: Talk) -> None:
    bot, _, out = talk(
        "/prompt 2", "a", "/prompt 3", "/prompt -1", "/prompt", "b", "/prompt auto", "c"
    )
    assert [asked[2] for asked in bot.asked] == [2, 2, None]
    assert out.count("prompt 2 (fixed); scores") == 2
    assert out.count("give 0 to 2, or auto") == 2


def test_saved_dialogue_is_data(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    talk("hi", f"/save {path}", "more", f"/save {path}")
    examples = list(read(str(path)))
    assert [example.history for example in examples] == [("hi",), ("hi", "echo hi 1", "more")]
    assert [example.response for example in examples] == ["echo hi 1", "echo more 2"]
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert line["persona"] == ["i ski."]
    assert [(example.dialogue_id, example.turn) for example in examples] == [
        ("talk", 1),
        ("talk", 3),
    ]
    assert (line["prompt"], line["scores"], line["new_tokens"]) == (1, [0.25, 0.5, 0.125], 3)


def test_a_reply_without_words_is_no_turn(talk: Talk, tmp_path: Path) -> None:
    """Neither training nor the next context could read it."""
    path = tmp_path / "talk.jsonl"
    bot, conversation, out = talk("hi", "silence", "/retry", "more", f"/save {path}")
    assert "no words, 1 tokens; the message is taken back" in out
    assert [asked[1][-1] for asked in bot.asked] == ["hi", "silence", "silence", "more"]
    assert bot.asked[3][1] == ("hi", "echo hi 1", "more")
    assert len(list(read(str(path)))) == len(conversation.turns) == 2


def test_save_leaves_other_files_alone(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("precious", encoding="utf-8")
    _, _, out = talk("hi", f"/save {path}", f"/save {tmp_path / 'no' / 'folder.jsonl'}", "/save")
    assert path.read_text(encoding="utf-8") == "precious"
    assert out.count("cannot be written") == 2
    assert "name a file" in out


def test_quit_help_and_unknown(talk: Talk) -> None:
    bot, _, out = talk("/help", "/sing", "/quit", "never said")
    assert bot.asked == []
    assert "/retry" in out
    assert "/sing: no such command" in out


def test_bytes_that_are_no_text_end_neither_the_chat_nor_the_dialogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is left out with a message; what the terminal cannot encode is printed escaped."""
    bot, path, out = EchoBot(), tmp_path / "talk.jsonl", io.BytesIO()
    said = (
        b"i ski.\n\xff\ni sing.\n\nhi\ncaf\xe9\ncaf\xc3\xa9 \x1b[2J\n" + f"/save {path}\n".encode()
    )
    monkeypatch.setattr("spt_ds.api.open_bot", lambda *_: bot)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said), encoding="utf-8"))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert main(["run"]) == 0
    assert bot.asked == [
        (("i ski.", "i sing."), ("hi",), None),
        (("i ski.", "i sing."), ("hi", "echo hi 1", "café \x1b[2J"), None),
    ]
    sys.stdout.flush()
    shown = out.getvalue().decode("ascii")
    assert shown.count("error: the line holds bytes that are not UTF-8 and is left out") == 2
    assert r"echo caf\xe9 \x1b[2J 2" in shown
    assert "\x1b" not in shown
    assert next(example.response for example in read(str(path))) == "echo hi 1"


@pytest.mark.parametrize(
    "line",
    [
        "/persona ~no-such-user/x",
        "/persona a\0b",
        "/save a\0b",
        "/save " + "x" * 5000,
        "/prompt " + "9" * 5000,
        "/prompt ²",
        "/" + "x" * 5000,
        "/\x1b[2J",
    ],
)
def test_commands_that_no_one_means(talk: Talk, line: str) -> None:
    _, conversation, out = talk(line, "hi")
    assert len(conversation.turns) == 1
    assert "\x1b" not in out


def test_persona_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        read_persona(tmp_path / "nowhere.txt")
    path = tmp_path / "latin.txt"
    path.write_bytes("i ski.\ncafé".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_persona(path)
