"""Measures training on personas of 128 k tokens and more in windows of 8 k and more.

    python -m benchmarks.long_context [--windows 2048,8192,16384] [--folder KEEP]

Writes a Llama base of 18 million random weights and two examples, each with a persona of 160,000
tokens, then trains two steps of one example in suffix placement, in one process on the CPU.
`data.overflow: retrieve` fills the window with the sentences that are nearest to the question. Each
row of the table is a window, the seconds of the run, the peak memory of its process (ru_maxrss),
and what `spt-ds plan` counts for the same configuration. The last line is one JSON object; the exit
code is 1 where a peak is above the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers.tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PERSONA_TOKENS = 160_000
STEPS = 2
# Prints the peak memory of its process behind what the command prints.
_WRAPPED = """
import resource, sys
from {module} import main
code = main(sys.argv[1:])
print("peak KiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def write_base(folder: Path, longest: int) -> None:
    """Configuration and tokenizer; the weights are drawn when a run begins."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=258,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=longest + 64,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def write_examples(path: Path, count: int) -> None:
    """Questions about one sentence among thousands; a byte is a token."""
    draw = random.Random(0)
    words = ["tea", "dogs", "music", "run", "blue", "sea", "night", "work", "ski"]
    rows = []
    for number in range(count):
        persona: list[str] = []
        while sum(map(len, persona)) < PERSONA_TOKENS:
            persona.append(f"{' '.join(draw.choices(words, k=8))} and number {len(persona)}.")
        asked = draw.randrange(len(persona))
        rows.append(
            {
                "id": f"d{number}",
                "persona": persona,
                "history": [f"who is number {asked}?"],
                "response": persona[asked].split()[0],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def options(folder: Path, window: int) -> list[str]:
    """`--set` words of a run of this window."""
    settings = {
        "name": f"window-{window}",
        "model.base": folder / "base",
        "model.base_bits": 32,
        "model.random_init": "true",
        "prompts.position": "before_reply",
        "data.train": folder / "train.jsonl",
        "data.valid": folder / "train.jsonl",
        "data.max_tokens": window,
        "data.overflow": "retrieve",
        "data.cache_dir": folder / "cache",
        "data.workers": 0,
        "data.max_valid_examples": 1,
        "train.global_batch": 1,
        "train.micro_batch": 1,
        "train.max_steps": STEPS,
        "losses.contrastive": 0,
        "checkpoint.every_steps": STEPS,
    }
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def run(module: str, words: list[str], folder: Path) -> str:
    """What the command prints; CalledProcessError where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _WRAPPED.format(module=module), *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    done.check_returncode()
    return done.stdout


def peak_mib(printed: str) -> float:
    """The peak that a wrapped command printed last."""
    return int(re.findall(r"^peak KiB (\d+)$", printed, re.M)[-1]) / 1024


def planned_mib(folder: Path, window: int) -> float:
    """What `spt-ds plan` counts for a copy of the base on the one rank."""
    printed = run("spt_ds.cli", ["plan", "--config", "demo", *options(folder, window)], folder)
    kept = "all kept" if "activation checkpointing: off" in printed else "recomputed"
    counted = ("process", "trainables", f"activations, {kept}", "base, whole")
    lines = [line for line in printed.splitlines() if line.startswith(counted)]
    assert len(lines) == len(counted), printed
    return 1024 * sum(float(line.split()[-2]) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", default="2048,8192,16384", metavar="N,N,...")
    parser.add_argument("--folder", type=Path, metavar="KEEP", help="default: a temporary one")
    args = parser.parse_args()
    windows = [int(text) for text in args.windows.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        (folder / "base").mkdir(parents=True, exist_ok=True)
        write_base(folder / "base", max(windows))
        write_examples(folder / "train.jsonl", 2)
        print("| window | s | peak MiB | plan MiB |\n|---|---|---|---|")
        for window in windows:
            began = time.monotonic()
            words = ["--config", "demo", *options(folder, window)]
            peak = peak_mib(run("spt_ds.train", words, folder))
            seconds = time.monotonic() - began
            row = {"window": window, "seconds": round(seconds, 1), "peak_mib": round(peak)}
            row |= {"plan_mib": round(planned_mib(folder, window))}
            rows.append(row)
            print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
    print(json.dumps({"rows": rows}))
    return int(any(row["peak_mib"] > row["plan_mib"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
