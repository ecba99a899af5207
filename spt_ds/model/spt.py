"""Selective Prompt Tuning: the trainable parts and the losses of one micro-batch (Huang et al.,
arXiv 2406.18187).

Legend: K prompts, P virtual tokens, D embedding size, B examples of the micro-batch, n target
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from spt_ds.batch import Batch, Contrast, on_device, owners
from spt_ds.config.schema import Config
from spt_ds.model import losses
from spt_ds.model.backbone import Backbone
from spt_ds.model.prompt_bank import PromptBank, initial_prompts
from spt_ds.model.retriever import Retriever, pool
from spt_ds.model.rows import Embedded, embed, read_context, target_states


class Trainables(nn.Module):
    """Everything that trains: the bank and the retriever, in fp32; `baselines.py` has what trains
    in their place.
    """

    def __init__(self, bank: PromptBank, retriever: Retriever) -> None:
        super().__init__()
        self.bank = bank
        self.retriever = retriever

    def scores(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled contexts [B, D] -> scores s [K, B]."""
        out: torch.Tensor = self.retriever(self.bank.weight, pooled)
        return out


@dataclass(frozen=True)
class Counts:
    """What the sums of one optimizer step are divided by, over all ranks and micro-batches."""

    examples: int
    target_tokens: int


@dataclass(frozen=True)
class MicroLosses:
    """Losses of one micro-batch. `total` carries the gradient; the rest is detached, for metrics
    and messages.
    """

    total: torch.Tensor  # [] weighted, divided by the step's counts
    parts: torch.Tensor  # [3] nll, selection, fusion: each divided by the step's counts, unweighted
    nll: torch.Tensor  # [K, B] mean loss per prompt and example
    bad: (
        torch.Tensor
    )  # [B] target tokens whose loss is not finite: `nll` of the whole micro-batch is lost with one
    scores: torch.Tensor  # [K, B]
    pooled: torch.Tensor  # [B, D]


def build_trainables(
    config: Config, backbone: Backbone, init_ids: list[list[int]], seed: int
) -> Trainables:
    """Initialise the bank from the frozen table and the retriever at random, the same on every
    rank.

    Must run inside a call of the root module: it reads rows of the (possibly sharded) embedding
    table. `init_ids` are the token ids of `prompts.init_texts`.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (config.prompts.count, config.prompts.tokens, backbone.embed_size)
    device = backbone.lm.get_input_embeddings().weight.device

    def rows(ids: torch.Tensor) -> torch.Tensor:
        return backbone.embed(ids.to(device))

    bank = PromptBank(
        initial_prompts(config.prompts.init, shape, rows, backbone.vocabulary, init_ids, generator)
    )
    retriever = Retriever(
        backbone.embed_size,
        shared=config.retriever.projections == "shared",
        activation=config.retriever.activation,
        generator=generator,
    )
    return Trainables(bank, retriever).to(device)


class Spt:
    """The forward side of the method: holds settings and trainables, owns no weights of the base."""

    def __init__(self, config: Config, trainables: Trainables, pad_id: int) -> None:
        self.config = config
        self.trainables = trainables
        self.pad_id = pad_id

    @torch.no_grad()
    def pooled(self, backbone: Backbone, batch: Batch, embedded: Embedded) -> torch.Tensor:
        """Mean context embedding [B, D] that the retriever reads: the same function in training and
        generation.

        Without a graph, also where the embedding table trains: micro-batches keep it until the end
        of the step.
        """
        if self.config.retriever.pool == "context":
            return pool(embedded.context, batch.context_lens, None, 0)
        parts = zip(
            embedded.context.split(batch.context_lens),
            embedded.response.split(batch.response_lens),
            strict=True,
        )
        text = torch.cat([piece for pair in parts for piece in pair])
        lens = tuple(c + r for c, r in zip(batch.context_lens, batch.response_lens, strict=True))
        fill = backbone.embed(on_device([self.pad_id], text.device))[0]
        return pool(text, lens, fill, self.config.retriever.pool_length_tokens)

    def scores(self, backbone: Backbone, batch: Batch) -> torch.Tensor:
        """Retriever scores [K, B]: no pass through the LLM."""
        return self.trainables.scores(self.pooled(backbone, batch, embed(backbone, batch)))

    def mixture(self, scores: torch.Tensor) -> torch.Tensor:
        """Weights [K, B] of the K prompts' logits in the fusion, from their scores [K, B]."""
        return (
            scores / scores.sum(dim=0)
            if self.config.losses.fusion_weights == "normalised"
            else scores
        )

    def micro_losses(self, backbone: Backbone, batch: Batch, counts: Counts) -> MicroLosses:
        """Forward one micro-batch under all K prompts; see `MicroLosses`."""
        settings = self.config.losses
        embedded = embed(backbone, batch)
        pooled = self.pooled(backbone, batch, embedded)
        scores = self.trainables.scores(pooled)  # [K, B]
        hidden = self._states(backbone, batch, embedded)  # [K, n, head size]
        token_loss, fused_loss = self._token_losses(backbone, batch, hidden, self.mixture(scores))
        member = losses.membership(batch.response_lens, scores.device, token_loss.dtype)  # [n, B]
        weights = on_device(batch.weights, scores.device, token_loss.dtype)
        nll = losses.mean_per_example(token_loss, member, settings.mask)  # [K, B]
        fused = losses.mean_per_example(fused_loss, member, settings.mask)  # [B]
        chosen = losses.selection(nll, scores, settings.tau_gold, settings.tau_sim)  # [B]
        parts = torch.stack(
            [
                (token_loss @ member @ weights).mean() / counts.target_tokens,
                chosen @ weights / counts.examples,
                fused @ weights / counts.examples,
            ]
        )
        total = parts[0] + settings.selection * parts[1] + settings.fusion * parts[2]
        bad = (~torch.isfinite(token_loss)).any(dim=0).to(member.dtype) @ member
        return MicroLosses(total, parts.detach(), nll.detach(), bad, scores.detach(), pooled)

    def _states(self, backbone: Backbone, batch: Batch, embedded: Embedded) -> torch.Tensor:
        bank = self.trainables.bank.weight
        context = read_context(backbone, batch, embedded, self.config.prompts.placement)
        every = bank[:, None].expand(-1, len(batch), -1, -1)
        best = self.config.losses.train_top_m
        if not best or best == len(bank) or not torch.is_grad_enabled():
            return target_states(backbone, batch, embedded, every, context)
        # Selective backward: the value is that of all K, the gradient goes through the m best of
        # each example only.
        with torch.no_grad():
            hidden = target_states(backbone, batch, embedded, every, context)
            nll = self.reply_losses(backbone, batch, hidden)
        chosen = nll.topk(best, dim=0, largest=False).indices  # [m, B]
        trained = target_states(backbone, batch, embedded, bank[chosen], context)
        rows = chosen[:, owners(batch.response_lens, chosen.device)]
        return hidden.scatter(0, rows[..., None].expand_as(trained), trained)

    def _token_losses(
        self, backbone: Backbone, batch: Batch, hidden: torch.Tensor, mixture: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [K, n, head size], mixture [K, B] -> losses under each prompt [K, n] and of the
        fusion [n].
        """
        count, tokens = hidden.shape[:2]
        targets = on_device(batch.response_ids, hidden.device)
        per_token = mixture[:, owners(batch.response_lens, hidden.device)]  # [K, n]
        fused = losses.fuse(hidden, per_token).to(hidden.dtype)
        bias_scale = torch.cat([per_token.new_ones(count * tokens), per_token.sum(dim=0)])
        out = backbone.head(
            torch.cat([hidden.flatten(0, 1), fused]),
            targets.repeat(count + 1),
            bias_scale,
            self.config.losses.head_chunk_mib,
        )
        return out[: count * tokens].view(count, tokens), out[count * tokens :]

    def reply_losses(self, backbone: Backbone, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [M, n, head size] -> mean loss of each reply [M, B]."""
        count = len(hidden)
        targets = on_device(batch.response_ids, hidden.device).repeat(count)
        out = backbone.head(hidden.flatten(0, 1), targets, None, self.config.losses.head_chunk_mib)
        member = losses.membership(batch.response_lens, hidden.device, out.dtype)
        return losses.mean_per_example(out.view(count, -1), member, "target")

    def contrastive(
        self, pooled: torch.Tensor, everyone: torch.Tensor, contrast: Contrast, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contrastive loss of this rank's pairs over the global batch.

        Args: pooled [slots, D] of this rank; everyone [ranks, K, slots], detached scores; contrast,
        the pairs. Returns (loss for the gradient, this rank's share of the reported mean). A pair
        across two ranks is computed on both, each with the gradient of its own side, and counts one
        half on each in the report.
        """
        own = self.trainables.scores(pooled)  # [K, slots]
        table = (
            torch.cat([everyone[:rank], own[None], everyone[rank + 1 :]]).transpose(0, 1).flatten(1)
        )  # [K, ranks * slots]
        slots = own.shape[1]
        column = on_device([r * slots + slot for r, slot in contrast.owner], own.device, torch.long)
        pairs = column[on_device(contrast.pairs, own.device)]  # [pairs, 2]
        similar = on_device(contrast.targets, own.device)
        terms = losses.contrastive(table[:, pairs[:, 0]], table[:, pairs[:, 1]], similar)
        both = ((pairs // slots) == rank).all(dim=1)
        share = (terms.detach() * torch.where(both, 1.0, 0.5)).sum() / contrast.pair_count
        return terms.sum() / contrast.pair_count, share
