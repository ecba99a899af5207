"""Draws inputs for a target, counts what they give, and keeps the smallest that breaks it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.judge import Target, judge


class Finding(AssertionError):
    """An input that gives neither a value nor one of our own errors; its cause is chained."""


@dataclass
class Drawn:
    """What the inputs of one target gave."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        return self.outcomes.total()


def draw(target: Target, examples: int, number: int | None = None) -> Drawn:
    """Try so many inputs, always the same ones or those that belong to `number`.

    A finding is made as small as hypothesis can, written into the corpus, and raised.
    """
    drawn, last = Drawn(), b""

    def attempt(content: bytes) -> None:
        nonlocal last
        last = content
        drawn.outcomes[judge(target, content)] += 1

    test = settings(
        max_examples=examples,
        derandomize=number is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )(given(target.inputs)(attempt))
    began = time.monotonic()
    try:
        (test if number is None else seed(number)(test))()
    except Exception as error:
        raise Finding(f"{target.name} is broken by {target.keep(last)}") from error
    drawn.seconds = time.monotonic() - began
    return drawn


def replay(target: Target) -> Drawn:
    """Try the inputs of the corpus."""
    drawn = Drawn()
    for path in target.corpus:
        try:
            drawn.outcomes[judge(target, path.read_bytes())] += 1
        except Exception as error:
            raise Finding(f"{target.name} is broken by {path}") from error
    return drawn
