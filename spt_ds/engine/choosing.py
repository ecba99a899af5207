"""The lines of a predictions file whose replies were chosen among given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spt_ds.data.loader import make_batch
from spt_ds.data.store import ExampleStore
from spt_ds.engine.session import Session
from spt_ds.errors import DataError
from spt_ds.model.choices import Choice, choose


def line_head(index: int, row: dict[str, Any]) -> dict[str, Any]:
    """What a line tells of its example: `row` of the store."""
    line = {key: row[key] for key in ("id", "dialogue_id", "turn", "persona", "history")}
    line = {"index": index, **line, "reference": row["response"]}
    return line | ({"choices": row["choices"]} if row["choices"] else {})


def chosen_lines(
    session: Session, store: ExampleStore, rows: Sequence[int], passes: int
) -> list[dict[str, Any]]:
    """One line for each example of `rows`; with a sharded base all ranks must come along.

    Raises DataError for an example without answers to choose among.
    """
    found = [store[index] for index in rows]
    choices, scores = _choices(session, store, rows, [_answers(row) for row in found], passes)
    columns = scores.T.float().cpu().tolist()
    return [
        {**line_head(index, row), **_told(row, choice, column)}
        for index, row, choice, column in zip(rows, found, choices, columns, strict=True)
    ]


def _choices(
    session: Session,
    store: ExampleStore,
    rows: Sequence[int],
    answers: list[list[list[int]]],
    passes: int,
) -> tuple[list[Choice], torch.Tensor]:
    batch, options = make_batch(store, rows), session.config.generate
    with torch.no_grad():
        out: tuple[list[Choice], torch.Tensor] = session.backbone(
            choose, session.spt, batch, answers, options, passes
        )
    return out


def _answers(row: dict[str, Any]) -> list[list[int]]:
    if not row["choice_ids"]:
        raise DataError(
            f"{row['id']}: generate.choices is set, and the example lists no answers to choose"
            ' among; give it "choices", or set data.choices for all that have none'
        )
    return list(row["choice_ids"])


def _told(row: dict[str, Any], choice: Choice, scores: list[float]) -> dict[str, Any]:
    reply = row["choices"][choice.best]
    reference = row["choices"].index(row["response"])
    return {
        "raw": reply,
        "reply": reply,
        "clean": "none",
        "prompt": choice.prompt,
        "scores": [round(score, 6) for score in scores],
        "new_tokens": choice.tokens[choice.best],
        "context_tokens": row["context_len"],
        "nll_sum": choice.nll[reference],
        "nll_tokens": choice.tokens[reference],
        "choice_nll": choice.nll,
        "choice_tokens": choice.tokens,
    }
