"""A training that takes seconds: a random two-layer base, a byte tokenizer, a few dialogues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests.cluster.sandbox import ROOT
from tests.helpers.tokenizers import byte_tokenizer

STEPS, EVERY = 22, 5
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
WORDS = [
    "dog",
    "cat",
    "tea",
    "music",
    "night",
    "run",
    "book",
    "sea",
    "rain",
    "bread",
    "train",
    "lake",
    "snow",
    "warm",
]


def make_job(folder: Path) -> Path:
    """Write base, dialogues and configuration into `folder`; return the path of the YAML file."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 258,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "initializer_range": 0.3,
    }
    settings |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    base = LlamaForCausalLM(LlamaConfig(**settings, max_position_embeddings=256))
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for split, count in (("train", 96), ("valid", 12), ("test", 6)):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(_dialogue(split, n)) + "\n" for n in range(count))
        )
    data = {split: str(folder / f"{split}.jsonl") for split in ("train", "valid", "test")}
    tree = {
        "name": "tiny",
        "model": {"base": str(folder / "base"), "base_bits": 32},
        "prompts": {"count": 3, "tokens": 4},
        "data": {**data, "max_tokens": 160, "cache_dir": str(folder / "cache"), "workers": 0},
        "optim": {"lr": 0.01},
        "train": {"max_steps": STEPS, "global_batch": 12, "micro_batch": 2},
        "engine": {"collective_timeout_s": 15},
        "checkpoint": {"every_steps": EVERY},
        "log": {"every_steps": 1},
        "generate": {"max_new_tokens": 6, "batch_size": 4},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _dialogue(split: str, number: int) -> dict[str, object]:
    def word(place: int) -> str:
        return WORDS[(number * 7 + place * 5 + len(split)) % len(WORDS)]

    persona = [f"i like {word(0)}.", f"my {word(1)} is {word(2)}."]
    turns = [
        f"hi, do you like {word(3)}?",
        f"i like {word(0)} more",
        f"and {word(4)}?",
        f"no, {word(1)} is better",
    ]
    return {"persona": persona, "turns": turns, "first_speaker": "partner"}


def train_here(config: Path | str, run: Path, *arguments: str) -> None:
    """The undisturbed run: one process, no launcher."""
    run_here("spt_ds.train", "--config", str(config), "--run-dir", str(run), *arguments)


def run_here(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr


def final_loss(run: Path) -> float:
    """Validation loss after the last step, from DONE.json."""
    loss: float = json.loads((run / "DONE.json").read_text())["valid_after"]["nll_selected"]
    return loss
