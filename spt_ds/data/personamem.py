"""PersonaMem: a long history, a question, and answers to choose among. No torch.

Jiang et al. 2025, arXiv 2504.14225. `questions_X.csv` has a question in each row, and
`shared_contexts_X.jsonl` beside it has the histories: `{id: [{role, content}, ...]}` a line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spt_ds.data.csv_file import rows_of
from spt_ds.data.dialogue import Example
from spt_ds.data.records import checked_text, message_of
from spt_ds.data.textfile import file_beside, lines
from spt_ds.display import shown
from spt_ds.errors import DataError
from spt_ds.json_input import parse_object

_CONTEXT, _END = "shared_context_id", "end_index_in_shared_context"
_ASKED, _RIGHT, _OPTIONS = "user_question_or_message", "correct_answer", "all_options"
COLUMNS = ("persona_id", "question_id", _ASKED, _RIGHT, _OPTIONS, _CONTEXT, _END)
_LABEL = re.compile(r"\(([a-z])\)\s*", re.IGNORECASE)
_NAMES = {"user": "User", "assistant": "Assistant"}
_LONGEST_LIST = 1 << 20  # characters of a cell: Python's own reader of literals is no fast one


def is_personamem(header: str) -> bool:
    """Whether a CSV with this first line is a file of questions."""
    return _CONTEXT in header and _END in header


def read_personamem(path: Path) -> Iterator[Example]:
    """Yield an example of each question.

    The messages before it are sentences of the persona, so that `data.overflow: retrieve` finds
    those that matter. All questions of one persona are one dialogue: they are no independent draws.
    """
    beside = contexts_of(path)
    contexts = _contexts(beside)
    for origin, row in rows_of(path, _check_header):
        context = row[_CONTEXT]
        if context not in contexts:
            raise DataError(f'{origin}: "{_CONTEXT}" is {shown(context)}, which {beside} lacks')
        messages = contexts[context]
        end = row[_END].strip()
        if not end.isdecimal() or len(end) > 9 or int(end) > len(messages):
            raise DataError(
                f'{origin}: "{_END}" is {shown(end)}; the context has {len(messages)} messages'
            )
        choices, answer = _choices(row, origin)
        asked = checked_text(row[_ASKED], _ASKED, origin)
        name = f"{path.name}:{checked_text(row['question_id'], 'question_id', origin)}"
        dialogue = f"{path.name}:{checked_text(row['persona_id'], 'persona_id', origin)}"
        yield Example(name, dialogue, 1, messages[: int(end)], (asked,), answer, choices)


def contexts_of(path: Path) -> Path:
    """The file of histories beside a file of questions."""
    return file_beside(path, "questions", "shared_contexts", ".jsonl")


def _check_header(header: list[str], origin: str) -> None:
    if missing := [name for name in COLUMNS if name not in header]:
        raise DataError(
            f"{origin}: the header lacks {missing}, got {shown(header)}; PersonaMem has"
            f" {list(COLUMNS)}"
        )


def _contexts(path: Path) -> Mapping[str, tuple[str, ...]]:
    """The messages of each history as sentences, by its id."""
    contexts: dict[str, tuple[str, ...]] = {}
    for number, line in lines(path):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        for name, messages in parse_object(origin, line, "a line is {id: [messages]}").items():
            if not isinstance(messages, list):
                raise DataError(
                    f'{origin}: "{name}" must be a list of messages, got {shown(messages)}'
                )
            if name in contexts:
                raise DataError(f"{origin}: context {shown(name)} again; an id has one history")
            contexts[name] = tuple(
                _sentence(message, f"{name}[{place}]", origin)
                for place, message in enumerate(messages)
            )
    return contexts


def _sentence(message: object, key: str, origin: str) -> str:
    """A message behind its speaker's name, which the official files already write."""
    role, content = message_of(message, key, origin)
    name = _NAMES.get(role, "")
    return content if not name or content.startswith(f"{name}:") else f"{name}: {content}"


def _choices(row: Mapping[str, str], origin: str) -> tuple[tuple[str, ...], str]:
    """The answers without their letters, each once, and the right one."""
    options = _list(row[_OPTIONS], origin)
    labels = [_LABEL.match(option) for option in options]
    texts = [
        checked_text(option[match.end() :] if match else option, _OPTIONS, origin)
        for option, match in zip(options, labels, strict=True)
    ]
    right = row[_RIGHT].strip()
    letter = _LABEL.fullmatch(right)
    wanted = letter[1].lower() if letter else right.lower()
    places = [n for n, label in enumerate(labels) if label and label[1].lower() == wanted]
    places = places or [n for n, text in enumerate(texts) if right in (text, options[n])]
    if len(places) != 1 or len(set(texts)) < 2:
        raise DataError(
            f'{origin}: "{_RIGHT}" is {shown(right)}, which must be one of two answers or more in'
            f' "{_OPTIONS}", got {shown(options)}'
        )
    return tuple(dict.fromkeys(texts)), texts[places[0]]


def _list(cell: str, origin: str) -> list[str]:
    """The list that a cell holds, as Python or as JSON writes it."""
    value: Any = None
    if len(cell) <= _LONGEST_LIST:
        try:
            value = ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        raise DataError(f'{origin}: "{_OPTIONS}" must be a list of texts, got {shown(cell)}')
    return value
