"""A base that is quantised as it is read takes little more memory than its bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
# Anonymous memory, in MiB, that loading adds: in a process of its own, which has no holes yet.
LOAD = """
import sys
from spt_ds.config.model import ModelConfig
from spt_ds.model.backbone import load_lm
from spt_ds.model.loading import load_base_config

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

config = ModelConfig(base=sys.argv[1], base_bits=8)
base = load_base_config(config)
before = anonymous()
lm = load_lm(config, base)
bytes_ = sum(weight.numel() * weight.element_size() for weight in lm.parameters())
print((anonymous() - before) / (bytes_ / 2**20))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers, 83 MiB in bf16."""
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    lm: Any = LlamaForCausalLM(config)
    lm.bfloat16().save_pretrained(folder)
    return folder


def taken(base: Path) -> float:
    """Memory that loading takes, over the bytes of the weights."""
    command = [sys.executable, "-c", LOAD, str(base)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells its memory")
def test_freed_pieces_leave_no_holes_between_layers(base: Path) -> None:
    """Pieces of a million weights left holes of up to four times the weights, though not in every
    process; that pieces are small is tested in tests/numerics/test_quant.py.
    """
    assert taken(base) < 2.0
