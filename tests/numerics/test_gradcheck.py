"""Every differentiable function of the model layer against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import gradcheck

from spt_ds.errors import ModelError
from spt_ds.model import head as head_module
from spt_ds.model import losses
from spt_ds.model.attention import Branches, Layout
from spt_ds.model.head import FrozenHead
from spt_ds.model.reference import Mean, mean_of_nonzero
from spt_ds.model.retriever import Retriever, softplus_scores
from tests.helpers.tiny import random_batch, tiny_backbone, tiny_spt

V, D, N = 11, 5, 7


def membership(lens: tuple[int, ...]) -> torch.Tensor:
    """[n, B], 1 where token i belongs to example b."""
    return torch.block_diag(*(torch.ones(n, 1) for n in lens)).double()


def random(*shape: int, seed: int = 0, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def rows_per_chunk(monkeypatch: pytest.MonkeyPatch, module: FrozenHead, rows: int) -> None:
    """Make `chunk_mib=1` mean that many rows: a MiB holds no fewer than thousands of tiny ones."""
    monkeypatch.setattr(head_module, "MIB", module.copies(torch.float64) * V * 8 * rows)


def head(bias: bool) -> FrozenHead:
    return FrozenHead(
        random(V, D, seed=1, grad=False), random(V, seed=2, grad=False) if bias else None
    )


@pytest.mark.parametrize("chunk_rows", [1, 3, N, 100])
@pytest.mark.parametrize("kind", ["plain", "bias", "scaled"])
def test_head_loss(kind: str, chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, targets = head(kind != "plain"), torch.arange(N) % V
    rows_per_chunk(monkeypatch, module, chunk_rows)
    scale = random(N, seed=3) if kind == "scaled" else None

    def loss(hidden: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
        return module(hidden, targets, scales[0] if scales else None, 1)

    inputs = (random(N, D), *([scale] if scale is not None else []))
    assert gradcheck(loss, inputs)


def test_head_loss_with_a_gradient_to_the_scale_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hidden, targets = head(True), random(N, D, grad=False), torch.arange(N) % V
    rows_per_chunk(monkeypatch, module, 2)
    assert gradcheck(lambda scale: module(hidden, targets, scale, 1), (random(N, seed=3),))


@pytest.mark.parametrize("bias", [False, True])
def test_head_loss_is_cross_entropy_of_its_logits(bias: bool) -> None:
    module, hidden, targets = head(bias), random(N, D, grad=False), torch.arange(N) % V
    expected = torch.nn.functional.cross_entropy(module(hidden), targets, reduction="none")
    torch.testing.assert_close(module(hidden, targets), expected, rtol=1e-13, atol=1e-13)


def test_selection() -> None:
    nll, scores = random(4, 3, grad=False).abs(), random(4, 3, seed=1)
    assert gradcheck(lambda s: losses.selection(nll, s, 0.7, 1.3), (scores,))


def test_selection_gives_nothing_to_the_gold_side() -> None:
    nll, scores = random(4, 3), random(4, 3, seed=1)
    losses.selection(nll, scores, 0.7, 1.3).sum().backward()
    assert nll.grad is None
    assert scores.grad is not None
    assert float(scores.grad.abs().min()) > 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_mixture(temperature: float) -> None:
    totals, scores = random(4, 3), random(4, 3, seed=1)
    assert gradcheck(lambda t, s: losses.mixture(t, s, 0.7, temperature), (totals, scores))


def test_balance() -> None:
    scores = random(4, 6)
    assert gradcheck(
        lambda s: losses.balance(losses.mixture_weights(s, 0.7).mean(dim=1)), (scores,)
    )
    assert float(losses.balance(torch.full((4,), 0.25))) == 0.0


def test_a_mixture_stays_finite_where_prompts_and_gate_are_far_apart() -> None:
    totals = torch.tensor([[0.0], [900.0], [40.0]], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[0.3], [1.3], [0.3]], dtype=torch.float64, requires_grad=True)
    found = losses.mixture(totals, scores, 0.001, 1.0)
    found.sum().backward()
    assert torch.isfinite(found).all()
    for tensor in (totals, scores):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_fuse() -> None:
    assert gradcheck(losses.fuse, (random(3, N, D), random(3, N, seed=1)))


@pytest.mark.parametrize("target", [1.0, -1.0])
def test_contrastive(target: float) -> None:
    left, right = (
        random(4, 6).detach().abs().requires_grad_(),
        random(4, 6, seed=1).detach().abs().requires_grad_(),
    )
    targets = torch.full((6,), target, dtype=torch.float64)
    assert gradcheck(lambda a, b: losses.contrastive(a, b, targets), (left, right))


@pytest.mark.parametrize("mean", [losses.mean_per_example, mean_of_nonzero])
def test_mean_per_example(mean: Mean) -> None:
    member = membership((2, 4, 1))
    assert gradcheck(lambda values: mean(values, member), (random(3, N),))


@pytest.mark.parametrize("padded", [False, True])
def test_pool(padded: bool) -> None:
    backbone = tiny_backbone("opt")
    settings = {"padded_pool": padded, "pool_length_tokens": 9}
    spt = tiny_spt(backbone, reference=settings)
    packed = spt.pack(random_batch(((2, 1), (3, 2), (1, 4))))
    text = random(len(packed.ids), backbone.embed_size)
    assert gradcheck(lambda rows: spt.functions.pool(backbone, packed, rows), (text,))


def test_a_text_longer_than_the_padding_is_refused() -> None:
    backbone = tiny_backbone("opt")
    spt = tiny_spt(backbone, reference={"padded_pool": True, "pool_length_tokens": 8})
    batch = random_batch(((2, 1), (6, 3)))
    with pytest.raises(ModelError, match=r"a text of 9 tokens .*pool_length_tokens = 8"):
        backbone(spt.score, spt.pack(batch))


@pytest.mark.parametrize(
    ("shared", "keys", "tensors"), [(False, 0, 4), (True, 0, 2), (False, 3, 3)]
)
def test_retriever(shared: bool, keys: int, tensors: int) -> None:
    generator = torch.Generator().manual_seed(0)
    retriever = Retriever(D, shared=shared, keys=keys, generator=generator).double()

    def scores(bank: torch.Tensor, pooled: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        names = [name for name, _ in retriever.named_parameters()]
        out = torch.func.functional_call(
            retriever, dict(zip(names, weights, strict=True)), (bank, pooled)
        )
        assert isinstance(out, torch.Tensor)
        return out

    weights = [p.detach().clone().requires_grad_() for p in retriever.parameters()]
    assert len(weights) == tensors
    assert gradcheck(scores, (random(3, 2, D), random(4, D, seed=1), *weights))


def test_softplus() -> None:
    assert gradcheck(softplus_scores, (random(4, 3),))


def attend_rows(backend: str) -> Callable[..., torch.Tensor]:
    lens = (3, 1, 5)
    positions = torch.cat([torch.arange(n) for n in lens])
    layout = Layout(lens, positions, backend)
    return lambda q, k, v: layout.attend(0, q, k, v, 0.6)


def attend_branches(backend: str) -> Callable[..., torch.Tensor]:
    """Two examples with contexts of 4 and 2 tokens, two branches of 2 and 3 tokens each."""
    context = Layout((4, 2), torch.arange(6), backend, record=True)
    context.recorded = {
        0: (random(1, 2, 6, 4, seed=8, grad=False), random(1, 2, 6, 4, seed=9, grad=False))
    }
    branches = Branches([4, 6], torch.arange(10), backend, count=2, context=context)
    return lambda q, k, v: branches.attend(0, q, k, v, 0.6)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("layout", "tokens"), [(attend_rows, 9), (attend_branches, 10)])
@pytest.mark.parametrize("heads", [2, 4], ids=["mha", "gqa"])
def test_attention(
    layout: Callable[[str], Callable[..., torch.Tensor]], tokens: int, heads: int, backend: str
) -> None:
    inputs = (
        random(1, heads, tokens, 4),
        random(1, 2, tokens, 4, seed=1),
        random(1, 2, tokens, 4, seed=2),
    )
    assert gradcheck(layout(backend), inputs)
