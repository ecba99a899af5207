"""Compares the memory plan with measured peaks of training on a CPU.

    python -m benchmarks.plan_against_peaks FOLDER [--points 0,1,...] [--steps N]

FOLDER is a base that `benchmarks/real_base.py` has made. Each point is a run of a few steps in a
process of its own. *Measured* is its largest resident memory above that before the base is loaded.
*Counted* is what the plan counts for the largest micro-batch that the run has read: base,
trainables, activations with the head. *Live* is the most that the C library had given out at a
time (mallinfo2), with pages of files such as mapped weights. Of it *kernels* are what stays after
the last step beyond base and trainables. *Slack* is measured less live: what the C library holds
free between pieces in use, and peaks that are shorter than a sample. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.costs.meters import peak_bytes, reset_peak
from spt_ds.engine import engine, trainer
from spt_ds.placement.estimate import BaseShape, MicroBatch, needs_of
from spt_ds.plan.base import shape_of
from spt_ds.train import main as train

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
CPU = torch.device("cpu")
PREFIX = "prompts.position=before_text"
# A byte is a token of that base, so that a window holds fewer words.
OPT = ("model.base=OPT", "data.max_tokens=768")
POINTS: dict[str, list[str]] = {
    "suffix, 16 bits": [],
    "suffix, 32 bits": ["model.base_bits=32"],
    "suffix, 8 bits": ["model.base_bits=8"],
    "suffix, 4 bits, K 8": ["model.base_bits=4", "prompts.count=8"],
    "prefix, 16 bits": [PREFIX, "train.micro_batch=2"],
    "prefix, 32 bits, K 1": [PREFIX, "model.base_bits=32", "prompts.count=1"],
    "prefix, 8 bits, 1,500 tokens": [
        *(PREFIX, "model.base_bits=8", "train.micro_batch_tokens=1500", "prompts.count=2"),
    ],
    "suffix, 16 bits, window 1,024": ["data.max_tokens=1024", "train.micro_batch=8"],
    "OPT, prefix, 32 bits": [*OPT, "model.base_bits=32", PREFIX, "train.micro_batch=1"],
    "OPT, suffix, 16 bits": [*OPT],
    "OPT, prefix, 32 bits, recomputed": [
        *(*OPT, "model.base_bits=32", PREFIX, "model.activation_checkpointing=non_reentrant"),
    ],
}


class _Heap(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "mapped"),
            *("usmblks", "fsmblks", "used", "free", "keepcost"),
        )
    ]


def given_out() -> int:
    """Bytes that the C library has given out and not got back."""
    library = ctypes.CDLL("libc.so.6")
    library.mallinfo2.restype = _Heap
    info = library.mallinfo2()
    return int(info.used + info.mapped)


def write_opt(folder: Path) -> None:
    """OPT-125M's configuration with a tokenizer of bytes; the weights are drawn."""
    from transformers import OPTConfig

    from tests.helpers.tokenizers import byte_tokenizer

    OPTConfig(word_embed_proj_dim=768).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


class Watch:
    """Notes peaks and micro-batches of a run of `spt_ds.train` in this process."""

    def __init__(self) -> None:
        self.sizes: list[MicroBatch] = []
        self.seen = {"live": 0, "files": 0, "used_after": 0, "load": 0}
        loop: Any = trainer
        opened, stepped = loop.open_session, engine.Engine._forward_backward

        def opening(*args: Any) -> Any:
            reset_peak(CPU)
            self.seen |= {"before": resident()[0], "files_before": resident()[1]}
            self.seen["used_before"] = given_out()
            session = opened(*args)
            self.seen |= {"load": peak_bytes(CPU), "used_loaded": given_out()}
            reset_peak(CPU)
            threading.Thread(target=self._sample, daemon=True).start()
            return session

        def stepping(self_: Any, batch: Any, *rest: Any) -> Any:
            lens = (sum(batch.context_lens), sum(batch.response_lens))
            self.sizes.append(MicroBatch(len(batch), *lens))
            out = stepped(self_, batch, *rest)
            self.seen["used_after"] = given_out()
            return out

        loop.open_session = opening
        engine.Engine._forward_backward = stepping  # type: ignore[method-assign,assignment]

    def _sample(self) -> None:
        # The C library keeps no record of its peak, so that it is asked a hundred times a second.
        while True:
            self.seen["live"] = max(self.seen["live"], given_out())
            self.seen["files"] = max(self.seen["files"], resident()[1])
            time.sleep(0.01)


def resident() -> tuple[int, int]:
    """Resident bytes of this process, and those of them that are pages of files."""
    words = Path("/proc/self/statm").read_text(encoding="ascii").split()
    page = os.sysconf("SC_PAGE_SIZE")
    return int(words[1]) * page, int(words[2]) * page


def measure(words: list[str]) -> int:
    """Run one point in this process and print its row as JSON."""
    watch = Watch()
    code = train(words)
    config = load_config(
        "smollm2-135m", [words[n + 1] for n, w in enumerate(words) if w == "--set"]
    )
    seen = watch.seen | {"peak": peak_bytes(CPU)}
    print("row", json.dumps(row(config, shape_of(config.model), watch.sizes, seen)))
    return code


def row(
    config: Config, shape: BaseShape, sizes: list[MicroBatch], seen: dict[str, int]
) -> dict[str, Any]:
    """One row of the table, in MiB."""
    recomputed = config.model.activation_checkpointing in ("non_reentrant", "reentrant")

    def activations(size: MicroBatch) -> int:
        needs = needs_of(config, shape, 1, size)
        return needs.recomputed if recomputed else needs.activations

    largest = max(sizes, key=activations)
    needs = needs_of(config, shape, 1, largest)
    counted = needs.base + needs.trainables + activations(largest)
    measured = max(seen["load"], seen["peak"]) - seen["before"]
    live = seen["live"] - seen["used_before"] + seen["files"] - seen["files_before"]
    parts = {
        "base": needs.base,
        "trainables": needs.trainables,
        "activations": activations(largest),
        "counted": counted,
        "kernels": seen["used_after"] - seen["used_loaded"] - needs.trainables,
        "live": live,
        "slack": measured - live,
        "measured": measured,
    }
    texts = {"contexts": largest.context, "replies": largest.response}
    return texts | {name: round(size / MIB) for name, size in parts.items()}


def run_point(name: str, base: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Measure one point in a fresh process."""
    options = [word.replace("=OPT", f"={folder / 'opt'}") for word in POINTS[name]]
    if options != POINTS[name]:
        options.append("model.random_init=true")
    where = [f"model.base={base}", f"data.cache_dir={folder / 'cache'}", "data.workers=0"]
    short = [f"train.max_steps={steps}", "data.max_valid_examples=1"]
    every = [*where, *short, *options]
    words = ["--config", "smollm2-135m", "--run-dir", str(folder / name.replace(" ", "-"))]
    words += [word for option in every for word in ("--set", option)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_against_peaks", "--measure", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    done.check_returncode()
    line = next(line for line in done.stdout.splitlines() if line.startswith("row "))
    return {"point": name, **json.loads(line.removeprefix("row "))}


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        return measure(sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--points", help="some of the points, by number from 0")
    parser.add_argument("--steps", type=int, default=4, help="of each run (default %(default)s)")
    args = parser.parse_args()
    names = list(POINTS)
    if args.points:
        names = [names[int(number)] for number in args.points.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_opt(folder / "opt")
        for name in names:
            rows.append(found := run_point(name, args.base.resolve(), folder, args.steps))
            found["ratio"] = round(found["counted"] / found["measured"], 2)
            found["of_live"] = round(found["counted"] / (found["live"] - found["kernels"]), 2)
            if len(rows) == 1:
                print(f"| {' | '.join(found)} |\n|{'---|' * len(found)}")
            print("| " + " | ".join(map(str, found.values())) + " |", flush=True)
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
