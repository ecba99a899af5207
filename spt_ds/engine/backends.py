"""One small operation of each backend that a run may use, for `spt-ds doctor`.

A package that can be imported may still lack a kernel for this card, or give wrong numbers on this
processor. Each trial computes forward and backward and compares with plain PyTorch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from spt_ds import dist
from spt_ds.config.load import load_config
from spt_ds.config.model import ModelConfig
from spt_ds.model.attention import Branches, Layout, usable_backends

CONTEXTS = (5, 17, 3)  # tokens
HEADS, GROUPS, HEAD_SIZE, PROMPTS = 4, 2, 64, 2
# Relative, in the 2-norm. A wrong kernel is off by its whole result.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Trial:
    """What became of one backend."""

    name: str
    works: bool
    note: str


def trials(device: torch.device) -> Iterator[Trial]:
    """Try each attention, quantisation and sharding backend on `device`.

    One that is not installed here counts as working: a run says itself what it uses instead. The
    process group must have been made, and DeepSpeed serves one of a process only.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for backend, usable in usable_backends(device, dtype).items():
        if usable:
            yield _tried(f"attention {backend}", partial(_attention, backend, device, dtype))
        else:
            yield Trial(f"attention {backend}", True, "not usable here")
    for bits in (8, 4):
        yield _tried(f"weights of {bits} bits", partial(_quantised, bits, device))
    yield _tried("DeepSpeed ZeRO-3", partial(_sharded, device))


def _tried(name: str, work: Callable[[], float]) -> Trial:
    try:
        gap = work()
    # Whatever a kernel, a compiler or a driver raises is the finding.
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        return Trial(name, False, f"{type(error).__name__}: {first}")
    # Not `gap > limit`: a NaN must count as a fault.
    right = gap <= max(TOLERANCE.values())
    return Trial(name, right, f"forward and backward, {gap:.1e} from plain PyTorch")


def main() -> None:
    """Print the trials of this process, a JSON object a line, each before the next begins."""
    index = os.environ.get("LOCAL_RANK", "0")
    for name in (name for names in dist.LAUNCHERS for name in names):
        os.environ.pop(name, None)  # one process by itself, whoever started it
    device = torch.device("cuda", int(index)) if torch.cuda.is_available() else torch.device("cpu")
    dist.init(60)
    for trial in trials(device):
        print(json.dumps(vars(trial)), flush=True)


def _distance(got: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    gaps = [
        (mine.detach().double() - theirs.detach().double()).norm() / theirs.detach().double().norm()
        for mine, theirs in zip(got, right, strict=True)
    ]
    return float(torch.stack(gaps).max())


def _attention(backend: str, device: torch.device, dtype: torch.dtype) -> float:
    """Rows, and branches on their contexts, against dense masked attention in float64."""
    generator = torch.Generator().manual_seed(0)
    lens = [PROMPTS * (2 + row) for row in range(len(CONTEXTS))]
    numbers = [
        torch.randn(1, heads, tokens, HEAD_SIZE, generator=generator).to(device, dtype)
        for heads, tokens in [
            *((heads, sum(lens)) for heads in (HEADS, GROUPS, GROUPS)),
            *((GROUPS, sum(CONTEXTS)) for _ in range(2)),
        ]
    ]
    positions = [torch.arange(sum(each), device=device) for each in (lens, CONTEXTS)]
    context = Layout(CONTEXTS, positions[1], backend)
    context.recorded[0] = (numbers[3], numbers[4])
    tree = Branches(lens, positions[0], backend, count=PROMPTS, context=context)
    example = torch.repeat_interleave(torch.tensor(lens))
    branch = torch.repeat_interleave(torch.tensor([n // PROMPTS for n in lens for _ in range(2)]))
    earlier = torch.ones(sum(lens), sum(lens), dtype=torch.bool).tril()
    contexts = torch.repeat_interleave(torch.tensor(CONTEXTS))
    seen = {  # by each token, of its own row, and in the tree of the contexts before it
        Layout: (earlier & (example[:, None] == example), contexts < 0),
        Branches: (earlier & (branch[:, None] == branch), example[:, None] == contexts),
    }
    worst = 0.0
    for layout in (Layout(lens, positions[0], backend), tree):
        q, k, v = (tensor.detach().requires_grad_() for tensor in numbers[:3])
        out = layout.attend(0, q, k, v, HEAD_SIZE**-0.5)
        # The sine gives each output a gradient of its own. Of a plain sum all would be one, and a
        # backward pass that mixes rows up would not show.
        got = [out, *torch.autograd.grad(out.float().sin().sum(), (q, k, v))]
        own, before = seen[type(layout)]
        mask = torch.cat([before.expand(sum(lens), -1), own], dim=1).to(device)
        worst = max(worst, _distance(got, _dense(numbers, mask)))
    return worst


def _dense(numbers: list[torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of attention under `mask` [N, keys of contexts and rows]."""
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in numbers[:3])
    keys, values = (
        torch.cat([before.double(), own], dim=2).repeat_interleave(HEADS // GROUPS, dim=1)
        for before, own in ((numbers[3], k), (numbers[4], v))
    )
    scores = (q @ keys.transpose(2, 3)) * HEAD_SIZE**-0.5
    out = (scores.masked_fill(~mask, float("-inf")).softmax(dim=3) @ values).transpose(1, 2)
    return [out, *torch.autograd.grad(out.sin().sum(), (q, k, v))]


def _quantised(bits: int, device: torch.device) -> float:
    """A layer against a plain one that holds its dequantised weight."""
    from spt_ds.model.quant import Packing, QuantLinear, quantise
    from spt_ds.model.quant_check import reference

    packing = Packing.of(ModelConfig(base_bits=bits))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(96, 128, generator=generator) for _ in range(2))
    packed, _ = quantise(weight, packing, device)
    layer = QuantLinear((96, 128), packing, packed, None)
    right = reference(packed, (96, 128), packing, torch.float32)
    results = []
    for function in (layer, lambda rows: rows @ right.T):
        rows = x.to(device).requires_grad_()
        out = function(rows)
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), [rows])])
    return _distance(*results)


def _sharded(device: torch.device) -> float:
    """A sharded module of two layers against a whole one."""
    from spt_ds.engine.zero import Sharding
    from spt_ds.placement.ds_check import plan_of_kind

    config = load_config("demo")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)).requires_grad_(False)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    whole = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)).requires_grad_(False).to(device)
    whole.load_state_dict(plain.state_dict())
    sharding = Sharding(plan_of_kind("zero3", config, 1), device)
    sharding.before_load()
    root = sharding.wrap(plain.to(device))
    results = []
    for module in (root, whole):
        rows = x.to(device).requires_grad_()
        out = module(rows)
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), [rows])])
    sharding.close()
    return _distance(*results)


if __name__ == "__main__":
    main()
