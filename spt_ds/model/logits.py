"""What changes the logits of a token before it is chosen: fusion, constraints, sampling.

Each row of a result depends on its own example alone, whatever the batch. Legend: K prompts, B
examples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from spt_ds.rng import gumbel_noise, keyed_seed


class FuseRows(LogitsProcessor):
    """Gives the K rows of each example the logits `sum_k w_kb logits_kb` of the fusion loss."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights  # [K, B], see losses.fusion_weights

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """logits [K * B, V], prompt-major -> the same shape."""
        count, size = self.weights.shape
        weights = self.weights.to(logits.dtype)
        # All K rows get the mixture. They then choose the same token and stay one reply.
        mixed = torch.einsum("kb,kbv->bv", weights, logits.view(count, size, -1))
        return mixed.repeat(count, 1)


class MixRows(LogitsProcessor):
    """Gives the K rows of each example the log-probabilities of the mixture of its prompts.

    A reply of the mixture is written by one prompt that is drawn from pi, so each token that it has
    already tells which prompt writes it: pi_k is multiplied by what prompt k gave the token.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights  # [K, B], pi
        self._posterior = weights.log()
        self._told: torch.Tensor | None = None  # [K, B, V] of the token before

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """logits [K * B, V], prompt-major -> the same shape."""
        count, size = self.weights.shape
        # At the first call `input_ids` has no column yet, because a row of embeddings has no ids.
        if self._told is not None:
            tokens = input_ids[:, -1].view(count, size, 1)
            self._posterior = self._posterior + self._told.gather(2, tokens)[..., 0]
        self._told = logits.view(count, size, -1).float().log_softmax(dim=-1)
        prior = self._posterior.log_softmax(dim=0)
        mixed = (prior[..., None] + self._told).logsumexp(dim=0)
        return mixed.to(logits.dtype).repeat(count, 1)


class GumbelNoise(LogitsProcessor):
    """Samples by the Gumbel-max trick: argmax(logits + noise) is a draw from softmax(logits).

    The noise is a hash of example, position and token, made on the device of the logits. So a draw
    depends neither on the batch nor on the rank that makes it, and no host draws V numbers.
    """

    def __init__(self, keys: Sequence[tuple[int, ...]], seed: int) -> None:
        """`keys` are those of the rows: an example's index, and a candidate of it."""
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        self._seeds = torch.tensor([keyed_seed(seed, "sample", *key) for key in places])
        self._places = torch.tensor([places[key] for key in keys])  # [rows]

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """logits [rows, V] -> the same shape."""
        self._seeds, self._places = (
            tensor.to(logits.device) for tensor in (self._seeds, self._places)
        )
        # Once per key: fused rows share the noise, as they share the token. `input_ids` holds the
        # new tokens alone where rows are embeddings.
        noise = gumbel_noise(self._seeds, input_ids.shape[1], logits.shape[1])
        return logits + noise.to(logits.dtype)[self._places]


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
        # The prompt has length 0 here: `input_ids` holds new tokens alone where rows are
        # embeddings.
        steps.append(MinNewTokensLengthLogitsProcessor(0, least, list(ends), device=str(device)))
    return steps


def sampling(
    options: GenerateConfig, keys: Sequence[tuple[int, ...]], seed: int
) -> list[LogitsProcessor]:
    """Return what draws each row's token; rows of the same key draw the same."""
    if not options.do_sample:
        return []
    steps: list[LogitsProcessor] = []
    if options.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        steps.append(TopPLogitsWarper(options.top_p))
    # The noise comes last: what top_k and top_p removed is at -inf, where no noise brings it back.
    return [*steps, GumbelNoise(keys, seed)]
