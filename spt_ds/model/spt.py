"""Selective Prompt Tuning: the trainable parts and the losses of one micro-batch.

Huang et al. 2024, arXiv 2406.18187. Legend: K prompts, P virtual tokens, D embedding size, B
examples of the micro-batch, n target tokens, t text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from spt_ds.batch import Batch, Contrast, Packed, on_device
from spt_ds.config.method import SUFFIX_POSITIONS
from spt_ds.config.schema import Config
from spt_ds.model import losses, reference
from spt_ds.model.attention import Layout
from spt_ds.model.backbone import Backbone
from spt_ds.model.prompt_bank import PromptBank, initial_prompts
from spt_ds.model.retriever import Retriever
from spt_ds.model.rows import read_context, target_states
from spt_ds.rng import keyed_generator

# Noise by which equal prompts part, relative to the spread of their numbers.
PARTING_NOISE = 0.1


class Trainables(nn.Module):
    """Everything that trains, in fp32: the prompt bank and the retriever.

    `retriever(bank.weight, pooled)` makes scores s [K, B] of pooled contexts [B, D]. What trains in
    their place in a baseline is in `baselines.py`.
    """

    def __init__(self, bank: PromptBank, retriever: nn.Module) -> None:
        super().__init__()
        self.bank = bank
        self.retriever = retriever

    def tie_gradients(self) -> None:
        """Give every prompt the gradient of the first: equal prompts stay equal to the last bit."""
        assert self.bank.weight.grad is not None
        self.bank.weight.grad.copy_(self.bank.weight.grad[:1].expand_as(self.bank.weight))

    @torch.no_grad()
    def part_ways(self, seed: int) -> None:
        """Add noise to prompts that were one until now, so that they can learn different things.

        It is keyed by `seed`: the same on every rank, and where a run resumes at this step.
        """
        weight = self.bank.weight
        noise = torch.randn(weight.shape, generator=keyed_generator(seed, "warm start"))
        weight.add_(PARTING_NOISE * weight.std() * noise.to(weight.device))


@dataclass(frozen=True)
class MicroLosses:
    """Losses of one micro-batch: `total` carries the gradient, the rest is detached."""

    total: torch.Tensor  # [] weighted, divided by the step's counts
    # [losses] those of losses.factors but the last, which is of a whole window: each divided by the
    # step's counts, unweighted; nll alone while all prompts are one
    parts: torch.Tensor
    nll: torch.Tensor  # [K, B] mean loss per prompt and example
    # [B] target tokens whose loss is not finite; a single one makes `nll` of all examples NaN
    bad: torch.Tensor
    scores: torch.Tensor  # [K, B]
    pooled: torch.Tensor  # [B, D]
    packed: Packed  # the micro-batch on the device


def build_trainables(
    config: Config,
    backbone: Backbone,
    functions: reference.Functions,
    init_ids: list[list[int]],
    seed: int,
) -> Trainables:
    """Initialise the bank from the frozen table and the retriever at random, alike on all ranks.

    Must run inside a call of the root module: it reads rows of the (possibly sharded) embedding
    table. `init_ids` are the token ids of `prompts.init_texts`.
    """
    # A generator of the CPU, whatever the device: the first values do not depend on the hardware.
    generator = torch.Generator().manual_seed(seed)
    shape = (config.prompts.count, config.prompts.tokens, backbone.embed_size)
    device = backbone.lm.get_input_embeddings().weight.device

    def rows(ids: torch.Tensor) -> torch.Tensor:
        return backbone.embed(ids.to(device))

    if config.reference.unit_normal_prompts:
        weight = reference.unit_normal_prompts(shape, generator)
    else:
        init, vocabulary = config.prompts.init, backbone.vocabulary
        weight = initial_prompts(init, shape, rows, vocabulary, init_ids, generator)
    if config.prompts.warm_start_steps:
        weight = weight[:1].repeat(len(weight), 1, 1)
    retriever = Retriever(
        backbone.embed_size,
        shared=config.retriever.projections == "shared",
        keys=config.prompts.count if config.retriever.keys == "learned" else 0,
        activation=functions.activation,
        generator=generator,
    )
    return Trainables(PromptBank(weight), retriever).to(device)


class Spt:
    """The forward side of the method; holds settings and trainables, and no weight of the base."""

    def __init__(
        self, config: Config, trainables: Trainables, functions: reference.Functions
    ) -> None:
        self.config = config
        self.trainables = trainables
        self.functions = functions
        self.suffix = config.prompts.position in SUFFIX_POSITIONS

    def pack(self, batch: Batch) -> Packed:
        """Send a micro-batch to the device of the trainables, as rows of the method's prompts."""
        bank = self.trainables.bank.weight
        return Packed.from_batch(batch, bank.shape[1], bank.device, suffix=self.suffix)

    def score(
        self, backbone: Backbone, packed: Packed
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score every prompt for every context, without a pass through the base.

        Returns: text [t, D], the embeddings of `packed.ids`; pooled [B, D], the mean context
        embedding that the retriever reads, the same function in training and generation; scores
        s [K, B].
        """
        text = backbone.embed(packed.ids)
        # Without a graph, also where the embedding table trains: the contrastive loss needs
        # `pooled` at the end of the step, when the backward pass has freed the graphs.
        with torch.no_grad():
            pooled = self.functions.pool(backbone, packed, text)
        return text, pooled, self.trainables.retriever(self.trainables.bank.weight, pooled)

    def micro_losses(
        self,
        backbone: Backbone,
        batch: Batch,
        examples: int,
        target_tokens: int,
        shared: bool = False,
    ) -> MicroLosses:
        """Forward one micro-batch under all K prompts.

        `examples` and `target_tokens` are counts over the whole optimizer step, all ranks and
        micro-batches: the losses are divided by them. `shared`: all prompts are one still, so it
        is read once and its nll is the loss.
        """
        settings, every_prompt = self.config.losses, self.trainables.bank.weight
        bank = every_prompt[:1] if shared else every_prompt
        packed = self.pack(batch)
        text, pooled, scores = self.score(backbone, packed)
        context = read_context(backbone, packed, text)
        if 0 < settings.train_top_m < len(bank) and torch.is_grad_enabled():
            hidden = self._selective_states(backbone, packed, text, context)
        else:
            every = bank[:, None].expand(-1, len(batch), -1, -1)
            hidden = target_states(backbone, packed, text, every, context)  # [K, n, head size]
        rows, biases = hidden.flatten(0, 1), None
        fuses = settings.objective == "paper" and not shared
        if fuses:
            # The fused rows go through the head beside those of the prompts: one visit to its
            # weight. It is linear but for its bias, and a fused row sums the biases of K rows.
            mixture = losses.fusion_weights(scores, settings)[:, packed.example]  # [K, n]
            rows = torch.cat([rows, losses.fuse(hidden, mixture).to(hidden.dtype)])
            biases = torch.cat([mixture.new_ones(hidden.shape[:2]).flatten(), mixture.sum(dim=0)])
        targets = packed.targets.repeat(len(bank) + fuses)
        out = backbone.head(rows, targets, biases, settings.head_chunk_mib)
        out = out.view(len(bank) + fuses, -1)
        token_loss = out[: len(bank)]  # [K, n]
        member, weights = packed.of_response.to(out.dtype), packed.weights.to(out.dtype)
        nll = self.functions.mean(token_loss, member)  # [K, B]
        totals = token_loss @ member  # [K, B]
        parts = [(totals @ weights).mean() / target_tokens]
        if fuses:
            fused_nll = self.functions.mean(out[-1], member)  # [B]
            chosen = losses.selection(nll, scores, settings.tau_gold, settings.tau_sim)  # [B]
            parts += [chosen @ weights / examples, fused_nll @ weights / examples]
        elif not shared:
            # `totals` are those of whole replies: a prompt writes all of a reply.
            mixed = losses.mixture(totals, scores, settings.tau_sim, settings.temperature)  # [B]
            parts.append(mixed @ weights / target_tokens)
        total = parts[0] if shared else losses.weighted(settings, parts)
        bad = (~torch.isfinite(token_loss)).any(dim=0).to(member.dtype) @ member
        detached = (torch.stack(parts).detach(), nll.detach(), bad, scores.detach())
        return MicroLosses(total, *detached, pooled, packed)

    def _selective_states(
        self, backbone: Backbone, packed: Packed, text: torch.Tensor, context: Layout | None
    ) -> torch.Tensor:
        """Target states [K, n, head size] whose gradient goes through the m best prompts only."""
        bank, best = self.trainables.bank.weight, self.config.losses.train_top_m
        every = bank[:, None].expand(-1, len(packed.batch), -1, -1)
        with torch.no_grad():
            hidden = target_states(backbone, packed, text, every, context)
            nll = self.reply_losses(backbone, packed, hidden)
        chosen = nll.topk(best, dim=0, largest=False).indices  # [m, B]
        trained = target_states(backbone, packed, text, bank[chosen], context)
        # `hidden` carries no gradient; the states that were read again with one go into it.
        prompt = chosen[:, packed.example, None]  # [m, n, 1]
        return hidden.scatter(0, prompt.expand_as(trained), trained)

    def reply_losses(
        self, backbone: Backbone, packed: Packed, hidden: torch.Tensor
    ) -> torch.Tensor:
        """hidden [M, n, head size] -> mean loss of each reply [M, B]."""
        token_loss = self.token_losses(backbone, packed, hidden)
        return losses.mean_per_example(token_loss, packed.of_response.to(token_loss.dtype))

    def token_losses(
        self, backbone: Backbone, packed: Packed, hidden: torch.Tensor
    ) -> torch.Tensor:
        """hidden [M, n, head size] -> loss of each target [M, n]."""
        targets = packed.targets.repeat(len(hidden))
        out = backbone.head(hidden.flatten(0, 1), targets, None, self.config.losses.head_chunk_mib)
        return out.view(len(hidden), -1)

    def contrastive(
        self, pooled: torch.Tensor, everyone: torch.Tensor, contrast: Contrast, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contrastive loss of this rank's pairs over the global batch.

        Args: pooled [slots, D] of this rank; everyone [ranks, K, slots], detached scores; contrast,
        the pairs. Returns (loss for the gradient, this rank's share of the reported mean). A pair
        across two ranks is computed on both, each with the gradient of its own side, and counts one
        half on each in the report.
        """
        own = self.trainables.retriever(self.trainables.bank.weight, pooled)  # [K, slots]
        slots = own.shape[1]
        # The other ranks' scores are constants here. This rank's are computed again: the gradient
        # of a pair needs them with a graph, and its micro-batches have freed theirs.
        ranks = torch.cat([everyone[:rank], own[None], everyone[rank + 1 :]])
        table = ranks.transpose(0, 1).flatten(1)  # [K, ranks * slots]
        column = np.array([r * slots + slot for r, slot in contrast.owner])
        pairs = on_device(column[contrast.pairs], own.device)  # [pairs, 2]
        similar = on_device(contrast.targets, own.device)
        terms = losses.contrastive(table[:, pairs[:, 0]], table[:, pairs[:, 1]], similar)
        both = ((pairs // slots) == rank).all(dim=1)
        share = (terms.detach() * torch.where(both, 1.0, 0.5)).sum() / contrast.pair_count
        return terms.sum() / contrast.pair_count, share

    def mean_weights(
        self, pooled: torch.Tensor, weights: torch.Tensor, examples: int
    ) -> torch.Tensor:
        """This rank's part of the mixture's mean weights over a window, with a graph: [K].

        Args: pooled [slots, D] and weights [slots] of this rank; examples, over all ranks.
        """
        scores = self.trainables.retriever(self.trainables.bank.weight, pooled)  # [K, slots]
        mixed = losses.mixture_weights(scores, self.config.losses.tau_sim)
        return mixed @ weights.to(mixed.dtype) / examples
