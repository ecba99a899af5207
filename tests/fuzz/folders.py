"""Targets that are folders: predictions and scores, checkpoints, bases, what a run writes."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors

from spt_ds import cli, summary
from spt_ds.config.load import dump_config, load_config
from spt_ds.config.model import ModelConfig
from spt_ds.engine import checkpoints
from spt_ds.engine.generator import read_parts
from spt_ds.evaluate import command as evaluate_command
from spt_ds.evaluate import compare_command
from spt_ds.model.backbone import build_backbone
from spt_ds.model.loading import load_base_config, load_tokenizer
from spt_ds.report import command as report_command
from spt_ds.run import checkpoint, lock
from spt_ds.run.folder import RunFolder
from tests.fuzz.inputs import (
    ABSENT,
    Document,
    documents,
    folders,
    json_bytes,
    json_lines,
    texts,
    unpack,
)
from tests.fuzz.judge import Target
from tests.helpers import predictions as good_predictions
from tests.helpers.tiny import tiny_lm
from tests.helpers.tokenizers import byte_tokenizer

LINES = [
    {**line, "nll_sum": 9.5, "nll_tokens": 4, "scores": [0.1, 0.2, 0.3, 0.4]}
    for line in good_predictions.lines()
]


def predictions(content: bytes, folder: Path) -> int:
    """Score a file; what is written holds no number that JSON does not know."""
    (folder / "predictions.jsonl").write_bytes(content)
    code = evaluate_command.main([str(folder / "predictions.jsonl"), "--out", str(folder / "out")])
    if code == 0:
        json.loads((folder / "out" / "scores.json").read_bytes(), parse_constant=_refuse)
    return code


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} was written")


# A run folder as training, generation and evaluation leave it ------------------------------------

LOSSES = {"loss": 3.0, "nll": 2.5, "nll_selected": 2.4, "selection": 0.3, "fusion": 0.2}
DONE = {
    "step": 7,
    "world_size": 2,
    "trained_parameters": 100,
    "valid_before": LOSSES,
    "valid_after": LOSSES,
}
METRICS = [
    {"step": 0, "kind": "valid", "time": 1.0, **LOSSES},
    {"step": 1, "kind": "train", "time": 2.0, **LOSSES, "lr": 0.1, "prompt_usage": [1, 2, 3, 0]},
    {"step": 2, "kind": "train", "time": 3.5, **LOSSES, "lr": 0.1},
]
ENVIRONMENT = {"versions": {"torch": "2"}, "hardware": {"cpu": "x", "gpus": []}, "ranks": 1}


@functools.cache
def _scores() -> tuple[bytes, bytes]:
    """scores.json and generate.json of the good predictions."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "predictions.jsonl"
        path.write_bytes(json_lines(LINES))
        from spt_ds.evaluate.scores_json import evaluate

        scores = evaluate(path)
        record = {
            "identity": "x",
            "predictions_sha256": scores.settings.predictions_sha256,
            "checkpoint": "step-00000007",
            "config": load_config("demo").model_dump(mode="json"),
        }
        return json.dumps(scores.to_json()).encode(), json.dumps(record).encode()


@functools.cache
def _run_files() -> dict[str, bytes]:
    scores, record = _scores()
    return {
        "config.yaml": dump_config(load_config("demo")).encode(),
        "DONE.json": json_bytes(DONE),
        "metrics.jsonl": json_lines(METRICS),
        "environment.json": json_bytes(ENVIRONMENT),
        "deepspeed.json": b'{"zero_optimization": {"stage": 3}}',
        "generate/predictions.jsonl": json_lines(LINES),
        "generate/generate.json": record,
        "generate/scores.json": scores,
        "before/predictions.jsonl": json_lines(LINES),
    }


def _run_documents() -> Document:
    whole = _run_files()
    scores, record = (json.loads(text) for text in _scores())
    trees = {
        "DONE.json": documents(DONE),
        "environment.json": documents(ENVIRONMENT),
        "metrics.jsonl": documents(METRICS, dump=json_lines),
        "generate/scores.json": documents(scores),
        "generate/generate.json": documents(record),
        "generate/predictions.jsonl": documents(LINES, dump=json_lines),
        "before/predictions.jsonl": documents(LINES, dump=json_lines),
        "config.yaml": documents(load_config("demo").model_dump(mode="json"))
        | texts(whole["config.yaml"], b'name: "\\e[2J\\u202e"\n'),
        "deepspeed.json": texts(whole["deepspeed.json"]),
    }
    return folders(trees)


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def _good_run(folder: Path) -> Path:
    return _write(folder, _run_files())


def told(content: bytes, folder: Path) -> int:
    """Every command that shows a run, over the same folder: the largest exit code."""
    run = _write(folder / "run", unpack(content, _run_files()))
    good = _good_run(folder / "good")
    codes = [
        summary.main([str(run)]),
        compare_command.main([str(run), "--baseline", str(good), "--out", str(folder / "out")]),
        compare_command.main([str(good), "--baseline", str(run)]),
    ]
    return max(codes)


def report(content: bytes, folder: Path) -> int:
    run = _write(folder / "run", unpack(content, _run_files()))
    return report_command.main([str(run), "--out", str(folder / "page.html")])


def arguments(content: bytes, folder: Path) -> int:
    """A command with its arguments, a line each; `run` is a good run folder."""
    _good_run(folder / "run")
    command, *words = content.replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
    if command not in ("evaluate", "compare", "summary", "config"):
        return 2
    try:
        return cli.main([command, *words])
    except SystemExit as ended:  # argparse
        return int(ended.code or 0)


ARGUMENTS = (
    b"evaluate\nrun\n--out\nout\n--ead-vocabulary\n50\n--against\nrun/before/predictions.jsonl",
    b"compare\nrun\n--baseline\nrun\n--out\nout",
    b"summary\nrun",
    b"config\ndemo\n--set\nname=x",
    b"summary\n" + b"x" * 5000,
    b"compare\nrun\n--baseline\nrun\n--out\n" + b"x" * 300,
)


def resumed(content: bytes, folder: Path) -> None:
    """What `spt-ds train` asks of a folder before it begins."""
    run = RunFolder(_write(folder / "run", unpack(content, _run_files())))
    if not run.is_done(load_config("demo", ["train.max_steps=9"])):
        run.prepare(load_config("demo"), None)


def locked(content: bytes, folder: Path) -> None:
    """What a start finds where another one was."""
    (folder / lock.NAME).write_bytes(content)
    with mock.patch.object(lock, "PATIENCE_S", 0.01), lock.only_start(folder, "wait"):
        pass


def parts(content: bytes, folder: Path) -> None:
    """Part files of a generation, whose every line has the checksum that it should have."""
    lines = [b"%08x %s\n" % (zlib.crc32(line), line) for line in content.split(b"\n")]
    (folder / "rank-0.jsonl").write_bytes(b"".join(lines) + content)
    merged = {line["index"]: line for line in read_parts(folder, len(LINES))}
    for index in range(len(LINES)):
        json.dumps(merged.get(index), ensure_ascii=False).encode()


# Checkpoints -------------------------------------------------------------------------------------

CHECKPOINT = (checkpoint.TRAINABLES, checkpoint.OPTIMIZER, checkpoint.STATE)


def _state(step: int) -> dict[str, Any]:
    run = {"step": step, "best_nll": 2.5, "best_step": step, "valid_before": LOSSES}
    return {"step": step, "run": run, "total_steps": 9, "config": "name: x\n"}


class _Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bank = torch.nn.Linear(3, 2, bias=False)
        self.retriever = torch.nn.Linear(2, 2, bias=False)


def _tensors() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    own = {name: torch.ones(value.shape) for name, value in _Module().named_parameters()}
    moments = {
        f"{name}.{kind}": torch.ones(() if kind == "step" else value.shape)
        for name, value in own.items()
        for kind in checkpoint.MOMENTS
    }
    return own, moments


def _header(content: bytes) -> tuple[Any, bytes]:
    """The header of a safetensors file as a tree, and the numbers behind it."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _with_header(tree: Any, numbers: bytes) -> bytes:
    header = json_bytes(tree)
    return struct.pack("<Q", len(header)) + header + numbers


def tensor_files(content: bytes) -> Document:
    """Safetensors files near a good one: its header edited, or its bytes."""
    tree, numbers = _header(content)
    return documents(tree, dump=lambda header: _with_header(header, numbers)) | texts(content)


@functools.cache
def _checkpoint_files(step: int = 7) -> dict[str, bytes]:
    own, moments = _tensors()
    files = {
        checkpoint.TRAINABLES: save_tensors(own),
        checkpoint.OPTIMIZER: save_tensors(moments),
        checkpoint.STATE: json_bytes(_state(step)),
    }
    return {**files, checkpoint.MARKER: json_bytes(_marker(files, step))}


def _marker(files: dict[str, bytes], step: int = 7) -> dict[str, Any]:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return {"format": checkpoint.FORMAT, "step": step, "sha256": digests}


def _checkpoint_documents() -> Document:
    whole = _checkpoint_files()
    return folders(
        {
            checkpoint.STATE: documents(_state(7)),
            checkpoint.MARKER: documents(json.loads(whole[checkpoint.MARKER])),
            checkpoint.TRAINABLES: tensor_files(whole[checkpoint.TRAINABLES]),
            checkpoint.OPTIMIZER: tensor_files(whole[checkpoint.OPTIMIZER]),
        }
    )


def saved(content: bytes, folder: Path) -> None:
    """Find and load a checkpoint beside an older good one, and resume from what was loaded.

    Its digests are right unless they are edited too: anyone can compute them.
    """
    files = unpack(content, _checkpoint_files())
    if files.get(checkpoint.MARKER) == _checkpoint_files()[checkpoint.MARKER]:
        there = {name: files[name] for name in CHECKPOINT if name in files}
        files[checkpoint.MARKER] = json_bytes(_marker(there))
    newest = folder / "checkpoints" / "step-00000007"
    newest.mkdir(parents=True)
    _write(newest, files)
    _write(folder / "checkpoints" / "step-00000003", _checkpoint_files(3))
    assert checkpoint.load_newest(folder / "checkpoints"), "the older checkpoint is good"
    for which in ("best", "last"):
        checkpoint.find(folder / "checkpoints", which)
    held = checkpoint.load(newest)
    checkpoints._state_of(held, newest)
    module = _Module()
    checkpoint.restore_trainables(module, held.trainables, newest)
    optimizer = torch.optim.AdamW(module.parameters())
    names = [name for name, _ in module.named_parameters()]
    checkpoint.restore_optimizer(optimizer, names, held.optimizer, newest)


# Bases -------------------------------------------------------------------------------------------

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SPECIAL = "special_tokens_map.json"
BASE = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    WEIGHTS,
    SPECIAL,
)


@functools.cache
def _base_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        tiny_lm("llama", torch.float32, vocab_size=258).save_pretrained(name)
        byte_tokenizer().save_pretrained(name)
        return {path.name: path.read_bytes() for path in Path(name).iterdir() if path.name in BASE}


def _base_documents() -> Document:
    whole = _base_files()
    config = json.loads(whole["config.json"])
    config |= {"head_dim": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    names = list(_header(whole[WEIGHTS])[0])
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, WEIGHTS)}
    del index["weight_map"]["__metadata__"]  # type: ignore[attr-defined]
    kinds = {
        "config.json": documents(config),
        "tokenizer.json": documents(json.loads(whole["tokenizer.json"])),
        "tokenizer_config.json": documents(json.loads(whole["tokenizer_config.json"])),
        "generation_config.json": documents(json.loads(whole["generation_config.json"])),
        WEIGHTS: tensor_files(whole[WEIGHTS]),
    }
    return folders(kinds) | folders({INDEX: documents(index), "config.json": kinds["config.json"]})


def base(bits: int, content: bytes, folder: Path) -> None:
    """Load a base as training does, prove it, and tokenise with it."""
    files = unpack(content, {INDEX: ABSENT, SPECIAL: ABSENT, **_base_files()})
    if INDEX in files:
        files["part.safetensors"] = files.pop(WEIGHTS, b"")
        files[INDEX] = files[INDEX].replace(WEIGHTS.encode(), b"part.safetensors")
    _write(folder / "base", files)
    config = ModelConfig.model_validate({"base": str(folder / "base"), "base_bits": bits})
    tokenizer = load_tokenizer(config)
    read = load_base_config(config)
    backbone = build_backbone(config, read, torch.device("cpu"), strict=False)
    backbone.check()
    assert tokenizer("hi")["input_ids"] is not None


TARGETS = [
    Target("predictions", documents(LINES, dump=json_lines), predictions),
    Target("told", st.deferred(_run_documents), told, share=0.5),
    Target("arguments", texts(*ARGUMENTS), arguments, share=0.5),
    Target("report", st.deferred(_run_documents), report, share=0.05),
    Target("resumed", st.deferred(_run_documents), resumed, share=0.5),
    Target(
        "lock",
        documents({"host": "a", "pid": 5, "since": "now", "machine": "m", "beat": 3}),
        locked,
        share=0.5,
    ),
    Target("parts", documents(LINES, dump=json_lines), parts, share=0.5),
    Target("checkpoint", st.deferred(_checkpoint_documents), saved),
    Target("base", st.deferred(_base_documents), functools.partial(base, 32), share=0.3),
    Target("base-4-bits", st.deferred(_base_documents), functools.partial(base, 4), share=0.2),
]
