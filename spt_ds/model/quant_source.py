"""Where the weights of a base come from when it is built module by module: a checkpoint, or random
numbers.

A checkpoint is mapped, never loaded: a tensor's pages are read when it is used and can be dropped
afterwards. Names are mapped as transformers maps them; a checkpoint whose tensors must be merged or
split first is refused.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from spt_ds.config.model import ModelConfig
from spt_ds.errors import ModelError
from spt_ds.model.base_files import weight_files
from spt_ds.model.loading import SECTION, generation_config
from spt_ds.model.weight_names import model_names, refuse_missing, refuse_shape
from spt_ds.rng import keyed_seed

# (name of a module, the module) -> the weights it owns itself, by their names in it, any floating
# dtype, perhaps read-only; `packed` in place of `weight` for a layer that is stored quantised.
Source = Callable[[str, nn.Module], dict[str, torch.Tensor]]


def open_source(lm: Any, config: ModelConfig, path: str, device: torch.device) -> Source:
    """The source that `model.random_init` asks for, with all that can be checked before reading
    checked.
    """
    if config.random_init:
        return lambda name, module: _draw(lm, name, module, device)
    # As from_pretrained does: without the file, the model's own defaults stay.
    lm.generation_config = generation_config(config, path) or lm.generation_config
    try:
        files = [
            _open(file) for file in weight_files(path, config.revision, pickled=config.allow_pickle)
        ]
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"model.base: no weights can be loaded from {path}: {str(error).strip()}"
        ) from error
    return _Checkpoint(lm, path, files)


def _draw(lm: Any, name: str, module: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Random weights as the architecture initialises them: the same on all ranks, every time."""
    drawn = copy.copy(module)
    drawn._parameters = {
        key: (
            None
            if p is None
            else nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=device), False)
        )
        for key, p in module._parameters.items()
    }
    # Keyed by the module's name: the numbers do not depend on the order of layers, nor on what was
    # drawn before. The process's own generator is left alone.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(keyed_seed(0, f"base:{name}"))
        lm._init_weights(drawn)
    return {key: p.detach() for key, p in drawn.named_parameters(recurse=False)}


class _Checkpoint:
    """A `Source`. `holders` maps the model's names to the files that hold them."""

    def __init__(self, lm: Any, path: str, files: Iterable[Mapping[str, torch.Tensor]]) -> None:
        self.path = path
        stored = [(key, file) for file in files for key in file]
        # A folder of `spt-ds quantize` has the model's own names, and `packed`, which no renaming
        # knows.
        renamed = not hasattr(lm.config, SECTION)
        self.holders = (
            _by_model_name(lm, stored, path)
            if renamed
            else {key: (file, key) for key, file in stored}
        )
        self.aliases: dict[int, list[str]] = {}  # tied weights have several names
        for name, parameter in lm.named_parameters(remove_duplicate=False):
            self.aliases.setdefault(id(parameter), []).append(name)
        self._check(lm)
        # Some bases store buffers. No module's own weights include them, so they are filled here.
        for name, buffer in lm.named_buffers():
            if name in self.holders:
                buffer.copy_(self._read(name))

    def __call__(self, name: str, module: nn.Module) -> dict[str, torch.Tensor]:
        out = {}
        for key, like in module.named_parameters(recurse=False):
            stored = next((n for n in self.aliases[id(like)] if n in self.holders), None)
            # `_check` has shown that nothing is missing: this weight is stored in packed form.
            if stored is None:
                out["packed"] = self._read(f"{name}.packed")
                continue
            out[key] = self._read(stored)
            refuse_shape(self.path, stored, out[key].shape, like.shape)
        return out

    def _read(self, name: str) -> torch.Tensor:
        file, key = self.holders[name]
        return file[key]

    def _check(self, lm: Any) -> None:
        """Before any module is built, on all ranks: nothing is missing, tied weights agree."""
        missing = []
        for names in self.aliases.values():
            present = [name for name in names if name in self.holders]
            if not present and names[0].removesuffix("weight") + "packed" not in self.holders:
                missing.append(names[0])
            if any(
                not torch.equal(self._read(present[0]), self._read(other)) for other in present[1:]
            ):
                raise ModelError(
                    f"{self.path}: config.json ties {' and '.join(present)}, the weights hold"
                    " different values for them; set tie_word_embeddings: false in config.json"
                )
        refuse_missing(lm, missing, self.path)


def _by_model_name(
    lm: Any, stored: list[tuple[str, Mapping[str, torch.Tensor]]], path: str
) -> dict[str, tuple[Mapping[str, torch.Tensor], str]]:
    """Names of `lm` -> file and the tensor's name in it."""
    names = model_names(lm, [key for key, _ in stored], path)
    holders = {}
    for key, file in stored:
        name, merged = names.get(key, (None, False))
        if merged:
            raise ModelError(
                f"{path}: {key} must be merged or split to become {name} of {type(lm).__name__},"
                " which cannot be done tensor by tensor; set model.base_bits: 16"
            )
        if name is not None:
            holders[name] = file, key
    return holders


def _open(file: str) -> Mapping[str, torch.Tensor]:
    if file.endswith(".safetensors"):
        return _SafeFile(file)
    # A file from before torch 1.6, which cannot be mapped.
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is in a format that can only be loaded whole; convert it to safetensors"
        )
    tensors: dict[str, torch.Tensor] = torch.load(
        file, map_location="cpu", weights_only=True, mmap=True
    )
    return tensors


class _SafeFile(Mapping[str, torch.Tensor]):
    """Tensors of one safetensors file, mapped."""

    def __init__(self, path: str) -> None:
        self.handle = safe_open(path, framework="pt")
        self.names: list[str] = list(self.handle.keys())

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self.handle.get_tensor(key)
        return tensor

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
