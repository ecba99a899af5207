"""Decoding: each example once with its own prompt, the same alone, in a batch, on any split; every
mode.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from spt_ds.batch import Batch
from spt_ds.config.generation import GenerateConfig
from spt_ds.model.attention import Layout
from spt_ds.model.backbone import Backbone
from spt_ds.model.conversation import Endings
from spt_ds.model.decode import BestOf, Decoded, choose_prompts, decode
from spt_ds.model.logits import FuseRows, MixRows
from spt_ds.model.spt import Spt
from tests.helpers.tiny import examples_of, pick, random_batch, tiny_backbone, tiny_spt
from tests.numerics.steps import MIXTURE

ARCHS = ["opt", "llama"]
PLACEMENTS = ["prefix", "suffix"]
NEVER = 10_000  # an end-of-sequence id that no tiny base can produce


def tiny(arch: str, placement: str, count: int = 3) -> tuple[Backbone, Spt, Batch]:
    backbone = tiny_backbone(arch)
    spt = tiny_spt(backbone, prompts={"count": count, "tokens": 2, "placement": placement})
    return backbone, spt, random_batch([(3, 2), (9, 3), (5, 2), (7, 4)])


def run(
    backbone: Backbone,
    spt: Spt,
    batch: Batch,
    end: int = NEVER,
    best_of: BestOf | None = None,
    **options: Any,
) -> Decoded:
    settings = GenerateConfig(**{"max_new_tokens": 6, **options})
    endings = Endings((end,), 0)
    with torch.no_grad():
        out: Decoded = backbone(decode, spt, batch, settings, endings, False, None, best_of)
    return out


def alone(batch: Batch, place: int) -> Batch:
    """One example of the batch under its own index."""
    return replace(pick(batch, [place]), indices=(batch.indices[place],))


def direct(
    backbone: Backbone, spt: Spt, batch: Batch, place: int, weights: torch.Tensor, steps: int
) -> list[int]:
    """Greedy decoding of one example without a cache: the packed path, one whole pass per prompt
    and token.
    """
    context = examples_of(batch)[place][0]
    suffix = spt.suffix
    tokens: list[int] = []
    for _ in range(steps):
        mixed = torch.zeros(backbone.vocabulary, dtype=weights.dtype)
        for k, weight in enumerate(weights):
            if weight == 0:
                continue
            text, prompt = backbone.embed(context), spt.trainables.bank.weight[k]
            parts = [text, prompt] if suffix else [prompt, text]
            row = torch.cat([*parts, backbone.embed(torch.tensor(tokens, dtype=torch.long))])
            layout = Layout([len(row)], torch.arange(len(row)), "sdpa")
            mixed += weight * backbone.head(backbone.run(row, layout)[-1])
        tokens.append(int(mixed.argmax()))
    return tokens


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_replies_equal_direct_decoding_alone_and_in_a_batch(arch: str, placement: str) -> None:
    backbone, spt, batch = tiny(arch, placement)
    together = run(backbone, spt, batch, mode="random")
    assert len(set(together.chosen)) > 1, "the case must mix prompts in one batch"
    for place, k in enumerate(together.chosen):
        assert k is not None
        one_hot = torch.nn.functional.one_hot(torch.tensor(k), 3).double()
        assert together.tokens[place] == direct(backbone, spt, batch, place, one_hot, 6)
        assert (
            run(backbone, spt, alone(batch, place), mode="random").tokens[0]
            == together.tokens[place]
        )


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_fuse_mixes_all_prompts_logits(placement: str) -> None:
    backbone, spt, batch = tiny("llama", placement)
    out = run(backbone, spt, batch, mode="fuse")
    assert out.chosen == [None] * 4
    for place in range(4):
        assert out.tokens[place] == direct(
            backbone, spt, batch, place, out.scores[:, place].double(), 6
        )


def test_fuse_mixes_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling tells; greedy decoding cannot: the weights differ by one factor for all prompts."""
    mixed: list[torch.Tensor] = []
    right = FuseRows.__init__
    monkeypatch.setattr(
        FuseRows,
        "__init__",
        lambda self, weights: (mixed.append(weights), right(self, weights))[1],  # type: ignore[func-returns-value]
    )
    backbone, _, batch = tiny("llama", "prefix")
    spt = tiny_spt(backbone, losses={"fusion_weights": "normalised"})
    scores = run(backbone, spt, batch, mode="fuse").scores
    torch.testing.assert_close(mixed[0], scores / scores.sum(dim=0))


@torch.no_grad()
def mixture_twin(
    backbone: Backbone, spt: Spt, batch: Batch, place: int, prior: torch.Tensor, steps: int
) -> list[int]:
    """Greedy decoding of sum_k pi_k p_k(reply), each candidate token by its whole likelihood."""
    context = examples_of(batch)[place][0]
    suffix = spt.suffix
    tokens: list[int] = []
    for _ in range(steps):
        whole = []
        for k, share in enumerate(prior):
            text, prompt = backbone.embed(context), spt.trainables.bank.weight[k]
            parts = [text, prompt] if suffix else [prompt, text]
            row = torch.cat([*parts, backbone.embed(torch.tensor(tokens, dtype=torch.long))])
            layout = Layout([len(row)], torch.arange(len(row)), "sdpa")
            told = backbone.head(backbone.run(row, layout)).double().log_softmax(-1)
            begin = len(row) - len(tokens) - 1
            said = sum(
                (told[begin + n, token] for n, token in enumerate(tokens)), told.new_zeros(())
            )
            whole.append((share.log() + said.sum() + told[-1]).exp())
        tokens.append(int(torch.stack(whole).sum(dim=0).argmax()))
    return tokens


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_fuse_is_the_mixture_where_that_was_trained(
    placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, _, batch = tiny("llama", placement)
    for parameter in backbone.lm.parameters():
        parameter.data.mul_(3.0)  # so that prompts say unlike things
    spt = tiny_spt(backbone, prompts={"tokens": 2, "placement": placement}, losses=MIXTURE)
    out = run(backbone, spt, batch, mode="fuse")
    prior = (out.scores.double() / MIXTURE["tau_sim"]).softmax(dim=0)
    expected = [mixture_twin(backbone, spt, batch, place, prior[:, place], 6) for place in range(4)]
    assert out.tokens == expected
    # A deliberate fault: weights that do not learn from the tokens of the reply.
    monkeypatch.setattr(
        MixRows,
        "__call__",
        lambda self, ids, logits: (
            (self.weights.log()[..., None] + logits.view(*self.weights.shape, -1).log_softmax(-1))
            .logsumexp(0)
            .repeat(len(self.weights), 1)
        ),
    )
    assert run(backbone, spt, batch, mode="fuse").tokens != expected


def test_fused_rows_share_a_context_that_is_read_once() -> None:
    backbone, spt, batch = tiny("llama", "suffix")
    tokens: list[int] = []
    backbone.lm.base_model.layers[0].register_forward_hook(
        lambda module, inputs, out: tokens.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    run(backbone, spt, batch, mode="fuse")
    longest, rows = max(batch.context_lens), 3 * len(batch)
    assert tokens == [len(batch) * longest, rows * 2, *[rows] * 5]  # contexts, prompts, replies


def lowest(candidates: list[list[int]], shares: list[float]) -> int:
    """A choice that tells candidates apart: the one that comes first in order of its numbers."""
    return min(range(len(candidates)), key=candidates.__getitem__)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rank_keeps_one_of_the_replies_of_all_prompts(placement: str) -> None:
    backbone, spt, batch = tiny("llama", placement)
    each = [run(backbone, spt, batch, mode=f"fixed:{k}") for k in range(3)]
    out = run(backbone, spt, batch, mode="rank", perplexity=True, best_of=lowest)
    assert len(set(out.chosen)) > 1, "the case must mix prompts"
    for place, k in enumerate(out.chosen):
        candidates = [one.tokens[place] for one in each]
        assert k == lowest(candidates, [])
        assert out.tokens[place] == candidates[k]
    with torch.no_grad():
        nll = backbone(spt.micro_losses, batch, 1, 1).nll
    assert out.nll is not None
    torch.testing.assert_close(out.nll, torch.stack([nll[k, b] for b, k in enumerate(out.chosen)]))


def test_rank_weighs_prompts_by_their_shares_and_samples_alike() -> None:
    backbone, spt, batch = tiny("llama", "prefix")
    hot: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "samples": 2}
    given: list[tuple[list[list[int]], list[float]]] = []

    def note(candidates: list[list[int]], shares: list[float]) -> int:
        given.append((candidates, shares))
        return 3  # the second sample of prompt 1

    out = run(backbone, spt, batch, mode="rank", best_of=note, **hot)
    assert out.chosen == [1] * 4
    pi = (out.scores / spt.config.losses.tau_sim).softmax(dim=0)
    for place, (candidates, shares) in enumerate(given):
        assert out.tokens[place] == candidates[3]
        assert len({tuple(tokens) for tokens in candidates}) == 6
        torch.testing.assert_close(
            torch.tensor(shares), pi[:, place].float().repeat_interleave(2) / 2
        )
    # The same alone: noise is keyed by the example and the candidate.
    for place in range(4):
        one = run(backbone, spt, alone(batch, place), mode="rank", best_of=note, **hot)
        assert one.tokens[0] == out.tokens[place]


@pytest.mark.parametrize("padded", [False, True])
def test_the_reference_reply_has_no_part_in_the_choice(padded: bool) -> None:
    """`padded_pool` pools over the whole text in training, as the public reference does; at test
    there is no reply.
    """
    backbone, _, batch = tiny("llama", "prefix")
    spt = tiny_spt(backbone, reference={"padded_pool": padded, "pool_length_tokens": 24})
    known, unknown = run(backbone, spt, batch), run(backbone, spt, batch.contexts())
    assert torch.equal(known.scores, unknown.scores)
    assert known.tokens == unknown.tokens
    with torch.no_grad():
        trained = backbone(spt.score, spt.pack(batch))[2]
    assert torch.equal(trained, known.scores) is not padded, "the case must tell the two apart"


def test_each_example_is_decoded_once_whatever_the_prompts() -> None:
    backbone, spt, batch = tiny("opt", "prefix")
    rows: list[int] = []
    backbone.lm.base_model.decoder.layers[0].register_forward_hook(
        lambda module, inputs, out: rows.append(
            (out[0] if isinstance(out, tuple) else out).shape[0]
        )
    )
    run(backbone, spt, batch)
    assert sum(rows) == len(batch) * 6  # row-steps = examples x tokens


def test_a_reply_ends_with_its_end_of_sequence() -> None:
    backbone, spt, batch = tiny("llama", "prefix")
    whole = run(backbone, spt, batch).tokens
    end = whole[1][2]
    for plain, cut in zip(whole, run(backbone, spt, batch, end=end).tokens, strict=True):
        assert cut == (plain[: plain.index(end) + 1] if end in plain else plain)


def test_sampling_does_not_depend_on_the_batch() -> None:
    backbone, spt, batch = tiny("llama", "prefix")
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_p": 0.95}
    together = run(backbone, spt, batch, **options).tokens
    assert together == [
        run(backbone, spt, alone(batch, place), **options).tokens[0] for place in range(4)
    ]
    assert together != run(backbone, spt, batch).tokens


def test_perplexity_is_the_loss_under_the_chosen_prompt() -> None:
    backbone, spt, batch = tiny("opt", "suffix")
    out = run(backbone, spt, batch, perplexity=True)
    with torch.no_grad():
        expected = backbone(spt.micro_losses, batch, 1, 1).nll
    assert out.nll is not None
    for place, k in enumerate(out.chosen):
        assert k is not None
        assert torch.allclose(out.nll[place], expected[k, place], atol=1e-9)


@torch.no_grad()
def likelihood(
    backbone: Backbone, spt: Spt, batch: Batch, place: int, k: int, tokens: list[int]
) -> float:
    """Log-likelihood of a reply after its context and prompt k, in one pass."""
    context = examples_of(batch)[place][0]
    ids = torch.cat([context, torch.tensor(tokens)])
    row = torch.cat([spt.trainables.bank.weight[k], backbone.embed(ids)])
    logits = backbone.head(backbone.run(row, Layout([len(row)], torch.arange(len(row)), "sdpa")))
    told = logits.log_softmax(-1)[-len(tokens) - 1 : -1]
    return float(told[torch.arange(len(tokens)), torch.tensor(tokens)].sum())


def test_beams_find_replies_of_higher_likelihood() -> None:
    backbone, spt, batch = tiny("llama", "prefix")
    found = {beams: run(backbone, spt, batch, num_beams=beams) for beams in (1, 4)}
    gains = []
    for place, k in enumerate(found[1].chosen):
        assert k is not None
        one, four = (
            likelihood(backbone, spt, batch, place, k, out.tokens[place]) for out in found.values()
        )
        gains.append(four - one)
    assert min(gains) > -1e-9
    assert max(gains) > 1e-3, "the case must have a reply that greedy decoding misses"


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"mode": "fuse"}, {"mode": "noise:0.5"}], ids=str
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_reply_is_the_same_alone(placement: str, options: dict[str, Any]) -> None:
    backbone, spt, batch = tiny("opt", placement)
    together = run(backbone, spt, batch, **options).tokens
    assert together == [
        run(backbone, spt, alone(batch, place), **options).tokens[0] for place in range(4)
    ]


def test_a_nucleus_holds_the_likeliest_tokens_only() -> None:
    """With a share below the likeliest token's the draw is greedy; with a larger one it is not."""
    backbone, spt, batch = tiny("llama", "prefix")
    hot = {"do_sample": True, "temperature": 3.0}
    assert run(backbone, spt, batch, **hot, top_p=1e-6).tokens == run(backbone, spt, batch).tokens  # type: ignore[arg-type]
    assert (
        run(backbone, spt, batch, **hot, top_p=0.2).tokens  # type: ignore[arg-type]
        != run(backbone, spt, batch, **hot).tokens  # type: ignore[arg-type]
    )


def test_prompt_choice_by_mode() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.7]])
    assert choose_prompts("select", scores, (4, 5), 0) == [0, 1]
    assert choose_prompts("fixed:1", scores, (4, 5), 0) == [1, 1]
    alone_each = choose_prompts("random", scores[:, :1], (4,), 0) + choose_prompts(
        "random", scores[:, 1:], (5,), 0
    )
    assert choose_prompts("random", scores, (4, 5), 0) == alone_each
    many = [choose_prompts("random", scores[:, :1], (index,), 0)[0] for index in range(50)]
    assert set(many) == {0, 1}


def test_fault_08_noise_is_added_to_scores_and_never_to_a_probability() -> None:
    """Noise on a probability can leave [0, 1] and turn the KL loss into NaN; on scores any noise is
    harmless.
    """
    scores = torch.tensor([[0.69], [0.31]])
    picks = [choose_prompts("noise:50", scores, (index,), 0)[0] for index in range(200)]
    assert 60 < sum(k == 0 for k in picks if k is not None) < 140
    assert choose_prompts("noise:0", scores, (1,), 0) == [0]
    from spt_ds.model.losses import selection

    assert torch.isfinite(selection(torch.rand(2, 3), torch.randn(2, 3) * 50, 1.0, 1.0)).all()
