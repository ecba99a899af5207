"""What changes the logits of a token before it is chosen: fusion, constraints, sampling.

Each row of a result depends on its own example alone, whatever the batch. Legend: K prompts, B
examples, V vocabulary.
"""

from __future__ import annotations

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spt_ds.config.generation import GenerateConfig
from spt_ds.rng import keyed_generator


class FuseRows(LogitsProcessor):
    """Gives the K rows of each example the logits `sum_k w_kb logits_kb` of the fusion loss."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights  # [K, B], see losses.fusion_weights

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """logits [K * B, V], prompt-major -> the same shape."""
        count, size = self.weights.shape
        weights = self.weights.to(logits.dtype)
        mixed = torch.einsum("kb,kbv->bv", weights, logits.view(count, size, -1))
        return mixed.repeat(count, 1)


class GumbelNoise(LogitsProcessor):
    """Samples by the Gumbel-max trick: argmax(logits + noise) is a draw from softmax(logits).

    The noise is keyed by example and position, so the draw depends neither on the batch nor on the
    rank that makes it.
    """

    def __init__(self, indices: tuple[int, ...], seed: int) -> None:
        self.generators = {
            index: keyed_generator(seed, "sample", index) for index in dict.fromkeys(indices)
        }
        self.indices = indices

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """logits [rows, V] -> the same shape."""
        # Drawn once per example and position: rows of one example share it, as they share the
        # token.
        drawn = {
            index: -torch.empty(logits.shape[1]).exponential_(generator=generator).log()
            for index, generator in self.generators.items()
        }
        noise = torch.stack([drawn[index] for index in self.indices])
        return logits + noise.to(logits.device, logits.dtype)


def constraints(
    options: GenerateConfig, ends: tuple[int, ...], device: torch.device
) -> list[LogitsProcessor]:
    """Return what keeps a reply to the options; `ends` are the ids that end one."""
    # Not through GenerationConfig: the penalty that `generate` makes itself spares a prompt, and
    # takes the padding of a row of embeddings for one. A reply would depend on its batch.
    steps: list[LogitsProcessor] = []
    if options.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        steps.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.min_new_tokens:
        least = options.min_new_tokens
        steps.append(MinNewTokensLengthLogitsProcessor(0, least, list(ends), device=str(device)))
    return steps


def sampling(options: GenerateConfig, indices: tuple[int, ...], seed: int) -> list[LogitsProcessor]:
    """Return what draws each row's token; `indices` are the examples of the rows."""
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
