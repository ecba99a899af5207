"""Answers scored by their likelihood: equal to the float64 twin, alone and in a batch, anywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from spt_ds.batch import Batch
from spt_ds.config.generation import GenerateConfig
from spt_ds.model import choices as module
from spt_ds.model.choices import Choice, best_of, choose
from spt_ds.model.spt import Spt
from tests.helpers.tiny import EOS, examples_of, pick, random_batch, tiny_backbone, tiny_spt
from tests.helpers.twins import cross_entropy, score, target_logits
from tests.numerics.steps import twin_lm, twin_parts

# Of unlike length and number, one answer the beginning of another.
ANSWERS = [
    [[5, 9, EOS], [5, EOS], [7, 8, 9, 10, EOS]],
    [[11, EOS], [12, EOS]],
    [[20, 21, EOS], [22, EOS], [EOS], [5, 9, 30, 31, EOS]],
]
MOST = 4
POSITIONS = ["before_text", "before_reply"]


def scene(arch: str, position: str) -> tuple[object, Spt, Batch]:
    backbone = tiny_backbone(arch)
    spt = tiny_spt(backbone, prompts={"count": 3, "tokens": 2, "position": position})
    return backbone, spt, random_batch([(3, 2), (9, 3), (5, 2)])


def ours(
    arch: str, position: str, batch: Batch | None = None, mode: str = "random"
) -> list[Choice]:
    backbone, spt, whole = scene(arch, position)
    options = GenerateConfig(choices="sum", mode=mode)
    answers = ANSWERS if batch is None else [ANSWERS[index] for index in batch.indices]
    with torch.no_grad():
        found, scores = backbone(choose, spt, batch or whole, answers, options, MOST)  # type: ignore[operator]
    assert scores.shape == (3, len(answers))
    return list(found)


def expected(arch: str, position: str, prompts: list[int]) -> list[list[float]]:
    """The twin's sums: one unpadded forward for each answer, with all logits."""
    _, spt, batch = scene(arch, position)
    lm, parts = twin_lm(arch, torch.float64), twin_parts(spt)
    placement = "prefix" if position == "before_text" else "suffix"
    sums: list[list[float]] = []
    with torch.no_grad():
        for (context, _), own, k in zip(examples_of(batch), ANSWERS, prompts, strict=True):
            sums.append([])
            for answer in own:
                ids = torch.tensor(answer)
                logits = target_logits(lm, parts.prompts[k], context, ids, placement, None)
                losses = (cross_entropy(row, int(t)) for row, t in zip(logits, ids, strict=True))
                sums[-1].append(float(sum(losses)))
    return sums


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_scores_equal_the_twin(arch: str, position: str) -> None:
    found = ours(arch, position)
    assert len({choice.prompt for choice in found}) > 1, "the case must mix prompts"
    sums = expected(arch, position, [choice.prompt for choice in found])
    for choice, wanted, own in zip(found, sums, ANSWERS, strict=True):
        assert choice.nll == pytest.approx(wanted, abs=1e-11)
        assert choice.tokens == [len(answer) for answer in own]
        assert choice.best == wanted.index(min(wanted))


@pytest.mark.parametrize("position", POSITIONS)
def test_the_prompt_is_that_of_the_best_score(position: str) -> None:
    _, spt, batch = scene("llama", position)
    lm: Any = twin_lm("llama", torch.float64)
    table, parts = lm.get_input_embeddings(), twin_parts(spt)
    with torch.no_grad():
        best = [
            max(range(3), key=lambda k: float(score(parts, k, table(context))))
            for context, _ in examples_of(batch)
        ]
    assert [choice.prompt for choice in ours("llama", position, mode="select")] == best


@pytest.mark.parametrize("position", POSITIONS)
def test_an_example_alone_scores_as_in_a_batch(position: str) -> None:
    _, _, batch = scene("llama", position)
    together = ours("llama", position)
    for place in range(3):
        alone = replace(pick(batch, [place]), indices=(place,))
        (choice,) = ours("llama", position, alone)
        assert choice.nll == pytest.approx(together[place].nll, abs=1e-11)
        assert (choice.prompt, choice.best) == (together[place].prompt, together[place].best)


def test_deliberate_faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these makes numbers that look like scores."""
    right, good = module.with_replies, ours("llama", "before_reply")
    prompts = [choice.prompt for choice in good]
    sums = expected("llama", "before_reply", prompts)
    shifted = lambda batch, rows: right(batch, [*rows[1:], rows[0]])  # noqa: E731
    unended = lambda batch, rows: right(batch, [[*row[:-1], 3] for row in rows])  # noqa: E731
    for fault in (shifted, unended):
        monkeypatch.setattr(module, "with_replies", fault)
        broken = ours("llama", "before_reply")
        gap = max(
            abs(a - b)
            for choice, wanted in zip(broken, sums, strict=True)
            for a, b in zip(choice.nll, wanted, strict=True)
        )
        assert gap > 1e-3


def test_the_mean_does_not_favour_short_answers() -> None:
    assert best_of([4.0, 3.0], [8, 1], "sum") == 1
    assert best_of([4.0, 3.0], [8, 1], "mean") == 0
    assert best_of([2.0, 2.0], [1, 1], "mean") == 0, "the first of equals"
