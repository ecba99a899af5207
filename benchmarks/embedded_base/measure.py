"""What a base has learned: the figures of the shipped base's card.

    python -m benchmarks.embedded_base.measure spt_ds/assets/base --samples 5

Replies are those of the shipped valid dialogues, whose people occur nowhere in the training text.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.embedded_base.documents import Document, document
from spt_ds.data.dialogue import Example
from spt_ds.data.encode import Encoder
from spt_ds.data.readers import read

WINDOW_TOKENS = 512
REPLY_TOKENS = 40
_BATCH = 32
_STRANGERS = 3  # other people's personas that each reply is tried with
_DRAWS = 10_000  # of the bootstrap


def whole_dialogues(examples: Iterable[Example]) -> list[Example]:
    """Return the last example of each dialogue: its history holds all replies before."""
    return list({example.dialogue_id: example for example in examples}.values())


@torch.no_grad()
def reply_nats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    persona: Sequence[str],
    dialogue: Example,
) -> Tensor:
    """Return [replies, 2] float64: summed nats of each reply with its EOS, and its tokens.

    One pass over the dialogue does for all of its replies: what precedes a reply in it is the
    context of that reply, and where a reply ends the model says how likely EOS is.
    """
    written = document(persona, (*dialogue.history, dialogue.response), spelling=0)
    ids = [tokenizer.bos_token_id, *ids_of(tokenizer, written.head)]
    spans = []
    for marker, text in written.turns:
        ids += ids_of(tokenizer, (marker,))
        first = len(ids)
        ids += ids_of(tokenizer, (text,))
        if marker == " R:":
            spans.append((first, len(ids)))
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
    rows = []
    for first, last in spans:
        scores = model.lm_head(hidden[first - 1 : last]).float().log_softmax(-1)
        targets = torch.tensor([*ids[first:last], tokenizer.eos_token_id])
        nats = -scores.gather(1, targets[:, None]).double().sum()
        rows.append([float(nats), float(len(targets))])
    return torch.tensor(rows, dtype=torch.float64)


def ids_of(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> list[int]:
    """Return the ids of pieces of text, one after the other."""
    return [
        token
        for piece in pieces
        for token in tokenizer(piece, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
    ]


def persona_gap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example]
) -> dict[str, float]:
    """Return nats a token with the own and with other people's personas, and their difference.

    Other people are those of `strangers`. The interval (95 %) is that of a bootstrap over
    dialogues.
    """
    dialogues = whole_dialogues(examples)
    sums = torch.zeros(len(dialogues), 3, dtype=torch.float64)  # own nats, others' nats, tokens
    for number, dialogue in enumerate(dialogues):
        own = reply_nats(model, tokenizer, dialogue.persona, dialogue).sum(0)
        others = torch.stack(
            [
                reply_nats(model, tokenizer, persona, dialogue).sum(0)
                for persona in strangers(dialogues, number)
            ]
        ).mean(0)
        sums[number] = torch.stack([own[0], others[0], own[1]])
    draws = torch.randint(
        len(dialogues), (_DRAWS, len(dialogues)), generator=torch.Generator().manual_seed(0)
    )
    drawn = sums[draws].sum(1)
    gaps = (drawn[:, 1] - drawn[:, 0]) / drawn[:, 2]
    low, high = torch.quantile(gaps, torch.tensor([0.025, 0.975], dtype=torch.float64))
    own, others, tokens = sums.sum(0).tolist()
    return {
        "dialogues": len(dialogues),
        "tokens": int(tokens),
        "nats_own_persona": own / tokens,
        "nats_other_persona": others / tokens,
        "gap": (others - own) / tokens,
        "gap_low": float(low),
        "gap_high": float(high),
    }


def strangers(dialogues: Sequence[Example], number: int) -> list[tuple[str, ...]]:
    """Return the next few personas that share no sentence with that of dialogue `number`."""
    own = set(dialogues[number].persona)
    after = (dialogues[(number + step) % len(dialogues)] for step in range(1, len(dialogues)))
    return [other.persona for other in after if own.isdisjoint(other.persona)][:_STRANGERS]


@torch.no_grad()
def greedy_replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[tuple[str, bool]]:
    """Return (reply, whether it ended by itself within REPLY_TOKENS tokens), greedy."""
    encoder = Encoder(tokenizer, WINDOW_TOKENS)
    rows = [encoder.context(e.id, e.persona, e.history, REPLY_TOKENS).context_ids for e in examples]
    replies: list[tuple[str, bool]] = [("", False)] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for chunk in (order[start : start + _BATCH] for start in range(0, len(order), _BATCH)):
        length = max(len(rows[number]) for number in chunk)
        pads = [length - len(rows[number]) for number in chunk]
        ids = torch.tensor([[0] * pad + rows[n] for n, pad in zip(chunk, pads, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads])
        made = model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=REPLY_TOKENS, do_sample=False, pad_token_id=0
        )
        for number, row in zip(chunk, made[:, length:].tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            text = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
            replies[number] = (text, ended)
    return replies


@torch.no_grad()
def held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> dict[str, float]:
    """Return perplexity per token and per blank-separated word (template words count).

    The marker after a reply is left out, as in training. Each document is read alone, at most
    `max_position_embeddings` tokens of it.
    """
    nats, tokens, words = 0.0, 0, 0
    for talk in documents:
        ids, counted = [tokenizer.bos_token_id], [False]
        for piece in (*talk.head, *(part for turn in talk.turns for part in turn)):
            known = ids_of(tokenizer, (piece,))
            ids += known
            counted += [piece != " Q:"] * len(known)
            words += 0 if piece == " Q:" else len(piece.split())
        row = torch.tensor([[*ids, tokenizer.eos_token_id]])
        row = row[:, : model.config.max_position_embeddings]
        targets = torch.tensor([[*counted, True]])[0, 1 : row.shape[1]]
        scores = model(row[:, :-1]).logits[0].float()
        each = torch.nn.functional.cross_entropy(scores, row[0, 1:], reduction="none")
        nats += float(each[targets].sum())
        tokens += int(targets.sum())
    return {
        "documents": len(documents),
        "tokens": tokens,
        "perplexity_per_token": math.exp(nats / tokens),
        "perplexity_per_word": math.exp(nats / words),
    }


def figures(folder: Path, source: str) -> dict[str, Any]:
    """Return what is measured on the replies of `source` with the base in `folder`."""
    model, tokenizer = load(folder)
    examples = list(read(source))
    replies = greedy_replies(model, tokenizer, examples)
    return {
        "valid_replies": rounded(persona_gap(model, tokenizer, examples)),
        "greedy_replies": {
            "replies": len(replies),
            "share_ended": round(sum(ended for _, ended in replies) / len(replies), 4),
            "share_distinct": round(len({text for text, _ in replies}) / len(replies), 4),
            "limit_tokens": REPLY_TOKENS,
        },
    }


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return model (the stored weights, computed with in fp32) and tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Return the values with four decimals, as a report holds them."""
    return {name: round(value, 4) for name, value in values.items()}


def samples(folder: Path, count: int) -> Iterator[str]:
    """Yield `count` valid contexts with the greedy reply and the true one."""
    model, tokenizer = load(folder)
    examples = random.Random(0).sample(list(read("embedded:valid")), count)
    made = greedy_replies(model, tokenizer, examples)
    for example, (reply, _) in zip(examples, made, strict=True):
        said = example.history[-1] if example.history else "(opens)"
        yield f"persona: {' '.join(example.persona)}\nQ: {said}"
        yield f"base: {reply}\ntrue: {example.response}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.embedded_base.measure`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", type=Path, help="folder of the base")
    parser.add_argument("--samples", type=int, default=0, help="greedy replies to show")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(json.dumps(figures(args.base, "embedded:valid"), indent=2))
    print("\n".join(samples(args.base, args.samples)))


if __name__ == "__main__":
    main()
