"""Measures the peak memory of a rank while a base is read, quantised where asked, and sharded.

    python benchmarks/load_memory.py [--ranks 1 2] [--bits 4 8 16] [--layers 16] [--folder KEEP]

Writes a Llama base with random bf16 weights (445 MB by default), loads it under ZeRO-3 as a run
does, and samples the anonymous memory (RssAnon) of every rank. Limit: a rank grows by no more than
its share of the base + one bf16 layer + 200 MiB, modules that are imported for loading included.
What the process held before (`before_mib`: Python, torch, transformers, DeepSpeed) is no part of
it. CPU and gloo; the last line is one JSON object, the exit code is 1 when a limit is passed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MIB = 2**20
FIXED_MIB = 200
SAMPLE_S = 0.002
TIMEOUT_S = 900


def write_base(folder: Path, hidden: int, layers: int, vocabulary: int = 8192) -> None:
    """A Llama base with random weights, one file per layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    ffn = hidden * 11 // 4
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    wide = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    square = {f"{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (vocabulary, hidden),
            "lm_head.weight": (vocabulary, hidden),
            "model.norm.weight": (hidden,),
        }
    ]
    for layer in range(layers):
        parts = {f"self_attn.{k}": v for k, v in square.items()} | {
            f"mlp.{k}": v for k, v in wide.items()
        }
        norms: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes.append(
            {
                f"model.layers.{layer}.{name}.weight": shape
                for name, shape in {**parts, **norms}.items()
            }
        )
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, group in enumerate(shapes):
        file = f"model-{number:05d}.safetensors"
        tensors = {
            name: (
                (0.02 * torch.randn(shape, generator=generator)).bfloat16()
                if len(shape) == 2
                else torch.ones(shape, dtype=torch.bfloat16)
            )
            for name, shape in group.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


class Peak:
    """Samples `anonymous_bytes` in a thread while the context is open."""

    def __enter__(self) -> Peak:
        self.bytes, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def measure_rank(folder: str, bits: int, random_init: bool) -> dict[str, Any]:
    """Load (or draw) the base on this rank; bytes before, at the peak, and owned afterwards."""
    import torch

    from spt_ds import dist
    from spt_ds.config.model import ModelConfig
    from spt_ds.config.schema import Config
    from spt_ds.engine.zero import Sharding, local_bytes
    from spt_ds.model.backbone import build_backbone
    from spt_ds.model.loading import load_base_config
    from spt_ds.placement.ds_check import plan_of_kind

    torch.set_num_threads(1)
    world = dist.init(TIMEOUT_S)
    sharding = Sharding(plan_of_kind("zero3", Config(), world.size), world.device)
    sharding.before_load()
    before, start = anonymous_bytes(), time.perf_counter()
    with Peak() as peak:
        config = ModelConfig.model_validate(
            {"base": folder, "base_bits": bits, "random_init": random_init}
        )
        backbone = build_backbone(
            config,
            load_base_config(config),
            world.device,
            strict=False,
            shard=sharding.shard_function(),
        )
    load_s = time.perf_counter() - start
    dist.barrier()
    return {"before": before, "peak": peak.bytes, "share": local_bytes(backbone), "load_s": load_s}


def measure(folder: Path, ranks: int, bits: int, random_init: bool) -> list[dict[str, Any]]:
    """`measure_rank` on every rank, each a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        # The allocator gives a freed tensor back at once, so that the peak is that of live tensors.
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, __file__, "--measure-rank", str(folder), str(bits)]
        command += ["--random-init"] if random_init else []
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    lines = [
        process.communicate(timeout=TIMEOUT_S)[0].strip().splitlines() for process in processes
    ]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a rank of {ranks} failed at {bits} bits; its messages are above")
    return [json.loads(line[-1]) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16], choices=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--folder", type=Path, help="keep the base here; default a temporary folder"
    )
    parser.add_argument(
        "--random-init", action="store_true", help="draw the weights instead of reading them"
    )
    parser.add_argument("--measure-rank", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_rank:
        print(
            json.dumps(
                measure_rank(args.measure_rank[0], int(args.measure_rank[1]), args.random_init)
            )
        )
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_base(folder, args.hidden, args.layers)
        files = sorted(folder.glob("*.safetensors"))
        base, layer = sum(file.stat().st_size for file in files), files[-1].stat().st_size
        rows = [
            row(folder, ranks, bits, args.random_init, layer)
            for bits in args.bits
            for ranks in args.ranks
        ]
    passed = all(r["growth_mib"] <= r["limit_mib"] for r in rows)
    result = {
        "base_mb": round(base / 1e6),
        "layer_mib": round(layer / MIB, 1),
        "cpu": platform.machine(),
    }
    print(json.dumps({**result, "rows": rows, "passed": passed}))
    return int(not passed)


def row(folder: Path, ranks: int, bits: int, random_init: bool, layer: int) -> dict[str, Any]:
    """One line of the table: the worst rank."""
    results = measure(folder, ranks, bits, random_init)
    worst = max(results, key=lambda result: result["peak"] - result["share"])
    out = {
        "bits": bits,
        "ranks": ranks,
        "share_mib": round(worst["share"] / MIB, 1),
        "before_mib": round(worst["before"] / MIB, 1),
        "growth_mib": round((worst["peak"] - worst["before"]) / MIB, 1),
        "limit_mib": round((worst["share"] + layer) / MIB + FIXED_MIB, 1),
        "load_s": round(max(result["load_s"] for result in results), 1),
    }
    print("  ".join(f"{key} {value}" for key, value in out.items()), flush=True)
    return out


if __name__ == "__main__":
    raise SystemExit(main())
