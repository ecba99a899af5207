"""Writes a quantised base to disk, one file and one layer at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from spt_ds.config.model import ModelConfig
from spt_ds.errors import ConfigError
from spt_ds.files import new_folder
from spt_ds.log import get_logger
from spt_ds.model.base_files import base_path
from spt_ds.model.loading import (
    SECTION,
    check_weights,
    load_base_config,
    load_tokenizer,
    quantisation_section,
)
from spt_ds.model.quant import Packing, QuantLinear
from spt_ds.model.quant_load import finished_modules, report, skeleton
from spt_ds.model.quant_source import open_source

FILE_BYTES = 2**30

Tensors = dict[str, torch.Tensor]


def write_quantised(config: ModelConfig, out: Path) -> None:
    """Quantise the base of `config` into the folder `out`, which appears when it is complete."""
    base, path = load_base_config(config), base_path(config.base)
    check_weights(config, base)
    try:
        with new_folder(out, to_disk=True) as part:
            total = _fill(part, config, base, path)
    except (OSError, SafetensorError) as error:
        free = "make room there, or give a folder that can be written; nothing was left behind"
        raise ConfigError(
            f"{out}: the quantised base cannot be written: {str(error).strip()}; {free}"
        ) from error
    get_logger().info("%s: %.1f MiB", out, total / 2**20)


def _fill(part: Path, config: ModelConfig, base: PretrainedConfig, path: str) -> int:
    """Write tokenizer, weights and configuration into `part`; return the bytes of the tensors."""
    load_tokenizer(config).save_pretrained(part)
    lm = skeleton(base, torch.bfloat16)
    source = open_source(lm, config, path, torch.device("cpu"))
    errors: dict[str, float] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A generator: layers are quantised while files are written, so memory holds one file and one
    # layer.
    finished = finished_modules(lm, config, source, device, errors)
    total = _write_files(part, _files(finished))
    report(lm, errors, Packing.of(config))
    lm.generation_config.save_pretrained(part)
    setattr(base, SECTION, quantisation_section(config))
    base.architectures, base.dtype = [type(lm).__name__], "bfloat16"
    base.save_pretrained(part)
    for file in part.glob("*.safetensors"):  # written for the owner alone
        shutil.copymode(part / "config.json", file)
    return total


def _files(finished: Iterator[tuple[str, nn.Module]]) -> Iterator[Tensors]:
    """Tensors of about `FILE_BYTES` at a time; those of a written module are let go."""
    tensors: Tensors = {}
    written: dict[int, nn.Parameter] = {}  # tied weights come once
    for name, module in finished:
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in written:
                tensors[f"{name}.{key}"] = parameter.detach().cpu()
        if isinstance(module, QuantLinear):
            # Nothing shares the bytes of a quantised layer, so they may go at once.
            del module.packed
        else:
            # The weights themselves are kept: the id of one that is freed could be given to
            # another.
            written |= {id(parameter): parameter for parameter in module.parameters(recurse=False)}
        if sum(t.numel() * t.element_size() for t in tensors.values()) >= FILE_BYTES:
            yield tensors
            tensors = {}
    yield tensors


def _write_files(folder: Path, files: Iterator[Tensors]) -> int:
    """Write numbered safetensors files and their index; return the bytes of the tensors."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(sorted(tensors), name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )
    return total
