"""Draws by a counter: the published generator, even and independent, whatever else is drawn."""

from __future__ import annotations

import math

import pytest
import torch

from spt_ds.config.generation import GenerateConfig
from spt_ds.model.logits import GumbelNoise, sampling
from spt_ds.rng import counted_uniform, gumbel_noise

FULL = 2**64 - 1
SEEDS = torch.tensor([1234567, 0, 2**63 - 1, 42])
# Of SplitMix64 with the seed 1234567, as its authors' C code prints them.
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]


def splitmix64(seed: int, number: int) -> int:
    """The same in Python's integers, which do not wrap around by themselves."""
    bits = (seed + number * 0x9E3779B97F4A7C15) & FULL
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & FULL
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & FULL
    return bits ^ (bits >> 31)


def twin(seed: int, position: int, token: int) -> float:
    return ((splitmix64(seed, (position << 32) + token + 1) >> 12) + 0.5) / 2**52


def test_the_generator_is_the_published_one() -> None:
    assert [splitmix64(1234567, n) for n in (1, 2, 3, 4)] == PUBLISHED
    for position in (0, 1, 31, 2**31 - 1):
        drawn = counted_uniform(SEEDS, position, 50)
        for row, seed in enumerate(SEEDS.tolist()):
            expected = [twin(seed, position, token) for token in range(50)]
            assert drawn[row].tolist() == expected


def test_no_draw_is_infinite() -> None:
    drawn = counted_uniform(torch.arange(64), 3, 20_000)
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert gumbel_noise(torch.arange(64), 3, 20_000).isfinite().all()


@pytest.mark.parametrize("along", ["seeds", "positions", "tokens"])
def test_draws_are_even_and_independent(along: str) -> None:
    """Pairs of neighbours fall evenly into the 16 x 16 squares of the unit square."""
    size = 400
    if along == "positions":
        drawn = torch.cat([counted_uniform(torch.tensor([7]), n, size) for n in range(size)])
    else:
        drawn = counted_uniform(torch.arange(size), 0, size)
    if along == "tokens":
        drawn = drawn.T
    cells = (drawn * 16).long()
    pairs = torch.bincount((cells[0::2] * 16 + cells[1::2]).flatten(), minlength=256)
    expected = pairs.sum() / 256
    chi2 = float((pairs - expected).square().sum() / expected)
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def test_the_likeliest_noisy_token_is_a_draw_from_the_softmax() -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 2
    seeds, positions = torch.arange(500), 40
    counts = torch.zeros(20)
    for position in range(positions):
        tokens = (logits + gumbel_noise(seeds, position, 20)).argmax(dim=1)
        counts += torch.bincount(tokens, minlength=20)
    expected = logits[0].softmax(dim=0) * len(seeds) * positions
    chi2 = float(((counts - expected).square() / expected).sum())
    assert chi2 < 19 + 5 * math.sqrt(2 * 19)


def test_each_row_draws_by_its_key_and_the_length_of_its_reply() -> None:
    logits = torch.zeros(3, 1000)
    noisy = GumbelNoise([(5,), (9,), (5,)], seed=1)
    none, two = torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long)
    first = noisy(none, logits)
    assert torch.equal(first[0], first[2])  # rows that are fused
    assert not torch.equal(first[0], first[1])
    assert torch.equal(noisy(none, logits), first)  # nothing is used up
    assert not torch.equal(noisy(two, logits)[0], first[0])
    alone = GumbelNoise([(9,)], seed=1)
    assert torch.equal(alone(two[:1], logits[:1])[0], noisy(two, logits)[1])
    assert not torch.equal(GumbelNoise([(9,)], seed=2)(none[:1], logits[:1])[0], first[1])


def test_nothing_is_drawn_where_replies_are_greedy() -> None:
    assert sampling(GenerateConfig(), [(0,)], 0) == []
