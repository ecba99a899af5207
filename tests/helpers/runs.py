"""A trained run on a tiny random base, as a folder: for tests of what is done with one."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from spt_ds.config.load import dump_config
from spt_ds.config.schema import Config
from spt_ds.run import checkpoint
from spt_ds.run.folder import RunFolder
from tests.helpers.tiny import tiny_backbone, tiny_lm, tiny_spt
from tests.helpers.tokenizers import byte_tokenizer


def make_run(folder: Path, arch: str = "opt", prompts: int = 2, examples: int = 8) -> RunFolder:
    """Write `folder/base`, `folder/test.jsonl` and the run `folder/run`, whose step 7 is saved."""
    sizes = {"vocab_size": 258, "max_position_embeddings": 160}
    tiny_lm(arch, torch.float32, **sizes).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    rows = [
        {"persona": ["i ski."], "history": ["hi " * (1 + n % 3)], "response": f"yes {n}"}
        for n in range(examples)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "test.jsonl").write_text(text, encoding="utf-8")
    config = Config.model_validate(
        {
            "model": {"base": str(folder / "base"), "base_bits": 32},
            "prompts": {"count": prompts, "tokens": 2},
            "data": {
                "max_tokens": 120,
                "test": str(folder / "test.jsonl"),
                "cache_dir": str(folder / "cache"),
            },
            "generate": {"max_new_tokens": 6, "batch_size": 2},
        }
    )
    run = RunFolder(folder / "run")
    run.path.mkdir()
    run.config.write_text(dump_config(config), encoding="utf-8")
    backbone = tiny_backbone(arch, torch.float32, **sizes)  # type: ignore[arg-type]
    spt = tiny_spt(backbone, count=prompts, tokens=2, dtype=torch.float32)
    state = {"step": 7, "run": {"best_step": 7}}
    tensors: dict[str, torch.Tensor] = dict(spt.trainables.named_parameters())
    checkpoint.save(run.checkpoints, checkpoint.Checkpoint(tensors, {}, state))
    return run
