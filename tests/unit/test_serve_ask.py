"""Bodies of requests: what they mean, and that nothing else than a refusal comes of nonsense."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_ds.config.generation import GenerateConfig
from spt_ds.serve.ask import Ask, Refused, Rules, read_ask

RULES = Rules("bank", 4, GenerateConfig(stop=("Q:",)), 64)
FIELDS = """messages persona prompt_index max_tokens max_completion_tokens stop temperature top_p
seed n stream stream_options response_format model tools logprobs role content type text"""
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.sampled_from(["user", "assistant", "system", "text", "bank", "", "hi", "\ud800", "\x00"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS.split()), inner, max_size=6)
    ),
    max_leaves=30,
)


def ask(**body: Any) -> Ask:
    return read_ask(json.dumps({"messages": [], **body}).encode(), RULES)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_persona_and_history() -> None:
    parts = [{"type": "text", "text": "I ski.\n"}, {"type": "text", "text": " \nI teach. "}]
    got = ask(
        messages=[
            message("assistant", "hello"),
            message("system", parts),
            message("user", "hi\nyou"),
            message("developer", "I cook."),
        ],
        persona=["I run.", ""],
    )
    assert got.persona == ("I ski.", "I teach.", "I cook.", "I run.")
    assert got.history == ("hello", "hi\nyou")
    assert ask(persona="a.\nb.").persona == ("a.", "b.")


def test_options() -> None:
    assert ask().options == RULES.options.model_copy(update={"perplexity": False})
    got = ask(prompt_index=3, max_completion_tokens=9, stop="x", stream=True, seed=-5)
    assert got.options.mode == "fixed:3"
    assert got.options.max_new_tokens == 9
    assert got.options.stop == ("Q:", "x")
    assert (got.stream, got.usage, got.seed) == (True, False, -5)
    sampled = ask(temperature=0.5, top_p=0.9).options
    assert (sampled.do_sample, sampled.temperature, sampled.top_p) == (True, 0.5, 0.9)
    greedy = Rules("bank", 4, GenerateConfig(do_sample=True, top_k=5, temperature=2.0), 64)
    body = json.dumps({"messages": [], "temperature": 0, "top_p": 0.9}).encode()
    assert not read_ask(body, greedy).options.do_sample


def test_fields_that_change_nothing_are_taken() -> None:
    ask(n=1, user="me", logprobs=False, tools=[], presence_penalty=0, response_format=None)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS.split()), VALUES, max_size=6) | VALUES)
def test_nonsense_is_refused_or_understood(body: Any) -> None:
    _read(json.dumps(body).encode())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(Refused):
        read_ask(content, RULES)


def _read(content: bytes) -> None:
    refused = None
    try:
        got = read_ask(content, RULES)
    except Refused as error:
        refused = error
    if refused is None:
        assert all(isinstance(text, str) for text in (*got.persona, *got.history))
        return
    assert 400 <= refused.status < 500
    json.dumps(refused.body, ensure_ascii=False).encode()  # it can be sent
    assert set(refused.body["error"]) == {"message", "type", "param", "code"}
