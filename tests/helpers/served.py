"""A run on the shipped base, and a server of it in this process: for tests of `spt-ds serve`."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn

from spt_ds import dist
from spt_ds.config.load import dump_config
from spt_ds.config.schema import Config
from spt_ds.engine.session import open_untrained
from spt_ds.run import checkpoint
from spt_ds.run.folder import RunFolder
from spt_ds.serve.answers import Answers, Meters
from spt_ds.serve.app import create_app
from spt_ds.serve.guard import Guard

CLIENTS = Path(__file__).resolve().parents[2] / "spt_ds" / "assets" / "clients" / "test.jsonl"
NEW_TOKENS = 12


def embedded_run(path: Path, position: str, **sections: dict[str, Any]) -> RunFolder:
    """A run of four prompts on the shipped base, which differ enough to answer differently."""
    given: dict[str, dict[str, Any]] = {
        "model": {"base": "embedded", "base_bits": 32},
        "prompts": {"count": 4, "tokens": 4, "position": position, "init": "vocab"},
        "retriever": {"keys": "learned"},
        "data": {"max_tokens": 192},
        "generate": {"max_new_tokens": NEW_TOKENS},
    }
    for name, section in sections.items():
        given[name] = {**given.get(name, {}), **section}
    config = Config.model_validate(given)
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.config.write_text(dump_config(config), encoding="utf-8")
    session = open_untrained(config, None, dist.init(60))
    trained = session.spt.trainables
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        bank = trained.bank.weight
        bank.add_(0.5 * bank.std() * torch.randn(bank.shape, generator=generator))
    state = {"step": 7, "run": {"best_step": 7}}
    tensors: dict[str, torch.Tensor] = dict(trained.named_parameters())
    checkpoint.save(run.checkpoints, checkpoint.Checkpoint(tensors, {}, state))
    return run


def dialogues(count: int) -> list[dict[str, Any]]:
    """The first rows of the shipped test split."""
    lines = CLIENTS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def body_of(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The request of a dialogue."""
    turns = row["history"]
    roles = ["user" if (len(turns) - n) % 2 else "assistant" for n in range(len(turns))]
    said = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    system = {"role": "system", "content": "\n".join(row["persona"])}
    return {"messages": [system, *said], **more}


@contextmanager
def served(answers: Answers, meters: Meters, **guarded: Any) -> Iterator[tuple[str, Guard]]:
    """Serve on a free port of this machine; gives the address and the guard."""
    guard = Guard(meters, **{"key": None, "local": True, "max_body": 1 << 18, **guarded})
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(answers, meters, guard), log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", guard
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
