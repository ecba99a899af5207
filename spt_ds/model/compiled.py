"""Decoder layers of the frozen base that `torch.compile` fuses.

What a layer does between its matrix products becomes a few kernels. All layers share one graph of
dynamic shapes, whatever rows a micro-batch has (`graph_attention.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spt_ds.errors import ModelError
from spt_ds.model.base_check import HALF, ROUNDING_FLOOR, TOLERANCE, small_layouts

if TYPE_CHECKING:
    from spt_ds.model.backbone import Backbone

BACKEND = "inductor"
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def layer_classes(root: nn.Module) -> list[str]:
    """Names of the classes of decoder layers: those that transformers never splits over devices."""
    names = {
        name
        for module in root.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    return sorted(names)


def decoder_layers(root: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order."""
    names = layer_classes(root)
    return [module for module in root.modules() if type(module).__name__ in names]


def compile_layers(backbone: Backbone) -> int:
    """Compile the decoder layers, each at its first call; return how many there are."""
    layers = decoder_layers(backbone.lm)
    for module in backbone.lm.modules():
        if isinstance(number := getattr(module, "layer_idx", None), int):
            module.layer_number = torch.tensor(number)
    for layer in layers:
        layer.compile(dynamic=True, backend=BACKEND)
    backbone.compiled = bool(layers)
    return len(layers)


def leave_eager(backbone: Backbone) -> None:
    """Undo `compile_layers`."""
    for layer in decoder_layers(backbone.lm):
        layer._compiled_call_impl = None
    backbone.compiled = False


@contextmanager
def eager_layers(backbone: Backbone) -> Iterator[None]:
    """Inside, compiled layers compute as they are written."""
    if not backbone.compiled:  # `set_stance` imports the compiler, which takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def check_compiled(backbone: Backbone, *, suffix: bool) -> None:
    """Compare each compiled layer with the eager one, on what it reads of a small batch.

    Forward passes with and without a graph and backward passes are compared, so that every kernel
    of a run is compiled here. Raises ModelError for other numbers, and what the compiler raises.
    """
    for layout, embeddings in small_layouts(backbone, suffix=suffix):
        calls, recorded = _calls(backbone, embeddings, layout), dict(layout.recorded)
        for call in calls:
            # A context is read without gradients.
            for with_grad in (False,) if layout.record else (False, True):
                compiled = _outcome(call, with_grad)
                with eager_layers(backbone):
                    eager = _outcome(call, with_grad)
                _compare(compiled, eager)
        layout.recorded = recorded  # for the branches


def _calls(backbone: Backbone, embeddings: torch.Tensor, layout: Any) -> list[Call]:
    """What each layer is called with."""
    calls: list[Call] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
        for layer in decoder_layers(backbone.lm)
    ]
    with eager_layers(backbone), torch.no_grad():
        backbone.run(embeddings, layout)
    for hook in hooks:
        hook.remove()
    return calls


def _outcome(call: Call, with_grad: bool) -> dict[str, torch.Tensor]:
    """Output of a layer, keys and values that are kept of it, and the gradient of its input."""
    layer, (given, *rest), keywords = call
    x = given.detach().clone().requires_grad_(with_grad)
    keywords["layout"].recorded = {}
    with torch.set_grad_enabled(with_grad):
        out = layer(x, *rest, **keywords)
    out = out if isinstance(out, torch.Tensor) else out[0]
    found = {"output": out.detach()}
    for number, (keys, values) in keywords["layout"].recorded.items():
        found |= {f"keys {number}": keys, f"values {number}": values}
    if with_grad:
        out.backward(given)
        assert x.grad is not None
        found["gradient"] = x.grad
    return found


def _compare(compiled: dict[str, torch.Tensor], eager: dict[str, torch.Tensor]) -> None:
    dtype = eager["output"].dtype
    allowed = ROUNDING_FLOOR if dtype in HALF else TOLERANCE[dtype]
    gap = float("inf")
    if compiled.keys() == eager.keys():
        gaps = [(compiled[name] - right).norm() / right.norm() for name, right in eager.items()]
        gap = float(torch.stack(gaps).max())
    # Not `gap > allowed`: NaN must be refused too.
    if not gap <= allowed:
        raise ModelError(
            f"a compiled layer gives other numbers than the eager one (relative distance {gap:.2g},"
            f" allowed {allowed:.2g})"
        )
