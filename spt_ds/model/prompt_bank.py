"""The bank of K soft prompts of P virtual tokens, always in fp32.

Huang et al. 2024, section 3; Lester et al. 2021. Legend: K prompts, P virtual tokens, D embedding
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

# Token ids [n] -> rows of the frozen table [n, D].
EmbeddingRows = Callable[[torch.Tensor], torch.Tensor]


class PromptBank(nn.Module):
    """`weight` is E of shape [K, P, D]."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    @property
    def count(self) -> int:
        return self.weight.shape[0]

    @property
    def tokens(self) -> int:
        return self.weight.shape[1]


def initial_prompts(
    init: str,
    shape: tuple[int, int, int],
    rows: EmbeddingRows,
    vocabulary: int,
    text_ids: Sequence[Sequence[int]],
    generator: torch.Generator,
) -> torch.Tensor:
    """Return E [K, P, D] in fp32 on the CPU.

    `vocab` copies randomly chosen rows of the frozen table, `text` and `template` the rows of given
    token ids (repeated or cut to P), `normal` draws at the table's own mean square. `vocab` is the
    default because in PEFT's method comparison init and learning rate alone move prompt tuning from
    5.7 to 34.3 %.
    """
    count, tokens, _ = shape
    if init in ("text", "template"):
        lists = [text_ids[k % len(text_ids)] for k in range(count)]
        ids = torch.tensor([[text[p % len(text)] for p in range(tokens)] for text in lists])
        return rows(ids.flatten()).float().cpu().view(shape)
    # `normal` measures its deviation on a sample: under ZeRO-3 the whole table is on no rank.
    sample = torch.randint(vocabulary, (max(count * tokens, 4096),), generator=generator)
    table = rows(sample).float().cpu()
    if init == "vocab":
        return table[: count * tokens].reshape(shape).clone()
    return torch.randn(shape, generator=generator) * table.std()
