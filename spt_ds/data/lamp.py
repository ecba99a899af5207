"""LaMP: a user's profile and a question, and a label or a text as the answer. No torch.

Salemi et al. 2023, arXiv 2304.11406. `X_questions.json` is a list of `{id, input, profile}`, and
`X_outputs.json` beside it is `{task, golds: [{id, output}]}`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spt_ds.data.dialogue import Example
from spt_ds.data.json_array import objects_of
from spt_ds.data.records import checked_text
from spt_ds.data.textfile import file_beside, readable
from spt_ds.display import shown
from spt_ds.errors import DataError
from spt_ds.json_input import MAX_FILE_BYTES, parse_object


def read_lamp(path: Path) -> Iterator[Example]:
    """Yield an example of each question; each item of the profile is a sentence of the persona.

    A question is a dialogue of its own: in the official files each is another user's.
    """
    beside = outputs_of(path)
    answers = _answers(beside)
    for origin, question in objects_of(path):
        key = _id(question, origin)
        if key not in answers:
            raise DataError(f"{origin}: question {shown(key)} has no answer in {beside}")
        asked = checked_text(question.get("input"), "input", origin)
        name = f"{path.name}:{key}"
        yield Example(name, name, 1, _profile(question, origin), (asked,), answers[key])


def outputs_of(path: Path) -> Path:
    """The file of answers beside a file of questions."""
    return file_beside(path, "questions", "outputs", path.suffix)


def _answers(path: Path) -> dict[str, str]:
    """The answer of each question by its id."""
    with readable(path), path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; divide the task")
    golds = parse_object(str(path), content, "it is {task, golds: [{id, output}]}").get("golds")
    if not isinstance(golds, list):
        raise DataError(f'{path}: "golds" must be a list of {{id, output}}, got {shown(golds)}')
    answers: dict[str, str] = {}
    for number, gold in enumerate(golds):
        origin = f"{path}: golds[{number}]"
        if not isinstance(gold, dict):
            raise DataError(f"{origin} must be an object with id and output, got {shown(gold)}")
        key = _id(gold, origin)
        if key in answers:
            raise DataError(f"{origin}.id is {shown(key)} again; each question has one answer")
        answers[key] = checked_text(_spelled(gold.get("output")), "output", origin)
    return answers


def _id(record: dict[str, Any], origin: str) -> str:
    return checked_text(_spelled(record.get("id")), "id", origin)


def _profile(question: dict[str, Any], origin: str) -> tuple[str, ...]:
    profile = question.get("profile")
    if not isinstance(profile, list):
        raise DataError(f'{origin}: "profile" must be a list of objects, got {shown(profile)}')
    items = (_item(item, f"profile[{n}]", origin) for n, item in enumerate(profile))
    return tuple(item for item in items if item)


def _item(item: Any, key: str, origin: str) -> str:
    """An item as one sentence: its fields but the id, each behind its name, the shortest first.

    So a label stands before the text that it is of. An item of one field is that field alone.
    """
    if not isinstance(item, dict):
        raise DataError(f'{origin}: "{key}" must be an object, got {shown(item)}')
    fields = {}
    for name, value in item.items():
        text = _spelled(value)
        if name == "id" or value is None or text == "":
            continue
        # A line end would make two sentences of it.
        fields[name] = " ".join(checked_text(text, f"{key}.{name}", origin).split())
    if len(fields) == 1:
        return next(iter(fields.values()))
    ordered = sorted(fields.items(), key=lambda field: len(field[1]))
    return "; ".join(f"{name}: {text}" for name, text in ordered)


def _spelled(value: Any) -> Any:
    """A number as text, as some files write labels and ids."""
    return str(value) if type(value) in (int, float) else value
