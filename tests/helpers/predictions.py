"""A small predictions file, and ways to change it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spt_ds.evaluate import text_metrics

TALK = [  # (dialogue, raw, reference, prompt)
    ("a", "i like dogs .\nQ: and you ?", "i like my dogs .", 0),
    ("a", "me too", "me too , a lot", 1),
    ("b", "", "hello there", 1),
    ("b", "i am a nurse .", "i work as a nurse .", 1),
    ("c", "i like dogs .", "cats are nice .", 3),
]


def lines() -> list[dict[str, Any]]:
    """A small valid file as objects."""
    return [
        {
            "index": place,
            "id": f"{dialogue}-{place}",
            "dialogue_id": dialogue,
            "turn": place,
            "persona": ["i like dogs ."],
            "history": ["hi"],
            "reference": reference,
            "raw": raw,
            "reply": text_metrics.clean(raw),
            "prompt": prompt,
            "scores": [0.1, 0.2, 0.3, 0.4],
            "new_tokens": 4 + place,
            "context_tokens": 20,
        }
        for place, (dialogue, raw, reference, prompt) in enumerate(TALK)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def changed(edit: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    rows = lines()
    edit(rows)
    return rows


def set_field(row: int, name: str, value: object) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[row].update({name: value})


def drop_field(row: int, name: str) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[row].pop(name)
