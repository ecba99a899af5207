"""Attention as one operation of a compiled graph, whose rows the compiler does not look at.

A graph takes tensors and not a `Layout`, so each layout and each layer has a number, in a tensor
that lies on the host. A number that is not in a tensor would be compiled in.

Legend: N packed tokens, H heads (G key/value heads), E head size.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch

# While it is excluded, as inside an operation, autograd makes no graph.
AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_ATTEND = "(Tensor q, Tensor k, Tensor v, Tensor layout, Tensor layer, float scale, int window)"
_BACKWARD = _ATTEND.replace("(", "(Tensor grad, ")
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Reader(Protocol):
    """What the operation needs of a layout."""

    record: bool
    number: torch.Tensor | None

    def attend_within(
        self,
        window: int | None,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
    ) -> torch.Tensor: ...


_numbers = count()
_layouts: WeakValueDictionary[int, Reader] = WeakValueDictionary()


def enlist(layout: Reader) -> None:
    """Give `layout` a number, by which graphs find it as long as it lives."""
    number = next(_numbers)
    _layouts[number] = layout
    layout.number = torch.tensor(number)


@torch.library.custom_op("spt_ds::attend", mutates_args=(), schema=f"{_ATTEND} -> Tensor")
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: torch.Tensor,
    layer: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """q [1, H, N, E], k and v [1, G, N, E] -> [1, N, H, E]; a window of 0 is none."""
    found = _layouts[int(layout)]
    if found.record:
        k, v = _kept(k), _kept(v)
    return found.attend_within(window or None, int(layer), q, k, v, scale)


@torch.library.custom_op(
    "spt_ds::attend_backward",
    mutates_args=(),
    schema=f"{_BACKWARD} -> (Tensor, Tensor, Tensor)",
)
def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: torch.Tensor,
    layer: torch.Tensor,
    scale: float,
    window: int,
) -> Gradients:
    """Gradients of q, k and v, heads last; attention is computed again, so its output is not kept.

    That is a fortieth of a step's work at usual lengths.
    """
    q, k, v = own = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    with torch._C._SetExcludeDispatchKeyGuard(AUTOGRAD, False), torch.enable_grad():
        out = _layouts[int(layout)].attend_within(window or None, int(layer), q, k, v, scale)
        dq, dk, dv = (_heads_last(t) for t in torch.autograd.grad(out, own, grad))
    return dq, dk, dv


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy: a graph writes over its tensors after its last own use of them."""
    return tensor.clone()


def _heads_last(tensor: torch.Tensor) -> torch.Tensor:
    """[1, H, N, E] -> [1, N, H, E], laid out so."""
    return tensor.transpose(1, 2).contiguous()


@attend.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    return v.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


@attend_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> Gradients:
    dq, dk, dv = (torch.empty_like(_heads_last(tensor)) for tensor in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = attend_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return (*(tensor.transpose(1, 2) for tensor in gradients), None, None, None, None)


attend.register_autograd(_backward, setup_context=_keep)
