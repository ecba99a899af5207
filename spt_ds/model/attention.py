"""Attention over packed rows: many independent rows side by side in one [1, N] sequence, none of
them padded.

The projections, norms and feed-forward layers of the base see real tokens only; rows meet in
attention alone, and there a `Layout` keeps them apart. It travels through the base's forward as the
keyword `layout`.

Legend: R rows, N packed tokens, n tokens of a row, H heads (G key/value heads), E head size, B
examples, K prompts.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from spt_ds.errors import ModelError
from spt_ds.log import fallback, say_once
from spt_ds.model.graph_attention import attend as graph_attend
from spt_ds.model.varlen import AttendTo, Rows, Segment

PACKED = "spt_packed"  # the name under which transformers finds `packed_attention`
KeyValue = tuple[torch.Tensor, torch.Tensor]
AMPERE = (8, 0)  # the compute capability from which on the variable-length kernels run
FLASH_4_CARDS = (9, 10, 11)  # Hopper and Blackwell of data centres


@dataclass(eq=False)
class Layout:
    """R causal rows in one packed sequence."""

    lens: Sequence[int]  # [R]
    positions: torch.Tensor  # int64 [N], on the device of the rows
    backend: str
    record: bool = False  # keep every layer's keys and values for `Branches`
    recorded: dict[int, KeyValue] = field(default_factory=dict)  # by the number of the layer
    number: torch.Tensor | None = None  # by which compiled layers find it

    @cached_property
    def reach(self) -> int:
        """Most tokens that one token can attend to."""
        return max(self.lens)

    @cached_property
    def rows(self) -> Rows:
        """Where rows begin and end; the variable-length kernels alone read it."""
        return Rows(self.lens, self.positions.device)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q [1, H, N, E], k and v [1, G, N, E] -> [1, N, H, E], causal within each row."""
        # The branches take no gradient to these, so nothing here needs a graph.
        if self.record:
            self.recorded[layer] = (k.detach(), v.detach())
        if self.backend in ("varlen", "flash"):
            q, k, v = _packed(q), _packed(k), _packed(v)
            if self.backend == "flash":
                return _flash(q, k, v, self.rows, scale)[None]
            own = Segment(k.detach(), v.detach(), self.rows, self.rows, causal=True)
            return _attend_to(q, k, v, [own], scale)
        out: torch.Tensor = _RowByRow.apply(q, k, v, self, layer, scale)
        return out

    def attend_within(
        self,
        window: int | None,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """`attend`, in a base whose tokens see `window` tokens at most."""
        # Up to this length a sliding window hides nothing, so a row needs no mask but the causal
        # one. A longer row would be read wrongly without an error.
        if window is not None and self.reach > window:
            raise ModelError(
                f"rows of {self.reach} tokens exceed this base's sliding window of {window}; lower"
                " data.max_tokens"
            )
        return self.attend(layer, q, k, v, scale)

    def attend_row(
        self, row: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One row, causal: q [1, H, n, E], k and v [1, G, n, E] -> [1, H, n, E]."""
        if self.backend == "eager":
            return _eager(q, k, v, scale)
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


@dataclass(eq=False, kw_only=True)
class Branches(Layout):
    """K short rows per example that read one shared context: each example's context is stored once,
    not K times.

    Packed order is example-major: the K branches of example 0, then those of example 1. Each row of
    this layout is one example's K branches together. The variable-length kernels take such a tree
    in two calls: all branches of an example on its context, and each branch on itself. Without them
    it is written out row by row: the scores of a few branch tokens are small, and neither keys of
    the context are copied nor pairs of tokens of different branches computed.
    """

    count: int  # K
    context: Layout

    @cached_property
    def reach(self) -> int:
        """Most tokens that one token can attend to: its context and its own branch."""
        return max(c + n // self.count for c, n in zip(self.context.lens, self.lens, strict=True))

    @cached_property
    def branches(self) -> Rows:
        """Where each branch by itself begins and ends."""
        lens = [n // self.count for n in self.lens for _ in range(self.count)]
        return Rows(lens, self.positions.device)

    @cached_property
    def future(self) -> torch.Tensor:
        """bool [n, n], the pairs of a longest branch in which the key comes after the query."""
        longest = max(self.lens) // self.count
        square = torch.ones(longest, longest, dtype=torch.bool, device=self.positions.device)
        return square.triu(1)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q [1, H, N, E], k and v [1, G, N, E] -> [1, N, H, E], causal in each branch, all of its
        context visible.
        """
        if layer not in self.context.recorded:
            raise ModelError(
                f"layer {layer} kept no keys of the context; this base needs prompts.position:"
                " before_text"
            )
        # A kernel that attends to no key gives no finite log-sum-exp to merge by.
        if self.backend in ("varlen", "flash") and min(self.context.lens) > 0:
            context_k, context_v = map(_packed, self.context.recorded[layer])
            read = Segment(context_k, context_v, self.rows, self.context.rows, causal=False)
            q, k, v = _packed(q), _packed(k), _packed(v)
            own = Segment(k.detach(), v.detach(), self.branches, self.branches, causal=True)
            return _attend_to(q, k, v, [read, own], scale)
        out: torch.Tensor = _RowByRow.apply(q, k, v, self, layer, scale)
        return out

    def attend_row(
        self, row: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One example's K branches of n tokens: q [1, H, K n, E], k and v [1, G, K n, E] -> [1, H,
        K n, E].
        """
        # The context's keys [1, G, C, E] meet all queries of their group at once.
        context_k, context_v = (
            tensor.split(self.context.lens, dim=2)[row] for tensor in self.context.recorded[layer]
        )
        n, groups = q.shape[2] // self.count, k.shape[1]
        # Scores are products of fp32: rounded to bf16 they would double the error of the output.
        own_q = _precise(q).unflatten(2, (self.count, n)).unflatten(1, (groups, -1))
        own_k, own_v = (
            tensor.unflatten(2, (self.count, n)).unsqueeze(2) for tensor in (_precise(k), v)
        )  # [1, G, 1, K, n, E]; own_q is [1, G, H / G, K, n, E]
        to_context = own_q.flatten(2, 4) @ _precise(context_k).transpose(2, 3)
        to_context = to_context.view(*own_q.shape[:5], -1)
        to_own = (own_q @ own_k.transpose(4, 5)).masked_fill(self.future[:n, :n], float("-inf"))
        # The scores of both parts share one softmax, so they are joined. To join the keys instead
        # would copy the context once per branch.
        weights = _softmax(torch.cat([to_context, to_own], dim=5), scale).to(v.dtype)
        on_context, on_own = weights.split([context_k.shape[2], n], dim=5)
        out = (on_context.flatten(2, 4) @ context_v).view(own_q.shape) + on_own @ own_v
        return out.flatten(3, 4).flatten(1, 2)


class _RowByRow(torch.autograd.Function):
    """Attention of one row after the other: what stands in one cannot reach another, not even a
    NaN.

    Nothing is padded, and nothing is kept for the backward pass but q, k and v: each row is
    attended to again there. At usual lengths that is a fortieth of a step's work, and it saves
    attention's output and, in branches, a copy of each context's keys and values in every layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        layer: int,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.layout, ctx.layer, ctx.scale = layout, layer, scale
        # Heads last, as transformers reads the result. Each row writes through a transposed view,
        # so that no row is copied again.
        out = v.new_empty(1, q.shape[2], q.shape[1], v.shape[3])  # [1, N, H, E]
        rows = zip(
            *(tensor.split(layout.lens, dim=2) for tensor in (out.transpose(1, 2), q, k, v)),
            strict=True,
        )
        for row, (target, q_row, k_row, v_row) in enumerate(rows):
            target.copy_(layout.attend_row(row, layer, q_row, k_row, v_row, scale))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layout: Layout = ctx.layout
        saved = ctx.saved_tensors
        into = [torch.empty_like(tensor) for tensor in saved]
        pieces = (
            tensor.split(layout.lens, dim=2) for tensor in (grads[0].transpose(1, 2), *saved, *into)
        )
        for row, (grad, *inputs_and_targets) in enumerate(zip(*pieces, strict=True)):
            # The graph of one row at a time, freed before the next. A backward pass runs without
            # grad mode, so it is switched on.
            own = [tensor.detach().requires_grad_() for tensor in inputs_and_targets[:3]]
            with torch.enable_grad():
                out = layout.attend_row(row, ctx.layer, own[0], own[1], own[2], ctx.scale)
            parts = torch.autograd.grad(out, own, grad)
            for target, part in zip(inputs_and_targets[3:], parts, strict=True):
                target.copy_(part)
        # A context gets no gradient: its keys and values are in `layout`, which is no tensor that
        # autograd follows. Nothing that trains precedes a context.
        return (*into, None, None, None)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that `transformers` calls in every layer; returns [1, N, H, E]."""
    if layout is None:
        raise ModelError(
            f"{type(module).__name__} does not hand keywords on to its attention: packed rows need"
            " that"
        )
    # SDPA has no argument for these: to pass over them would give other numbers and no error.
    for unsupported in ("softcap", "s_aux"):
        if kwargs.get(unsupported) is not None:
            raise ModelError(
                f"{type(module).__name__} uses {unsupported} in its attention, which packed rows do"
                " not support"
            )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = kwargs.get("sliding_window")
    if torch.compiler.is_compiling():
        numbers = layout.number, module.layer_number
        return graph_attend(query, key, value, *numbers, scale, window or 0), None
    layer = getattr(module, "layer_idx", 0)
    return layout.attend_within(window, layer, query, key, value, scale), None


# The layout is the mask. None is registered beside it: transformers makes none for a name that it
# does not know, and for one that it knows it first reads the positions from the device.
AttentionInterface.register(PACKED, packed_attention)


def choose_backend(asked: str, device: torch.device, dtype: torch.dtype, *, strict: bool) -> str:
    """Pick the kernel for `model.attention: asked`, say it once with the reason, and return its
    name.
    """
    usable = usable_backends(device, dtype)
    package = _flash_package() if usable["flash"] else None
    half_on_gpu = _half_on_gpu(device, dtype)
    why = f"{dtype} on {device.type}"
    if asked == "auto":
        used = next(name for name, fits in usable.items() if fits)
        flash = (
            f"{package} found"
            if package
            else "flash-attn not found"
            if half_on_gpu
            else "flash-attn not usable"
        )
        say_once(f"attention: {used} ({why}; {flash})")
        return used
    if not usable[asked]:
        need = "the flash-attn package (2, or 4), " if asked == "flash" else ""
        fallback(
            f"model.attention: {asked}",
            "sdpa",
            f"{asked} needs {need}a CUDA device (Ampere or later) and 16-bit weights, this is"
            f" {why}",
            strict=strict,
            error=ModelError,
        )
        return "sdpa"
    say_once(
        f"attention: {asked} (as configured;"
        f" {package + ', ' if package and asked == 'flash' else ''}{why})"
    )
    return asked


def usable_backends(device: torch.device, dtype: torch.dtype) -> dict[str, bool]:
    """Which kernels run here, the fastest first."""
    half = _half_on_gpu(device, dtype)
    return {
        "flash": half and _flash_package() is not None,
        "varlen": half and torch.cuda.get_device_capability() >= AMPERE,
        "sdpa": True,
        "eager": True,
    }


def _half_on_gpu(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


@cache
def _flash_package() -> str | None:
    """Which flash-attn can be imported and runs here: version 4 before 2 on the cards that 4 is
    made for.

    Version 4 is the module `flash_attn.cute`, a distribution of its own; some releases of 2 carry a
    copy of it that lacks what it imports. Where version 4 stands alone `flash_attn` itself is an
    empty namespace.
    """
    versions = {"flash-attn 4": "flash_attn.cute", "flash-attn 2": "flash_attn"}
    card = torch.cuda.get_device_capability()
    for name, module in versions.items():
        if card < AMPERE or (name == "flash-attn 4" and card[0] not in FLASH_4_CARDS):
            continue
        try:
            if hasattr(importlib.import_module(module), "flash_attn_varlen_func"):
                return name
        except ImportError:
            continue
    return None


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The definition, with every score in memory: the twin that the kernels are tested against."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3)
    causal = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    return _softmax(scores.masked_fill(~causal, float("-inf")), scale).to(v.dtype) @ v


def _softmax(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * scores) over the last dimension, in fp32 or better."""
    return (_precise(scores) * scale).softmax(-1)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """[1, H, N, E] as the variable-length kernels take it: [N, H, E]."""
    return tensor.squeeze(0).transpose(0, 1).contiguous()


def _attend_to(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Sequence[Segment], scale: float
) -> torch.Tensor:
    out: torch.Tensor = AttendTo.apply(q, k, v, segments, scale)
    return out[None]


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, scale: float
) -> torch.Tensor:
    """q [N, H, E], k and v [N, G, E] -> [N, H, E]; the versions name these arguments alike."""
    if _flash_package() == "flash-attn 4":
        from flash_attn.cute import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=rows.edges,
        cu_seqlens_k=rows.edges,
        max_seqlen_q=rows.longest,
        max_seqlen_k=rows.longest,
        softmax_scale=scale,
        causal=True,
    )
    # Version 4 returns the log-sum-exp beside it.
    attended: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return attended
