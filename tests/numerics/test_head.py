"""The head: precise logits at any width, and no more of them at a time than `head_chunk_mib`."""

from __future__ import annotations

import types
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spt_ds.model import head as head_module
from spt_ds.model.head import FrozenHead, product
from tests.helpers.tolerances import HEAD, grad_gap, value_gap

VOCABULARY, WIDTH, ROWS = 257, 8, 100


class LogitMeter(TorchDispatchMode):
    """Counts the bytes of all live tensors with VOCABULARY columns, and the rows of the largest."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.known = {weight.untyped_storage().data_ptr()}
        self.live: dict[int, int] = {}
        self.peak_bytes = 0
        self.most_rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCABULARY:
            storage = out.untyped_storage()
            key = storage.data_ptr()
            if key not in self.known and key not in self.live:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
                self.most_rows = max(self.most_rows, out.shape[0])
                self.peak_bytes = max(self.peak_bytes, sum(self.live.values()))
        return out


def measure(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch, bias: bool
) -> tuple[LogitMeter, int]:
    """Forward and backward of ROWS rows where one `MiB` of the setting holds `rows` rows; the meter
    and that limit.
    """
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    head = FrozenHead(
        weight, torch.randn(VOCABULARY, generator=generator).to(dtype) if bias else None
    )
    limit = head.copies(precise) * VOCABULARY * precise.itemsize * rows
    monkeypatch.setattr(head_module, "MIB", limit)
    # The pieces of the weight that are widened are then narrower than the vocabulary.
    monkeypatch.setattr(head_module, "WIDENED", 64 * WIDTH)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    scale = torch.ones(ROWS, dtype=precise, requires_grad=True) if bias else None
    meter = LogitMeter(weight)
    with meter:
        head(hidden, torch.arange(ROWS) % VOCABULARY, scale, 1).sum().backward()
    assert hidden.grad is not None
    return meter, limit


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_live_logits_stay_under_the_limit(
    dtype: torch.dtype, rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter, limit = measure(dtype, rows, monkeypatch, bias)
    assert meter.most_rows == rows
    assert 0 < meter.peak_bytes <= limit


def test_the_meter_sees_logits_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk for everything is what the bound forbids: the meter must say so."""
    meter, _ = measure(torch.float32, 1000, monkeypatch, False)
    assert meter.most_rows == ROWS


@pytest.mark.parametrize("mib", [1, 128])
def test_chunks_fill_the_mebibytes_given(mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At OPT's vocabulary: 1 MiB holds five rows of fp32 logits, 128 MiB hold 667."""
    seen: list[int] = []
    monkeypatch.setattr(
        head_module._HeadLoss,
        "apply",
        lambda hidden, targets, weight, bias, scale, rows, precise: seen.append(rows),
    )
    FrozenHead(torch.zeros(50272, 1), None)(
        torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), None, mib
    )
    assert seen == [{1: 5, 128: 667}[mib]]
    assert seen[0] * 50272 * 4 <= mib * 2**20


def test_nothing_of_the_vocabulary_is_kept_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "MIB", VOCABULARY * 4 * 5)
    weight = torch.randn(VOCABULARY, WIDTH)
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
        FrozenHead(weight, None)(hidden, torch.zeros(ROWS, dtype=torch.long), None, 1).sum()
    assert saved
    assert all(VOCABULARY not in shape for shape in saved)


def operands(
    dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [ROWS, 32], weight [VOCABULARY, 32], targets; logits of 20 and less, as real ones."""
    generator = torch.Generator().manual_seed(0)
    hidden = 4 * torch.randn(ROWS, 32, generator=generator)
    weight = torch.randn(VOCABULARY, 32, generator=generator) / 4
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def head_gaps(dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """Largest difference of a loss, and of the gradient, from float64 of the same operands."""
    hidden, weight, targets = operands(dtype, device)
    exact = hidden.double().requires_grad_()
    right = torch.nn.functional.cross_entropy(exact @ weight.double().T, targets, reduction="none")
    right.sum().backward()
    hidden.requires_grad_()
    losses = FrozenHead(weight, None)(hidden, targets)
    losses.sum().backward()
    assert hidden.grad is not None
    assert exact.grad is not None
    return value_gap(losses.detach(), right.detach().cpu()), grad_gap(hidden.grad, exact.grad.cpu())


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HEAD, ids=str)
def test_losses_and_gradient_are_those_of_float64(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for widened in (32, 50 * 32, head_module.WIDENED):
        monkeypatch.setattr(head_module, "WIDENED", widened)
        loss, grad = head_gaps(dtype, device)
        assert loss <= HEAD[dtype].loss
        assert grad <= HEAD[dtype].grad


def test_the_comparison_sees_logits_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that hid the difference between two prompts: logits rounded once on the way."""

    def rounded(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(rows @ weight.T)

    monkeypatch.setattr(head_module, "product", rounded)
    loss, grad = head_gaps(torch.bfloat16)
    assert loss > 1e3 * HEAD[torch.bfloat16].loss
    assert grad > HEAD[torch.bfloat16].grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_a_16_bit_head_are_fp32(bias: bool, device: str) -> None:
    hidden, weight, _ = operands(torch.bfloat16, device)
    shift = torch.linspace(-1, 1, VOCABULARY, device=device).bfloat16() if bias else None
    logits = FrozenHead(weight, shift)(hidden.view(2, ROWS // 2, 32))
    right = hidden.double() @ weight.double().T + (shift.double() if shift is not None else 0)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits.double(), right.view(2, ROWS // 2, VOCABULARY), rtol=1e-6, atol=1e-5
    )


def test_a_gpu_multiplies_16_bits_into_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that a CPU refuses, against the signature of the torch that is installed."""
    schema = torch._C._get_schema("aten::mm", "dtype_out")
    assert [a.name for a in schema.arguments] == ["self", "mat2", "out_dtype", "out"]
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "mm", lambda a, b, **options: calls.append(options))
    weight, out = torch.zeros(5, 4, dtype=torch.bfloat16), torch.zeros(3, 5)
    on_gpu: Any = types.SimpleNamespace(dtype=torch.bfloat16, is_cuda=True)
    product(on_gpu, weight, out)
    assert [sorted(call) for call in calls] == [["out", "out_dtype"]]
    assert calls[0]["out_dtype"] == torch.float32
