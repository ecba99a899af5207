"""What the public reference does in a training step, for comparison.

Its steps, one by one: every text padded to one length; K passes of the base, one after the other,
each with its padding mask and with the layers' activations recomputed in the backward pass;
vocabulary logits of all positions in fp32, stacked to one [K, B, P + T, V] tensor; one cross
entropy over all of its rows; the fusion example by example as a weighted sum of K x (P + T) rows of
logits. Same losses as ours in prefix placement. Written anew on `transformers`' own forward; what
the reference does beside (its contrastive pairs, its dropout) is left out. Legend: K prompts, B
examples, P virtual tokens, T padded text length, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spt_ds.batch import Batch
from spt_ds.model.backbone import Backbone
from spt_ds.model.spt import Spt


def naive_loss(backbone: Backbone, spt: Spt, batch: Batch, length: int) -> torch.Tensor:
    """nll + w_sel selection + w_fus fusion of one micro-batch; scalar with gradient to bank and
    retriever.

    `length` is T: every text is padded on the right to so many tokens. The base is left with
    `transformers`' own attention, which the backward pass still needs.
    """
    settings, lm = spt.config.losses, backbone.lm
    lm.set_attn_implementation("sdpa")
    _, _, scores = spt.score(backbone, spt.pack(batch))  # [K, B]
    text, targets, mask = (
        part.to(scores.device) for part in _padded(batch, length, spt.trainables.bank.tokens)
    )
    logits = torch.stack(
        [_logits(backbone, prompt, text, mask) for prompt in spt.trainables.bank.weight]
    )
    count = len(logits)
    every = F.cross_entropy(
        logits.flatten(0, 2), targets.flatten().repeat(count), reduction="none", ignore_index=-100
    ).view(count, *targets.shape)
    counted = (targets != -100).to(every.dtype)
    nll = (every * counted).sum(-1) / counted.sum(-1)  # [K, B]
    gold = (-nll.detach() / settings.tau_gold).log_softmax(0)
    selection = (gold.exp() * (gold - (scores / settings.tau_sim).log_softmax(0))).sum(0).mean()
    fused = [
        F.cross_entropy(
            (scores[:, b, None, None] * logits[:, b]).sum(0), targets[b], ignore_index=-100
        )
        for b in range(len(batch))
    ]
    total = (every * counted).sum() / (counted.sum() * count)
    return total + settings.selection * selection + settings.fusion * torch.stack(fused).mean()


def _logits(
    backbone: Backbone, prompt: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """prompt [P, D], text [B, T], mask [B, P + T] -> fp32 logits [B, P + T, V] of one pass."""
    table = backbone.embed(text)
    rows = torch.cat([prompt.to(table.dtype).expand(len(text), -1, -1), table], dim=1)
    logits: torch.Tensor = backbone.lm(
        inputs_embeds=rows, attention_mask=mask, use_cache=False
    ).logits
    return logits.float()


def _padded(
    batch: Batch, length: int, virtual: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [B, T], targets [B, P + T] (-100: none) and padding mask [B, P + T].

    A target is what the position before it predicts.
    """
    text = torch.zeros(len(batch), length, dtype=torch.long)
    targets = torch.full((len(batch), virtual + length), -100)
    mask = torch.zeros(len(batch), virtual + length, dtype=torch.long)
    contexts, responses = (
        torch.from_numpy(batch.context_ids).split(batch.context_lens),
        torch.from_numpy(batch.response_ids).split(batch.response_lens),
    )
    for row, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        end = len(context) + len(response)
        text[row, :end] = torch.cat([context, response])
        targets[row, virtual + len(context) - 1 : virtual + end - 1] = response
        mask[row, : virtual + end] = 1
    return text, targets, mask
