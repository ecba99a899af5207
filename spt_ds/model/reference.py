"""What the public SPT reference does in its own way, for the configuration section `reference`.

The recipe of that name switches all of it on, so that old results can be reproduced. The faults are
numbered as in docs/explanation/method.md. Everything else of the method is in the other files,
which are handed the functions that `functions_of` chooses once, when the run is opened.

Legend: K prompts, P virtual tokens, B examples, n target tokens, t text tokens, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from spt_ds.batch import Packed, on_device
from spt_ds.config.method import ReferenceConfig
from spt_ds.errors import ModelError
from spt_ds.model.backbone import Backbone
from spt_ds.model.losses import mean_per_example
from spt_ds.model.retriever import Activation, Pool, mean_of_contexts, softplus_scores, span_sums

Mean = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Functions:
    """The parts of the method that the reference has in its own way."""

    activation: Activation
    """Makes scores of cosines: [K, B] -> [K, B]."""
    pool: Pool
    """Makes one embedding [B, D] of each context."""
    mean: Mean
    """Makes one loss per example of token losses: [..., n], [n, B] -> [..., B]."""


def functions_of(settings: ReferenceConfig, pad_id: int) -> Functions:
    """Choose the method's own function or the reference's, as `settings` say."""
    padded = PaddedPool(settings.pool_length_tokens, pad_id)
    return Functions(
        jumping_softplus if settings.jumping_activation else softplus_scores,
        padded if settings.padded_pool else mean_of_contexts,
        mean_of_nonzero if settings.nonzero_mask else mean_per_example,
    )


def unit_normal_prompts(shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """Draw E [K, P, D] from N(0, 1), as PEFT does."""
    return torch.randn(shape, generator=generator)


def jumping_softplus(cos: torch.Tensor) -> torch.Tensor:
    """softplus(beta 10, threshold 1) jumps down from 0.1313 to 0.1 at cos = 0.1 (fault 3)."""
    return F.softplus(cos, beta=10, threshold=1)


def mean_of_nonzero(values: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens whose loss is not 0 (fault 5): [..., n], [n, B] -> [..., B]."""
    return (values @ member) / ((values != 0).to(values.dtype) @ member)


@dataclass(frozen=True)
class PaddedPool:
    """Mean over context, response and padding, as if each text had `length` tokens (fault 1)."""

    length: int
    pad_id: int

    def __call__(self, backbone: Backbone, packed: Packed, text: torch.Tensor) -> torch.Tensor:
        """text [t, D], the embeddings of `packed.ids` -> [B, D]; see `mean_of_contexts`.

        Raises ModelError where a text is longer than `length`.
        """
        batch = packed.batch
        longest = max(c + r for c, r in zip(batch.context_lens, batch.response_lens, strict=True))
        if longest > self.length:
            raise ModelError(
                f"reference.padded_pool: a text of {longest} tokens is longer than"
                f" reference.pool_length_tokens = {self.length}, to which texts are padded; set it"
                " to data.max_tokens or more"
            )
        # The padding is not embedded token by token: it is the same row so many times.
        sums = span_sums(text, torch.cat([packed.of_context, packed.of_response]))
        pads = self.length - (packed.context_tokens + packed.response_tokens)
        pad = backbone.embed(on_device([self.pad_id], text.device))
        return (sums + pads.to(sums.dtype)[:, None] * pad.to(sums.dtype)) / self.length
