"""Decoding: each example once, in one batch, every row under its own prompt (method, identity 5).

`transformers`' own generate does the work from embeddings, so its generation options, caches and
beams are at hand. Legend: K prompts, B examples, M rows of one example (1, or K to fuse them), P
virtual tokens, D embedding size, L longest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from spt_ds.batch import Batch
from spt_ds.config.generation import GenerateConfig
from spt_ds.model import losses
from spt_ds.model.backbone import Backbone
from spt_ds.model.conversation import Endings, ReplyHooks, StopAtText, StopOn, cache_argument
from spt_ds.model.logits import FuseRows, constraints, sampling
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


def decode(
    backbone: Backbone,
    spt: Spt,
    batch: Batch,
    options: GenerateConfig,
    endings: Endings,
    synced: bool,
    hooks: ReplyHooks | None = None,
) -> Decoded:
    """Generate replies to the contexts of `batch`; run inside a call of the root module.

    `synced` keeps ranks that share a sharded base in
    step until the longest reply of all is done; `hooks` is what a conversation adds.
    """
    # Choose: by contexts alone, since a pool over the whole text (reference.padded_pool) would read
    # the reference replies.
    text, _, scores = spt.score(backbone, spt.pack(batch.contexts()))
    chosen = choose_prompts(options.mode, scores, batch.indices, spt.config.train.seed)
    prompts = _prompts_to_read(spt, chosen)
    # Build the rows.
    embeddings, mask = left_pad(_rows(spt, batch, text, prompts))
    # Generate: of K fused rows of an example the first is read, the others hold the same tokens.
    processors = [
        *_fusion(spt, options, scores),
        *constraints(options, endings.ids, embeddings.device),
        *sampling(options, batch.indices * len(prompts), spt.config.train.seed),
    ]
    inputs = {
        "inputs_embeds": embeddings,
        "attention_mask": mask,
        "generation_config": _settings(options, endings),
        "logits_processor": LogitsProcessorList(processors),
        "synced_gpus": synced,
    }
    # A beam that holds the text need not win: with beams replies are cut afterwards.
    if endings.said is not None and options.num_beams == 1:
        inputs["stopping_criteria"] = StoppingCriteriaList([StopAtText(endings.said)])
    out = _generate(backbone, inputs, batch, hooks)
    tokens = [endings.cut(row) for row in out[: len(batch)].tolist()]
    # Measure.
    nll = _reply_losses(backbone, spt, batch, prompts) if options.perplexity else None
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


def _prompts_to_read(spt: Spt, chosen: list[int | None]) -> torch.Tensor:
    """Virtual tokens [M, B, P, D] of the rows: the chosen prompts, or all K to fuse them."""
    bank = spt.trainables.bank.weight
    numbers = [k for k in chosen if k is not None]
    if numbers:
        return bank[numbers][None]
    return bank[:, None].expand(-1, len(chosen), -1, -1)


def _rows(spt: Spt, batch: Batch, text: torch.Tensor, prompts: torch.Tensor) -> list[torch.Tensor]:
    """Embeddings [P + C_b, D] of each row up to its reply, prompt-major, in the base's dtype."""
    heads = batch.before_prompt(spt.suffix)
    contexts = text.split(batch.context_lens)
    return [
        torch.cat([context[:head], virtual, context[head:]])
        for group in prompts.to(text.dtype)
        for context, virtual, head in zip(contexts, group, heads, strict=True)
    ]


def left_pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n_i, D] -> (embeddings [rows, L, D], mask [rows, L]), the real tokens at the right."""
    longest = max(len(row) for row in rows)
    embeddings = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=embeddings.device)
    for number, row in enumerate(rows):
        embeddings[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return embeddings, mask


def _fusion(spt: Spt, options: GenerateConfig, scores: torch.Tensor) -> list[LogitsProcessor]:
    if options.mode != "fuse":
        return []
    return [FuseRows(losses.fusion_weights(scores, spt.config.losses))]


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
        return backbone.generate(**inputs, **cache_argument(backbone.lm, cache))


def _reply_losses(
    backbone: Backbone, spt: Spt, batch: Batch, prompts: torch.Tensor
) -> torch.Tensor:
    """Mean loss [B] of each reference reply under its prompt, as training computes it."""
    packed = spt.pack(batch)
    text = backbone.embed(packed.ids)
    context = read_context(backbone, packed, text)
    hidden = target_states(backbone, packed, text, prompts, context)
    return spt.reply_losses(backbone, packed, hidden)[0]
