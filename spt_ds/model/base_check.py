"""Start-up proof that packed rows give the logits of the base's own `transformers` forward.

No fixed tolerance tells rounding from a fault in bf16: there a sound base of 30 layers may give
logits that differ by half between its own eager and SDPA attention. The comparison is therefore
made in fp32, where rounding stays below 1e-4. The pass that training makes, in its own dtype and
with its own kernel, must then be about as close to fp32 as the base's own forward in that dtype.

Legend: R rows, n tokens of a row, N packed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from spt_ds.errors import ModelError
from spt_ds.model.attention import PACKED, Branches, Layout

if TYPE_CHECKING:
    from spt_ds.model.backbone import Backbone

# Of the largest logit. transformers' own softmax and norms compute in fp32 even where the weights
# are fp64.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
# How far a pass in 16 bits may be from fp32: so many times as far as the base's own forward, or so
# much of the logits' norm. Measured distances are in docs/numerics.md.
ROUNDING_FACTOR, ROUNDING_FLOOR = 4.0, 0.05
LARGE_LOGIT = 1000.0  # far above the caps that models put on their logits (15 to 50)
HALF = (torch.bfloat16, torch.float16)
SUPPORTED = (
    "a base is needed whose attention goes through transformers' attention interface, with"
    " positions given from outside and a plain head: OPT, Llama, Mistral, Qwen, Gemma, Phi, GPT-2,"
    " GPT-NeoX, OLMo and others have been run"
)
# Two contexts with two branches each: four rows of unlike length.
CONTEXT_LENS, BRANCH_LENS, COUNT = (3, 4), (2, 3), 2
ROWS = [(c, n) for c, n in zip(CONTEXT_LENS, BRANCH_LENS, strict=True) for _ in range(COUNT)]
LENS = [c + n for c, n in ROWS]
Logits = list[torch.Tensor]  # [n, V] of each row


@torch.no_grad()
def check_base(backbone: Backbone, *, suffix: bool) -> dict[str, float]:
    """Compare packed rows with the base's own forward; return the differences by name.

    Raises ModelError for a base that scales embeddings or logits outside its embedding and head,
    caps its logits, or does not hand positions or the layout on; with `suffix` (placement) also for
    branches that do not continue their context. Under ZeRO-3 every rank must call it, inside one
    call of the root module.
    """
    gaps: dict[str, float] = {}
    dtype = _dtype(backbone)
    # No variable-length kernel takes fp32.
    exact = "eager" if backbone.backend == "eager" else "sdpa"
    with _fp32() if dtype in HALF else nullcontext():
        states = _packed_states(backbone, exact)
        ours = [backbone.head(row) for row in states]
        # A cap is invisible on small logits. The last row is read once more with its hidden states
        # stretched until its logits are large, by a power of two so that no dtype rounds.
        stretch = float((LARGE_LOGIT / ours[-1].abs().max()).log2().ceil().exp2())
        own = _own_logits(backbone, stretch)
        every = [*ours, backbone.head(states[-1] * stretch)]
        gaps["packed rows"] = _compare(backbone, "packed rows", every, own)
        if suffix:
            ends = [row[c:] for row, (c, _) in zip(own, ROWS, strict=False)]
            branches = _branch_logits(backbone, exact)
            gaps["branches"] = _compare(backbone, "branches", branches, ends)
    if dtype not in HALF and not backbone.check_quantised:
        return gaps
    with _quantised_layers_checked(backbone):
        half = [backbone.head(row) for row in _packed_states(backbone, backbone.backend)]
    if dtype in HALF:
        gaps |= _compare_rounding(backbone, half, _own_logits(backbone, 1.0), own)
    return gaps


def _dtype(backbone: Backbone) -> torch.dtype:
    dtype: torch.dtype = backbone.lm.get_input_embeddings().weight.dtype
    return dtype


def _quantised_layers_checked(backbone: Backbone) -> Any:
    if not backbone.check_quantised:
        return nullcontext()
    from spt_ds.model.quant_check import layers_checked

    return layers_checked(backbone.lm)


def _ids(backbone: Backbone) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ids of the contexts and of the branches, spread over the middle of the vocabulary.

    The first and last ids of a vocabulary are special tokens, on which bases round worst.
    """
    device = backbone.lm.get_input_embeddings().weight.device
    lens = [*CONTEXT_LENS, *(n for _, n in ROWS)]
    edge = backbone.vocabulary // 8
    ids = torch.linspace(edge, backbone.vocabulary - edge, sum(lens), device=device).long()
    pieces = list(ids.split(lens))
    return pieces[: len(CONTEXT_LENS)], pieces[len(CONTEXT_LENS) :]


def _rows(backbone: Backbone) -> list[torch.Tensor]:
    contexts, branches = _ids(backbone)
    return [torch.cat([contexts[i // COUNT], branch]) for i, branch in enumerate(branches)]


def _positions(starts: Sequence[int], lens: Sequence[int]) -> torch.Tensor:
    return torch.cat([start + torch.arange(n) for start, n in zip(starts, lens, strict=True)])


def _whole_rows(backbone: Backbone, kernel: str) -> tuple[Layout, torch.Tensor]:
    """Layout and embeddings of the rows."""
    ids = torch.cat(_rows(backbone))
    layout = Layout(LENS, _positions([0] * len(LENS), LENS).to(ids.device), kernel)
    return layout, backbone.embed(ids)


def _tree(
    backbone: Backbone, kernel: str
) -> tuple[tuple[Layout, torch.Tensor], tuple[Branches, torch.Tensor]]:
    """Layouts and embeddings of the contexts, and of the branches that are read on them."""
    contexts, branches = (torch.cat(ids) for ids in _ids(backbone))
    positions = _positions([0] * len(CONTEXT_LENS), CONTEXT_LENS).to(contexts.device)
    context = Layout(CONTEXT_LENS, positions, kernel, record=True)
    positions = _positions([c for c, _ in ROWS], [n for _, n in ROWS]).to(contexts.device)
    lens = [COUNT * n for n in BRANCH_LENS]
    tree = Branches(lens, positions, kernel, count=COUNT, context=context)
    return (context, backbone.embed(contexts)), (tree, backbone.embed(branches))


def small_layouts(backbone: Backbone, *, suffix: bool) -> Sequence[tuple[Layout, torch.Tensor]]:
    """What a micro-batch makes the base read in one placement, small, in the order of reading."""
    if suffix:
        return _tree(backbone, backbone.backend)
    return [_whole_rows(backbone, backbone.backend)]


def _packed_states(backbone: Backbone, kernel: str) -> list[torch.Tensor]:
    """Hidden states of each row from one packed pass; refuse a base that cannot read them."""
    try:
        layout, embeddings = _whole_rows(backbone, kernel)
        hidden = backbone.run(embeddings, layout)
    except (AttributeError, KeyError, TypeError) as error:
        # The base's own code meets a call that it was not made for.
        raise ModelError(
            f"{type(backbone.lm).__name__} cannot read packed rows ({error}); {SUPPORTED}"
        ) from error
    return list(hidden.split(LENS))


def _branch_logits(backbone: Backbone, kernel: str) -> Logits:
    """Logits of each branch, read on the recorded keys and values of its context."""
    (context, context_rows), (layout, branch_rows) = _tree(backbone, kernel)
    backbone.run(context_rows, context)
    hidden = backbone.run(branch_rows, layout)
    return [backbone.head(row) for row in hidden.split([n for _, n in ROWS])]


def _own_logits(backbone: Backbone, stretch: float) -> Logits:
    """Logits of each row by the base's own forward, and of the last row once more, stretched.

    The rows stand in one batch, padded at their ends, which causal attention does not look at.
    """
    rows = _rows(backbone)
    ids = torch.nn.utils.rnn.pad_sequence([*rows, rows[-1]], True, padding_value=int(rows[0][0]))
    factors = torch.tensor([1.0] * len(rows) + [stretch], device=ids.device)[:, None, None]
    head = backbone.lm.get_output_embeddings()
    hook = head.register_forward_pre_hook(
        lambda module, args: (args[0] * factors.to(args[0].dtype),)
    )
    backbone.lm.set_attn_implementation("eager")
    try:
        logits = backbone.lm(input_ids=ids, use_cache=False).logits
    finally:
        backbone.lm.set_attn_implementation(PACKED)
        hook.remove()
    return [row[:n] for row, n in zip(logits, [*LENS, LENS[-1]], strict=True)]


def _compare(backbone: Backbone, what: str, ours: Logits, own: Logits) -> float:
    """Return the largest difference, of a row's largest logit; refuse one above the tolerance."""
    gaps = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, own, strict=True)]
    gap, allowed = float(torch.stack(gaps).max()), TOLERANCE[own[0].dtype]
    # Not `gap > allowed`: logits that are NaN must be refused too.
    if not gap <= allowed:
        raise ModelError(
            f"{type(backbone.lm).__name__}: {what} give other logits than the base's own forward"
            f" (largest relative difference {gap:.2g}, allowed {allowed:.0e}); {SUPPORTED}"
        )
    return gap


def _compare_rounding(
    backbone: Backbone, ours: Logits, own: Logits, exact: Logits
) -> dict[str, float]:
    """Return distances from `exact`: of the pass that training makes, and of the base's own.

    They are 2-norms, of the norm of a row's logits: a largest difference varies far more.
    """

    def distance(rows: Logits) -> float:
        pairs = zip(rows[: len(LENS)], exact, strict=False)
        return float(torch.stack([(a.float() - b).norm() / b.norm() for a, b in pairs]).max())

    gap, unit = distance(ours), distance(own)
    allowed = max(ROUNDING_FACTOR * unit, ROUNDING_FLOOR)
    if not gap <= allowed:
        raise ModelError(
            f"{type(backbone.lm).__name__}: packed rows in {_dtype(backbone)} by {backbone.backend}"
            f" attention give other logits than in fp32 (relative distance {gap:.2g}, the base's"
            f" own forward {unit:.2g}, allowed {allowed:.2g}); try model.attention: sdpa, or"
            " model.base_bits: 32"
        )
    return {"packed rows from fp32": gap, "own forward from fp32": unit}


class _Widen(TorchFunctionMode):
    """Lets fp32 activations meet 16-bit weights: a weight is fp32 for the one call that reads it.

    A copy of the base in fp32 would need twice its memory, and its shards twice their traffic.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        inside = [*args, *(kwargs or {}).values()]
        if not _in_place(name) and any(_has(value, (torch.float32,)) for value in inside):
            args = [_widened(value) for value in args]
            kwargs = {key: _widened(value) for key, value in (kwargs or {}).items()}
        out = func(*args, **(kwargs or {}))
        return _widened(out) if name == "embedding" else out


def _in_place(name: str) -> bool:
    """Whether a torch function writes into its first argument, which then keeps its dtype."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _has(value: Any, dtypes: tuple[torch.dtype, ...]) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has(item, dtypes) for item in value)
    return isinstance(value, torch.Tensor) and value.dtype in dtypes


def _widened(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and _has(value, HALF):
        return type(value)(_widened(item) for item in value)
    return value.float() if _has(value, HALF) else value


@contextmanager
def _fp32() -> Iterator[None]:
    """Inside, a base with 16-bit weights computes in fp32, products included (no TF32)."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with _Widen():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
