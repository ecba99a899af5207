"""Counts what ZeRO-3 gathers in one training step: K prompts in one pass against K passes.

    python benchmarks/communication.py --prompts 4,8 --bits 16,8,4

Two ranks on the CPU and a small Llama of which nothing stays resident, so that every use of a
weight is a gather. The figures are calls and bytes of the gathered weights per rank and
micro-batch, forward and backward; each is set beside K passes over the bf16 base, which is what the
public reference does. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spt_ds import dist
from spt_ds.batch import Batch
from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.engine.zero import Sharding
from spt_ds.model.backbone import build_backbone
from spt_ds.model.loading import load_base_config
from spt_ds.model.prompt_bank import PromptBank
from spt_ds.model.reference import functions_of
from spt_ds.model.spt import Spt, Trainables, build_trainables
from spt_ds.placement.ds_check import plan_of_kind
from spt_ds.placement.zero_plan import ZeroPlan

RANKS = 2


class GatherCount:
    """Counts DeepSpeed's gathers while it is on."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        self.installed = False

    def install(self) -> None:
        """Start counting; a second call changes nothing."""
        if self.installed:
            return
        self.installed = True
        from deepspeed.comm.torch import TorchBackend

        for name in ("all_gather_into_tensor", "all_gather"):
            self._wrap(TorchBackend, name)

    def _wrap(self, owner: Any, name: str) -> None:
        right = getattr(owner, name)

        def counted(backend: Any, *args: Any, **kwargs: Any) -> Any:
            output = args[0] if args else next(iter(kwargs.values()))
            outputs = output if isinstance(output, (list, tuple)) else [output]
            self.calls += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in outputs)
            return right(backend, *args, **kwargs)

        setattr(owner, name, counted)

    def take(self) -> tuple[int, int]:
        taken = self.calls, self.bytes
        self.calls = self.bytes = 0
        return taken


def nothing_resident(config: Config) -> ZeroPlan:
    """ZeRO-3 that releases every weight after its use; by default a small model stays whole."""
    plan = plan_of_kind("zero3", config, RANKS)
    zero = plan.engine_config["zero_optimization"]
    for key in (
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
    ):
        zero[key] = 0
    zero["stage3_prefetch_bucket_size"] = 0
    return plan


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    lens = ((40, 9), (25, 12))
    contexts = [torch.randint(256, (c,), generator=generator) for c, _ in lens]
    responses = [torch.randint(256, (r,), generator=generator) for _, r in lens]
    context_lens, response_lens = zip(*lens, strict=True)
    return Batch(
        torch.cat(contexts).numpy(),
        torch.cat(responses).numpy(),
        context_lens,
        response_lens,
        (0, 1),
        (1.0, 1.0),
    )


def measure(folder: str, prompts: list[int], widths: Sequence[int] = (16,)) -> list[dict[str, Any]]:
    """One row per width of the base, checkpointing, K and way."""
    count = GatherCount()
    rows = []
    for bits in widths:
        rows += _measure_width(folder, prompts, bits, count)
    return rows


def _measure_width(
    folder: str, prompts: list[int], bits: int, count: GatherCount
) -> list[dict[str, Any]]:
    config = load_config(
        "demo", [f"model.base={folder}", f"model.base_bits={bits}", f"prompts.count={max(prompts)}"]
    )
    sharding = Sharding(nothing_resident(config), torch.device("cpu"))
    sharding.before_load()
    count.install()
    backbone = build_backbone(
        config.model,
        load_base_config(config.model),
        torch.device("cpu"),
        strict=True,
        shard=sharding.shard_function(),
    )
    base_bytes = sum(
        getattr(p, "ds_numel", p.numel()) * p.element_size() for p in backbone.parameters()
    )
    root = sharding.wrap(backbone)
    functions = functions_of(config.reference, pad_id=0)
    whole: Trainables = root(lambda inner: build_trainables(config, inner, functions, [], 0))
    examples, rows = batch(), []

    def step(first: int, last: int) -> None:
        part = Trainables(
            PromptBank(whole.bank.weight.detach()[first:last].clone()), whole.retriever
        )
        root(Spt(config, part, functions).micro_losses, examples, 2 * RANKS, 42).total.backward()

    for checkpointing in ("off", "non_reentrant"):
        backbone.checkpoint_activations(checkpointing)
        for k in prompts:
            for way, spans in (
                ("K passes", [(i, i + 1) for i in range(k)]),
                ("one pass", [(0, k)]),
            ):
                for _ in range(2):  # the first time DeepSpeed records the order of its layers
                    count.take()
                    for span in spans:
                        step(*span)
                calls, gathered = count.take()
                row = {
                    "bits": bits,
                    "K": k,
                    "checkpointing": checkpointing,
                    "way": way,
                    "calls": calls,
                }
                rows.append({**row, "bytes": gathered, "base_bytes": base_bytes})
    return rows


def rank_main(
    rank: int, port: int, folder: str, prompts: list[int], widths: list[int], out: str
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init(120)
    rows = measure(folder, prompts, widths)
    if rank == 0:
        Path(out).write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", default="4,8", help="K; comma-separated for several")
    parser.add_argument(
        "--bits", default="16", help="widths of the base beside 16; comma-separated for several"
    )
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        base = LlamaConfig(
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(base).save_pretrained(f"{folder}/base")
        prompts = [int(part) for part in args.prompts.split(",")]
        widths = sorted({16, *(int(part) for part in args.bits.split(","))}, reverse=True)
        out = f"{folder}/rows.json"
        torch.multiprocessing.spawn(  # type: ignore[attr-defined]
            rank_main, (port, f"{folder}/base", prompts, widths, out), nprocs=RANKS
        )
        rows = json.loads(Path(out).read_text(encoding="utf-8"))
    print(
        f"{'bits':>4} {'K':>3} {'checkpointing':<14} {'way':<9} {'calls':>6} {'bytes':>12}  fewer"
        " than bf16, K passes"
    )
    ratios = fewer(rows)
    for row, ratio in zip(rows, ratios.values(), strict=True):
        start = f"{row['bits']:>4} {row['K']:>3} {row['checkpointing']:<14} {row['way']:<9}"
        print(f"{start} {row['calls']:>6} {row['bytes']:>12,}  {ratio:.2f} times")
    print(json.dumps({"ratios": ratios, "rows": rows}))
    return 0


def fewer(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times fewer bytes each row gathers than K passes over the bf16 base, of the same K
    and checkpointing.
    """
    reference = {
        (row["K"], row["checkpointing"]): row["bytes"]
        for row in rows
        if (row["bits"], row["way"]) == (16, "K passes")
    }
    return {
        f"{row['bits']} bits, {row['way']}, K={row['K']}, checkpointing {row['checkpointing']}": (
            round(reference[row["K"], row["checkpointing"]] / row["bytes"], 2)
        )
        for row in rows
    }


if __name__ == "__main__":
    raise SystemExit(main())
