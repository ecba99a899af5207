"""The checks of benchmarks/gpu.py: what is right on this device, and what the device can do.

    python benchmarks/gpu_checks.py NAME

The last line is one JSON object; `passed` is in it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig

from spt_ds.batch import Batch
from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.costs.meters import matmul_ceiling, timed
from spt_ds.costs.random_bases import build, micro_batch
from spt_ds.errors import SptError
from spt_ds.model.attention import choose_backend
from spt_ds.model.backbone import Backbone
from spt_ds.model.spt import Spt

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PACKAGES = ("torch", "transformers", "deepspeed", "bitsandbytes", "flash-attn", "peft")
PRODUCTS = (1256, 10048) if GPU else (128, 256)  # rows of a small and of a large micro-batch
HEAD_SIZES = (16, 32, 64, 80, 96, 128, 256)
KERNELS = ("flash", "varlen", "sdpa")
ROUNDING = 4.0  # times plain attention's own distance from fp32, in the same 16 bits
SAME_WEIGHTS = 1e-2  # relative; one kernel or another multiplies the same bf16 numbers
SAME_RUN = 5e-3  # relative; a GPU adds in another order each time
RUN = (
    "train.max_steps=4",
    "train.global_batch=4",
    "train.micro_batch=2",
    "data.max_train_examples=64",
    "data.max_valid_examples=8",
    "checkpoint.every_steps=2",
    "model.base_bits=4",
    "data.workers=0",
)
FILES = Path(__file__).parents[1] / "ds_configs"


def ceilings() -> dict[str, Any]:
    """What the device reaches: products, copies and launches, each alone; and what it runs with."""
    dtype, small = torch.bfloat16, torch.zeros(1, device=DEVICE)
    source = torch.zeros((1 << 30 if GPU else 1 << 26) // 2, dtype=dtype, device=DEVICE)
    target = torch.empty_like(source)

    def launches() -> None:
        for _ in range(10_000):
            small.add_(1)

    copies, _ = timed(lambda: target.copy_(source), DEVICE, 5)
    empty, _ = timed(launches, DEVICE, 3)
    return {
        "passed": True,
        "tflops": {
            f"{rows} x 4096 x 11008": matmul_ceiling(DEVICE, dtype, rows, 4096, 11008)
            for rows in PRODUCTS
        },
        "copy_gib_per_s": 2 * source.numel() * 2 / min(copies) / 2**30,
        "launches_per_s": 10_000 / min(empty),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if GPU else "CPU",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def settings(placement: str, bits: int, attention: str = "sdpa") -> Config:
    """A tiny step without the contrastive loss, which takes no pass through the base."""
    position = {"prefix": "before_text", "suffix": "before_reply"}[placement]
    overrides = [
        f"prompts.position={position}",
        f"model.base_bits={bits}",
        f"model.attention={attention}",
    ]
    return load_config(
        "demo", [*overrides, "model.activation_checkpointing=off", "losses.contrastive=0"]
    )


def some_batch(backbone: Backbone) -> Batch:
    """Three real dialogues."""
    return micro_batch("embedded:valid", "embedded", 3, backbone.vocabulary, 256)


def gradients(backbone: Backbone, spt: Spt) -> list[torch.Tensor]:
    """Those of the trainables, float64 on the CPU."""
    batch = some_batch(backbone)
    spt.trainables.zero_grad()
    total = backbone(spt.micro_losses, batch, len(batch), len(batch.response_ids)).total
    total.backward()
    return [p.grad.double().cpu() for p in spt.trainables.parameters() if p.grad is not None]


def distance(got: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Relative, in the 2-norm, of the worst trainable; NaN where one is."""
    gaps = [(mine - theirs).norm() / theirs.norm() for mine, theirs in zip(got, right, strict=True)]
    return float(torch.stack(gaps).max())


def check_attention() -> dict[str, Any]:
    """Each kernel at most `ROUNDING` times as far from fp32 as plain attention in bf16."""
    outcome: dict[str, Any] = {"passed": True}
    for placement in ("prefix", "suffix"):
        compare_kernels("tiny", placement, placement, outcome)
    return outcome


def check_heads() -> dict[str, Any]:
    """The same for heads of other sizes, eight of which share one of keys and values."""
    outcome: dict[str, Any] = {"passed": True}
    for size in HEAD_SIZES:
        base = LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=size,
            intermediate_size=128,
            vocab_size=1000,
            max_position_embeddings=1024,
        )
        compare_kernels(base, "suffix", f"{size}", outcome)
    return outcome


def compare_kernels(
    base: str | PretrainedConfig, placement: str, name: str, outcome: dict[str, Any]
) -> None:
    """Add to `outcome` how far each kernel's gradients are from those in fp32."""
    backbone, spt = build(base, settings(placement, 16, "eager"), DEVICE)
    plain = gradients(backbone, spt)
    backbone.float()
    right = gradients(backbone, spt)
    unit = distance(plain, right)
    outcome[f"eager, {name}"] = unit
    for kernel in KERNELS:
        if choose_backend(kernel, DEVICE, torch.bfloat16, strict=False) != kernel:
            outcome[f"{kernel}, {name}"] = "not usable here"
            continue
        gap = distance(gradients(*build(base, settings(placement, 16, kernel), DEVICE)), right)
        outcome[f"{kernel}, {name}"] = gap
        outcome["passed"] &= gap <= ROUNDING * unit


def check_quantised() -> dict[str, Any]:
    """Gradients through 4-bit and 8-bit layers, and through plain layers that hold the dequantised
    weights.
    """
    outcome: dict[str, Any] = {"passed": True}
    for bits in (4, 8):
        backbone, spt = build("tiny", settings("prefix", bits), DEVICE)
        backbone.check_quantised = True
        backbone.check()  # raises and names the layer
        got = gradients(backbone, spt)
        gap = distance(got, gradients(with_plain_layers(backbone), spt))
        outcome[f"{bits} bits"] = gap
        outcome["passed"] &= gap <= SAME_WEIGHTS
    return outcome


def with_plain_layers(backbone: Backbone) -> Backbone:
    """Put `nn.Linear` of the dequantised weight in the place of each quantised layer."""
    from spt_ds.model.quant import QuantLinear

    for name, layer in list(backbone.lm.named_modules()):
        if isinstance(layer, QuantLinear):
            plain = nn.Linear(
                layer.in_features,
                layer.out_features,
                bias=False,
                device=DEVICE,
                dtype=torch.bfloat16,
            )
            plain.weight.data = layer.dequantised(torch.bfloat16)
            plain.bias = layer.bias  # type: ignore[assignment]  # may be None
            backbone.lm.set_submodule(name, plain.requires_grad_(False))
    return backbone


def check_runs() -> dict[str, Any]:
    """Whole runs over a 4-bit base: under ZeRO-3, with shards in host memory, and resumed, all end
    as a plain one.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        right = train(plain)
        outcome: dict[str, Any] = {"plain run ends at": right}
        for file in ("zero3.json", "zero3_offload_cpu.json"):
            outcome[file] = (
                train(Path(folder) / file, "--deepspeed_config", str(FILES / file)) / right - 1
            )
        saved = sorted(path.name for path in (plain / "checkpoints").glob("step-*"))
        shutil.rmtree(plain / "checkpoints" / saved.pop())
        (plain / "DONE.json").unlink()
        outcome[f"resumed from {saved[-1]}"] = train(plain) / right - 1
    gaps = [value for key, value in outcome.items() if key != "plain run ends at"]
    return {"passed": all(abs(gap) <= SAME_RUN for gap in gaps), **outcome}


def train(out: Path, *more: str) -> float:
    """One short run over the embedded base; its last validation loss."""
    options = [word for setting in RUN for word in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "spt_ds.train",
        "--config",
        "demo",
        "--run-dir",
        str(out),
        *options,
        *more,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    done = json.loads((out / "DONE.json").read_text(encoding="utf-8"))
    return float(done["valid_after"]["loss"])


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "ceilings": ceilings,
    "attention": check_attention,
    "heads": check_heads,
    "quantised": check_quantised,
    "runs": check_runs,
}


def main() -> int:
    """Run one check in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=CHECKS)
    try:
        print(json.dumps(CHECKS[parser.parse_args().name]()))
    except (SptError, subprocess.CalledProcessError) as error:
        print(json.dumps({"passed": False, "error": str(error)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
