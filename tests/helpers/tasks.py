"""Small files in the forms of LaMP and PersonaMem."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

LABELS = ("red", "blue", "green")
HINTS = ("fire", "the sea", "grass")  # of each label: nothing but practice says which is whose
FILLER = ("the box", "a cup", "my hat", "his coat", "the chair")


def lamp_files(folder: Path, split: str, questions: int, seed: int = 0) -> Path:
    """Write `SPLIT_questions.json` and its answers: the label follows from what the profile's items
    have in common, and the question tells nothing of it.
    """
    draw = random.Random(seed)
    asked, golds = [], []
    for number in range(questions):
        kind = number % len(LABELS)
        profile = [
            {"id": f"{number}-{n}", "text": draw.choice(FILLER), "tag": HINTS[kind]}
            for n in range(2)
        ]
        key = str(100 + number)
        asked.append(
            {"id": key, "input": f"which colour has {draw.choice(FILLER)} ?", "profile": profile}
        )
        golds.append({"id": key, "output": LABELS[kind]})
    path = folder / f"{split}_questions.json"
    path.write_text(json.dumps(asked, indent=1), encoding="utf-8")
    answers = {"task": "LaMP_2M", "golds": golds}
    (folder / f"{split}_outputs.json").write_text(json.dumps(answers), encoding="utf-8")
    return path


COLUMNS = (
    *("persona_id", "question_id", "question_type", "user_question_or_message"),
    *("correct_answer", "all_options", "shared_context_id", "end_index_in_shared_context"),
)


def personamem_row(number: int, context: str, end: int, **more: Any) -> dict[str, Any]:
    """A row of the questions; the right answer is the second."""
    return {
        "persona_id": number // 2,
        "question_id": f"q{number}",
        "question_type": "recall",
        "user_question_or_message": "User: What do I like?",
        "correct_answer": "(b)",
        "all_options": str(["(a) You like tea.", "(b) You like skiing.", "(c) It's unclear."]),
        "shared_context_id": context,
        "end_index_in_shared_context": end,
        **more,
    }


def personamem_files(
    folder: Path, rows: list[dict[str, Any]], contexts: dict[str, Any], size: str = "32k"
) -> Path:
    """Write `questions_SIZE.csv` and `shared_contexts_SIZE.jsonl`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / f"questions_{size}.csv"
    path.write_text(text.getvalue(), encoding="utf-8")
    lines = "".join(json.dumps({name: talk}) + "\n" for name, talk in contexts.items())
    (folder / f"shared_contexts_{size}.jsonl").write_text(lines, encoding="utf-8")
    return path


TALK = [
    {"role": "system", "content": "Current user persona: a baker."},
    {"role": "user", "content": "User: I ski every day."},
    {"role": "assistant", "content": "Good for you."},
    {"role": "system", "content": "Another day."},
    {"role": "user", "content": "I have sold my skis."},
]
