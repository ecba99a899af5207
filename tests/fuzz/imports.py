"""Targets that become runs: PEFT's folders and checkpoints of the public reference; and exports."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from spt_ds.export import command, import_command
from spt_ds.run import checkpoint
from spt_ds.run.folder import RunFolder
from tests.fuzz.folders import _run_documents, _run_files, _write, tensor_files
from tests.fuzz.inputs import Document, documents, folders, texts, unpack
from tests.fuzz.judge import Target

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STATES, SETTINGS = "mp_rank_00_model_states.pt", "settings.yaml"
K, P, D = 2, 2, 8
REFERENCE = {
    "model": {
        "model_type": "selective_pt",
        "model_name": "facebook/opt-125m",
        "load_bit": 32,
        "peft_type": "prompt_tuning",
        "K": K,
        "peft_config": {"num_virtual_tokens": P},
        "normalizer": "linear",
        "normalizer_on": ["prompt", "lm"],
    },
    "training": {"mode": "causal", "ensemble": True, "learning_rate": "1e-5"},
    "dataset": {"train": "a.txt", "valid": "b.txt", "max_token_length": 96},
}


def _trained() -> dict[str, torch.Tensor]:
    prompts = {f"models.{k}.prompt_encoder.default.embedding.weight": (P, D) for k in range(K)}
    shapes = {**prompts, "prompt_normalizer.weight": (D, D), "prompt_normalizer.bias": (D,)}
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def _ended(folder: Path, code: int) -> int:
    """A run that a reader finds good, or nothing at all."""
    out = folder / "out"
    if code == 0:
        RunFolder(out).load_config()
        checkpoint.load(checkpoint.find(RunFolder(out).checkpoints, "best"))
    left = {path.name for path in folder.iterdir()} - {"source"}
    assert left == ({"out"} if code == 0 else set()), left
    return code


@functools.cache
def _peft_files() -> dict[str, bytes]:
    from safetensors.torch import save

    tree = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": P,
        "token_dim": D,
        "num_transformer_submodules": 1,
        "base_model_name_or_path": "facebook/opt-125m",
        "revision": None,
    }
    tensors = {"prompt_embeddings": torch.ones(P, D)}
    return {ADAPTER: json.dumps(tree).encode(), WEIGHTS: save(tensors, metadata={"format": "pt"})}


def _peft_documents() -> Document:
    whole = _peft_files()
    return folders(
        {ADAPTER: documents(json.loads(whole[ADAPTER])), WEIGHTS: tensor_files(whole[WEIGHTS])}
    )


def peft(content: bytes, folder: Path) -> int:
    source = _write(folder / "source", unpack(content, _peft_files()))
    return _ended(folder, import_command.main(["peft", str(source), str(folder / "out")]))


@functools.cache
def _reference_files() -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save({"module": _trained(), "param_shapes": [{}]}, buffer)
    return {STATES: buffer.getvalue(), SETTINGS: yaml.safe_dump(REFERENCE).encode()}


def _yaml_bytes(tree: Any) -> bytes:
    return yaml.safe_dump(tree).encode()


def _reference_documents() -> Document:
    whole = _reference_files()
    return folders({STATES: texts(whole[STATES]), SETTINGS: documents(REFERENCE, dump=_yaml_bytes)})


def reference(content: bytes, folder: Path) -> int:
    files = unpack(content, _reference_files())
    source = folder / "source"
    source.mkdir()
    _write(source, files)
    given = ["reference", str(source), str(folder / "out"), "--config", str(source / SETTINGS)]
    return _ended(folder, import_command.main(given))


@functools.cache
def _checkpoint() -> dict[str, bytes]:
    """The checkpoint that the replies of the good run came from, over the embedded base."""
    with tempfile.TemporaryDirectory() as name:
        tensors = {"bank.weight": torch.ones(4, 8, 256)}
        state = {"step": 7, "run": {"best_step": 7, "best_nll": 2.5}}
        path = checkpoint.save(Path(name), checkpoint.Checkpoint(tensors, {}, state))
        return {f"checkpoints/{path.name}/{f.name}": f.read_bytes() for f in path.iterdir()}


def exported(content: bytes, folder: Path) -> int:
    """A model card of whatever stands in a run folder."""
    run = _write(folder / "source", {**_checkpoint(), **unpack(content, _run_files())})
    given = ["hub", str(run), str(folder / "out"), "--base", "a/b", "--examples", "3"]
    return _ended(folder, command.main(given))


TARGETS = [
    Target("import-peft", st.deferred(_peft_documents), peft, share=0.5),
    Target("import-reference", st.deferred(_reference_documents), reference, share=0.5),
    Target("exported", st.deferred(_run_documents), exported, share=0.5),
]
