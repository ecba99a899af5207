"""What a base has learned: the figures of the shipped base's card.

    python -m benchmarks.embedded_base.measure spt_ds/assets/base --samples 5

Replies are those of the shipped valid dialogues, whose people occur nowhere in the training text.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
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

from benchmarks.embedded_base.documents import Document
from spt_ds.data.dialogue import Example
from spt_ds.data.encode import Encoded, Encoder
from spt_ds.data.readers import read

WINDOW_TOKENS = 512
REPLY_TOKENS = 40
_BATCH = 32
_STRANGERS = 3  # other people's personas that each reply is tried with
_DRAWS = 10_000  # of the bootstrap


def encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, strangers: int = 0
) -> list[Encoded]:
    """Encode with the own persona, or with that of the `strangers`-th other dialogue after it.

    The turns are the same for all of them: the window is wide enough to keep every one.
    """
    encoder = Encoder(tokenizer, 100_000)
    personas = {example.dialogue_id: example.persona for example in examples}
    names = list(personas)
    rows = []
    for example in examples:
        name = names[(names.index(example.dialogue_id) + strangers) % len(names)]
        context = encoder.context(example.id, personas[name], example.history, 0)
        response = encoder.example(example).response_ids
        rows.append(Encoded(context.context_ids, response, 0))
    return rows


@torch.no_grad()
def reply_nats(model: PreTrainedModel, rows: Sequence[Encoded]) -> Tensor:
    """Return [examples, 2] float64: summed nats of a reply with its EOS, and its tokens."""
    sums = torch.zeros(len(rows), 2, dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda n: len(rows[n].context_ids + rows[n].response_ids))
    for chunk in (order[start : start + _BATCH] for start in range(0, len(order), _BATCH)):
        texts = [rows[n].context_ids + rows[n].response_ids for n in chunk]
        length = max(map(len, texts))
        ids = torch.tensor([text + [0] * (length - len(text)) for text in texts])
        scores = model(ids).logits.float().log_softmax(-1)
        for place, number in enumerate(chunk):
            first, last = len(rows[number].context_ids), len(texts[place])
            targets = ids[place, first:last, None]
            nats = -scores[place, first - 1 : last - 1].gather(1, targets)
            sums[number] = torch.tensor([float(nats.double().sum()), last - first])
    return sums


def persona_gap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> dict[str, float]:
    """Return nats a token with the own and with other people's personas, and their difference.

    The interval (95 %) is that of a bootstrap over dialogues.
    """
    own = reply_nats(model, encoded(examples, tokenizer))
    others = torch.stack(
        [
            reply_nats(model, encoded(examples, tokenizer, strangers))
            for strangers in range(1, _STRANGERS + 1)
        ]
    ).mean(0)
    names = list(dict.fromkeys(example.dialogue_id for example in examples))
    sums = torch.zeros(len(names), 3, dtype=torch.float64)  # own nats, others' nats, tokens
    for example, mine, theirs in zip(examples, own, others, strict=True):
        sums[names.index(example.dialogue_id)] += torch.stack([mine[0], theirs[0], mine[1]])
    draws = torch.randint(
        len(names), (_DRAWS, len(names)), generator=torch.Generator().manual_seed(0)
    )
    drawn = sums[draws].sum(1)
    gaps = (drawn[:, 1] - drawn[:, 0]) / drawn[:, 2]
    low, high = torch.quantile(gaps, torch.tensor([0.025, 0.975], dtype=torch.float64))
    total = sums.sum(0)
    return {
        "replies": len(examples),
        "tokens": int(total[2]),
        "nats_own_persona": float(total[0] / total[2]),
        "nats_other_persona": float(total[1] / total[2]),
        "gap": float((total[1] - total[0]) / total[2]),
        "gap_low": float(low),
        "gap_high": float(high),
    }


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
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=REPLY_TOKENS, do_sample=False, pad_token_id=0
        )
        for number, row in zip(chunk, made[:, length:].tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            text = tokenizer.decode(row, skip_special_tokens=True).strip()
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
    for document in documents:
        ids, counted = [tokenizer.bos_token_id], [False]
        for piece in (*document.head, *(part for turn in document.turns for part in turn)):
            known = tokenizer(piece, add_special_tokens=False, split_special_tokens=True)
            ids += known["input_ids"]
            counted += [piece != " Q:"] * len(known["input_ids"])
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
