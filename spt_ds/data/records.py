"""A record, a JSON object or a row, becomes examples: its keys say how. No torch.

Every fault names `file:line` and the key. In messages the user is the partner, the assistant the
persona's owner; a system message is the beginning of the persona.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from spt_ds.config.data import SPC_COLUMNS
from spt_ds.data.dialogue import Example, replies
from spt_ds.data.spc import lines_of, spc_examples
from spt_ds.display import holds_surrogate, shown
from spt_ds.errors import DataError

MAX_TURN = 2**31 - 1  # the store keeps places of turns in 32 bits
Record = Mapping[str, Any]
# Names that files use, and what they mean.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def renamed(record: Record, columns: Mapping[str, str], origin: str) -> Record:
    """The record with our names for its keys; `columns` has its names by ours."""
    if not columns:
        return record
    for ours, theirs in columns.items():
        if theirs not in record:
            raise DataError(
                f"{origin}: no key {shown(theirs)}, which data.columns.{ours} names, among"
                f" {shown(sorted(record))}"
            )
    return {**record, **{ours: record[theirs] for ours, theirs in columns.items()}}


def form(keys: Mapping[str, Any], origin: str) -> str:
    """The form of a record with such keys; the forms of 0.1.0 come first."""
    if "turns" in keys:
        return "dialogue"
    if "response" in keys or "history" in keys:
        return "example"
    if "messages" in keys:
        return "messages"
    if "prompt" in keys or "completion" in keys:
        return "completion"
    if all(name in keys for name in SPC_COLUMNS):
        return "spc"
    raise DataError(
        f'{origin}: "response", "turns", "messages" or "prompt" is needed, got no such key among'
        f" {shown(sorted(keys))}; data.columns says which of your keys is which"
    )


def record_examples(record: Record, origin: str, name: str) -> Iterator[Example]:
    """Yield the examples of a record that `origin` (`file:line`) holds, with ids from `name`."""
    _check_characters(name, "id", origin)
    kind = form(record, origin)
    if kind == "dialogue":
        yield from _dialogue(record, origin, name)
    elif kind == "example":
        yield _example(record, origin, name)
    elif kind == "messages":
        yield from _message_examples(record, origin, name)
    elif kind == "completion":
        yield from _completion_examples(record, origin, name)
    else:
        yield from spc_examples([record[column] for column in SPC_COLUMNS], origin, name)


def _example(record: Record, origin: str, name: str) -> Example:
    history = _texts(record, "history", origin)
    response = checked_text(record.get("response"), "response", origin)
    dialogue = (
        name
        if (given := record.get("dialogue_id")) is None
        else checked_text(str(given), "dialogue_id", origin)
    )
    turn = len(history) if (given := record.get("turn")) is None else given
    # Not `isinstance`: true is an int to Python.
    if type(turn) is not int or not 0 <= turn <= MAX_TURN:
        raise DataError(
            f'{origin}: "turn" must be a whole number from 0 on, got {shown(turn)}; the'
            f" largest is {MAX_TURN}"
        )
    persona, choices = _persona(record, origin), _choices(record, response, origin)
    return Example(name, dialogue, turn, persona, history, response, choices)


def _dialogue(record: Record, origin: str, name: str) -> Iterator[Example]:
    if (first := record.get("first_speaker")) not in ("partner", "self"):
        raise DataError(
            f"{origin}: first_speaker is {shown(first)}; allowed are 'partner' and 'self' (the"
            " persona's owner)"
        )
    persona, turns = _persona(record, origin), _texts(record, "turns", origin)
    for turn, history, response in replies(turns, self_opens=first == "self"):
        yield Example(f"{name}/{turn}", name, turn, persona, history, response)


class _Talk(NamedTuple):
    """A list of messages: the system's texts, and turns that alternate."""

    system: tuple[str, ...]
    owner_opens: bool
    turns: list[str]


def _message_examples(record: Record, origin: str, name: str) -> Iterator[Example]:
    """Yield an example for each message of the assistant."""
    talk = _talk(record["messages"], "messages", origin)
    persona = (*talk.system, *_persona(record, origin, needed=False))
    for turn, history, response in replies(talk.turns, self_opens=talk.owner_opens):
        yield Example(f"{name}/{turn}", name, turn, persona, history, response)


def _completion_examples(record: Record, origin: str, name: str) -> Iterator[Example]:
    """Yield the example of a prompt and its completion, texts or lists of messages."""
    prompt, completion = record.get("prompt"), record.get("completion")
    persona = _persona(record, origin, needed=False)
    if isinstance(prompt, (list, tuple)):
        talk = _talk(prompt, "prompt", origin)
        # Speakers alternate. The user is last after an odd number of turns, or an even one where
        # the assistant opens.
        if len(talk.turns) % 2 == talk.owner_opens:
            raise DataError(
                f'{origin}: "prompt" ends with the assistant; it must end with the user'
            )
        persona, history = (*talk.system, *persona), tuple(talk.turns)
    else:
        history = (checked_text(prompt, "prompt", origin),)
    if isinstance(completion, (list, tuple)):
        answer = _talk(completion, "completion", origin)
        if answer.system or not answer.owner_opens or len(answer.turns) != 1:
            raise DataError(
                f'{origin}: "completion" must be one message of the assistant, got'
                f" {shown(completion)}"
            )
        response = answer.turns[0]
    else:
        response = checked_text(completion, "completion", origin)
    choices = _choices(record, response, origin)
    yield Example(name, name, len(history), persona, history, response, choices)


def _talk(value: object, key: str, origin: str) -> _Talk:
    """Read a list of messages; those in a row by one speaker are joined by a line end."""
    if not isinstance(value, (list, tuple)):
        raise DataError(f'{origin}: "{key}" must be a list of messages, got {shown(value)}')
    system: list[str] = []
    speakers: list[str] = []
    turns: list[str] = []
    for number, message in enumerate(value):
        role, content = message_of(message, f"{key}[{number}]", origin)
        if role == "system":
            if speakers:
                raise DataError(
                    f'{origin}: "{key}[{number}]" is a system message inside the dialogue; it is'
                    " allowed only at the beginning"
                )
            system.append(content)
        elif speakers and speakers[-1] == role:
            turns[-1] += f"\n{content}"
        else:
            speakers.append(role)
            turns.append(content)
    return _Talk(tuple(system), speakers[:1] == ["assistant"], turns)


def message_of(message: object, key: str, origin: str) -> tuple[str, str]:
    """Role and content of a message: `system`, `user` or `assistant`, and a text."""
    if not isinstance(message, Mapping):
        raise DataError(
            f'{origin}: "{key}" must be an object with "role" and "content", got {shown(message)}'
        )
    names = (
        ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    )
    given = message.get(names[0])
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise DataError(
            f'{origin}: "{key}.{names[0]}" is {shown(given)}; allowed are system, user and'
            " assistant"
        )
    content = message.get(names[1])
    if isinstance(content, (list, tuple)):
        content = "".join(
            _part(part, f"{key}.{names[1]}[{number}]", origin)
            for number, part in enumerate(content)
        )
    return role, checked_text(content, f"{key}.{names[1]}", origin)


def _part(part: object, key: str, origin: str) -> str:
    """The text of a content part, as OpenAI's API has them."""
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        raise DataError(f'{origin}: "{key}" must be a part with a "text", got {shown(part)}')
    return str(part["text"])


def _choices(record: Record, response: str, origin: str) -> tuple[str, ...]:
    """The answers to choose among, each once; none where the record lists none."""
    if record.get("choices") is None:
        return ()
    choices = tuple(dict.fromkeys(_texts(record, "choices", origin)))
    if response not in choices or len(choices) < 2:
        raise DataError(
            f'{origin}: "choices" must be two texts or more, one of them the response'
            f" {shown(response)}, got {shown(list(choices))}"
        )
    return choices


def _persona(record: Record, origin: str, needed: bool = True) -> tuple[str, ...]:
    """The sentences of a persona: a list of them, or a text with one on each line."""
    value = record.get("persona")
    if isinstance(value, str):
        _check_characters(value, "persona", origin)
        return lines_of(value)
    if value is None and not needed:
        return ()
    return _texts(record, "persona", origin)


def _texts(record: Record, key: str, origin: str) -> tuple[str, ...]:
    """The texts of a list; each must be there and not blank."""
    value = record.get(key)
    if not isinstance(value, (list, tuple)):
        got = shown(value) if key in record else f"no such key among {shown(sorted(record))}"
        raise DataError(
            f'{origin}: "{key}" must be a list of texts, got {got}; write [] where there is none'
        )
    return tuple(
        checked_text(item, f"{key}[{number}]", origin) for number, item in enumerate(value)
    )


def checked_text(value: object, key: str, origin: str) -> str:
    """A text that is not blank, without blanks around it."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{origin}: "{key}" must be a text that is not blank, got {shown(value)}')
    _check_characters(value, key, origin)
    return value.strip()


def _check_characters(value: str, key: str, origin: str) -> None:
    """A row of a hub data set comes from no JSON reader, which would have refused it."""
    if holds_surrogate(value):
        raise DataError(
            f'{origin}: "{key}" is {shown(value)}, which holds half a surrogate pair, no character'
        )
