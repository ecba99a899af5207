"""What the public reference does, for comparison: K passes, rows padded to one length, all logits in fp32.

Same losses as ours in prefix placement, written the direct way on `transformers`' own forward with its causal mask.
Legend: K prompts, B examples, P virtual tokens, T padded text length, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from spt_ds.batch import Batch
from spt_ds.model.backbone import Backbone
from spt_ds.model.rows import embed
from spt_ds.model.spt import Spt


def naive_loss(backbone: Backbone, spt: Spt, batch: Batch, length: int, recompute: bool) -> torch.Tensor:
    """nll + w_sel selection + w_fus fusion of one micro-batch; scalar with gradient to bank and retriever.

    Args: length T, every text is padded on the right to so many tokens; recompute, activation checkpointing. The base
    is left with `transformers`' own attention, which the backward pass still needs.
    """
    settings, lm = spt.config.losses, backbone.lm
    lm.set_attn_implementation("sdpa")
    embedded = embed(backbone, batch)
    scores = spt.trainables.scores(spt.pooled(backbone, batch, embedded))  # [K, B]
    text, targets = _padded(batch, length)
    table = backbone.embed(text.to(scores.device))  # [B, T, D]
    targets = targets.to(scores.device)
    bank = spt.trainables.bank.weight
    logits_of_all, token_losses = [], []
    for prompt in bank:
        rows = torch.cat([prompt.to(table.dtype).expand(len(batch), -1, -1), table], dim=1)

        def run(inputs: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = lm(inputs_embeds=inputs, use_cache=False).logits
            return logits.float()

        logits = checkpoint(run, rows, use_reentrant=False) if recompute else run(rows)
        shifted = logits[:, len(prompt) - 1 : -1]  # [B, T, V]: position P + i - 1 predicts token i
        loss = F.cross_entropy(shifted.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
        logits_of_all.append(shifted)
        token_losses.append(loss.view_as(targets))
    mask = (targets != -100).float()
    losses = torch.stack(token_losses)  # [K, B, T]
    nll = (losses * mask).sum(-1) / mask.sum(-1)
    gold = (-nll.detach() / settings.tau_gold).log_softmax(0)
    selection = (gold.exp() * (gold - (scores / settings.tau_sim).log_softmax(0))).sum(0).mean()
    fused = sum(score[:, None, None] * logits for score, logits in zip(scores, logits_of_all, strict=True))
    assert isinstance(fused, torch.Tensor)
    fused_loss = F.cross_entropy(fused.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    fusion = ((fused_loss.view_as(targets) * mask).sum(-1) / mask.sum(-1)).mean()
    total = (losses * mask).sum() / (mask.sum() * len(bank))
    return total + settings.selection * selection + settings.fusion * fusion


def _padded(batch: Batch, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets [B, T]; -100 where there is no target."""
    text = torch.zeros(len(batch), length, dtype=torch.long)
    targets = torch.full_like(text, -100)
    contexts, responses = batch.context_ids.split(batch.context_lens), batch.response_ids.split(batch.response_lens)
    for row, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        end = len(context) + len(response)
        text[row, :end] = torch.cat([context, response])
        targets[row, len(context) : end] = response
    return text, targets
