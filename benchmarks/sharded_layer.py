"""CPU time that ZeRO-3's hooks cost the host in each decoder layer of a training micro-batch.

    python -m benchmarks.sharded_layer [--steps 15]

A tiny Llama, of which little time is computation, in three ways: whole on the rank, sharded with
each module gathered by itself (DeepSpeed's default), and sharded with each layer gathered as one
(what training does). Nothing stays resident, so that every use is a gather. One rank; each way runs
in a process of its own. The time of a layer is the difference between bases of 10 and 2 layers,
divided by 8. Limit: gathering whole layers costs less than the default. The last line is one JSON
object, the exit code is 1 where the limit is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.communication import batch, nothing_resident
from spt_ds import dist
from spt_ds.config.load import load_config
from spt_ds.engine import zero
from spt_ds.model.backbone import build_backbone
from spt_ds.model.loading import load_base_config
from spt_ds.model.reference import functions_of
from spt_ds.model.spt import Spt, Trainables, build_trainables
from spt_ds.placement.ds_check import plan_of_kind

WAYS = ("whole", "each module", "each layer")
LAYERS = (2, 10)


def step_seconds(folder: str, way: str, steps: int) -> float:
    """CPU seconds of a micro-batch, forward and backward: the median of `steps`."""
    config = load_config("demo", [f"model.base={folder}", "prompts.count=4"])
    plan = plan_of_kind("replicate", config, 1) if way == "whole" else nothing_resident(config)
    if way == "each module":
        zero._gather_whole_layers = lambda root: None
    sharding = zero.Sharding(plan, torch.device("cpu"))
    sharding.before_load()
    base = load_base_config(config.model)
    shard = sharding.shard_function()
    root: Any = sharding.wrap(
        build_backbone(config.model, base, torch.device("cpu"), strict=True, shard=shard)
    )
    functions = functions_of(config.reference, pad_id=0)
    trainables: Trainables = root(lambda inner: build_trainables(config, inner, functions, [], 0))
    spt, examples, seconds = Spt(config, trainables, functions), batch(), []
    for _ in range(steps + 3):  # at first DeepSpeed records the order of its modules
        began = time.process_time()
        root(spt.micro_losses, examples, 2, 21).total.backward()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds[3:])


def worker(_: int, folder: str, way: str, steps: int, out: str) -> None:
    """One way, in a process of its own."""
    torch.set_num_threads(1)
    dist.init(120)
    seconds = [step_seconds(f"{folder}/{layers}", way, steps) for layers in LAYERS]
    Path(out).write_text(json.dumps(seconds), encoding="utf-8")
    dist.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=15, help="micro-batches that are timed")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for layers in LAYERS:
            base = LlamaConfig(
                hidden_size=64,
                intermediate_size=176,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=256,
            )
            LlamaForCausalLM(base).save_pretrained(f"{folder}/{layers}")
        for way in WAYS:
            out = f"{folder}/{way}.json"
            torch.multiprocessing.spawn(  # type: ignore[attr-defined]
                worker, (folder, way, args.steps, out), nprocs=1
            )
            few, many = json.loads(Path(out).read_text(encoding="utf-8"))
            rows[way] = round(1e3 * (many - few) / (LAYERS[1] - LAYERS[0]), 2)
            print(f"{way:12} {rows[way]:6.2f} ms of CPU a layer", flush=True)
    kept = rows["each layer"] < rows["each module"]
    print(json.dumps({"milliseconds_a_layer": rows, "kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
