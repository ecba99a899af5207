"""Run folders as a report reads them, written without training."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

MALICE = (
    '<script>document.title="owned"</script><img src="http://evil.example/x"'
    ' onerror="document.title=1">&amp; "\''
)
PERSONA = ["i like dogs .", MALICE]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metric_lines() -> list[dict[str, Any]]:
    """Steps 1, 10, 20, 30: half a second a step, validation of 7 s after steps 0 and 20."""
    clock, lines = (
        1000.0,
        [{"step": 0, "kind": "valid", "time": 1000.0, "nll_selected": 5.0, "nll": 5.1}],
    )
    for before, step in pairwise((0, 1, 10, 20, 30)):
        clock += 60.0 if step == 1 else 0.5 * (step - before)  # the first step warms up
        lines.append(
            {
                "step": step,
                "kind": "train",
                "time": clock,
                "loss": 9.0 - step / 10,
                "nll": 4.0,
                "selection": 0.1,
                "lr": 1e-3,
                "odd<key>": 1.5,
                "prompt_usage": [step % 7, 1, 0],
            }
        )
        if step == 20:
            clock += 7.0
            lines.append(
                {"step": 20, "kind": "valid", "time": clock, "nll_selected": 4.25, "nll": 4.5}
            )
    return lines


def prediction(index: int, reply: str, prompt: int | None) -> dict[str, Any]:
    scores = [0.2, 0.3, 0.1]
    return {
        "index": index,
        "id": f"d{index // 2}/{index % 2}",
        "dialogue_id": f"d{index // 2}",
        "turn": 2 * (index % 2),
        "persona": PERSONA,
        "history": ["hello " + MALICE, "hi"] * (index % 2),
        "reference": "i like my two dogs",
        "raw": reply,
        "prompt": prompt,
        "scores": scores[: 3 if prompt is not None else 0],
    }


REPLIES = ["i like my two dogs", "i like cats", "", "two\nQ: more", "i like " + MALICE, "my dogs"]


def make_run(folder: Path, *, config: str = "name: tiny\n", replies: bool = True) -> Path:
    """A run folder; `replies` adds predictions."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    write_lines(folder / "metrics.jsonl", metric_lines())
    (folder / "environment.json").write_text(
        json.dumps({"packages": {"torch": "2.13.0"}, "machine": {"host": MALICE, "cpus": 2}})
    )
    (folder / "DONE.json").write_text(json.dumps({"step": 30, "best_step": 20, "world_size": 2}))
    (folder / "deepspeed.json").write_text('{"bf16": "</pre><script>"}')
    if replies:
        (folder / "generate").mkdir()
        rows = [prediction(index, reply, index % 2) for index, reply in enumerate(REPLIES)]
        write_lines(folder / "generate" / "predictions.jsonl", rows)
    return folder
