"""The audit recognises each kind of retriever on banks that are made for it."""

from __future__ import annotations

import html
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spt_ds.audit.command import _row_of
from spt_ds.audit.gate import network, post_hoc_gates, ridge
from spt_ds.audit.judge import Audit, best_single, entropy, judge, kind_accuracy
from spt_ds.audit.measured import Measured, Text
from spt_ds.audit.prompts import describe
from spt_ds.audit.text import lines
from spt_ds.audit.verdict import Verdict, verdict
from spt_ds.errors import DataError
from spt_ds.report.runs import read_runs
from spt_ds.report.sections.audit import audits

DIALOGUES, TURNS, PROMPTS, FEATURES = 60, 5, 4, 12
COUNT = DIALOGUES * TURNS


def bank(told: float, noise: float = 1.0, seed: int = 0) -> Measured:
    """A bank whose best prompt follows from the context (`told` nats a token) and from the reply
    alone (`noise`); its retriever is still to be made.
    """
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(COUNT, FEATURES))
    tokens = draw.integers(5, 25, COUNT).astype(float)
    kinds = features[:, :PROMPTS].argmax(axis=1)
    rates = (
        3.0 + 0.2 * noise * draw.normal(size=(COUNT, PROMPTS)) + 0.5 * draw.normal(size=(COUNT, 1))
    )
    rates[np.arange(COUNT), kinds] -= told
    losses = rates * tokens[:, None]
    texts = [
        Text((f"p{n}",), ("hi", f"turn {n}"), f"reply {n}", f"d{n // TURNS}") for n in range(COUNT)
    ]
    return Measured(
        losses, tokens, losses.mean(axis=1), np.zeros_like(losses), {"embeddings": features}, texts
    )


def kinds_of(measured: Measured) -> list[str]:
    return [f"kind {k}" for k in measured.features["embeddings"][:, :PROMPTS].argmax(axis=1)]


def audited(measured: Measured, **more: Any) -> tuple[Verdict, Audit]:
    audit = judge(measured, post_hoc_gates(measured), more.get("others", {}), more.get("kinds", ()))
    return verdict(audit), audit


def with_scores(measured: Measured, scores: np.ndarray) -> Measured:
    return replace(measured, scores=np.asarray(scores, dtype=float))


def random_scores(measured: Measured) -> Measured:
    return with_scores(measured, np.random.default_rng(9).normal(size=measured.losses.shape))


def kind_scores(measured: Measured) -> Measured:
    return with_scores(measured, measured.features["embeddings"][:, :PROMPTS])


@pytest.mark.parametrize("told", [0.0, 0.5])
def test_a_random_retriever_chooses_by_chance(told: float) -> None:
    found, audit = audited(random_scores(bank(told)))
    assert found.word == "by chance", found
    assert audit.usage_entropy is not None
    assert audit.usage_entropy > 0.95
    assert abs(audit.accuracy - audit.accuracy_by_chance) < 0.1


@pytest.mark.parametrize("told", [0.0, 0.5])
def test_a_collapsed_retriever_is_one_prompt(told: float) -> None:
    measured = bank(told)
    scores = np.zeros((COUNT, PROMPTS))
    scores[:, 2] = 1.0
    scores[0] = [2.0, 0.0, 1.0, 0.0]  # but for one example
    found, audit = audited(with_scores(measured, scores))
    assert found.word == "collapsed"
    assert "prompt 2" in found.sentence
    assert audit.usage == [1, 0, COUNT - 1, 0]


def test_a_retriever_that_knows_the_reply_is_recognised() -> None:
    measured = bank(0.0)
    found, audit = audited(with_scores(measured, -measured.losses))
    assert found.word == "knows the reply", found
    assert audit.accuracy == 1.0
    share = next(row.share_of_gap for row in audit.rows if row.name == "selected prompt")
    assert share is not None
    assert share == pytest.approx((1.0, 1.0, 1.0))


def test_the_best_choice_is_no_oracle_where_the_context_tells_it() -> None:
    measured = bank(2.0, noise=0.1)
    found, audit = audited(with_scores(measured, -measured.losses))
    assert audit.accuracy == 1.0
    assert found.word == "earns its keep", found


def test_a_retriever_that_reads_the_kind_earns_its_keep() -> None:
    measured = kind_scores(bank(0.5))
    found, audit = audited(measured, kinds=kinds_of(measured))
    assert found.word == "earns its keep", found
    assert audit.kind_accuracy == 1.0
    gates = {row.name: row for row in audit.rows if row.r2 is not None}
    assert len(gates) == 2
    for row in gates.values():
        assert row.r2 is not None
        assert row.r2 > 0.2
        assert row.share_of_gap is not None
        assert row.share_of_gap[0] > 0.4


def test_a_gate_finds_nothing_where_the_context_tells_nothing() -> None:
    for row in audited(random_scores(bank(0.0)))[1].rows:
        if row.r2 is not None:
            assert row.r2 < 0.05
            assert row.share_of_gap is not None
            assert row.share_of_gap[1] < 0.1


@pytest.mark.filterwarnings("error")
def test_prompts_that_are_the_same_everywhere_leave_no_r2() -> None:
    measured = bank(0.0)
    same = replace(measured, losses=np.repeat(measured.tokens[:, None], PROMPTS, axis=1))
    audit = audited(random_scores(same))[1]
    gates = [row for row in audit.rows if row.name.startswith("gate")]
    assert len(gates) == 2
    assert [row.r2 for row in gates] == [None, None]
    assert json.loads(json.dumps(asdict(audit), allow_nan=False))


def test_better_than_chance_is_not_enough() -> None:
    measured = bank(0.0)
    losses = measured.losses.copy()
    losses[:, 0] -= 0.6 * measured.tokens  # one prompt is best for all
    scores = np.random.default_rng(3).normal(size=losses.shape)
    scores[:, 0] += 1.5  # it is chosen often, the others by chance
    found, _ = audited(replace(measured, losses=losses, scores=scores))
    assert found.word == "no better than one", found


def test_a_choice_worse_than_chance_is_named() -> None:
    measured = bank(0.5)
    found, _ = audited(with_scores(measured, measured.losses))
    assert found.word == "worse than chance", found


def test_another_run_must_be_beaten_too() -> None:
    measured = kind_scores(bank(0.5))
    selected = measured.of(measured.selected)
    worse, equal = selected + 0.3 * measured.tokens, selected + np.tile([0.1, -0.1], COUNT // 2)
    found, audit = audited(measured, others={"pt": worse})
    assert found.word == "earns its keep"
    assert "pt" in found.sentence
    assert audit.against["pt"].difference == pytest.approx(-0.3)
    found, _ = audited(measured, others={"pt": worse, "pt-longer": equal})
    assert found.word == "no better than another run", found
    assert "pt-longer" in found.sentence


def test_one_prompt_has_nothing_to_choose() -> None:
    measured = bank(0.0)
    one = replace(measured, losses=measured.losses[:, :1], scores=measured.scores[:, :1])
    found, audit = audited(one)
    assert found.word == "one prompt"
    assert audit.usage_entropy is None
    assert "\n".join(lines(found, audit, describe(one), []))


def test_the_best_single_prompt_is_not_chosen_on_the_replies_that_judge_it() -> None:
    """On noise alone, the best of many prompts looks better than the mean where it was chosen."""
    chosen, there = [], []
    for seed in range(20):
        measured = bank(0.0, seed=seed)
        mean = measured.losses.mean(axis=1)
        chosen.append((measured.of(best_single(measured)) - mean).sum() / measured.tokens.sum())
        there.append((measured.losses.sum(axis=0).min() - mean.sum()) / measured.tokens.sum())
    assert np.mean(there) < -0.01
    assert abs(np.mean(chosen)) < 0.01


@pytest.mark.parametrize("fit", [ridge, network])
def test_a_gate_learns_what_is_there(fit: Any) -> None:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(400, 20))
    targets = features @ draw.normal(size=(20, 3)) + 0.1 * draw.normal(size=(400, 3))
    found = fit(features[:300], targets[:300], features[300:])
    rest = np.square(found - targets[300:]).sum() / np.square(targets[300:]).sum()
    assert rest < 0.15
    assert np.array_equal(found, fit(features[:300], targets[:300], features[300:]))


def test_entropy_and_kind_accuracy() -> None:
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(1.0)
    assert entropy(np.array([0, 9, 0])) == 0.0
    assert kind_accuracy({"a": [8, 2], "b": [1, 9]}) == pytest.approx(0.85)
    assert kind_accuracy({"a": [10, 0], "b": [10, 0]}) == pytest.approx(0.5)


def test_typical_examples_are_those_of_the_largest_gain() -> None:
    measured = kind_scores(bank(0.5))
    gains = measured.losses.mean(axis=1, keepdims=True) - measured.losses
    gains /= measured.tokens[:, None]
    for k, prompt in enumerate(describe(measured)):
        own = np.flatnonzero(measured.selected == k)
        assert prompt.typical[0].gain == pytest.approx(gains[own, k].max())
        assert prompt.typical[0].reply == f"reply {own[gains[own, k].argmax()]}"


def test_text_and_json_hold_the_verdict() -> None:
    measured = kind_scores(bank(0.5))
    found, audit = audited(measured, others={"pt": measured.losses.mean(axis=1)})
    text = "\n".join(lines(found, audit, describe(measured), []))
    assert text.startswith(found.sentence)
    for part in ("best single prompt", "selected minus pt", "gate fitted afterwards", "prompt 3:"):
        assert part in text
    assert json.loads(json.dumps(audit.to_json()))["prompts"] == PROMPTS


def test_the_report_shows_an_audit_and_refuses_a_damaged_one(tmp_path: Path) -> None:
    measured = kind_scores(bank(0.5))
    found, audit = audited(measured)
    (tmp_path / "config.yaml").write_text("name: kinds\n")
    (run,) = read_runs([tmp_path])
    assert "spt-ds audit" in audits([run])
    content = {"checkpoint": "step-9", "verdict": asdict(found), **audit.to_json()}
    (tmp_path / "audit.json").write_text(json.dumps(content))
    page = audits([run])
    assert html.escape(found.sentence) in page
    assert page.count("<tr>") == len(audit.rows) + 1
    (tmp_path / "audit.json").write_text(json.dumps({**content, "usage": "many"}))
    with pytest.raises(DataError, match=r"audit\.json: usage is 'many'; run `spt-ds audit` again"):
        audits([run])


def test_runs_of_one_name_keep_rows_of_their_own() -> None:
    paths = [Path("a/pt"), Path("b/pt"), Path("a/lora")]
    assert [_row_of(path, paths) for path in paths] == ["a/pt", "b/pt", "lora"]
