"""Decoding: each example once, in one batch, every row under its own prompt (method, identity 5).

`transformers`' own generate does the work from embeddings, so its generation options, caches and
beams are at hand. Legend: K prompts, B examples, M rows of one example (1, or K times the samples
of each prompt where replies of all are fused or ranked), P virtual tokens, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from spt_ds.batch import Batch
from spt_ds.config.generation import GenerateConfig
from spt_ds.model import losses
from spt_ds.model.attention import Layout
from spt_ds.model.backbone import Backbone
from spt_ds.model.conversation import Endings, ReplyHooks, StopAtText, StopOn, cache_argument
from spt_ds.model.decode_rows import branches, whole_rows
from spt_ds.model.logits import FuseRows, MixRows, constraints, sampling
from spt_ds.model.rows import read_context, target_states
from spt_ds.model.spt import Spt
from spt_ds.rng import keyed_generator

# Candidates of one example and the share of each -> the index of the one to keep.
BestOf = Callable[[list[list[int]], list[float]], int]


@dataclass(frozen=True)
class Decoded:
    """Replies of one batch."""

    tokens: list[list[int]]  # new tokens of each example, end of sequence included, padding not
    chosen: list[int | None]  # prompt of each example's reply; None when all were fused
    scores: torch.Tensor  # [K, B] of the retriever
    nll: torch.Tensor | None  # [B] mean loss of the reference replies under the chosen prompts


def decode(
    backbone: Backbone,
    spt: Spt,
    batch: Batch,
    options: GenerateConfig,
    endings: Endings,
    synced: bool,
    hooks: ReplyHooks | None = None,
    best_of: BestOf | None = None,
) -> Decoded:
    """Generate replies to the contexts of `batch`; run inside a call of the root module.

    `synced` keeps ranks that share a sharded base in step until the longest reply of all is done;
    `hooks` is what a conversation adds; `best_of` chooses among the replies of one example, for
    `mode: rank`.
    """
    # Choose: by contexts alone, since a pool over the whole text (reference.padded_pool) would read
    # the reference replies.
    text, _, scores = spt.score(backbone, spt.pack(batch.contexts()))
    chosen = choose_prompts(options.mode, scores, batch.indices, spt.config.train.seed)
    prompts = prompts_to_read(spt, chosen, options.samples)
    # Build the rows.
    inputs = _rows(backbone, spt, batch, text, prompts, options)
    # Generate.
    processors = [
        *_fusion(spt, options, scores),
        *constraints(options, endings.ids, text.device),
        *sampling(options, _draws(batch, options, len(prompts)), spt.config.train.seed),
    ]
    inputs |= {
        "generation_config": _settings(options, endings),
        "logits_processor": LogitsProcessorList(processors),
        "synced_gpus": synced,
    }
    # A beam that holds the text need not win: with beams replies are cut afterwards.
    if endings.said is not None and options.num_beams == 1:
        inputs["stopping_criteria"] = StoppingCriteriaList([StopAtText(endings.said)])
    tokens = [endings.cut(row) for row in _generate(backbone, inputs, batch, hooks).tolist()]
    # Keep one reply of each example. Of K fused rows it is the first, the others hold the same.
    if options.mode == "rank":
        assert best_of is not None
        shares = losses.mixture_weights(scores.float(), spt.config.losses.tau_sim)
        chosen, tokens = _best(tokens, shares.T.tolist(), options.samples, best_of)
        prompts = prompts_to_read(spt, chosen)
    tokens = tokens[: len(batch)]
    # Measure.
    nll = reply_losses(backbone, spt, batch, prompts)[0] if options.perplexity else None
    return Decoded(tokens, chosen, scores, nll)


def choose_prompts(
    mode: str, scores: torch.Tensor, indices: tuple[int, ...], seed: int
) -> list[int | None]:
    """Prompt of each example for `generate.mode`.

    Draws are keyed by the example, so any split gives the same. `noise:sigma` adds normal noise of
    that deviation to the scores before the choice, never to a probability.
    """
    kind, _, number = mode.partition(":")
    count = len(scores)
    if kind in ("fuse", "rank"):
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


def prompts_to_read(spt: Spt, chosen: list[int | None], samples: int = 1) -> torch.Tensor:
    """Virtual tokens [M, B, P, D] of the rows: the chosen prompts, or each of all K `samples` times
    to fuse or to rank them.
    """
    bank = spt.trainables.bank.weight
    numbers = [k for k in chosen if k is not None]
    if numbers:
        return bank[numbers][None]
    return bank.repeat_interleave(samples, dim=0)[:, None].expand(-1, len(chosen), -1, -1)


def _rows(
    backbone: Backbone,
    spt: Spt,
    batch: Batch,
    text: torch.Tensor,
    prompts: torch.Tensor,
    options: GenerateConfig,
) -> dict[str, Any]:
    """Embeddings, mask and perhaps a cache of each row up to its reply, in the base's dtype."""
    # By options alone: ranks that share a sharded base must all read a context apart, or none.
    if spt.suffix and options.reads_every_prompt:
        return branches(backbone, batch, text, prompts)
    return whole_rows(backbone, batch, text, prompts, suffix=spt.suffix)


def _draws(batch: Batch, options: GenerateConfig, rows: int) -> Sequence[tuple[int, ...]]:
    """What the noise of each row is keyed by, so that any split of the examples draws the same."""
    if options.mode == "rank":
        return [(index, row) for row in range(rows) for index in batch.indices]
    return [(index,) for index in batch.indices] * rows  # fused rows share the token


def _best(
    tokens: list[list[int]], shares: list[list[float]], samples: int, best_of: BestOf
) -> tuple[list[int | None], list[list[int]]]:
    """The prompt and the tokens of the reply that is kept of each example.

    Args: tokens, M * B candidates, prompt-major; shares [B][K], of the prompts.
    """
    examples = len(shares)
    places = [
        best_of(tokens[b::examples], [share / samples for share in own for _ in range(samples)])
        for b, own in enumerate(shares)
    ]
    kept = [tokens[place * examples + b] for b, place in enumerate(places)]
    return [place // samples for place in places], kept


def _fusion(spt: Spt, options: GenerateConfig, scores: torch.Tensor) -> list[LogitsProcessor]:
    if options.mode != "fuse":
        return []
    settings = spt.config.losses
    weights = losses.fusion_weights(scores, settings)
    return [MixRows(weights) if settings.objective == "mixture" else FuseRows(weights)]


def _settings(options: GenerateConfig, endings: Endings) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        eos_token_id=list(endings.ids),
        pad_token_id=endings.pad_id,
        do_sample=False,  # sampling is a processor of ours, see GumbelNoise
    )


def _generate(
    backbone: Backbone, inputs: dict[str, Any], batch: Batch, hooks: ReplyHooks | None
) -> torch.Tensor:
    """New tokens [rows, longest reply]."""
    if hooks is None:
        return backbone.generate(**inputs)
    inputs["streamer"] = hooks.streamer
    criteria = inputs.setdefault("stopping_criteria", StoppingCriteriaList())
    criteria.append(StopOn(hooks.stopped))
    if hooks.context is None:
        return backbone.generate(**inputs)
    # `generate` skips the embeddings whose keys and values the cache holds.
    head = batch.before_prompt(suffix=True)[0]  # what stands before the prompt of the one row
    with hooks.context.reading(batch.context_ids[:head].tolist()) as cache:
        return backbone.generate(**inputs | cache_argument(backbone.lm, cache))


def reply_losses(
    backbone: Backbone,
    spt: Spt,
    batch: Batch,
    prompts: torch.Tensor,
    context: Layout | None = None,
) -> tuple[torch.Tensor, Layout | None]:
    """Mean loss [B] of each reply of `batch` under its prompt, as training computes it.

    What was read of the contexts apart is returned too: with it the next replies to the same
    contexts are read without them.
    """
    packed = spt.pack(batch)
    text = backbone.embed(packed.ids)
    if context is None:
        context = read_context(backbone, packed, text)
    hidden = target_states(backbone, packed, text, prompts, context)
    return spt.reply_losses(backbone, packed, hidden)[0], context
