"""Decoding: each example once, in one batch, every row under its own prompt (method, identity 5).

`transformers`' own generate does the work from embeddings, so its generation options, caches and
beams are at hand. Legend: K prompts, B examples, P virtual tokens, D embedding size, L longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteriaList

from spt_ds.batch import Batch
from spt_ds.config.generation import GenerateConfig
from spt_ds.model import losses
from spt_ds.model.backbone import Backbone
from spt_ds.model.conversation import Live, StopOn, cache_argument
from spt_ds.model.rows import read_context, target_states
from spt_ds.model.spt import Spt
from spt_ds.rng import keyed_generator


@dataclass(frozen=True)
class Decoded:
    """Replies of one batch."""

    tokens: list[list[int]]  # new tokens of each example, end of sequence included, padding not
    chosen: list[int | None]  # prompt of each example; None when all were fused
    scores: torch.Tensor  # [K, B] of the retriever
    nll: torch.Tensor | None  # [B] mean loss of the reference replies under the chosen prompts


def choose_prompts(
    mode: str, scores: torch.Tensor, indices: tuple[int, ...], seed: int
) -> list[int | None]:
    """Prompt of each example for `generate.mode`; draws are keyed by the example, so any split
    gives the same.

    `noise:sigma` adds normal noise of that deviation to the scores before the choice, never to a
    probability.
    """
    kind, _, number = mode.partition(":")
    count = len(scores)
    if kind == "fuse":
        return [None] * len(indices)
    if kind == "fixed":
        return [int(number)] * len(indices)
    if kind == "random":
        draws = (
            torch.randint(count, (1,), generator=keyed_generator(seed, "prompt", index))
            for index in indices
        )
        return [int(draw) for draw in draws]
    values = scores.float().cpu()
    if kind == "noise":
        noise = [
            torch.randn(count, generator=keyed_generator(seed, "prompt", index))
            for index in indices
        ]
        values = values + float(number) * torch.stack(noise, dim=1)
    return [int(k) for k in values.argmax(dim=0)]


def decode(
    backbone: Backbone,
    spt: Spt,
    batch: Batch,
    options: GenerateConfig,
    special: tuple[int, int],
    synced: bool,
    live: Live | None = None,
) -> Decoded:
    """Generate replies to the contexts of `batch`; run inside a call of the root module.

    `special` is (end-of-sequence id, pad id); `synced` keeps ranks that share a sharded base in
    step until the longest reply of all is done; `live` is what a conversation adds.
    """
    # Choose: by contexts alone, since a pool over the whole text (reference.padded_pool) would read
    # the reference replies.
    asked = spt.pack(batch.contexts())
    text, _, scores = spt.score(backbone, asked)
    chosen = choose_prompts(options.mode, scores, batch.indices, spt.config.train.seed)
    prompts = _prompts_of(chosen, spt.trainables.bank.weight)
    # Build the rows.
    suffix = spt.config.prompts.placement == "suffix"
    rows = left_pad(_rows(prompts, text.split(batch.context_lens), suffix=suffix))
    # Generate: of K fused rows of an example the first is read, the others hold the same tokens.
    processors = _processors(spt, options, scores, batch.indices, special[0])
    out = _generate(backbone, rows, batch, options, processors, special, synced, live)
    tokens = [_until(row, special[0]) for row in out[: len(batch)].tolist()]
    # Measure.
    nll = _reference_nll(backbone, spt, batch, prompts) if options.perplexity else None
    return Decoded(tokens, chosen, scores, nll)


def _prompts_of(chosen: list[int | None], bank: torch.Tensor) -> torch.Tensor:
    """bank [K, P, D] -> the prompts that answer: [1, B, P, D], or [K, B, P, D] where all do."""
    numbers = [k for k in chosen if k is not None]
    return bank[numbers][None] if numbers else bank[:, None].expand(-1, len(chosen), -1, -1)


def _rows(
    prompts: torch.Tensor, contexts: Sequence[torch.Tensor], *, suffix: bool
) -> list[torch.Tensor]:
    """prompts [K or 1, B, P, D], contexts B x [C_b, D] -> rows, prompt by prompt."""
    rows = []
    for group in prompts:
        for context, prompt in zip(contexts, group.to(contexts[0].dtype), strict=True):
            rows.append(torch.cat([context, prompt] if suffix else [prompt, context]))
    return rows


def _processors(
    spt: Spt,
    options: GenerateConfig,
    scores: torch.Tensor,
    indices: tuple[int, ...],
    end: int,
) -> LogitsProcessorList:
    """What happens to logits, in this order: the mixture of prompts, what a reply may hold, and
    sampling.
    """
    steps: list[LogitsProcessor] = []
    fused = options.mode == "fuse"
    if fused:
        steps.append(FuseRows(losses.fusion_weights(scores, spt.config.losses.fusion_weights)))
    steps += _constraints(options, end, scores.device)
    rows = len(scores) if fused else 1
    steps += _sampling(options, indices * rows, spt.config.train.seed)
    return LogitsProcessorList(steps)


def _generate(
    backbone: Backbone,
    rows: tuple[torch.Tensor, torch.Tensor],
    batch: Batch,
    options: GenerateConfig,
    processors: LogitsProcessorList,
    special: tuple[int, int],
    synced: bool,
    live: Live | None,
) -> torch.Tensor:
    """rows ([n, L, D], mask [n, L]) -> new tokens [n, longest reply]."""
    settings = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        eos_token_id=special[0],
        pad_token_id=special[1],
        do_sample=False,  # sampling is a processor of ours, see GumbelNoise
    )
    extra: dict[str, Any] = {}
    if live is not None:
        stop = StoppingCriteriaList([StopOn(live.stopped)])
        extra = {"streamer": live.streamer, "stopping_criteria": stop}
    context = live.context if live is not None else None
    with nullcontext() if context is None else context.reading(batch.context_ids.tolist()) as cache:
        return backbone.generate(  # skips the embeddings whose keys and values `cache` holds
            inputs_embeds=rows[0],
            attention_mask=rows[1],
            generation_config=settings,
            logits_processor=processors,
            synced_gpus=synced,
            **cache_argument(backbone.lm, cache),
            **extra,
        )


def _reference_nll(
    backbone: Backbone, spt: Spt, batch: Batch, prompts: torch.Tensor
) -> torch.Tensor:
    """Mean loss of the reference replies [B] under prompts [1, B, P, D]."""
    packed = spt.pack(batch)
    text = backbone.embed(packed.ids)
    context = read_context(backbone, packed, text, spt.config.prompts.placement)
    hidden = target_states(backbone, packed, text, prompts, context)
    return spt.reply_losses(backbone, packed, hidden)[0]


def left_pad(pieces: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n_i, D] -> (embeddings [rows, L, D], mask [rows, L]), the real tokens at the right."""
    longest = max(len(piece) for piece in pieces)
    embeddings = pieces[0].new_zeros(len(pieces), longest, pieces[0].shape[1])
    mask = torch.zeros(len(pieces), longest, dtype=torch.long, device=embeddings.device)
    for row, piece in enumerate(pieces):
        embeddings[row, longest - len(piece) :] = piece
        mask[row, longest - len(piece) :] = 1
    return embeddings, mask


class FuseRows(LogitsProcessor):
    """Gives the K rows of each example the same logits, `sum_k w_kb logits_kb`, as the fusion loss
    does.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights  # [K, B], see losses.fusion_weights

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        count, size = self.weights.shape
        logits = scores.view(count, size, -1)
        mixed = torch.einsum("kb,kbv->bv", self.weights.to(logits.dtype), logits)
        return mixed.repeat(count, 1)


class GumbelNoise(LogitsProcessor):
    """Sampling by the Gumbel-max trick with noise keyed by example and position: argmax(logits +
    noise) is a draw from softmax(logits), and the draw depends neither on the batch nor on the rank
    that made it."""

    def __init__(self, indices: tuple[int, ...], seed: int) -> None:
        self.generators = {
            index: keyed_generator(seed, "sample", index) for index in dict.fromkeys(indices)
        }
        self.indices = indices

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Drawn once per example and position: rows of one example share it, as they share the
        # token.
        width = scores.shape[1]
        noise = {
            index: -torch.empty(width).exponential_(generator=generator).log()
            for index, generator in self.generators.items()
        }
        return scores + torch.stack([noise[index] for index in self.indices]).to(
            scores.device, scores.dtype
        )


def _constraints(options: GenerateConfig, end: int, device: torch.device) -> list[LogitsProcessor]:
    """What a reply may hold. Not through GenerationConfig: the penalty that `generate` makes itself
    takes a row's padding for a prompt to spare, and the row has embeddings in its place; a reply
    would depend on its batch."""
    steps: list[LogitsProcessor] = []
    if options.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        steps.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.min_new_tokens:
        steps.append(
            MinNewTokensLengthLogitsProcessor(0, options.min_new_tokens, end, device=str(device))
        )
    return steps


def _sampling(
    options: GenerateConfig, indices: tuple[int, ...], seed: int
) -> list[LogitsProcessor]:
    if not options.do_sample:
        return []
    steps: list[LogitsProcessor] = []
    if options.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        steps.append(TopPLogitsWarper(options.top_p))
    return [*steps, GumbelNoise(indices, seed)]


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
