"""Measures a trained bank on held-out examples: every reply under every prompt, over any ranks.

Legend: N examples, K prompts, B examples of a batch, n target tokens, D embedding size.
"""

from __future__ import annotations

import math

import torch

from spt_ds import dist
from spt_ds.audit.measured import Measured, Text
from spt_ds.batch import Batch, Packed
from spt_ds.data.loader import eval_batches
from spt_ds.data.sampler import MicroSize
from spt_ds.data.store import ExampleStore
from spt_ds.engine.session import Session
from spt_ds.model.attention import Layout
from spt_ds.model.backbone import Backbone
from spt_ds.model.retriever import span_sums
from spt_ds.model.rows import read_context, target_states
from spt_ds.model.spt import Spt


@torch.no_grad()
def measure(session: Session, store: ExampleStore) -> Measured:
    """Read each example under all prompts; every rank takes its share and gets the whole."""
    world, micro = session.world, MicroSize.of(session.config)
    # Every rank has as many batches, and those of the same sizes: their rows can be gathered.
    rows = [
        session.backbone(_measure_batch, session.spt, batch)
        for batch in eval_batches(store, micro, world.size, world.rank)
    ]
    table = dist.all_gather(torch.cat(rows)).flatten(0, 1).cpu()
    table = table[table[:, 0] >= 0]
    table = table[table[:, 0].argsort()]
    bank = session.spt.trainables.bank.weight
    count, size = bank.shape[0], bank.shape[2]
    _, tokens, ensemble, losses, scores, pooled, states = (
        part.numpy() for part in table.split([1, 1, 1, count, count, size, 2 * size], dim=1)
    )
    return Measured(
        losses=losses,
        tokens=tokens[:, 0],
        ensemble=ensemble[:, 0],
        scores=scores,
        features={"embeddings": pooled, "hidden states": states},
        texts=[_text(store, row) for row in range(len(store))],
    )


def _measure_batch(backbone: Backbone, spt: Spt, batch: Batch) -> torch.Tensor:
    """A row for each example, float64 [B, columns]: its index (-1 for a filler), then all else."""
    # By contexts alone, as replies are generated: `reference.padded_pool` reads the reply too.
    _, pooled, scores = spt.score(backbone, spt.pack(batch.contexts()))
    packed = spt.pack(batch)
    text, bank = backbone.embed(packed.ids), spt.trainables.bank.weight
    context = read_context(backbone, packed, text)
    every = bank[:, None].expand(-1, len(batch), -1, -1)
    hidden = target_states(backbone, packed, text, every, context)
    token_loss = spt.token_losses(backbone, packed, hidden)  # [K, n]
    # -log of the mean probability over the prompts, token by token; by logarithms, as probabilities
    # underflow.
    together = math.log(len(bank)) - (-token_loss).logsumexp(dim=0)  # [n]
    member = packed.of_response.to(token_loss.dtype)
    index = torch.tensor(batch.indices, device=text.device)
    columns = [
        torch.where(packed.weights > 0, index, -1)[:, None],
        packed.response_tokens[:, None],
        (together @ member)[:, None],
        (token_loss @ member).T,
        scores.T,
        pooled,
        _context_states(backbone, packed, text),
    ]
    # One table is gathered once. float64 holds an index exactly beyond 2^24 too.
    return torch.cat([column.double() for column in columns], dim=1)


def _context_states(backbone: Backbone, packed: Packed, text: torch.Tensor) -> torch.Tensor:
    """Mean and last of the base's last hidden states of each context: [B, 2 D]."""
    lens = packed.batch.context_lens
    positions = torch.cat([torch.arange(length) for length in lens]).to(text.device)
    layout = Layout(lens, positions, backbone.backend)
    states = backbone.run(text[: sum(lens)], layout)
    mean = span_sums(states, packed.of_context) / packed.context_tokens[:, None]
    last = packed.context_tokens.cumsum(dim=0) - 1
    return torch.cat([mean, states[last].to(mean.dtype)], dim=1)


def _text(store: ExampleStore, row: int) -> Text:
    line = store[row]
    return Text(
        tuple(line["persona"]), tuple(line["history"]), line["response"], line["dialogue_id"]
    )
