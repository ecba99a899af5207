"""The memory of the vocabulary logits is bounded by `head_chunk_mib`, whatever the number of rows."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spt_ds.model import head as head_module
from spt_ds.model.head import FrozenHead

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
