"""Operations that a training micro-batch dispatches in each decoder layer, forward and backward.

    python -m benchmarks.launches [--examples 4,16] [--prompts 4]

On a GPU each of them is about one kernel launch, and a small layer is bound by their number. They
are counted on tensors that have shapes and no values, so no GPU is needed: a Llama of two layers
and one of three are run, and their difference is one layer. Views and names of the same memory do
not count. Limit: in suffix placement the variable-length kernels take at most 200 a layer, and in
both placements as many for any number of examples. The last rows count one token of decoding, on
a CPU with values, because transformers reads the mask. It too takes as many for any number of
replies. One row counts a layer that `torch.compile` has fused: the kernels and products in its
code, which a C++ compiler makes for this CPU, and what attention dispatches. The last line is one
JSON object, the exit code is 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from spt_ds.batch import Batch
from spt_ds.config.load import load_config
from spt_ds.model.attention import PACKED, Layout
from spt_ds.model.backbone import Backbone
from spt_ds.model.base_check import small_layouts
from spt_ds.model.compiled import compile_layers
from spt_ds.model.graph_attention import attend, attend_backward, enlist
from spt_ds.model.reference import functions_of
from spt_ds.model.roomy_cache import RoomyCache
from spt_ds.model.spt import Spt, build_trainables

BACKENDS = ("sdpa", "varlen")
PLACEMENTS = {"prefix": "before_text", "suffix": "before_reply"}
MOST_A_LAYER = 200
VOCABULARY = 64
CONTEXT = 100  # tokens that decoding has read
HEADS, KEY_HEADS, HEAD_SIZE = 8, 2, 8
FUSED = re.compile(r"^\s*(?:\w+ = )?(?:cpp_fused\w*|extern_kernels\.\w+)\(", re.MULTILINE)


class Dispatched(TorchDispatchMode):
    """Counts operations by name, but those that only give memory another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [one.alias_info for one in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not view and func is not torch.ops.aten._unsafe_view.default:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def micro_batch(examples: int) -> Batch:
    """Contexts of about 150 tokens and replies of about 12, all of different lengths."""
    contexts = tuple(140 + row for row in range(examples))
    responses = tuple(10 + row % 5 for row in range(examples))
    context_ids, response_ids = (np.ones(sum(lens), np.int64) for lens in (contexts, responses))
    weights = (1.0,) * examples
    return Batch(context_ids, response_ids, contexts, responses, tuple(range(examples)), weights)


def base_of(layers: int, backend: str) -> Backbone:
    """A Llama of so many layers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=512,
    )
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=PACKED)
    return Backbone(lm, backend)


def token(layers: int, rows: int) -> Counter[str]:
    """Operations of one more token of so many replies."""
    backbone, cache = base_of(layers, "varlen"), RoomyCache()

    def decoded(inner: Backbone, width: int, read: int) -> None:
        mask = torch.ones(rows, width, dtype=torch.long)
        inner.next_logits(mask, cache, input_ids=mask[:, :read])

    with torch.no_grad():
        backbone(decoded, CONTEXT, CONTEXT)
        backbone(decoded, CONTEXT + 1, 1)  # makes room for those that follow
        with Dispatched() as dispatched:
            backbone(decoded, CONTEXT + 2, 1)
    return dispatched.counts


def step(layers: int, backend: str, placement: str, examples: int, prompts: int) -> Counter[str]:
    """Operations of one micro-batch through a base of so many layers."""
    position = PLACEMENTS[placement]
    options = [f"prompts.count={prompts}", f"prompts.position={position}", "losses.contrastive=0"]
    config = load_config("demo", options)
    backbone = base_of(layers, backend)
    functions = functions_of(config.reference, 0)
    spt = Spt(config, build_trainables(config, backbone, functions, [], 0), functions)
    backbone.to("meta")
    spt.trainables.to("meta")
    batch = micro_batch(examples)
    with Dispatched() as dispatched:
        out = backbone(spt.micro_losses, batch, examples, len(batch.response_ids))
        out.total.backward()
    return dispatched.counts


def per_layer(backend: str, placement: str, examples: int, prompts: int = 4) -> int:
    """Operations of one decoder layer."""
    counts = [step(layers, backend, placement, examples, prompts).total() for layers in (2, 3)]
    return counts[1] - counts[0]


def fused() -> int:
    """Kernels and products of a compiled layer in prefix placement, without attention."""
    backbone = base_of(2, "varlen")
    compile_layers(backbone)
    ((layout, embeddings),) = small_layouts(backbone, suffix=False)

    def step_of_base() -> None:
        backbone.run(embeddings.detach().requires_grad_(), layout).sum().backward()

    torch._dynamo.reset()
    _, (forward, backward) = run_and_get_code(step_of_base)  # all layers share this code
    return sum(len(FUSED.findall(code)) for code in (forward, backward))


def attention_of_graph(examples: int, prompts: int = 4) -> Counter[str]:
    """Operations of attention in a compiled layer in prefix placement."""
    batch = micro_batch(examples)
    lens = [c + r for c, r in zip(batch.context_lens, batch.response_lens, strict=True)] * prompts
    layout = Layout(lens, torch.empty(sum(lens), dtype=torch.long, device="meta"), "varlen")
    enlist(layout)
    q, k, v = (
        torch.empty(1, sum(lens), heads, HEAD_SIZE, dtype=torch.bfloat16, device="meta")
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    given = (*(tensor.transpose(1, 2) for tensor in (q, k, v)), layout.number, torch.tensor(0))
    layout.rows.edges  # noqa: B018 - made once for all layers
    with Dispatched() as dispatched:
        grad = attend._init_fn(*given, 1.0, 0)
        attend_backward._init_fn(grad, *given, 1.0, 0)
    del dispatched.counts["aten._local_scalar_dense.default"]  # numbers that lie on the host
    return dispatched.counts


def per_layer_of_token(rows: int) -> int:
    """Operations of one decoder layer for one more token."""
    return token(3, rows).total() - token(2, rows).total()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", default="4,16", help="of a micro-batch (default 4,16)")
    parser.add_argument("--prompts", type=int, default=4, help="K (default 4)")
    args = parser.parse_args()
    sizes = [int(text) for text in args.examples.split(",")]
    rows, kept = [], True
    for placement in PLACEMENTS:
        for backend in BACKENDS:
            counts = {size: per_layer(backend, placement, size, args.prompts) for size in sizes}
            rows.append({"placement": placement, "attention": backend, "per_layer": counts})
            shown = ", ".join(f"{count} at B = {size}" for size, count in counts.items())
            print(f"{placement:7} {backend:7} {shown}")
            if backend == "varlen":
                kept &= len(set(counts.values())) == 1
                kept &= placement == "prefix" or max(counts.values()) <= MOST_A_LAYER
    kernels = fused()
    counts = {size: kernels + attention_of_graph(size, args.prompts).total() for size in sizes}
    rows.append({"placement": "prefix", "attention": "varlen, compiled", "per_layer": counts})
    kept &= len(set(counts.values())) == 1
    print("prefix  compiled " + ", ".join(f"{n} at B = {size}" for size, n in counts.items()))
    counts = {size: per_layer_of_token(size) for size in sizes}
    rows.append({"placement": "decode", "attention": "sdpa", "per_layer": counts})
    kept &= len(set(counts.values())) == 1
    print("decode  sdpa    " + ", ".join(f"{n} at B = {size}" for size, n in counts.items()))
    print(json.dumps({"rows": rows, "kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
