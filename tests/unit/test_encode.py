"""Encoding: the template, its spans and truncation, for byte-level and SentencePiece-like
tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spt_ds.data.dialogue import Example
from spt_ds.data.encode import encode_context, encode_many, fingerprint
from spt_ds.errors import DataError, ModelError
from tests.helpers.tokenizers import (
    byte_tokenizer,
    encode,
    joining_tokenizer,
    piece_tokenizer,
    trained_byte_tokenizer,
)

FAMILIES = [byte_tokenizer, trained_byte_tokenizer, piece_tokenizer]
BOS, EOS = 256, 257  # of the byte tokenizer
GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden_opt_tiny_k3"
BYTES = byte_tokenizer()

turns = st.lists(st.text(alphabet="abQR: .,", min_size=1).filter(str.strip), max_size=6)


def example(
    persona: tuple[str, ...] = ("i ski.",),
    history: tuple[str, ...] = ("hi",),
    response: str = "yes",
) -> Example:
    return Example("file.txt:7", "file.txt:1", len(history), persona, history, response)


def template(e: Example) -> str:
    """The text of the method, written out plainly."""
    head = f"given persona: {' '.join(e.persona)}; " if e.persona else ""
    named = [
        f"{'Q' if (len(e.history) - i) % 2 else 'R'}: {turn.strip()} "
        for i, turn in enumerate(e.history)
    ]
    return f"{head}context: {''.join(named)}R: {e.response.strip()}"


def test_ids_of_a_known_case() -> None:
    got = encode(example(("i ski.", "i cook."), ("hi", "hello", "a"), "yes"), BYTES, 512)
    assert got.context_ids == [
        BOS,
        *b"given persona: i ski. i cook.; context: Q: hi R: hello Q: a R:",
    ]
    assert got.response_ids == [*b" yes", EOS]
    assert got.dropped_turns == 0


def test_without_persona_and_history_the_owner_opens() -> None:
    assert encode(example((), ()), BYTES, 512).context_ids == [BOS, *b"context: R:"]


def test_no_bos_where_the_tokenizer_has_none() -> None:
    assert encode(example((), ()), byte_tokenizer(bos=None), 512).context_ids == list(
        b"context: R:"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_equal_the_whole_text(family: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = family()
    e = example(
        ("i like dogs.", "i work at night."),
        ("hi, how are you?", "i am fine.", "what do you do?"),
        "i teach music.",
    )
    got = encode(e, tokenizer, 512)
    whole = tokenizer(template(e), add_special_tokens=False)["input_ids"]
    assert [*got.context_ids, *got.response_ids] == [
        tokenizer.bos_token_id,
        *whole,
        tokenizer.eos_token_id,
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_context_at_inference_has_the_ids_of_training(
    family: Callable[[], PreTrainedTokenizerFast],
) -> None:
    tokenizer, e = family(), example(history=("hi", "hello", "how are you?"))
    got = encode_context(e.persona, e.history, tokenizer, 512)
    assert got.context_ids == encode(e, tokenizer, 512).context_ids
    assert got.response_ids == []


def test_fault_01_context_span_holds_nothing_of_the_response() -> None:
    contexts = {
        tuple(encode(example(response=reply), BYTES, 512).context_ids)
        for reply in ("yes", "no, R: Q:", "x" * 99)
    }
    assert contexts == {(BOS, *b"given persona: i ski.; context: Q: hi R:")}


def test_fault_06_strings_of_the_template_inside_texts_do_not_move_the_spans() -> None:
    e = example(("context: R: i ski.",), ("R: context: hi",), "R: context: Q: yes R: no")
    got = encode(e, BYTES, 512)
    assert (
        bytes(got.context_ids[1:])
        == b"given persona: context: R: i ski.; context: Q: R: context: hi R:"
    )
    assert bytes(got.response_ids[:-1]) == b" R: context: Q: yes R: no"


@given(history=turns, room=st.integers(0, 80))
def test_fault_06_truncation_drops_the_oldest_turns_and_nothing_else(
    history: list[str], room: int
) -> None:
    e = example(history=tuple(history))
    shortest = len(encode(example(history=()), BYTES, 512).context_ids) + 5
    got = encode(e, BYTES, shortest + room)
    kept = e.history[got.dropped_turns :]
    assert [*got.context_ids, *got.response_ids] == [
        BOS,
        *template(example(history=kept)).encode(),
        EOS,
    ]
    assert len(got.context_ids) + len(got.response_ids) <= shortest + room
    if got.dropped_turns:  # one turn less dropped would not have fitted
        longer = example(history=e.history[got.dropped_turns - 1 :])
        assert len(template(longer).encode()) + 2 > shortest + room


@given(history=turns, room=st.integers(0, 80))
def test_a_context_for_generation_is_cut_without_a_look_at_the_response(
    history: list[str], room: int
) -> None:
    """What a long reply would push out, a short one would let the model read."""
    fixed = len(encode(example(history=()), BYTES, 512).context_ids)
    examples = [example(history=tuple(history), response=reply) for reply in ("yes", "x" * 200)]
    short, long = (got for _, got in encode_many(examples, BYTES, fixed + 12 + room, reserved=12))
    assert short.context_ids == long.context_ids
    asked = encode_context(examples[0].persona, history, BYTES, fixed + 12 + room, reserved=12)
    assert (short.context_ids, short.dropped_turns) == (asked.context_ids, asked.dropped_turns)
    assert len(long.response_ids) == 202


def test_too_long_without_any_turn_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError) as caught:
        encode(example(), BYTES, 39)
    # "<s>given persona: i ski.; context: R:" and " yes</s>"
    assert str(caught.value).startswith(
        "file.txt:7: persona and response take 40 tokens (context 35, response 5)"
    )
    assert "allowed are 39" in str(caught.value)
    assert "raise data.max_tokens" in str(caught.value)
    assert encode(example(), BYTES, 40).dropped_turns == 1


def test_fault_07_eos_is_the_last_target_and_typed_special_tokens_stay_text() -> None:
    e = example((), ("</s> hi",), "so </s> long")
    for tokenizer in (BYTES, trained_byte_tokenizer()):
        got = encode(e, tokenizer, 512)
        assert got.response_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in got.response_ids[:-1]
        assert tokenizer.eos_token_id not in got.context_ids[1:]


def test_a_stream_equals_its_examples_one_by_one() -> None:
    talk = [f"turn number {n}" for n in range(30)]
    stream = [
        example(history=tuple(talk[:n]), response=talk[n]) for n in range(30)
    ] * 40  # more than one chunk
    got = list(encode_many(stream, BYTES, 300))
    assert [e for e, _ in got] == stream
    for (e, encoded), _ in pairwise(got[:31]):
        assert encoded == encode(e, BYTES, 300)
    assert [encoded for _, encoded in got[30:60]] == [encoded for _, encoded in got[-30:]]


def test_tokenizer_that_joins_over_blanks_is_refused() -> None:
    with pytest.raises(ModelError, match="joins 'R:' with what follows it"):
        encode(example((), (), "a"), joining_tokenizer(), 99)


def test_tokenizer_without_eos_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        encode(example(), tokenizer, 99)


def test_fingerprint_tells_tokenizers_apart() -> None:
    assert fingerprint(byte_tokenizer()) == fingerprint(byte_tokenizer())
    prints = {
        fingerprint(t)
        for t in (byte_tokenizer(), byte_tokenizer(bos=None), trained_byte_tokenizer())
    }
    assert len(prints) == 3


def test_golden_texts_give_the_golden_ids() -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN)
    texts = json.loads((GOLDEN / "batch.json").read_text(encoding="utf-8"))
    golden = np.load(GOLDEN / "golden.npz")
    for row, (persona, context, reply) in enumerate(
        zip(texts["persona_list"], texts["context_input"], texts["target"], strict=True)
    ):
        got = encode(
            example(tuple(persona), tuple(turn[3:] for turn in context), reply), tokenizer, 96
        )
        ids = golden["input_ids"][row][golden["attention_mask"][row] > 0].tolist()
        assert [*got.context_ids, *got.response_ids] == ids
        targets = golden["lm_target"][row]
        assert got.response_ids == targets[targets != 1].tolist()
